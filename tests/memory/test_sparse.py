"""Block-sparse attention: the same as dense attention over the blocks that were chosen, and the right ones are chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import sparse
from evenflow.memory.attention import softmax_attention
from evenflow.memory.sparse import block_attention, block_means, sparse_attention, top_blocks

SCALE = 0.3


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(m, n, *, batch=2, heads=4, kv_heads=2, dim=6, seed=0):
    return (
        drawn(batch, heads, m, dim, seed=seed),
        drawn(batch, kv_heads, n, dim, seed=seed + 1),
        drawn(batch, kv_heads, n, dim + 1, seed=seed + 2),
    )


def by_hand(q, k, v, ratio, block, bias):
    """One query block and head at a time: means over what is there, the best blocks, softmax over their keys."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    groups, n = q.shape[1] // k.shape[1], k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key, value, cost = k[b, h // groups], v[b, h // groups], bias.expand(*q.shape[:2], 1, n)[b, h, 0]
            there = [i for i in range(n) if cost[i] > -torch.inf]
            blocks = sorted({i // block for i in there})
            means = {c: key[[i for i in there if i // block == c]].mean(0) for c in blocks}
            for start in range(0, q.shape[2], block):
                part = q[b, h, start : start + block]
                best = sorted(blocks, key=lambda c: (-float(part.mean(0) @ means[c]), c))
                kept = best[: max(1, int(ratio * len(blocks)))]
                seen = [i for i in there if i // block in kept]
                weights = torch.softmax(part @ key[seen].T * SCALE + cost[seen], -1)
                out[b, h, start : start + block] = weights @ value[seen]
    return out


@given(
    m=st.integers(1, 17), n=st.integers(1, 23), block=st.integers(1, 7), kv_heads=st.sampled_from([1, 2, 4]),
    ratio=st.sampled_from([0.05, 0.2, 0.34, 0.5, 0.99, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_is_what_loops_give(m, n, block, kv_heads, ratio, seed):
    q, k, v = inputs(m, n, kv_heads=kv_heads, seed=seed)
    made = torch.Generator().manual_seed(seed)
    for heads in (1, kv_heads):
        bias = drawn(2, heads, 1, n, seed=seed)
        bias[torch.rand(bias.shape, generator=made) < 0.3] = -torch.inf
        bias[..., seed % n] = 0.0
        given_ = bias if heads == 1 else bias.repeat_interleave(4 // kv_heads, 1)
        ours = sparse_attention(q, k, v, ratio=ratio, block=block, scale=SCALE, bias=given_)
        assert (ours - by_hand(q, k, v, ratio, block, given_)).abs().max() < 1e-12


@pytest.mark.parametrize(("m", "n", "block"), [(1, 1, 4), (5, 12, 4), (13, 30, 8), (64, 200, 16)])
def test_all_blocks_are_dense_attention(m, n, block):
    q, k, v = inputs(m, n)
    bias = drawn(2, 1, 1, n, seed=9)
    for given_ in (None, bias):
        ours = sparse_attention(q, k, v, ratio=1.0, block=block, scale=SCALE, bias=given_)
        assert (ours - softmax_attention(q, k, v, given_, SCALE, None)).abs().max() < 1e-12


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.5, 0.75])
def test_exactly_so_many_blocks_are_kept(ratio):
    q, k, _ = inputs(50, 203)
    kept = top_blocks(q, k, ratio, 10)
    assert kept.shape == (2, 4, 5, max(1, int(ratio * 21)))
    assert all(len(set(row)) == len(row) for row in kept.flatten(0, 2).tolist())


def test_rows_with_fewer_keys_keep_their_own_share():
    q, k, _ = inputs(8, 40)
    real = torch.ones(2, 1, 40, dtype=torch.bool)
    real[1, :, 13:] = False
    kept = top_blocks(q, k, 0.5, 4, real)
    assert ((kept >= 0).sum(-1)[0] == 5).all() and ((kept >= 0).sum(-1)[1] == 2).all() and (kept[1] < 4).all()


def test_taking_the_mean_key_away_first_changes_no_choice():
    q, k, _ = inputs(30, 80)
    assert torch.equal(top_blocks(q, k, 0.3, 8), top_blocks(q, k - k.mean(2, keepdim=True), 0.3, 8))


def test_a_cut_block_is_averaged_over_its_true_length():
    x = drawn(1, 2, 7, 3)
    means = block_means(x, 4)
    assert torch.allclose(means[:, :, 1], x[:, :, 4:].mean(2), rtol=0, atol=1e-14)


def test_planted_blocks_are_found():
    q, k, v = inputs(32, 320, heads=2, dim=16)
    direction = torch.nn.functional.normalize(drawn(16, seed=5), dim=0)
    q, k = q * 0.2 + 12 * direction, k * 0.2
    k[:, :, 96:128] += 12 * direction
    some = sparse_attention(q, k, v, ratio=0.2, block=16, scale=0.25)
    assert (some - softmax_attention(q, k, v, None, 0.25, None)).abs().max() < 1e-3
    assert {6, 7} <= set(top_blocks(q, k, 0.2, 16)[0, 0, 0].tolist())


def test_slabs_make_no_difference(monkeypatch):
    q, k, v = inputs(40, 100)
    kept = top_blocks(q, k, 0.4, 8)
    whole = block_attention(q, k, v, kept, 8, SCALE)
    monkeypatch.setitem(sparse.SLAB, "cpu", 1)
    assert torch.equal(block_attention(q, k, v, kept, 8, SCALE), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(dtype):
    q, k, v = (x.to(dtype) for x in inputs(20, 50))
    out = sparse_attention(q, k, v, ratio=0.4, block=8, scale=SCALE)
    kept = top_blocks(q, k, 0.4, 8)
    exact = block_attention(q.double(), k.double(), v.double(), kept, 8, SCALE)
    assert out.dtype is dtype and (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


def test_what_makes_no_sense_is_refused():
    q, k, v = inputs(4, 8)
    for ratio, block in ((0.0, 4), (1.5, 4), (0.5, 0)):
        with pytest.raises(ValueError, match="ratio"):
            sparse_attention(q, k, v, ratio=ratio, block=block, scale=SCALE)
    with pytest.raises(ValueError, match="bias"):
        sparse_attention(q, k, v, ratio=1.0, block=4, scale=SCALE, bias=torch.zeros(1, 1, 4, 8))
