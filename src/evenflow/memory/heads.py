"""An eviction with a budget for each kind of head.

Source: Forcing-KV, arXiv 2605.09681.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .arena import columns_of, gathered, standing
from .verbs import Evict
from .view import View

if TYPE_CHECKING:
    from .layout import Geometry, Memory

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ByHeadGroup(Evict):
    """Static heads keep the last frames, dynamic ones also the segments least like the same segment a frame later.

    static: by layer, the key heads that are static; all others are dynamic, but in layer 0, which only has the last frames.
    recent, static_recent: how many of these, before the fresh ones; segments: into how many a frame is cut. After every
    chunk of C frames, the C frames before the `recent` last are candidates; of the least similar segments as many stay as
    fill what the window has beside the last frames, in place of those that stayed before. They are chosen in the first
    layer that has dynamic heads, for each row; all later layers follow. start: the last chunk before heads differ.
    """

    static: Heads = ()
    recent: int = 1
    static_recent: int = 1
    segments: int = 1
    start: int = 1
    content: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    @property
    def last(self) -> int:
        """Frames that stay whole, in the heads that keep most of them."""
        return max(self.recent, self.static_recent)

    def suits(self, memory: Memory) -> None:
        if memory.window is None or memory.window < self.last:
            raise ValueError(
                f"window is {memory.window}; it counts the {self.last} last frames, and what is kept beside them"
            )
        if memory.frame is not None:
            self._check(memory.frame)

    def serves(self, geometry: Geometry) -> None:
        most = max((head for heads in self.static for head in heads), default=-1)
        if most >= geometry.kv_heads:
            raise ValueError(f"static names key head {most}; there are {geometry.kv_heads}, counted from 0")

    def _check(self, frame: int) -> None:
        if frame % self.segments:
            raise ValueError(f"a frame of {frame} tokens cannot be cut into {self.segments} equal segments")

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return None if window is None else sink + slots + window + m

    def dynamic(self, view: View) -> Tensor:
        """Bool [H_kv]: the heads of this layer that are split off as dynamic."""
        alike = torch.ones(view.geometry.kv_heads, dtype=torch.bool, device=view.index.device)
        if view.layer == 0:
            return ~alike
        alike[list(self.static[view.layer]) if view.layer < len(self.static) else []] = False
        return alike

    def keep(self, view: View) -> Tensor:
        self._check(view.frame)
        stays = view.pinned | view.fresh
        if view.recache:
            return stays
        dynamic, now = self.dynamic(view), view.consumed[:, None, None]
        age = now // view.frame - view.index // view.frame  # 1 for the last frame
        split = (now >= (self.start + 1) * view.m) & (view.layer > 0)
        group = torch.where(dynamic, self.recent, self.static_recent)[:, None]
        stays = stays | (view.held & (age <= torch.where(split, group, self.last)))
        if not dynamic.any():
            return stays
        chosen = view.shared.get(ByHeadGroup)
        if chosen is None:
            chosen = view.shared[ByHeadGroup] = self.choose(view, dynamic)
        first = now - view.m - self.recent * view.frame  # stream index where the candidates begin
        segment = (view.index - first) // (view.frame // self.segments)
        inside = view.held & (segment >= 0) & (segment < chosen.shape[-1]) & dynamic[:, None]
        wanted = chosen[:, None].expand(-1, inside.shape[1], -1)
        return stays | (inside & wanted.gather(-1, segment.where(inside, 0).expand(len(wanted), -1, -1)))

    def choose(self, view: View, dynamic: Tensor) -> Tensor:
        """Bool [B, segments of all candidates]: which ones stay. None of a row whose chain of frames is not complete."""
        assert view.window is not None
        length = view.m + view.frame  # candidates and the frame after them
        first = view.consumed - view.m - self.recent * view.frame
        chain = first[:, None] + torch.arange(length, device=first.device)
        columns, found = columns_of(view.index.expand(view.batch, view.geometry.kv_heads, -1), chain)
        complete = (found | ~dynamic[:, None]).all(-1).all(-1) & (view.consumed >= (self.start + 2) * view.m)
        where = standing(view, columns, gathered(view.index // view.frame, columns))
        keys = view.turned(gathered(view.keys, columns), where)[:, dynamic]
        keys = keys if keys.dtype == torch.float64 else keys.float()
        joined = keys.movedim(1, 2).flatten(2).unflatten(1, (-1, view.frame))  # [B, frames, frame, heads · D]
        alike = torch.cosine_similarity(joined[:, :-1], joined[:, 1:], dim=-1)
        score = alike.unflatten(2, (self.segments, -1)).mean(-1).flatten(1)
        rank = score.argsort(dim=-1, stable=True).argsort(-1)
        room = (view.window // view.frame - self.last) * self.segments
        return (rank < room) & complete[:, None]
