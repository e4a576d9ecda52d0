"""Deep Forcing: half of the window is sink and moves along; of what is old, recent queries choose what stays."""

from __future__ import annotations

from typing import Literal

from ..memory import LeastAttended, Memory, Realigned
from .registry import register


@register(
    "deep-forcing",
    paper="Deep Forcing: Training-Free Long Video Generation with Deep Sink and Participative Compression, ICML 2026, "
    "arXiv 2512.05081",
    claims=("deep-forcing",),
)
def deep_forcing(
    *, window: int = 21, capacity: int = 16, sink: int = 10, recent: int = 4, fusion: Literal["sum", "max"] = "sum",
    reuse: int = 7, chunk: int = 3, frame: int | None = None,
) -> Memory:  # fmt: skip
    """Up to `window` frames; a chunk that would exceed them leaves `capacity`: `sink`, the most used tokens, `recent`.

    Compression happens at a chunk's first pass and holds for the chunk. The last `recent` frames vote, the chunk itself
    among them with the noisy queries of that pass: φ of a token is its logit against them, summed over heads and queries
    (section on participative compression), rotated at their times, so that distance counts. Each layer keeps tokens of
    its own, the most used of what is neither sink nor recent, until one has been chosen `reuse` times (the released
    code's bound; 0 is none). A chunk longer than `recent` stays whole.

    The sink, about half of the window, moves with time: at each compression to where it ends directly before what else
    is kept (deep sink, the code's formula), and it stands there until the next. Keys are kept un-rotated and placed when
    they are read, which is the released code's rotation in place without its rounding. As in that code the other tokens
    stay at their own times; the paper tells of unifying those of the chosen ones, but no formula was found.

    The released code appends the queries of every pass to the voters, so that more or noisier passes push the clean
    ones out; here those of kept passes vote, and of the chunk's first pass. The same with its 4 frames and chunks of 3.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    return Memory(
        sink=sink, window=window - sink, evict=LeastAttended(capacity, recent, fusion, reuse), place=Realigned(),
        frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
