"""How much of the tiny model's decode step goes into memory bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import evenflow as ef

from . import rivals
from .timing import interleaved

OURS, BARE, DYNAMIC = "evenflow streaming-llm", "same model, bare buffers", "transformers DynamicCache"


def measure(
    *, model: str = "tiny", length: int = 256, rounds: int = 2000, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The share of a step that the same model does not need over buffers in which no book is kept."""
    say("bookkeeping: timing")
    network = ef.open(model, batch=1).model
    prompt = torch.randint(0, network.config.vocab_size, (1, 2 * length))
    token = torch.randint(0, network.config.vocab_size, (1, 1))
    reads = {
        OURS: rivals.evenflow(network, f"streaming-llm(sink=4, window={length - 4})", prompt),
        BARE: rivals.bare(network, length + 1),
        DYNAMIC: rivals.dynamic(network, prompt[:, :length]),
    }
    seconds = interleaved({name: (lambda read=read: read(token)) for name, read in reads.items()}, rounds, warmup=50)
    shares = [1 - bare / ours for ours, bare in zip(seconds[OURS], seconds[BARE], strict=True)]
    return {
        "title": f"Decode step of {model}, cache {length}",
        "milliseconds": {name: 1e3 * median(times) for name, times in seconds.items()},
        "share of bookkeeping": median(shares),
    }
