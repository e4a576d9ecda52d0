"""How well the shipped model predicts a long text through each memory (arXiv 2309.17453, table 1, tables 2 and 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..api import open as open_stream
from .registry import Bench, claim
from .texts import book_text, perplexity, recomputed_nats, tokens_of

CACHE = 256


def ratio_of(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Perplexity of `one` over that of `other` on the same tokens, and the standard error of that ratio."""
    gap = (one - other).double()
    ratio = math.exp(float(gap.mean()))
    return ratio, ratio * float(gap.std()) / len(gap) ** 0.5


@claim("streaming-llm-quality")
def quality(bench: Bench) -> None:
    """Sinks and a window read as well as re-computation; dense attention fails past its training length."""
    compare(bench, *((20_000, 1000) if bench.full else (12_000, 500)))


def compare(bench: Bench, length: int, count: int) -> None:
    """All memories on the same `length` tokens; re-computation at `count` places among them."""
    tiny = open_stream("tiny", "full")
    text, kind = book_text()
    ids = tokens_of(tiny, text, length)
    trained = int(tiny.model.config.max_position_embeddings)
    bench.row("text", "PG19", kind, note=f"{length:,} tokens; the model was trained on samples of {trained}")

    def nats(memory: str) -> Tensor:
        bench.say(f"reading with {memory}")
        return open_stream(tiny.model, memory, tokenizer=tiny.tokenizer).surprisal(ids)[0]

    full = nats("full")
    inside = full[1:trained]
    beyond = full[4 * trained :]
    streamed = nats(f"streaming-llm(sink=4, window={CACHE - 4})")
    windowed = nats(f"window(window={CACHE})")
    places = torch.linspace(CACHE, length - 1, count).long().unique().tolist()
    bench.say(f"re-computing at {len(places)} places")
    fresh = recomputed_nats(tiny, ids, places, CACHE)
    with_start = recomputed_nats(tiny, ids, places, CACHE - 1, sink=1)

    bench.row("perplexity inside the training length (dense)", "–", f"{perplexity(inside):.1f}")
    dense, stream = perplexity(beyond), perplexity(streamed[4 * trained :])
    bench.row(
        "dense attention far past the training length, over streaming", "5641 / 5.40", f"{dense:.1f} / {stream:.1f}",
        dense > 1.2 * stream,
    )  # fmt: skip
    evicting = slice(CACHE + 1, None)
    ratio, error = ratio_of(windowed[evicting], streamed[evicting])
    strong = ratio > 1.05
    bench.row(
        "window without sinks over streaming, same cache", "5158 / 5.40", f"×{ratio:.4f} ± {error:.4f}", None,
        "" if strong else "this model has grown no sink to lose: see streaming-llm-trained for one that has",
    )  # fmt: skip
    for name, reference in (("re-computation", fresh), ("re-computation behind the start token", with_start)):
        ratio, error = ratio_of(streamed[places], reference)
        bench.row(f"streaming over {name}", "5.40 / 5.43", f"×{ratio:.4f} ± {error:.4f}", ratio <= 1.03)

    paper = {0: "3359.95", 1: "11.88", 2: "10.51", 4: "9.59", 8: "9.54"}
    for sink, printed in paper.items():
        spec = f"streaming-llm(sink={sink}, window={CACHE - sink})"
        value = perplexity((streamed if sink == 4 else nats(spec))[evicting])
        bench.row(f"{sink} sinks + {CACHE - sink}", f"{printed} (Llama-2-7B, 4096)", f"{value:.2f}")
    caches, values = [], []
    for cache, printed in ((64, "13.61"), (128, "12.84"), (256, "12.34"), (512, "12.84")):
        value = perplexity((streamed if cache == CACHE else nats(f"streaming-llm(sink=4, window={cache - 4})"))[513:])
        caches.append(float(cache))
        values.append(value)
        bench.row(f"cache of 4 + {cache - 4}", f"{printed} (Falcon, {cache * 4})", f"{value:.2f}")
    bench.figures |= {"perplexity over cache|x": caches, "perplexity over cache|y": values}
    step = max(256, length // 60)
    at = [float(n) for n in range(0, length - step, step)]
    for name, curve in (("full", full), ("streaming-llm", streamed), ("window", windowed)):
        bench.figures[f"perplexity over tokens read|x|{name}"] = at
        bench.figures[f"perplexity over tokens read|y|{name}"] = [
            perplexity(curve[max(1, int(n)) : int(n) + step]) for n in at
        ]
