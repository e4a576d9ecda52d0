"""A fold that merges near-duplicates: what goes on from frame to frame is one key that counts for more.

Source: TempCache, arXiv 2602.01801, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from .arena import columns_of, gathered
from .verbs import Fold
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry


@dataclass(frozen=True)
class Merged(Fold):
    """A token whose key is like that of its match in the frame before becomes one with it.

    tau: the cosine above which they are one. match: the key that scores highest with the token's query, or with its own
    key. The slot of the newest token stays, with its place in time and picture, the mean value of all and log m as weight;
    representative: whose key it has. The match is found, head by head, by un-rotated vectors, among what the frame before
    held beside the sinks: the exact nearest one.
    """

    tau: float
    match: Literal["query", "key"] = "query"
    representative: Literal["last", "mean", "first"] = "last"
    content: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in (("match", ("query", "key")), ("representative", ("last", "mean", "first"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(geometry.batch, geometry.kv_heads, 0, dtype=torch.int64)}

    def arrive(self, view: View) -> None:
        count = pad(view.mine["count"], (0, view.index.shape[-1] - view.mine["count"].shape[-1]))
        count = torch.where(view.fresh, 1, count)
        for start in range(0, view.m, view.frame):
            count = self.merged(view, slice(start, start + view.frame), count)
        view.mine["count"] = count

    def merged(self, view: View, part: slice, count: Tensor) -> Tensor:
        """Merge one fresh frame into what was held of the frame before; the members of each slot, int64 [B, H_kv, n]."""
        index, stream = view.index.expand_as(count), view.stream[:, part]
        old, there = columns_of(index, stream - view.frame)
        new, came = columns_of(index, stream)
        there, came = (found & (at >= view.sink + view.slots) for found, at in ((there, old), (came, new)))
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

        written = keys
        if self.representative == "mean":
            written = averaged(keys, before)
        elif self.representative == "first":
            written = torch.where(stays[..., None], match, keys)
        members = torch.where(stays, total.gather(-1, best), count.gather(-1, new))
        freed = torch.zeros_like(count).scatter_add(-1, old, (there & (newest >= 0)).long())
        freed = freed.scatter_add(-1, new, (joins & ~stays).long()) > 0
        # A token that was turned away points at a slot of another: it writes there what that one gets.
        owner = torch.full_like(count, -1).scatter_reduce(-1, new, torch.where(came, place, -1), "amax").gather(-1, new)
        owner = torch.where(owner < 0, place, owner)
        count = count.scatter(-1, new, members.gather(-1, owner))
        changed = None if self.representative == "last" else gathered(written, owner)
        view.write(new, changed, gathered(averaged(values, mean), owner), index=EMPTY)
        everywhere = torch.arange(count.shape[-1], device=count.device).expand_as(count)
        weight = torch.where(freed, 1, count).clamp_min(1).to(wide).log()
        view.write(everywhere, index=torch.where(freed, EMPTY, index), weight=weight)
        return count
