"""What is told of units follows its rules, and the small decoder says it packed as it does through lanes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.learn.lanes import Teller, Telling, packed, streamed, told, train_teller
from evenflow.memory.lane_places import Decoupled, Gapped, Interleaved, Overlapped

PLACES = [Interleaved(), Overlapped(), Decoupled(), Gapped()]


@settings(max_examples=30, deadline=None)
@given(said=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_every_word_follows_the_last_by_the_symbol_of_its_unit(said, seed):
    task = Telling(seed=seed % 3)
    seen, words = task.streams(3, said, seed)
    assert seen.shape == (3, len(said), task.size) and words.shape == (3, 1 + sum(said))
    for row, line in zip(seen.tolist(), words.tolist(), strict=True):
        at = 0
        for unit, count in zip(row, said, strict=True):
            (symbol,) = (one - task.words for one in unit if task.words <= one < task.words + task.symbols)
            assert all(0 <= one - task.words < task.symbols + task.noise for one in unit)
            for _ in range(count):
                assert line[at + 1] == task.rules()[symbol, line[at]]
                at += 1
    assert all(torch.equal(a, b) for a, b in zip((seen, words), task.streams(3, said, seed), strict=True))
    assert task.rules().sort(-1).values.tolist() == [[*range(task.words)]] * task.symbols


@pytest.mark.parametrize("place", PLACES, ids=lambda place: type(place).__name__)
@pytest.mark.parametrize("said", [[3, 3, 3, 3], [1, 5, 2, 1, 4], [2]])
def test_streamed_equals_packed(place, said):
    task = Telling()
    torch.manual_seed(0)
    model = Teller(task.vocabulary).double()
    seen, words = task.streams(2, said, 1)
    with torch.no_grad():
        logits, target = packed(model, place, seen, words, said)
    assert int(target.sum()) == words.shape[1]
    torch.testing.assert_close(streamed(model, place, seen, words, said), logits[:, target], rtol=0, atol=1e-10)


def test_a_unit_without_words_is_refused():
    with pytest.raises(ValueError, match=r"said is \[2, 0\]"):
        Telling().streams(1, [2, 0], 0)


def test_the_same_seed_gives_the_same_model_which_learns():
    task = Telling(words=4, symbols=2, noise=2, size=2)
    losses = []
    (one, same, other) = (
        train_teller(task, Decoupled(), [3] * 4, 40, seed, 8, progress=lambda *at: losses.append(at)) for seed in (3, 3, 4)
    )  # fmt: skip
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)
    assert [at[:2] for at in losses] == [(step, 40) for step in range(1, 41)] * 3 and losses[39][2] < losses[0][2] / 2


def test_told_is_the_share_of_words_that_were_likeliest_before_they_came():
    words = torch.tensor([[1, 0, 2], [2, 2, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1], [2, 1, 0]]), 3).double()
    assert told(logits, words) == 0.75
