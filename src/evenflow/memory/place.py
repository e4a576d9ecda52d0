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
