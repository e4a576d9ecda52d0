"""Which of the frames that got in are still held, where the oldest leave whatever their resolution.

Source: CurveStream, arXiv 2603.19571, capacity of its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .verdict import Verdict


@dataclass(frozen=True, eq=False)
class Held:
    """number: int64 [k], which frames of the stream are held, in order of time; resolution: int64 [k], of each; seen:
    frames so far."""

    number: Tensor
    resolution: Tensor
    seen: int = 0


@dataclass(frozen=True)
class Fifo:
    """The newest frames that got in, so many that their cost stays within `room`.

    costs: of a frame in low and in full resolution. (1, 1) counts frames, the paper's limit; with (64, 256), say, `room`
    is in tokens, which a limit of frames does not bound.
    """

    room: int = 20
    costs: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if min(self.costs) < 1 or max(self.costs) > self.room:
            raise ValueError(f"a frame costs {self.costs} of {self.room}; expected 1 or more, and room for one frame")

    def start(self) -> Held:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Held(nothing, nothing)

    def step(self, verdict: Verdict, held: Held) -> Held:
        """What is held when the items of a verdict have come."""
        came = verdict.resolution.nonzero()[:, 0]
        number = torch.cat([held.number.to(came.device), came + held.seen])
        resolution = torch.cat([held.resolution.to(came.device), verdict.resolution[came]])
        cost = resolution.new_tensor((0, *self.costs))[resolution]
        stays = cost.flip(0).cumsum(0).flip(0) <= self.room
        return Held(number[stays], resolution[stays], held.seen + len(verdict.resolution))
