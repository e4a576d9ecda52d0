"""Streams of two lanes: drawn at random, and fed to lanes unit by unit, in pieces, in any order, by one thread or two."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenflow.memory import Rope
from evenflow.memory.attention import softmax_attention
from evenflow.memory.lane_masks import packed_mask, packed_positions
from evenflow.memory.lane_places import Decoupled, Gapped, Interleaved, Overlapped
from evenflow.memory.lanes import Lanes, LanesState
from evenflow.memory.rope import Rotary
from evenflow.recipes.reference import Call
from evenflow.recipes.reference import lanes as oracle

PLACES = {"interleaved": Interleaved(), "overlapped": Overlapped(), "decoupled": Decoupled(), "gap": Gapped()}
PLAIN = Rope()
AXES = Rope(
    inv_freq=(1.0, 0.5, 0.25, 0.125, 0.06, 0.03), axes=(0, 1, 2, 0, 1, 2)
)  # interleaved sections, as Qwen3-VL's


@dataclass
class Script:
    """Calls by layer and unit. runs: of each unit, how many words, or the coordinates of picture tokens."""

    source: list[list[Call]]
    target: list[list[Call]]
    runs: list[list[int | Tensor]]
    rope: Rope | None
    held: int = 0
    out: dict[str, list[list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self):
        self.out = {name: [[] for _ in self.source] for name in ("source", "target")}

    @property
    def counts(self):
        return [call.q.shape[1] for call in self.target[0]]

    @property
    def coordinates(self):
        return [
            [place for run in unit for place in ([None] * run if isinstance(run, int) else run.tolist())]
            for unit in self.runs
        ]

    def build(self, scheme="decoupled", dtype=torch.float64, **lanes) -> LanesState:
        q, k = self.source[0][0].q, self.source[0][0].k
        self.__post_init__()
        return Lanes(PLACES[scheme], **lanes).build(
            layers=len(self.source), heads=len(q), kv_heads=len(k), head_dim=q.shape[-1], rope=self.rope, dtype=dtype
        )

    def reference(self, scheme="decoupled", whole=False):
        seen, said = oracle.reference(
            self.source,
            self.target,
            self.rope,
            scheme=scheme,
            coordinates=self.coordinates,
            whole=whole,
            held=self.held,
        )
        return {"source": seen, "target": said}

    def results(self):
        none = self.source[0][0].q[:, :0]
        return {name: [torch.cat(parts or [none], 1) for parts in layers] for name, layers in self.out.items()}

    def off(self, other):
        """Largest difference to other results."""
        return max(
            float((a.double() - b).abs().max()) if a.numel() else 0.0
            for name, layers in self.results().items()
            for a, b in zip(layers, other[name], strict=True)
        )

    def read(self, state, unit, sizes=(10**6,)):
        """All of a unit of the source lane, in pieces of these sizes, over and over; then it is closed."""
        at = 0
        for run in self.runs[unit]:
            count = run if isinstance(run, int) else len(run)
            for piece in pieces(count, sizes):
                tags = None if isinstance(run, int) else {"coordinates": run[piece]}
                calls = [part(layer[unit], slice(at + piece.start, at + piece.stop)) for layer in self.source]
                self._fed("source", calls, state.read(piece.stop - piece.start, unit, tags))
            at += count
        state.close("source", unit)

    def write(self, state, unit, sizes=(10**6,)):
        """All of a unit of the target lane but what is held back of it, after what is of the one before."""
        last = unit + 1 == len(self.counts)
        late = min(self.held, self.counts[unit - 1]) if unit else 0
        held = 0 if last else min(self.held, self.counts[unit])
        calls = [part(layer[unit], slice(0, self.counts[unit] - held)) for layer in self.target]
        if late:
            before = [part(layer[unit - 1], slice(self.counts[unit - 1] - late, None)) for layer in self.target]
            calls = [joined(a, b) for a, b in zip(before, calls, strict=True)]
        for piece in pieces(calls[0].q.shape[1], sizes):
            self._fed("target", [part(call, piece) for call in calls], state.write(piece.stop - piece.start, unit))
        state.close("target", unit, held=held)

    def _fed(self, lane, calls, context):
        with context as step:
            for layer, call in enumerate(calls):
                out = step.attend(layer, *(x[None].to(step.geometry.dtype) for x in (call.q, call.k, call.v)))
                self.out[lane][layer].append(out[0])

    def play(self, state, ahead=10**6, sizes=(10**6,), start=0):
        """Reads as far ahead as the places allow, and as `ahead` says, between the writes."""
        units, read = len(self.runs), start
        for unit in range(start, units):
            while read < units and read <= unit + ahead and (read <= unit or state.wait("source", read, 0)):
                self.read(state, read, sizes)
                read += 1
            self.write(state, unit, sizes)
        return self.results()

    def play_threads(self, state, sizes=(10**6,)):
        """A reader and a writer, each in a thread of its own; each waits for nothing but what it needs."""

        def run(lane, feed):
            for unit in range(len(self.runs)):
                assert state.wait(lane, unit, 30)
                feed(state, unit, sizes)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(run, "source", self.read), pool.submit(run, "target", self.write)]:
                done.result()
        return self.results()

    def packed(self, scheme="decoupled", origin="unit"):
        """One pass over all that was seen, then all that was said."""
        axes = 1 + (0 if self.rope is None else self.rope.coordinates)
        where = torch.cat(packed_positions(PLACES[scheme], self.runs, self.counts, axes=axes, origin=origin))
        sizes = [call.q.shape[1] for call in self.source[0]]
        unit = torch.cat([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in (sizes, self.counts)])
        target = torch.arange(len(unit)) >= sum(sizes)
        mask = packed_mask(target, unit, shift=bool(self.held))
        results = {"source": [], "target": []}
        for seen, said in zip(self.source, self.target, strict=True):
            q, k, v = (torch.cat([getattr(call, name) for call in seen + said], 1)[None] for name in "qkv")
            if self.rope is not None:
                rotary = Rotary(self.rope, q.shape[-1], q.dtype, q.device)
                turn = rotary.at(where if axes > 1 else where[:, 0])
                q, k = rotary.rotate(q, *turn), rotary.rotate(k, *turn)
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)[None, None]
            out = softmax_attention(q, k, v, bias, q.shape[-1] ** -0.5, None)[0]
            results["source"].append(out[:, : sum(sizes)])
            results["target"].append(out[:, sum(sizes) :])
        return results


def script(
    source: Sequence[int | Sequence[int | Tensor]], target: Sequence[int], *, layers=2, heads=4, kv_heads=2, head_dim=12,
    rope: Rope | None = PLAIN, held=0, seed=0,
) -> Script:  # fmt: skip
    made = torch.Generator().manual_seed(seed)
    runs = [[unit] if isinstance(unit, int) else [*unit] for unit in source]
    sizes = [sum(run if isinstance(run, int) else len(run) for run in unit) for unit in runs]

    def draw(m):
        return Call(
            *(torch.randn(h, m, head_dim, generator=made, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
        )

    seen = [[draw(m) for m in sizes] for _ in range(layers)]
    return Script(seen, [[draw(m) for m in target] for _ in range(layers)], runs, rope, held)


def grid(t, h, w, first=0):
    """Coordinates (t, h, w) of a video of t slices, int64 [t·h·w, 3]."""
    return torch.cartesian_prod(torch.arange(first, first + t), torch.arange(h), torch.arange(w))


def pieces(m, sizes):
    at, n = 0, 0
    while at < m:
        step = min(sizes[n % len(sizes)], m - at)
        yield slice(at, at + step)
        at, n = at + step, n + 1


def part(call, columns):
    return Call(call.q[:, columns], call.k[:, columns], call.v[:, columns])


def joined(a, b):
    return Call(*(torch.cat([getattr(a, name), getattr(b, name)], 1) for name in "qkv"))


class Tiny:
    """A random transformer of two layers in float64 that attends through a function (layer, q, k, v)."""

    def __init__(self, vocabulary=29, width=24, heads=4, kv_heads=2, layers=2, seed=0):
        made = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=made, dtype=torch.float64) * shape[0] ** -0.5

        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.words = draw(vocabulary, width) * vocabulary**0.5
        kv = kv_heads * self.dim
        self.layers = [
            (draw(width, width), draw(width, kv), draw(width, kv), draw(width, width), draw(width, 32), draw(32, width))
            for _ in range(layers)
        ]

    def build(self, scheme="decoupled", **lanes):
        return Lanes(PLACES[scheme], **lanes).build(
            layers=len(self.layers), heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, rope=Rope(),
            dtype=torch.float64,
        )  # fmt: skip

    def __call__(self, ids, attend):
        """Logits [m, V] of ids [m]."""
        x = self.words[ids]
        for n, (q, k, v, o, up, down) in enumerate(self.layers):
            y = torch.nn.functional.rms_norm(x, x.shape[-1:])
            heads = ((y @ w).unflatten(-1, (-1, self.dim)).transpose(0, 1)[None] for w in (q, k, v))
            x = x + attend(n, *heads)[0].transpose(0, 1).flatten(1) @ o
            x = x + torch.nn.functional.silu(torch.nn.functional.rms_norm(x, x.shape[-1:]) @ up) @ down
        return x @ self.words.T

    def packed(self, ids, mask, positions):
        """Logits of one pass with a mask [N, N] and positions [N]."""
        turn = Rotary(Rope(), self.dim, torch.float64, torch.device("cpu")).at(positions)
        rotary = Rotary(Rope(), self.dim, torch.float64, torch.device("cpu"))
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None, None]

        def attend(layer, q, k, v):
            q, k = rotary.rotate(q, *turn), rotary.rotate(k, *turn)
            return softmax_attention(q, k, v, bias, self.dim**-0.5, None)

        return self(ids, attend)

    def stream(self, state, source, target, *, held=1, ahead=1, sizes=(10**6,)):
        """Logits of all tokens of the target lane, fed unit by unit (ids [m] each); `held` of each with the next unit."""
        out, read, late = [], 0, target[0][:0]
        for unit, ids in enumerate(target):
            while read < len(source) and read <= unit + ahead:
                for piece in pieces(len(source[read]), sizes):
                    with state.read(piece.stop - piece.start, read) as step:
                        self(source[read][piece], step.attend)
                state.close("source", read)
                read += 1
            keep = held if unit + 1 < len(target) else 0
            fed = torch.cat([late, ids[: len(ids) - keep]])
            for piece in pieces(len(fed), sizes):
                with state.write(piece.stop - piece.start, unit) as step:
                    out.append(self(fed[piece], step.attend))
            late = ids[len(ids) - keep :]
            state.close("target", unit, held=keep)
        return torch.cat(out)
