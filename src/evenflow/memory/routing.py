"""What leaves goes where it was sent when it came: kept for ever, averaged into what is kept, or dropped.

Source: Stream-T1, arXiv 2605.04461, section on memory sinking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arena import gathered
from .evict import Oldest
from .verbs import Fold
from .view import EMPTY, FAR, FOLDED, View

if TYPE_CHECKING:
    from .layout import Memory

DROP, MERGE, APPEND = 0, 1, 2


@dataclass(frozen=True)
class Routed(Fold):
    """A chunk that leaves is dropped, averaged into the newest sink chunk, or becomes a sink chunk itself.

    Which of these its tokens tell by the tag `route`, given with the step that commits them: DROP (also where none is
    given), MERGE or APPEND. append: frames that may become sinks beside the first; when they are full, APPEND is MERGE.
    alpha: what a sink keeps of itself each time. A chunk is as long as the first sink. Keys are averaged un-rotated; a
    sink stands where its first tokens came from, and one that was appended is listed as these.
    """

    append: int
    alpha: float = 0.999

    def __post_init__(self) -> None:
        if isinstance(self.append, bool) or not isinstance(self.append, int) or self.append < 0:
            raise ValueError(f"append is {self.append!r}; it must be a whole number of frames, 0 or more")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it is the share that a sink keeps, from 0 to 1")

    def suits(self, memory: Memory) -> None:
        if memory.sink < 1 or self.append % memory.sink:
            raise ValueError(
                f"append is {self.append} and sink {memory.sink}; chunks as long as the first sink become sinks, so append "
                "must be a multiple of it"
            )
        if not isinstance(memory.evict, Oldest) or memory.inside != "both" or (memory.window or 0) % memory.sink:
            raise ValueError(
                "what is routed leaves chunk by chunk: take Oldest to evict, inside='both', and a window of whole chunks"
            )

    def slots(self, frame: int) -> int:
        return self.append * frame

    def leave(self, view: View, leaving: Tensor) -> None:
        most = int(leaving.sum(-1).max())
        if not most or "route" not in view.tags:
            return
        assert view.stored is not None  # as it came: keys of such a fold lie un-rotated
        size, slots = view.sink, view.stored[0].shape[2]
        if bool((leaving.sum(-1) % size != 0).any()):
            raise ValueError(
                f"{most} tokens leave at once, of which chunks of {size} cannot be made; bring {size // view.frame} frames "
                "a step, as many as the sink has"
            )
        order = torch.where(leaving, view.index, FAR)[..., :slots].argsort(-1)
        appended = (view.index[..., size : size + view.slots] != EMPTY).sum(-1, keepdim=True)
        within = torch.arange(size, device=order.device)
        for start in range(0, most, size):
            columns = order[..., start : start + size]
            there = gathered(leaving, columns)
            route = torch.where(there, gathered(view.tags["route"], columns), DROP)[..., :1]
            stays = (route == APPEND) & (appended < view.slots)
            merges = (route != DROP) & ~stays
            into = within + appended + torch.where(stays, size, 0)  # the next free chunk, or the newest: 0 is the first
            new = [self._mixed(x, into, columns, stays, merges) for x in view.stored]
            own, old = gathered(view.index, columns), self._listed(view, into, appended)
            tags = {
                name: torch.where(
                    stays.reshape(*stays.shape, *[1] * (tag.ndim - 3)), gathered(tag, columns), gathered(tag, into)
                )
                for name, tag in view.tags.items()
            }
            index = torch.where(stays, own, torch.where(merges & (appended == 0), FOLDED, old))
            view.write(into, *new, index=index, tags=tags)
            appended = appended + torch.where(stays, size, 0)

    def _mixed(self, x: Tensor, into: Tensor, columns: Tensor, stays: Tensor, merges: Tensor) -> Tensor:
        old, gone = gathered(x, into), gathered(x, columns)
        averaged = torch.where(merges[..., None], self.alpha * old + (1 - self.alpha) * gone, old)
        return torch.where(stays[..., None], gone, averaged)

    @staticmethod
    def _listed(view: View, into: Tensor, appended: Tensor) -> Tensor:
        """What the columns hold that nothing is appended to: the sink's own tokens, some of which may come in this step."""
        first = torch.where(into < (view.consumed + view.coming)[:, None, None], into, EMPTY)
        held = gathered(view.index, into)
        return torch.where((held == EMPTY) & (appended == 0), first, held)


def route(
    short: Sequence[float], long: Sequence[float], *, last: int = 9, short_above: float = 0.0, long_below: float = 0.2
) -> int:
    """Where the newest chunk is to go when it leaves: DROP, MERGE or APPEND.

    short: the reward of each chunk by itself, the newest last; long: of the video up to each. A chunk better than the
    mean of the `last` before it is worth keeping; if the video has lost more than `long_below` by it, something new has
    begun, which is kept apart. The first chunk is the sink itself. Rewards and thresholds are in the same units.
    """
    if len(short) != len(long) or not short:
        raise ValueError(f"{len(short)} short and {len(long)} long rewards; give one of each for every chunk so far")
    if len(short) == 1 or short[-1] - mean(short[-1 - last : -1]) <= short_above:
        return DROP
    return APPEND if long[-2] - long[-1] > long_below else MERGE
