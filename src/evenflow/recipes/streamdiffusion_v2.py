"""StreamDiffusionV2: sinks that are replaced when the scene no longer looks like them, and a ring of the last frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..memory import EMPTY, Evict, Memory, Oldest, Place, Places, View
from .registry import register

FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Refreshed(Place):
    """Frames stand at their numbers, which at `t_reset` go back to `cache` − 1 and count up again; keys never move."""

    t_reset: int
    cache: int
    moves: ClassVar[bool] = False

    def at(self, frames: Tensor) -> Tensor:
        """Position of a frame by its number."""
        again = (frames - self.t_reset) % (self.t_reset - self.cache + 1) + self.cache - 1
        return torch.where(frames < self.t_reset, frames, again)

    def positions(self, view: View) -> Places:
        return Places(self.at(view.index // view.frame), self.at(view.stream // view.frame))


@dataclass(frozen=True)
class ByAge(Place):
    """Positions are places in the cache in the order of time, whatever a frame is held as."""

    def positions(self, view: View) -> Places:
        age = torch.where(view.index == EMPTY, FAR, view.index).argsort(dim=-1, stable=True).argsort(-1)
        return Places(age // view.frame, view.of_fresh(age) // view.frame)


@dataclass(frozen=True)
class LeastAlike(Evict):
    """A full cache loses its oldest ring frames, or the sink least like the fresh frame, if that is below `threshold`.

    Likeness is the mean of two cosines: of the frames' mean keys, rotated as they stand in the cache (un-rotated where
    `place` is None), and of their mean values, heads side by side. Each layer and row decides for itself.
    """

    threshold: float
    place: Refreshed | None
    content: ClassVar[bool] = True

    def keep(self, view: View) -> Tensor | None:
        first = view.column < view.sink
        held = (view.index != EMPTY) & ~view.fresh
        ring = held & ~first
        room = view.sink - (held & first).sum(-1)
        over = ring.sum(-1) + (view.coming[:, None] - room).clamp_min(0) - (view.window or 0)
        age = torch.where(ring, view.index, FAR).argsort(dim=-1, stable=True).argsort(-1)
        leaves = ring & (age < over[..., None])
        if view.m == view.frame and bool((over > 0).any()):
            alike = self.likeness(view)
            worst = first & (view.column // view.frame == alike.argmin(-1)[:, None, None])
            instead = (over > 0) & (alike.amin(-1) < self.threshold)[:, None]
            leaves = torch.where(instead[..., None], worst, leaves)
        return ~leaves

    def likeness(self, view: View) -> Tensor:
        """α of each sink frame with the fresh one, [B, sinks]; of what is not yet there, it means nothing."""
        wide = torch.promote_types(view.values.dtype, torch.float32)
        alike, keys = [], view.keys
        if self.place is not None:
            keys = view.turned(keys, self.place.at(view.index // view.frame))
        for x in (keys, view.values):
            frames = torch.cat([x[:, :, : view.sink], x[:, :, -view.m :]], 2).to(wide)
            means = frames.unflatten(2, (-1, view.frame)).mean(3).transpose(1, 2).flatten(2)
            alike.append(cosine_similarity(means[:, :-1], means[:, -1:], dim=-1))
        return (alike[0] + alike[1]) / 2

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return sink + slots + max(window or 0, m)


@register(
    "streamdiffusion-v2",
    paper="StreamDiffusionV2: A Streaming System for Dynamic and Interactive Video Generation, MLSys 2026, "
    "arXiv 2511.07399",
    claims=("streamdiffusion-v2",),
)
def streamdiffusion_v2(
    *, num_kv_cache: int = 6, sink: int = 3, threshold: float = 0.2, steps: int = 2, t_reset: int | None = 50,
    frame: int | None = None,
) -> Memory:  # fmt: skip
    """`sink` latents and the last ones, `num_kv_cache` together with the fresh one; one copy for each denoising step.

    A step brings one latent (the first one of a stream two) and sees what is in the cache with itself. In the stream
    batch row i holds the latent that arrived i calls ago at denoising step i: `step(row=None)` with the queries of all
    copies, and a mask where a row has no latent yet; there is no clean pass. Row 0 alone is the mode without batch,
    where all passes of a latent but the last have commit=False. The first chunk is kept in all copies as its last pass
    made it.

    A full cache gives the slot of its oldest ring latent to the fresh one. But if a sink's likeness α to a single fresh
    latent is below `threshold`, the least alike sink leaves instead, and the ring goes on where it was (−1: never). α
    of keys and values, see `LeastAlike`. Positions are the latent's number, set back to num_kv_cache − 1 at t_reset,
    while cached keys keep theirs (RoPE refresh); t_reset=None instead places everything by its age in the cache, which
    has no jump.

    Two slips of the official code are not repeated: an empty sink slot counts there as unlike and queues a spurious
    replacement, and without batch the passes of the latent that fills the cache fall into different slots. Whether the
    number is set back again and again, or once, is not said; here every t_reset − num_kv_cache + 1 latents.
    """
    if not 0 <= sink < num_kv_cache:
        raise ValueError(f"sink is {sink}; it must be 0 or more, and less than num_kv_cache, {num_kv_cache}")
    if not -1 <= threshold <= 1 or (threshold > -1 and not sink):
        raise ValueError(
            f"threshold is {threshold}; it is a cosine from -1 (off) to 1, and without a sink it must be -1"
        )
    if t_reset is not None and t_reset < num_kv_cache:
        raise ValueError(f"t_reset is {t_reset}; it must be at least num_kv_cache, {num_kv_cache}, or None")
    place = None if t_reset is None else Refreshed(t_reset, num_kv_cache)
    return Memory(
        sink=sink, window=num_kv_cache - sink, place=place or ByAge(), rows=steps, inside="both", frame=frame, chunk=2,
        evict=LeastAlike(threshold, place) if threshold > -1 else Oldest(with_fresh=True),
    )  # fmt: skip
