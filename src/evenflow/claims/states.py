"""What memories promise that are a state: what left the window is still known, at bytes and times that never grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ..memory.delta import chunked_delta, recurrent_delta, unit
from ..memory.fast_weights import FastSession, FastState, FastWeights, feed
from ..memory.rope import Rotary
from ..models.hybrid import (
    PRESETS,
    FastLayer,
    FrameSession,
    Hybrid,
    HybridConfig,
    HybridSession,
    Kind,
    Windowed,
    frame_places,
    in_a_row,
)
from ..models.hybrid.network import Block
from .choosing import bandwidth, in_turns, random, ratio
from .registry import Bench, claim

# -- InfiniteVL ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """A text of `pairs` keys, each followed by its value, then `noise` tokens, then the keys again in another order.

    Keys, values and noise are `kinds` different tokens each. At each key that comes again its value is to be told.
    """

    pairs: int = 6
    noise: int = 30
    kinds: int = 16

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return 3 * self.pairs + self.noise

    def samples(self, count: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
        """Texts, int64 [count, length], and the values asked for at their ends, [count, pairs], from 0."""
        keys = torch.rand(count, self.kinds, generator=made).argsort(1)[:, : self.pairs]
        values = torch.randint(self.kinds, (count, self.pairs), generator=made)
        noise = torch.randint(2 * self.kinds, 3 * self.kinds, (count, self.noise), generator=made)
        order = torch.rand(count, self.pairs, generator=made).argsort(1)
        told = torch.stack([keys, self.kinds + values], 2).flatten(1)
        return torch.cat([told, noise, keys.gather(1, order)], 1), values.gather(1, order)

    def answers(self, logits: Tensor) -> Tensor:
        """Logits of the values at the keys that came again, [B, pairs, kinds], of those [B, n, 3·kinds] of a text."""
        return logits[:, -self.pairs :, self.kinds : 2 * self.kinds]

    def network(self, pattern: tuple[Kind, ...], window: int) -> HybridConfig:
        """Two layers of width 64."""
        return HybridConfig(
            "recall", vocabulary=3 * self.kinds, dim=64, ffn_dim=128, layers=2, heads=2, kv_heads=2, head_dim=32, window=window,
            delta_heads=2, key_dim=32, value_dim=64, sections=(4, 6, 6), pattern=pattern,
        )  # fmt: skip


def taught(task: Pairs, config: HybridConfig, steps: int, bench: Bench | None = None, batch: int = 48) -> Hybrid:
    """A network that was trained on the task; the same arguments give the same weights."""
    made, draws = random(0, "pairs"), torch.random.get_rng_state()
    torch.manual_seed(0)
    model = Hybrid(config).train()
    torch.random.set_rng_state(draws)
    attend = Windowed(config, in_a_row(0, task.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        texts, values = task.samples(batch, made)
        hidden, _ = model(model.embedding(texts), attend)
        loss = fn.cross_entropy(task.answers(model.logits(hidden)).flatten(0, 1), values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if bench is not None:
            bench.trained(step, steps, float(loss.detach()))
    return model.eval()


def recalled(task: Pairs, model: Hybrid, count: int = 200, piece: int = 7) -> float:
    """Share of right answers of a network that reads texts as streams, `piece` tokens at a time."""
    texts, values = task.samples(count, random(1, "pairs"))
    session = HybridSession(model, batch=count)
    logits = torch.cat([session.feed(part) for part in texts.split(piece, 1)], 1)
    return float((task.answers(logits).argmax(-1) == values).double().mean())


@claim("infinite-vl")
def infinite_vl(bench: Bench) -> None:
    """A matrix a layer knows what left the window, and a token costs the same after any history."""
    beyond(bench)
    even(bench, 5000)
    forms(bench)
    decoding(bench, (1_000, 10_000, 50_000, 100_000, 200_000) if bench.full else (1_000, 10_000, 50_000, 100_000))


def beyond(bench: Bench, window: int = 12) -> None:
    """Recall of pairs that the window has lost, by matrix and window, and by windows alone."""
    task = Pairs()
    hybrid = recalled(task, taught(task, task.network(("window", "delta"), window), 600, bench))
    alone = recalled(task, taught(task, task.network(("window",), window), 1200 if bench.full else 600, bench))
    what = f"6. {task.pairs} pairs, {task.noise} tokens of noise, window {window}"
    bench.row(f"{what}: window and matrix", "known", f"{hybrid:.3f}", hybrid >= 0.95, "600 updates")
    bench.row(f"{what}: windows alone", "lost, chance 0.0625", f"{alone:.3f}", alone <= 0.15)


SMALL = HybridConfig(
    "small", vocabulary=256, dim=256, ffn_dim=512, layers=4, heads=4, kv_heads=2, head_dim=64, window=256, delta_heads=4,
    key_dim=64, value_dim=128, sections=(8, 12, 12),
)  # fmt: skip


def even(bench: Bench, frames: int, rows: int = 4) -> None:
    """Bytes and time of a frame, late and early in a stream, in turns."""
    torch.manual_seed(0)
    model, made = Hybrid(SMALL).eval(), random(0, "frames")
    given = torch.randn(50, rows * rows, SMALL.dim, generator=made)
    old, early = HybridSession(model), HybridSession(model)
    sizes = []
    for n in range(frames):
        old.feed(given[n % 50], frame_places(1, n / 24, rows, rows), last=True)
        sizes.append(old.nbytes)
        if n == 49:
            early = old.fork()
    seconds = in_turns(
        {name: partial(session.feed, given[0], frame_places(1, at / 24, rows, rows), last=True, commit=False)
         for name, session, at in (("late", old, frames), ("early", early, 50))}, 101,
    )  # fmt: skip
    late = ratio(seconds, "late", "early")
    bench.row(
        f"3. bytes after frame {frames:,} over after frame 50", "flat", f"×{sizes[-1] / sizes[49]:.3f}",
        sizes[-1] == sizes[49], f"{sizes[-1] / 1e6:.2f} MB, window {SMALL.window}",
    )  # fmt: skip
    bench.row(
        f"3. time of frame {frames:,} over that of frame 50", "flat", f"×{late:.3f}", late < 1.1,
        f"{1e3 * median(seconds['late']):.1f} ms a frame of {rows * rows} tokens",
    )  # fmt: skip
    bench.figures |= {
        "megabytes of a session over frames|x": [float(n + 1) for n in range(0, frames, frames // 50)],
        "megabytes of a session over frames|y": [sizes[n] / 1e6 for n in range(0, frames, frames // 50)],
    }


@torch.no_grad()
def forms(bench: Bench, heads: int = 16, key: int = 128, value: int = 256) -> None:
    """Chunks over single tokens, at the paper's sizes of a layer."""
    made, speeds = random(0, "forms"), {}
    for tokens in (16, 64, 256, 1024):
        q, k = (unit(torch.randn(1, heads, tokens, key, generator=made)) for _ in "qk")
        v, state = (torch.randn(1, heads, n, value, generator=made) for n in (tokens, key))
        beta, g = torch.rand(2, 1, heads, tokens, generator=made)
        calls = {
            name: partial(form, q, k, v, beta, -g / 50, state)
            for name, form in (("single", recurrent_delta), ("chunks", chunked_delta))
        }
        speeds[tokens] = ratio(in_turns(calls, 7 if tokens < 1024 else 3), "single", "chunks")
    bench.row(
        "speed of chunks of 64 over single tokens, calls of 256 tokens (a frame)", "> 1", f"×{speeds[256]:.2f}", speeds[256] > 1,
        "; ".join(f"{tokens:,} tokens ×{speed:.2f}" for tokens, speed in speeds.items()) + "; 16 heads of 128×256, one core",
    )  # fmt: skip
    bench.figures |= {
        "speed of chunks, single tokens 1, over tokens of a call|x": [float(tokens) for tokens in speeds],
        "speed of chunks, single tokens 1, over tokens of a call|y": list(speeds.values()),
    }


LARGE = HybridConfig(
    "large", vocabulary=1024, dim=512, ffn_dim=1408, layers=4, heads=8, kv_heads=2, head_dim=64, window=1024, delta_heads=8,
    key_dim=64, value_dim=128, sections=(8, 12, 12),
)  # fmt: skip


class Cached:
    """`attend` over a plain cache of `history` random keys and one slot for the fresh token."""

    def __init__(self, config: HybridConfig, history: int, made: torch.Generator) -> None:
        shape = (config.layers, 1, config.kv_heads, history + 1, config.head_dim)
        self.keys, self.values = (torch.randn(shape, generator=made) for _ in "kv")
        rotary = Rotary(config.rope, config.head_dim, torch.float32, torch.device("cpu"))
        self.rotary, self.angles = rotary, rotary.at(torch.tensor([[0, history, history, history]]))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotary.rotate(x, *self.angles) for x in (q, k))
        self.keys[layer, :, :, -1:], self.values[layer, :, :, -1:] = k, v
        groups, keys, values = q.shape[1] // k.shape[1], self.keys[layer], self.values[layer]
        # The queries that share a head of keys stand as rows of one product, so that keys are read once and not copied.
        return (
            fn.scaled_dot_product_attention(q.unflatten(1, (-1, groups)).flatten(2, 3), keys, values)
            .unflatten(2, (groups, 1))
            .flatten(1, 2)
        )


@torch.no_grad()
def decoding(bench: Bench, histories: tuple[int, ...]) -> None:
    """A token of the hybrid over a token of a twin whose layers all attend everything, as history grows."""
    torch.manual_seed(0)
    model = Hybrid(LARGE).eval()
    twin = Hybrid(replace(LARGE, pattern=("window",), window=None)).eval()
    session, token = HybridSession(model), torch.tensor([[5]])
    session.feed(torch.zeros(1, 2048, dtype=torch.int64))  # more than its window
    slower, took, speed = {}, {}, bandwidth()

    def attended(cache: Cached) -> Tensor:
        return twin.logits(twin(twin.embedding(token), cache)[0])

    for history in histories:
        cache = Cached(twin.config, history, random(0, "cache", history))
        calls: dict[str, Callable[[], object]] = {
            "hybrid": partial(session.feed, token),
            "twin": partial(attended, cache),
        }
        seconds = in_turns(calls, 41 if history < 100_000 else 21)
        slower[history] = ratio(seconds, "twin", "hybrid")
        took[history] = [1e3 * median(seconds[name]) for name in ("hybrid", "twin")]
        floors = [1e3 * size / speed for size in (weights(model) + session.nbytes, weights(twin) + cache.nbytes)]
        bench.row(
            f"9. a token after {history:,} tokens: attention twin over hybrid", "> 3.6 at 50,000" if history == 50_000 else "–",
            f"×{slower[history]:.2f}", slower[history] >= 3 if history == 50_000 else None,
            f"{took[history][1]:.2f} and {took[history][0]:.2f} ms; to read their bytes once takes {floors[1]:.2f} and "
            f"{floors[0]:.2f} ms, ×{floors[1] / floors[0]:.2f}, but many small products take longer than their bytes; width {LARGE.dim}, "
            f"{LARGE.layers} layers, one core",
        )  # fmt: skip
    for at, name in enumerate(("hybrid", "attention twin")):
        bench.figures[f"milliseconds of a token over tokens before it|x|{name}"] = [float(n) for n in histories]
        bench.figures[f"milliseconds of a token over tokens before it|y|{name}"] = [
            times[at] for times in took.values()
        ]


def weights(model: Hybrid) -> int:
    """Bytes of all weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


# -- Spatial-TTT ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Carried:
    """Tokens that carry a key and a value each: `pairs` of them, then `filler`, then the keys again with a question mark."""

    pairs: int = 8
    filler: int = 24
    kinds: int = 32

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return 2 * self.pairs + self.filler

    def samples(self, count: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys and values of each token, int64 [2, count, length], and what is asked for, [count, pairs].

        Filler has the key `kinds` and values like any other; the question mark is the value `kinds`.
        """
        keys = torch.rand(count, self.kinds, generator=made).argsort(1)[:, : self.pairs]
        values = torch.randint(self.kinds, (count, self.pairs), generator=made)
        filler = torch.randint(self.kinds, (count, self.filler), generator=made)
        order = torch.rand(count, self.pairs, generator=made).argsort(1)
        told = torch.cat([keys, torch.full_like(filler, self.kinds), keys.gather(1, order)], 1)
        carried = torch.cat([values, filler, torch.full_like(values, self.kinds)], 1)
        return torch.stack([told, carried]), values.gather(1, order)


class Teller(nn.Module):
    """Two layers of width 64, window 8, with fast weights of 2 heads and chunks of 16 beside it, or without them."""

    def __init__(self, task: Carried, remembers: bool) -> None:
        super().__init__()
        self.config = HybridConfig(
            "teller", vocabulary=task.kinds, dim=64, ffn_dim=128, layers=2, heads=4, kv_heads=2, head_dim=16, window=8,
            delta_heads=1, key_dim=1, value_dim=1, sections=(2, 3, 3),
        )  # fmt: skip
        self.task = task
        self.key, self.value = nn.Embedding(task.kinds + 1, 64), nn.Embedding(task.kinds + 1, 64)
        self.layers = nn.ModuleList(FastLayer(self.config, 2, FastWeights(chunk=16), rate=0.01) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(5))
        self.between = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)) for _ in range(2))
        self.head = nn.Linear(64, task.kinds)
        for layer in self.layers:
            cast(FastLayer, layer).gate.requires_grad_(remembers)  # if not, it stays at nothing: window attention alone

    def forward(self, tokens: Tensor) -> Tensor:
        """Keys and values int64 [2, B, T] → logits of the values asked for, [B, pairs, kinds]."""
        windowed = Windowed(self.config, in_a_row(0, tokens.shape[2]))
        x = self.key(tokens[0]) + self.value(tokens[1])
        for number, (layer, between) in enumerate(zip(self.layers, self.between, strict=True)):
            x = x + layer(self.norms[2 * number](x), partial(windowed, number), windowed.turn)[0]
            x = x + between(self.norms[2 * number + 1](x))
        return self.head(self.norms[4](x)[:, -self.task.pairs :])


@claim("spatial-ttt")
def spatial_ttt(bench: Bench) -> None:
    """Fast weights beside a window know what the window lost, in bytes and time that never grow."""
    carried(bench, 900 if bench.full else 600)
    ahead(bench)
    learning(bench)
    large_chunks(bench)


def carried(bench: Bench, steps: int) -> None:
    """Recall of pairs that two windows of 8 do not reach, with fast weights and without."""
    task, right = Carried(), {}
    for remembers in (True, False):
        made, draws = random(0, "carried"), torch.random.get_rng_state()
        torch.manual_seed(0)
        model = Teller(task, remembers)
        torch.random.set_rng_state(draws)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        for step in range(steps):
            tokens, values = task.samples(64, made)
            loss = fn.cross_entropy(model(tokens).flatten(0, 1), values.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bench.trained(step, steps, float(loss.detach()))
        with torch.no_grad():
            tokens, values = task.samples(500, random(1, "carried"))
            right[remembers] = float((model(tokens).argmax(-1) == values).double().mean())
    what = f"8. {task.pairs} pairs of {task.kinds} kinds, {task.filler} tokens of filler, two windows of 8"
    bench.row(
        f"{what}: with fast weights",
        "known",
        f"{right[True]:.3f}",
        right[True] >= 0.95,
        f"{steps} updates",
    )
    bench.row(f"{what}: windows alone", "lost, chance 0.031", f"{right[False]:.3f}", right[False] <= 0.06)


@torch.no_grad()
def ahead(bench: Bench, count: int = 60, rows: int = 3, late: int = 400) -> None:
    """A film through four layers, three of which wait for the next frame, beside the film read whole; bytes and time after
    many frames."""
    torch.manual_seed(0)
    model = Hybrid(PRESETS["toy-spatial"]).eval()
    for block in model.blocks:
        if isinstance(mixer := cast(Block, block).mixer, FastLayer):
            nn.init.normal_(mixer.conv, std=0.3)
            nn.init.normal_(mixer.gate.weight)
    frames = torch.randn(1, count, rows, rows, model.config.dim, generator=random(0, "film"))
    places = torch.cat([frame_places(0, n, rows, rows, 1.0) for n in range(count)])
    attend = Windowed(model.config, places)
    whole, _ = model(frames.flatten(1, 3), attend, turn=attend.turn, grid=(count, rows, rows))
    session = FrameSession(model)
    parts = [session.see(part, at) for part, at in zip(frames.split(1, 1), places.split(rows * rows), strict=True)]
    worst = float((torch.cat([*parts, session.flush()], 1) - whole).abs().max())
    bench.row(
        f"1. a film of {count} frames as it comes, {session.look_ahead} frames late, beside the film read whole", "0",
        f"{worst:.0e}", worst < 1e-4, "float32, largest difference; three layers of four convolve over the next frame",
    )  # fmt: skip
    old, sizes = FrameSession(model, anchor=256), []
    for n in range(late):
        old.see(frames[:, n % count : n % count + 1])
        sizes.append(old.nbytes)
        if n == 49:
            young = old.fork()
    seconds = in_turns({"late": lambda: old.see(frames[:, :1]), "early": lambda: young.see(frames[:, :1])}, 51)
    flat = ratio(seconds, "late", "early")
    most = max(sizes[:100]), max(sizes[100:])
    bench.row(
        f"7. most bytes in frames 100 to {late} over those before, and time of a frame over a copy's that stayed at 50", "flat",
        f"×{most[1] / most[0]:.3f}, ×{flat:.2f}", most[0] == most[1] and flat < 1.15,
        f"layers that attend everything bounded to 256 tokens; {1e3 * median(seconds['late']):.1f} ms a frame of {rows * rows}",
    )  # fmt: skip


def drawn(tokens: int, heads: int, dim: int, number: int) -> tuple[Tensor, ...]:
    """q and k of length 1, v, rates and momenta of so many tokens."""
    made = random(number, "fast")
    q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=made)
    q, k = fn.normalize(q, dim=-1), fn.normalize(k, dim=-1)
    rates, momenta = torch.rand(1, heads, tokens, 3, generator=made), torch.rand(1, heads, tokens, generator=made)
    return q, k, v, 0.01 * rates, momenta


def first(heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights to begin with."""
    made = random(0, "first")
    w0, w1, w2 = torch.randn(3, heads, dim, dim, generator=made) / dim**0.5
    return w0, w1, w2


def learning(bench: Bench, chunk: int = 64, chunks: int = 500) -> None:
    """Bytes and time of a chunk after many, rows that keep their length, and undoing bit for bit."""
    rule, weights = FastWeights(chunk), first(4, 64)
    old, early = (FastSession(rule, weights, undo=1) for _ in range(2))
    given, sizes = drawn(chunk, 4, 64, 0), []
    for n in range(chunks):
        old.feed(*given)
        sizes.append(old.nbytes)
        if n == 4:
            early = old.fork()
    late = ratio(
        in_turns({"late": partial(old.feed, *given), "early": partial(early.feed, *given)}, 101), "late", "early"
    )
    bench.row(
        f"7. bytes after chunk {chunks} over after chunk 5, and time", "flat", f"×{sizes[-1] / sizes[4]:.3f}, ×{late:.3f}",
        sizes[-1] == sizes[4] and late < 1.1, f"{sizes[-1] / 1e6:.2f} MB with one chunk to go back over",
    )  # fmt: skip
    worst = max(
        float((now[0].norm(dim=-1) / then.norm(dim=-1) - 1).abs().max())
        for now, then in zip(old.state.weights, weights, strict=True)
    )
    bench.row(
        f"5. length of a row of weights after {old.position // chunk} chunks, off by", "0", f"{worst:.1e}", worst < 1e-4
    )
    there = old.fork()
    old.feed(*drawn(chunk + 7, 4, 64, 1))
    old.truncate(chunk + 7)
    ahead = drawn(3 * chunk, 4, 64, 2)
    same = torch.equal(old.feed(*ahead), there.feed(*ahead))
    bench.row(
        "a stream after tokens that were undone, over more than a chunk, to the bit",
        "–",
        "equal" if same else "not",
        same,
    )


@torch.no_grad()
def large_chunks(bench: Bench, large: int = 2648, small: int = 64, dim: int = 512) -> None:
    """A token in large chunks over one in small ones, at the paper's width of a fast head."""
    given = drawn(2 * large + 1, 1, dim, 3)
    begun = FastState.begin(first(1, dim), 1)
    seconds = in_turns(
        {str(chunk): partial(feed, FastWeights(chunk, muon=True), begun, *given) for chunk in (small, large)}, 3
    )
    faster = ratio(seconds, str(small), str(large))
    bench.row(
        f"9. a token in chunks of {small} over one in chunks of {large:,}", "several times (GPU)", f"×{faster:.2f}", faster > 1,
        f"{1e6 * median(seconds[str(large)]) / len(given[0][0, 0]):.0f} µs a token and fast head of {dim}, one core",
    )  # fmt: skip
