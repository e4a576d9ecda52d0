"""Forcing-KV: heads that look at the last frame keep only that; the others also what changed since."""

from __future__ import annotations

from torch import Tensor

from ..memory import Absolute, ByHeadGroup, Memory
from .registry import register

Heads = tuple[tuple[int, ...], ...]


def static_heads(mass: Tensor, *, threshold: float = 0.8, last: int = 4, skip: int = 1) -> Heads:
    """The heads that attend little but the last frames, by layer: what `forcing_kv` takes as `static`.

    mass: attention of a late chunk of the whole model, float [layers, heads, query frames, key frames]. A head is static
    when its last `last` key frames (the chunk's own, and one before) have a share of `threshold` in all but the first
    `skip`, the sinks. Source: the paper's offline profile; its script skips 1 frame, its tables say 3.
    """
    share = mass[..., -last:].sum((-2, -1)) / mass[..., skip:].sum((-2, -1))
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in share >= threshold)


@register(
    "forcing-kv",
    paper="Forcing-KV: Hybrid KV Cache Compression for Efficient Autoregressive Video Diffusion Models, arXiv 2605.09681",
    claims=("forcing-kv",),
)
def forcing_kv(
    *, static: Heads = (), sink: int = 1, recent: int = 1, static_recent: int = 1, memory: int = 1, segments: int = 6,
    start: int = 1, frame: int | None = None, chunk: int = 3,
) -> Memory:  # fmt: skip
    """First and last frame in every head, and in dynamic heads the segments of the last chunk that changed most.

    static: by layer, the key heads that are static, as `static_heads` finds them for a model's weights; all others are
    dynamic, but in layer 0, which has no memory. Frames held: `sink`, `recent` (static heads `static_recent`), and
    in dynamic heads `memory` of them in pieces, of which a frame has `segments` (rows of the picture). start: the last
    chunk of the un-split beginning (1 for Self-Forcing, 2 for LongLive); the memory fills with the second chunk after it.

    The paper's retention ratio is memory / chunk = 0.33. Similarity is that of rotated keys, all dynamic heads of a token
    joined, one frame apart. After a prompt switch, `recache` the last frame: memory and recent frames start anew.

    The official code chooses for the first row of a batch and applies it to all; here every row has its own choice, kept
    in the stream's state and not in the module's. It prunes at the end of a chunk's clean pass, this at the beginning
    of the next chunk, which is the same for all that attend. If layer 1 has no dynamic head, the next that has one chooses.
    """
    return Memory(
        sink=sink, window=max(recent, static_recent) + memory, frame=frame, chunk=chunk, inside="both", place=Absolute(),
        evict=ByHeadGroup(static, recent, static_recent, segments, start),
    )  # fmt: skip
