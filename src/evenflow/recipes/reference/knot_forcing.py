"""Knot Forcing (arXiv 2512.21734), its memory: a reference image that runs ahead, and the last clean frames."""

from __future__ import annotations

from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


def advanced(n: int, i: int, chunk: int, knot: int, stride: int) -> int:
    """Where the reference stands while the chunk that starts at frame i is made: one step further at most (section 4)."""
    return n + stride if i + chunk + knot > n else n


def border(held: int, chunk: int) -> float:
    """Overlap of what the last frame of a chunk and the first of the next attend, of `held` frames and the chunk."""
    length = held + chunk
    return (length - chunk) / (length + chunk)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 18, chunk: int = 3, knot: int = 1,
    stride: int = 4, start: int = 8,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; the first call is the reference image, one frame. Denoising calls bring chunk + knot frames."""
    outputs = []
    for calls in layers:
        anchor: list[Frame] = []
        clean: list[tuple[int, Frame]] = []
        done, at, checked = 0, start, -1
        out = []
        for call in calls:
            fresh = frames_of(call, frame)
            if not anchor:
                seen = [(at, fresh[0])]
                out.append(attend(call, [at], seen, rope, frame))
                anchor = fresh if call.commit else []
                continue
            if checked < done:  # before the chunk's first call
                at, checked = advanced(at, done, chunk, knot, stride), done
            here = list(range(done, done + len(fresh)))
            seen = [(at, anchor[0]), *clean[max(len(clean) - window, 0) :], *zip(here, fresh, strict=True)]
            out.append(attend(call, here, seen, rope, frame))
            if call.commit:
                clean += list(zip(here, fresh, strict=True))
                done += len(fresh)
        outputs.append(out)
    return outputs
