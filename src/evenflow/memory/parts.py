"""One softmax over keys that lie in several places, without copying them together.

Where every head has the same keys, only scores are put together (`attention_across`). Else every part gives its own
maximum, sum and weighted values, and these are joined (`attention_of_parts`): a part may be cut into pieces of one
length, each for one key head, so that a head with few keys does not wait for the one with most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Keys [B, H_kv, n, D] and values [B, H_kv, n, D_v]; or, with `head`, pieces of them, [N, n, D] and [N, n, D_v].

    head: int64 [N], for which key head of which row each piece is, row · H_kv + head. cost: is added to the scores,
    broadcastable to [B, H_kv, groups, m, n], or [N, groups, m, n]; there may be one number for several neighbours, n / k.
    """

    keys: Tensor
    values: Tensor
    cost: Tensor | None = None
    head: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """For queries [N, R]: the highest score, the sum of e^(score − highest), and the mean of values by these, [N, R, D_v].

    head: as in `Part`. Where a query sees nothing, the highest is −∞, and sum and mean are 0.
    """

    top: Tensor
    total: Tensor
    mean: Tensor
    head: Tensor | None


def attention_of_parts(
    query: Tensor, parts: Sequence[Part], scale: float, softcap: float | None = None, null: Tensor | None = None
) -> Tensor:
    """Softmax attention of query [B, H_q, m, D] over all parts, [B, H_q, m, D_v]; softcap, null as in `softmax_attention`.

    The first part is not in pieces. Every query sees something in some part.
    """
    batch, heads, m, _ = query.shape
    kv_heads, wide = parts[0].keys.shape[1], torch.promote_types(query.dtype, torch.float32)
    grouped, late = _grouped(query, kv_heads, scale)
    sums = [_summed(grouped, part, (kv_heads, m), late, softcap) for part in parts]
    if null is not None:
        top = null.to(wide).expand(batch, heads, m, 1).reshape(grouped.shape[:2])
        sums.append(Sum(top, torch.ones_like(top), torch.zeros_like(sums[0].mean), None))
    return _joined(sums).reshape(batch, heads, m, -1).to(query.dtype)


def attention_across(
    query: Tensor, parts: Sequence[tuple[Tensor, Tensor]], last: Tensor | None, scale: float, softcap: float | None,
    null: Tensor | None,
) -> Tensor:  # fmt: skip
    """Softmax attention of query [B, H_q, m, D] over keys [B, H_kv, n, D] and values [B, H_kv, n, D_v] of all parts.

    last: what is added to the scores of the last keys, [m, m]. softcap: as in `softmax_attention`. null: logit of a key
    without a value, [H_q]. Returns [B, H_q, m, D_v]. A decode step needs two products a part and one softmax, and
    nothing is asked of the device.
    """
    batch, heads, m, _ = query.shape
    kv_heads, wide = parts[0][0].shape[1], torch.promote_types(query.dtype, torch.float32)
    grouped, late = _grouped(query, kv_heads, scale)
    scores = torch.cat([torch.bmm(grouped, keys.flatten(0, 1).mT) for keys, _ in parts], -1)
    scores = _capped(scores, late, softcap).reshape(batch, heads, m, -1)
    if last is not None:
        scores[..., -last.shape[1] :] += last
    if null is not None:
        scores = torch.cat([scores, null.to(wide).reshape(1, -1, 1, 1).expand(batch, -1, m, 1)], -1)
    weights = torch.softmax(scores, -1).reshape(*grouped.shape[:2], -1)
    read, at = query.new_zeros(*grouped.shape[:2], parts[0][1].shape[-1], dtype=wide), 0
    for _, values in parts:
        n = values.shape[2]
        mine, values = weights[..., at : at + n], values.flatten(0, 1)
        if values.dtype == wide:
            read.baddbmm_(mine, values)  # the product is added as it is made: one call a part, not two
        else:
            read += torch.bmm(mine.to(values.dtype), values)
        at += n
    return read.reshape(batch, heads, m, -1).to(query.dtype)


def _grouped(query: Tensor, kv_heads: int, scale: float) -> tuple[Tensor, float | None]:
    """Queries by key head, [B · H_kv, groups · m, D], and what their scores are yet to be multiplied by."""
    # Half precision is scaled after the product, where nothing is rounded any more; else before, where it is smaller.
    late = scale if query.dtype.itemsize < 4 else None
    grouped = query * scale if late is None else query
    return grouped.reshape(query.shape[0] * kv_heads, -1, query.shape[-1]), late


def _capped(scores: Tensor, late: float | None, softcap: float | None) -> Tensor:
    scores = scores if late is None else scores.to(torch.float32) * late
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _summed(grouped: Tensor, part: Part, sizes: tuple[int, int], late: float | None, softcap: float | None) -> Sum:
    keys, values = part.keys, part.values
    if part.head is None:
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = grouped @ keys.transpose(-1, -2)
    else:
        scores = grouped.index_select(0, part.head) @ keys.transpose(-1, -2)  # [N, R, n]
    scores = _capped(scores, late, softcap)
    if part.cost is not None:
        kv_heads, m = sizes
        shaped = scores.unflatten(1, (-1, m))  # [N, groups, m, n]
        if part.head is None:
            shaped = shaped.unflatten(0, (-1, kv_heads))
        several = part.cost.shape[-1] not in (1, shaped.shape[-1])
        if several:
            shaped.unflatten(-1, (part.cost.shape[-1], -1)).add_(part.cost[..., None])
        else:
            shaped.add_(part.cost)
    top = scores.amax(-1)
    # Not by `exp`, which on a CPU is ten times slower where there are −∞ among its numbers.
    weights = torch.softmax(scores, -1)
    total, mean = 1 / weights.amax(-1), (weights.to(values.dtype) @ values).to(weights.dtype)
    nothing = top == -torch.inf
    if bool(nothing.any()):
        mean, total = mean.masked_fill(nothing[..., None], 0), total.masked_fill(nothing, 0)
    return Sum(top, total, mean, part.head)


def _joined(sums: Sequence[Sum]) -> Tensor:
    top = sums[0].top
    for one in sums[1:]:
        if one.head is None:
            top = torch.maximum(top, one.top)
        else:
            top = top.scatter_reduce(0, one.head[:, None].expand_as(one.top), one.top, "amax")
    total, read = torch.zeros_like(sums[0].total), torch.zeros_like(sums[0].mean)
    for one in sums:
        share = one.total * (one.top - (top if one.head is None else top.index_select(0, one.head))).exp()
        if one.head is None:
            total += share
            read += one.mean * share[..., None]
        else:
            total.index_add_(0, one.head, share)
            read.index_add_(0, one.head, one.mean * share[..., None])
    return read / total[..., None]
