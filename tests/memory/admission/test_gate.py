"""Emit gates: when a model speaks, by one token, a skip unit, novelty or the end of a clip."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from evenflow.memory.admission import ClipEnd, Novelty, NoveltyPeak, OneToken, SkipUnit, newest_share

from . import oracle

SILENT, WORDS = 2, 9


def logits(n=400, seed=0):
    made = torch.Generator().manual_seed(seed)
    out = torch.randn(n, WORDS, generator=made, dtype=torch.float64)
    out[:, SILENT] += 4 * torch.rand(n, generator=made, dtype=torch.float64)
    return out


def said(gate, given):
    return gate.step(given)[0]


@settings(max_examples=50, deadline=None)
@given(some.lists(some.floats(-5, 5), min_size=4, max_size=4), some.floats(0, 1.2), some.integers(0, 3))
def test_one_token_is_the_argmax_once_a_doubtful_silence_is_struck_out(row, threshold, silent):
    """The published rule: a silence under the threshold is given no probability, then the most likely token is taken."""
    shares = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    if shares[silent] < threshold:
        shares[silent] = 0.0
    expected = shares.index(max(shares)) != silent
    assert said(OneToken(silent, threshold), torch.tensor([row], dtype=torch.float64)).tolist() == [expected]


def test_point_4_a_higher_threshold_speaks_more_often():
    given, sets = logits(), []
    for threshold in (0.0, 0.3, 0.5, 0.725, 0.9, 1.01):
        sets.append(said(OneToken(SILENT, threshold), given))
    assert all((a <= b).all() for a, b in pairwise(sets))
    assert torch.equal(sets[0], given.argmax(1) != SILENT) and sets[-1].all()
    assert 0 < sets[0].sum() < sets[3].sum() < 400


def test_pitfall_any_token_but_silence_is_speech():
    given = torch.full((WORDS, WORDS), -5.0).fill_diagonal_(5.0)
    assert said(OneToken(SILENT), given).tolist() == [word != SILENT for word in range(WORDS)]
    two = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.3, 0.0]], dtype=torch.bfloat16)  # a head that only decides
    assert said(OneToken(0), two).tolist() == [False, True, True]


def test_a_unit_that_begins_with_the_skip_token_is_silent():
    assert said(SkipUnit(151665), torch.tensor([151665, 17, 151665, 3])).tolist() == [False, True, False, True]


def test_point_7_less_than_sixty_percent_dropped_is_news():
    novelty = torch.tensor([1.0, 0.1, 0.39, 0.41, 0.9])
    assert said(Novelty(), novelty).tolist() == [True, False, False, True, True]
    fifth = torch.tensor([[True, True, False, False, False]]).float().mean(1)  # 60 % dropped, not less
    assert not said(Novelty(), fifth).any()


@settings(max_examples=60, deadline=None)
@given(
    some.lists(some.sampled_from([0.0, 0.1, 0.2, 0.7, 1.0]), min_size=1, max_size=25), some.sampled_from([0.0, 0.15]),
    some.lists(some.integers(0, 5), max_size=6),
)  # fmt: skip
def test_a_peak_is_the_end_of_what_rose_in_any_cut(novelty, least, cuts):
    gate, given = NoveltyPeak(least), torch.tensor(novelty, dtype=torch.float64)
    state, pieces, at = None, [], 0
    for size in [*cuts, len(novelty)]:
        speak, state = gate.step(given[at : at + size], state)
        pieces.append(speak)
        at += size
    assert torch.cat(pieces).tolist() == oracle.peaks(novelty, least)
    assert state.shape == (2,)


def test_a_peak_speaks_once_in_a_fade():
    novelty = torch.tensor([1.0, 0.0, 0.1, 0.5, 0.8, 0.9, 0.7, 0.5, 0.1, 0.0])
    assert said(Novelty(), novelty).nonzero()[:, 0].tolist() == [0, 3, 4, 5, 6, 7]
    assert said(NoveltyPeak(), novelty).nonzero()[:, 0].tolist() == [1, 6]
    assert said(NoveltyPeak(0.95), novelty).nonzero()[:, 0].tolist() == [1]


@pytest.mark.parametrize(("gate", "given"), [
    (OneToken(SILENT), logits(40)), (SkipUnit(3), torch.arange(40) % 5), (Novelty(), torch.rand(40)), (ClipEnd(7), torch.arange(40)),
])  # fmt: skip
def test_gates_without_a_state_say_the_same_in_any_cut(gate, given):
    whole = said(gate, given)
    assert torch.equal(whole, torch.cat([said(gate, given[t : t + 3]) for t in range(0, 40, 3)]))
    assert whole.any() and not whole.all()


def test_a_clip_ends_with_its_last_item():
    assert said(ClipEnd(4), torch.arange(10)).nonzero()[:, 0].tolist() == [3, 7]
    assert said(ClipEnd(4), torch.arange(10**12, 10**12 + 4)).tolist() == [False, False, False, True]
    assert said(ClipEnd(1), torch.arange(3)).all()


def test_the_newest_tenth_of_a_recording():
    novelty = torch.rand(70, generator=torch.Generator().manual_seed(0))
    for share, count in ((0.1, 7), (0.11, 8), (0.01, 1), (1.0, 70)):
        chosen = newest_share(novelty, share)
        assert chosen.sum() == count
        assert count == 70 or novelty[chosen].min() > novelty[~chosen].max()
    assert newest_share(torch.ones(11), 0.1).nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(("gate", "given"), [
    (OneToken(9), torch.zeros(2, 9)), (OneToken(0), torch.zeros(2, dtype=torch.int64)), (SkipUnit(0), torch.zeros(3)),
    (Novelty(), torch.zeros(2, 2)), (Novelty(), torch.tensor([0.1, torch.nan])), (NoveltyPeak(), torch.tensor([1, 2])),
    (ClipEnd(3), torch.zeros(3)),
])  # fmt: skip
def test_what_a_gate_cannot_use_is_refused(gate, given):
    with pytest.raises(ValueError, match="expected"):
        gate.step(given)


def test_clips_without_length_are_refused():
    with pytest.raises(ValueError, match="expected 1 or more"):
        ClipEnd(0)
