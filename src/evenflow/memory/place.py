"""Answers to *place*: which positions do held tokens get?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contiguous:
    """Positions are indices in the cache: sinks trail the window without a gap (StreamingLLM, section 3.2)."""

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position) if capacity is None else (position - capacity).clamp_min(0)


@dataclass(frozen=True)
class Absolute:
    """Positions are stream indices: sinks stay at the start, ever further from the window."""

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        return torch.zeros_like(position)
