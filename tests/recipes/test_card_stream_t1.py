"""What must hold for Stream-T1 (arXiv 2605.04461): what leaves is dropped, averaged into a sink or kept, as it was told."""

import pytest
import torch

import evenflow as ef
from evenflow.memory import Memory, Oldest, Routed
from evenflow.memory.routing import APPEND, DROP, MERGE, route
from evenflow.recipes.reference import stream_t1
from evenflow.recipes.reference.self_forcing import attend, frames_of

from .drive import play, random_calls, slower, worst

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(CHUNK, 1)
MIXED = [DROP, APPEND, MERGE, APPEND, DROP, MERGE, APPEND, APPEND, APPEND, MERGE, APPEND, DROP]


def build(*, layers=2, kv_heads=2, dtype=torch.float64, batch=1, **params):
    memory = ef.recipe("stream-t1", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype, batch=batch)


def chunks(routes, **changes):
    tags = [{"coordinates": GRID, "route": torch.full((CHUNK * FRAME,), where)} for where in routes]
    return random_calls([CHUNK * FRAME] * len(routes), tags=tags, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


def held(state):
    """Numbers of the chunks held, −1 for the first where others were averaged into it."""
    tokens = state.held(0)[:: CHUNK * FRAME]
    return [-1 if token < 0 else token // (CHUNK * FRAME) for token in tokens]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(("alpha", "window", "max_sink"), [(0.999, 12, 15), (0.5, 12, 9), (0.7, 6, 3), (0.0, 9, 6)])
def test_any_calls_equal_the_reference(alpha, window, max_sink, tentative, kv_heads):
    calls = chunks(MIXED + MIXED[::-1], tentative=tentative, kv_heads=kv_heads)
    params = {"alpha": alpha, "window": window, "max_sink": max_sink}
    theirs = stream_t1.reference(calls, ROPE, frame=FRAME, **params)
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10


def test_point_1_where_all_is_dropped_it_is_longlive():
    calls = chunks([DROP] * 12, tentative=1)
    plain = ef.recipe("longlive", frame=FRAME).build(
        layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64
    )
    assert worst(play(build(), calls), play(plain, calls)) < 1e-10


def test_point_4_what_is_held_is_what_was_routed():
    state, seen = build(), []
    calls = chunks([DROP, APPEND, DROP, MERGE, APPEND, APPEND, APPEND, APPEND, APPEND, DROP, DROP, DROP, DROP])
    for t in range(13):
        play(state, part(calls, t, t + 1))
        seen.append(held(state))
    assert seen[:5] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]  # 1 has left the window, and is a sink
    assert seen[5] == [0, 1, 3, 4, 5]  # 2 is dropped
    assert seen[6] == [0, 1, 4, 5, 6]  # 3 is averaged into 1
    assert seen[9] == [0, 1, 4, 5, 6, 7, 8, 9]  # four are appended, which is all there is room for
    assert seen[11] == [0, 1, 4, 5, 6, 9, 10, 11]
    assert max(map(len, seen)) * CHUNK == 24


def test_point_4_an_appended_chunk_is_kept_as_it_was_and_an_averaged_one_is_the_average():
    calls = chunks([DROP, APPEND, MERGE, MERGE, DROP, DROP, DROP], layers=1)
    state = build(layers=1, alpha=0.75)
    play(state, part(calls, 0, 5))
    size, slots = CHUNK * FRAME, state.slots[0]
    one = calls[0][1]
    assert torch.equal(slots.keys[0, :, size : 2 * size], one.k) and torch.equal(
        slots.values[0, :, size : 2 * size], one.v
    )
    play(state, part(calls, 5))
    expected = 0.75 * (0.75 * one.k + 0.25 * calls[0][2].k) + 0.25 * calls[0][3].k
    torch.testing.assert_close(slots.keys[0, :, size : 2 * size], expected, rtol=0, atol=1e-12)
    assert torch.equal(slots.keys[0, :, :size], calls[0][0].k)
    assert held(state) == [0, 1, 4, 5, 6]


def test_point_4_without_room_it_is_averaged_into_the_newest_sink_and_the_first_is_told_as_folded():
    state = build(max_sink=3, alpha=0.5)
    play(state, chunks([DROP, APPEND, DROP, DROP, DROP]))
    assert held(state) == [-1, 2, 3, 4]


def test_point_5_what_was_appended_stands_where_it_was():
    calls = chunks([DROP, APPEND, DROP, DROP, DROP, DROP], layers=1)
    out = play(build(layers=1), calls)[0][-1]
    seen = [(c * CHUNK + i, f) for c in (0, 1, 3, 4, 5) for i, f in enumerate(frames_of(calls[0][c], FRAME))]
    expected = attend(calls[0][5], [15, 16, 17], seen, ROPE, FRAME)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_a_tentative_call_routes_nothing_and_needs_no_route():
    calls = chunks(MIXED)
    state = build()
    play(state, part(calls, 0, 8))
    before = state.state_dict()
    with state.step(CHUNK * FRAME, tags={"coordinates": GRID}, commit=False):
        for layer in range(2):
            call = calls[layer][8]
            state.attend(layer, call.q[None], call.k[None], call.v[None])
    after = state.state_dict()
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)


def test_rows_go_their_own_ways():
    calls, other = chunks(MIXED), chunks(MIXED[::-1], seed=1)
    state = build(batch=2)
    out = []
    for t in range(len(MIXED)):
        pair = [[script[layer][t] for script in (calls, other)] for layer in range(2)]
        tags = {name: torch.stack([one.tags[name] for one in pair[0]]) for name in ("coordinates", "route")}
        with state.step(CHUNK * FRAME, tags=tags):
            for layer in range(2):
                q, k, v = (torch.stack([getattr(one, name) for one in pair[layer]]) for name in "qkv")
                out.append(state.attend(layer, q, k, v))
    for row, script in enumerate((calls, other)):
        theirs = play(build(), script)
        for layer in range(2):
            assert worst([[x[row] for x in out[layer::2]]], [theirs[layer]]) < 1e-10


def test_bytes_and_time_are_flat_whatever_is_kept():
    calls, state = chunks([APPEND]), build()
    for _ in range(9):
        play(state, calls)
    young, size = state.fork(), state.nbytes
    for _ in range(100):
        play(state, calls)
    assert state.nbytes == size
    assert slower(state, young, calls) < 1.2


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        ([1.0], [1.0], DROP),  # the first chunk is the sink
        ([1.0, 2.0], [1.0, 1.0], MERGE),
        ([1.0, 2.0], [1.0, 0.7], APPEND),
        ([1.0, 2.0], [1.0, 0.8], MERGE),  # has lost 0.2, and not more
        ([1.0, 1.0], [1.0, 0.0], DROP),
        ([9.0, *[0.0] * 9, 0.5], [0.0] * 11, MERGE),  # what was long ago does not count
        ([0.0, *[1.0] * 9, 0.95], [0.0] * 11, DROP),
    ],
)
def test_point_4_where_a_chunk_goes_is_told_by_its_rewards(short, long, expected):
    assert route(short, long) == expected


def test_what_makes_no_sense_is_refused():
    for wrong, said in (
        (lambda: route([], []), "one of each"),
        (lambda: Routed(-1), "append"),
        (lambda: Routed(3, 1.5), "alpha"),
        (lambda: Memory(sink=3, window=9, evict=Oldest(True), fold=Routed(4), inside="both"), "multiple"),
        (lambda: Memory(sink=3, window=9, fold=Routed(3)), "inside='both'"),
        (lambda: ef.recipe("stream-t1", window=3), "larger"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
    state, calls = build(), random_calls([4 * FRAME] * 6)
    with pytest.raises(ValueError, match="chunks of 12"):
        for t in range(6):
            tags = {"route": torch.full((16,), APPEND)}
            with state.step(16, tags=tags):
                for layer in range(2):
                    call = calls[layer][t]
                    state.attend(layer, call.q[None], call.k[None], call.v[None])
