"""Schedules against what their papers say: rolling window, moving buffer, overlapping chunks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from evenflow.generate import Buffer, Chunks, Engine, Flow, Knots, Rolling, VideoStream, parse_schedule
from evenflow.generate.composing import rain, sampler_of
from evenflow.generate.flow import Consistency, alpha_table, even, nearest, noise, sigma_table, warped

from .networks import Recording, mixing, separable
from .small import SHAPE, Oracle, drive, small


def targets(count=80, seed=5):
    return {f: noise(seed, (f,), SHAPE) for f in range(-4, count)}


def engine(network, sampler, **options):
    return Engine(network, sampler, SHAPE, **options)


def steps_of(schedule):
    return sampler_of(schedule, (1000, 750, 500, 250), 5.0)


# -- flow matching -------------------------------------------------------------------------------------------------------


def test_self_forcing_5_warped_steps_are_exactly_these():
    assert warped((1000, 750, 500, 250), 5.0) == pytest.approx((1.0, 0.9375, 5 / 6, 0.625), abs=1e-15)
    assert Flow.of((1000, 750, 500, 250)).times == pytest.approx((1000.0, 937.5, 2500 / 3, 625.0), abs=1e-12)
    assert warped(even(5), 5.0) == pytest.approx((1.0, 0.95238, 0.88235, 0.76923, 0.55556), abs=5e-6)
    table = sigma_table(5.0)
    assert len(table) == 1000 and float(table[-1]) == pytest.approx(0.00498, abs=5e-6) and float(table[0]) == 1.0
    slow = [abs(float(entry) - 0.9) for entry in table]
    assert float(nearest(0.9)) == float(table[slow.index(min(slow))])
    assert torch.equal(nearest(table[::37]), table[::37])


def test_self_forcing_5_an_oracle_is_exact_at_every_step():
    sampler, target = Flow.of((1000, 750, 500, 250)), torch.randn(1, 3, *SHAPE)
    x = noise(0, (0,), (1, 3, *SHAPE))
    for level, sigma in enumerate(sampler.sigmas):
        clean, x = sampler.move(x, (x - target) / sigma, (level,) * 3, (level + 1,) * 3, noise(0, (level,), x.shape))
        assert float((clean - target).abs().max()) < 1e-6
    assert torch.equal(x, clean)


def test_noise_is_of_its_key_alone():
    a = noise(7, (3, 2), (2, 3))
    torch.randn(5)
    assert torch.equal(a, noise(7, (3, 2), (2, 3)))
    assert (
        len({float(noise(*key, (1,))) for key in [(7, (3, 2)), (7, (2, 3)), (8, (3, 2)), (7, (3,)), (-7, (3, 2))]}) == 5
    )
    many = noise(0, (0,), (20_000,))
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


@settings(max_examples=40)
@given(some.sampled_from(["flow", "noise", "v"]), some.integers(0, 3), some.integers(0, 99))
def test_toward_is_the_output_that_means_a_clean_latent(kind, level, seed):
    zero = kind == "v"
    sampler = Flow.of(even(4)) if kind == "flow" else Consistency.of((999, 679, 359, 99), kind, zero_snr=zero)
    x, clean = noise(seed, (0,), (1, 1, *SHAPE)), noise(seed, (1,), (1, 1, *SHAPE))
    if kind == "v" and level == 0:
        return  # pure noise: v says nothing of x, and everything of the clean latent
    out = sampler.toward(x, clean, (level,))
    assert float((sampler.clean(x, out, (level,)) - clean).abs().max()) < 1e-4


def test_names_of_schedules():
    assert parse_schedule("rolling(levels=3)") == Rolling(3) and parse_schedule(" buffer(0, 8, 2, 1)") == Buffer()
    assert parse_schedule("rain") == rain() and parse_schedule("chunks", chunk=1, levels=2) == Chunks(2, 1)
    assert parse_schedule("chunks(5)", levels=2, chunk=3) == Chunks(5, 3)
    for wrong in (
        "buffer(1, 2, 3, 4, 'x')",
        "buffer(N=0)",
        "rolling(levels=-1)",
        "knots(knot=4)",
        "batch(1, 2, 3, 4, 5, 6)",
    ):
        with pytest.raises(ValueError, match="schedule"):
            parse_schedule(wrong)


# -- rolling window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "blocks"), [(5, 9), (3, 7), (1, 4), (5, 3), (4, 4)])
def test_rolling_2_and_9_every_block_passes_all_levels_in_order(levels, blocks):
    schedule, passed, emitted, turns = Rolling(levels), {}, [], 0
    while calls := schedule.turn(turns, 3 * blocks):
        joint = calls[0]
        first, last = max(0, turns - levels + 1), min(blocks - 1, turns)
        assert joint.frames == tuple(range(3 * first, 3 * last + 3)) and not joint.commit
        n, ladder = (
            last - first + 1,
            [level for frame, level in zip(joint.frames, joint.before, strict=True) if frame % 3 == 0],
        )
        if blocks >= levels and turns < levels - 1:
            assert ladder == list(range(levels))[:n][::-1]  # the noisiest n
        elif blocks >= levels and turns >= blocks:
            assert ladder == list(range(levels))[levels - n :][::-1]  # the cleanest n
        for frame, before, after in zip(joint.frames, joint.before, joint.after, strict=True):
            assert after == before + 1 and joint.before[joint.frames.index(frame) // 3 * 3] == before
            passed.setdefault(frame, []).append(before)
        emitted += joint.emit
        assert [call.frames for call in calls[1:]] == ([joint.emit] if joint.emit else [])
        assert all(call.commit and call.clean for call in calls[1:])
        turns += 1
    assert turns == blocks + levels - 1 and emitted == list(range(3 * blocks))
    assert all(levels_of == list(range(levels)) for levels_of in passed.values())


def test_rolling_1_one_level_is_one_step_chunk_by_chunk():
    rolling = VideoStream(small(), "a red ball", "rolling-forcing", "rolling(levels=1)")
    chunks = VideoStream(small(), "a red ball", "self-forcing", "chunks(levels=1)")
    assert all(np.array_equal(rolling.step().frames, chunks.step().frames) for _ in range(7))


def test_rolling_1_a_network_that_sees_no_other_blocks_goes_the_way_of_chunks():
    sampler = steps_of(Rolling(5))
    ours = drive(engine(separable, sampler), Rolling(5), 10)
    theirs = drive(engine(separable, sampler), Chunks(5), 6)
    assert len(ours) == 18 and all(torch.equal(ours[f], theirs[f]) for f in range(18))


@pytest.mark.parametrize(
    "schedule", [Rolling(5), Rolling(3, 1), Chunks(4), Buffer(0, 4, 2, 2), rain(), Buffer(2, 3, 2, 1), Knots()]
)
def test_rolling_3_streamdit_4_and_knots_4_an_oracle_is_met_exactly(schedule):
    sampler, aims = steps_of(schedule), targets()
    oracle = Oracle(aims, lambda t: t / 1000)
    made = drive(engine(oracle, sampler), schedule, 11)
    assert sorted(made) == list(range(len(made))) and len(made) >= 8
    assert max(float((made[f] - aims[f]).abs().max()) for f in made) < 1e-5


def test_rolling_5_the_first_windows_read_no_cache():
    """The first chunk of a stream is that of a network without memory, and then the memory holds block 0 alone."""
    stream, alone = (VideoStream(small(), "a red ball", schedule="rolling") for _ in range(2))
    seen = []
    step = stream._engine.memory.step
    stream._engine.memory.step = lambda m, tags, commit, *rest: seen.append((m, commit)) or step(m, tags, commit, *rest)
    first = stream.step()
    assert seen == [(12 * n, False) for n in range(1, 6)] + [(12, True)]
    alone._engine.memory = None
    assert np.array_equal(first.frames, alone.step().frames)
    assert stream._engine.memory.position == 12 and stream.held()[:3] == [(0, "sink"), (1, "sink"), (2, "sink")]


def test_rolling_6_a_block_depends_on_no_noise_after_its_own_window():
    sampler = steps_of(Rolling(5))
    expected = drive(engine(mixing, sampler), Rolling(5), 10)
    for block in (4, 5, 7):
        other = engine(mixing, sampler)
        own = other.noise
        other.noise = lambda frame, level, block=block, own=own: own(frame, level) + (frame // 3 == block)
        made = drive(other, Rolling(5), 10)
        same = [torch.equal(made[f], expected[f]) for f in range(0, 18, 3)]
        assert same == [b + 4 < block for b in range(6)]


def test_rolling_7_two_calls_a_chunk():
    network = Recording(separable)
    drive(engine(network, steps_of(Rolling(5))), Rolling(5), 12)
    assert network.shapes[-6:] == [(1, 15), (1, 3)] * 3
    assert len(Chunks(5).turn(3)) == 6


# -- moving buffer -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    some.integers(0, 3),
    some.integers(1, 5),
    some.integers(1, 3),
    some.integers(1, 3),
    some.booleans(),
    some.integers(1, 25),
)
def test_streamdit_1_partition_arithmetic(K, N, c, s, growing, end):
    schedule = Buffer(K, N, c, s, start="growing" if growing else "uniform")
    passed, emitted, turn, total = {}, [], 0, N * s
    assert (schedule.levels, schedule.at_once) == (total, K + N * c)
    while calls := schedule.turn(turn, end):
        clip = bool(calls) and not growing and N > 1 and turn == 0
        for call in () if clip else calls:
            assert all(a >= b for a, b in zip(call.before, call.before[1:], strict=False))  # the front is cleaner
            for frame, before, after in zip(call.frames, call.before, call.after, strict=True):
                if before < total:
                    assert after == before + 1
                    passed.setdefault(frame, []).append(before)
                else:
                    assert after == total and frame in emitted
            assert len(call.frames) <= K + N * c
        emitted += [frame for call in calls for frame in call.emit]
        for call in calls if clip else ():
            for frame in call.frames:
                passed.setdefault(frame, list(range((N - 1) * s)))
            for frame in call.aside:
                passed[frame] = list(range(call.before[call.frames.index(frame)]))
        turn += 1
    assert emitted == list(range(end)) and all(levels == list(range(total)) for levels in passed.values())


def euler(network, steps, frames):
    """Ordinary Euler sampling of a clip of frames, by definition."""
    x = torch.stack([noise(0, (f, 0), SHAPE) for f in frames])[None].double()
    for i in range(steps):
        sigma, after = 1 - i / steps, 1 - (i + 1) / steps
        v = network(x.float(), torch.full((1, len(frames)), 1000 * sigma))
        x = (x + (after - sigma) * v.double()).float().double()
    return x[0].float()


def test_streamdit_2_one_chunk_is_an_ordinary_clip():
    schedule = Buffer(0, 1, 6, 5)
    made = drive(engine(mixing, steps_of(schedule)), schedule, 2)
    for first in (0, 6):
        expected = euler(mixing, 5, range(first, first + 6))
        assert max(float((made[first + i] - expected[i]).abs().max()) for i in range(6)) < 1e-6


def test_streamdit_3_single_frames_and_steps_are_a_queue():
    """FIFO by definition: a list, all advance one level, the first leaves, noise enters."""
    schedule, B = Buffer(0, 4, 1, 1), 4
    made = drive(engine(mixing, steps_of(schedule)), schedule, 10)
    clip = torch.stack([noise(0, (f, 0), SHAPE) for f in range(B)]).double()
    queue: list[torch.Tensor] = []
    for level in range(B):  # a clip of the whole buffer, of which each frame stays at its own level
        queue.insert(0, clip[B - 1 - level].clone())
        v = mixing(clip[None].float(), torch.full((1, B), 1000.0 - 250 * level))[0].double()
        clip = clip - v / B
    for turn in range(9):
        sigma = torch.tensor([0.25, 0.5, 0.75, 1.0])
        v = mixing(torch.stack(queue)[None].float(), 1000 * sigma[None])[0].double()
        queue = [x - v[i] / B for i, x in enumerate(queue)]
        assert float((queue.pop(0) - made[turn]).abs().max()) < 1e-5
        queue.append(noise(0, (B + turn, 0), SHAPE).double())


@pytest.mark.parametrize(("N", "c", "s"), [(4, 2, 1), (2, 3, 4), (8, 1, 1), (1, 5, 3), (3, 2, 2)])
@pytest.mark.parametrize("start", ["uniform", "growing"])
def test_streamdit_5_a_separable_network_streams_as_it_samples(N, c, s, start):
    schedule = Buffer(0, N, c, s, start=start)
    made = drive(engine(separable, steps_of(schedule)), schedule, 9)
    expected = euler(separable, N * s, range(len(made)))
    assert len(made) >= 9 - schedule.delay and max(float((made[f] - expected[f]).abs().max()) for f in made) < 1e-5


def test_streamdit_9_the_cost_of_a_call_is_the_buffer():
    for schedule in (Buffer(0, 8, 2, 1), Buffer(0, 4, 4, 1)):
        network = Recording(separable)
        drive(engine(network, steps_of(schedule)), schedule, 6)
        assert set(network.shapes) == {(1, 16)}


# -- RAIN ----------------------------------------------------------------------------------------------------------------

TIMESTEPS = (999, 749, 499, 249)


def rainy(network):
    return engine(network, Consistency.of(TIMESTEPS, "v", zero_snr=True))


def test_rain_1_2_and_9_timesteps_start_and_cost():
    network = Recording(separable)
    made = drive(rainy(network), rain(), 7)
    assert [t[0, ::4].tolist() for t in network.times[:4]] == [[999], [749, 999], [499, 749, 999], [249, 499, 749, 999]]
    assert all(t[0].tolist() == [x for x in (249, 499, 749, 999) for _ in range(4)] for t in network.times[3:])
    assert network.shapes[3:] == [(1, 16)] * 4 and sorted(made) == list(
        range(16)
    )  # 7 groups in, 4 out: 4 calls a frame
    end = drive(rainy(separable), rain(), 10, end=28)
    assert sorted(end) == list(range(28))  # the flush brings the other three


def ordinary_lcm(x, v, t, before, fresh):
    """One step of an LCM scheduler with v-prediction on one group, float64."""
    table = alpha_table(zero_snr=True)
    a, b = float(table[t]), (1 - float(table[t]) ** 2) ** 0.5
    scaled = 10.0 * t
    skip, keep = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    clean = keep * (a * x - b * v) + skip * x
    if before < 0:
        return clean
    a, b = float(table[before]), (1 - float(table[before]) ** 2) ** 0.5
    return a * clean + b * fresh


def test_rain_3_a_step_of_all_groups_is_a_step_of_each():
    sampler = Consistency.of(TIMESTEPS, "v", zero_snr=True)
    assert sampler.alphas[0] == 0.0  # no signal in pure noise
    x, v, fresh = (noise(n, (0,), (1, 16, *SHAPE)) for n in range(3))
    levels = [level for level in (3, 2, 1, 0) for _ in range(4)]
    _, moved = sampler.move(x, v, levels, [level + 1 for level in levels], fresh)
    for frame, level in enumerate(levels):
        t = TIMESTEPS[level]
        expected = ordinary_lcm(x[0, frame].double(), v[0, frame].double(), t, t - 250, fresh[0, frame].double())
        assert float((moved[0, frame] - expected).abs().max()) < 1e-6


def test_rain_4_without_temporal_attention_groups_go_their_own_ways():
    made = drive(rainy(separable), rain(), 8)
    for frame in (0, 5, 18):
        x = noise(0, (frame, 0), SHAPE).double()
        for level, t in enumerate(TIMESTEPS):
            v = separable(x.float()[None, None], torch.tensor([[float(t)]]))[0, 0].double()
            x = ordinary_lcm(x, v, t, t - 250, noise(0, (frame, level + 1), SHAPE).double()).float().double()
        assert float((made[frame] - x).abs().max()) < 1e-5


def test_rain_5_a_group_changes_those_in_flight_with_it_and_none_before():
    expected = drive(rainy(mixing), rain(), 9)
    other = rainy(mixing)
    own = other.noise
    other.noise = lambda frame, level: own(frame, level) + (frame // 4 == 4 and level == 0)
    made = drive(other, rain(), 9)
    assert [torch.equal(made[4 * g], expected[4 * g]) for g in range(6)] == [True] + [False] * 5


def test_rain_8_what_is_in_flight_is_bounded():
    one, sizes = rainy(mixing), []
    for n in range(40):
        one.turn(rain().turn(n), rain().turn(n + 1), _none(), lambda latents: latents)
        sizes.append(len(one.flight))
    assert set(sizes[4:]) == {12}


def _none():
    from evenflow.generate import Given

    return Given()


# -- knots ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "knot"), [(3, 1), (3, 0), (2, 2), (4, 3)])
def test_knots_1_and_8_frames_come_once_and_in_order(chunk, knot):
    schedule = Knots(4, chunk, knot)
    emitted, m = [], 0
    for m in range(6):
        *denoising, clean = schedule.turn(m)
        assert {call.frames for call in denoising} == {tuple(range(m * chunk, m * chunk + chunk + knot))}
        assert len(denoising) == 4 and clean.commit and clean.frames == denoising[-1].emit  # (c + k)/c, and a pass of c
        emitted += denoising[-1].emit
    assert emitted == list(range(6 * chunk))


def test_knots_2_without_a_knot_they_are_chunks():
    ours = VideoStream(small(), "a red ball", "self-forcing", "knots(knot=0)")
    theirs = VideoStream(small(), "a red ball", "self-forcing", "chunks")
    assert all(np.array_equal(ours.step().frames, theirs.step().frames) for _ in range(4))
    assert Knots(4, 3, 0).turn(2) == Chunks(4, 3).turn(2)


def test_knots_3_pinned_frames_are_the_knot_bit_for_bit_in_every_call():
    sampler, schedule, aims = steps_of(Knots()), Knots(4, 3, 2), targets()
    oracle = Oracle(aims, lambda t: t / 1000)
    one = engine(oracle, sampler)
    drive(one, schedule, 5)
    by_turn = [oracle.seen[5 * n : 5 * n + 5] for n in range(5)]
    for before, after in pairwise(by_turn):
        _, times, x = before[3]
        v = (x.double() - torch.stack([aims[f] for f in before[3][0]]).double()) / (times[0] / 1000)
        knot = (x.double() - times[0] / 1000 * v)[:, 3:]
        for frames, _, seen in after[:4]:
            assert torch.equal(seen[:, :2], after[0][2][:, :2]) and frames[:2] == before[3][0][3:]
            assert float((seen[:, :2] - knot).abs().max()) < 1e-6


def test_knots_4_the_two_versions_of_a_knot_are_averaged():
    """A network that says 1 at the first sight of a frame and 3 at the second: the knot becomes 2."""

    class Twice(Oracle):
        def __call__(self, x, t, text, attend):
            pinned = len(self.frames) == 4 and self.frames[0] > 0
            self.targets = {f: torch.full(SHAPE, 3.0 if pinned and f == self.frames[0] else 1.0) for f in self.frames}
            return super().__call__(x, t, text, attend)

    made = drive(engine(Twice({}, lambda t: t / 1000), steps_of(Knots())), Knots(), 4)
    assert [round(float(made[f].mean()), 4) for f in range(12)] == [1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1]


def test_knots_5_and_6_the_memory_holds_the_reference_and_the_window_and_the_reference_runs_ahead():
    from .small import picture

    memory = "knot-forcing(window=6)"
    stream = VideoStream(small(), "a red ball", memory, "knots")
    stream.show(picture())
    assert stream.position == 0 and stream.held() == [(-1, "sink")]
    sizes, expected = [], []
    for m in range(1, 9):
        stream.step()
        held = stream.held()
        assert held[0] == (-1, "sink") and [region for _, region in held[1:-1]] == ["window"] * min(6, 3 * m)
        expected = [(3 * m - min(6, 3 * m) + i, "window") for i in range(min(6, 3 * m))]
        assert held[1:-1] == expected and held[-1] == (3 * m, "flight")  # the knot is in flight, never in the memory
        sizes.append(stream.nbytes)
    assert len(set(sizes[3:])) == 1
    place = stream.memory.place
    assert [int(place.ahead(torch.tensor(i))) for i in range(0, 18, 3)] == [8, 8, 12, 16, 16, 20]
    with pytest.raises(ValueError, match="stride"):
        VideoStream(small(), "", "knot-forcing(stride=2)", "knots")
    with pytest.raises(ValueError, match="same numbers"):
        VideoStream(small(), "", "knot-forcing", "knots(chunk=2)")
