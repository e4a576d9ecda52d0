"""One softmax over keys that queries meet at different distances: scores of a few keys in channels of their own.

A key is rotated once, so every query of a step meets it at the distance that their two positions have. Sinks and memory
may have to be met at another one, and each query at its own. Then their keys leave the usual channels, and further
channels, in which all other keys are zero, make up their scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rope import Rotary

HALF = (torch.float16, torch.bfloat16)
Turn = tuple[Tensor, Tensor]


def score_channels(scores: Tensor, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Channels whose product is `scores` [B, H_q, m, n]: of queries [B, H_q, m, X], of keys [B, H_kv, n, X].

    One channel a key, in which the query holds the score itself; in half precision a second one holds what rounding lost.
    """
    queries = [scores.to(dtype)]
    if dtype in HALF:
        queries.append((scores - queries[0]).to(dtype))
    one = torch.eye(scores.shape[-1], dtype=dtype, device=scores.device).repeat(1, len(queries))
    return torch.cat(queries, -1), one.expand(len(scores), kv_heads, -1, -1)


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Where the first `count` keys are met.

    queries: cosine and sine of the queries that meet them elsewhere, [R, 1, m, D]. keys: of these keys then; None: as they
    lie. who: bool [R, 1, m, 1], which queries these are; None: all. near: cosine and sine of the keys for the others; None:
    as they are for all else.
    """

    count: int
    queries: Turn
    keys: Turn | None
    who: Tensor | None
    near: Turn | None

    def scores(self, rotary: Rotary, raw_query: Tensor, lying: Tensor, query: Tensor, keys: Tensor) -> Tensor:
        """Products of the queries with these keys, [B, H_q, m, count], in the dtype of rotations.

        raw_query [B, H_q, m, D] un-rotated, lying [B, H_kv, count, D] as they lie in the slots; query and keys as all else.
        """
        far = _scores(rotary.rotate(raw_query, *self.queries), self._far(rotary, lying), rotary.dtype)
        if self.who is None:
            return far
        near = keys[:, :, : self.count] if self.near is None else rotary.rotate(lying, *self.near)
        return torch.where(self.who, far, _scores(query, near, rotary.dtype))

    def met(
        self, rotary: Rotary, raw_query: Tensor, lying: Tensor, query: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values with channels for these scores.

        Values are as wide as keys then, because fused kernels want that: cut what comes out of them.
        """
        dim, kv_heads, dtype = keys.shape[-1], keys.shape[1], query.dtype
        if self.who is not None or self.count * (1 + (dtype in HALF)) <= dim:
            for_queries, for_keys = score_channels(self.scores(rotary, raw_query, lying, query, keys), kv_heads, dtype)
        else:
            for_queries, for_keys = rotary.rotate(raw_query, *self.queries), self._far(rotary, lying)
        wide = keys.new_zeros(*keys.shape[:3], dim + for_keys.shape[-1])
        wide[:, :, self.count :, :dim] = keys[:, :, self.count :]
        wide[:, :, : self.count, dim:] = for_keys
        padded = torch.nn.functional.pad(values, (0, max(0, wide.shape[-1] - values.shape[-1])))
        return torch.cat([query, for_queries], -1), wide, padded

    def bias(
        self, rotary: Rotary, raw_query: Tensor, lying: Tensor, query: Tensor, keys: Tensor, bias: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """What makes these scores of those that query and keys have, [B, H_q, m, n]: for few queries, no key is copied."""
        made = query.new_zeros(*query.shape[:3], keys.shape[2])
        own = _scores(query, keys[:, :, : self.count], rotary.dtype)
        made[..., : self.count] = (self.scores(rotary, raw_query, lying, query, keys) - own) * scale
        return made if bias is None else made + bias

    def _far(self, rotary: Rotary, lying: Tensor) -> Tensor:
        return lying if self.keys is None else rotary.rotate(lying, *self.keys)


def _scores(query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Products [B, H_q, m, n] of query heads with the key heads that they share."""
    grouped = query.to(dtype).reshape(len(keys), keys.shape[1], -1, keys.shape[-1])
    return (grouped @ keys.to(dtype).transpose(-1, -2)).reshape(*query.shape[:3], -1)
