"""Deep Forcing: half of the window is sink and moves along; of what is old, recent queries choose what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..memory import EMPTY, Evict, Geometry, Memory, Place, Places, View
from .registry import register


@dataclass(frozen=True)
class Participative(Evict):
    """When more than `window` frames would be held, `capacity` frames stay: sinks, recent ones, and the most used.

    Used most are the tokens with the largest logits against the queries of the last `recent` frames, summed over
    heads, and over queries ("sum") or their maximum ("max"). Decided in each layer for itself. reuse: how often a token
    may be chosen; 0 is without a bound.
    """

    window: int
    capacity: int
    recent: int
    fusion: Literal["sum", "max"]
    reuse: int
    content: ClassVar[bool] = True

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        batch, count = geometry.batch, self.recent * frame
        axes = max(0 if rope is None else rope.coordinates for rope in geometry.rope)
        return {
            "queries": torch.zeros(batch, geometry.heads, count, geometry.head_dim, dtype=geometry.dtype),
            "coordinates": torch.zeros(batch, count, axes, dtype=torch.int64),
            "used": torch.zeros(batch, 0, dtype=torch.int64),
        }

    def arrive(self, view: View) -> None:
        view.mine["queries"], view.mine["coordinates"] = self.voters(view)

    def voters(self, view: View) -> tuple[Tensor, Tensor]:
        """The queries of the last frames, un-rotated [B, H_q, r, D], and their coordinates [B, r, axes]."""
        old, places = view.mine["queries"], view.mine["coordinates"]
        assert view.query is not None
        batch, count, axes = places.shape
        given = view.fresh_tags.get("coordinates")
        fresh = places.new_zeros(batch, view.m, axes) if given is None else given[..., :axes].expand(batch, -1, -1)
        real = view.stream.diff(append=(view.consumed + view.coming)[:, None]) > 0  # padding stands where the next does
        order = pad(real, (count, 0), value=True).to(torch.uint8).argsort(dim=-1, stable=True)[:, -count:]
        order = order.expand(batch, -1)
        every = torch.cat([old, view.query], 2)
        return (
            every.gather(2, order[:, None, :, None].expand(-1, every.shape[1], -1, every.shape[3])),
            torch.cat([places, fresh], 1).gather(1, order[..., None].expand(-1, -1, axes)),
        )

    def scores(self, view: View) -> Tensor:
        """How much recent queries would use each column, [B, n]: up to a factor, the card's sum of logits."""
        queries, coordinates = self.voters(view)
        count = queries.shape[2]
        end = view.consumed + view.coming
        times = (end[:, None] - count + torch.arange(count, device=end.device)) // view.frame
        times = times.expand(len(coordinates), -1)[..., None]
        where = torch.cat([times, coordinates], -1) if coordinates.shape[-1] else times[..., 0]
        turned = view.turned(queries, where[:, None])
        keys = view.turned(view.keys, view.index // view.frame)
        wide = torch.promote_types(keys.dtype, torch.float32)
        turned, keys = turned.to(wide).unflatten(1, (keys.shape[1], -1)).sum(2), keys.to(wide)
        if self.fusion == "sum":
            return (turned.sum(2)[:, :, None] * keys).sum((1, 3))
        return torch.einsum("bhrd,bhnd->brn", turned, keys).amax(1)

    def keep(self, view: View) -> Tensor | None:
        frame, there = view.frame, view.index != EMPTY
        full = there.sum(-1)[:, 0] > self.window * frame
        if not bool((full & (view.coming > 0)).any()):
            return None
        last = torch.maximum(view.coming, torch.full_like(view.coming, self.recent * frame))
        stays = view.pinned | (view.index >= (view.consumed + view.coming - last)[:, None, None])
        width = view.index.shape[-1] - view.m
        used = pad(view.mine["used"], (0, width - view.mine["used"].shape[1]))
        free = (there & ~stays)[:, 0]
        if self.reuse:
            free = free & pad(used < self.reuse, (0, view.m))
        phi = self.scores(view).masked_fill(~free, -torch.inf)
        rank = phi.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        room = (self.capacity * frame - view.sink - last).clamp_min(0)
        chosen = free & (rank < room[:, None])
        full = full[:, None].expand(len(chosen), 1)
        view.mine["used"] = torch.where(full, (used + 1) * chosen[:, :width], used)
        return (~full | chosen)[:, None] | stays

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return sink + slots + max(window or 0, m)


@dataclass(frozen=True)
class Realigned(Place):
    """Frames stand at their times; sinks directly before the others of the last compression, and there until the next.

    Remembered is by how many frames the first sink is behind the next fresh frame.
    """

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"behind": torch.zeros(geometry.batch, dtype=torch.int64)}

    def positions(self, view: View) -> Places:
        frame, now = view.frame, view.consumed // view.frame
        held = (view.index[..., view.sink :] != EMPTY).sum(-1)[:, 0] // frame
        behind = torch.where(view.left, held + view.sink // frame, view.mine["behind"])
        view.mine["behind"] = behind + view.coming // frame
        keys = torch.where(
            view.column < view.sink, view.column // frame + (now - behind)[:, None, None], view.index // frame
        )
        return Places(keys, view.stream // frame)


@register(
    "deep-forcing",
    paper="Deep Forcing: Training-Free Long Video Generation with Deep Sink and Participative Compression, ICML 2026, "
    "arXiv 2512.05081",
    claims=("deep-forcing",),
)
def deep_forcing(
    *, window: int = 21, capacity: int = 16, sink: int = 10, recent: int = 4, fusion: Literal["sum", "max"] = "sum",
    reuse: int = 7, chunk: int = 3, frame: int | None = None,
) -> Memory:  # fmt: skip
    """Up to `window` frames; a chunk that would exceed them leaves `capacity`: `sink`, the most used tokens, `recent`.

    Compression happens at a chunk's first pass and holds for the chunk. The last `recent` frames vote, the chunk itself
    among them with the noisy queries of that pass: φ of a token is its logit against them, summed over heads and queries
    (section on participative compression), rotated at their times, so that distance counts. Each layer keeps tokens of
    its own, the most used of what is neither sink nor recent, until one has been chosen `reuse` times (the released
    code's bound; 0 is none). A chunk longer than `recent` stays whole.

    The sink, about half of the window, moves with time: at each compression to where it ends directly before what else
    is kept (deep sink, the code's formula), and it stands there until the next. Keys are kept un-rotated and placed when
    they are read, which is the released code's rotation in place without its rounding. As in that code the other tokens
    stay at their own times; the paper tells of unifying those of the chosen ones, but no formula was found.

    The released code appends the queries of every pass to the voters, so that more or noisier passes push the clean
    ones out; here those of kept passes vote, and of the chunk's first pass. The same with its 4 frames and chunks of 3.
    """
    if not 0 < sink + recent <= capacity <= window or sink < 0 or recent < 1:
        raise ValueError(
            f"sink {sink} + recent {recent} frames must fit into capacity {capacity}, and that into window {window}"
        )
    if fusion not in ("sum", "max"):
        raise ValueError(f"fusion is {fusion!r}; it must be 'sum' or 'max'")
    if reuse < 0:
        raise ValueError(f"reuse is {reuse}; it must be 0 (no bound) or more")
    if window == sink:
        raise ValueError(f"window is {window}, and all of it sink; it must be larger")
    return Memory(
        sink=sink, window=window - sink, evict=Participative(window, capacity, recent, fusion, reuse), place=Realigned(),
        frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
