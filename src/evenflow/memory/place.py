"""Answers to *place*: which positions do held tokens get?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .verbs import Place, Places
from .view import View


@dataclass(frozen=True)
class Contiguous(Place):
    """Positions are indices in the cache: sinks trail the window without a gap (StreamingLLM, section 3.2)."""

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position) if capacity is None else (position - capacity).clamp_min(0)

    def positions(self, view: View) -> Places:
        rank = view.rank()
        queries, lost = view.of_fresh(rank), view.lost()
        # Behind a gap that opens within a step the sinks come nearer, as if its tokens had come one by one.
        head = None if lost is None or not (view.sink or view.slots) else (queries - lost) // view.frame
        return Places(rank // view.frame, queries // view.frame, head)


@dataclass(frozen=True)
class Absolute(Place):
    """Positions are stream indices: sinks stay at the start, ever further from the window."""

    moves: ClassVar[bool] = False

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position)

    def positions(self, view: View) -> Places:
        return Places(view.index // view.frame, view.stream // view.frame)


@dataclass(frozen=True)
class DistanceCeiling(Place):
    """Stream positions, but once the window has overflowed every sink is at the constant distance local − 1.

    local: frames of the window, the query's own among them (tokens where a frame is one). From that position on a query
    meets all sinks there, whatever they and the window are. packed: positions are places in the cache, and a query sees no
    further back in it than local − 1: what a window of that size would give over all that is held. Source: LM-Infinite,
    arXiv 2308.16137, section 3; InfLLM, arXiv 2402.04617; ReKV, arXiv 2503.00540, section 3.
    """

    local: int
    packed: bool = False

    def __post_init__(self) -> None:
        if self.local < 1:
            raise ValueError(f"local is {self.local}; it counts the query's own frame, so it must be 1 or more")

    def positions(self, view: View) -> Places:
        rank = view.rank() if self.packed else view.index
        keys, queries = rank // view.frame, (view.of_fresh(rank) if self.packed else view.stream) // view.frame
        over, pinned = queries >= self.local, view.sink + view.slots
        if not bool(over.any()):
            return Places(keys, queries)
        reach = self.local - 1 if self.packed else None
        if not pinned:
            return Places(keys, queries, reach=reach)
        if view.m == 1 or (queries.shape[1] == view.frame and not self.packed):  # all of them at one position
            met = torch.where(over[:, :1, None], queries[:, :1, None] - self.local + 1, keys[..., :pinned])
            return Places(torch.cat([met, keys[..., pinned:]], -1), queries, reach=reach)
        head_queries = torch.where(over, self.local - 1, -1)
        return Places(keys, queries, head_queries, torch.zeros_like(keys[..., :pinned]), reach)
