"""Anchor Forcing (arXiv 2603.13405): LongLive with the chunk that began a prompt, and a place for each region."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .longlive import Buffer, Recache
from .plain import Call
from .self_forcing import Frame, attend, frames_of

Numbered = list[tuple[int, Frame]]


def in_use(junctions: list[Numbered], end: int, window: int, sink: int) -> Numbered:
    """Of the last two junctions the newest whose chunk has left the window of a stream of `end` frames (section 3)."""
    left = [junction for junction in junctions[-2:] if all(t < end - (window - sink) for t, _ in junction)]
    return left[-1] if left else []


def regions(sink: Numbered, junction: Numbered, local: Numbered, end: int, origin: int, trained: int) -> Numbered:
    """Sink, junction and local frames at their positions (section 2), the junction from `origin` on."""
    shift = max(end - trained, 0)
    placed = [(n, f) for n, (_, f) in enumerate(sink)] + [(origin + n, f) for n, (_, f) in enumerate(junction)]
    return placed + [(t - shift, f) for t, f in local]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 12, sink: int = 3, junction: int = 3,
    trained: int = 21, rope_enhance: bool = True,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; the first chunk of another `segment` becomes a junction when its clean pass is kept."""
    outputs = []
    for calls in layers:
        held, done, segment = Buffer([], []), 0, 0
        junctions: list[Numbered] = []
        out = []
        for call in calls:
            fresh, again = frames_of(call, frame), isinstance(call, Recache)
            start = done - len(fresh) if again else done
            end = start + len(fresh)
            after = held.after(start, fresh, window, sink, keep_sink=True)
            parts = after.sink, in_use(junctions, end, window, sink), after.local
            times = list(range(start, end))
            if rope_enhance:
                times = [min(trained - len(fresh), start) + n for n in range(len(fresh))]
                seen = regions(*parts, end, trained - window - junction, trained)
            else:
                seen = [pair for part in parts for pair in part]
            out.append(attend(call, times, seen, rope, frame))
            if call.commit:
                held, done = after, end
                if not again:
                    now = int(call.tags["segment"][0]) if "segment" in call.tags else 0
                    if now != segment and start > 0 and junction:
                        junctions.append(list(zip(range(start, end), fresh, strict=True))[:junction])
                    segment = now
        outputs.append(out)
    return outputs
