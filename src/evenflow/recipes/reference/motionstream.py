"""MotionStream (arXiv 2511.01266): first chunks, last chunks, and positions that are places in the cache."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


def context(i: int, sink: int, window: int) -> list[int]:
    """Numbers of the chunks before chunk i that it attends (section 3)."""
    return sorted({*range(min(sink, i)), *range(max(i - window, 0), i)})


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, sink: int = 1, window: int = 1
) -> list[list[Tensor]]:
    """Per layer and call; a call is a chunk, and chunks are equally long."""
    outputs = []
    for calls in layers:
        chunks: list[list[Frame]] = []
        out = []
        for call in calls:
            fresh = frames_of(call, frame)
            cache = [f for j in context(len(chunks), sink, window) for f in chunks[j]] + fresh
            times = list(range(len(cache) - len(fresh), len(cache)))
            out.append(attend(call, times, list(enumerate(cache)), rope, frame))
            if call.commit:
                chunks.append(fresh)
        outputs.append(out)
    return outputs
