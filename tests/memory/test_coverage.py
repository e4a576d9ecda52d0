"""Tokens chosen by score and by spread, against the rule said in a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.coverage import buckets, spread_best
from evenflow.recipes.reference import live_vlm


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_choice_equals_the_loop(data):
    n = data.draw(st.integers(1, 30))
    keep = data.draw(st.integers(1, 20))
    top = data.draw(st.integers(0, keep))
    capacity = data.draw(st.integers(1, 3))
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    scores = torch.randint(levels, (2, 3, n), generator=made).double()
    candidates = torch.rand(2, 3, n, generator=made) < data.draw(st.sampled_from([0.5, 1.0]))
    places, length = candidates.cumsum(-1), candidates.sum(-1)
    bucket = buckets(places, length, max(1, keep // capacity))
    kept = spread_best(scores, bucket, candidates, keep=keep, top=top, capacity=capacity)
    for row in range(2):
        for head in range(3):
            there = candidates[row, head].nonzero()[:, 0].tolist()
            where = live_vlm.buckets([*range(1, len(there) + 1)], max(1, len(there)), max(1, keep // capacity))
            assert bucket[row, head, there].tolist() == where
            expected = live_vlm.bucketed(scores[row, head, there].tolist(), where, keep, top, capacity)
            assert kept[row, head].nonzero()[:, 0].tolist() == [there[t] for t in expected]


def test_places_fall_into_equal_stretches():
    assert buckets(torch.tensor([256]), torch.tensor(1000), 10).tolist() == [3]
    assert buckets(torch.tensor([1, 100, 101, 1000]), torch.tensor(1000), 10).tolist() == [1, 1, 2, 10]


def test_what_cannot_be_chosen_is_refused():
    one = torch.ones(1)
    for wrong in ({"keep": 1, "top": 2}, {"keep": 1, "top": -1}, {"keep": 1, "top": 1, "capacity": 0}):
        with pytest.raises(ValueError, match="needed"):
            spread_best(one, one.long(), one.bool(), **wrong)
