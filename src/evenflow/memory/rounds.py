"""Streams of rounds, in which words outlive pictures: windows by modality, and positions without gaps on three axes.

Tokens say what they are by their tags: `modality` 0 for words to remember, 1 for vision, anything else for text that
belongs to its round; `segment` is the round, from 1, and 0 outside of rounds; `coordinates` (row, column) place vision
tokens. Source: StreamingVLM, arXiv 2510.09608, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .place import ending_together
from .verbs import Evict, Place, Places
from .view import EMPTY, FAR, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory

TEXT, VISION = 0, 1  # any other modality is a text that leaves with its round
BEHIND = FAR // 4  # more than any stream index


def rounds(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """Modality and round of each column, int64 [R, G, n], and the round being read, [R, 1, 1]."""
    zero = torch.zeros_like(view.index)
    kind, segment = (view.tags.get(tag, zero) for tag in ("modality", "segment"))
    begun = torch.where(view.fresh & (segment > 0), segment, BEHIND).amin((1, 2), keepdim=True)
    held = torch.where(view.held, segment, 0).amax((1, 2), keepdim=True)
    return kind, segment, torch.where(begun < BEHIND, torch.maximum(begun, held), held)


def remembered(view: View, text_round: int) -> Tensor:
    """Bool [R, G, n]: words of no round, and of rounds so old that they have moved into the text memory."""
    kind, segment, now = rounds(view)
    return view.held & (kind == TEXT) & ((segment <= 0) | (segment <= now - text_round))


@dataclass(frozen=True)
class RoundsByModality(Evict):
    """Pictures leave after `pictures` rounds, other things of a round after `text_round`, words from the middle.

    Words of rounds that old are remembered, up to the first `text_sink` and last `text_window` of them.
    """

    pictures: int
    text_round: int
    text_sink: int
    text_window: int

    def __post_init__(self) -> None:
        for name in ("pictures", "text_round", "text_sink", "text_window"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    def suits(self, memory: Memory) -> None:
        if memory.window is not None:
            raise ValueError(f"window is {memory.window}, but `RoundsByModality` has windows of its own; leave it None")

    def keep(self, view: View) -> Tensor:
        kind, segment, now = rounds(view)
        text = remembered(view, self.text_round)
        place = torch.where(text, view.index, BEHIND).argsort(-1).argsort(-1)
        kept = (place < self.text_sink) | (place >= text.sum(-1, keepdim=True) - self.text_window)
        age = torch.where(kind == VISION, self.pictures, self.text_round)
        return view.fresh | view.pinned | torch.where(text, kept, view.held & (segment > now - age))


@dataclass(frozen=True)
class TextFirst(Place):
    """Remembered words stand first, then everything in its order, on three axes and without gaps.

    A word is one further than what precedes it, on every axis. A picture's numbers are (slice · slice_step, row, column)
    from there on, and what follows it is one behind its largest number. A slice ends where rows and columns start again.
    text_round: how old a round's words are when they are remembered, as with `RoundsByModality`.
    """

    text_round: int
    slice_step: float = 1.0
    moves: ClassVar[bool] = True

    def serves(self, geometry: Geometry) -> None:
        axes = 1 + max(0 if rope is None else rope.coordinates for rope in geometry.rope)
        if axes > 3:
            raise ValueError(f"the rope has {axes} axes; `TextFirst` knows three, of time, rows and columns")
        if axes > 1 and (geometry.alibi is not None or any(reach is not None for reach in geometry.reach)):
            raise ValueError(
                "on several axes there is no distance that ALiBi, or a model's own window (reach), could use"
            )

    def positions(self, view: View) -> Places:
        kind, segment, _ = rounds(view)
        later = torch.where(remembered(view, self.text_round), 0, BEHIND)
        order = torch.where(view.index == EMPTY, 3 * BEHIND, view.index + later).argsort(-1)
        index, kind, segment = (x.expand_as(order).gather(-1, order) for x in (view.index, kind, segment))
        seen = kind == VISION
        grid = torch.zeros(*order.shape, 2, dtype=torch.int64, device=order.device)
        if "coordinates" in view.tags:
            given = view.tags["coordinates"][..., :2]
            at = order[..., None].expand(*order.shape, given.shape[-1])
            grid[..., : given.shape[-1]] = given.expand(*order.shape, -1).gather(2, at)

        def before(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x[..., :-1], (1, 0), value=-BEHIND)

        goes_on = seen & (before(kind) == VISION) & (before(segment) == segment) & (before(index) + 1 == index)
        raster = grid[..., 0] * 2**31 + grid[..., 1]
        slices = (goes_on & (raster <= before(raster))).cumsum(-1)
        slices = slices - torch.where(goes_on, 0, slices).cummax(-1).values
        shift = torch.cat([(slices * self.slice_step).long()[..., None], grid], -1) * seen[..., None]
        block = (~goes_on).cumsum(-1) - 1
        extent = torch.zeros_like(block).scatter_reduce(-1, block, shift.amax(-1) + 1, "amax")
        base = (extent.cumsum(-1) - extent).gather(-1, block)
        sorted_keys = base[..., None] + shift
        keys = torch.empty_like(sorted_keys).scatter(2, order[..., None].expand_as(shift), sorted_keys)
        rope = view.geometry.rope[view.layer]
        wanted = 1 + (rope.coordinates if rope is not None else 0)
        axes = [ending_together(axis, view) for axis in keys.unbind(-1)[:wanted]]
        if len(axes) == 1:
            return Places(axes[0], view.of_fresh(axes[0]))
        return Places(torch.stack(axes, -1), torch.stack([view.of_fresh(axis) for axis in axes], -1), coordinates=False)
