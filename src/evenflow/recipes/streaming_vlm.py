"""StreamingVLM: first and recent words outlive the pictures, and what is left is numbered without gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import EMPTY, Evict, Memory, Place, Places, View
from .registry import register

TEXT, VISION = 0, 1  # any other modality is a text that leaves with its round
BEHIND = torch.iinfo(torch.int64).max // 4  # more than any stream index


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
    """Pictures leave after `window` rounds, other things of a round after `text_round`, words from the middle.

    Words of rounds that old are remembered, up to the first `text_sink` and last `text_window` of them.
    """

    window: int
    text_round: int
    text_sink: int
    text_window: int

    def keep(self, view: View) -> Tensor:
        kind, segment, now = rounds(view)
        text = remembered(view, self.text_round)
        place = torch.where(text, view.index, BEHIND).argsort(-1).argsort(-1)
        kept = (place < self.text_sink) | (place >= text.sum(-1, keepdim=True) - self.text_window)
        age = torch.where(kind == VISION, self.window, self.text_round)
        return view.fresh | torch.where(text, kept, view.held & (segment > now - age))


@dataclass(frozen=True)
class TextFirst(Place):
    """Remembered words stand first, then everything in its order, on three axes and without gaps.

    A word is one further than what precedes it, on every axis. A picture's numbers are (slice · slice_step, row, column)
    from there on, and what follows it is one behind its largest number.
    """

    text_round: int
    slice_step: float
    moves: ClassVar[bool] = True

    def positions(self, view: View) -> Places:
        kind, segment, _ = rounds(view)
        later = torch.where(remembered(view, self.text_round), 0, BEHIND)
        order = torch.where(view.index == EMPTY, 3 * BEHIND, view.index + later).argsort(-1)
        index, kind, segment = (x.expand_as(order).gather(-1, order) for x in (view.index, kind, segment))
        seen = kind == VISION
        grid = torch.zeros(*order.shape, 2, dtype=torch.int64, device=order.device)
        if "coordinates" in view.tags:
            grid[:] = view.tags["coordinates"].gather(2, order[..., None].expand_as(grid))

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
        axes = keys.unbind(-1)[: 1 + (rope.coordinates if rope is not None else 0)]
        if len(axes) == 1:
            return Places(axes[0], view.of_fresh(axes[0]))
        return Places(torch.stack(axes, -1), torch.stack([view.of_fresh(axis) for axis in axes], -1), coordinates=False)


@register(
    "streaming-vlm",
    paper="StreamingVLM: Real-Time Understanding for Infinite Video Streams, ICLR 2026, arXiv 2510.09608",
    claims=("streaming-vlm",),
)
def streaming_vlm(
    *, window: int = 16, text_round: int = 16, text_sink: int = 512, text_window: int = 512, slice_step: float = 1.0
) -> Memory:
    """Pictures of the last `window` rounds, and words: the first `text_sink` and the last `text_window` of old rounds.

    Tokens say what they are: `modality` 0 for words to remember (the text before the stream, the model's answers), 1
    for vision, anything else for text that belongs to its round (time stamps, questions, turn markers); `segment` is
    the round or second, from 1, and 0 outside of rounds; `coordinates` (row, column) place vision tokens, and a slice
    ends where they start again. slice_step: distance of slices in time (Qwen2.5-VL: tokens_per_second · 2 / fps).

    Before a round is read, pictures older than `window` rounds leave, answers older than `text_round` rounds move behind
    the older text, and what is too much there leaves from its middle (section 3.1). Keys are kept un-rotated, so moving
    changes a position and nothing else; positions are recomputed for what is left, and never exceed its length. The
    rule is per step: within one, tokens attend causally to all that was left before it. Text without tags is sinks and
    recent words at their positions in the cache.

    The official code finds turns by their marker tokens, whose numbers (4 of a header, one of an end) stand outside of
    its two budgets; and counts a newline, so that 511 recent words survive. Here a budget is the number of words. A
    standing instruction belongs in segment 0: in a round it leaves with it.
    """
    return Memory(
        evict=RoundsByModality(window, text_round, text_sink, text_window),
        place=TextFirst(text_round, slice_step),
    )
