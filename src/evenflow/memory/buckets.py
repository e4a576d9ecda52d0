"""Attention within buckets: a query attends exactly the keys that share a bucket with it in one of several tables.

Queries and keys are sorted by their code, table by table, and cut into blocks: what a block of queries may see is then
one run of key blocks, and only these products are computed. A key met in several tables counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sparse import check_bias

SLAB = {"cpu": 2**18}  # scores computed at once: what a core's cache holds
LARGE = 2**26  # on other devices
NO_KEY, NO_QUERY = -1, -2  # codes of what is not there; they meet nothing


def shared_products(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Sum over buckets of |queries| · |keys|, what exact attention within them costs: int64, codes [..., m], [..., n]."""
    order = key_codes.sort(-1).values.contiguous()
    wanted = query_codes.contiguous()
    count = torch.searchsorted(order, wanted, right=True) - torch.searchsorted(order, wanted)
    return torch.where(query_codes >= 0, count, 0).sum()


@dataclass(eq=False)
class _Sums:
    """What is summed for each query [rows, m]: largest score so far, sum of weights, weighted values."""

    most: Tensor
    weight: Tensor
    value: Tensor


def bucket_attention(
    query: Tensor, keys: Tensor, values: Tensor, query_codes: Tensor, key_codes: Tensor, *, scale: float,
    block: int = 32, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of each query over the keys that have its code in any table; zeros where there is none.

    query [B, H_q, m, D]; keys [B, H_kv, n, D]; values [B, H_kv, n, D_v]; codes int64 [B, H_q, m, tables] and
    [B, H_kv, n, tables], 0 or more, negative where there is nothing to attend; bias: one number a key, broadcastable to
    [B, H_q, 1, n]. Returns [B, H_q, m, D_v].
    """
    check_bias(bias)
    batch, heads, m = query.shape[:3]
    kv_heads, n = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    row = torch.arange(batch * heads, device=query.device)
    key_row = row // heads * kv_heads + row % heads // (heads // kv_heads)
    q, k, v = (x.reshape(-1, *x.shape[2:]).to(wide) for x in (query, keys, values))
    q_codes, k_codes = (x.reshape(-1, *x.shape[2:]) for x in (query_codes, key_codes))
    k_codes = torch.where(k_codes < 0, NO_KEY, k_codes)
    q_codes = torch.where(q_codes < 0, NO_QUERY, q_codes)
    cost = None if bias is None else bias[:, :, 0].expand(batch, heads, n).reshape(-1, n).to(wide)
    sums = _Sums(q.new_full(q.shape[:2], -torch.inf), q.new_zeros(q.shape[:2]), q.new_zeros(*q.shape[:2], v.shape[-1]))
    for table in range(q_codes.shape[-1]):
        _add(sums, q * scale, k, v, q_codes[..., : table + 1], k_codes[..., : table + 1], key_row, cost, block)
    out = sums.value / sums.weight.clamp_min(torch.finfo(wide).tiny)[..., None]
    return out.reshape(batch, heads, m, -1).to(query.dtype)


def _add(
    sums: _Sums, q: Tensor, k: Tensor, v: Tensor, q_codes: Tensor, k_codes: Tensor, key_row: Tensor,
    cost: Tensor | None, block: int,
) -> None:  # fmt: skip
    """Add what the last of the tables brings that none before it has brought."""
    (rows, m, dim), n = q.shape, k.shape[1]
    q_order, k_order = q_codes[..., -1].argsort(dim=-1, stable=True), k_codes[..., -1].argsort(dim=-1, stable=True)
    q, q_codes = _sorted(q, q_order), _sorted(q_codes, q_order)
    k, v, k_codes = _sorted(k, k_order), _sorted(v, k_order), _sorted(k_codes, k_order)
    code = k_codes[..., -1][key_row].contiguous()
    short = -m % block
    lowest = pad(q_codes[..., -1], (0, short), value=NO_QUERY).unflatten(1, (-1, block))
    highest = lowest.amax(-1)
    lowest = torch.where(lowest < 0, highest[..., None].clamp_min(0), lowest).amin(-1)
    start = (
        torch.searchsorted(code, lowest) // block
    )  # first and behind the last of the key blocks, [rows, query blocks]
    stop = -(-torch.searchsorted(code, highest, right=True) // block)
    stop = torch.where(highest < 0, start, stop)
    count = (stop - start).clamp_min(0).flatten()
    pair_q = torch.repeat_interleave(torch.arange(len(count), device=q.device), count)
    pair_k = torch.arange(len(pair_q), device=q.device) - (count.cumsum(0) - count)[pair_q] + start.flatten()[pair_q]
    pair_row = pair_q // start.shape[1]
    blocks = -(-n // block)
    pair_key = key_row[pair_row] * blocks + pair_k  # of keys, that query heads share
    queries, asked = _cut(q, block, 0), _cut(q_codes, block, NO_QUERY)
    keys, values, held = _cut(k, block, 0), _cut(v, block, 0), _cut(k_codes, block, NO_KEY)
    costs = None if cost is None else _cut(cost.gather(1, k_order[key_row])[..., None], block, 0)[..., 0]
    most, weight = _cut(_sorted(sums.most, q_order), block, -torch.inf), _cut(_sorted(sums.weight, q_order), block, 0)
    value = _cut(_sorted(sums.value, q_order), block, 0)
    step = max(1, SLAB.get(q.device.type, LARGE) // (block * max(block, dim)))
    for at in range(0, len(pair_q), step):
        part = slice(at, at + step)
        mine, theirs = pair_q[part], pair_key[part]
        score = queries[mine] @ keys[theirs].transpose(1, 2)
        if costs is not None:
            score = score + costs[pair_row[part] * blocks + pair_k[part]][:, None]
        met = asked[mine][:, :, None] == held[theirs][:, None]
        new = met[..., -1] if met.shape[-1] == 1 else met[..., -1] & ~met[..., :-1].any(-1)
        score = score.masked_fill(~new, -torch.inf)
        first, last = int(mine[0]), int(mine[-1]) + 1
        old, local = most[first:last], mine - first
        peak = old.scatter_reduce(0, local[:, None].expand(-1, block), score.amax(-1), "amax")
        base = torch.where(peak > -torch.inf, peak, 0)
        shrink = (old - base).exp()
        score = (score - base[local][..., None]).exp()
        weight[first:last] = (weight[first:last] * shrink).index_add(0, local, score.sum(-1))
        value[first:last] = (value[first:last] * shrink[..., None]).index_add(0, local, score @ values[theirs])
        most[first:last] = peak
    for name, tensor in (("most", most), ("weight", weight), ("value", value)):
        whole = getattr(sums, name)
        back = tensor.reshape(rows, -1, *tensor.shape[2:])[:, :m]
        whole.scatter_(1, q_order if whole.ndim == 2 else q_order[..., None].expand_as(whole), back)


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    """x [rows, n, …] in that order [rows, n]."""
    return x.gather(1, order if x.ndim == 2 else order[..., None].expand_as(x))


def _cut(x: Tensor, block: int, fill: float) -> Tensor:
    """x [rows, n, …] as blocks [rows · blocks, block, …], filled up at the end of each row."""
    short = -x.shape[1] % block
    if short:
        x = pad(x, (*[0, 0] * (x.ndim - 2), 0, short), value=fill)
    return x.unflatten(1, (-1, block)).flatten(0, 1)
