"""The network against `diffusers`, and streamed through a memory against one pass over the whole clip."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evenflow as ef
from evenflow.memory.rope import Rotary
from evenflow.models.video import VideoConfig, VideoTransformer, places
from evenflow.models.video.dense import Dense, chunk_causal
from evenflow.models.video.names import to_diffusers
from evenflow.models.video.transformer import compiled

from .nets import SMALL, network, noise, theirs

WIDE = replace(SMALL, heads=2, layers=2, in_channels=9)  # head_dim 24: 8 channels an axis; conditions behind the latent
ODD = replace(SMALL, dim=56, heads=2, layers=1)  # head_dim 28: 12, 8 and 8


def dense(model: VideoTransformer, frames: int, height: int, width: int, sees=None, first: int = 0, **more) -> Dense:
    return Dense(model.rope, model.config.head_dim, torch.arange(first, first + frames), height // 2, width // 2, sees, **more)  # fmt: skip


def build(model: VideoTransformer, tokens: int, recipe: str = "self-forcing", *, batch: int = 1, dtype=torch.float32, **params):  # fmt: skip
    c = model.config
    return ef.recipe(recipe, frame=tokens, **params).build(
        layers=c.layers, heads=c.heads, kv_heads=c.heads, head_dim=c.head_dim, rope=model.rope, batch=batch, dtype=dtype
    )


def call(model, state, x, t, text, commit=True):
    frames, height, width = x.shape[1], x.shape[3] // 2, x.shape[4] // 2
    tags = {"coordinates": places(frames, height, width)}
    with state.step(frames * height * width, tags=tags, commit=commit):
        return model(x, t, text, state.attend)


@pytest.mark.parametrize("config", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 2), (3, 4, 6), (4, 6, 2)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_point_2_the_network_is_that_of_diffusers(config, frames, height, width, per_frame):
    model, other = network(config), theirs(config)
    other.load_state_dict(to_diffusers(model.state_dict()))
    x = noise(2, frames, config.in_channels, height, width)
    text = noise(2, config.text_len, config.text_dim, seed=1)
    tokens = height * width // 4
    t = torch.tensor([[1000.0, 625.0, 0.0, 937.5], [3.25, 833.3333, 500.0, 1.0]])[:, :frames]
    if not per_frame:
        t = t[:, :1].expand(-1, frames)
    ours = model(x, t, model.read(text), dense(model, frames, height, width))
    time = t.repeat_interleave(tokens, 1) if per_frame else t[:, 0]
    expected = other(x.transpose(1, 2), time, text, return_dict=False)[0].transpose(1, 2)
    assert expected.abs().max() > 0.5
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("sizes", "tokens"), [((3, 3, 3), (4, 6)), ((1, 3, 2, 1), (2, 4)), ((1, 1, 1, 1), (6, 2))])
@pytest.mark.parametrize("batch", [1, 2])
def test_point_1_chunks_through_a_memory_are_one_block_causal_pass(sizes, tokens, batch):
    model, (height, width), frames = network(), tokens, sum(sizes)
    x, text = noise(batch, frames, 5, height, width), model.read(noise(batch, 7, 20, seed=1))
    t = torch.linspace(0, 1000, batch * frames).reshape(batch, frames)
    ends = list(itertools.accumulate(sizes))
    mine = torch.tensor([sum(f >= end for end in ends) for f in range(frames)])  # the chunk of a frame
    whole = model(x, t, text, dense(model, frames, height, width, mine[None] <= mine[:, None]))
    state = build(model, height * width // 4, window=None, batch=batch)
    parts = [
        call(model, state, x[:, end - n : end], t[:, end - n : end], text) for n, end in zip(sizes, ends, strict=True)
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_point_1_a_window_with_sinks_is_the_mask_of_training():
    model, frames = network(), 15
    x, text = noise(1, frames, 5, 4, 4), model.read(noise(1, 7, 20, seed=1))
    t = torch.full((1, frames), 0.0)
    sees = chunk_causal(frames, 3, sink=3, window=6)
    whole = model(x, t, text, dense(model, frames, 4, 4, sees))
    state = build(model, 4, "longlive", window=9, sink=3)
    ours = torch.cat([call(model, state, part, t[:, :3], text) for part in x.split(3, 1)], 1)
    assert (ours - whole).abs().max() < 1e-5


def test_point_3_denoising_leaves_the_cache_that_the_clean_pass_alone_leaves():
    model = network()
    text = model.read(noise(1, 7, 20, seed=1))
    denoised, clean = build(model, 4, window=6), build(model, 4, window=6)
    for chunk in range(4):
        x = noise(1, 3, 5, 4, 4, seed=10 * chunk)
        for attempt, t in enumerate((1000.0, 937.5, 833.33, 625.0)):
            call(model, denoised, noise(1, 3, 5, 4, 4, seed=100 + attempt), torch.full((1, 3), t), text, commit=False)
            assert denoised.position == chunk * 12
        zero = torch.zeros(1, 3)
        assert torch.equal(call(model, denoised, x, zero, text), call(model, clean, x, zero, text))
        ours, alone = denoised.state_dict(), clean.state_dict()
        assert ours.keys() == alone.keys() and all(torch.equal(ours[name], alone[name]) for name in ours)


@pytest.mark.parametrize("what", ["noise", "prompt"])
def test_point_4_what_comes_later_changes_nothing_before(what):
    model = network()
    texts = [model.read(noise(1, 7, 20, seed=seed)) for seed in (1, 2)]

    def video(change: bool) -> list[torch.Tensor]:
        state = build(model, 4, window=6)
        late = [change and chunk >= 2 for chunk in range(4)]
        return [
            call(
                model, state, noise(1, 3, 5, 4, 4, seed=chunk + 50 * (now and what == "noise")), torch.full((1, 3), 500.0),
                texts[now and what == "prompt"],
            )
            for chunk, now in enumerate(late)
        ]  # fmt: skip

    plain, changed = video(False), video(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], changed[:2], strict=True))
    assert not torch.equal(plain[2], changed[2])


def test_point_6_a_window_has_constant_bytes():
    model = network()
    text, state, sizes = model.read(noise(1, 7, 20, seed=1)), build(model, 4, window=6), []
    for _ in range(20):  # ten windows
        call(model, state, noise(1, 3, 5, 4, 4), torch.zeros(1, 3), text)
        sizes.append(state.nbytes)
    assert len(set(sizes[2:])) == 1


def test_point_8_a_stored_key_turned_further_is_the_raw_key_turned_there():
    model = network(VideoConfig("head", dim=256, ffn_dim=8, heads=2, layers=1))
    rotary = Rotary(model.rope, 128, torch.float32, torch.device("cpu"))
    key = noise(6, 128)
    here = torch.cat([torch.arange(3).repeat_interleave(2)[:, None], places(3, 1, 2)], 1)
    for delta in (1, 21, 1024, 10**6):
        later = torch.tensor([delta, 0, 0])
        moved = rotary.rotate(rotary.rotate(key, *rotary.at(here)), *rotary.at(later))
        raw = rotary.rotate(key, *rotary.at(here + later))
        assert (moved - raw).abs().max() < 1e-5
        # Only the channels of time move: 44 of 128.
        assert torch.equal(moved[:, 44:], rotary.rotate(key, *rotary.at(here))[:, 44:])


def test_the_rope_is_that_of_wan():
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    model = network(VideoConfig("head", dim=256, ffn_dim=8, heads=2, layers=1))
    cos, sin = WanRotaryPosEmbed(128, (1, 2, 2), 1024)(torch.empty(1, 16, 5, 6, 8))
    rotary = Rotary(model.rope, 128, torch.float64, torch.device("cpu"))
    where = torch.cat([torch.arange(5).repeat_interleave(12)[:, None], places(5, 3, 4)], 1)
    ours = rotary.at(where)
    assert (ours[0] - cos[0, :, 0]).abs().max() < 1e-6
    assert (ours[1][:, 1::2] - sin[0, :, 0, 1::2]).abs().max() < 1e-6


def test_frames_read_the_text_of_their_group():
    model, t = network(), torch.full((2, 4), 300.0)
    x, texts = noise(2, 4, 5, 4, 4), noise(4, 7, 20, seed=1)  # two texts a row, for frames 0-1 and 2-3
    apart = torch.tensor([0, 0, 1, 1])
    attend = dense(model, 4, 4, 4, apart[None] == apart[:, None])  # groups that do not see each other either
    both = model(x, t, model.read(texts), attend)
    for row, group in itertools.product(range(2), range(2)):
        part = slice(2 * group, 2 * group + 2)
        one = model(
            x[row : row + 1, part], t[:1, :2], model.read(texts[2 * row + group][None]), dense(model, 2, 4, 4, first=2 * group)
        )  # fmt: skip
        assert (both[row : row + 1, part] - one).abs().max() < 1e-5


def test_half_precision_is_near():
    model = network()
    half = network(dtype=torch.bfloat16)
    x, t, text = noise(1, 3, 5, 4, 4), torch.tensor([[1000.0, 500.0, 0.0]]), noise(1, 7, 20, seed=1)
    exact = model(x, t, model.read(text), dense(model, 3, 4, 4))
    near = half(x.bfloat16(), t, half.read(text.bfloat16()), dense(half, 3, 4, 4, dtype=torch.bfloat16))
    assert near.dtype == torch.bfloat16 and (near.float() - exact).abs().max() < 0.06 * exact.abs().max()


class Asked(TorchDispatchMode):
    """Counts what makes a GPU wait for its host, or the other way: numbers read from tensors."""

    count = 0
    waits = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten._unique2.default,
    )

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in self.waits
        return op(*args, **(kwargs or {}))


def test_no_layer_reads_numbers_from_tensors():
    """What a step has to know it asks once, whatever the depth; a stream of many layers never waits between them."""
    asked = []
    for layers in (1, 6):
        model = network(replace(SMALL, layers=layers))
        text, state, x = (
            model.read(noise(1, 7, 20)),
            build(model, 4, "longlive", window=6, sink=3),
            noise(1, 3, 5, 4, 4),
        )
        for _ in range(4):
            call(model, state, x, torch.zeros(1, 3), text)
        for commit in (False, True):
            with Asked() as seen:
                call(model, state, x, torch.zeros(1, 3), text, commit)
            asked.append(seen.count)
    assert asked[:2] == asked[2:] and 0 < max(asked) < 12


def test_blocks_compile_once_and_give_the_same():
    plain, fast = network(), compiled(network(), backend="eager")
    text, state, other = noise(1, 7, 20, seed=1), build(plain, 4, window=6), build(fast, 4, window=6)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():  # three blocks, one graph
        for chunk in range(3):
            x, t = noise(1, 3, 5, 4, 4, seed=chunk), torch.full((1, 3), 300.0 * chunk)
            assert torch.equal(call(fast, other, x, t, fast.read(text)), call(plain, state, x, t, plain.read(text)))
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_wrong_shapes_are_refused():
    model = network()
    text, attend = model.read(noise(1, 7, 20)), dense(model, 3, 4, 4)
    with pytest.raises(ValueError, match="expected"):
        model(noise(1, 3, 4, 4, 4), torch.zeros(1, 3), text, attend)
    with pytest.raises(ValueError, match="expected"):
        model(noise(1, 3, 5, 4, 4), torch.zeros(1), text, attend)
    with pytest.raises(ValueError, match=r"5×4.*multiples of 2×2"):
        model(noise(1, 3, 5, 5, 4), torch.zeros(1, 3), text, attend)
