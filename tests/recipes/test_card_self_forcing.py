"""What must hold for the cache of Self-Forcing (arXiv 2506.08009): chunks of frames, the oldest leave."""

import pytest
import torch

import evenflow as ef
from evenflow.memory import Absolute
from evenflow.memory.rope import Rotary
from evenflow.recipes.reference import self_forcing

from .drive import play, random_calls, slower, worst

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))  # time, row, column
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def build(*, layers=2, dtype=torch.float64, kv_heads=2, rope=ROPE, batch=1, **params):
    memory = ef.recipe("self-forcing", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=rope, dtype=dtype, batch=batch)


def chunks(count, *, frames=CHUNK, **changes):
    sizes = [frames * FRAME] * count
    return random_calls(sizes, tags=[{"coordinates": GRID.repeat(frames, 1)}] * count, **changes)


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (9, 0), (9, 3), (7, 2), (100, 3)])
def test_any_calls_equal_the_reference(window, sink, tentative, kv_heads):
    calls = chunks(7, tentative=tentative, kv_heads=kv_heads)
    theirs = self_forcing.reference(calls, ROPE, frame=FRAME, window=window, sink=sink)
    assert worst(play(build(window=window, sink=sink, kv_heads=kv_heads), calls), theirs) < 1e-10


def test_chunks_of_any_length_equal_the_reference():
    sizes = [FRAME * n for n in (1, 3, 4, 1, 2, 3)]
    tags = [{"coordinates": GRID.repeat(size // FRAME, 1)} for size in sizes]
    calls = random_calls(sizes, tags=tags, tentative=1)
    theirs = self_forcing.reference(calls, ROPE, frame=FRAME, window=6)
    assert worst(play(build(window=6), calls), theirs) < 1e-10


@pytest.mark.parametrize("tags", [{}, {"frame": torch.arange(9) // 3}])
def test_frames_are_found_in_the_first_step(tags):
    calls = random_calls([9, 9, 9], tags=[tags] * 3)
    theirs = self_forcing.reference(calls, ef.Rope(), frame=3, window=4)
    assert worst(play(build(window=4, frame=None, rope=ef.Rope()), calls), theirs) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_point_1_the_cache_equals_one_dense_block_causal_pass(dtype, limit):
    calls = chunks(7)
    dense = self_forcing.block_causal(calls, ROPE, frame=FRAME)
    assert worst(play(build(dtype=dtype, window=None), calls), dense) < limit
    assert worst(play(build(dtype=dtype, window=21), calls), dense) < limit


def test_point_3_denoising_passes_leave_no_trace():
    clean, state, noisy = chunks(6), build(window=9), build(window=9)
    steps = chunks(6, tentative=3, seed=1)
    for t in range(6):
        for attempt in range(3):
            play(noisy, one(steps, 4 * t + attempt))
        assert noisy.position == t * CHUNK * FRAME
        assert worst(play(noisy, one(clean, t)), play(state, one(clean, t))) == 0
        ours, theirs = noisy.state_dict(), state.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert noisy.position == (t + 1) * CHUNK * FRAME


def test_point_3_what_leaves_leaves_once_a_chunk():
    calls, state = chunks(6, tentative=4), build(window=9)
    for t, call in enumerate(calls[0]):
        play(state, one(calls, t))
        frames = (t + 1) // 5 * CHUNK if call.commit else t // 5 * CHUNK
        assert state.position == frames * FRAME
        assert state.held(0) == list(range(max(frames - 9, 0) * FRAME, frames * FRAME))


def test_point_4_a_later_chunk_changes_nothing_before():
    calls, other = chunks(6, tentative=1), chunks(6, tentative=1, seed=1)
    mixed = [mine[:8] + theirs[8:] for mine, theirs in zip(calls, other, strict=True)]
    for mine, changed in zip(play(build(window=9), calls), play(build(window=9), mixed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:8], changed[:8], strict=True))
        assert not torch.equal(mine[8], changed[8])


def test_point_6_a_window_has_constant_bytes_and_all_frames_grow():
    bounded, whole = build(window=9), build(window=None)
    sizes = [], []
    for t in range(30):  # ten windows
        for state, into in zip((bounded, whole), sizes, strict=True):
            play(state, chunks(1, seed=t))
            into.append(state.nbytes)
    assert len(set(sizes[0][2:])) == 1
    token = 2 * 2 * 12 * 8 * 2  # keys and values, heads, channels, float64, layers
    assert sizes[1][29] >= 30 * CHUNK * FRAME * token > sizes[0][29]
    assert len(whole.held(0)) == 30 * CHUNK * FRAME


def test_point_6_a_window_has_constant_time():
    state, calls = build(window=9), chunks(1)
    for _ in range(5):
        play(state, calls)
    young = state.fork()
    for _ in range(45):
        play(state, calls)
    assert slower(state, young, calls) < 1.2


def test_point_8_turning_a_stored_key_further_equals_turning_the_raw_key():
    rotary = Rotary(ROPE, 12, torch.float32, torch.device("cpu"))
    key = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    here = torch.tensor([[t, 1, 2] for t in range(5)])
    for delta in (1, 20, 1000, 10**6):
        moved = rotary.rotate(rotary.rotate(key, *rotary.at(here)), *rotary.at(torch.tensor([delta, 0, 0])))
        raw = rotary.rotate(key, *rotary.at(here + torch.tensor([delta, 0, 0])))
        assert (moved - raw).abs().max() < 1e-5


def test_point_8_seeking_turns_a_stored_window_with_the_stream():
    calls = chunks(6)
    far, near = build(window=9), build(window=9)
    for state in (far, near):
        play(state, [layer[:3] for layer in calls])
    far.seek(far.position + 10**6 * FRAME)
    rest = [layer[3:] for layer in calls]
    assert worst(play(far, rest), play(near, rest)) < 1e-9


def test_pitfall_a_new_video_in_the_same_buffers():
    state, calls = build(window=9), chunks(5)
    first = play(state, calls)
    state.reset()
    assert state.position == 0 and worst(play(state, calls), first) == 0


def test_pitfall_no_end_at_21_frames_or_1024():
    calls, state = chunks(350, layers=1), build(window=21, layers=1)
    theirs = self_forcing.reference([calls[0][-8:]], ROPE, frame=FRAME, window=21)  # positions relative: the same
    ours = play(state, calls)
    assert state.position == 1050 * FRAME
    assert worst([ours[0][-1:]], [theirs[0][-1:]]) < 1e-9


def test_a_batch_equals_its_rows():
    calls, other = chunks(5), chunks(5, seed=1)
    both = build(window=6, batch=2)
    for t in range(5):
        with both.step(CHUNK * FRAME, tags=calls[0][t].tags):
            for layer in range(2):
                pair = calls[layer][t], other[layer][t]
                out = both.attend(layer, *(torch.stack([getattr(c, x) for c in pair]) for x in "qkv"))
                for row, script in enumerate((calls, other)):
                    theirs = self_forcing.reference([script[layer]], ROPE, frame=FRAME, window=6)
                    assert (out[row] - theirs[0][t]).abs().max() < 1e-10


def test_a_window_that_its_sinks_fill_is_refused():
    with pytest.raises(ValueError, match="larger"):
        ef.recipe("self-forcing", window=3, sink=3)
    with pytest.raises(ValueError, match="whole frames"), build().step(FRAME + 1):
        pass


def test_it_is_a_window_of_frames_at_absolute_times():
    memory = ef.recipe("self-forcing")
    assert (memory.sink, memory.window, memory.chunk, memory.inside) == (0, 21, 3, "both")
    assert isinstance(memory.place, Absolute)
