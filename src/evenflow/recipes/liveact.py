"""LiveAct: a fixed number of latents in which the past is convolved into two, one copy a denoising step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..memory import EMPTY, Contiguous, Fold, Memory, Oldest, View
from ..memory.arena import gathered
from .registry import register

STRIDE = 5


@dataclass(frozen=True)
class Convolved(Fold):
    """What leaves and what was folded before become `frames` frames again: a convolution of kernel and stride 5.

    weights: float [layers, 5], one kernel a layer; None: the mean, 1/5 each. grouping: "temporal" convolves five frames
    at each place, "raster" five neighbouring tokens of the frames laid end to end, as the released weights expect.
    """

    frames: int
    weights: Tensor | None
    grouping: Literal["temporal", "raster"]
    from_start: ClassVar[bool] = True

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
        order = torch.where(gone, view.order(), torch.iinfo(torch.int64).max)
        columns = order.argsort(dim=-1, stable=True)[..., :wanted]
        into = torch.arange(view.sink, view.sink + view.slots, device=columns.device)
        new = []
        for x in (view.keys, view.values):
            folded = self.convolved(gathered(x, columns), view)
            stays = ~some.any(1)[:, None, None, None]
            new.append(torch.where(stays, gathered(x, into), folded))
        view.write(into, *new, index=torch.where(some[..., None], -1, gathered(view.index, into)))

    def convolved(self, x: Tensor, view: View) -> Tensor:
        """x [B, H, 5 n, D] → [B, H, n, D]."""
        kernel = x.new_full((STRIDE,), 1 / STRIDE) if self.weights is None else self.weights[view.layer].to(x)
        if self.grouping == "raster":
            return (x.unflatten(2, (-1, STRIDE)) * kernel[:, None]).sum(3)
        frames = x.unflatten(2, (self.frames, STRIDE, view.frame))
        return (frames * kernel[:, None, None]).sum(3).flatten(2, 3)


@register(
    "liveact",
    paper="SoulX-LiveAct: Towards Hour-Scale Real-Time Human Animation with Neighbor Forcing and ConvKV Memory, "
    "arXiv 2603.11746",
    claims=("liveact",),
)
def liveact(
    *, steps: int = 3, sink: int = 2, memory: int = 2, short: int = 2, weights: Tensor | None = None,
    grouping: Literal["temporal", "raster"] = "temporal", frame: int | None = None,
) -> Memory:  # fmt: skip
    """`sink` anchor latents, `memory` ones that hold the convolved past, `short` recent ones, and the block in the making.

    There is one copy for each of `steps` denoising steps (`step(row=i)`): a block at step i attends what earlier blocks
    were at step i ("neighbor forcing"), so every pass is kept and there is no clean pass. The first block has six
    latents (anchors, the first memory, the short-term ones), later ones eight, four for each of `memory`. Before a
    block is written, the old memory and what leaves, ten latents, are convolved five to one; an event's weight so
    decays by 1/5 a block. Keys are kept un-rotated and stand at slots 0..13 whatever their age.

    weights: the kernels that training learned, float [layers, 5], for keys and for values, as the released code has it
    (the paper gives values their own); None is its mean_memory mode, without training. grouping: see `Convolved`; the
    paper reads as "temporal", the released code convolves in "raster" order.
    """
    if grouping not in ("temporal", "raster"):
        raise ValueError(f"grouping is {grouping!r}; it must be 'temporal' or 'raster'")
    for name, value, least in (("sink", sink, 0), ("memory", memory, 1), ("short", short, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    return Memory(
        sink=sink, window=short, evict=Oldest(), fold=Convolved(memory, weights, grouping), place=Contiguous(), rows=steps,
        inside="both", frame=frame, chunk=sink + memory + short,
    )  # fmt: skip
