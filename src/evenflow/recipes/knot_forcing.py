"""Knot Forcing: a reference image that is always ahead of the stream, and the last clean frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import Memory, Oldest, Place, Places, View
from .registry import register


@dataclass(frozen=True)
class RunningAhead(Place):
    """Frames stand at their numbers, the sinks (one frame) ahead of them: further by `stride` when they are reached.

    Before a chunk from frame i, `ahead` grows by `stride` where i + chunk + knot > ahead. As a stride is no less than a
    chunk, growing once is enough, and it stands at the first of start, start + stride, … that is not less.
    """

    chunk: int
    knot: int
    stride: int
    start: int

    def ahead(self, i: Tensor) -> Tensor:
        """Position of the reference while the chunk from frame i (int64, any shape) is made."""
        short = (i.clamp_min(0) + self.chunk + self.knot - self.start).clamp_min(0)
        return self.start + -(-short // self.stride) * self.stride

    def positions(self, view: View) -> Places:
        sinks = view.sink // view.frame
        ahead = self.ahead(view.consumed // view.frame - sinks)
        keys = torch.where(view.column < view.sink, ahead[:, None, None], view.index // view.frame - sinks)
        queries = torch.where(view.stream < view.sink, ahead[:, None], view.stream // view.frame - sinks)
        return Places(keys, queries)


@register(
    "knot-forcing",
    paper="Knot Forcing: Taming Autoregressive Video Diffusion Models for Real-time Infinite Interactive Portrait "
    "Animation, arXiv 2512.21734",
    claims=("knot-forcing",),
)
def knot_forcing(
    *, window: int = 18, chunk: int = 3, knot: int = 1, stride: int = 4, start: int = 8, frame: int | None = None
) -> Memory:
    """A reference image, and the last `window` clean frames beside what is being generated.

    The first step of a stream is the reference image: one frame, which stays. A chunk's denoising passes then bring
    chunk + knot frames with commit=False, its clean pass the first `chunk` of them, so that the knot, the overlap with
    the next chunk, is never kept. Frames stand at their numbers, counted from behind the reference, and the reference
    at a number that the stream never reaches (section on running ahead): `start`, and `stride` more for every chunk that
    would reach beyond it; with equality it stays.

    No official code could be read. chunk, stride and start are those of an independent re-implementation; the paper's
    window was not to be found, and 18 is what Self-Forcing's model sees before a chunk. Pinning the knot, fusing its two
    versions and the inpainting condition belong to the generation loop, not to the memory.
    """
    for name, value, least in (("window", window, 1), ("chunk", chunk, 1), ("knot", knot, 0), ("start", start, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    if stride < chunk or start + stride < chunk + knot:
        raise ValueError(
            f"the reference falls behind the stream with stride {stride} and start {start}: a stride must be {chunk} or "
            f"more (one chunk), and start + stride {chunk + knot} or more"
        )
    return Memory(
        sink=1,
        window=window,
        evict=Oldest(),
        place=RunningAhead(chunk, knot, stride, start),
        frame=frame,
        inside="both",
    )
