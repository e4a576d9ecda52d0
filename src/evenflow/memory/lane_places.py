"""Where the tokens of two lanes stand: what is seen and what is said of it, unit by unit.

A unit is counted from 0: the target lane's unit u is said of the source lane's unit u. All rules need only the last
position that each unit used; a unit that used none ends where it would have begun, less one. A token held back (the
last of its unit, fed with the next) counts in the unit that it ends.
Source: Speak While Watching, arXiv 2601.06843, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class End(NamedTuple):
    """How a unit ended. length: tokens in the lane then. position: the last that the unit used. held: tokens of it
    that were held back, whose positions are its last ones."""

    length: int
    position: int
    held: int = 0


class LanePlace(ABC):
    """Where a unit begins. source, target: how the closed units of each lane ended."""

    @abstractmethod
    def before_source(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        """The last position before those of the source lane's `unit`."""

    @abstractmethod
    def before_target(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        """The last position before those of the target lane's `unit`."""

    def said_before(self, unit: int) -> int:
        """How many units of the target lane must be closed before the source lane's `unit` can be placed."""
        return 0


@dataclass(frozen=True)
class Decoupled(LanePlace):
    """Each lane counts for itself, both from 0: their positions overlap wholly (GDPE; TaYS; Think While Watching)."""

    def before_source(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return last(source, unit - 1)

    def before_target(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return last(target, unit - 1)


@dataclass(frozen=True)
class Gapped(Decoupled):
    """The same, but the target lane counts from `gap` + 1, where the source lane never comes (GIPE)."""

    gap: int = 10_000

    def __post_init__(self) -> None:
        if isinstance(self.gap, bool) or not isinstance(self.gap, int) or self.gap < 0:
            raise ValueError(f"gap is {self.gap!r}; it must be a position, 0 or more")

    def before_target(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return last(target, unit - 1, self.gap)


@dataclass(frozen=True)
class Overlapped(LanePlace):
    """What is said of a unit and the next unit begin together, behind the longer of the pair before (OSPE).

    The next pair is placed when both of this one are closed: watching is at most one unit ahead of what is said.
    """

    def before_source(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return max(last(source, unit - 1), last(target, unit - 2))

    def before_target(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return max(last(source, unit), last(target, unit - 1))

    def said_before(self, unit: int) -> int:
        return max(unit - 1, 0)


@dataclass(frozen=True)
class Interleaved(LanePlace):
    """One count for both lanes, as if they were one sequence: the serial baseline.

    A unit stands behind all that is said of the one before, so it cannot be read before that is said, and a word more
    there moves everything after it. Only positions are those of one sequence: what is seen sees nothing of what is said.
    """

    def before_source(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return last(target, unit - 1)

    def before_target(self, unit: int, source: Sequence[End], target: Sequence[End]) -> int:
        return last(source, unit)

    def said_before(self, unit: int) -> int:
        return unit


def last(ends: Sequence[End], unit: int, before: int = -1) -> int:
    """The last position that `unit` used; `before` where there is no such unit yet."""
    return ends[unit].position if unit >= 0 else before


def words(positions: Tensor, axes: int) -> Tensor:
    """Places int64 [m, axes + 1] of words at `positions` [m]: the same number on every axis, and no origin (−1)."""
    return torch.cat([positions[:, None].expand(-1, axes), torch.full((len(positions), 1), -1)], 1)


def placed(coordinates: Tensor, top: int, origin: int) -> Tensor:
    """Places int64 [m, axes + 1] of picture tokens, with coordinates int64 [m, axes], and the origin that these count from.

    top: the last position in use. origin: of the run that goes on, or −1 where one begins, behind all that is in use.
    """
    origin = top + 1 if origin < 0 else origin
    return torch.cat([origin + coordinates, torch.full((len(coordinates), 1), origin)], 1)
