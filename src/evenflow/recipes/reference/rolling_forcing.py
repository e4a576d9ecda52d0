"""Rolling Forcing (arXiv 2509.25161): what the joint call of a rolling window and the clean pass of a block attend."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


def joint(start: int, fresh: int, anchor: int, budget: int) -> list[tuple[int, int]]:
    """Call A: (where it stands, number) of the cached frames that a window of `fresh` frames from `start` on attends."""
    if not start:
        return []
    anchor = min(anchor, start)
    working = max(0, min(start - anchor, budget - fresh - anchor))
    first = start - working - anchor
    return [(first + t, t) for t in range(anchor)] + [(t, t) for t in range(start - working, start)]


def clean(start: int, fresh: int, budget: int) -> list[tuple[int, int]]:
    """Call B: the same for the clean pass of a block."""
    return [(t, t) for t in range(max(0, start + fresh - budget), start)]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, anchor: int = 3, budget: int = 21
) -> list[list[Tensor]]:
    """Per layer and call: a call that is not kept is a window's joint call, a kept one a block's clean pass."""
    outputs = []
    for calls in layers:
        done: list[Frame] = []
        out = []
        for call in calls:
            fresh, start = frames_of(call, frame), len(done)
            places = clean(start, len(fresh), budget) if call.commit else joint(start, len(fresh), anchor, budget)
            times = list(range(start, start + len(fresh)))
            seen = [(at, done[t]) for at, t in places] + list(zip(times, fresh, strict=True))
            out.append(attend(call, times, seen, rope, frame))
            if call.commit:
                done += fresh
        outputs.append(out)
    return outputs
