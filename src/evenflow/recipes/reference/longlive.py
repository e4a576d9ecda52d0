"""LongLive (arXiv 2509.22622): a first chunk that stays, a short window, and the window computed anew at a switch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


@dataclass(frozen=True)
class Recache(Call):
    """The last frames of the stream computed anew (section 2). keep_sink: None as the recipe says."""

    keep_sink: bool | None = None


@dataclass(frozen=True)
class Buffer:
    """Frames by their numbers: first ones that stay, and the local ones."""

    sink: list[tuple[int, Frame]]
    local: list[tuple[int, Frame]]

    def after(self, start: int, fresh: list[Frame], window: int, sink: int, keep_sink: bool) -> Buffer:
        """With frames start, start + 1, … written: first into what room the sink has, then behind the local ones."""
        came = list(enumerate(fresh, start))
        first = [(t, f) for t, f in self.sink if t < start and keep_sink]
        room = sink - len(first)
        local = [(t, f) for t, f in self.local if t < start] + came[room:]
        oldest = start + len(fresh) - (window - sink)
        return Buffer(first + came[:room], [(t, f) for t, f in local if t >= oldest])


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 12, sink: int = 3,
    global_sink: bool = True, infinity: bool = False,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call, a `Recache` being a call like the others."""
    outputs = []
    for calls in layers:
        held, done = Buffer([], []), 0
        out = []
        for call in calls:
            fresh, again = frames_of(call, frame), isinstance(call, Recache)
            start = done - len(fresh) if again else done
            keep_sink = not isinstance(call, Recache) or (global_sink if call.keep_sink is None else call.keep_sink)
            after = held.after(start, fresh, window, sink, keep_sink)
            seen, times = after.sink + after.local, list(range(start, start + len(fresh)))
            if infinity:  # numbers in the buffer (section 3): its last ones for the queries
                seen = [(n, f) for n, (_, f) in enumerate(seen)]
                times = list(range(len(seen) - len(fresh), len(seen)))
            out.append(attend(call, times, seen, rope, frame))
            if call.commit:
                held, done = after, start + len(fresh)
        outputs.append(out)
    return outputs
