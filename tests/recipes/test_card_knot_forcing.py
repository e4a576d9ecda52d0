"""What must hold for the memory of Knot Forcing (arXiv 2512.21734): a reference that runs ahead, no knot kept."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import evenflow as ef
from evenflow.recipes.knot_forcing import RunningAhead
from evenflow.recipes.reference import Call, knot_forcing

from .drive import play, random_calls, worst
from .switching import content, joined

FRAME, CHUNK, KNOT = 4, 3, 1
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def build(*, layers=2, kv_heads=2, dtype=torch.float64, **params):
    memory = ef.recipe("knot-forcing", **{"frame": FRAME, "window": 6, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype)


def frames(*sizes, **changes):
    return random_calls([n * FRAME for n in sizes], tags=[{"coordinates": GRID.repeat(n, 1)} for n in sizes], **changes)


def tentative(script):
    return [[Call(c.q, c.k, c.v, False, c.tags) for c in layer] for layer in script]


def video(count, *, chunk=CHUNK, knot=KNOT, passes=2, seed=0, **changes):
    """The reference image; then for each chunk `passes` of chunk + knot frames and a clean one of chunk frames."""
    parts = [frames(1, seed=seed, **changes)]
    for i in range(count):
        parts.append(tentative(frames(*[chunk + knot] * passes, seed=seed + 1000 * i + 1, **changes)))
        parts.append(frames(chunk, seed=seed + 1000 * i + 2, **changes))
    return joined(*parts)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize(
    "params",
    [{}, {"window": 1}, {"window": 100}, {"knot": 0}, {"knot": 2, "stride": 3, "start": 5}, {"chunk": 1, "stride": 1}],
)
def test_any_calls_equal_the_reference(params, passes, kv_heads):
    sizes = {name: params[name] for name in ("chunk", "knot") if name in params}
    calls = video(9, passes=passes, kv_heads=kv_heads, **sizes)
    theirs = knot_forcing.reference(calls, ROPE, frame=FRAME, **{"window": 6, **params})
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10


def test_the_frame_is_the_reference_image():
    calls = video(4)
    assert worst(play(build(frame=None), calls), play(build(), calls)) == 0


def test_point_1_frames_are_kept_in_order_without_duplicate_or_gap():
    state = build(window=100)
    play(state, video(12))
    assert state.position == (1 + 12 * CHUNK) * FRAME
    assert state.held(0) == list(range(state.position))


def test_point_2_without_a_knot_it_is_plain_chunks_behind_a_first_frame():
    """Told apart by positions only: the reference's moves."""
    calls = video(8, knot=0)
    geometry = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "rope": None, "dtype": torch.float64}
    ours = ef.recipe("knot-forcing", window=6, knot=0, frame=FRAME).build(**geometry)
    plain = ef.recipe("self-forcing", window=1 + 6 + CHUNK, sink=1, frame=FRAME).build(**geometry)
    assert worst(play(ours, calls), play(plain, calls)) < 1e-12


@pytest.mark.parametrize("window", [1, 6, 7])
def test_point_5_the_cache_is_the_reference_and_the_last_frames(window):
    state, calls, sizes = build(window=window), video(20), []
    for t, call in enumerate(calls[0]):
        play(state, [layer[t : t + 1] for layer in calls])
        done = state.position // FRAME - 1
        held = [0, *range(1 + max(done - window, 0), 1 + done)]
        assert state.held(0) == [f * FRAME + n for f in held for n in range(FRAME)]
        assert len(held) == 1 + min(window, done)
        if call.commit:
            sizes.append(state.nbytes)
    assert len(set(sizes[4:])) == 1


def test_point_5_the_knot_never_appears():
    """Whatever the passes of a chunk and their knots were, what is kept comes from the reference and the clean passes."""
    one, other = build(), build()
    clean = video(6, passes=0)
    for t in range(7):
        part = [layer[t : t + 1] for layer in clean]
        for state, seed in ((one, 100), (other, 200)):
            if t:
                play(state, tentative(frames(CHUNK + KNOT, CHUNK + KNOT, seed=seed + t)))
            play(state, part)
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_point_5_the_reference_is_never_evicted():
    state, calls = build(), video(30)
    play(state, [layer[:1] for layer in calls])
    image = {name: tensor[:, :, :FRAME].clone() for name, tensor in content(state).items()}
    play(state, [layer[1:] for layer in calls])
    assert all(torch.equal(tensor[:, :, :FRAME], image[name]) for name, tensor in content(state).items())


def test_point_6_the_trigger_sequence():
    """Chunks of 3, a knot of 1, stride 4 from 8: 8, 8, 12, 16, 16, 20; with equality the reference stays."""
    n, sequence = 8, []
    for i in range(0, 18, 3):
        n = knot_forcing.advanced(n, i, 3, 1, 4)
        sequence.append(n)
    assert sequence == [8, 8, 12, 16, 16, 20]
    assert RunningAhead(3, 1, 4, 8).ahead(torch.arange(0, 18, 3)).tolist() == sequence


@given(some.integers(1, 6), some.integers(0, 6), some.integers(0, 6), some.integers(0, 20))
def test_point_6_the_stream_never_reaches_the_reference(chunk, knot, more, start):
    stride = chunk + more
    if start + stride < chunk + knot:
        start = chunk + knot - stride
    n, count = start, 60
    for i in range(0, count * chunk, chunk):
        n = knot_forcing.advanced(n, i, chunk, knot, stride)
        assert n >= i + chunk + knot
        assert n == RunningAhead(chunk, knot, stride, start).ahead(torch.tensor(i)).item()
    last = (count - 1) * chunk
    assert (n - start) // stride == max(0, -(-(last + chunk + knot - start) // stride))  # about M · c / s shifts


def test_point_6_what_would_fall_behind_is_refused():
    for wrong in ({"stride": 2}, {"knot": 9, "start": 2}):
        with pytest.raises(ValueError, match="falls behind"):
            ef.recipe("knot-forcing", **wrong)
    for wrong in ({"window": 0}, {"knot": -1}, {"chunk": 0}, {"start": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ef.recipe("knot-forcing", **wrong)


def test_point_6_reference_and_frames_moved_together_attend_the_same():
    calls, base = video(5), build()
    play(base, calls)
    asked = tentative(frames(CHUNK + KNOT, seed=99))
    expected = play(base, asked)
    for strides in (1, 1000, 10**9):  # 3 strides of 4 are 12 frames, whole chunks: the trigger falls on the same ones
        moved = base.fork()
        moved.seek(moved.position + strides * 12 * FRAME)
        assert worst(play(moved, asked), expected) < 1e-9


def test_point_6_the_reference_ahead_is_not_the_reference_behind():
    calls = video(6)
    outputs = [play(build(start=start), calls)[0][-1] for start in (8, 9)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.mark.parametrize(("window", "chunk"), [(9, 3), (18, 3), (4, 1), (6, 6)])
def test_section_1_overlap_of_contexts_across_a_border(window, chunk):
    """(L − C) / (L + C), L being the window and the chunk, measured on what is held."""
    state, contexts = build(window=window, chunk=chunk, stride=max(4, chunk)), []
    for part in itertools.chain([frames(1)], (frames(chunk, seed=t) for t in range(40))):
        before = {i // FRAME for i in state.held(0)} - {0}
        play(state, part)
        fresh = range(state.position // FRAME - chunk, state.position // FRAME)
        contexts.append(before | set(fresh))
    a, b = contexts[-2:]
    assert len(a & b) / len(a | b) == knot_forcing.border(window, chunk)
