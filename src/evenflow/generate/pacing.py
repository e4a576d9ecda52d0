"""Keeping up with a live source: how much noise its motion bears, how many chunks to batch, who computes which blocks.

Source: StreamDiffusionV2, arXiv 2511.07399: motion-aware noise, SLO-aware batching, block scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class NoiseControl:
    """Noise of a video that is restyled: fast motion gets less, so that it is followed, slow motion more style.

    s = share · (most − cut · d̂) + (1 − share) · s before, d̂ the greatest motion of the chunk over `scale`, 0 to 1. The
    defaults are those of the released code, in which s lies in [0.7, 0.8].
    """

    most: float = 0.8
    cut: float = 0.1
    scale: float = 0.2
    share: float = 0.9

    def __post_init__(self) -> None:
        if not (0 <= self.cut < self.most <= 1 and self.scale > 0 and 0 < self.share <= 1):
            raise ValueError(f"{self}: needs 0 <= cut < most <= 1, scale > 0 and share in (0, 1]")

    def level(self, motion: float, before: float | None = None) -> float:
        """Noise level s of a chunk after one of noise `before`; motion: see `motion`."""
        wanted = self.most - self.cut * min(1.0, max(0.0, motion / self.scale))
        return self.share * wanted + (1 - self.share) * (self.most if before is None else before)

    @staticmethod
    def first_step(s: float) -> int:
        """The first time that the released code tells its network: 100 less than that of the noise."""
        return int(1000 * s + 1e-9) - 100


def motion(frames: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
    """Root mean square of the difference of each frame to the one before, of pixels in [−1, 1], float64 [n].

    frames: uint8 [n, H, W, 3]; before: the frame before them (None: the first has moved by nothing).
    """
    whole = np.concatenate([frames[:1] if before is None else before[None], frames]).astype(np.float64) / 127.5
    return np.sqrt(((whole[1:] - whole[:-1]) ** 2).mean((1, 2, 3)))


@dataclass(frozen=True)
class Latency:
    """Seconds of a call of B chunks: fixed + each · B; memory-bound until the knee, where both parts are equal."""

    fixed: float
    each: float

    def of(self, batch: int) -> float:
        """L(B)."""
        return self.fixed + self.each * batch

    def throughput(self, batch: int) -> float:
        """Chunks a second, ∝ B/(knee + B)."""
        return batch / self.of(batch)

    @property
    def knee(self) -> int:
        """The smallest batch that is no longer bound by memory."""
        return max(1, -(-round(1e9 * self.fixed) // max(1, round(1e9 * self.each))))


def batch_for(latency: Latency, deadline: float, waiting: int) -> int:
    """How many chunks to compute together: up to the knee, as far as the deadline and what is there allow; 0 for none.

    0 means that not even one chunk meets its deadline: then take no batch, and drop what is late.
    """
    fits = [batch for batch in range(1, min(latency.knee, waiting) + 1) if latency.of(batch) <= deadline]
    return fits[-1] if fits else 0


def mode(wait: float, oldest: float, bound: float = 0.5) -> Literal["alone", "batch"]:
    """Whether to make a chunk alone, all its steps at once, because somebody waits; otherwise the stream batch.

    wait: seconds in the queue; oldest: age of the oldest frame there.
    """
    return "alone" if max(wait, oldest) >= bound else "batch"


def rebalanced(blocks: Sequence[int], inside: Sequence[float], total: Sequence[float]) -> list[int]:
    """How many transformer blocks each device gets, after a measurement.

    blocks: of each device now; inside: seconds that it spends in them; total: with all else that it does (a VAE). The
    sum stays, and each keeps one or more; with more devices than blocks nothing changes.
    """
    count, devices = sum(blocks), len(blocks)
    if devices > count:
        return list(blocks)
    each, mean = sum(inside) / count, sum(total) / devices
    target = [max(1, round(n + (mean - t) / each)) for n, t in zip(blocks, total, strict=True)]
    order = sorted(range(devices), key=lambda i: (target[i], i))
    while sum(target) != count:
        step = 1 if sum(target) < count else -1
        for i in order if step > 0 else order[::-1]:
            if sum(target) != count and (step > 0 or target[i] > 1):
                target[i] += step
    return target
