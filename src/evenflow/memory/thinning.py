"""A fold that thins what is old: after every clip some of the older tokens stay, chosen by attention and by spread.

Source: Vision Sink Bucketing of LiveVLM, arXiv 2505.15269 v2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .arena import standing
from .coverage import buckets, spread_best
from .verbs import Fold
from .view import EMPTY, FAR, View

if TYPE_CHECKING:
    from .layout import Geometry


@dataclass(frozen=True)
class Thinned(Fold):
    """After a clip, what is older than `recent` tokens is thinned to `keep`, by the attention of the newest queries.

    clip: tokens; thinning happens at the end of a step that reaches a multiple of it. share: how much of `keep` is for
    coverage. capacity: tokens of a bucket. observe: how many queries look, all of them among the recent. by_time: buckets
    are stretches of the stream, not of what is held. packed: positions are places in the cache. All heads choose together,
    unless something else lets them hold different tokens.
    """

    keep: int
    recent: int
    clip: int
    share: float = 0.5
    capacity: int = 1
    observe: int = 1
    by_time: bool = False
    packed: bool = True
    content: ClassVar[bool] = True

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("keep", "recent", "clip", "capacity", "observe")}
        if min(counts.values()) < 1 or self.capacity > self.keep or self.observe > self.recent:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"{said}: all are 1 or more, capacity at most keep, and observe at most recent")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it is the part of what is kept that is spread, from 0 to 1")

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        g = geometry
        return {"asked": torch.zeros(g.batch, g.heads, self.observe, g.head_dim, dtype=g.dtype, device=g.device)}

    def arrive(self, view: View) -> None:
        assert view.query is not None
        after = (view.consumed + view.coming)[:, None]
        valid = torch.cat([self._column(view) >= self.observe - view.consumed[:, None], view.real], 1)
        newest = valid.to(torch.uint8).argsort(dim=1, stable=True)[:, -self.observe :]
        newest = newest.expand(view.batch, -1)[:, None, :, None]
        queries = torch.cat([view.mine["asked"], view.query], 2)
        view.mine["asked"] = queries.gather(2, newest.expand(-1, queries.shape[1], -1, queries.shape[3]))

        index = view.index.expand(-1, view.apart, -1)
        old = (index >= view.sink) & (index < after[..., None] - self.recent) & ~view.pinned
        due = (after // self.clip > view.consumed[:, None] // self.clip)[..., None]
        old = old & due & (old.sum(-1, keepdim=True) > self.keep)
        if bool(old.any()):
            gone = old & ~self.chosen(view, old, after[..., None])
            columns = view.column.expand(*gone.shape)
            view.write(columns, index=torch.where(gone, EMPTY, index))

    def _column(self, view: View) -> Tensor:
        return torch.arange(self.observe, device=view.index.device)

    def chosen(self, view: View, old: Tensor, after: Tensor) -> Tensor:
        """Bool [B, G, n]: which of `old` stay."""
        index = view.index.expand(-1, view.apart, -1)
        order = torch.where(old, index, FAR).argsort(-1)
        there = old.gather(-1, order)
        if self.by_time:
            places, length = index.gather(-1, order) - view.sink + 1, after[..., 0] - self.recent - view.sink
        else:
            places, length = there.cumsum(-1), there.sum(-1)
        bucket = buckets(places, length, self.keep // self.capacity) * there
        scores = self.scores(view, after).gather(-1, order.expand(view.batch, -1, -1))
        kept = spread_best(
            scores, bucket, there, keep=self.keep, top=self.keep - math.floor(self.share * self.keep + 1e-9),
            capacity=self.capacity,
        )  # fmt: skip
        return torch.zeros_like(kept).scatter(-1, order.expand_as(kept), kept)

    def scores(self, view: View, after: Tensor) -> Tensor:
        """Mean attention of the last `observe` queries to every column, over queries and heads: [B, G, n].

        Of observers that are not held themselves nobody knows where they stand: they have no say.
        """
        g, asked = view.geometry, view.mine["asked"]
        groups, apart = g.heads // g.kv_heads, view.apart
        index = view.index.expand(-1, apart, -1)
        places = (view.rank() if self.packed else view.index).expand_as(index)
        stream = after - self.observe + self._column(view)  # [R, 1, observe]
        same = index[..., None] == stream[:, :, None]  # [R, G, n, observe]
        at, there = same.to(torch.uint8).argmax(2), same.any(2)

        def each(x: Tensor) -> Tensor:
            """[R, G, …] for every query head, where heads differ."""
            return x.repeat_interleave(g.heads // apart, 1) if apart > 1 else x

        query = view.turned(asked, each(standing(view, at, places.gather(-1, at))))
        keys = view.turned(view.keys, places)
        grouped = query.unflatten(1, (-1, groups)).flatten(2, 3) @ keys.transpose(-1, -2)
        logits = grouped.unflatten(2, (groups, -1)).flatten(1, 2).to(torch.promote_types(g.dtype, torch.float32))
        seen = (index != EMPTY)[:, :, None] & (index[:, :, None] <= stream[..., None])
        logits.mul_(g.scale[view.layer]).masked_fill_(~each(seen), -torch.inf)
        there = each(there).to(logits.dtype)[..., None]
        mean = logits.softmax(-1).nan_to_num_().mul_(there).sum(2) / there.sum(2).clamp_min(1)
        return mean.unflatten(1, (apart, -1)).mean(2)
