"""Attention within buckets is attention under a mask, whatever the buckets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import buckets
from evenflow.memory.attention import softmax_attention
from evenflow.memory.buckets import bucket_attention, shared_products
from evenflow.memory.hashing import bucket_codes, hyperplanes, share_bucket

SCALE = 0.4


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(q, k, v, q_codes, k_codes, bias):
    groups = q.shape[1] // k.shape[1]
    k, v, k_codes = (x.repeat_interleave(groups, 1) for x in (k, v, k_codes))
    met = (share_bucket(q_codes, k_codes)) & (k_codes >= 0).any(-1)[:, :, None]
    score = (q @ k.transpose(-1, -2) * SCALE + bias).masked_fill(~met, -torch.inf)
    return torch.nan_to_num(torch.softmax(score, -1)) @ v


@given(
    m=st.integers(1, 20), n=st.integers(1, 30), tables=st.integers(1, 3), kinds=st.integers(1, 9),
    block=st.integers(1, 8), kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_it_is_attention_under_a_mask(m, n, tables, kinds, block, kv_heads, seed):
    q, k, v = (
        drawn(2, 4, m, 5, seed=seed),
        drawn(2, kv_heads, n, 5, seed=seed + 1),
        drawn(2, kv_heads, n, 3, seed=seed + 2),
    )
    made = torch.Generator().manual_seed(seed)
    q_codes = torch.randint(kinds, (2, 4, m, tables), generator=made)
    k_codes = torch.randint(kinds, (2, kv_heads, n, tables), generator=made)
    gone = torch.rand(2, kv_heads, n, generator=made) < 0.2
    k_codes[gone] = -1
    bias = drawn(2, 1, 1, n, seed=seed)
    ours = bucket_attention(q, k, v, q_codes, k_codes, scale=SCALE, block=block, bias=bias)
    assert (ours - masked(q, k, v, q_codes, k_codes, bias)).abs().max() < 1e-12
    assert (bucket_attention(q, k, v, q_codes, k_codes, scale=SCALE, block=block)
            - masked(q, k, v, q_codes, k_codes, 0.0)).abs().max() < 1e-12  # fmt: skip


def test_one_bucket_is_dense_attention():
    q, k, v = drawn(2, 4, 50, 8), drawn(2, 2, 130, 8, seed=1), drawn(2, 2, 130, 8, seed=2)
    codes = torch.zeros(2, 4, 50, 2, dtype=torch.int64), torch.zeros(2, 2, 130, 2, dtype=torch.int64)
    ours = bucket_attention(q, k, v, *codes, scale=SCALE, block=16)
    assert (ours - softmax_attention(q, k, v, None, SCALE, None)).abs().max() < 1e-12


def test_scores_of_any_size_are_summed_without_loss():
    """The largest score of a query may be anywhere: what came before it is scaled down, not lost to overflow."""
    q, k, v = 60 * drawn(1, 1, 40, 8), drawn(1, 1, 200, 8, seed=1), drawn(1, 1, 200, 8, seed=2)
    planes = hyperplanes(8, 3, tables=3, like=q)
    codes = bucket_codes(q, planes), bucket_codes(k, planes)
    exact = masked(q, k, v, *codes, 0.0)
    single = bucket_attention(q.float(), k.float(), v.float(), *codes, scale=SCALE, block=8)
    assert bool(single.isfinite().all()) and (single - exact).abs().max() < 1e-3


def test_cost_is_the_sum_over_buckets():
    q_codes, k_codes = torch.tensor([0, 0, 1, 3, -1]), torch.tensor([0, 1, 1, 1, 2, -1])
    assert int(shared_products(q_codes, k_codes)) == 2 * 1 + 1 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype(dtype):
    q, k, v = (drawn(1, 2, 30, 8, seed=n).to(dtype) for n in range(3))
    codes = torch.arange(30).remainder(3).reshape(1, 1, 30, 1).expand(1, 2, 30, 1)
    out = bucket_attention(q, k, v, codes, codes, scale=SCALE, block=8)
    exact = masked(q.double(), k.double(), v.double(), codes, codes, 0.0)
    assert out.dtype is dtype and (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


def test_slabs_make_no_difference(monkeypatch):
    q, k, v = drawn(2, 4, 70, 8), drawn(2, 2, 150, 8, seed=1), drawn(2, 2, 150, 8, seed=2)
    planes = hyperplanes(8, 3, tables=3, like=q)
    codes = bucket_codes(q, planes), bucket_codes(k, planes)
    whole = bucket_attention(q, k, v, *codes, scale=SCALE, block=16)
    monkeypatch.setitem(buckets.SLAB, "cpu", 1)
    assert (bucket_attention(q, k, v, *codes, scale=SCALE, block=16) - whole).abs().max() < 1e-14
    assert (whole - masked(q, k, v, *codes, 0.0)).abs().max() < 1e-12


def test_keys_without_weight_are_as_if_they_were_not_there():
    q, k, v = drawn(1, 2, 9, 8), drawn(1, 1, 30, 8, seed=1), drawn(1, 1, 30, 8, seed=2)
    asked, held = (torch.arange(n).remainder(kinds).reshape(1, 1, n, 1) for n, kinds in ((9, 4), (30, 3)))
    codes = asked.expand(1, 2, 9, 1), held
    bias = torch.zeros(1, 1, 1, 30, dtype=torch.float64)
    bias[..., ::2] = -torch.inf
    bias[..., held.flatten() == 1] = -torch.inf  # nothing is left in that bucket
    out = bucket_attention(q, k, v, *codes, scale=SCALE, bias=bias)
    assert (out - masked(q, k, v, *codes, bias)).abs().max() < 1e-12
    seen = out.abs().sum(-1) > 0
    assert bool((seen == ((asked == 0) | (asked == 2))[..., 0]).all())
