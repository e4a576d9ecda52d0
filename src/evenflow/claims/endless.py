"""Millions of tokens in one session: quality, memory and speed at the end as at the beginning (section 4.1)."""

from __future__ import annotations

import contextlib
import ctypes
import time
from statistics import median
from typing import Any

import psutil
import torch

from ..api import open as open_stream
from .definition import definition
from .exactness import gap
from .quality import ratio_of
from .registry import Bench, claim
from .texts import book_text, perplexity, recomputed_nats, tokens_of

SINK, WINDOW = 4, 252
SPEC = f"streaming-llm(sink={SINK}, window={WINDOW})"
PIECE = 4096  # tokens between two looks at the clock


@claim("endless")
def endless(bench: Bench) -> None:
    """Four million tokens in one session, as well predicted, as fast and in as little memory at the end as at first."""
    read(bench, *((4_000_000, 100_000, 2000) if bench.full else (100_000, 20_000, 400)))


def read(bench: Bench, length: int, part: int, count: int) -> None:
    """`length` tokens; the last `part` of them beside the first, and at `count` of those places beside re-computation."""
    stream = open_stream("tiny", SPEC)
    text, kind = book_text()
    ids = torch.tensor(tokens_of(stream, text, length))
    bench.row("stream", "4,000,000 tokens of PG19", f"{length:,} tokens", None, f"{kind}, repeated where they end")

    places, nats, rates, resident, held = [], [], [], [], []
    last: list[torch.Tensor] = []
    began = shown = time.perf_counter()
    for first in range(0, length, PIECE):
        piece = ids[first : first + PIECE]
        surprise, seconds = _timed(stream, piece)
        places.append(float(stream.position))
        rates.append(len(piece) / seconds)
        nats.append(perplexity(surprise[~surprise.isnan()]))
        resident.append(resident_now())
        held.append(stream.nbytes / 1e6)
        if first + len(piece) > length - part:
            last.append(surprise)
        if (now := time.perf_counter()) - shown > 10:
            shown, rate = now, stream.position / (now - began)
            bench.say(
                f"{stream.position:,} of {length:,} tokens, {rate:,.0f} tokens/s, "
                f"{(length - stream.position) / rate:,.0f} s left, perplexity now {nats[-1]:.1f}"
            )
    bench.row("tokens/s over all", "–", f"{length / (time.perf_counter() - began):,.0f}")

    tail = torch.cat(last)[-part:]
    sample = torch.linspace(length - part, length - 1, count).long().unique()
    here = tail[sample - (length - part)]
    for name, sink in (("re-computation's", 0), ("re-computation's behind the start token", 1)):
        fresh = recomputed_nats(stream, ids.tolist(), sample.tolist(), SINK + WINDOW - sink, sink)
        ratio, error = ratio_of(here, fresh)
        bench.row(
            f"perplexity of the last {part:,} tokens over {name}", "5.40 / 5.43", f"×{ratio:.4f} ± {error:.4f}",
            ratio <= 1.03, f"{perplexity(tail):.2f} streamed; re-computed at {len(sample)} of these places",
        )  # fmt: skip

    filled = -(-part // PIECE)
    first_rates, last_rates = rates[1 : 1 + filled], rates[-filled:]
    speed = median(last_rates) / median(first_rates)
    bench.row(
        f"tokens/s of the last {part:,} over the first after the fill", "stable", f"{speed:.3f}", speed >= 0.97,
        f"{median(first_rates):,.0f} then {median(last_rates):,.0f} tokens/s",
    )  # fmt: skip
    bench.row("the same beside a stream that has just begun, in turns", "1", f"{_beside_young(stream, ids):.3f}")
    grown = max(resident[1 + filled :]) / max(resident[1 : 1 + filled])
    bench.row(
        "resident memory, most later over most at first", "stable", f"{grown:.4f}", grown <= 1.01,
        f"{resident[-1]:.0f} MB at the end, with the interpreter, torch and the text",
    )  # fmt: skip
    bench.row("bytes held, at the end over at first", "constant", f"{held[-1] / held[0]:.3f}", held[-1] == held[0])

    model: Any = stream.model
    far = open_stream(model, SPEC)
    far.consume(ids[:300])
    assert far.state is not None
    far.state.seek(10**9)
    error = gap(far.feed(ids[300:350])[0], definition(model, ids[:350], SINK, WINDOW)[300:])
    bench.row("logits at stream position 1,000,000,000 = definition", "equal", f"{error:.1e}", error <= 1e-5)

    thin = slice(None, None, max(1, len(places) // 200))
    for name, values in (("perplexity", nats), ("tokens/s", rates), ("megabytes resident", resident)):
        bench.figures[f"{name} over stream position|x"] = places[thin]
        bench.figures[f"{name} over stream position|y"] = values[thin]


def resident_now() -> float:
    """Megabytes of this process in memory, once the C library has given back what it only keeps for later."""
    with contextlib.suppress(OSError, AttributeError):  # not every C library can
        ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss) / 1e6


def _timed(stream: Any, piece: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Surprisal [T] of `piece`, and the seconds it took."""
    start = time.perf_counter()
    surprise = stream.surprisal(piece)[0]
    return surprise, time.perf_counter() - start


def _beside_young(old: Any, ids: torch.Tensor) -> float:
    """How much faster `old` reads than a newborn stream does: median over pieces, read in turns."""
    young, piece = open_stream(old.model, SPEC), ids[:1024]
    _timed(young, piece)
    return median(_timed(young, piece)[1] / _timed(old, piece)[1] for _ in range(9))
