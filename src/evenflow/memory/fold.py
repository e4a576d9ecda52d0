"""Answers to *fold*: what becomes of what leaves?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .arena import gathered
from .evict import Oldest
from .verbs import Fold
from .view import EMPTY, FAR, FOLDED, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory

STRIDE = 5  # tokens that `Convolved` makes one of


@dataclass(frozen=True)
class Dropped(Fold):
    """What leaves is gone: nothing beyond sinks and window is remembered."""

    cut_free: ClassVar[bool] = True


@dataclass(frozen=True)
class Averaged(Fold):
    """A token that leaves is averaged, un-rotated, into the sink token at its place in the stream modulo the sinks.

    alpha: what the sink keeps of itself each time. Half-precision memories carry what rounding took off the sink in
    float32: a step of 0.001 is below the resolution of bfloat16, and the sink would never move. Source: the EMA sink of
    Reward Forcing, arXiv 2512.04678.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it is the share that a sink keeps, from 0 to 1")

    def suits(self, memory: Memory) -> None:
        if memory.sink < 1:
            raise ValueError(f"sink is {memory.sink}; what leaves is averaged into it, so it must be 1 or more")
        if not memory.evict.in_order:
            raise ValueError(
                f"evict is {type(memory.evict).__name__}; what leaves has a place in the sinks by its order, so take Oldest"
            )

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        if geometry.dtype.itemsize > 2:
            return {}
        shape = geometry.batch, geometry.kv_heads, 0
        return {
            "keys": torch.zeros(*shape, geometry.head_dim, dtype=torch.float32),
            "values": torch.zeros(*shape, geometry.value_dim, dtype=torch.float32),
        }

    def leave(self, view: View, leaving: Tensor) -> None:
        behind = view.consumed + view.coming - view.consumed.clamp_min(view.sink)
        if view.window is not None and bool((behind > view.window).any()):
            raise ValueError(
                f"a step brings {view.m // view.frame} frames, more than the {view.window // view.frame} that the window "
                "has beside the sink, so that some would be folded unseen; feed shorter steps"
            )
        most = int(leaving.sum(-1).max())
        if not most:
            return
        # Oldest first. What leaves is one stretch of the stream, so that any `sink` neighbours have places of their own.
        assert view.stored is not None  # as it came: keys of such a fold lie un-rotated
        slots = view.stored[0].shape[2]
        columns = torch.where(leaving, view.index, FAR)[..., :slots].argsort(-1)[..., :most]
        index = gathered(view.index, columns)
        there = gathered(leaving, columns)
        place = (index[..., :1] + torch.arange(most, device=index.device)) % view.sink
        into = torch.arange(view.sink, device=index.device)
        folded = torch.zeros_like(view.index[..., : view.sink], dtype=torch.bool)
        made = {}
        for name, x in zip(("keys", "values"), view.stored, strict=True):
            sink, gone = x[:, :, : view.sink], gathered(x, columns)
            if name in view.mine:
                lost = view.mine[name]
                sink, gone = sink.float() + (lost if lost.shape[2] else 0), gone.float()
            for start in range(0, most, view.sink):
                part = slice(start, start + view.sink)
                at = place[..., part]
                old = gathered(sink, at)
                new = torch.where(there[..., part, None], self.alpha * old + (1 - self.alpha) * gone[:, :, part], old)
                sink = sink.scatter(2, at[..., None].expand_as(new), new)
                folded = folded.scatter(2, at, gathered(folded, at) | there[..., part])
            made[name] = sink.to(x.dtype)
            if name in view.mine:
                view.mine[name] = sink - made[name].float()
        # Where nothing was folded, the sink's own token.
        token = torch.where(into < (view.consumed + view.coming)[:, None, None], into, EMPTY)
        folded = folded | (view.index[..., : view.sink] == FOLDED)
        view.write(into, made["keys"], made["values"], index=torch.where(folded, FOLDED, token))


@dataclass(frozen=True)
class Convolved(Fold):
    """What leaves and what was folded before become `frames` frames again: a convolution of kernel and stride 5.

    weights: float [layers, 5], one kernel a layer; None: the mean, 1/5 each. grouping: "temporal" convolves five frames
    at each place, "raster" five neighbouring tokens of the frames laid end to end. The first `frames` frames behind the
    sinks are the first memory; from the second step on, what leaves must be 4 · `frames` frames at once. Source: ConvKV
    memory of SoulX-LiveAct, arXiv 2603.11746.
    """

    frames: int
    weights: Tensor | None = None
    grouping: Literal["temporal", "raster"] = "temporal"
    from_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames is {self.frames}; the memory must be 1 frame or more")
        if self.grouping not in ("temporal", "raster"):
            raise ValueError(f"grouping is {self.grouping!r}; it must be 'temporal' or 'raster'")

    def suits(self, memory: Memory) -> None:
        if not isinstance(memory.evict, Oldest) or memory.window is None or memory.inside == "causal":
            raise ValueError(
                "what is convolved leaves chunk by chunk: take Oldest to evict, a window, and inside='both'"
            )
        if memory.evict.with_fresh and memory.window < (STRIDE - 1) * self.frames:
            raise ValueError(
                f"window is {memory.window}, the fresh frames among them; what is convolved at once, "
                f"{(STRIDE - 1) * self.frames} frames, must fit into it"
            )

    def serves(self, geometry: Geometry) -> None:
        if self.weights is not None and tuple(self.weights.shape) != (geometry.layers, STRIDE):
            raise ValueError(f"weights have shape {tuple(self.weights.shape)}; expected {(geometry.layers, STRIDE)}")

    def slots(self, frame: int) -> int:
        return self.frames * frame

    def leave(self, view: View, leaving: Tensor) -> None:
        wanted = STRIDE * view.slots
        gone = leaving | ((view.column >= view.sink) & (view.column < view.sink + view.slots) & (view.index != EMPTY))
        count = gone.sum(-1)
        some = leaving.any(-1)
        if not bool(some.any()):
            return
        if bool((some & (count != wanted)).any()):
            raise ValueError(
                f"{int(count.max())} tokens would be folded, {wanted} can be: after the first step, steps bring "
                f"{(STRIDE - 1) * self.frames} frames of {view.frame} tokens"
            )
        assert view.stored is not None  # as it came: keys of such a fold lie un-rotated
        order = torch.where(gone, view.order(), FAR)[..., : view.stored[0].shape[2]]
        columns = order.argsort(dim=-1, stable=True)[..., :wanted]
        into = torch.arange(view.sink, view.sink + view.slots, device=columns.device)
        new = []
        for x in view.stored:
            folded = self.convolved(gathered(x, columns), view)
            stays = ~some.any(1)[:, None, None, None]
            new.append(torch.where(stays, gathered(x, into), folded))
        view.write(into, *new, index=torch.where(some[..., None], FOLDED, gathered(view.index, into)))

    def convolved(self, x: Tensor, view: View) -> Tensor:
        """x [B, H, 5 n, D] → [B, H, n, D]."""
        kernel = x.new_full((STRIDE,), 1 / STRIDE) if self.weights is None else self.weights[view.layer].to(x)
        if self.grouping == "raster":
            return (x.unflatten(2, (-1, STRIDE)) * kernel[:, None]).sum(3)
        frames = x.unflatten(2, (self.frames, STRIDE, view.frame))
        return (frames * kernel[:, None, None]).sum(3).flatten(2, 3)
