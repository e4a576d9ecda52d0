"""What must hold for MotionStream (arXiv 2511.01266): sink chunks, a short window, positions in the cache."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import evenflow as ef
from evenflow.memory import Absolute, Contiguous
from evenflow.recipes.reference import motionstream, self_forcing

from .drive import play, random_calls, slower, worst
from .switching import content

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(CHUNK, 1)


def build(memory=None, *, layers=2, kv_heads=2, dtype=torch.float64, **params):
    memory = memory or ef.recipe("motionstream", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype)


def chunks(count, **changes):
    return random_calls([CHUNK * FRAME] * count, tags=[{"coordinates": GRID}] * count, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(("sink", "window"), [(1, 1), (0, 1), (2, 1), (1, 3), (0, 6), (3, 20)])
def test_any_calls_equal_the_reference(sink, window, tentative, kv_heads):
    calls = chunks(8, tentative=tentative, kv_heads=kv_heads)
    theirs = motionstream.reference(calls, ROPE, frame=FRAME, sink=sink, window=window)
    assert worst(play(build(sink=sink, window=window, kv_heads=kv_heads), calls), theirs) < 1e-10


@pytest.mark.parametrize("chunk", [1, 7])
def test_other_chunks_equal_the_reference(chunk):
    tags = {"coordinates": GRID[:FRAME].repeat(chunk, 1)}
    calls = random_calls([chunk * FRAME] * 6, tags=[tags] * 6)
    theirs = motionstream.reference(calls, ROPE, frame=FRAME, sink=1, window=2)
    assert worst(play(build(sink=1, window=2, chunk=chunk), calls), theirs) < 1e-10


@pytest.mark.parametrize(("sink", "window"), [(1, 1), (0, 1), (0, 6), (2, 3)])
def test_point_1_it_holds_sinks_and_window_and_nothing_else(sink, window):
    calls, state = chunks(40), build(sink=sink, window=window)
    sizes = []
    for t in range(40):
        play(state, part(calls, t, t + 1))
        held = [j * CHUNK * FRAME + n for j in motionstream.context(t + 1, sink, window) for n in range(CHUNK * FRAME)]
        assert state.held(0) == held
        sizes.append(state.nbytes)
    assert len(state.held(0)) == (sink + window) * CHUNK * FRAME
    assert len(set(sizes[sink + window :])) == 1


def test_point_1_no_position_exceeds_the_cache():
    """Read from the outside: keys of ones, and queries that only the turn by a position can tell apart."""

    class Seen(Contiguous):
        largest: ClassVar[list[int]] = []

        def positions(self, view):
            places = super().positions(view)
            there = torch.where(view.index >= 0, places.keys, 0)
            self.largest.append(max(int(there.max()), int(places.queries.max())))
            return places

    memory = replace(ef.recipe("motionstream", frame=FRAME), place=Seen())
    play(build(memory), chunks(12))
    assert Seen.largest == [2, 5, *[(1 + 1 + 1) * CHUNK - 1] * 10]


def test_point_1_time_per_chunk_is_flat():
    calls, state = chunks(1), build()
    for _ in range(5):
        play(state, calls)
    young = state.fork()
    for _ in range(145):
        play(state, calls)
    assert slower(state, young, calls) < 1.15


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_point_2_the_chunk_index_does_not_matter(dtype, limit):
    calls, near = chunks(8, tentative=1), build(dtype=dtype)
    play(near, part(calls, 0, 8))
    rest = part(calls, 8)
    expected = play(near.fork(), rest)
    for shift in (1, 1000, 10**9):
        far = near.fork()
        far.seek(far.position + shift * CHUNK * FRAME)
        assert worst(play(far, rest), [[x.double() for x in layer] for layer in expected]) <= limit


def test_point_2_keys_that_were_stored_rotated_violate_it():
    class Stored(Contiguous):
        """Turned once, where a chunk stood when it came."""

        moves: ClassVar[bool] = False

    calls, recipe = chunks(8), ef.recipe("motionstream", frame=FRAME)
    theirs = motionstream.reference(calls, ROPE, frame=FRAME)
    stored = play(build(replace(recipe, place=Stored())), calls)
    assert worst(part(stored, 0, 3), part(theirs, 0, 3)) < 1e-10  # nothing has rolled yet
    assert worst(part(stored, 3), part(theirs, 3)) > 1e-2
    absolute = build(replace(recipe, place=Absolute()))
    play(absolute, part(calls, 0, 4))
    far = absolute.fork()
    far.seek(far.position + 1000 * FRAME)
    assert worst(play(far, part(calls, 4)), play(absolute, part(calls, 4))) > 1e-2


def test_point_3_a_window_as_long_as_the_stream_is_block_causal_attention():
    calls = chunks(7)
    dense = self_forcing.block_causal(calls, ROPE, frame=FRAME)
    assert worst(play(build(sink=0, window=7), calls), dense) < 1e-10
    assert worst(play(build(sink=0, window=7, dtype=torch.float32), calls), dense) < 1e-4


@pytest.mark.parametrize("sink", [1, 2])
def test_point_4_the_sink_is_frozen(sink):
    state = build(sink=sink)
    play(state, chunks(sink))
    first = {name: tensor[:, :, : sink * CHUNK * FRAME] for name, tensor in content(state).items()}
    play(state, chunks(20, seed=1, tentative=1))
    for name, tensor in content(state).items():
        assert torch.equal(tensor[:, :, : sink * CHUNK * FRAME], first[name])


def test_point_4_a_chunk_that_has_left_has_no_influence():
    calls, other = chunks(8), chunks(8, seed=1)
    for changed in range(8):
        mixed = [[theirs if t == changed else mine for t, mine in enumerate(layer)] for layer, theirs in
                 zip(calls, [layer[changed] for layer in other], strict=True)]  # fmt: skip
        ours, after = play(build(), calls), play(build(), mixed)
        feels = [any(not torch.equal(a[t], b[t]) for a, b in zip(ours, after, strict=True)) for t in range(8)]
        assert feels == [t == changed or changed in motionstream.context(t, 1, 1) for t in range(8)]


def test_point_5_any_passes_before_the_clean_one_leave_the_same_cache():
    """A roll-out in training runs another number of passes than the inference loop; what is kept is the same."""
    calls = chunks(6)
    one, many = build(dtype=torch.float32), build(dtype=torch.float32)
    for t in range(6):
        for attempt in range(t % 4):
            play(many, [[replace(c, commit=False) for c in layer] for layer in chunks(1, seed=10 * t + attempt)])
        for state in (one, many):
            play(state, part(calls, t, t + 1))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in many.state_dict().items())


def test_wrong_sizes_are_refused():
    for wrong in ({"window": 0}, {"sink": -1}, {"chunk": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ef.recipe("motionstream", **wrong)
