"""Which frames of a live source are worth processing: the newest, and those that differ from the last one processed.

Source: StreamDiffusion, arXiv 2312.12491, sections on queues and on the stochastic similarity filter. Pure functions; the
random number of a decision is keyed by (seed, frame).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .flow import noise

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Seen:
    """Where a filter stands. last: the last frame that was processed; skipped: frames since the last forced one that
    were not; number: frames so far."""

    last: Tensor | None = None
    skipped: int = 0
    number: int = 0


@dataclass(frozen=True)
class SimilarityFilter:
    """A frame is skipped the more likely the more it is like the last processed one: p = 1 − (1 − cos)/(1 − threshold).

    threshold: η, the cosine from which on frames may be skipped; 1 or more skips none. most: skips before one is forced;
    as published the count is taken up by skips alone, and only a forced frame sets it back, so equal frames are
    processed at 0, most + 2, 2·(most + 2), …. By chance, not by a bound, because a bound freezes slow scenes.
    """

    threshold: float = 0.98
    most: int = 10

    def probability(self, cosine: float) -> float:
        """Of skipping a frame of that likeness."""
        return 0.0 if self.threshold >= 1 else max(0.0, 1 - (1 - cosine) / (1 - self.threshold))

    def __call__(self, seen: Seen, frame: Tensor, seed: int = 0) -> tuple[bool, Seen]:
        """Whether to process a frame (any shape, zero in the middle of its range), and where the filter stands then."""
        after = replace(seen, number=seen.number + 1)
        if seen.last is None:
            return True, replace(after, last=frame)
        cosine = float(cosine_similarity(seen.last.flatten().double(), frame.flatten().double(), dim=0))
        chance = float(torch.special.ndtr(noise(seed, (-2, seen.number), (1,)).double()))  # uniform
        if self.probability(cosine) < chance:
            return True, replace(after, last=frame)
        if seen.skipped > self.most:
            return True, replace(after, last=frame, skipped=0)
        return False, replace(after, skipped=seen.skipped + 1)


def newest(waiting: Sequence[T], count: int = 1) -> list[T]:
    """`count` frames of those that wait, evenly spread and ending with the newest, in order of time; the caller then
    empties its queue. Fewer where fewer wait."""
    if not waiting:
        return []
    count = min(count, len(waiting))
    stride = len(waiting) // count
    return [waiting[len(waiting) - 1 - stride * i] for i in reversed(range(count))]
