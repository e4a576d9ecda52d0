"""Drawn tracks: where a point that somebody drags is, frame by frame, as channels beside the latents.

Source: MotionStream, arXiv 2511.01266, section on track encoding. Tracks have random numbers, so that a network binds no
meaning to them. Nothing drawn is zero, which means unspecified. The first latent, which is one pixel frame, has it four
times (not said in the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..models.video.tracks import canvas
from .flow import noise

NUMBERS = 1000  # random numbers of tracks are below


@dataclass(frozen=True)
class Track:
    """A point on its way: (seconds, x, y) in order of time, pixels of the video. It is there from its first to its last
    point, and for good where there is only one: a point that is held still."""

    id: int
    points: tuple[tuple[float, float, float], ...]

    def over(self, seconds: float) -> bool:
        """Whether it will never be seen again."""
        return len(self.points) > 1 and self.points[-1][0] < seconds


def number(seed: int, id: int) -> int:
    """The random number of a track, the same for a stream and its replay."""
    return int(noise(seed, (-1, id), (1,)).view(torch.int32).item()) % NUMBERS


def pixel_frames(frame: int, stride: int = 4) -> list[int]:
    """The pixel frames of a latent frame: one, as often as others have some, for the first."""
    return [0] * stride if frame == 0 else list(range(stride * (frame - 1) + 1, stride * frame + 1))


def drawn(
    tracks: Sequence[Track], frames: Sequence[int], *, grid: tuple[int, int], stride: tuple[int, int, int], fps: float,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """The channels of latent frames, float32 [F, channels, h, w].

    frames: numbers of latent frames in the stream; grid: (h, w); stride: pixels of a latent in time, rows and columns.
    A clip at once gives what its chunks give one after another.
    """
    at = np.array([pixel for frame in frames for pixel in pixel_frames(frame, stride[0])]) / fps
    points, visible = np.zeros((len(at), len(tracks), 2)), np.zeros((len(at), len(tracks)), dtype=bool)
    for n, track in enumerate(tracks):
        seconds, x, y = np.array(track.points, dtype=np.float64).T
        visible[:, n] = (at >= seconds[0] - 1e-9) & ((at <= seconds[-1] + 1e-9) | (len(seconds) == 1))
        points[:, n, 0], points[:, n, 1] = np.interp(at, seconds, x), np.interp(at, seconds, y)
    ids = torch.tensor([number(seed, track.id) for track in tracks], dtype=torch.int64)
    return canvas(torch.from_numpy(points), torch.from_numpy(visible), ids, grid, stride).float()


def masked(canvas: Tensor, frames: Tensor) -> Tensor:
    """The canvas [F, …] with the chosen frames unspecified, bool [F]: stochastic mid-frame masking, in training."""
    return canvas.masked_fill(frames.view(-1, *[1] * (canvas.ndim - 1)), 0.0)


def checked_points(points: Sequence[Sequence[float]], size: tuple[int, int]) -> tuple[tuple[float, float, float], ...]:
    """Points as numbers. Raises ValueError for none, one that is no number, and times that run backwards."""
    try:
        made = tuple((float(s), float(x), float(y)) for s, x, y in points)
    except (TypeError, ValueError):
        raise ValueError(f"a track is {points!r}; expected points (seconds, x, y)") from None
    if not made or not np.isfinite(np.array(made)).all():
        raise ValueError(f"a track is {points!r}; expected one point (seconds, x, y) or more, all numbers")
    if any(b[0] <= a[0] for a, b in pairwise(made)):
        raise ValueError("the points of a track must follow one another in time")
    if not any(0 <= x < size[1] and 0 <= y < size[0] for _, x, y in made):
        raise ValueError(f"no point of the track is inside the video of {size[1]}×{size[0]} pixels")
    return made
