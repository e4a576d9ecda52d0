"""Hybrid Forcing: a short window read sparsely, and a linear-attention state of everything that left it."""

from __future__ import annotations

from torch import Tensor

from ..memory import BestBlocks, Clipped, LinearState, Memory, Oldest
from .registry import register


@register(
    "hybrid-forcing",
    paper="Long-Horizon Streaming Video Generation via Hybrid Attention with Decoupled Distillation, arXiv 2604.10103",
    claims=("hybrid-forcing",),
)
def hybrid_forcing(
    *, sink: int = 3, window: int = 6, horizon: int = 21, ratio: float = 0.2, block: int = 64,
    projection: Tensor | float | None = None, raw_query: bool = False, frame: int | None = None, chunk: int = 3,
) -> Memory:  # fmt: skip
    """`sink` first frames, the last `window` with the fresh ones among them, and a linear state of all that went before.

    Attention is softmax over the best `ratio` of key blocks of `block` tokens, in token order, chosen for each block of
    queries and each head by mean rotated query and key (1: all of them); plus P(read of the state). No position reaches
    `horizon` frames, the length of training: from there on window and queries stay where they are, sinks at the start.

    projection: what training learned for P, shared by the heads of a layer: weight and, in the last column, bias,
    float [layers, D_v, D_v + 1]; or one number p for p · identity; None for zero, where training starts: then the state
    is kept, but not read. A chunk enters the state once, when it leaves the window (the sinks too, although they stay).

    Details are the official code's, as the paper's text was not to be had. Where its two files differ, this follows the
    training file: keys are kept un-rotated, and the numerator reads with rotated φ(q); `raw_query` reads with rotated q,
    as the inference file does, and may explode where φ(q) is nearly zero. The code takes away the mean over heads of
    each key before it chooses blocks, where the mean over tokens was meant, which changes no choice: nothing is taken
    away here. Of fewer than 1/ratio blocks the code keeps none, here one stays.
    """
    return Memory(
        sink=sink, window=window, frame=frame, chunk=chunk, inside="both", evict=Oldest(with_fresh=True),
        fold=LinearState(horizon, projection, raw_query), recall=BestBlocks(ratio, block), place=Clipped(horizon),
    )  # fmt: skip
