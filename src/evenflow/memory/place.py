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
        return Places(rank // view.frame, view.of_fresh(rank) // view.frame)


@dataclass(frozen=True)
class Absolute(Place):
    """Positions are stream indices: sinks stay at the start, ever further from the window."""

    moves: ClassVar[bool] = False

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position)

    def positions(self, view: View) -> Places:
        return Places(view.index // view.frame, view.stream // view.frame)
