"""DVGT-2 (arXiv 2604.00813): one view's tokens attend the same view's last W frames, at absolute times."""

from __future__ import annotations

from torch import Tensor, arange, cat

from ...memory import Rope
from .plain import Call, attention, rotated


def places(call: Call, first: int, frame: int) -> Tensor:
    """(t, row, column) of each token of a call whose first frame is number `first`: [m, axes]."""
    m = call.k.shape[1]
    time = (first + arange(m) // frame)[:, None]
    return cat([time, call.tags["coordinates"]], 1) if "coordinates" in call.tags else time


def reference(layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 4) -> list[list[Tensor]]:
    """Per layer and call: attention of the fresh frames over themselves and as many of the last as make `window`."""
    outputs = []
    for calls in layers:
        done: list[Call] = []  # one entry a frame that was committed
        when: list[Tensor] = []
        out = []
        for call in calls:
            fresh = call.k.shape[1] // frame
            here = places(call, len(done), frame)
            first = max(len(done) + fresh - window, 0)
            seen = [*done[first:], call]
            k = cat([rotated(c.k, p, rope) for c, p in zip(seen, [*when[first:], here], strict=True)], 1)
            out.append(attention(rotated(call.q, here, rope), k, cat([c.v for c in seen], 1)))
            if call.commit:
                for n in range(fresh):
                    part = slice(n * frame, (n + 1) * frame)
                    done.append(Call(call.q[:, part], call.k[:, part], call.v[:, part]))
                    when.append(here[part])
        outputs.append(out)
    return outputs


def banded(layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int) -> list[list[Tensor]]:
    """The same as one forward over the whole stream under a mask: frame t sees the frames t − W + 1 to t.

    Every call is one committed frame.
    """
    outputs = []
    for calls in layers:
        here = cat([places(call, t, frame) for t, call in enumerate(calls)])
        q, k = (rotated(cat([getattr(call, name) for call in calls], 1), here, rope) for name in "qk")
        time = arange(len(calls) * frame) // frame
        behind = time[:, None] - time
        bias = q.new_zeros(behind.shape).masked_fill((behind < 0) | (behind >= window), float("-inf"))
        out = attention(q, k, cat([call.v for call in calls], 1), bias.expand(q.shape[0], -1, -1))
        outputs.append(list(out.split(frame, 1)))
    return outputs
