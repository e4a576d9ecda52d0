"""Stream batch, residual guidance, filter and pacing: StreamDiffusion (arXiv 2312.12491), StreamDiffusionV2 (2511.07399)."""

import numpy as np
import pytest
import torch
from torch import nn

import evenflow as ef
from evenflow.generate import (
    Batch,
    Consistency,
    Engine,
    Flow,
    Given,
    Guidance,
    NoiseControl,
    VideoStream,
)
from evenflow.generate.composing import sampler_of
from evenflow.generate.flow import noise
from evenflow.generate.pacing import Latency, batch_for, mode, motion, rebalanced
from evenflow.generate.queue import newest
from evenflow.models.video import places

from .networks import Recording, separable
from .small import CONFIG, SHAPE, drive, picture, small

TIMESTEPS = {1: (999,), 2: (359, 99), 4: (999, 679, 359, 99)}


class UNet(nn.Module):
    """A tiny convolutional UNet: (x, t, embedding) → prediction, rows apart from one another."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.time, self.text = nn.Linear(1, 8), nn.Linear(3, 8)

    @torch.no_grad()
    def forward(self, x, t, text, attend=None):
        text = text.repeat_interleave(len(x) // len(text), 0)
        h = self.down(x[:, 0]) + (self.time(t / 1000) + self.text(text))[..., None, None]
        return self.up(torch.tanh(h))[:, None]


def unet():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return UNet()


TEXT, NEGATIVE = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[-0.7, 0.3, 0.2]])


def frames(count):
    return {f: noise(50, (f,), SHAPE) for f in range(count)}


def stream(n, guidance=None, network=None, count=12, sources=None):
    """Outputs by frame of a stream batch with fixed noise, text and a source frame each call."""
    schedule = Batch(n, first=0, slots=True)
    engine = Engine(network or unet(), Consistency.of(TIMESTEPS[n]), SHAPE, seed=2, slots=True, guidance=guidance)
    return drive(engine, schedule, count + n - 1, Given(TEXT, NEGATIVE, sources or frames(count)), end=count), engine


def paper(n, count, rcfg="none", gamma=1.0, delta=1.0, network=None, spy=None):
    """StreamDiffusion's loop as its code has it, with a stock that is shifted and propagated; float64 outside of the net."""
    network, sampler = network or unet(), Consistency.of(TIMESTEPS[n])
    z = frames(count)
    a = [float(x) for x in sampler.alphas]
    b = [(1 - x * x) ** 0.5 for x in a]
    scaled = [10.0 * t for t in TIMESTEPS[n]]
    skip, keep = [0.25 / (t * t + 0.25) for t in scaled], [t / (t * t + 0.25) ** 0.5 for t in scaled]
    eps = [noise(2, (0, i), SHAPE).double() for i in range(n)]
    nothing = torch.zeros(SHAPE, dtype=torch.float64)
    buffer, stock, out = [nothing] * (n - 1), [eps[0], *[nothing] * (n - 1)], []

    def asked(x, i, text):
        return network(x.float()[None, None], torch.tensor([[float(TIMESTEPS[n][i])]]), text, None)[0, 0].double()

    for k in range(count + n - 1):
        first = a[0] * z[min(k, count - 1)].double() + b[0] * eps[0]
        rows = [first, *buffer]
        stock = [eps[0], *stock[:-1]]
        e = [asked(x, i, TEXT) for i, x in enumerate(rows)]
        if rcfg == "onetime":
            stock[0] = asked(first, 0, NEGATIVE)
        if rcfg == "full":
            away = [asked(x, i, NEGATIVE) for i, x in enumerate(rows)]
            e = [w + gamma * (c - w) for c, w in zip(e, away, strict=True)]
        elif rcfg != "none" and gamma > 1:
            e = [delta * s + gamma * (c - delta * s) for c, s in zip(e, stock, strict=True)]
        if spy is not None:
            spy.append((k, rows, list(stock)))
        clean = [keep[i] * (x - b[i] * e[i]) / a[i] + skip[i] * x for i, x in enumerate(rows)]
        out.append(clean[-1])
        d = [keep[i] * b[i] * (stock[i] - e[i]) / a[i] + skip[i] * b[i] * stock[i] for i in range(n)]
        stock = [(eps[i + 1] + d[i] * a[i + 1] / b[i + 1]) if i + 1 < n else stock[i] for i in range(n)]
        buffer = [a[i + 1] * clean[i] + b[i + 1] * eps[i + 1] for i in range(n - 1)]
    return out


@pytest.mark.parametrize("n", [1, 2, 4])
def test_1_the_batch_equals_the_steps_one_after_another(n):
    made, _ = stream(n)
    network, sampler = unet(), Consistency.of(TIMESTEPS[n])
    for f, z in frames(12).items():
        x = sampler.enter(z, noise(2, (0, 0), SHAPE))[None, None]
        for level in range(n):
            v = network(x, torch.tensor([[float(TIMESTEPS[n][level])]]), TEXT)
            clean, x = sampler.move(x, v, (level,), (level + 1,), noise(2, (0, level + 1), SHAPE)[None, None])
        assert float((made[f] - clean[0, 0]).abs().max()) < 1e-4
    assert sorted(made) == list(range(12))  # also the last n − 1, flushed


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("mode_", ["none", "self", "onetime", "full"])
def test_1_and_2_outputs_are_those_of_the_papers_loop_with_its_stock(n, mode_):
    guidance = None if mode_ == "none" else Guidance(mode_, 1.4, 0.8 if mode_ != "full" else 1.0)
    made, _ = stream(n, guidance)
    theirs = paper(n, 12, mode_, 1.4, 0.8)
    scale = max(float(x.abs().max()) for x in theirs[n - 1 :])
    for f in range(12):
        assert float((made[f] - theirs[f + n - 1]).abs().max()) < 1e-4 * scale


def test_1_changing_a_frame_changes_its_own_output_alone():
    made, _ = stream(4)
    other, _ = stream(4, sources=frames(12) | {5: torch.ones(SHAPE)})
    assert [f for f in range(12) if not torch.allclose(made[f], other[f], atol=1e-6)] == [5]


def test_2_the_residual_leads_back_to_the_input_of_each_row():
    """The paper's propagated stock is the noise that leads back: stock_i = (X_i − α_i z_i)/β_i, which is ours."""
    spy: list = []
    paper(4, 10, "self", 1.4, spy=spy)
    sampler, z = Consistency.of(TIMESTEPS[4]), frames(10)
    for k, rows, stock in spy[3:10]:
        for i in range(4):
            ours = sampler.toward(rows[i][None, None], z[k - i].double()[None, None], (i,))[0, 0]
            assert float((ours - stock[i]).norm() / stock[i].norm()) < 1e-5


@pytest.mark.parametrize(("guidance", "rows"), [
    (None, 4), (Guidance("self", 1.4), 4), (Guidance("onetime", 1.4), 5), (Guidance("full", 1.4), 8),
    (Guidance("full", 1.0), 4), (Guidance("onetime", 0.5), 4),
])  # fmt: skip
def test_3_rows_of_a_call(guidance, rows):
    network = Recording(unet())
    stream(4, guidance, network)
    assert network.shapes[5] == (rows, 1)


@pytest.mark.parametrize("mode_", ["self", "onetime", "full"])
def test_4_guidance_of_1_is_none_and_an_unheard_prompt_is_not_guided(mode_):
    plain, _ = stream(4)
    one, _ = stream(4, Guidance(mode_, 1.0))
    assert all(torch.equal(plain[f], one[f]) for f in plain)
    x, s = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.allclose(Guidance(mode_, 1.0).mix(x, s), x, atol=1e-6)

    def deaf(x, t, text, attend):
        return separable(x, t)

    if mode_ == "full":
        ours, _ = stream(4, Guidance("full", 3.0), deaf)
        theirs, _ = stream(4, None, deaf)
        assert max(float((ours[f] - theirs[f]).abs().max()) for f in ours) < 1e-4
    with pytest.raises(ValueError, match="one of self"):
        Guidance("half")


def test_6_queues_and_state_are_bounded():
    assert newest(list(range(10)), 3) == [3, 6, 9] and newest([1, 2], 4) == [1, 2] and newest([], 2) == []
    assert newest(list(range(7))) == [6]
    schedule = Batch(4, first=0, slots=True)
    engine = Engine(unet(), Consistency.of(TIMESTEPS[4]), SHAPE, slots=True, guidance=Guidance("self"))
    sizes = set()
    for n in range(300):
        given = Given(TEXT, None, {n: noise(1, (n,), SHAPE)})
        engine.turn(schedule.turn(n), schedule.turn(n + 1), given, lambda latents: latents)
        sizes |= {(len(engine.flight), len(engine.anchors))} if n > 4 else set()
    assert sizes == {(3, 3)}


def test_7_one_step_with_self_guidance_does_not_drift():
    made, _ = stream(1, Guidance("self", 1.4), count=100)
    theirs = paper(1, 1, "self", 1.4)  # the first call, before the official stock has been multiplied
    norms = [float(made[f].norm()) for f in range(100)]
    assert float((made[0] - theirs[0]).abs().max()) < 1e-3 * float(theirs[0].abs().max())
    assert max(norms) < 2 * min(norms)


def test_residual_guidance_of_flow_matching_leads_back_along_the_velocity():
    sampler = Flow.of((1000, 500))
    x, z = noise(0, (0,), (1, 2, *SHAPE)), noise(0, (1,), (1, 2, *SHAPE))
    sigma = torch.tensor(sampler.sigma((0, 1)))[:, None, None, None]
    assert torch.allclose(sampler.toward(x, z, (0, 1)), (x - z) / sigma.float(), atol=1e-5)


# -- StreamDiffusionV2 ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_v2_1_the_stream_batch_is_sequential_over_a_cache_for_each_step():
    """Rows of different steps each with their own memory: the same as one memory a step, chunk after chunk."""
    model, T = small(), 3
    ours = VideoStream(model, "a red ball", f"streamdiffusion-v2(steps={T})", f"batch(levels={T})")
    made = [ours._engine.turn(*_turns(ours, n), ours._given(), lambda latents: latents) for n in range(9)]
    ours_by_frame = torch.cat([done[0] for done in made if done])
    sampler, text = sampler_of(ours.schedule, CONFIG.steps, CONFIG.shift), ours._given().text
    spec = ef.recipe("streamdiffusion-v2", steps=1, frame=4)
    caches = [
        spec.build(layers=2, heads=2, head_dim=12, rope=model.transformer.rope, dtype=torch.float32) for _ in range(T)
    ]

    def call(cache, x, level, commit):
        padded = torch.cat([x, x.new_zeros(len(x), 32, 4, 4)], 1)[None]
        t = torch.full((1, len(x)), sampler.times[level])
        with cache.step(4 * len(x), {"coordinates": places(len(x), 2, 2)}, commit):
            return model.transformer(padded, t, text, cache.attend)

    def drawn(frames, level):
        return torch.stack([noise(0, (f, level), (16, 4, 4)) for f in frames])

    expected = []
    for chunk in [(0, 1), *((f,) for f in range(2, 8))]:
        x = drawn(chunk, 0)[None]
        for level in range(T):
            if len(chunk) == 2:  # the first chunk: all caches get what its last step made
                each = [
                    call(cache, x[0], level, level == T - 1) for cache in (caches if level == T - 1 else caches[:1])
                ]
                v = each[0]
            else:
                v = call(caches[level], x[0], level, True)
            levels, after = (level,) * len(chunk), (level + 1,) * len(chunk)
            clean, x = sampler.move(x, v, levels, after, drawn(chunk, level + 1)[None])
        expected.append(clean[0])
    expected = torch.cat(expected)
    assert len(ours_by_frame) >= 8 - T + 1
    assert float((ours_by_frame - expected[: len(ours_by_frame)]).abs().max()) < 1e-4


def _turns(stream, n):
    return stream._calls(n), stream._calls(n + 1)


def test_v2_4_and_6_a_block_is_emitted_when_it_has_passed_all_rows():
    schedule = Batch(3)
    emitted = {n: [f for call in schedule.turn(n) for f in call.emit] for n in range(7)}
    assert emitted == {0: [0, 1], 1: [], 2: [], 3: [2], 4: [3], 5: [4], 6: [5]}


def test_v2_5_the_noise_controller_follows_motion():
    control, level, trace = NoiseControl(), None, []
    for d in (0, 0.2, 0.2, 0.2, 0, 0, 0):
        level = control.level(d, level)
        trace.append(level)
    assert trace == pytest.approx([0.8, 0.71, 0.701, 0.7001, 0.79001, 0.799001, 0.7999001], abs=1e-12)
    assert [control.first_step(s) for s in trace] == [700, 610, 601, 600, 690, 699, 699]
    frames = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    frames[1] = 51
    assert motion(frames) == pytest.approx([0, 0.4, 0.4]) and motion(frames, frames[1]) == pytest.approx(
        [0.4, 0.4, 0.4]
    )


def test_v2_5_a_moving_video_is_followed_more_closely():
    still, moving = np.repeat(picture(1, 1), 21, 0), picture(1, 21)
    levels = {}
    for name, video in (("still", still), ("moving", moving)):
        stream = VideoStream(small(), "a red ball", schedule="chunks(levels=2)", strength=NoiseControl())
        stream.watch(video)
        stream.step()
        stream.step()
        levels[name] = stream._level
    assert levels["still"] == pytest.approx(0.8) and 0.7 < levels["moving"] < 0.72


@pytest.mark.parametrize(("blocks", "inside", "total", "expected"), [
    ([15, 15], [1, 1], [1.5, 1.0], [11, 19]), ([8, 8, 7, 7], [8, 8, 7, 7], [12, 8, 7, 15], [7, 10, 10, 3]),
    ([1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]),
])  # fmt: skip
def test_v2_6_blocks_move_to_who_has_time(blocks, inside, total, expected):
    assert rebalanced(blocks, inside, total) == expected


def test_v2_6_with_equal_blocks_it_never_gets_worse():
    """From the even split that one starts with; other splits may lose a fraction of a block to rounding."""
    random = np.random.default_rng(0)
    for _ in range(20_000):
        devices = int(random.integers(2, 7))
        count = int(random.integers(devices, 61))
        blocks = [count // devices + (i < count % devices) for i in range(devices)]
        extra = [0.0] * devices
        extra[0], extra[-1] = random.uniform(0, 8, 2)
        after = rebalanced(blocks, blocks, [n + e for n, e in zip(blocks, extra, strict=True)])
        assert sum(after) == sum(blocks) and min(after) >= 1
        worst = [max(n + e for n, e in zip(some, extra, strict=True)) for some in (blocks, after)]
        assert worst[1] <= worst[0] + 1e-9


def test_v2_7_batches_grow_to_the_knee_as_the_deadline_allows():
    latency = Latency(0.04, 0.01)
    assert latency.knee == 4
    assert [batch_for(latency, d, 99) for d in (0.01, 0.05, 0.065, 0.2)] == [0, 1, 2, 4] and batch_for(
        latency, 1.0, 3
    ) == 3
    rates = [latency.throughput(b) / latency.throughput(1) for b in (1, 2, 4, 8)]
    assert rates == pytest.approx([5 * b / (4 + b) for b in (1, 2, 4, 8)])
    assert (mode(0.1, 0.2), mode(0.5, 0.0), mode(0.0, 0.7)) == ("batch", "alone", "alone")

    def misses(each, budget):
        """A simulated clock: frames at 16 a second, late ones dropped."""
        clock, waiting, late, longest = 0.0, [], 0, 0
        arrivals = [n / 16 for n in range(400)]
        while arrivals or waiting:
            waiting += [a for a in arrivals if a <= clock]
            arrivals = [a for a in arrivals if a > clock]
            dropped = [a for a in waiting if a + budget < clock + Latency(each * 4, each).of(1)]
            late, waiting = late + len(dropped), [a for a in waiting if a not in dropped]
            longest = max(longest, len(waiting))
            if not waiting:
                clock = arrivals[0] if arrivals else clock
                continue
            take = batch_for(Latency(each * 4, each), budget - (clock - waiting[0]), len(waiting)) or 1
            clock, waiting = clock + Latency(each * 4, each).of(take), waiting[take:]
        return late, longest

    assert misses(0.005, 1.0) == (0, misses(0.005, 1.0)[1]) and misses(0.005, 1.0)[1] <= 8
    late, longest = misses(0.2, 1.0)
    assert late > 100 and longest < 40  # infeasible: frames are dropped, the queue stays bounded


def test_v2_8_two_rows_are_one_call_of_two_rows():
    network = Recording(separable)
    engine = Engine(network, Flow.of((700, 500), 8.0), SHAPE)
    drive(engine, Batch(2, first=0), 6)
    assert network.shapes == [(1, 1)] + [(2, 1)] * 5
