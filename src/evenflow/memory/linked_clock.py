"""One clock for two modalities: when each latent is, in whole ticks, and how seconds turn queries and keys.

A latent covers some video frames or audio hops, and stands in the middle of them. Both middles are whole numbers of one
tick (1/1200 s for 24 frames and 100 hops a second), so a position is an integer, exact however long the stream is.
Angles are ω · (2·t/span − 1) with ω from π/2 to θ·π/2, so positions count from span/2: 0 is where nothing turns.
Source: OmniForcing, arXiv 2603.11647, and the rotary embedding of LTX-2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .rope import Rope


class Latents(NamedTuple):
    """One number of each modality."""

    video: int
    audio: int


@dataclass(frozen=True)
class Rate:
    """How latents follow one another. units: frames or hops a second. stride: of these are one latent, but the first,
    which is of one."""

    units: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("units", "stride"):
            whole(f"Rate.{name}", getattr(self, name), 1)

    def middle(self, latents: Tensor) -> Tensor:
        """Twice the middle of each latent, in units: the ends are max(0, s·l − s + 1) and s·l + 1."""
        return (self.stride * (latents - 1) + 1).clamp_min(0) + self.stride * latents + 1

    def latents(self, seconds: int) -> int:
        """Latents in so many seconds. Raises ValueError if they are no whole number."""
        count = Fraction(self.units * seconds, self.stride)
        if count.denominator > 1:
            raise ValueError(f"{seconds} s are {count} latents of {self}; a block must hold whole ones: make it longer")
        return int(count)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of both modalities, and the rotary embedding that they turn.

    span: seconds over which the lowest frequency turns by half a circle (later positions go on in the same way).
    patch: pixels along a side of a video token; pixels: the same as span, for rows and columns.
    """

    video: Rate = field(default_factory=lambda: Rate(24, 8))
    audio: Rate = field(default_factory=lambda: Rate(100, 4))
    theta: float = 10_000.0
    span: int = 20
    patch: int = 32
    pixels: int = 2048

    def __post_init__(self) -> None:
        for name in ("span", "patch", "pixels"):
            whole(f"Clock.{name}", getattr(self, name), 1)
        if self.pixels % self.patch or not self.theta > 0:
            raise ValueError(
                f"pixels {self.pixels} must be a multiple of patch {self.patch}, theta {self.theta} positive"
            )

    @property
    def ticks(self) -> int:
        """In a second."""
        return math.lcm(2 * self.video.units, 2 * self.audio.units)

    def times(self, modality: str, first: int, count: int) -> Tensor:
        """Positions of `count` latents from `first` on, int64 [count], in ticks from span/2."""
        rate = self.video if modality == "video" else self.audio
        middle = rate.middle(torch.arange(first, first + count))
        return middle * (self.ticks // (2 * rate.units)) - self.ticks * self.span // 2

    def video_places(self, first: int, count: int, grid: tuple[int, int]) -> Tensor:
        """Time, row and column of `count` video latents' tokens, int64 [count · rows · columns, 3].

        Rows and columns count half patches from the middle of `pixels`, as (patch·i + patch/2)/pixels does.
        """
        rows, columns = (2 * torch.arange(n) + 1 - self.pixels // self.patch for n in grid)
        return torch.cartesian_prod(self.times("video", first, count), rows, columns)

    def audio_places(self, first: int, count: int) -> Tensor:
        """The same for audio, whose tokens have no row or column: [count, 3], zeros there."""
        return torch.nn.functional.pad(self.times("audio", first, count)[:, None], (0, 2))

    def rope(self, width: int, spatial: bool = False) -> Rope:
        """The embedding of `width` channels: n frequencies an axis, π/2·θ^(j/(n−1)); what is left over, in front, does
        not turn.

        spatial: time, row and column take turns, else all is time. Raises ValueError if there is no channel pair for each.
        """
        axes = 3 if spatial else 1
        n = width // (2 * axes)
        if n < 1 or width % 2:
            raise ValueError(f"{width} channels cannot be turned on {axes} axes; they must be even, {2 * axes} or more")
        # Angles are ω·(2·t/span − 1); a position is a tick of span·ticks/2 of them, or one of pixels/patch half patches.
        unit = (2 / (self.span * self.ticks), self.patch / self.pixels, self.patch / self.pixels)
        turns = [math.pi / 2 * self.theta ** (j / max(n - 1, 1)) for j in range(n)]
        left = width // 2 - axes * n
        return Rope(
            inv_freq=(*[0.0] * left, *(turn * unit[axis] for turn in turns for axis in range(axes))),
            axes=(*[0] * left, *[*range(axes)] * n) if spatial else None,
            style="interleaved",
        )


def whole(name: str, value: object, least: int) -> None:
    """Raises ValueError if `value` is not a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
