"""Fast weights as a stream operator and a session, and the convolution over frames that looks one frame ahead."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.fast_weights import FastSession, FastState, FastWeights, feed, flushed, frame_convolution, read
from evenflow.recipes.reference import spatial_ttt

HEADS, DIM, HIDDEN, CHUNK = 2, 6, 8, 5


def first(seed=0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, HIDDEN, DIM), (HEADS, DIM, HIDDEN), (HEADS, HIDDEN, DIM))
    return tuple(torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) / DIM**0.5 for shape in shapes)


def tokens(count, batch=1, seed=0, dtype=torch.float64):
    """q, k, v, rates, momenta."""
    made = torch.Generator().manual_seed(seed)
    out = [torch.randn(batch, HEADS, count, n, generator=made, dtype=torch.float64) for n in (DIM, DIM, DIM, 3, 1)]
    return [x.to(dtype) for x in (*out[:3], 0.1 * out[3].exp(), out[4][..., 0].sigmoid())]


def pieces(stream, sizes):
    return zip(*(x.split(sizes, 2) for x in stream), strict=True)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prenorm", [False, True])
@given(count=st.integers(1, 23), data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_cut_equals_the_definition(prenorm, count, data):
    rule, stream = FastWeights(CHUNK, prenorm=prenorm), tokens(count)
    state, out, left, sizes = FastState.begin(first(), 1), [], count, []
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    for piece in pieces(stream, sizes):
        y, state = feed(rule, state, *piece)
        out.append(y)
    got = torch.cat(out, 2)
    for head in range(HEADS):
        oracle = spatial_ttt.Memory([w[head] for w in first()], CHUNK, prenorm)
        expected = oracle.feed(*(x[0, head] for x in stream))
        torch.testing.assert_close(got[0, head], expected, rtol=0, atol=1e-9)
        for group in ("weights", "main", "momentum"):
            for ours, theirs in zip(getattr(state, group), getattr(oracle, group), strict=True):
                torch.testing.assert_close(ours[0, head], theirs, rtol=0, atol=1e-9)
        assert state.waiting == len(oracle.pending)


def test_rows_of_a_batch_are_independent_and_narrow_numbers_learn_wide_weights():
    stream, rule = tokens(13, batch=3), FastWeights(CHUNK)
    together, _ = feed(rule, FastState.begin(first(), 3), *stream)
    for row in range(3):
        alone, _ = feed(rule, FastState.begin(first(), 1), *(x[row : row + 1] for x in stream))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-12)
    narrow, state = feed(rule, FastState.begin(first(dtype=torch.bfloat16), 3), *(x.bfloat16() for x in stream))
    assert narrow.dtype == torch.bfloat16 and state.weights[0].dtype == torch.float32


def test_gradients_flow_through_what_was_learned():
    weights = tuple(w.requires_grad_() for w in first())
    stream = [x.requires_grad_() for x in tokens(2 * CHUNK + 1)]

    def run(*given):
        return feed(FastWeights(CHUNK), FastState.begin(given[:3], 1), *given[3:])[0]

    assert torch.autograd.gradcheck(run, (*weights, *stream), fast_mode=True)


@pytest.mark.parametrize("undo", [0, 1, 3])
@pytest.mark.parametrize("count", [3, 5, 17, 30])
def test_undone_tokens_never_came(undo, count):
    stream = tokens(count, dtype=torch.float32)
    for n in range(count + 1):
        session, witness = (FastSession(FastWeights(CHUNK), first(dtype=torch.float32), undo=undo) for _ in range(2))
        for piece in pieces(stream, 4):
            session.feed(*piece)
        before = session.fork()
        try:
            session.truncate(n)
        except ValueError as error:
            assert "larger undo" in str(error) and n > max(undo * CHUNK, before.state.waiting) and same(session, before)
            continue
        assert session.position == count - n
        for piece in pieces([x[:, :, : count - n] for x in stream], 4) if n < count else ():
            witness.feed(*piece)
        assert same(session, witness) or n > undo * CHUNK  # further back, what is full may be learned already
        future = tokens(12, seed=9, dtype=torch.float32)
        assert torch.equal(session.feed(*future), witness.feed(*future))


def test_a_session_undoes_again_after_it_has_undone():
    session, witness = (FastSession(FastWeights(CHUNK), first(), undo=2) for _ in range(2))
    stream = tokens(20)
    session.feed(*stream)
    session.truncate(4)
    session.feed(*(x[:, :, 16:] for x in stream))
    session.truncate(9)
    witness.feed(*(x[:, :, :11] for x in stream))
    assert same(session, witness)


def test_bytes_are_bounded_and_forks_are_free_and_independent():
    session = FastSession(FastWeights(CHUNK), first(), undo=1)
    sizes = []
    for n in range(60):
        session.feed(*tokens(1, seed=n))
        sizes.append(session.nbytes)
    assert max(sizes[:30]) == max(sizes[30:])
    twin, witness = session.fork(), session.fork()
    twin.feed(*tokens(9))
    assert same(session, witness) and not same(session, twin)
    resumed = FastSession(FastWeights(CHUNK), first())
    resumed.load_state_dict(session.state_dict())
    on = tokens(14, seed=5)
    assert torch.equal(session.feed(*on, commit=False), resumed.feed(*on)) and same(session, witness)
    session.reset()
    assert same(session, FastSession(FastWeights(CHUNK), first())) and session.position == 0


def test_what_is_fed_may_be_overwritten_afterwards():
    stream, on = tokens(4), tokens(9, seed=2)
    session, witness = (FastSession(FastWeights(CHUNK), first()) for _ in range(2))
    witness.feed(*(x.clone() for x in stream))
    session.feed(*stream)
    for x in stream:
        x.zero_()
    assert torch.equal(session.feed(*on), witness.feed(*on))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    session = FastSession(FastWeights(CHUNK), first())
    session.feed(*tokens(7))
    before, good = session.fork(), tokens(3)
    for at, name in enumerate(("q", "k", "v", "rates", "momenta")):
        wrong = list(good)
        wrong[at] = torch.zeros(1, HEADS, 3, 2, 2)
        with pytest.raises(ValueError, match=f"^{name} is"):
            session.feed(*wrong)
    spoilt = [x.clone() for x in good]
    spoilt[1][0, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        session.feed(*spoilt)
    state = session.state_dict()
    for wrong in (
        {"weights.0": state["weights.0"].half()},
        {"odd": state["position"]},
        {"rates": state["rates"][..., :2]},
    ):
        with pytest.raises(ValueError):
            session.load_state_dict(state | wrong)
    many = {name: state[name].repeat_interleave(4, 2) for name in ("keys", "values", "rates", "momenta")}
    with pytest.raises(ValueError, match="8 tokens wait"):
        session.load_state_dict(state | many)
    assert same(session, before)
    with pytest.raises(ValueError, match="cannot undo 8"):
        session.truncate(8)
    with pytest.raises(ValueError, match="undo"):
        FastSession(session.rule, first(), undo=-1)
    with pytest.raises(ValueError, match="chunk"):
        replace(session.rule, chunk=0)


@given(count=st.integers(1, 7), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=12, deadline=None)
def test_frames_are_convolved_the_same_however_they_come(count, seed, data):
    made = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randn(1, count, 2, 3, 2, generator=made).double(),
        torch.randn(2, 3, 3, 3, generator=made).double(),
    )
    tail, out, left = None, [], x
    while left.shape[1]:
        size = data.draw(st.integers(1, left.shape[1]))
        y, tail = frame_convolution(left[:, :size], weight, tail)
        out.append(y)
        left = left[:, size:]
        assert sum(y.shape[1] for y in out) == count - left.shape[1] - 1
    out.append(flushed(weight, tail))
    expected = spatial_ttt.convolved(x[0], weight)
    torch.testing.assert_close(torch.cat(out, 1)[0], expected, rtol=0, atol=1e-12)
    assert tail.shape[1] == 2


def test_frames_that_do_not_fit_are_refused():
    weight = torch.zeros(2, 3, 3, 3)
    _, tail = frame_convolution(torch.zeros(1, 1, 2, 3, 2), weight)
    for wrong in (torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 0, 2, 3, 2), torch.zeros(1, 1, 2, 3, 3)):
        with pytest.raises(ValueError, match=r"frames are|x is"):
            frame_convolution(wrong, weight, tail)


def test_reading_is_the_network():
    x = tokens(4)[0]
    got = read(FastState.begin(first(), 1).weights, x)
    for head in range(HEADS):
        for t in range(4):
            expected = spatial_ttt.network([w[head] for w in first()], x[0, head, t])
            torch.testing.assert_close(got[0, head, t], expected, rtol=0, atol=1e-12)


def test_weights_that_are_trained_on_do_not_change_a_session():
    weights = first()
    session = FastSession(FastWeights(CHUNK), weights)
    witness = FastSession(FastWeights(CHUNK), first())
    for w in weights:
        w.zero_()
    assert torch.equal(session.feed(*tokens(9)), witness.feed(*tokens(9)))
