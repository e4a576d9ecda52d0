"""One decode step of a 12-layer, 768-wide Llama at a full cache of 4096, against all one would use instead."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from . import rivals
from .timing import interleaved, multiplying, ratio, reading

OURS = "evenflow streaming-llm"
# What our ratio has to be at full size, at most.
WANTED = {"transformers DynamicCache": 0.6, "floor": 1.25, "recomputation": 1 / 80}
BYTES, PRODUCT = "reading as many bytes as the cache has", "a product of two 1024 × 1024 matrices"


def measure(
    *, length: int = 4096, layers: int = 12, rounds: int = 25, recomputed: int = 3, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Milliseconds of each, our ratio to each, and to the floor.

    floor: a step of the model without any cache, plus the bytes of the cache ÷ the bandwidth measured in the same
    rounds. roofline: bytes of weights and cache ÷ that bandwidth, plus nothing.
    """
    model = rivals.llama(layers=layers)
    sink, window = 4, length - 4
    torch.manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (1, length + 8))
    token = torch.randint(0, model.config.vocab_size, (1, 1))
    config = model.config
    cache_bytes = length * 2 * config.num_key_value_heads * config.head_dim * layers * 4
    weight_bytes = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    reads: dict[str, rivals.Read] = {}
    makers: dict[str, Callable[[], rivals.Read]] = {
        OURS: lambda: rivals.evenflow(model, f"streaming-llm(sink={sink}, window={window})", prompt),
        "transformers DynamicCache": lambda: rivals.dynamic(model, prompt[:, : length - rounds // 2]),
        "transformers sliding window": lambda: rivals.sliding(model, length, prompt),
        "raw keys, rotate all, concatenate": lambda: rivals.raw_keys(model, sink, window, prompt),
        "model without cache": lambda: rivals.uncached(model),
    }
    for name, make in makers.items():
        say(f"decode: filling {name}")
        reads[name] = make()
    steps = {name: (lambda read=read: read(token)) for name, read in reads.items()}
    steps[BYTES] = reading(cache_bytes)
    product, operations = multiplying()
    steps[PRODUCT] = product
    say("decode: timing")
    seconds = interleaved(steps, rounds)
    say("decode: timing recomputation")
    afresh = rivals.recomputed(model, length, prompt)
    seconds_afresh = interleaved({OURS: steps[OURS], "recomputation": lambda: afresh(token)}, recomputed, warmup=0)
    bandwidth = cache_bytes / median(seconds[BYTES])
    rate = operations / median(seconds[PRODUCT])
    floors = [a + b for a, b in zip(seconds["model without cache"], seconds[BYTES], strict=True)]
    arithmetic = (weight_bytes + cache_bytes) / 4 * 2
    roofline = (weight_bytes + cache_bytes) / bandwidth
    names = [name for name in reads if name != OURS]
    return {
        "title": f"Decode step, {layers} layers × 768, cache {length}",
        "milliseconds": {name: 1e3 * median(times) for name, times in seconds.items()}
        | {
            "recomputation": 1e3 * median(seconds_afresh["recomputation"]),
            "floor": 1e3 * median(floors),
            "roofline": 1e3 * roofline,
        },
        "ours in units of": {name: ratio(seconds, OURS, name) for name in names}
        | {
            "recomputation": ratio(seconds_afresh, OURS, "recomputation"),
            "floor": median(a / b for a, b in zip(seconds[OURS], floors, strict=True)),
            "roofline": median(seconds[OURS]) / roofline,
        },
        "wanted": WANTED if (layers, length) == (12, 4096) else {},
        "gigabytes a second": bandwidth / 1e9,
        "gigaflops": rate / 1e9,
        "bytes": {"weights": weight_bytes, "cache": cache_bytes},
        "arithmetic milliseconds": 1e3 * arithmetic / rate,
    }
