"""What a memory promises that keeps everything in clusters of alike keys, and takes as many as a query needs: V-Rex."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ..memory import Absolute, AllHeld, Memory, Never, UntilMass, View
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
        start, working = time.perf_counter(), time.thread_time()
        taken = super().taken(view, query, joined, scale)
        self.spent["choosing"] = self.spent.get("choosing", 0.0) + time.perf_counter() - start
        self.spent["computing"] = self.spent.get("computing", 0.0) + time.thread_time() - working
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
    everything a little. One token, as when text is written, is peaked in all heads. All values of a head share something.
    Nothing turns with time. sharp: nats by which a peaked query prefers its patch; flat: nats by which scores of the
    others differ.
    """

    seed: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    patches: int = 10
    shown: int = 32
    noise: float = 0.15
    sharp: float = 16.0
    flat: float = 0.5

    def geometry(self) -> dict[str, Any]:
        """What `Memory.build` wants to know."""
        return {
            "layers": 1, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "rope": None,
        }  # fmt: skip

    def random(self, what: str, number: int) -> torch.Generator:
        """Random numbers that depend on nothing else."""
        return torch.Generator().manual_seed(crc32(f"{self.seed} {what} {number}".encode()))

    def scene(self, number: int) -> Tensor:
        """[H_kv, patches, D]"""
        return torch.randn(self.kv_heads, self.patches, self.head_dim, generator=self.random("scene", number))

    def frames(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H_kv, count · patches, D]."""
        source, times = self.random("frames", start), range(start, start + count)
        k = torch.cat([self.scene(t // self.shown) for t in times], 1)
        shared = torch.randn(self.kv_heads, 1, self.head_dim, generator=self.random("values", 0))
        k, v = (x + size * torch.randn(k.shape, generator=source) for x, size in ((k, self.noise), (shared, 1.0)))
        return k[None], v[None]

    def queries(self, t: int, m: int) -> Tensor:
        """Of a frame (m = patches) or of one token, [1, H_q, m, D]."""
        source, groups = self.random(f"queries {m}", t), self.heads // self.kv_heads
        scene = self.scene(int(torch.randint(max(1, t // self.shown), (), generator=source)))
        own, less, common = (
            torch.randn(self.kv_heads, *shape, self.head_dim, generator=source)
            for shape in ((groups, m), (groups, 1), (1, 1))
        )
        # A key has length √D, so a query along it has a score of its own size.
        peaked = self.sharp * self.head_dim**-0.5 * (scene[:, None, :m] + 0.1 * own)
        flat = self.flat * (0.9 * common + 0.4 * less + 0.1 * own)
        looks = torch.arange(self.kv_heads)[:, None, None, None] % 2
        return torch.where((looks == 0) | (m == 1), peaked, flat).flatten(0, 1)[None]


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
    at, end = state.position // stream.patches, tokens // stream.patches
    while at < end:
        # Few frames at once, so that slots are not many more than in the steps to come; the last ones singly.
        count = min(4, max(1, end - 4 - at))
        k, v = stream.frames(at, count)
        with state.step(k.shape[2]):
            state.attend(0, torch.zeros(1, stream.heads, k.shape[2], stream.head_dim), k, v)
        at += count
    return state


def like(state: ArenaState, memory: Memory, stream: Looks) -> ArenaState:
    """What `filled` gave, as a memory that attends."""
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
    """Tokens fetched by stage and head; and by mass beside a fixed number of clusters, at equal error."""
    stream = Looks(heads=16, kv_heads=8, head_dim=64)
    memory = recipe("v-rex", window=320)
    state, m = filled(stream, memory, 9600), stream.patches
    for count, stage, paper in ((m, "frames", "32.7 % (25.1–36.1)"), (1, "generation", "2.5 % (1.4–2.9)")):
        _, shares = looked(like(state, memory, stream), stream, count)
        bench.row(
            f"tokens fetched of all, {stage}: mean of key heads, and from which to which", paper,
            f"{mean(shares):.1%}, {min(shares):.1%} to {max(shares):.1%}", None,
            "made up so that half of a frame's heads look for one thing and half at everything, and a single token for one "
            "thing; the paper's single heads need 4.2 to 44 %" if count > 1 else "",
        )  # fmt: skip

    def read(recall: UntilMass) -> tuple[Tensor, float]:
        """Error of each key head, and the share of tokens fetched."""
        out, shares = looked(like(state, replace(memory, recall=recall), stream), stream, m)
        each = zip(*(x[0].unflatten(0, (stream.kv_heads, -1)) for x in (out, full)), strict=True)
        return torch.tensor([off(ours, theirs) for ours, theirs in each] + [off(out, full)]), mean(shares)

    full = exact(state, memory, stream, m)
    clusters, fixed = used(state), {}
    for k in sorted({*range(1, 10), *(round(1.25**n) for n in range(11, 40))}):
        if k <= clusters:
            fixed[k] = read(BestClusters(SHARE, k=k))
    for th_r in (SHARE, 0.6, 0.9):
        errors, share = read(UntilMass(th_r))
        for what, part in (("in every head", slice(0, -1)), ("of all heads together", slice(-1, None))):
            k = next(k for k, (theirs, _) in fixed.items() if bool((theirs[part] <= errors[part]).all()))
            ratio = fixed[k][1] / share
            bench.row(
                f"tokens fetched by a fixed number of clusters over by mass, at equal error {what}, Th_r {th_r}",
                "≥ 2" if th_r == SHARE else "–", f"×{ratio:.2f}", ratio >= 2 if th_r == SHARE else None,
                f"{k} of {clusters} clusters for each query, {fixed[k][1]:.1%} of tokens, against {share:.1%}; error "
                f"{float(errors[-1]):.3f}" + (
                    "" if part.start == 0 or ratio >= 2 else
                    ", nearly all of it in the heads that look for one thing, which take one cluster and leave the rest of "
                    "the mass; that the others read nearly exactly does not count in a sum"
                ),
            )  # fmt: skip
        bench.figures.setdefault("error over share of tokens fetched|x|by mass", []).append(share)
        bench.figures.setdefault("error over share of tokens fetched|y|by mass", []).append(float(errors[-1]))
    bench.figures["error over share of tokens fetched|x|fixed number"] = [share for _, share in fixed.values()]
    bench.figures["error over share of tokens fetched|y|fixed number"] = [float(e[-1]) for e, _ in fixed.values()]


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
    stream = Looks()
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
    for name, shown, tokens in (("fewer", 8, 2560), ("more tokens", 32, 10240), ("more clusters", 8, 10240)):
        stream = Looks(heads=16, kv_heads=8, head_dim=64, shown=shown)
        watched = Watched(SHARE)
        state = like(filled(stream, memory, tokens), replace(memory, recall=watched), stream)
        spent = []
        for _ in range(9):
            watched.spent.clear()
            looked(state, stream, stream.patches)
            spent.append(watched.spent["computing"])  # whoever else the machine works for
        took[name], sizes[name] = median(spent), used(state)
    for name, paper in (("more tokens", "1"), ("more clusters", "proportional to clusters")):
        ratio, clusters = took[name] / took["fewer"], sizes[name] / sizes["fewer"]
        bench.row(
            f"time of choosing with 4 times the tokens in ×{clusters:.2f} clusters", paper, f"×{ratio:.2f}",
            ratio < 1.6 if name == "more tokens" else ratio > 2, f"{1e3 * took[name]:.1f} ms for {sizes[name]} clusters",
        )  # fmt: skip


# -- whole steps -----------------------------------------------------------------------------------------------------


def steps(bench: Bench, sizes: Sequence[int], rounds: int, stream: Looks = Looks()) -> None:
    """A whole step, one layer of Llama 3 8B, beside one of full attention, and beside the bare products of that."""
    memory = recipe("v-rex")
    filling: ArenaState | None = None
    filling_full: ArenaState | None = None
    full = Memory(evict=Never(), place=Absolute())
    first: dict[str, int] = {}
    for tokens in sizes:
        filling, filling_full = filled(stream, memory, tokens, filling), filled(stream, full, tokens, filling_full)
        watched = Watched(SHARE)
        state = like(filling, replace(memory, recall=watched), stream)
        everything = like(filling_full, full, stream)
        for m, stage in ((stream.patches, "frame"), (1, "token")):
            took, shares = in_turns(state, everything, watched, stream, m, rounds)
            spent = {name: 1e3 * seconds / (rounds + 1) for name, seconds in watched.spent.items()}
            attending = spent["all"] - spent["choosing"] - spent["fetching"]
            ratios = {}
            for name in ("full attention", "plain products"):
                ratio = ratios[name] = median(a / b for a, b in zip(took["ours"], took[name], strict=True))
                if ratio >= 1:
                    first.pop(f"{stage}, {name}", None)
                else:
                    first.setdefault(f"{stage}, {name}", tokens)
                figure = f"time of a step of one {stage} over that of full attention"
                bench.figures.setdefault(f"{figure}|x|{name}", []).append(float(tokens))
                bench.figures.setdefault(f"{figure}|y|{name}", []).append(ratio)
            bench.row(
                f"time of one {stage} at {tokens:,} tokens over that of: {', '.join(ratios)}",
                "< 1 at 5K to 40K" if m > 1 else "–", ", ".join(f"×{ratio:.2f}" for ratio in ratios.values()),
                ratios["full attention"] < 1 if m > 1 else None,
                f"{1e3 * median(took['ours']):.1f} ms: choosing {spent['choosing']:.1f}, fetching {spent['fetching']:.1f}, "
                f"attending {attending:.1f}, the rest is clustering and the window; {mean(shares):.1%} of tokens fetched",
            )  # fmt: skip
    for stage, m in (("frame", stream.patches), ("token", 1)):
        known = (first.get(f"{stage}, {name}") for name in ("full attention", "plain products"))
        bench.row(
            f"tokens from which a step of {m} is cheaper than: full attention, plain products", "–",
            ", ".join("not yet" if tokens is None else f"{tokens:,}" for tokens in known), None,
            "of the sizes above; the paper's full attention has to bring everything from the host besides",
        )  # fmt: skip


def in_turns(
    state: ArenaState, full: ArenaState, watched: Watched, stream: Looks, m: int, rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of our step, of one of full attention and of its plain products, in turns; shares of tokens fetched."""
    now = state.position // stream.patches
    query, (k, v) = stream.queries(now, m), (x[:, :, :m].contiguous() for x in stream.frames(now, 1))
    keys, values = (
        torch.cat([x[:, :, : full.position], y], 2) for x, y in ((full.slots[0].keys, k), (full.slots[0].values, v))
    )
    bias = torch.zeros(1, 1, m, keys.shape[2])
    bias[..., -m:] = torch.full((m, m), -torch.inf).triu(1)
    shares = looked(state, stream, m)[1]

    def step(of: ArenaState) -> Tensor:
        with of.step(m, commit=False):
            return of.attend(0, query, k, v)

    def products() -> Tensor:
        return attention_of_parts(query, [Part(keys, values, bias)], stream.head_dim**-0.5)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: step(state), "full attention": lambda: step(full), "plain products": products,
    }  # fmt: skip
    assert torch.allclose(step(full), products(), atol=1e-4)
    took: dict[str, list[float]] = {name: [] for name in calls}
    watched.spent.clear()
    for n in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if n:  # the first one warms up
                took[name].append(time.perf_counter() - start)
    watched.log.clear()
    return took, shares
