"""Admission by curvature: frames at which the path of a stream's features bends or jumps get in, some of them small.

Source: CurveStream, arXiv 2603.19571, curvature-aware scorer and hierarchical visual memory management.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .verdict import FULL, LOW, NONE, Verdict, checked, wide

Warm = Literal["first", "zero"]
UNSCORED = 3  # frames that get in before anything is decided


@dataclass(frozen=True, eq=False)
class CurveState:
    """path: the last two features, of length one, [2, D]; mean, variance: of the scores, running; number: frames so far."""

    path: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    number: int = 0


@dataclass(frozen=True)
class Curvature:
    """Full resolution, low resolution or nothing for a frame, by its score against the running mean and deviation.

    Items are one feature a frame, [n, D], of any length. The score is M + lam · C: M = 1 − cos of the feature to the one
    before, C = 1 − cos of the last displacement to the one before it, 0 to 2. Mean and variance are taken with momentum
    `gamma`, the new score in them (and the new mean in the variance) before it is judged: FULL from mean + k2 · deviation
    on, LOW from mean + k1 · deviation on. The first three frames are FULL and not counted. warm: "first" begins with the
    fourth score as the mean; "zero" with 0, as printed, so that many early frames are FULL. k1, k2 and gamma are not
    printed in the paper: 0 and 1 are a reading of it, gamma is ours.

    eps_noise guards against sensor noise: as thresholds follow the scene, some frames of a scene at rest are always over
    the mean, and C of noise alone is 1.5 however weak it is; frames that are equal from the start have scores equal to
    their mean, which is FULL as printed (≥). Where a displacement is shorter than eps_noise C counts as 0, and a frame
    that moved no further from the one before does not get in by its score. 0, the default, is as published.

    novelty: the score over the largest that there is. Source of the defaults: tables of the paper, where it has them.
    """

    lam: float = 0.2
    k1: float = 0.0
    k2: float = 1.0
    gamma: float = 0.95
    warm: Warm = "first"
    eps_noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.k1 < self.k2:
            raise ValueError(f"k1 is {self.k1} and k2 {self.k2}; expected k1 < k2, as low resolution begins below full")
        if not 0 <= self.gamma < 1 or self.lam < 0 or self.eps_noise < 0:
            raise ValueError(f"expected 0 ≤ gamma < 1, lam ≥ 0 and eps_noise ≥ 0, got {self}")
        if self.warm not in get_args(Warm):
            raise ValueError(f"warm is {self.warm!r}; expected one of {', '.join(get_args(Warm))}")

    def start(self) -> CurveState:
        return CurveState()

    def step(self, items: Tensor, state: CurveState, asked: Tensor | None = None) -> tuple[Verdict, CurveState]:
        """asked: bool [n], frames at which a question is put; they are FULL, and count in the mean as others do."""
        checked(items, (2,), "[n, D]", None if state.path is None else state.path[-1])
        if asked is not None and (asked.dtype != torch.bool or asked.shape != items.shape[:1]):
            raise ValueError(f"asked is {asked.dtype} {tuple(asked.shape)}; expected bool [{len(items)}], one a frame")
        if not len(items):
            nothing = items.new_zeros(0)
            return Verdict.of(nothing.bool(), nothing), state
        fresh = normalize(items.to(wide(items)), dim=-1, eps=torch.finfo(wide(items)).tiny)
        path = torch.cat([fresh[:1].expand(2, -1) if state.path is None else state.path, fresh])
        motion, bend = curvature(path, self.eps_noise)
        scores = motion + self.lam * bend
        means, variances = self._statistics(scores, state)
        deviations = variances.sqrt()
        resolution = torch.where(scores >= _above(means, self.k1, deviations), LOW, NONE)
        resolution = torch.where(scores >= _above(means, self.k2, deviations), FULL, resolution)
        resolution = torch.where(motion >= self.eps_noise**2 / 2, resolution, NONE)  # motion is half the square
        resolution[: max(0, UNSCORED - state.number)] = FULL
        if asked is not None:
            resolution = torch.where(asked, FULL, resolution)
        novelty = scores / (2 + 2 * self.lam)
        novelty[: max(0, 1 - state.number)] = 1
        after = replace(
            state, path=path[-2:].clone(), mean=means[-1].clone(), variance=variances[-1].clone(),
            number=state.number + len(items),
        )  # fmt: skip
        return Verdict(resolution > NONE, resolution, novelty.float()), after

    def _statistics(self, scores: Tensor, state: CurveState) -> tuple[Tensor, Tensor]:
        """Running mean and variance after each score, [n] and [n]; as they were where none is counted."""
        nothing = scores.new_zeros(())
        mean = nothing if state.mean is None else state.mean
        variance = nothing if state.variance is None else state.variance
        means, variances = [], []
        for number, score in enumerate(scores, state.number):
            if number == UNSCORED and self.warm == "first":
                mean = score
            elif number >= UNSCORED:
                mean = mean + (1 - self.gamma) * (score - mean)  # equal scores leave an equal mean, to the last bit
                variance = self.gamma * variance + (1 - self.gamma) * (score - mean).square()
            means.append(mean)
            variances.append(variance)
        return torch.stack(means), torch.stack(variances)


def curvature(path: Tensor, eps_noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """M and C of all features but the first two of a path of unit vectors [n + 2, D]: [n] and [n].

    Both as half a squared distance, which is what 1 − cos is of unit vectors, without its loss of digits where they are
    nearly equal. C is 0 where one of its two displacements is 0, or shorter than `eps_noise`.
    """
    moves = path.diff(dim=0)
    lengths = moves.norm(dim=1)
    tangents = normalize(moves, dim=1, eps=torch.finfo(path.dtype).tiny)
    moved = (lengths > 0) & (lengths >= eps_noise)
    bend = tangents.diff(dim=0).square().sum(1) / 2
    return lengths[1:].square() / 2, torch.where(moved[1:] & moved[:-1], bend, 0)


def _above(mean: Tensor, k: float, deviation: Tensor) -> Tensor:
    """mean + k · deviation; an infinite k is a threshold of its own, whatever the deviation."""
    return torch.full_like(mean, k) if math.isinf(k) else mean + k * deviation
