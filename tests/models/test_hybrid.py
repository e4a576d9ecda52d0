"""A session of the hybrid network: the operations of every session, over windows and matrices together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.models.hybrid import PRESETS, Hybrid, HybridSession, frame_places

TOY = PRESETS["toy"]


def network(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return Hybrid(replace(TOY, **changes)).to(dtype).eval()


def ids(count, batch=1, seed=0):
    return torch.randint(64, (batch, count), generator=torch.Generator().manual_seed(seed))


def fed(session, tokens, sizes):
    return torch.cat([session.feed(piece) for piece in tokens.split(sizes, 1)], 1)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return set(a) == set(b) and all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


@given(data=st.data(), batch=st.integers(1, 2))
@settings(max_examples=6, deadline=None)
def test_any_cut_gives_the_same(data, batch):
    model, tokens = network(), ids(90, batch)
    whole = HybridSession(model, batch).feed(tokens)
    sizes, left = [], 90
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    torch.testing.assert_close(fed(HybridSession(model, batch), tokens, sizes), whole, rtol=0, atol=1e-10)


def test_padding_is_not_read_and_rows_may_be_of_different_age():
    model, tokens = network(), ids(40, 2)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) < 0.6
    both = HybridSession(model, 2)
    logits = torch.cat([both.feed(tokens[:, a:b], mask=mask[:, a:b]) for a, b in ((0, 15), (15, 40))], 1)
    newest = both.feed(tokens, mask=mask, last=True, commit=False)
    assert both.positions.tolist() == mask.sum(1).tolist()
    for row in range(2):
        alone, real = HybridSession(model), mask[row]
        torch.testing.assert_close(logits[row, real], alone.feed(tokens[row, real])[0], rtol=0, atol=1e-10)
        again = alone.feed(tokens[row, real])[0, -1]
        torch.testing.assert_close(newest[row, 0], again, rtol=0, atol=1e-10)


@pytest.mark.parametrize("m", [1, 7, 21])
def test_a_step_that_is_not_committed_or_fails_leaves_no_trace(m):
    session = HybridSession(network(), undo=8)
    fed(session, ids(33), [11, 1, 21])
    witness = session.fork()
    first, again = (session.feed(ids(m, seed=4), commit=False) for _ in range(2))
    assert torch.equal(first, again)
    spoilt = torch.randn(1, m, 64).double()
    spoilt[0, -1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        session.feed(spoilt)
    assert same(session, witness) and session.nbytes == witness.nbytes
    assert torch.equal(session.feed(ids(m, seed=4)), first)


@pytest.mark.parametrize("undo", [1, 7, 40])
@pytest.mark.parametrize("length", [5, 60])
def test_undone_tokens_never_came(undo, length):
    model, tokens = network(torch.float32), ids(length)
    sizes = [3, 1, 1] if length == 5 else [3, 1, 1, 30, 1, 1, 1, 22]
    for n in {1, 2, undo // 2, undo - 1, undo} & set(range(1, min(undo, length) + 1)):
        session, witness = HybridSession(model, undo=undo), HybridSession(model)
        fed(session, tokens, sizes)
        session.truncate(n)
        assert session.position == length - n
        left = length - n
        for size in sizes:  # the rest, in the same pieces
            if left > 0:
                witness.feed(tokens[:, length - n - left : length - n - left + min(size, left)])
                left -= size
        assert same(session, witness)
        assert torch.equal(session.feed(ids(9, seed=2)), witness.feed(ids(9, seed=2)))


def test_undoing_may_be_undone_further_and_reaches_no_further_than_was_asked():
    session = HybridSession(network(), undo=10)
    for piece in ids(40).split(1, 1):
        session.feed(piece)
    sizes = session.nbytes
    for _ in range(30):
        session.feed(ids(1))
    assert session.nbytes == sizes
    session.truncate(4)
    session.truncate(6)
    witness = HybridSession(session.model)
    fed(witness, torch.cat([ids(40), ids(1).expand(1, 20)], 1), 1)
    assert same(session, witness)
    with pytest.raises(ValueError, match="what 10 tokens need"):
        session.truncate(50)
    assert same(session, witness)


def test_undoing_with_rows_of_different_age():
    model, mask = network(), torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    session, tokens = HybridSession(model, 2, undo=9), ids(30, 2)
    for part in (slice(0, 12), slice(12, 13), slice(13, 30)):
        session.feed(tokens[:, part], mask=mask[:, part])
    session.truncate(9)
    after = session.feed(ids(4, 2, seed=9))
    for row in range(2):
        alone = HybridSession(model)
        alone.feed(tokens[row : row + 1, mask[row]][:, :-9])
        torch.testing.assert_close(after[row], alone.feed(ids(4, 2, seed=9)[row])[0], rtol=0, atol=1e-10)


def test_what_cannot_be_undone_is_refused_with_the_reason():
    session = HybridSession(network())
    session.feed(ids(5))
    with pytest.raises(ValueError, match="larger undo"):
        session.truncate(1)
    with pytest.raises(ValueError, match="cannot undo 6"):
        session.truncate(6)
    session.truncate(0)
    assert session.position == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_forked_and_original_go_on_bit_for_bit(dtype):
    model = network(dtype)
    session, resumed = HybridSession(model), HybridSession(model)
    fed(session, ids(70), [66, 4])
    twin = session.fork()
    resumed.load_state_dict(session.state_dict())
    on = ids(20, seed=8)
    expected = fed(session, on, [7, 1, 12])
    assert torch.equal(fed(twin, on, [7, 1, 12]), expected) and torch.equal(fed(resumed, on, [7, 1, 12]), expected)
    session.reset()
    fresh = HybridSession(model)
    assert session.position == 0 and same(session, fresh)
    assert torch.equal(session.feed(on), fresh.feed(on))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    session = HybridSession(network(), 2)
    session.feed(ids(9, 2))
    witness = session.fork()
    for wrong, what in (
        ({"tokens": ids(3)}, "expected ids"), ({"tokens": ids(0, 2)}, "at least one"), ({"tokens": ids(3, 2) + 64}, "ids must be"),
        ({"tokens": torch.randn(2, 3, 64)}, "dtype is"), ({"tokens": torch.randn(2, 3, 65).double()}, "expected ids"),
        ({"tokens": ids(3, 2), "mask": torch.zeros(2, 3, dtype=torch.bool)}, "a token in it"),
        ({"tokens": ids(3, 2), "places": torch.zeros(3, 2, dtype=torch.long)}, "places are"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            session.feed(**wrong)
    state = session.state_dict()
    for name, value in (("delta.0.matrix", state["delta.0.matrix"].half()), ("free", torch.zeros(3))):
        with pytest.raises(ValueError, match=name):
            session.load_state_dict(state | {name: value})
    with pytest.raises(ValueError, match="beside the window"):
        session.load_state_dict(state | {"delta.9.tail": state["free"]})
    assert same(session, witness)
    for wrong in ({"undo": -1}, {"undo": 1.5}):
        with pytest.raises(ValueError, match="undo"):
            HybridSession(session.model, **wrong)
    for wrong in ({"sections": (1, 2, 3)}, {"window": 1}, {"pattern": ("whole",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(TOY, **wrong)
    with pytest.raises(ValueError, match="no window layer"):
        HybridSession(network(pattern=("delta",)))


def test_frames_share_the_places_of_their_rows_and_text_goes_on_behind_the_largest():
    grid = frame_places(5, 3.7, 2, 3)
    assert grid.tolist() == [[11, 5 + r, 5 + c] for r in range(2) for c in range(3)]
    assert torch.equal(frame_places(5, 3.0, 2, 3), grid) and frame_places(5, 4.0, 2, 3)[0, 0] == 13
    session = HybridSession(network())
    session.feed(ids(5))
    session.feed(torch.randn(6, 64).double(), places=grid)
    assert session.free.tolist() == [12]
    session.feed(ids(2))
    assert session.free.tolist() == [14] and session.position == 13


def test_the_shape_of_the_paper():
    config = PRESETS["infinite-vl"]
    assert [n for n, kind in enumerate(config.kinds) if kind == "window"] == list(range(0, 36, 4))
    assert config.rope.axes == (1,) * 16 + (2,) * 24 + (3,) * 24
    with torch.device("meta"):
        model = Hybrid(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 3.2e9 < count < 4.5e9


def test_what_is_fed_may_be_overwritten_afterwards():
    session, witness = (HybridSession(network(), undo=9) for _ in range(2))
    x, grid = torch.randn(6, 64).double(), frame_places(0, 0, 2, 3)
    witness.feed(x.clone(), grid.clone())
    session.feed(x, grid)
    x.zero_()
    grid.zero_()
    session.truncate(2)
    witness.truncate(2)
    assert same(session, witness)


def test_an_answer_is_what_greedy_reading_on_gives():
    session, question = HybridSession(network()), ids(3, seed=5)
    session.feed(ids(20))
    answer, twin = session.ask(question, 4), session.fork()
    logits = twin.feed(torch.cat([question, answer], 1))
    assert torch.equal(logits[:, 2:-1].argmax(-1), answer)
    with pytest.raises(ValueError, match="count"):
        session.ask(question, 0)
