"""Stream-T1 (arXiv 2605.04461): chunks that leave the window are dropped, averaged into the newest sink, or kept."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of

Chunk = tuple[int, int, list[Frame]]  # number of its first frame, where it goes, its frames


def routed(sinks: list[Chunk], gone: Chunk, most: int, alpha: float) -> list[Chunk]:
    """Sink chunks, the first chunk among them, after a chunk left; at most `most` beside the first."""
    where = gone[1]
    if where == 2 and len(sinks) - 1 < most:
        return [*sinks, gone]
    if where == 0:
        return sinks
    number, was, old = sinks[-1]
    mixed = [
        Frame(alpha * a.k + (1 - alpha) * b.k, alpha * a.v + (1 - alpha) * b.v, a.where)
        for a, b in zip(old, gone[2], strict=True)
    ]
    return [*sinks[:-1], (number, was, mixed)]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 12, sink: int = 3, max_sink: int = 15,
    alpha: float = 0.999,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call, calls as long as the sink; the tag `route` of a call that is kept says where it goes."""
    outputs = []
    for calls in layers:
        sinks: list[Chunk] = []
        rest: list[Chunk] = []
        count, out = 0, []
        for call in calls:
            where = int(call.tags["route"][0]) if "route" in call.tags else 0
            fresh = (count, where, frames_of(call, frame))
            head, tail = list(sinks), list(rest)
            if head:
                tail.append(fresh)
            else:
                head.append(fresh)
            while sum(len(c[2]) for c in tail) > window - sink:
                head = routed(head, tail.pop(0), (max_sink - sink) // sink, alpha)
            seen = [(number + i, f) for number, _, frames in [*head, *tail] for i, f in enumerate(frames)]
            out.append(attend(call, [count + i for i in range(len(fresh[2]))], seen, rope, frame))
            if call.commit:
                sinks, rest, count = head, tail, count + len(fresh[2])
        outputs.append(out)
    return outputs
