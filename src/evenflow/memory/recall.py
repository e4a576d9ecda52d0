"""Answers to *recall*: what may a query see?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arena import gathered
from .buckets import bucket_attention
from .hashing import MOST_BITS, bucket_codes, hyperplanes
from .place import DistanceCeiling
from .sparse import check_plain, sparse_attention
from .verbs import Place, Recall
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory


@dataclass(frozen=True)
class AllHeld(Recall):
    """A query sees everything that is held, and the fresh tokens before it."""


class InBlocks(Recall):
    """What answers that attend in blocks of queries share: the queries of a block see alike."""

    @property
    def dense(self) -> bool:
        """Whether everything is attended after all."""
        return False

    def suits(self, memory: Memory) -> None:
        if memory.inside == "causal" and not self.dense:
            raise ValueError(
                f"{type(self).__name__} attends in blocks of queries that see alike; take inside='both' or another recall"
            )

    def serves(self, geometry: Geometry) -> None:
        own = geometry.alibi is not None or any(reach is not None for reach in geometry.reach)
        if own and not self.dense:
            raise ValueError(
                f"{type(self).__name__} attends in blocks of queries that see alike; a model with ALiBi or a window of its "
                "own (reach) needs another recall"
            )


@dataclass(frozen=True)
class BestBlocks(InBlocks):
    """Each block of `block` queries attends the best share `ratio` of key blocks, in the order sinks, memory, window.

    The best are those whose mean key has the largest product with the mean query, head by head; 1 is all of them. Source:
    the block-sparse part of Hybrid Forcing, arXiv 2604.10103.
    """

    ratio: float
    block: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.block < 1:
            raise ValueError(
                f"ratio is {self.ratio}, block {self.block}; keep a share from above 0 to 1, of blocks of 1 token or more"
            )

    @property
    def dense(self) -> bool:
        return self.ratio == 1

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        if self.dense:
            return super().attend(view, query, keys, values, bias, scale)
        check_plain(view.geometry.softcap, view.null, "take ratio=1")
        order = view.order().argsort(dim=-1, stable=True)
        order = order[0, 0] if order.shape[:2] == (1, 1) else order
        if bias is not None:
            apart = bias.shape[1] > 1 and order.ndim > 1 and order.shape[1] > 1
            theirs = order.repeat_interleave(bias.shape[1] // order.shape[1], 1) if apart else order
            bias = gathered(bias.transpose(2, 3), theirs).transpose(2, 3)
        keys, values = gathered(keys, order), gathered(values, order)
        return sparse_attention(query, keys, values, ratio=self.ratio, block=self.block, scale=scale, bias=bias)


@dataclass(frozen=True)
class SameBucket(InBlocks):
    """A query attends what shares a bucket with it in any of the tables, and its own frame.

    A bucket is a code of `bits` bits, from the hash of rotated queries and keys, as these are what is compared.
    sparse_layers: where; None: in every layer. Source: AnnSA of TempCache, arXiv 2602.01801, section 3.
    """

    bits: int
    tables: int = 4
    seed: int = 0
    sparse_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS or self.tables < 1:
            raise ValueError(
                f"bits is {self.bits}, tables {self.tables}; take 1 to {MOST_BITS} bits, and 1 table or more"
            )

    def suits(self, memory: Memory) -> None:
        super().suits(memory)
        if isinstance(memory.place, DistanceCeiling):
            raise ValueError(
                "keys that `DistanceCeiling` places anew for each query have no one hash; take another place"
            )

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        if self.sparse_layers is not None and view.layer not in self.sparse_layers:
            return super().attend(view, query, keys, values, bias, scale)
        check_plain(view.geometry.softcap, view.null, "take AllHeld")
        planes = hyperplanes(query.shape[-1], self.bits, tables=self.tables, seed=self.seed, like=query)
        frame = torch.where(view.fresh, view.index // view.frame, -1).expand(*keys.shape[:3])
        held = (view.index != EMPTY).expand(*keys.shape[:3])[..., None]
        own = (view.stream // view.frame)[:, None].expand(*query.shape[:3])
        asked = torch.cat([own[..., None], bucket_codes(query, planes)], -1)
        there = torch.cat([frame[..., None], bucket_codes(keys, planes).masked_fill(~held, -1)], -1)
        return bucket_attention(query, keys, values, asked, there, scale=scale, bias=bias)


@dataclass(frozen=True)
class Pages(Recall):
    """A question sees what is recent, and of what is older the pages whose mean un-rotated key it attends to most.

    recent: tokens that it sees anyway, beside sinks and memory. page: tokens in one. ratio: share of the older tokens that
    is read. answer_place: where it all stands then. All heads choose together, unless they hold different tokens. Source:
    LiveVLM, arXiv 2505.15269 v2.
    """

    recent: int
    page: int = 16
    ratio: float = 0.4
    answer_place: Place | None = None

    def __post_init__(self) -> None:
        if self.recent < 0 or self.page < 1 or not 0 <= self.ratio <= 1:
            raise ValueError(
                f"recent is {self.recent}, page {self.page}, ratio {self.ratio}; take 0 recent tokens or more, pages of 1 or "
                "more, and a share from 0 to 1"
            )

    def retrieve(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.query is not None
        g, order = view.geometry, view.order().argsort(-1)
        index = view.index.gather(-1, order).expand(view.batch, view.apart, -1)  # by stream index, nothing last
        keys, values = (gathered(x, order) for x in (view.keys, view.values))
        apart, kv_heads = index.shape[1], g.kv_heads
        old = (index >= view.sink) & (index < view.consumed[:, None, None] - self.recent)
        old = old & ~view.pinned[order]
        pages = -(-int(old.sum(-1).max()) // self.page)
        number = torch.where(old, (old.cumsum(-1) - 1) // self.page, pages)
        size = index.new_zeros(*index.shape[:2], pages + 1).scatter_add(-1, number, torch.ones_like(number))
        total = keys.new_zeros(*keys.shape[:2], pages + 1, keys.shape[3])
        spare = number.expand(-1, kv_heads, -1)[..., None].expand_as(keys)
        total, size = total.scatter_add(2, spare, keys)[:, :, :pages], size[..., :pages]
        means = (total / size.clamp_min(1)[..., None]).repeat_interleave(g.heads // kv_heads, 1)
        logits = (view.query @ means.transpose(-1, -2)).float() * g.scale[view.layer]
        logits = logits.unflatten(1, (apart, -1)).masked_fill((size == 0)[:, :, None, None], -torch.inf)
        scores = logits.softmax(-1).nan_to_num().mean((2, 3))  # [B, G, pages]

        best = scores.masked_fill(size == 0, -1).argsort(dim=-1, descending=True, stable=True)
        sizes = size.gather(-1, best)
        enough = self.ratio * size.sum(-1, keepdim=True) - 1e-9
        taken = torch.zeros_like(size, dtype=torch.bool).scatter(-1, best, sizes.cumsum(-1) - sizes < enough)
        kept = pad(taken, (0, 1), value=True).gather(-1, number) & (index != EMPTY)
        front = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(kept.sum(-1).max())]
        index = torch.where(kept, index, EMPTY).gather(-1, front)
        return gathered(keys, front), gathered(values, front), index
