"""Taking until the mass is enough, against a loop over a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.mass import until_mass
from evenflow.recipes.reference import v_rex


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rows_equal_the_full_sort(data):
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    count = data.draw(st.integers(1, 60))
    spread = data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]))
    scores = spread * torch.randn(2, 4, count, generator=made, dtype=torch.float64)
    if data.draw(st.booleans()):
        scores = scores.round()  # ties
    counts = torch.randint(0 if data.draw(st.booleans()) else 1, 4, (2, 1, count), generator=made)
    share = data.draw(st.sampled_from([1e-9, 0.1, 0.3, 0.5, 0.6, 0.9, 0.999999, 1.0]))
    weights = data.draw(st.sampled_from(["exp", "shifted"]))
    taken = until_mass(scores, counts, share, weights)
    for row in range(2):
        there = counts[row, 0].nonzero()[:, 0]
        for query in range(4):
            expected = v_rex.wicsum(scores[row, query, there], counts[row, 0, there], share, weights)
            assert taken[row, query].nonzero()[:, 0].tolist() == there[expected].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_rows_of_any_dtype_equal_the_full_sort(dtype):
    scores = (3 * torch.randn(1000, 80, generator=torch.Generator().manual_seed(0))).to(dtype)
    counts = torch.randint(1, 40, (80,), generator=torch.Generator().manual_seed(1))
    for share in (0.3, 0.7):
        taken = until_mass(scores, counts, share)
        expected = torch.zeros_like(taken)
        for row, own in enumerate(scores.double()):
            expected[row, v_rex.wicsum(own, counts, share)] = True
        assert torch.equal(taken, expected)


def test_nothing_there_nothing_taken():
    assert not until_mass(torch.zeros(2, 3), torch.zeros(3), 0.5).any()
    assert until_mass(torch.zeros(2, 0), torch.zeros(0), 0.5).shape == (2, 0)
    with pytest.raises(ValueError, match="above 0"):
        until_mass(torch.zeros(1), torch.ones(1), 0.0)


def test_counts_may_differ_from_query_to_query():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    taken = until_mass(scores, torch.tensor([[1, 1, 1], [0, 1, 9]]), 0.5)
    assert taken.tolist() == [[True, False, False], [False, True, True]]  # e² is less than half of e² + 9e


def test_what_is_no_number_hurts_nobody_else():
    scores = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, 1.0, 5.0]])
    assert until_mass(scores, torch.ones(3), 0.5)[1].tolist() == [False, False, True]
