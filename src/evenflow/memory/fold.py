"""Answers to *fold*: what becomes of what leaves?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """What leaves is gone: nothing beyond sinks and window is remembered."""

    slots: ClassVar[int] = 0

    def fold(self, keys: Tensor, values: Tensor, count: Tensor, left: Tensor, left_values: Tensor) -> None:
        return None
