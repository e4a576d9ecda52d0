"""Rolling Forcing: finished blocks behind a window of blocks in flight, and the first block always just before them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import Memory, Oldest, Place, Places, Recall, View
from .registry import register


@dataclass(frozen=True)
class AnchorAndWorking(Recall):
    """A joint call sees sinks, the newest held frames and itself, `budget` frames together; a clean pass the last ones."""

    budget: int

    def among(self, view: View) -> Tensor | None:
        budget, end = self.budget * view.frame, view.consumed + view.coming
        if view.m > budget:
            raise ValueError(
                f"a call brings {view.m // view.frame} frames, more than the {self.budget} that it may attend"
            )
        if view.commit:
            return view.index >= (end - budget)[:, None, None]
        working = (budget - view.sink - view.coming).clamp_min(0)
        return (view.column < view.sink) | (view.index >= (view.consumed - working)[:, None, None])


@dataclass(frozen=True)
class Rejoined(Place):
    """Fresh frames at their time in the stream, and what else is seen directly before them, without a gap."""

    def positions(self, view: View) -> Places:
        first = view.consumed[:, None, None] - view.held.sum(-1, keepdim=True)
        keys = torch.where(view.held, first + view.rank(), view.index)
        return Places(keys // view.frame, view.stream // view.frame)


@register(
    "rolling-forcing",
    paper="Rolling Forcing: Autoregressive Long Video Diffusion in Real Time, ICLR 2026, arXiv 2509.25161",
    claims=("rolling-forcing",),
)
def rolling_forcing(*, anchor: int = 3, budget: int = 21, chunk: int = 3, frame: int | None = None) -> Memory:
    """The first `anchor` frames and the last `budget` ones that are finished; a call attends `budget` frames of them.

    Two kinds of calls (section on the rolling window): the joint call of all blocks in flight, 15 frames, is a step with
    commit=False and sees the anchor, the newest finished frames (3 in steady state, more where the window is shorter)
    and itself both ways. The clean pass of the block that is finished is the step that is kept; it sees the last
    `budget` frames, its own among them, without the anchor as soon as those no longer reach back to it. Frames stand at
    their times, the anchor of a joint call directly before the finished frames that it sees: so its distance to the
    window does not change with the length of the stream. Before anything is kept there is no cache, and the windows of
    the start see themselves alone.

    The official cache has 24 frames; here, too: anchor + budget. Its clean passes of the first block while that is
    still in flight are overwritten later; leave them out, or take commit=False. The noise ladder, which blocks are in
    flight and their training are no matter of memory.
    """
    if anchor < 1:
        raise ValueError(f"anchor is {anchor}; it must be 1 frame or more")
    if budget <= anchor:
        raise ValueError(f"budget is {budget}; it counts the {anchor} anchor frames, so it must be larger")
    return Memory(
        sink=anchor, window=budget, evict=Oldest(with_fresh=True), recall=AnchorAndWorking(budget), place=Rejoined(),
        frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
