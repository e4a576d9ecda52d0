"""An eviction by use: of what is old, the tokens that recent queries attend least leave.

Source: participative compression of Deep Forcing, arXiv 2512.05081.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .verbs import Evict
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory


@dataclass(frozen=True)
class LeastAttended(Evict):
    """When sinks and window would overflow, `capacity` frames stay: sinks, the last `recent`, and the most used.

    Used most are the tokens with the largest logits against the queries of the last `recent` frames, summed over
    heads, and over queries ("sum") or their maximum ("max"). Decided in each layer for itself, by all heads together,
    unless something else lets them hold different tokens. A chunk's own queries vote too; in a causal step they do not, as its first ones must not
    know the last. reuse: how often a token may be chosen; 0 is without a bound.
    """

    capacity: int
    recent: int
    fusion: Literal["sum", "max"] = "sum"
    reuse: int = 0
    content: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.recent < 1:
            raise ValueError(f"recent is {self.recent}; it must be 1 frame or more")
        if self.fusion not in ("sum", "max"):
            raise ValueError(f"fusion is {self.fusion!r}; it must be 'sum' or 'max'")
        if self.reuse < 0:
            raise ValueError(f"reuse is {self.reuse}; it must be 0 (no bound) or more")

    def suits(self, memory: Memory) -> None:
        if memory.window is None:
            raise ValueError("nothing leaves before sinks and window are full, so `LeastAttended` needs a window")
        if not memory.sink + self.recent <= self.capacity <= memory.sink + memory.window:
            raise ValueError(
                f"sink {memory.sink} + recent {self.recent} frames must fit into capacity {self.capacity}, and that into "
                f"sink and window, {memory.sink + memory.window}"
            )

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        batch, count = geometry.batch, self.recent * frame
        axes = max(0 if rope is None else rope.coordinates for rope in geometry.rope)
        return {
            "queries": torch.zeros(batch, geometry.heads, count, geometry.head_dim, dtype=geometry.dtype),
            "coordinates": torch.zeros(batch, count, axes, dtype=torch.int64),
            "used": torch.zeros(batch, geometry.kv_heads, 0, dtype=torch.int64),
        }

    def arrive(self, view: View) -> None:
        view.mine["queries"], view.mine["coordinates"] = self.voters(view)
        used = view.mine["used"]
        used = pad(used, (0, view.index.shape[-1] - used.shape[-1]))
        view.mine["used"] = torch.where(view.fresh, 0, used)

    def voters(self, view: View) -> tuple[Tensor, Tensor]:
        """The queries of the last frames, un-rotated [B, H_q, r, D], and their coordinates [B, r, axes]."""
        old, places = view.mine["queries"], view.mine["coordinates"]
        assert view.query is not None
        batch, count, axes = places.shape
        given = view.fresh_tags.get("coordinates")
        fresh = places.new_zeros(batch, view.m, axes) if given is None else given[..., :axes].expand(batch, -1, -1)
        real = view.stream.diff(append=(view.consumed + view.coming)[:, None]) > 0  # padding stands where the next does
        order = pad(real, (count, 0), value=True).to(torch.uint8).argsort(dim=-1, stable=True)[:, -count:]
        order = order.expand(batch, -1)
        every = torch.cat([old, view.query], 2)
        return (
            every.gather(2, order[:, None, :, None].expand(-1, every.shape[1], -1, every.shape[3])),
            torch.cat([places, fresh], 1).gather(1, order[..., None].expand(-1, -1, axes)),
        )

    def scores(self, view: View) -> Tensor:
        """How much recent queries would use each column, [B, G, n]: up to a factor, the sum of logits."""
        if view.causal:
            queries, coordinates, end = view.mine["queries"], view.mine["coordinates"], view.consumed
        else:
            (queries, coordinates), end = self.voters(view), view.consumed + view.coming
        count, apart = queries.shape[2], view.apart > 1
        times = (end[:, None] - count + torch.arange(count, device=end.device)) // view.frame
        times = times.expand(len(coordinates), -1)[..., None]
        where = torch.cat([times, coordinates], -1) if coordinates.shape[-1] else times[..., 0]
        turned = view.turned(queries, where[:, None])
        keys = view.turned(view.keys, view.index // view.frame)
        wide = torch.promote_types(keys.dtype, torch.float32)
        turned, keys = turned.to(wide).unflatten(1, (keys.shape[1], -1)).sum(2), keys.to(wide)
        if self.fusion == "sum":
            products = turned.sum(2)[:, :, None] * keys
            return products.sum(3) if apart else products.sum((1, 3))[:, None]
        if apart:
            return (turned @ keys.transpose(-1, -2)).amax(2)
        return torch.einsum("bhrd,bhnd->brn", turned, keys).amax(1, keepdim=True)

    def keep(self, view: View) -> Tensor | None:
        assert view.window is not None
        frame, there = view.frame, view.index != EMPTY
        full = there.sum(-1, keepdim=True) > view.sink + view.slots + view.window
        full = full & (view.coming > 0)[:, None, None]
        if not bool(full.any()):
            return None
        last = torch.maximum(view.coming, torch.full_like(view.coming, self.recent * frame))[:, None, None]
        stays = view.pinned | (view.index >= (view.consumed + view.coming)[:, None, None] - last)
        width = view.index.shape[-1] - view.m
        before = view.mine["used"]
        used = pad(before[:, : view.apart], (0, width - before.shape[-1]))
        free = there & ~stays
        if self.reuse:
            free = free & pad(used < self.reuse, (0, view.m))
        phi = self.scores(view).masked_fill(~free, -torch.inf)
        rank = phi.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        room = (self.capacity * frame - view.sink - last).clamp_min(0)
        chosen = free & (rank < room)
        used = torch.where(full, (used + 1) * chosen[..., :width], used)
        view.mine["used"] = used.expand(-1, before.shape[1], -1)
        return ~full | chosen | stays

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return sink + slots + max(window or 0, m)
