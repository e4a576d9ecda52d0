"""What a token costs beside re-computation (arXiv 2309.17453, figure 10)."""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..api import open as open_stream
from .registry import Bench, claim

WANTED = {256: 0.0, 1024: 22.2, 4096: 80.0}


@claim("streaming-llm-speed")
def speed(bench: Bench) -> None:
    """Per token, streaming is 22 times faster than re-computation at a cache of 1024, and the gap grows with it."""
    race(bench, *((12, 768) if bench.full else (4, 256)), WANTED)


def race(bench: Bench, layers: int, width: int, caches: dict[int, float]) -> None:
    """The same model both ways at each of `caches`; the ratio wanted there, 0 for none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    bench.row("model", "Llama-2-7B/13B, one A6000", f"random Llama, {layers} layers of width {width}")
    made, ratios = torch.Generator().manual_seed(0), []
    for cache, wanted in caches.items():
        ids = torch.randint(0, 4096, (1, cache + 64), generator=made)
        stream = open_stream(model, f"streaming-llm(sink=4, window={cache - 4})")
        again = open_stream(model, f"recompute(window={cache})")
        stream.consume(ids)
        again.consume(ids[:, :cache])
        slow: list[float] = []
        fast: list[float] = []
        for n in range(3 if cache >= 4096 else 5):  # side by side: whatever disturbs one disturbs the other
            token = ids[:, cache + n : cache + n + 1]
            for timed, one, repeats in ((slow, again, 1), (fast, stream, 8)):
                start = time.perf_counter()
                for _ in range(repeats):
                    one.consume(token)
                timed.append((time.perf_counter() - start) / repeats)
            bench.say(f"cache {cache}: {1000 * fast[-1]:.1f} ms against {1000 * slow[-1]:.0f} ms")
        before, now = sorted(slow)[len(slow) // 2], sorted(fast)[len(fast) // 2]
        ratios.append(before / now)
        bench.row(
            f"re-computation over streaming, cache {cache}", f"up to 22.2 (want ≥ {wanted:g})" if wanted else "–",
            f"{ratios[-1]:.1f}", ratios[-1] >= wanted if wanted else None,
            f"{1000 * before:.0f} ms against {1000 * now:.2f} ms a token",
        )  # fmt: skip
    growth = ratios[-1] / ratios[0]
    bench.row("growth of that ratio when the cache grows 16 times", "about linear", f"×{growth:.1f}", growth >= 3)
    bench.figures |= {
        "speed-up over cache|x": [float(cache) for cache in caches], "speed-up over cache|y": ratios,
    }  # fmt: skip
