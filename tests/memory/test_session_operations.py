"""What a session does with its memory: undo, copy, save, forget, and survive bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import Memory, MemoryState, Rope

from .drive import feed, random_inputs, run

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
MEMORIES = {
    "sinks": Memory(sink=4, window=12),
    "window": Memory(window=9),
    "null": Memory(sink=1, window=9, null="zero"),
    "unbounded": Memory(),
}
every_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


def same_future(one: MemoryState, other: MemoryState, seed: int = 7, length: int = 40) -> None:
    """Both give, from here on, the same bits."""
    inputs = random_inputs(one, length, seed)
    for cuts in ([1], [5]):
        for a, b in zip(run(one, inputs, cuts), run(other, inputs, cuts), strict=True):
            assert torch.equal(a, b)


@every_memory
@pytest.mark.parametrize("length", [2, 11, 50])
def test_saved_forked_and_original_go_on_bit_for_bit(memory, length):
    state = memory.build(**GEOMETRY)
    run(state, random_inputs(state, length), [3])
    twin, resumed = state.fork(), memory.build(**GEOMETRY)
    resumed.load_state_dict(state.state_dict())
    assert twin.held(0) == state.held(0) == resumed.held(0)
    other = memory.build(**GEOMETRY)
    run(other, random_inputs(other, length), [3])
    for copy in (twin, resumed):
        same_future(copy, other.fork())


@every_memory
def test_a_fork_never_touches_the_original(memory):
    """Card point 10."""
    state, witness = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    run(state, inputs, [4])
    run(witness, inputs, [4])
    twin = state.fork()
    run(twin, random_inputs(twin, 33, seed=99), [1])
    same_future(state, witness)


@every_memory
@pytest.mark.parametrize("m", [1, 6, 40])
@pytest.mark.parametrize("length", [0, 2, 30])
def test_a_step_that_is_not_committed_or_fails_leaves_no_trace(memory, m, length):
    state, witness = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(state, max(length, 1))
    for each in (state, witness):
        if length:
            run(each, inputs, [5])
    question = random_inputs(state, m, seed=3)
    first = feed(state, question, 0, m, commit=False)
    again = feed(state, question, 0, m, commit=False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ZeroDivisionError), state.step(m):
        state.attend(0, *question[0])
        _ = 1 / 0
    with pytest.raises(RuntimeError, match=r"layers \[1\]"), state.step(m):
        state.attend(0, *question[0])
    spoilt = [(q, k.clone(), v) for q, k, v in question]
    spoilt[1][1][..., -1, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        feed(state, spoilt, 0, m)
    assert state.position == length
    same_future(state, witness)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_truncate_undoes_exactly_or_refuses(data):
    """Any mix of committed steps, questions, failures and undoing leaves what the remaining tokens alone would give."""
    window = data.draw(st.sampled_from([1, 3, 8, None]))
    memory = Memory(sink=data.draw(st.integers(0, 4)) if window else 0, window=window)
    reach = data.draw(st.sampled_from([None, [None, 3]]))
    state = memory.build(**GEOMETRY, reach=reach)
    stream, seed = [], 0
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["feed", "feed", "ask", "fail", "undo"]))
        length, seed = data.draw(st.integers(1, 9)), seed + 1
        inputs = random_inputs(state, length, seed)
        if what == "undo":
            n = data.draw(st.integers(1, 3))
            try:
                state.truncate(n)
            except ValueError as error:
                assert "cannot undo" in str(error)
            else:
                stream = stream[:-n]
        elif what == "fail":
            with pytest.raises(ZeroDivisionError), state.step(length):
                state.attend(0, *inputs[0])
                _ = 1 / 0
        else:
            run_cut = feed(state, inputs, 0, length, commit=what == "feed")
            assert run_cut[0].isfinite().all()
            if what == "feed":
                stream += [[tuple(t[:, :, i : i + 1] for t in layer) for layer in inputs] for i in range(length)]
    witness = memory.build(**GEOMETRY, reach=reach)
    for token in stream:
        feed(witness, token, 0, 1)
    assert state.position == witness.position == len(stream)
    assert state.held(0) == witness.held(0) and state.held(1) == witness.held(1)
    inputs = random_inputs(state, 20, 99)
    for cuts in ([1], [6]):
        for a, b in zip(run(state, inputs, cuts), run(witness, inputs, cuts), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_truncate_goes_back_one_token_after_the_window_wrapped_and_no_further():
    state = MEMORIES["sinks"].build(**GEOMETRY)
    run(state, random_inputs(state, 17), [17])
    state.truncate(15)
    assert state.position == 2
    run(state, random_inputs(state, 30), [30])
    with pytest.raises(ValueError, match="cannot undo 2 tokens, only 1"):
        state.truncate(2)
    state.truncate(1)
    with pytest.raises(ValueError, match="cannot undo 1 tokens, only 0"):
        state.truncate(1)
    with pytest.raises(ValueError, match="cannot undo -1"):
        state.truncate(-1)


@pytest.mark.parametrize(("length", "spare"), [(5, 5), (16, 16), (17, 0), (30, 0)])
def test_a_failed_step_takes_away_only_the_undo_that_it_overwrote(length, spare):
    """Four sinks, window 12: token 17 is the first to take another token's slot."""
    state = MEMORIES["sinks"].build(**GEOMETRY)
    run(state, random_inputs(state, length), [1])
    with pytest.raises(ZeroDivisionError), state.step(1):
        state.attend(0, *random_inputs(state, 1)[0])
        _ = 1 / 0
    with pytest.raises(ValueError, match="cannot undo"):
        state.truncate(spare + 1)
    state.truncate(spare)
    witness = MEMORIES["sinks"].build(**GEOMETRY)
    if length > spare:
        run(witness, random_inputs(witness, length), [1])
    same_future(state, witness)


def test_reset_forgets_and_can_keep_the_sink():
    memory = MEMORIES["sinks"]
    state, fresh = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    run(state, inputs, [30])
    state.reset(keep_sink=True)
    assert state.position == 4 and state.held(0) == [0, 1, 2, 3]
    run(fresh, [tuple(t[:, :, :4] for t in layer) for layer in inputs], [4])
    same_future(state, fresh)
    state.reset()
    assert state.position == 0 and state.held(1) == []
    same_future(state, memory.build(**GEOMETRY))


@every_memory
def test_reorder_selects_rows(memory):
    state = memory.build(**GEOMETRY, batch=3)
    run(state, random_inputs(state, 20), [4])
    before = state.fork()
    state.reorder(torch.tensor([2, 2, 0]))
    inputs = random_inputs(state, 10, seed=5)
    picked = [tuple(t[[0, 0, 0]] for t in layer) for layer in inputs]
    out, reference = run(state, picked, [1])[0], run(before, picked, [1])[0]
    torch.testing.assert_close(out, reference[[2, 2, 0]], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="row numbers"):
        state.reorder(torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("target", [1000, 1_000_003, 10**9, 10**15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_are_as_exact_far_away(target, dtype):
    """A stream that stands at 10^9 gives what it gave at 30: only differences of positions count."""
    memory = MEMORIES["sinks"]
    geometry = {**GEOMETRY, "dtype": dtype, "rope": [Rope(theta=500_000.0), None], "reach": [None, 10]}
    near = memory.build(**geometry)
    run(near, random_inputs(near, 30), [7])
    far = near.fork()
    far.seek(target)
    assert far.position == target
    assert far.held(0)[4:] == [j + target - 30 for j in near.held(0)[4:]]
    inputs = random_inputs(near, 60, seed=2)
    for cuts in ([1], [9]):
        for a, b in zip(run(near, inputs, cuts), run(far, inputs, cuts), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 if dtype is torch.float32 else 1e-12)


def test_seek_refuses_what_it_cannot_mean():
    state = MEMORIES["sinks"].build(**GEOMETRY)
    with pytest.raises(ValueError, match="full"):
        state.seek(100)
    run(state, random_inputs(state, 30), [30])
    with pytest.raises(ValueError, match="only move forward"):
        state.seek(29)
    with pytest.raises(ValueError, match="bounded"):
        MEMORIES["unbounded"].build(**GEOMETRY).seek(5)


def test_bytes_are_constant_and_the_unbounded_memory_grows():
    bounded, unbounded = (MEMORIES[name].build(**GEOMETRY) for name in ("sinks", "unbounded"))
    start = bounded.nbytes
    inputs = random_inputs(bounded, 600)
    small = unbounded.nbytes
    run(bounded, inputs, [64])
    run(unbounded, inputs, [64])
    assert bounded.nbytes == start
    assert unbounded.nbytes > 2 * small
    assert unbounded.held(0) == list(range(600))


@every_memory
def test_what_is_seen_never_depends_on_the_future(memory):
    """Card point 10: causality."""
    one, other = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    a, b = random_inputs(one, 40), random_inputs(one, 40, seed=1)
    b = [
        tuple(torch.cat([x[:, :, :25], y[:, :, 25:]], 2) for x, y in zip(p, q, strict=True))
        for p, q in zip(a, b, strict=True)
    ]
    for x, y in zip(run(one, a, [40]), run(other, b, [40]), strict=True):
        assert torch.equal(x[:, :, :25], y[:, :, :25])


def test_what_left_the_window_changes_nothing():
    """Card point 9: perturbing a token that has left changes no bit of what follows."""
    memory = MEMORIES["sinks"]
    one, other = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    a = random_inputs(one, 60)
    b = [tuple(t.clone() for t in layer) for layer in a]
    for layer in b:
        for t in layer:
            t[:, :, 10] += 1
    for x, y in zip(run(one, a, [1]), run(other, b, [1]), strict=True):
        assert not torch.equal(x[:, :, :23], y[:, :, :23])
        assert torch.equal(x[:, :, 23:], y[:, :, 23:])


def test_inference_mode_and_training_mode_mix():
    memory = MEMORIES["unbounded"]
    with torch.inference_mode():
        state = memory.build(**GEOMETRY)
        inputs = random_inputs(state, 300)
        feed(state, inputs, 0, 270)
        twin = state.fork()
    inputs = random_inputs(state, 300)
    feed(state, inputs, 270, 300)
    q, k, v = (t.clone().requires_grad_() for t in inputs[0])
    with twin.step(300, commit=False):
        assert not twin.attend(0, q, k, v).requires_grad


class TestRefusals:
    """A bad call says what was wrong, and the memory stays usable."""

    @pytest.fixture
    def state(self):
        state = MEMORIES["sinks"].build(**GEOMETRY)
        run(state, random_inputs(state, 20), [20])
        yield state
        twin = MEMORIES["sinks"].build(**GEOMETRY)
        run(twin, random_inputs(twin, 20), [20])
        same_future(state, twin)

    @pytest.mark.parametrize("m", [0, -1, 1.0, True, "3"])
    def test_step_length(self, state, m):
        with pytest.raises(ValueError, match="whole number"):
            state.step(m)

    def test_shapes_dtypes_layers(self, state):
        q, k, v = random_inputs(state, 3)[0]
        for bad, match in [
            ((q[:, :2], k, v), "q has shape"),
            ((q, k[..., :4], v), "k has shape"),
            ((q, k, v[:, :, :2]), "v has shape"),
            ((q.float(), k, v), "q is torch.float32"),
        ]:
            with pytest.raises(ValueError, match=match), state.step(3):
                state.attend(0, *bad)
        with pytest.raises(ValueError, match="no layer 2"), state.step(3):
            state.attend(2, q, k, v)
        with pytest.raises(RuntimeError, match="twice"), state.step(3):
            state.attend(0, q, k, v)
            state.attend(0, q, k, v)

    def test_order_of_calls(self, state):
        q, k, v = random_inputs(state, 1)[0]
        with pytest.raises(RuntimeError, match="outside a step"):
            state.attend(0, q, k, v)
        with state.step(1, commit=False):
            with pytest.raises(RuntimeError, match="nest"), state.step(1):
                pass
            with pytest.raises(RuntimeError, match="inside a step"):
                state.fork()

    def test_masks_and_tags(self, state):
        with pytest.raises(ValueError, match="mask has shape"):
            state.step(3, mask=torch.ones(1, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match="unknown tag 'frmae'"):
            state.step(3, tags={"frmae": torch.zeros(3)})
        with pytest.raises(ValueError, match="tag 'frame' has shape"):
            state.step(3, tags={"frame": torch.zeros(4)})
        with pytest.raises(ValueError, match="backwards at row 0, item 1"):
            state.step(2, tags={"time": torch.tensor([2.0, 1.0])})

    def test_layers_and_rows_of_held(self, state):
        with pytest.raises(ValueError, match="no layer 5"):
            state.held(5)

    def test_foreign_states(self, state):
        good = state.state_dict()
        for change, match in [
            ({"positions": torch.tensor([1, 2])}, "expected 1 counts"),
            ({"layers.0.keys": good["layers.0.keys"].float()}, "layers.0.keys is torch.float32"),
            ({"layers.1.values": good["layers.1.values"][:, :, 1:]}, "layers.1.values"),
            ({"surprise": torch.zeros(1)}, "unknown"),
        ]:
            with pytest.raises(ValueError, match=match):
                state.load_state_dict({**good, **change})
        with pytest.raises(ValueError, match="missing"):
            state.load_state_dict({name: value for name, value in good.items() if name != "layers.1.keys"})


def test_time_must_not_run_backwards_between_steps_either():
    state = MEMORIES["sinks"].build(**GEOMETRY)
    inputs = random_inputs(state, 4)
    feed(state, inputs, 0, 2, tags={"time": torch.tensor([1.0, 2.0])})
    with pytest.raises(ValueError, match="backwards"):
        state.step(1, tags={"time": torch.tensor([1.5])})
    twin = state.fork()
    for each in (state, twin):
        feed(each, inputs, 2, 4, tags={"time": torch.tensor([2.0, 3.0])})
    with pytest.raises(ValueError, match="backwards"):
        twin.step(1, tags={"time": torch.tensor([2.5])})


def test_rows_of_different_age_have_no_common_position():
    state = MEMORIES["sinks"].build(**GEOMETRY, batch=2)
    mask = torch.tensor([[True, True], [False, True]])
    feed(state, random_inputs(state, 2), 0, 2, mask=mask)
    assert state.positions.tolist() == [2, 1]
    with pytest.raises(ValueError, match="different positions"):
        _ = state.position


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"heads": 3}, "evenly"),
        ({"dtype": torch.int64}, "floating point"),
        ({"rope": [Rope()]}, "one for each of 2 layers"),
        ({"rope": Rope(dim=10)}, "rotates 10 channels"),
        ({"rope": Rope(inv_freq=(1.0, 0.1), dim=6)}, "2 frequencies"),
        ({"reach": 0}, "at least itself"),
        ({"alibi": torch.ones(3)}, "one slope per head"),
        ({"sink_logits": torch.ones(3, 3)}, "sink_logits has shape"),
    ],
)
def test_geometries_that_cannot_be(change, match):
    with pytest.raises(ValueError, match=match):
        MEMORIES["sinks"].build(**{**GEOMETRY, **change})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sink": -1}, "sink is -1"),
        ({"sink": True}, "sink is True"),
        ({"window": 0}, "window is 0"),
        ({"sink": 3}, "nothing ever leaves"),
        ({"null": "one", "window": 3}, "null is 'one'"),
        ({"recompute": True}, "needs a window"),
    ],
)
def test_memories_that_cannot_be(arguments, match):
    with pytest.raises(ValueError, match=match):
        Memory(**arguments)
    with pytest.raises(ValueError, match="sink_logits"):
        Memory(window=3, null="learned").build(**GEOMETRY)
