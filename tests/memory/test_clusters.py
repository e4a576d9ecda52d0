"""Clusters grown all at once are those grown one vector at a time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.clusters import Clusters
from evenflow.memory.hashing import hyperplanes
from evenflow.recipes.reference import v_rex

DIM = 6


def grown(sizes, near, bits, seed, spread, shape=(2, 2)):
    """Tables after steps of vectors around a few centres; the vectors and their clusters."""
    made = torch.Generator().manual_seed(seed)
    planes = hyperplanes(DIM, bits, seed=seed).double()
    centres = torch.randn(4, DIM, generator=made, dtype=torch.float64)
    table = Clusters.empty(shape, bits, DIM, planes)
    parts, joined = [], []
    for m in sizes:
        which = torch.randint(4, (*shape, m), generator=made)
        x = centres[which] + spread * torch.randn(*shape, m, DIM, generator=made, dtype=torch.float64)
        table, own = table.join(x, planes, near)
        parts.append(x)
        joined.append(own)
    return table, torch.cat(parts, -2), torch.cat(joined, -1), planes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 6), st.integers(1, 8), st.integers(0, 10**6),
    st.sampled_from([0.01, 0.3, 2.0]),
)  # fmt: skip
def test_any_steps_equal_one_vector_at_a_time(sizes, near, bits, seed, spread):
    table, x, joined, planes = grown(sizes, near, bits, seed, spread)
    for row in range(2):
        for head in range(2):
            theirs = v_rex.clustered([], x[row, head], [*range(x.shape[2])], planes, near)
            count = table.count[row, head]
            assert int((count > 0).sum()) == len(theirs)
            for c, cluster in enumerate(theirs):
                assert (joined[row, head] == c).nonzero()[:, 0].tolist() == cluster.members
                assert int(count[c]) == len(cluster.members)
                assert torch.equal(table.bits[row, head, c], cluster.bits)
                torch.testing.assert_close(table.mean[row, head, c], cluster.mean, rtol=0, atol=1e-12)


def test_what_is_not_there_joins_nothing():
    planes = hyperplanes(DIM, 8).double()
    x = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True, False, True, True, False], [False] * 5])
    table, joined = Clusters.empty((2,), 8, DIM, planes).join(x, planes, 3, real)
    assert table.count.sum(-1).tolist() == [3, 0] and joined[~real].tolist() == [-1] * 7
    alone, own = Clusters.empty((1,), 8, DIM, planes).join(x[:1, real[0]], planes, 3)
    used = alone.count.shape[-1]
    assert torch.equal(table.mean[:1, :used], alone.mean) and joined[0, real[0]].tolist() == own[0].tolist()


def test_without_any_near_bits_every_vector_is_its_own_cluster_to_the_bit():
    table, x, joined, _ = grown([5, 3], 0, 8, 0, 0.01)
    assert torch.equal(table.mean[..., :8, :], x) and joined[0, 0].tolist() == [*range(8)]


def test_a_table_goes_through_its_tensors():
    table, *_ = grown([5, 3], 2, 8, 0, 0.3)
    again = Clusters.of(table.tensors())
    assert all(torch.equal(a, b) for a, b in zip(table.tensors().values(), again.tensors().values(), strict=True))
