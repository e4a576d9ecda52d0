"""Answers to *evict*: which held tokens leave?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .verbs import Evict
from .view import View


@dataclass(frozen=True)
class Oldest(Evict):
    """The oldest window tokens leave, the same ones in every head and layer; sinks never do.

    with_fresh: whether the window's budget counts the fresh tokens too (video papers say "9 frames, including the 3
    that are being generated"), or what is kept before them.
    """

    with_fresh: bool = False

    def keep(self, view: View) -> Tensor | None:
        if view.window is None:
            return None
        # Of a causal step the first query decides what must still be there, of a chunk the last one.
        first = view.consumed - view.window
        if self.with_fresh:
            first = first + (view.coming.clamp_max(1) if view.causal else view.coming)
        return (view.index >= first[:, None, None]) | view.pinned

    def reach(self, view: View) -> int | None:
        return None if view.window is None else view.window - (1 if self.with_fresh else 0)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        if window is None:
            return None
        return sink + slots + (max(window, m) if self.with_fresh else window + m)


@dataclass(frozen=True)
class Never(Evict):
    """Nothing leaves: the memory grows with the stream (or its fold keeps it small)."""

    def keep(self, view: View) -> Tensor | None:
        return torch.ones_like(view.index, dtype=torch.bool)
