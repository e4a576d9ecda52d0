"""Millions of tokens in one session: quality, memory and speed at the end as at the beginning (section 4.1)."""

from __future__ import annotations

import time

import psutil
import torch

from ..api import open as open_stream
from .quality import perplexity, ratio_of
from .registry import Bench, claim
from .texts import book_text, recomputed_nats, tokens_of

SINK, WINDOW = 4, 252
PIECE = 4096


@claim("endless")
def endless(bench: Bench) -> None:
    """Four million tokens in one session, as well predicted, as fast and in as little memory at the end as at first."""
    length, part = (4_000_000, 100_000) if bench.full else (100_000, 20_000)
    stream = open_stream("tiny", f"streaming-llm(sink={SINK}, window={WINDOW})")
    text, kind = book_text()
    ids = torch.tensor(tokens_of(stream, text, length))
    bench.row("stream", "4,000,000 tokens of PG19", f"{length:,} tokens", None, f"{kind}, repeated where they end")
    process = psutil.Process()
    places, nats, rates, resident, held = [], [], [], [], []
    last: list[torch.Tensor] = []
    began, shown = time.perf_counter(), 0.0
    for first in range(0, length, PIECE):
        piece = ids[first : first + PIECE]
        start = time.perf_counter()
        surprise = stream.surprisal(piece)[0]
        seconds = time.perf_counter() - start
        places.append(float(stream.position))
        rates.append(len(piece) / seconds)
        nats.append(perplexity(surprise[~surprise.isnan()]))
        resident.append(process.memory_info().rss / 1e6)
        held.append(stream.nbytes / 1e6)
        if first + len(piece) > length - part:
            last.append(surprise)
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            rate = stream.position / (shown - began)
            left = (length - stream.position) / rate
            bench.say(f"{stream.position:,} of {length:,} tokens, {rate:,.0f}/s, {left:,.0f} s left")
    tail = torch.cat(last)[-part:]

    count = 2000 if bench.full else 400
    sample = torch.linspace(length - part, length - 1, count).long().unique()
    fresh = recomputed_nats(stream, ids.tolist(), sample.tolist(), SINK + WINDOW)
    ratio, error = ratio_of(tail[sample - (length - part)], fresh)
    bench.row(
        f"perplexity of the last {part:,} tokens over re-computation's", "5.40 / 5.43", f"×{ratio:.4f} ± {error:.4f}",
        ratio <= 1.03, f"{perplexity(tail):.2f} streamed; re-computed at {len(sample)} of these places",
    )  # fmt: skip
    filled = max(1, -(-part // PIECE))
    speed = _median(rates[-filled:]) / _median(rates[1 : 1 + filled])
    bench.row("tokens/s at the end over at first, after the fill", "stable", f"{speed:.3f}", speed >= 0.97)
    grown = resident[-1] / max(resident[1 : 1 + filled])
    bench.row("resident memory at the end over at first", "stable", f"{grown:.4f}", grown <= 1.01)
    bench.row("bytes held, at the end over at first", "constant", f"{held[-1] / held[0]:.3f}", held[-1] == held[0])
    bench.row("tokens/s over all", "–", f"{length / (time.perf_counter() - began):,.0f}")
    thin = slice(None, None, max(1, len(places) // 200))
    for name, values in (("perplexity", nats), ("tokens/s", rates), ("megabytes resident", resident)):
        bench.figures |= {
            f"{name} over stream position|x": places[thin],
            f"{name} over stream position|y": values[thin],
        }


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
