"""Forcing-KV: heads that look at the last frame keep only that; the others also what changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import Absolute, Evict, Memory, View
from ..memory.arena import gathered
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


def check_segments(frame: int, segments: int) -> None:
    """Raises ValueError for frames that cannot be cut into equal segments."""
    if frame % segments:
        raise ValueError(f"a frame of {frame} tokens cannot be cut into {segments} equal segments")


@dataclass(frozen=True)
class ByHeadGroup(Evict):
    """Static heads keep the last frames, dynamic ones also the segments least like the same segment a frame later.

    After every chunk of C frames, the C frames before the `recent` last are candidates, cut into `segments` each; as many
    of the least similar as fill `memory` frames stay, in place of those that stayed before. They are chosen in the first
    layer that has dynamic heads, for each row; all later layers follow.
    """

    static: Heads
    recent: int
    static_recent: int
    memory: int
    segments: int
    start: int
    content: ClassVar[bool] = True

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return None if window is None else sink + window + m

    def dynamic(self, view: View) -> Tensor:
        """Bool [H_kv]: the heads of this layer that are split off as dynamic."""
        alike = torch.ones(view.geometry.kv_heads, dtype=torch.bool, device=view.index.device)
        if view.layer == 0:
            return ~alike
        alike[list(self.static[view.layer]) if view.layer < len(self.static) else []] = False
        return alike

    def keep(self, view: View) -> Tensor:
        check_segments(view.frame, self.segments)
        stays = view.pinned | view.fresh
        if view.recache:
            return stays
        dynamic, now = self.dynamic(view), view.consumed[:, None, None]
        age = now // view.frame - view.index // view.frame  # 1 for the last frame
        split = (now >= (self.start + 1) * view.m) & (view.layer > 0)
        group = torch.where(dynamic, self.recent, self.static_recent)[:, None]
        last = torch.where(split, group, max(self.recent, self.static_recent))
        stays = stays | (view.held & (age <= last))
        if not dynamic.any():
            return stays
        chosen = view.shared.get(ByHeadGroup)
        if chosen is None:
            chosen = view.shared[ByHeadGroup] = self.choose(view, dynamic)
        first = now - view.m - self.recent * view.frame  # stream index where the candidates begin
        segment = (view.index - first) // (view.frame // self.segments)
        inside = view.held & (segment >= 0) & (segment < chosen.shape[-1]) & dynamic[:, None]
        wanted = chosen[:, None].expand(-1, inside.shape[1], -1)
        return stays | (inside & wanted.gather(-1, segment.where(inside, 0).expand(len(wanted), -1, -1)))

    def choose(self, view: View, dynamic: Tensor) -> Tensor:
        """Bool [B, segments of all candidates]: which ones stay. None of a row whose chain of frames is not complete."""
        rows, heads = view.batch, view.geometry.kv_heads
        length = view.m + view.frame  # candidates and the frame after them
        first = view.consumed - view.m - self.recent * view.frame
        chain = (first[:, None] + torch.arange(length, device=first.device))[:, None].expand(rows, heads, -1)
        index, order = view.index.expand(rows, heads, -1).sort(-1)
        at = torch.searchsorted(index, chain.contiguous()).clamp_max(index.shape[-1] - 1)
        found = (index.gather(-1, at) == chain) | ~dynamic[:, None]
        complete = found.all(-1).all(-1) & (view.consumed >= (self.start + 2) * view.m)
        keys = gathered(view.turned(view.keys, view.index // view.frame), order.gather(-1, at))[:, dynamic]
        keys = keys if keys.dtype == torch.float64 else keys.float()
        joined = keys.movedim(1, 2).flatten(2).unflatten(1, (-1, view.frame))  # [B, frames, frame, heads · D]
        alike = torch.cosine_similarity(joined[:, :-1], joined[:, 1:], dim=-1)
        score = alike.unflatten(2, (self.segments, -1)).mean(-1).flatten(1)
        rank = score.argsort(dim=-1, stable=True).argsort(-1)
        return (rank < self.memory * self.segments) & complete[:, None]


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
    if frame is not None:
        check_segments(frame, segments)
    return Memory(
        sink=sink, window=max(recent, static_recent) + memory, frame=frame, chunk=chunk, inside="both", place=Absolute(),
        evict=ByHeadGroup(static, recent, static_recent, memory, segments, start),
    )  # fmt: skip
