"""A step of every recipe in its steady state, against the plain ring and bare attention over as many tokens."""

from __future__ import annotations

import cProfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import evenflow as ef
from evenflow.claims.compare import CUTS, memories, parameters, told
from evenflow.claims.streams import Frames
from evenflow.memory import EMPTY, Memory, MemoryState, Recall, View

from .timing import interleaved, ratio

OURS, RING, FLOOR = "recipe", "plain ring", "attention alone"
UNBOUNDED = {"full", "recompute"}  # these hold everything, or nothing
WARMUP, PROFILED = 3, 3  # steps
# What time spent in a file of `memory` counts as. Its other files, and the recipes, are answers to the verbs; a view,
# and what is no part of Evenflow, count as what calls them.
FILES = {
    "attention": ("attention.py", "buckets.py", "parts.py", "sparse.py"),
    "rotation": ("rope.py",),
    "slots": ("arena.py", "ring.py"),
    "books": ("base.py", "channels.py", "chunks.py", "chunkstep.py", "state.py", "step.py"),
    "": ("view.py",),
}
ANSWERS = "answers"
PARTS = ("attention", "rotation", "slots", ANSWERS, "books")
HOME = Path(ef.__file__).parent
KNOWN = {str(HOME / "memory" / file): part for part, files in FILES.items() for file in files}

Inputs = tuple[list[tuple[Tensor, Tensor, Tensor]], dict[str, Tensor]]


class Source:
    """Random frames, with the tags that a recipe understands, as many tokens at a time as one asks for."""

    def __init__(self, name: str, stream: Frames) -> None:
        self.stream, self.position = stream, 0
        self.random = torch.Generator().manual_seed(0)
        # For their tags, frames that hold next to nothing.
        self.tagged = told(Frames(frame=stream.frame, layers=1, heads=1, kv_heads=1, head_dim=34), name)

    def take(self, m: int) -> Inputs:
        """The next m tokens: q, k, v of every layer, and tags."""
        s = self.stream
        first, inside = divmod(self.position, s.frame)
        tags = self.tagged.step(first, -(-(inside + m) // s.frame)).tags
        shapes = [(1, heads, m, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads)]
        q, k, v = (torch.randn(s.layers, *shape, generator=self.random) for shape in shapes)
        self.position += m
        return list(zip(q, k, v, strict=True)), {name: tag[inside : inside + m] for name, tag in tags.items()}


def read(state: MemoryState, inputs: Inputs, commit: bool = True) -> list[Tensor]:
    """One step: what attention gives in every layer."""
    layers, tags = inputs
    with state.step(layers[0][0].shape[2], tags=tags, commit=commit):
        return [state.attend(layer, *qkv) for layer, qkv in enumerate(layers)]


def filled(memory: Memory, stream: Frames, frames: int) -> tuple[MemoryState, Source, int]:
    """A memory that has read so many frames, where they came from, and how many frames a step brings."""
    geometry: dict[str, Any] = {
        "layers": stream.layers, "heads": stream.heads, "kv_heads": stream.kv_heads, "head_dim": stream.head_dim,
    }  # fmt: skip
    if memory.null == "learned":
        geometry["sink_logits"] = torch.zeros(stream.layers, stream.heads)
    state, source = memory.build(**geometry), Source(memory.name, stream)
    first, then = CUTS.get(memory.name, (3, 3))
    read(state, source.take(first * stream.frame))
    while source.position < frames * stream.frame:
        read(state, source.take(then * stream.frame))
    return state, source, then


@dataclass(frozen=True)
class Counted(Recall):
    """Another answer to recall, and how many tokens it could have shown the last token of a step, itself among them.

    counts: gets one tensor a layer, [R, G], for rows and heads or those that stand for all of them.
    """

    answer: Recall
    counts: list[Tensor]

    def among(self, view: View) -> Tensor | None:
        return self.answer.among(view)

    def visible(self, query: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor | None:
        return self.answer.visible(query, keys, allowed)

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        there = (view.index != EMPTY)[:, :, None]
        there = there if bias is None else there & (bias > -torch.inf)
        self.counts.append(there[:, :, -1].sum(-1))
        return self.answer.attend(view, query, keys, values, bias, scale)


def attended(state: MemoryState, inputs: Inputs) -> int:
    """How many tokens the last token of a step can attend, in the layer where they are most."""
    if state.memory.on_ring:
        return 1 + (state.memory.capacity or 0)
    twin, counts = state.fork(), list[Tensor]()
    twin.memory = replace(twin.memory, recall=Counted(twin.memory.recall, counts))
    read(twin, inputs)
    return max(int(count.max()) for count in counts)


def parts(step: Callable[[], object], count: int) -> dict[str, float]:
    """What share of the time of `count` steps is spent in which of `PARTS`, by a profile of function calls."""
    profiler = cProfile.Profile()
    for _ in range(count):
        profiler.runcall(step)
    entries = profiler.getstats()
    # A built-in function is a name, any other one its code.
    callers: dict[str | CodeType, list[tuple[str | CodeType, float]]] = {}
    for entry in entries:
        for call in entry.calls or ():
            callers.setdefault(call.code, []).append((entry.code, call.totaltime))

    def belongs(code: str | CodeType, below: tuple[str | CodeType, ...] = ()) -> Counter[str]:
        """The parts of a function, in shares."""
        file = "" if isinstance(code, str) else code.co_filename
        part = KNOWN.get(file, ANSWERS if file.startswith(str(HOME)) else "")
        if part:
            return Counter({part: 1.0})
        above = [call for call in callers.get(code, ()) if call[0] not in (*below, code)]
        whole, shares = sum(seconds for _, seconds in above), Counter[str]()
        for caller, seconds in above:
            for name, share in belongs(caller, (*below, code)).items():
                shares[name] += share * seconds / whole
        return shares

    total = Counter[str]()
    for entry in entries:
        own = belongs(entry.code) if not isinstance(entry.code, str) else Counter[str]()
        inside = entry.inlinetime + sum(call.inlinetime for call in entry.calls or () if isinstance(call.code, str))
        for name, share in own.items():
            total[name] += share * inside
    return {name: total[name] / sum(total.values()) for name in PARTS}


def allocated(step: Callable[[], object], count: int) -> float:
    """Bytes that a step asks of the allocator, mean of `count` steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(count):
            step()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events() or ()) / count


def measured(
    memory: Memory, stream: Frames, budget: int, rounds: int, one: bool, rings: dict[int, MemoryState]
) -> dict[str, Any]:
    """One recipe. one: a step brings a single token. rings: full ones by what a token attends there, to be used again."""
    state, source, then = filled(memory, stream, 2 * budget)
    m = 1 if one else then * stream.frame
    some = source.take(m)
    seen = attended(state, some)
    if seen not in rings:
        rings[seen], _, _ = filled(ef.recipe("window", window=seen - 1), stream, 2 * budget)
    query, (keys, values) = some[0][0][0], torch.randn(2, 1, stream.kv_heads, seen, stream.head_dim)
    coming = iter([some, *(source.take(m) for _ in range(2 * rounds + WARMUP + PROFILED))])

    def step() -> None:
        read(state, next(coming))

    def attend() -> None:
        for _ in range(stream.layers):
            scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    seconds = interleaved({OURS: step, RING: lambda: read(rings[seen], (some[0], {})), FLOOR: attend}, rounds, WARMUP)
    return {
        "attended": seen,
        "bytes": state.nbytes,
        "milliseconds": {name: 1e3 * median(times) for name, times in seconds.items()},
        "times": {name: ratio(seconds, OURS, name) for name in (RING, FLOOR)},
        "parts": parts(step, rounds),
        "allocated": allocated(step, PROFILED),
        "allocated by attention": allocated(attend, PROFILED),
    }


def measure(
    *, frames: Sequence[int] = (64, 256), budget: int = 21, layers: int = 2, heads: int = 8, dim: int = 64,
    rounds: int = 7, names: Sequence[str] = (), say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Every recipe at frames of so many tokens, `budget` frames to attend; and one token at a time, those that can.

    times: a step in units of the ring's, which attends as many tokens, and of the library's attention over as many,
    un-rotated, unmasked, with nothing kept. parts: shares of the recipe's own time, see `FILES`. allocated: bytes a step.
    """
    cases: dict[str, dict[str, Any]] = {}
    chosen = names or [name for name in parameters() if name not in UNBOUNDED]
    for frame in frames:
        stream = Frames(frame=frame, layers=layers, heads=heads, kv_heads=heads, head_dim=dim)
        rings: dict[int, MemoryState] = {}
        for name, memory in memories(chosen, stream, budget).items():
            for one in (False, True) if memory.frame == 1 else (False,):
                case = f"{budget} frames of {frame} tokens" + (", one token a step" if one else "")
                say(f"recipes: {case}: {name}")
                cases.setdefault(case, {})[name] = measured(memory, stream, budget, rounds, one, rings)
    return {"title": f"A step of every recipe, {layers} layers, {heads} heads of {dim}", "cases": cases}
