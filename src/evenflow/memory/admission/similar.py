"""Admission by chance: a frame is skipped the more likely the more it is like the last one that got in.

Source: StreamDiffusion, arXiv 2312.12491, stochastic similarity filter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import keyed
from .verdict import Verdict, checked, cosine


@dataclass(frozen=True, eq=False)
class SimilarState:
    """last: the last frame that got in; skipped: int64 [], frames since the last forced one that did not; number: frames
    so far."""

    last: Tensor | None = None
    skipped: Tensor | int = 0
    number: int = 0


@dataclass(frozen=True)
class SimilarFrames:
    """A frame is skipped with probability 1 − (1 − cos)/(1 − threshold), cos to the last frame that was not.

    Items are frames of any shape, [n, …], zero in the middle of their range. threshold: η, the cosine from which on
    frames may be skipped; 1 or more skips none. most: skips before a frame is forced; as published the count is taken up
    by skips alone, and only a forced frame sets it back, so equal frames get in at 0, most + 2, 2·(most + 2), …. By
    chance, not by a bound, because a bound freezes slow scenes. seed: with a frame's number, the key of its chance.

    novelty: 1 − cos, 1 at most.
    """

    threshold: float = 0.98
    most: int = 10
    seed: int = 0

    def start(self) -> SimilarState:
        return SimilarState()

    def probability(self, cosine: Tensor) -> Tensor:
        """Of skipping frames of that likeness."""
        if self.threshold >= 1:
            return torch.zeros_like(cosine)
        return (1 - (1 - cosine) / (1 - self.threshold)).clamp_min(0)

    def step(self, items: Tensor, state: SimilarState) -> tuple[Verdict, SimilarState]:
        checked(items, tuple(range(1, items.ndim + 1)), "[n, …]", state.last)
        flat = items.flatten(1) if items.ndim > 1 else items[:, None]
        if not len(items):
            return Verdict.of(flat.new_zeros(0, dtype=torch.bool)), state
        chances = torch.tensor([chance(self.seed, state.number + n) for n in range(len(items))], dtype=torch.float64)
        last = None if state.last is None else state.last.flatten().double()
        skipped = torch.as_tensor(state.skipped, device=items.device)
        keeps, alikes = [], []
        for frame, uniform in zip(flat, chances.to(items.device), strict=True):
            frame = frame.double()
            alike = frame.new_zeros(()) if last is None else cosine(frame, last)
            drawn = uniform.new_ones((), dtype=torch.bool) if last is None else self.probability(alike) < uniform
            keep = drawn | (skipped > self.most)
            last = frame if last is None else torch.where(keep, frame, last)
            skipped = torch.where(drawn, skipped, torch.where(keep, 0, skipped + 1))
            keeps.append(keep)
            alikes.append(alike)
        assert last is not None
        kept = last.to(items.dtype, copy=True).view(items.shape[1:])
        novelty = (1 - torch.stack(alikes)).clamp_max(1)
        return Verdict.of(torch.stack(keeps), novelty), SimilarState(kept, skipped, state.number + len(items))


def chance(seed: int, number: int) -> float:
    """The uniform number in (0, 1) of a frame."""
    return float(torch.special.ndtr(torch.randn(1, generator=keyed(seed, -2, number)).double()))
