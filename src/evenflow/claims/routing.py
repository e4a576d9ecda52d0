"""What a memory promises whose chunks go where their rewards send them: Stream-T1."""

from __future__ import annotations

import time
from collections import Counter
from statistics import median

import numpy as np
import torch

from ..memory import MemoryState
from ..memory.routing import APPEND, DROP, MERGE, route
from ..recipes import recipe
from .registry import Bench, claim

HEADS, DIM, FRAME, CHUNK = 4, 64, 16, 3
M = CHUNK * FRAME


def fed(state: MemoryState, k: torch.Tensor, v: torch.Tensor, where: int = DROP) -> None:
    """A chunk of these keys and values [M, DIM] in every head."""
    k, v = (x.expand(1, HEADS, M, DIM) for x in (k, v))
    with state.step(M, tags={"route": torch.full((M,), where)}):
        state.attend(0, torch.zeros_like(k), k, v)


def known(state: MemoryState, key: torch.Tensor, value: torch.Tensor) -> float:
    """Share of a value [DIM] in what a query for its key gets, without being kept."""
    k = torch.zeros(1, HEADS, M, DIM)
    with state.step(M, commit=False):
        out = state.attend(0, (12 * key).expand(1, HEADS, M, DIM), k, torch.zeros_like(k))
    return float((out.mean((0, 1, 2)) @ value) / value.square().sum())


@claim("stream-t1")
def stream_t1(bench: Bench) -> None:
    """Chunks that were worth it stay as sinks of their own, at a bounded size and at the cost of a longer window."""
    chunks = 2000 if bench.full else 400
    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(chunks, DIM, generator=made) for _ in range(2))
    keys = torch.nn.functional.normalize(keys, dim=-1) * DIM**0.5 / 2
    short, long = np.random.default_rng(0).normal(size=(2, chunks)).tolist()
    sent = [route(short[: n + 1], long[: n + 1]) for n in range(chunks)]
    kept = [n for n in range(chunks) if sent[n] == APPEND][:4]
    lost = [n for n in range(chunks // 2) if sent[n] == DROP][1:5]
    built = {
        name: recipe(name, frame=FRAME).build(layers=1, heads=HEADS, head_dim=DIM, rope=None)
        for name in ("stream-t1", "longlive")
    }
    most, sizes, took = 0, [], {name: list[float]() for name in built}
    for n in range(chunks):
        for name, state in built.items():
            start = time.perf_counter()
            fed(state, keys[n].expand(M, DIM), values[n].expand(M, DIM), sent[n])
            took[name].append(time.perf_counter() - start)
        most = max(most, len(built["stream-t1"].held(0)) // FRAME)
        sizes.append(built["stream-t1"].nbytes)
    counts = Counter(sent)
    bench.row(
        f"of {chunks} chunks of random rewards dropped, averaged, kept apart", "–",
        ", ".join(f"{counts[where] / chunks:.0%}" for where in (DROP, MERGE, APPEND)),
    )  # fmt: skip
    bench.row("frames attended, at most", "24", f"{most}", most == 24)
    bench.row(
        "bytes at the end over those once the window was full",
        "1",
        f"{sizes[-1] / sizes[20]:.2f}",
        sizes[-1] == sizes[20],
    )
    for what, some, holds in (("the four that were kept", kept, True), ("four that were dropped", lost, False)):
        shares = {
            name: float(np.mean([known(state, keys[n], values[n]) for n in some])) for name, state in built.items()
        }
        bench.row(
            f"what a query still gets of {what}, {chunks} chunks later; longlive", "kept as they were" if holds else "0",
            f"{shares['stream-t1']:.2f}; {shares['longlive']:.2f}",
            shares["stream-t1"] > 0.5 if holds else abs(shares["stream-t1"]) < 0.2,
        )  # fmt: skip
    late = {name: median(times[-100:]) for name, times in took.items()}
    bench.row(
        "time of a chunk over longlive's, whose window is half as long as all that is held", "–",
        f"{late['stream-t1'] / late['longlive']:.2f}", None, f"{1e3 * late['stream-t1']:.2f} ms; 24 and 12 frames of {FRAME}",
    )  # fmt: skip
