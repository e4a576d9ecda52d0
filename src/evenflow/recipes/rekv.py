"""ReKV: a window that reads a stream, all of it off the device, and for each question the frames that it needs."""

from __future__ import annotations

from ..memory import DistanceCeiling, Memory, Oldest, Spilled, TopBlocks
from .registry import register


@register(
    "rekv",
    paper="Streaming Video Question-Answering with In-context Video KV-Cache Retrieval, ICLR 2025, arXiv 2503.00540",
    claims=("rekv", "recall-trained"),
)
def rekv(
    *, n_init: int = 14, n_local: int = 15_000, retrieve_size: int = 64, chunk_size: int = 1, frame: int = 196,
    ram_bytes: int = 32_000_000_000, disk: str | None = None, disk_bytes: int | None = None,
    device_bytes: int = 1_500_000_000,
) -> Memory:  # fmt: skip
    """A window of `n_local` tokens reads; every frame is kept in RAM or on disk, and a question reads the best few of them.

    Reading: a token attends the last `n_local` tokens, itself among them, and once these no longer reach back
    to the start, the first `n_init` (the prompt) at the constant distance n_local − 1. The rule is one per token, so any
    cut gives the same. Each complete frame of `frame` tokens is copied off the device un-rotated, with its mean key.

    A question (`state.question()`, or `stream.question(text)` of a model) selects in every layer, by the product
    of its mean query over all heads with the mean keys, the `retrieve_size` best frames, `chunk_size` neighbours at a time,
    fewer if there are fewer. It attends the prompt, these in the order of time, and itself. What is said next stands
    directly behind them, as if the frames had followed each other; what is longer than the window is read through it.
    The window is not seen unless its frames are among the best. The stream never learns of any of it.

    ram_bytes, disk, disk_bytes: how much RAM, and which folder, take the frames: 2 · layers · key heads · head_dim · frame
    numbers each, 11 MB for a 7B model. What they cannot take is lost, oldest first, with a warning. device_bytes: for
    frames that questions brought back, so that the next one need not (128 a layer in the released code). The mean keys are
    in RAM too: the device holds the same at any age, and each layer of a question waits for a product on the host.

    As in the released code, scores are plain products (the paper says cosine); frames with large keys may be preferred. Ours:
    frames are copied as soon as they are complete, not only once the window has overflowed, and a last frame that is not
    complete can be selected too; the answer slides as the reading does, by the place of a token (the release trims its
    cache). The external retriever (SigLIP embeddings) is no matter of this memory.
    """
    if n_local < 2 or max(n_init + 1, frame) > n_local:
        raise ValueError(f"n_local is {n_local}; the window holds more than n_init, {n_init}, and a frame of {frame}")
    return Memory(
        sink=n_init, window=n_local - 1, evict=Oldest(), place=DistanceCeiling(n_local),
        fold=Spilled(frame, ram_bytes, disk, disk_bytes, device_bytes),
        recall=TopBlocks(retrieve_size, chunk_size, DistanceCeiling(n_local, packed=True)),
    )  # fmt: skip
