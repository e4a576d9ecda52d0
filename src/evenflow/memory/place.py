"""Answers to *place*: which positions do held tokens get?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .verbs import Place, Places
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory


@dataclass(frozen=True)
class Contiguous(Place):
    """Positions are indices in the cache: sinks trail the window without a gap (StreamingLLM, section 3.2)."""

    packed = True

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position) if capacity is None else (position - capacity).clamp_min(0)

    def positions(self, view: View) -> Places:
        rank = ending_together(view.rank(), view)
        queries, lost = view.of_fresh(rank), view.lost()
        # Behind a gap that opens within a step the sinks come nearer, as if its tokens had come one by one.
        keys, pinned = rank // view.frame, view.sink + view.slots
        if lost is None or not pinned:
            return Places(keys, queries // view.frame)
        return Places(keys, queries // view.frame, (queries - lost) // view.frame, keys[..., :pinned])


@dataclass(frozen=True)
class Absolute(Place):
    """Positions are stream indices: sinks stay at the start, ever further from the window."""

    moves: ClassVar[bool] = False

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position)

    def positions(self, view: View) -> Places:
        return Places(view.origin // view.frame, view.stream // view.frame)


@dataclass(frozen=True)
class Timeless(Place):
    """No token has a place in time; rows and columns (`coordinates`) stay as they came."""

    moves: ClassVar[bool] = False

    def positions(self, view: View) -> Places:
        return Places(torch.zeros_like(view.index), torch.zeros_like(view.stream))


@dataclass(frozen=True)
class Clipped(Place):
    """Sinks stand at the start; window and queries at their own time, until that would pass `horizon` frames.

    From there on window and queries stay where they are. Source: Hybrid Forcing, arXiv 2604.10103.
    """

    horizon: int

    def positions(self, view: View) -> Places:
        back = shift(view, self.horizon)
        keys = torch.where(view.pinned, view.origin, view.origin - back[:, None])
        return Places(keys // view.frame, (view.stream - back) // view.frame)


@dataclass(frozen=True)
class Regions(Place):
    """Sinks from 0, memory from `second` on, and a window that ends at `trained` − 1 once the stream is as long.

    blocks: into how many equal parts the memory is divided, each of which begins at `second`. Counted in frames. Source:
    Anchor Forcing, arXiv 2603.13405, section on tri-region RoPE.
    """

    trained: int
    second: int
    blocks: int = 1

    def suits(self, memory: Memory) -> None:
        if not memory.sink <= self.second <= self.trained:
            raise ValueError(
                f"second is {self.second}, trained {self.trained}; the memory stands behind {memory.sink} sink frames, and "
                "before the end of the trained ones"
            )

    def positions(self, view: View) -> Places:
        frame, end = view.frame, view.sink + view.slots
        gone = ((view.consumed + view.m) // frame - self.trained).clamp_min(0)
        within = (view.column - view.sink) % max(view.slots // self.blocks, 1) // frame
        head = torch.where(view.column < view.sink, view.column // frame, self.second + within)
        keys = torch.where(view.column < end, head, view.index // frame - gone[:, None, None])
        return Places(keys, view.stream // frame - gone[:, None])


@dataclass(frozen=True)
class Realigned(Place):
    """Frames stand at their times; sinks directly before the others when tokens have left, and there until more leave.

    Remembered is by how many frames the first sink is behind the next fresh frame, in each head that holds others. Source:
    Deep Forcing, arXiv 2512.05081, section on the deep sink.
    """

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"behind": torch.zeros(geometry.batch, geometry.kv_heads, dtype=torch.int64)}

    def positions(self, view: View) -> Places:
        frame, now = view.frame, (view.consumed // view.frame)[:, None]
        held = (view.index[..., view.sink :] != EMPTY).sum(-1) // frame
        before = view.mine["behind"]
        behind = torch.where(view.left[:, None], held + view.sink // frame, before[:, : held.shape[1]])
        view.mine["behind"] = (behind + (view.coming // frame)[:, None]).expand_as(before)
        keys = torch.where(
            view.column < view.sink, view.column // frame + (now - behind)[..., None], view.origin // frame
        )
        return Places(keys, view.stream // frame)


@dataclass(frozen=True)
class DistanceCeiling(Place):
    """Stream positions, but once the window has overflowed every sink is at the constant distance local − 1.

    local: frames of the window, the query's own among them (tokens where a frame is one). From that position on a query
    meets all sinks there, whatever they and the window are. packed: positions are places in the cache, and a query sees no
    further back in it than local − 1: what a window of that size would give over all that is held. Source: LM-Infinite,
    arXiv 2308.16137, section 3; InfLLM, arXiv 2402.04617; ReKV, arXiv 2503.00540, section 2.
    """

    moves: ClassVar[bool] = False
    local: int
    packed: bool = False

    def __post_init__(self) -> None:
        if self.local < 1:
            raise ValueError(f"local is {self.local}; it counts the query's own frame, so it must be 1 or more")

    def positions(self, view: View) -> Places:
        rank = ending_together(view.rank(), view) if self.packed else view.origin
        keys, queries = rank // view.frame, (view.of_fresh(rank) if self.packed else view.stream) // view.frame
        over, pinned = queries >= self.local, view.sink + view.slots
        reach = self.local - 1 if self.packed and bool(over.any()) else None
        if not pinned:
            return Places(keys, queries, reach=reach)
        # Sinks lie un-rotated, at 0, from where they are met at the ceiling; till then they are turned when they are met.
        laid = torch.where(view.of_fresh(view.column.expand_as(view.index)) < pinned, 0, queries)
        head_queries = torch.where(over, self.local - 1, -1)
        return Places(keys, queries, head_queries, torch.zeros_like(keys[..., :pinned]), laid, reach)


def shift(view: View, horizon: int) -> Tensor:
    """int64 [R, 1], tokens by which the stream is moved back so that no position reaches `horizon` frames."""
    return (view.consumed + view.coming - horizon * view.frame).clamp_min(0)[:, None]


def ending_together(places: Tensor, view: View) -> Tensor:
    """places int64 [R, G, n], moved head by head so that a query may stand at one place for all heads.

    Heads that hold different tokens count to different numbers; from the newest token back, all count alike.
    """
    if view.index.shape[1] == 1:
        return places
    newest, column = view.index.max(-1, keepdim=True)
    ahead = places.expand_as(view.index).gather(-1, column) - newest
    return places + ahead.amax(1, keepdim=True) - ahead
