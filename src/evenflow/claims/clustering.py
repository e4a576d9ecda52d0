"""What a memory promises that keeps everything in clusters of alike keys, and takes as many as a query needs: V-Rex."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ..memory import AllHeld, Memory, Rope, UntilMass, View
from ..memory.attention import softmax_attention
from ..memory.chunks import ArenaState
from ..memory.clustered import Joined
from ..memory.parts import Part, attention_of_parts
from ..recipes import recipe
from .compare import CHUNK, OLD, STREAM, Reading, built, questions
from .registry import Bench, claim

SHARE = 0.3  # Th_r
KEPT = 6  # frames of the window where recall is compared


@claim("v-rex")
def v_rex(bench: Bench) -> None:
    """Any old item is found for the device bytes of a window, by fetching what each query needs, and cheaper than all of it."""
    ages(bench)
    mass(bench, 40 if bench.full else 16)
    adaptive(bench)
    similar(bench, 60 if bench.full else 30)
    table(bench)
    scoring(bench)
    steps(bench, (5120, 10240, 20480, 40960), 9 if bench.full else 5)


# -- what is remembered ----------------------------------------------------------------------------------------------


def ages(bench: Bench) -> None:
    """Details of frames long gone, beside a window of as many device bytes."""
    window = KEPT * STREAM.frame
    ours = read(recipe("v-rex", window=window))
    each = STREAM.layers * STREAM.kv_heads * 2 * STREAM.head_dim * STREAM.dtype.itemsize
    plain = read(recipe("window", window=-(-ours.state.nbytes // each)))
    asked = {"48 frames": 5, "96 frames": 6, f"{OLD} frames": 7}
    for name, reading in (("v-rex", ours), ("plain window", plain)):
        shares = []
        for needle in (questions(STREAM, OLD)[n] for n in asked.values()):
            question = STREAM.question(OLD, CHUNK, needle)
            shares.append(STREAM.recalled(needle, Reading(reading.state.fork()).step(question, commit=False)))
        bench.row(
            f"recall of a detail that is {', '.join(asked)} old: {name}", "kept" if name == "v-rex" else "lost",
            ", ".join(f"{share:.3f}" for share in shares), min(shares) > 0.95 if name == "v-rex" else None,
            f"{reading.state.nbytes:,} bytes on the device, {len(reading.state.held(0)):,} tokens in the window",
        )  # fmt: skip


def read(memory: Memory, frames: int = OLD) -> Reading:
    """The memory after the stream of the comparison."""
    reading = built(memory, STREAM)
    for start in range(0, frames, CHUNK):
        reading.step(STREAM.step(start, CHUNK))
    return reading


@dataclass(frozen=True)
class Watched(UntilMass):
    """The recall, looked at: what queries took, and the seconds that parts of it took."""

    log: list[tuple[Tensor, Tensor, Joined]] = field(default_factory=list, compare=False)
    spent: dict[str, float] = field(default_factory=dict, compare=False)

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        start = time.perf_counter()
        out = super().attend(replace(view, store=Clocked(view.store, self.spent)), query, keys, values, bias, scale)
        self.spent["all"] = self.spent.get("all", 0.0) + time.perf_counter() - start
        return out

    def taken(self, view: View, query: Tensor, joined: Joined, scale: float) -> Tensor:
        start = time.perf_counter()
        taken = super().taken(view, query, joined, scale)
        self.spent["choosing"] = self.spent.get("choosing", 0.0) + time.perf_counter() - start
        self.log.append((query * scale, taken, joined))
        return taken


@dataclass(frozen=True)
class Clocked:
    """A store whose fetches are timed."""

    store: Any
    spent: dict[str, float]

    def fetch(self, *wanted: Any) -> Any:
        """See `PageStore.fetch`."""
        start = time.perf_counter()
        found = self.store.fetch(*wanted)
        self.spent["fetching"] = self.spent.get("fetching", 0.0) + time.perf_counter() - start
        return found


def mass(bench: Bench, chunks: int) -> None:
    """True attention mass, of all tokens before it, that each query's own clusters hold."""
    for near, what in ((0, "token by token"), (7, "in clusters")):
        memory = recipe("v-rex", window=KEPT * STREAM.frame, th_hd=near)
        watched = Watched(SHARE)
        reading = built(replace(memory, recall=watched), STREAM)
        keys: list[Tensor] = []
        labels: list[Tensor] = []
        held: list[Tensor] = []
        for n in range(chunks):
            reading.step(STREAM.step(n * CHUNK, CHUNK))
            query, taken, joined = watched.log[0]  # of the first layer
            if n:
                held.append(true_mass(query, taken, torch.cat(keys, 2), torch.cat(labels, 2)).flatten())
            keys.append(joined.fresh.unflatten(-1, (STREAM.kv_heads, -1))[:, 0].transpose(1, 2))
            labels.append(joined.which)
            watched.log.clear()
        got = torch.cat(held)
        least = float(got.min())
        bench.row(
            f"attention mass that what a query takes holds, {what}: least, mean of all queries", f"≥ {SHARE}",
            f"{least:.3f}, {float(got.mean()):.3f}", least >= SHARE - 1e-5 if not near else None,
            "of the tokens before its step, where a query looks at none of these" if not near else
            f"{float((got < SHARE).double().mean()):.1%} of queries are below {SHARE}: a mean key stands for its tokens",
        )  # fmt: skip


def true_mass(query: Tensor, taken: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """Share of softmax over keys [B, H_kv, n, D] that is in clusters taken, for the first token of the step.

    query [B, H_q, m, D], scaled; taken: bool [B, H_kv, groups, m, C]; labels: int64 [B, 1, n].
    """
    first = query.unflatten(1, taken.shape[1:3])[:, :, :, :1]
    scores = (first @ keys[:, :, None].transpose(-1, -2)).double()
    seen = taken[:, :, :, :1].gather(-1, labels[:, :, None, None].expand(scores.shape))
    return (scores.softmax(-1) * seen).sum(-1)


# -- how much is fetched ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Scenes of `shown` frames that show the same `patches` tokens, with noise; queries of every frame look back.

    Every other key head is peaked: its queries look for the patches of one scene, another in each frame; the others look at
    everything a little, at what is alike in all scenes the most. One token, as when text is written, is peaked in all heads.
    Keys lie in channels that the rope turns slowly, as the long-lived part of a model's keys does.
    """

    seed: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    patches: int = 10
    shown: int = 32
    noise: float = 0.3
    flat: float = 0.35

    @property
    def slow(self) -> Tensor:
        """1 in the channels that carry content, [head_dim]."""
        half = self.head_dim // 2
        return (torch.arange(self.head_dim) % half >= 0.6 * half).float()

    def geometry(self) -> dict[str, Any]:
        """What `Memory.build` wants to know."""
        rope = Rope(theta=500_000.0)
        return {"layers": 1, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "rope": rope}

    def random(self, what: str, number: int) -> torch.Generator:
        """Random numbers that depend on nothing else."""
        return torch.Generator().manual_seed(crc32(f"{self.seed} {what} {number}".encode()))

    def scene(self, number: int) -> Tensor:
        """[H_kv, patches, D]"""
        drawn = torch.randn(self.kv_heads, self.patches, self.head_dim, generator=self.random("scene", number))
        return drawn * self.slow * float(self.head_dim / self.slow.sum()) ** 0.5

    def frames(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H_kv, count · patches, D]."""
        source, shape = self.random("frames", start), (self.kv_heads, self.patches, self.head_dim)
        keys = [
            self.scene(t // self.shown) + self.noise * torch.randn(shape, generator=source)
            for t in range(start, start + count)
        ]
        k = torch.cat(keys, 1)[None]
        return k, torch.randn(k.shape, generator=source)

    def queries(self, t: int, m: int) -> Tensor:
        """Of a frame (m = patches) or of one token, [1, H_q, m, D]."""
        source, groups = self.random(f"queries {m}", t), self.heads // self.kv_heads
        scene = self.scene(int(torch.randint(max(1, t // self.shown), (), generator=source)))
        q = torch.zeros(self.kv_heads, groups, m, self.head_dim)
        for head in range(self.kv_heads):
            own = torch.randn(groups, m, self.head_dim, generator=source) * self.slow
            if head % 2 == 0 or m == 1:
                q[head] = scene[head, :m] + 0.2 * own
            else:
                common, less = (torch.randn(n, 1, self.head_dim, generator=source) * self.slow for n in (1, groups))
                q[head] = self.flat * common + 0.35 * self.flat * less + 0.1 * self.flat * own
        return q.flatten(0, 1)[None]


class Quiet(AllHeld):
    """Attends nothing, so that a memory is filled at the cost of its fold."""

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        return query.new_zeros(*query.shape[:-1], values.shape[-1])


@dataclass(frozen=True)
class BestClusters(UntilMass):
    """The `k` best clusters, whatever they hold."""

    k: int = 1

    def taken(self, view: View, query: Tensor, joined: Joined, scale: float) -> Tensor:
        g = view.geometry
        means = joined.found.mean.unflatten(-1, (g.kv_heads, -1))[:, 0].transpose(1, 2)
        scores = query.unflatten(1, (g.kv_heads, -1)) @ means[:, :, None].transpose(-1, -2)
        scores = scores.masked_fill(joined.found.count[:, :, None, None] == 0, -torch.inf)
        best = scores.topk(min(self.k, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def filled(stream: Looks, memory: Memory, tokens: int, into: ArenaState | None = None) -> ArenaState:
    """A memory that has read so many tokens; `into`: one that has read some of them."""
    state = replace(memory, recall=Quiet()).build(**stream.geometry()) if into is None else into
    assert isinstance(state, ArenaState)
    at = state.position // stream.patches
    while at < tokens // stream.patches:
        # Ends with single frames, so that as many leave as in any step.
        count = min(32, max(1, tokens // stream.patches - 4 - at))
        k, v = stream.frames(at, count)
        with state.step(k.shape[2]):
            state.attend(0, torch.zeros(1, stream.heads, k.shape[2], stream.head_dim), k, v)
        at += count
    return state


def like(state: ArenaState, memory: Memory, stream: Looks) -> ArenaState:
    """What `filled` gave, as a memory with another recall."""
    twin = memory.build(**stream.geometry())
    assert isinstance(twin, ArenaState)
    twin.load_state_dict(state.state_dict())
    return twin


def looked(state: ArenaState, stream: Looks, m: int) -> tuple[Tensor, list[float]]:
    """What the next frame, or token, reads, and the share of all tokens that each key head fetches."""
    now = state.position // stream.patches
    k, v = (x[:, :, :m] for x in stream.frames(now, 1))
    with state.step(m, commit=False) as opened:
        out = state.attend(0, stream.queries(now, m), k, v)
    fetched = torch.zeros(stream.kv_heads)
    for tokens in opened.shared[UntilMass, 0]:
        fetched.index_add_(0, tokens.head, (tokens.index >= 0).sum(1).float())
    return out, (fetched / state.position).tolist()


def exact(state: ArenaState, memory: Memory, stream: Looks, m: int) -> Tensor:
    """The same by full attention."""
    return looked(like(state, replace(memory, recall=UntilMass(1.0)), stream), stream, m)[0]


def off(ours: Tensor, full: Tensor) -> float:
    """Error relative to the size of what it should be."""
    return float((ours - full).norm() / full.norm())


def adaptive(bench: Bench) -> None:
    """Tokens fetched at an equal error, by mass and by a fixed number of clusters; and by stage and head."""
    stream = Looks(heads=16, kv_heads=8, head_dim=64, patches=10)
    memory = recipe("v-rex", window=320)
    state = filled(stream, memory, 9600)
    for m, stage, paper in ((stream.patches, "frames", "32.7 % (25.1–36.1)"), (1, "generation", "2.5 % (1.4–2.9)")):
        _, shares = looked(like(state, memory, stream), stream, m)
        bench.row(
            f"tokens fetched of all, {stage}: mean of key heads, and from which to which", paper,
            f"{mean(shares):.1%}, {min(shares):.1%} to {max(shares):.1%}", None,
            f"Th_r {SHARE}; a stream made up so that half of a frame's heads are peaked and half look at everything, and "
            "one token is peaked; the paper's single heads need 4.2 to 44 %",
        )  # fmt: skip
    m = stream.patches
    full = exact(state, memory, stream, m)
    ours, shares = looked(like(state, memory, stream), stream, m)
    error, clusters = off(ours, full), used(state)
    low, high = 1, clusters
    while low < high:  # the fewest clusters that are as near
        k = (low + high) // 2
        other, _ = looked(like(state, replace(memory, recall=BestClusters(SHARE, k=k)), stream), stream, m)
        low, high = (low, k) if off(other, full) <= error else (k + 1, high)
    _, fixed = looked(like(state, replace(memory, recall=BestClusters(SHARE, k=low)), stream), stream, m)
    ratio = mean(fixed) / mean(shares)
    bench.row(
        "tokens fetched by a fixed number of clusters over those fetched by mass, at equal error", "≥ 2", f"×{ratio:.2f}",
        ratio >= 2, f"{low} of {clusters} clusters for every query: {mean(fixed):.1%} of tokens; by mass {mean(shares):.1%}, "
        f"error {error:.3f}",
    )  # fmt: skip
    for th_r in (0.1, 0.3, 0.6, 0.9, 1.0):
        got, shares = looked(like(state, replace(memory, recall=UntilMass(th_r)), stream), stream, m)
        bench.figures.setdefault("error over share of tokens fetched|x", []).append(mean(shares))
        bench.figures.setdefault("error over share of tokens fetched|y", []).append(off(got, full))


# -- what the index costs --------------------------------------------------------------------------------------------


def used(state: ArenaState) -> int:
    """Clusters of the first layer."""
    return int((state.mine[0]["fold"]["count"] > 0).sum())


def similar(bench: Bench, frames: int) -> None:
    """Tokens per cluster by how alike frames are, and device bytes of a scene that stays."""
    memory, counts = recipe("v-rex", window=64), []
    for noise in (3.0, 1.0, 0.6, 0.3, 0.1):
        stream = Looks(heads=8, kv_heads=8, head_dim=64, shown=10**9, noise=noise)
        state = filled(stream, memory, frames * stream.patches)
        a, b = (stream.frames(t, 1)[0][0] for t in (0, 1))
        alike = float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())
        counts.append(state.position / used(state))
        bench.row(
            f"tokens a cluster where frames are alike by {alike:.2f}, after {frames} frames", "rises; 32 on average",
            f"{counts[-1]:.1f}", counts == sorted(counts), f"{used(state)} clusters of {stream.patches} patches",
        )  # fmt: skip
    early = state.nbytes
    late = filled(stream, memory, 4 * frames * stream.patches, state).nbytes
    bench.row(
        f"device bytes of a still scene after {4 * frames} frames over after {frames}", "1", f"×{late / early:.2f}",
        late == early, f"{late:,} bytes",
    )  # fmt: skip
    bench.figures["tokens a cluster over noise|x"] = [3.0, 1.0, 0.6, 0.3, 0.1]
    bench.figures["tokens a cluster over noise|y"] = counts


def table(bench: Bench) -> None:
    """Bytes of the table over those of all keys and values, at the paper's sizes, in bfloat16."""
    stream = Looks(noise=0.1)
    memory = replace(recipe("v-rex", window=64), recall=Quiet())
    state = memory.build(**stream.geometry(), dtype=torch.bfloat16)
    assert isinstance(state, ArenaState)
    for at in range(0, 96, 32):
        k, v = (x.bfloat16() for x in stream.frames(at, 32))
        with state.step(k.shape[2]):
            state.attend(0, torch.zeros(1, stream.heads, k.shape[2], stream.head_dim, dtype=torch.bfloat16), k, v)
    mine, clusters = state.mine[0]["fold"], used(state)
    whole = state.position * 2 * stream.kv_heads * stream.head_dim * 2
    share = sum(mine[name][0, 0, :clusters].nbytes for name in ("bits", "mean", "count")) / whole
    bench.row(
        "table of clusters over all keys and values, 8 heads of 128", "1.67 % at 32 tokens a cluster", f"{share:.2%}",
        share <= 0.0167, f"{state.position / clusters:.1f} tokens a cluster; on the device, the members' numbers are in RAM; "
        "places for clusters double, so up to twice that is reserved",
    )  # fmt: skip


def scoring(bench: Bench) -> None:
    """Seconds in which queries choose, by how many tokens and how many clusters there are."""
    memory, took, sizes = recipe("v-rex", window=64), {}, {}
    for name, shown, tokens in (("fewer", 32, 2560), ("more tokens", 128, 10240), ("more clusters", 32, 10240)):
        stream = Looks(heads=16, kv_heads=8, head_dim=64, shown=shown)
        watched = Watched(SHARE)
        state = like(filled(stream, memory, tokens), replace(memory, recall=watched), stream)
        spent = []
        for _ in range(9):
            watched.spent.clear()
            looked(state, stream, stream.patches)
            spent.append(watched.spent["choosing"])
        took[name], sizes[name] = median(spent), used(state)
    for name, paper in (("more tokens", "1"), ("more clusters", "proportional to clusters")):
        ratio, clusters = took[name] / took["fewer"], sizes[name] / sizes["fewer"]
        bench.row(
            f"time of choosing with 4 times the tokens in ×{clusters:.2f} clusters", paper, f"×{ratio:.2f}",
            ratio < 1.6 if name == "more tokens" else ratio > 2, f"{1e3 * took[name]:.1f} ms for {sizes[name]} clusters",
        )  # fmt: skip


# -- whole steps -----------------------------------------------------------------------------------------------------


def steps(bench: Bench, sizes: Sequence[int], rounds: int) -> None:
    """A whole step, one layer of Llama 3 8B, beside attention to everything, which neither hashes nor fetches."""
    stream, memory = Looks(), recipe("v-rex")
    filling: ArenaState | None = None
    first: dict[str, int] = {}
    for tokens in sizes:
        filling = filled(stream, memory, tokens, filling)
        watched = Watched(SHARE)
        state = like(filling, replace(memory, recall=watched), stream)
        keys, values = (torch.randn(1, stream.kv_heads, tokens, stream.head_dim) for _ in "kv")
        for m, stage in ((stream.patches, "frame"), (1, "token")):
            ours, kernel, products, shares = in_turns(state, watched, stream, (keys, values), m, rounds)
            whole = median(ours)
            spent = {name: seconds / (rounds + 1) for name, seconds in watched.spent.items()}
            attending = spent["all"] - spent["choosing"] - spent["fetching"]
            for name, other in (("kernel", kernel), ("products", products)):
                ratio = median(a / b for a, b in zip(ours, other, strict=True))
                if ratio < 1:
                    first.setdefault(f"{stage}, {name}", tokens)
                else:
                    first.pop(f"{stage}, {name}", None)
                bench.figures.setdefault(f"time of a step over that of full attention|x|{stage}, {name}", []).append(
                    float(tokens)
                )
                bench.figures.setdefault(f"time of a step over that of full attention|y|{stage}, {name}", []).append(
                    ratio
                )
                bench.row(
                    f"a step of {m} at {tokens:,} tokens over attention to all of them, " + (
                        "the library's kernel" if name == "kernel" else "two plain products"
                    ),
                    "< 1 from 1K–5K on" if m > 1 else "–", f"×{ratio:.2f}",
                    ratio < 1 if name == "kernel" and m > 1 else None,
                    f"{1e3 * whole:.1f} against {1e3 * median(other):.1f} ms, {mean(shares):.1%} of tokens fetched; choosing "
                    f"{1e3 * spent['choosing']:.1f}, fetching {1e3 * spent['fetching']:.1f}, attending {1e3 * attending:.1f} ms",
                )  # fmt: skip
    for stage in ("frame", "token"):
        bench.row(
            f"tokens from which a step of one {stage} is cheaper than the kernel, and than plain products", "–",
            ", ".join(f"{first[key]:,}" if (key := f"{stage}, {name}") in first else f"> {sizes[-1]:,}" for name in ("kernel", "products")),
            None, "one of the sizes tried; the paper's dense attention also has to bring everything from the host",
        )  # fmt: skip


def in_turns(
    state: ArenaState, watched: Watched, stream: Looks, dense: tuple[Tensor, Tensor], m: int, rounds: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of our step, of the library's attention and of plain products, in turns; shares of tokens fetched."""
    keys, values = dense
    now = state.position // stream.patches
    query, (k, v) = stream.queries(now, m), (x[:, :, :m].contiguous() for x in stream.frames(now, 1))
    bias = torch.zeros(1, 1, m, keys.shape[2])
    bias[..., -m:] = torch.full((m, m), -torch.inf).triu(1)
    scale, shares = stream.head_dim**-0.5, looked(state, stream, m)[1]
    ours: list[float] = []
    kernel: list[float] = []
    products: list[float] = []
    watched.spent.clear()
    for n in range(rounds + 1):
        start = time.perf_counter()
        with state.step(m, commit=False):
            state.attend(0, query, k, v)
        first = time.perf_counter()
        softmax_attention(query, keys, values, bias, scale, None)
        second = time.perf_counter()
        attention_of_parts(query, [Part(keys, values, bias)], scale)
        third = time.perf_counter()
        if n:  # the first one warms up
            ours.append(first - start)
            kernel.append(second - first)
            products.append(third - second)
    watched.log.clear()
    return ours, kernel, products, shares
