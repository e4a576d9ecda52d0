"""Self-Forcing (arXiv 2506.08009): chunks of frames over a cache of the last frames, at absolute times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, arange, cat, tensor

from ...memory import Rope
from .plain import Call, attention, rotated


@dataclass(frozen=True)
class Frame:
    """One frame of one layer, un-rotated: k [H_kv, frame, D], v [H_kv, frame, D_v], where [frame, axes − 1]."""

    k: Tensor
    v: Tensor
    where: Tensor


def frames_of(call: Call, frame: int) -> list[Frame]:
    """A call cut into its frames."""
    where = call.tags.get("coordinates", arange(0).expand(call.k.shape[1], 0))
    parts = [slice(n, n + frame) for n in range(0, call.k.shape[1], frame)]
    return [Frame(call.k[:, part], call.v[:, part], where[part]) for part in parts]


def attend(call: Call, times: list[int], seen: list[tuple[int, Frame]], rope: Rope | None, frame: int) -> Tensor:
    """What the call's queries, its frames standing at `times`, read from the frames `seen` at theirs."""

    def places(when: list[int], frames: list[Frame]) -> Tensor:
        return cat([tensor(when).repeat_interleave(frame)[:, None], cat([f.where for f in frames])], 1)

    frames = [f for _, f in seen]
    k = rotated(cat([f.k for f in frames], 1), places([t for t, _ in seen], frames), rope)
    q = rotated(call.q, places(times, frames_of(call, frame)), rope)
    return attention(q, k, cat([f.v for f in frames], 1))


def kept(end: int, window: int | None, sink: int) -> list[int]:
    """Numbers of the frames in the cache when frame `end` − 1 is its newest (section 4)."""
    return [t for t in range(end) if window is None or t < sink or t >= end - (window - sink)]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int | None = 21, sink: int = 0
) -> list[list[Tensor]]:
    """Per layer and call: a chunk attends itself both ways and what is left in the cache once it is in it."""
    outputs = []
    for calls in layers:
        done: list[Frame] = []
        out = []
        for call in calls:
            cache = done + frames_of(call, frame)
            seen = [(t, cache[t]) for t in kept(len(cache), window, sink)]
            out.append(attend(call, list(range(len(done), len(cache))), seen, rope, frame))
            done = cache if call.commit else done
        outputs.append(out)
    return outputs


def block_causal(layers: list[list[Call]], rope: Rope | None, *, frame: int) -> list[list[Tensor]]:
    """The same without a window, as one dense pass under a mask: a token sees its chunk and those before it.

    Every call is committed.
    """
    outputs = []
    for calls in layers:
        every = [f for call in calls for f in frames_of(call, frame)]
        where = cat([arange(len(every)).repeat_interleave(frame)[:, None], cat([f.where for f in every])], 1)
        q, k = rotated(cat([c.q for c in calls], 1), where, rope), rotated(cat([f.k for f in every], 1), where, rope)
        sizes = [call.q.shape[1] for call in calls]
        chunk = arange(len(calls)).repeat_interleave(tensor(sizes))
        bias = q.new_zeros(len(chunk), len(chunk)).masked_fill(chunk[:, None] < chunk, float("-inf"))
        out = attention(q, k, cat([f.v for f in every], 1), bias.expand(q.shape[0], -1, -1))
        outputs.append(list(out.split(sizes, 1)))
    return outputs
