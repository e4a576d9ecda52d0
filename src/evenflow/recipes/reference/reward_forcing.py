"""Reward Forcing (arXiv 2512.04678): a window, and a sink that is the moving average of what left the window."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


def averaged(sink: list[Frame], gone: list[tuple[int, Frame]], alpha: float) -> list[Frame]:
    """The sink after frames (number, frame) left the window in this order: each goes into its place in the chunk."""
    sink = list(sink)
    for number, frame in gone:
        old = sink[number % len(sink)]
        sink[number % len(sink)] = Frame(
            alpha * old.k + (1 - alpha) * frame.k, alpha * old.v + (1 - alpha) * frame.v, old.where
        )
    return sink


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 9, sink: int = 3, alpha: float = 0.999
) -> list[list[Tensor]]:
    """Per layer and call; window counts the sink and the fresh frames, positions are places in the cache."""
    outputs = []
    for calls in layers:
        first: list[Frame] = []
        rest: list[tuple[int, Frame]] = []  # what is in the window, with its number in the stream
        count, out = 0, []
        for call in calls:
            head, tail = list(first), list(rest)
            for number, fresh in enumerate(frames_of(call, frame), count):
                if len(head) < sink:
                    head.append(fresh)
                else:
                    tail.append((number, fresh))
            over = max(len(head) + len(tail) - window, 0)
            head = averaged(head, tail[:over], alpha)
            tail = tail[over:]
            cache = head + [f for _, f in tail]
            times = list(range(len(cache) - call.q.shape[1] // frame, len(cache)))
            out.append(attend(call, times, list(enumerate(cache)), rope, frame))
            if call.commit:
                first, rest, count = head, tail, count + call.q.shape[1] // frame
        outputs.append(out)
    return outputs
