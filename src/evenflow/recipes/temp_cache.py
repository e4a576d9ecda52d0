"""TempCache: what goes on from frame to frame is one key that counts for more; with AnnSA and AnnCA, which hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from ..memory import EMPTY, Absolute, AllHeld, Fold, Memory, Oldest, Recall, View
from ..memory.arena import gathered
from ..memory.buckets import bucket_attention
from ..memory.hashing import bucket_codes, hyperplanes
from ..memory.layout import Geometry
from ..memory.sparse import check_plain
from .registry import register


@dataclass(frozen=True)
class Continued(Fold):
    """A token whose key is like that of its match in the frame before becomes one with it (section 1).

    The slot of the newest token stays, with its place in time and picture, the mean value of all and log m as weight. It
    is found, head by head, by un-rotated vectors, among what the frame before held: the exact nearest one.
    """

    tau: float
    match: Literal["query", "key"]
    representative: Literal["last", "mean", "first"]
    content: ClassVar[bool] = True

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(geometry.batch, geometry.kv_heads, 0, dtype=torch.int64)}

    def arrive(self, view: View) -> None:
        count = pad(view.mine["count"], (0, view.index.shape[-1] - view.mine["count"].shape[-1]))
        count = torch.where(view.fresh, 1, count)
        for start in range(0, view.m, view.frame):
            count = self.continued(view, slice(start, start + view.frame), count)
        view.mine["count"] = count

    def continued(self, view: View, part: slice, count: Tensor) -> Tensor:
        """Merge one fresh frame into what was held of the frame before; the members of each slot, int64 [B, H_kv, n]."""
        index, stream = view.index.expand_as(count), view.stream[:, part]
        old, there = _columns(index, stream - view.frame)
        new, came = _columns(index, stream)
        keys, before = gathered(view.keys, new), gathered(view.keys, old)
        probe = keys
        if self.match == "query" and view.query is not None:
            probe = view.query[:, :, part].unflatten(1, (keys.shape[1], -1)).mean(2)
        scores = (probe @ before.transpose(-1, -2)).masked_fill(~there[:, :, None], -torch.inf)
        best = scores.argmax(-1)  # for each fresh token, which of the old ones
        wide = torch.promote_types(keys.dtype, torch.float32)
        keys, before = keys.to(wide), before.to(wide)
        match = gathered(before, best)
        joins = came & there.any(-1, keepdim=True) & (cosine_similarity(keys, match, dim=-1) > self.tau)
        if not joins.any():
            return count
        values, mean = gathered(view.values, new).to(wide), gathered(view.values, old).to(wide)
        place = torch.arange(view.frame, device=best.device).expand_as(best)
        newest = torch.full_like(best, -1).scatter_reduce(-1, best, torch.where(joins, place, -1), "amax")
        stays = joins & (newest.gather(-1, best) == place)
        had = count.gather(-1, old)
        total = had.scatter_add(-1, best, joins.long())

        def averaged(mine: Tensor, theirs: Tensor) -> Tensor:
            """Mean over all members of the group, for the fresh token that stands for it; itself for the others."""
            gone = torch.where(joins[..., None], mine, 0)
            whole = (had[..., None] * theirs).scatter_add(2, best[..., None].expand_as(mine), gone)
            return torch.where(stays[..., None], gathered(whole / total.clamp_min(1)[..., None], best), mine)

        written = None
        if self.representative == "mean":
            written = averaged(keys, before)
        elif self.representative == "first":
            written = torch.where(stays[..., None], match, keys)
        freed = torch.zeros_like(count).scatter_add(-1, old, (there & (newest >= 0)).long())
        freed = freed.scatter_add(-1, new, (joins & ~stays).long()) > 0
        count = count.scatter(-1, new, torch.where(stays, total.gather(-1, best), count.gather(-1, new)))
        view.write(new, written, averaged(values, mean), index=EMPTY)
        everywhere = torch.arange(count.shape[-1], device=count.device).expand_as(count)
        weight = torch.where(freed, 1, count).clamp_min(1).to(wide).log()
        view.write(everywhere, index=torch.where(freed, EMPTY, index), weight=weight)
        return count


def _columns(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where stream indices wanted [R, k] stand among index [B, G, n], and whether they do: both [B, G, k]."""
    ordered, order = index.sort(-1)
    wanted = wanted[:, None].expand(*index.shape[:2], -1).contiguous()
    at = torch.searchsorted(ordered, wanted).clamp_max(index.shape[-1] - 1)
    return order.gather(-1, at), ordered.gather(-1, at) == wanted


@dataclass(frozen=True)
class SameBucket(Recall):
    """A query attends what shares a bucket with it in any of the tables, and its own frame (AnnSA, section 3).

    sparse_layers: where; None: in every layer. Hashed are rotated queries and keys, as these are what is compared.
    """

    bits: int
    tables: int
    seed: int
    sparse_layers: tuple[int, ...] | None

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        if self.sparse_layers is not None and view.layer not in self.sparse_layers:
            return super().attend(view, query, keys, values, bias, scale)
        check_plain(view.geometry.softcap, view.null, "take bits=0")
        planes = hyperplanes(query.shape[-1], self.bits, tables=self.tables, seed=self.seed, like=query)
        frame = torch.where(view.fresh, view.index // view.frame, -1).expand(*keys.shape[:3])
        held = (view.index != EMPTY).expand(*keys.shape[:3])[..., None]
        own = (view.stream // view.frame)[:, None].expand(*query.shape[:3])
        asked = torch.cat([own[..., None], bucket_codes(query, planes)], -1)
        there = torch.cat([frame[..., None], bucket_codes(keys, planes).masked_fill(~held, -1)], -1)
        return bucket_attention(query, keys, values, asked, there, scale=scale, bias=bias)


def prompt_tokens(query: Tensor, keys: Tensor, *, bits: int = 8, tables: int = 4, seed: int = 0) -> Tensor:
    """AnnCA: which tokens of a prompt a frame's (or chunk's) cross-attention needs, bool [B, H_kv, n] (section 2).

    query [B, H_q, m, D] of the frame, keys [B, H_kv, n, D] of the prompt: those that share a bucket with any query of
    their head in any of the tables. With 0 bits all of them.
    """
    planes = hyperplanes(query.shape[-1], bits, tables=tables, seed=seed, like=query)
    asked = bucket_codes(query, planes).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H_kv, queries, tables]
    asked, there = (codes.transpose(-1, -2).contiguous() for codes in (asked, bucket_codes(keys, planes)))
    asked = asked.sort(-1).values
    at = torch.searchsorted(asked, there).clamp_max(asked.shape[-1] - 1)
    return (asked.gather(-1, at) == there).any(-2)


@register(
    "temp-cache",
    paper="Fast Autoregressive Video Diffusion and World Models with Temporal Cache Compression and Sparse Attention, "
    "ICML 2026, arXiv 2602.01801",
    claims=("temp-cache",),
)
def temp_cache(
    *, tau: float = 0.9, match: Literal["query", "key"] = "query",
    representative: Literal["last", "mean", "first"] = "last", bits: int = 0, tables: int = 4, seed: int = 0,
    sparse_layers: tuple[int, ...] | None = None, window: int | None = None, frame: int | None = None, chunk: int = 3,
) -> Memory:  # fmt: skip
    """Every frame for ever, but keys that go on from one frame to the next are one: the memory grows with new content.

    At the end of a committed chunk each token is compared with its match in the frame before, the key that scores highest
    with its query (or its own key: `match`): above cosine `tau` they become one token that counts for both. Its key is the
    newest (or their mean, or the first: `representative`; the medoid would need all members), its value their mean, and
    log m is added to its scores, which is exact where the keys are equal. tau above 1 keeps everything.

    bits, tables: AnnSA, a query attends what shares one of `tables` codes of `bits` bits with it, and its own frame; 0
    attends everything. The paper leaves the first 30 % of denoising steps dense, and 70 % of layers sparse: give
    `sparse_layers`. AnnCA is `prompt_tokens`. window: a hard bound, frames since a token was last continued (None: the
    paper's, which has none).

    No code is public. Not said in the paper, and chosen here: matching head by head, by un-rotated vectors, where one
    point's keys differ least (query heads that share a key head ask with their mean); a merged token takes the place of
    its newest member; the search in one frame is exact, where the paper's approximates. After `recache` tokens that were
    continued in the frames computed anew begin there.
    """
    for name, value, known in (
        ("match", match, ("query", "key")), ("representative", representative, ("last", "mean", "first")),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    return Memory(
        window=window, frame=frame, chunk=chunk, inside="both", evict=Oldest(), place=Absolute(),
        fold=Continued(tau, match, representative),
        recall=SameBucket(bits, tables, seed, sparse_layers) if bits else AllHeld(),
    )  # fmt: skip
