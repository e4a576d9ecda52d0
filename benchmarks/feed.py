"""Tokens a second when a long text is read in pieces, by the size of the pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import evenflow as ef

from .timing import interleaved

SIZES = (1, 8, 32, 128, 512, 2048)


def measure(
    *, model: str = "tiny", length: int = 256, rounds: int = 15, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The same stream position and the same tokens for every size; only how they are cut differs."""
    say("feed: timing")
    network = ef.open(model, batch=1).model
    streams = {size: ef.open(network, f"streaming-llm(sink=4, window={length - 4})", batch=1) for size in SIZES}
    ids = torch.randint(0, network.config.vocab_size, (1, max(SIZES)))
    for stream in streams.values():
        stream.consume(ids)
    # Small pieces are repeated, so that no call is too short to time.
    repeats = {size: max(1, 64 // size) for size in SIZES}

    def read(size: int) -> None:
        for _ in range(repeats[size]):
            streams[size].feed(ids[:, :size])

    seconds = interleaved({str(size): partial(read, size) for size in SIZES}, rounds)
    return {
        "title": f"Reading through {model}, cache {length}",
        "tokens a second by tokens a feed": {
            str(size): size * repeats[size] / median(seconds[str(size)]) for size in SIZES
        },
    }
