"""What must hold for the attention memory of DVGT-2 (arXiv 2604.00813): one view's tokens over its last W frames."""

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import dvgt2

from .drive import play, random_calls, worst

FRAME = 3
# 12 channels as the paper interleaves its 64: pair j turns with time, row or column in turn.
ROPE = ef.Rope(inv_freq=tuple(1000 ** (-j / 6) for j in range(6)), axes=(0, 1, 2, 0, 1, 2))
PLACES = {"coordinates": torch.tensor([[0, 0], [1, 1], [1, 2]])}


def build(window, *, rope=ROPE, **geometry):
    geometry = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "dtype": torch.float64, **geometry}
    return ef.recipe("dvgt2", window=window, frame=FRAME).build(rope=rope, **geometry)


def frames(count, **changes):
    return random_calls([FRAME] * count, tags=[PLACES] * count, **changes)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_any_calls_equal_the_reference(window, kv_heads):
    sizes = [FRAME] * 9 if window == 1 else [FRAME, 2 * FRAME, FRAME, FRAME, 2 * FRAME, FRAME]
    tags = [{"coordinates": PLACES["coordinates"].repeat(size // FRAME, 1)} for size in sizes]
    calls = random_calls(sizes, kv_heads=kv_heads, tentative=2, tags=tags)
    ours = play(build(window, kv_heads=kv_heads), calls)
    assert worst(ours, dvgt2.reference(calls, ROPE, frame=FRAME, window=window)) < 1e-10


@pytest.mark.parametrize("window", [9, 40])
def test_point_1_a_window_as_long_as_the_stream_is_the_causal_forward(window):
    calls = frames(9)
    assert worst(play(build(window), calls), dvgt2.banded(calls, ROPE, frame=FRAME, window=9)) < 1e-10


class Net:
    """Two layers that read their keys from what the layer before gave, so that old frames live on in newer ones."""

    def __init__(self):
        made = torch.Generator().manual_seed(5)
        self.layers = [
            {name: torch.randn(size, 48, generator=made, dtype=torch.float64) / 48**0.5 for name, size in sizes}
            for sizes in [[("q", 48), ("k", 24), ("v", 24)]] * 2
        ]

    def run(self, x, attend):
        for n, weights in enumerate(self.layers):
            q, k, v = ((x @ weights[name].T).unflatten(-1, (-1, 12)).transpose(0, 1) for name in "qkv")
            x = x + attend(n, q, k, v).transpose(0, 1).flatten(1)
        return x

    def stream(self, window, items):
        state, outputs = build(window), []
        for item in items:
            with state.step(FRAME, tags=PLACES):
                outputs.append(self.run(item, lambda n, q, k, v: state.attend(n, q[None], k[None], v[None])[0]))
        return torch.cat(outputs)

    def banded(self, window, items):
        def attend(n, q, k, v):
            parts = (t.split(FRAME, 1) for t in (q, k, v))
            calls = [dvgt2.Call(*one, tags=PLACES) for one in zip(*parts, strict=True)]
            return torch.cat(dvgt2.banded([calls], ROPE, frame=FRAME, window=window)[0], 1)

        return self.run(torch.cat(list(items)), attend)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_point_2_streaming_is_the_banded_mask_in_every_layer_and_no_recomputation(window):
    net, items = Net(), torch.randn(10, FRAME, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    streamed, full = net.stream(window, items), net.banded(10, items)
    assert (streamed - net.banded(window, items)).abs().max() < 1e-10
    same = window * FRAME
    assert (streamed[:same] - full[:same]).abs().max() < 1e-10 < (streamed[same:] - full[same:]).abs().max()
    again = net.banded(window, items[-window:])[-FRAME:]
    if window > 1:
        assert (streamed[-FRAME:] - again).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 2, 4])
def test_point_3_the_cache_is_the_last_frames_and_bounded_also_with_one(window):
    state, calls = build(window), frames(12)
    sizes = []
    for t in range(12):
        play(state, [layer[t : t + 1] for layer in calls])
        first = max(t + 1 - window, 0) * FRAME
        for layer in range(2):
            assert sorted(state.held(layer)) == list(range(first, (t + 1) * FRAME))
        sizes.append(state.nbytes)
    assert len(set(sizes[window:])) == 1


def test_point_4_later_frames_change_nothing_before():
    calls, other = frames(8), frames(8, seed=1)
    mixed = [mine[:5] + theirs[5:] for mine, theirs in zip(calls, other, strict=True)]
    ours, theirs = play(build(3), calls), play(build(3), mixed)
    for mine, changed in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:5], changed[:5], strict=True))
        assert not torch.equal(mine[5], changed[5])


def test_point_5_permuting_the_views_permutes_what_they_get():
    views = [frames(6, seed=seed) for seed in range(3)]

    def streamed(order):
        state, out = build(3, batch=3), []
        for t in range(6):
            with state.step(FRAME, tags=PLACES):
                for layer in range(2):
                    calls = [views[view][layer][t] for view in order]
                    out.append(state.attend(layer, *(torch.stack([getattr(c, n) for c in calls]) for n in "qkv")))
        return torch.stack(out)

    assert torch.equal(streamed([2, 0, 1]), streamed([0, 1, 2])[:, [2, 0, 1]])


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_point_6_a_stream_that_is_ten_million_frames_old_goes_on_as_a_young_one(dtype, within):
    calls = frames(12)
    state = build(4, dtype=dtype)
    play(state, [layer[:5] for layer in calls])
    old = state.fork()
    old.seek(10**7 * FRAME)
    rest = [layer[5:] for layer in calls]
    assert worst(play(old, rest), [[out.double() for out in layer] for layer in play(state, rest)]) < within
    assert old.position == (10**7 + 7) * FRAME


def test_pitfall_the_number_of_tokens_a_frame_may_not_change_within_a_stream():
    state = build(2)
    play(state, frames(1))
    with pytest.raises(ValueError, match="frame"):
        state.step(FRAME + 1).__enter__()
    play(state, frames(1))
