"""LiveAct: a fixed number of latents in which the past is convolved into two, one copy a denoising step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..memory import Contiguous, Convolved, Memory, Oldest
from .registry import register


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
    if short < 1:
        raise ValueError(f"short is {short}; it must be 1 latent or more")
    return Memory(
        sink=sink, window=short, evict=Oldest(), fold=Convolved(memory, weights, grouping), place=Contiguous(), rows=steps,
        inside="both", frame=frame, chunk=sink + memory + short,
    )  # fmt: skip
