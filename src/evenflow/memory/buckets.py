"""Attention within buckets: a query attends exactly the keys that share a bucket with it in one of several tables.

Table by table, keys are sorted by their code: what the queries of a bucket may see is then one run of keys, and only
these products are computed. A key met in several tables counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sparse import check_bias

SLAB = {"cpu": 2**17}  # scores computed at once: what a core's cache holds
LARGE = 2**26  # on other devices
NO_KEY, NO_QUERY = -1, -2  # codes of what is not there; they meet nothing
NOWHERE = -1e30  # the largest score of a query that met no key


def shared_products(query_codes: Tensor, key_codes: Tensor) -> Tensor:
    """Sum over buckets of |queries| · |keys|, what exact attention within them costs: int64, codes [..., m], [..., n]."""
    order = key_codes.sort(-1).values.contiguous()
    wanted = query_codes.contiguous()
    count = torch.searchsorted(order, wanted, right=True) - torch.searchsorted(order, wanted)
    return torch.where(query_codes >= 0, count, 0).sum()


@dataclass(eq=False)
class _Table:
    """One table. order: int64 [key rows, n], sorts keys by code. start, stop: int64 [rows, m], the run of sorted keys
    that shares a query's bucket. held, asked: float [key rows, n] and [rows, m], equal where keys and queries meet."""

    order: Tensor
    start: Tensor
    stop: Tensor
    held: Tensor
    asked: Tensor

    @classmethod
    def of(cls, asked: Tensor, held: Tensor, key_row: Tensor, dtype: torch.dtype) -> _Table:
        """From codes of queries [rows, m] and of keys [key rows, n]."""
        asked, held = torch.where(asked < 0, NO_QUERY, asked), torch.where(held < 0, NO_KEY, held)
        ordered, order = held.sort(-1)
        bucket = torch.searchsorted(ordered, held)  # codes may be too large for a float, places are not
        ordered = ordered[key_row]
        start, stop = (torch.searchsorted(ordered, asked, right=right) for right in (False, True))
        return cls(order, start, stop, bucket.to(dtype), torch.where(stop > start, start, -1).to(dtype))


@dataclass(eq=False)
class _Sums:
    """What is summed for each query: largest score so far [count], sum of weights, weighted values [count, D_v]."""

    most: Tensor
    weight: Tensor
    value: Tensor

    @classmethod
    def empty(cls, count: int, dim: int, like: Tensor) -> _Sums:
        """Nothing yet."""
        return cls(like.new_full((count,), NOWHERE), like.new_zeros(count), like.new_zeros(count, dim))

    def add(self, other: _Sums) -> None:
        """Take in what was summed over other keys."""
        peak = torch.maximum(self.most, other.most)
        mine, theirs = ((sums.most - peak).exp_() for sums in (self, other))
        self.weight = self.weight * mine + other.weight * theirs
        self.value.mul_(mine[:, None]).addcmul_(other.value, theirs[:, None])
        self.most = peak


def bucket_attention(
    query: Tensor, keys: Tensor, values: Tensor, query_codes: Tensor, key_codes: Tensor, *, scale: float,
    block: int = 128, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of each query over the keys that have its code in any table; zeros where there is none.

    query [B, H_q, m, D]; keys [B, H_kv, n, D]; values [B, H_kv, n, D_v]; codes int64 [B, H_q, m, tables] and
    [B, H_kv, n, tables], 0 or more, negative where there is nothing to attend; bias: one number a key, broadcastable to
    [B, H_q, 1, n]. Returns [B, H_q, m, D_v]. `block` queries of a bucket are taken at once.
    """
    check_bias(bias)
    batch, heads, m = query.shape[:3]
    kv_heads, n = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    row = torch.arange(batch * heads, device=query.device)
    key_row = row // heads * kv_heads + row % heads // (heads // kv_heads)
    q, k, v = (x.flatten(0, -2).to(wide) for x in (query, keys, values))
    cost = None if bias is None else bias[:, :, 0].expand(batch, heads, n).flatten().to(wide)
    sums, tables = _Sums.empty(len(q), values.shape[-1], q), list[_Table]()
    codes = (codes.flatten(0, 1).movedim(-1, 0).contiguous() for codes in (query_codes, key_codes))
    for asked, held in zip(*codes, strict=True):
        tables.append(_Table.of(asked, held, key_row, wide))
        sums.add(_brought(tables, q * scale, k, v, key_row, cost, min(block, m)))
    out = sums.value / sums.weight.clamp_min(torch.finfo(wide).tiny)[:, None]
    return out.reshape(batch, heads, m, -1).to(query.dtype)


@dataclass(eq=False)
class _Units:
    """Queries of one bucket, `block` of them at most, and the run of keys they share: one a column, alike ones together.

    row: which of [rows, m] they are in; query: where the first stands among sorted queries; count: how many; wide: that,
    rounded up; key: where the run begins among sorted keys; length: of the run. All int64 [units].
    """

    row: Tensor
    query: Tensor
    count: Tensor
    wide: Tensor
    key: Tensor
    length: Tensor

    @classmethod
    def of(cls, table: _Table, block: int) -> tuple[_Units, Tensor]:
        """All of a table, and the order int64 [rows, m] that sorts queries by bucket."""
        (rows, m), n, device = table.start.shape, table.order.shape[1], table.order.device
        bucket, order = torch.where(table.stop > table.start, table.start, n).sort(-1)
        place = torch.arange(m, device=device).expand(rows, -1)
        begins = pad(bucket[:, 1:] != bucket[:, :-1], (1, 0), value=True)
        begins = (place - torch.where(begins, place, 0).cummax(-1).values) % block == 0
        size = (begins.flatten().cumsum(0) - 1).bincount()
        row, query = begins.nonzero().unbind(-1)
        key = bucket[row, query]
        length = table.stop[row, order[row, query]] - key
        step = max(1, block // 4)
        wide = -(-size // step) * step
        alike = torch.where(key < n, wide * (n + 1) + length, 0).argsort(descending=True)
        alike = alike[: int((key < n).sum())]
        return cls(*(x[alike] for x in (row, query, size, wide, key, length))), order


def _brought(
    tables: list[_Table], q: Tensor, k: Tensor, v: Tensor, key_row: Tensor, cost: Tensor | None, block: int
) -> _Sums:
    """What the last of the tables brings that none before it has brought."""
    table, before = tables[-1], tables[:-1]
    (rows, m), n, dim = table.start.shape, table.order.shape[1], q.shape[1]
    units, order = _Units.of(table, block)
    first = torch.arange(rows, device=q.device)[:, None]  # of each row
    queries = pad((first * m + order).flatten(), (0, block))  # sorted by bucket, row by row
    keys = (first[: len(table.order)] * n + table.order).flatten()
    met = [(other.asked.flatten(), other.held.flatten()) for other in before]
    sums = _Sums.empty(rows * m + 1, v.shape[1], q)  # the last one takes what fills up units
    lengths, widths = units.length.tolist(), units.wide.tolist()
    alike = {width: unit + 1 for unit, width in enumerate(widths)}  # where the units of a width end
    slab, at = SLAB.get(q.device.type, LARGE), 0
    while at < len(lengths):
        width, longest = widths[at], lengths[at]
        part = slice(at, min(at + max(1, slab // (width * max(longest, dim))), alike[width]))
        at = part.stop
        along = torch.arange(max(width, longest), device=q.device)
        last = units.length[part, None] - 1  # what fills up a run repeats its last key, without weight
        seen = (key_row[units.row[part]] * n + units.key[part])[:, None] + along[:longest].minimum(last)
        seen = keys.index_select(0, seen.flatten())
        asks = queries[(units.row[part] * m + units.query[part])[:, None] + along[:width]].flatten()
        score = q.index_select(0, asks).view(-1, width, dim) @ k.index_select(0, seen).view(-1, longest, dim).mT
        if cost is not None:
            own = units.row[part, None] * n + seen.remainder(n).view(-1, longest)
            score = score + cost[own][:, None]
        peak = score.amax(-1, keepdim=True).clamp_min_(NOWHERE)
        score = score.sub_(peak).exp_()
        apart = None  # 0 for keys and queries that met before
        for asked, held in met:
            far = asked[asks].view(-1, width, 1) - held.index_select(0, seen).view(-1, 1, longest)
            apart = far.abs_() if apart is None else torch.minimum(apart, far.abs_(), out=apart)
        if apart is not None:
            score = score.mul_(apart.clamp_max_(1))
        if lengths[at - 1] < longest:
            score = score.mul_((along[:longest] <= last)[:, None])
        value = (score @ v.index_select(0, seen).view(-1, longest, v.shape[1])).flatten(0, 1)
        into = torch.where(along[:width] < units.count[part, None], asks.view(-1, width), rows * m).flatten()
        sums.most[into], sums.weight[into], sums.value[into] = peak.flatten(), score.sum(-1).flatten(), value
    return _Sums(sums.most[:-1], sums.weight[:-1], sums.value[:-1])
