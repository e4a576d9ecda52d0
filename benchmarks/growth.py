"""What a token costs, in time and in bytes held, the further a stream goes."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

import evenflow as ef

MEMORIES = ("full", "streaming-llm(sink=4, window=252)")


def measure(
    *, model: str = "tiny", places: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16_384, 32_768), steps: int = 50,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of one decode step and bytes held, at each of `places` in the stream; memories take turns."""
    network = ef.open(model, batch=1).model
    streams = {memory: ef.open(network, memory, batch=1) for memory in MEMORIES}
    milliseconds: dict[str, list[float]] = {memory: [] for memory in MEMORIES}
    held: dict[str, list[int]] = {memory: [] for memory in MEMORIES}
    token = torch.randint(0, network.config.vocab_size, (1, 1))
    for place in places:
        say(f"growth: position {place}")
        for stream in streams.values():
            stream.consume(torch.randint(0, network.config.vocab_size, (1, place - stream.position)))
        seconds: dict[str, list[float]] = {memory: [] for memory in MEMORIES}
        for _ in range(steps):
            for memory, stream in streams.items():
                start = perf_counter()
                stream.feed(token)
                seconds[memory].append(perf_counter() - start)
        for memory, stream in streams.items():
            milliseconds[memory].append(1e3 * median(seconds[memory]))
            held[memory].append(stream.nbytes)
    return {
        "title": f"A decode step of {model}, by stream position",
        "position": list(places),
        "milliseconds": milliseconds,
        "bytes": held,
    }
