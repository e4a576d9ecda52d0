"""Choosing tokens by score and by spread: some purely by score, the others from buckets of neighbours.

Top scores alone crowd together where attention is strong, near the end. Source: Vision Sink Bucketing, LiveVLM, arXiv
2505.15269 v2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def buckets(places: Tensor, length: Tensor, count: int) -> Tensor:
    """Which of `count` equal stretches of 1 … length each place lies in: ⌈p / (length / count)⌉, int64, from 1.

    places: int64 [..., n]; length: int64 [...].
    """
    length = length[..., None].clamp_min(1)
    return (places * count + length - 1) // length


def spread_best(
    scores: Tensor, bucket: Tensor, candidates: Tensor, *, keep: int, top: int, capacity: int = 1
) -> Tensor:
    """Bool [..., n]: `keep` of the candidates, the `top` best of all and then the best that find room in their bucket.

    scores: float [..., n]; bucket: int64 [..., n], from 0; candidates: bool [..., n]. The best `top` count in their
    buckets, and may overfill them; any other stays while its bucket holds fewer than `capacity`. Where that leaves
    less than `keep`, the best of the rest fill up; all stay where there are no more than `keep`. Of equal scores the
    earlier column wins. Raises ValueError for a `top` that is not from 0 to `keep`, or no capacity.
    """
    if not 0 <= top <= keep or capacity < 1:
        raise ValueError(f"top is {top}, keep {keep}, capacity {capacity}; 0 ≤ top ≤ keep and capacity ≥ 1 are needed")
    n = scores.shape[-1]
    scores, bucket, candidates = torch.broadcast_tensors(scores, bucket, candidates)
    by_score = scores.masked_fill(~candidates, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = by_score.argsort(-1)
    first = rank < top
    # Sorted by bucket and then by score, a token's distance from where its bucket begins is its place in it.
    grouped = torch.where(candidates, bucket, bucket.amax(-1, keepdim=True) + 1) * n + rank
    order = grouped.argsort(-1)
    inside = order.argsort(-1)
    sorted_bucket = grouped.gather(-1, order) // n
    column = torch.arange(n, device=scores.device).expand_as(order)
    begins = torch.ones_like(candidates)
    begins[..., 1:] = sorted_bucket[..., 1:] != sorted_bucket[..., :-1]
    start = torch.where(begins, column, 0).cummax(-1).values
    has_room = (column - start).gather(-1, inside) < capacity
    preference = torch.where(first, 0, torch.where(has_room, 1, 2)) + 3 * ~candidates
    return ((preference * n + rank).argsort(-1).argsort(-1) < keep) & candidates
