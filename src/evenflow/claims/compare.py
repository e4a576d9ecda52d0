"""Every memory on one stream with one budget: what it still knows, how far it is from full attention, what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from ..memory import Absolute, Memory, MemoryState, Never
from ..memory.chunks import ArenaState
from ..recipes import recipe, recipes
from .result import Result, Row, machine
from .streams import Frames, Needle, Step

BUDGET = 12  # frames that a token may attend, the fresh ones among them
CHUNK = 3  # frames a step
YOUNG, OLD = 2 * BUDGET, 10 * BUDGET  # frames read where cost is compared
LATE = OLD - 24  # from this frame on outputs are compared and questions are asked
AGES = (3, 6, 9, 12, 24, 48, 96)  # frames
WORD_AGE = 48
ITEMS = (*(f"{age}" for age in AGES), "first", "watched", f"word, {WORD_AGE}")  # what `Measured.recall` counts
TIMED = 15  # steps whose time is taken
PROMPTED = {"anchor-forcing"}  # these take `segment` for the number of the prompt, which changes with the scene
CUTS = {"liveact": (6, 8)}  # these bring so many frames first, and then as many at a time; all others CHUNK
STREAM = Frames(needle_every=CHUNK, watched=(25, 28))  # out of any window long before the end
GROWS = {"v-rex": "; its table of clusters, on the device, grows with what is new, which is scored by every step"}


def parameters(stream: Frames = STREAM, budget: int = BUDGET) -> dict[str, dict[str, Any]]:
    """What every recipe is given, so that a token attends at most `budget` frames: the one place where that is said."""
    frame, fresh = stream.frame, CHUNK
    kept = budget - fresh  # frames that are held when a chunk comes, where frames come and go together
    tokens = budget * frame
    return {
        "anchor-forcing": {"window": budget - 4, "sink": 2, "junction": 2, "frame": frame},  # it keeps two junctions
        "deep-forcing": {"window": budget, "capacity": kept, "sink": 4, "recent": fresh + 1, "frame": frame},
        "dvgt2": {"window": budget, "frame": frame},
        "forcing-kv": {
            "static": ((), *((0,) for _ in range(1, stream.layers))), "sink": 1, "recent": kept - 3, "static_recent": 1,
            "memory": 2, "segments": 8, "start": 1, "frame": frame,
        },
        "full": {},
        "live-vlm": {
            "prompt": frame, "cache_size": (kept - fresh - 1) * frame, "recent_frames": fresh, "clip_frames": fresh,
            "observe": frame, "page": max(1, frame // 4), "frame": frame,
        },
        "liveact": {"steps": 1, "frame": frame},
        "longlive": {"window": budget, "sink": fresh, "frame": frame},
        "kvpo": {"window": budget, "sink": fresh, "physical": budget, "nearest": fresh + 1, "frame": frame},
        "hybrid-forcing": {"sink": fresh, "window": budget - fresh, "block": frame, "projection": 1.0, "frame": frame},
        "temp-cache": {"window": kept, "frame": frame},
        "infinite-vggt": {"total_budget": stream.layers * kept * frame, "frame": frame},
        "knot-forcing": {"window": kept - 1, "frame": frame},
        "learned-sink": {"window": tokens},
        "motionstream": {"sink": 1, "window": kept // fresh - 1, "frame": frame},
        "recompute": {"window": tokens},
        "rekv": {  # a question brings its own frames along, behind the prompt and what is retrieved
            "n_init": frame, "n_local": (budget - 1) * frame, "retrieve_size": kept - 2, "frame": frame,
        },
        "reward-forcing": {"window": budget, "sink": fresh, "frame": frame},
        "rolling-forcing": {"anchor": fresh, "budget": kept, "frame": frame},  # it holds the anchor beside these
        "self-forcing": {"window": budget, "frame": frame},
        "stream-t1": {"window": kept, "max_sink": 2 * fresh, "sink": fresh, "frame": frame},
        "streamdiffusion-v2": {"num_kv_cache": budget, "sink": fresh, "steps": 1, "t_reset": None, "frame": frame},
        "streaming-llm": {"sink": frame, "window": tokens - frame},
        "streaming-vlm": {
            "window": kept // fresh, "text_round": kept // fresh,
            "text_sink": fresh * frame // 2, "text_window": fresh * frame // 2,
        },
        "v-rex": {"window": kept * frame},  # a token takes about 50 more here, by what it looks for
        "window": {"window": tokens},
        "zero-sink": {"sink": frame, "window": tokens - frame},
    }  # fmt: skip


def memories(names: Sequence[str] = (), stream: Frames = STREAM, budget: int = BUDGET) -> dict[str, Memory]:
    """These recipes (none: all that there are) at this budget.

    Raises ValueError for a wrong name, and for a recipe that has no parameters here.
    """
    given = parameters(stream, budget)
    chosen = names or [info.name for info in recipes("memory")]
    for name in chosen:
        recipe(name)
    missing = [name for name in chosen if name not in given]
    if missing:
        raise ValueError(f"{', '.join(missing)}: say in claims/compare.py what it is given at the shared budget")
    return {name: recipe(name, **given[name]) for name in chosen}


@dataclass(frozen=True)
class Measured:
    """One memory. recall: by age in `AGES`, then of the opening, of a watched detail and of a word; 1 is all of it.

    error: of the outputs against full attention over the last chunks, relative to its size. held: most tokens held by
    any head. nbytes: on the device. ms: median of a step, computing. slower, larger: step time and bytes after `OLD` frames over
    those after `YOUNG`.
    """

    recall: tuple[float, ...]
    error: float
    held: int
    nbytes: int
    ms: float
    slower: float
    larger: float


@dataclass(frozen=True)
class Reading:
    """A memory that reads a stream."""

    state: MemoryState

    def step(self, step: Step, commit: bool = True) -> list[Tensor]:
        """Per layer [B, H_q, m, D]."""
        with self.state.step(step.m, tags=step.tags, commit=commit):
            return [self.state.attend(layer, *tensors) for layer, tensors in enumerate(step.layers)]

    def ask(self, step: Step) -> list[Tensor]:
        """The same for a question, which leaves the memory as it was, and brings things back where it can do that."""
        state = self.state
        if not isinstance(state, ArenaState) or not state.memory.retrieves:
            # Passes of one chunk share the decision of the first, but a question is no pass of another question's chunk.
            return Reading(state.fork()).step(step, commit=False)
        question = state.question()
        with question.retrieve(step.m, step.tags):
            return [question.attend(layer, *tensors) for layer, tensors in enumerate(step.layers)]

    def timed(self, step: Step) -> float:
        """Seconds that this thread computes in one step, taken by a copy; what else the machine does is not in them."""
        twin = Reading(self.state.fork())
        start = time.thread_time()
        twin.step(step)
        return time.thread_time() - start


def built(memory: Memory, stream: Frames) -> Reading:
    """An empty memory for the stream. Where a memory counts tokens, rotations are as many times slower."""
    geometry: dict[str, Any] = dict(stream.geometry(stream.frame if memory.frame == 1 else 1))
    if memory.null == "learned":
        geometry["sink_logits"] = torch.zeros(stream.layers, stream.heads)
    return Reading(memory.build(**geometry))


def like(memory: Memory, stream: Frames) -> Memory:
    """Full attention as the model of this memory knows it: causal or by chunks, at positions that never move."""
    if memory.frame == 1:
        return recipe("full")
    place = memory.place if not memory.place.moves else Absolute()
    frame = memory.frame or stream.frame
    return Memory(evict=Never(), place=place, frame=frame, inside=memory.inside, name="full attention")


def told(stream: Frames, name: str) -> Frames:
    """The stream with the tags that a recipe understands."""
    return replace(stream, segment="scene" if name in PROMPTED else "round")


def steps(name: str) -> list[tuple[int, int]]:
    """First frame and number of frames of every step of a recipe, up to `OLD` frames."""
    first, then = CUTS.get(name, (CHUNK, CHUNK))
    return [(0, first), *((start, then) for start in range(first, OLD, then))]


def questions(stream: Frames, now: int) -> tuple[Needle, ...]:
    """What is asked after `now` frames, in the order of `Measured.recall`."""

    def before(age: int) -> int:
        return (now - age) // stream.needle_every * stream.needle_every

    ages = [stream.needle("detail", before(age)) for age in AGES]
    word = stream.needle("word", before(WORD_AGE))
    return (*ages, stream.needle("detail", 0), stream.needle("watched", stream.watched[0]), word)


class Truth:
    """What full attention gives for the last frames: read once for every kind of it."""

    def __init__(self, stream: Frames) -> None:
        self.stream = stream
        self.known: dict[Any, dict[int, list[Tensor]]] = {}

    def of(self, memory: Memory, cuts: Sequence[tuple[int, int]]) -> dict[int, list[Tensor]]:
        """Outputs by first frame of a step, and layer, of full attention as `like` says."""
        full = like(memory, self.stream)
        kind = (full.inside, full.place, full.frame, cuts[:2])
        if str(kind) not in self.known:
            reading = built(full, self.stream)
            outputs = {start: reading.step(self.stream.step(start, frames)) for start, frames in cuts}
            self.known[str(kind)] = {start: out for start, out in outputs.items() if start >= LATE}
        return self.known[str(kind)]


def measured(memory: Memory, stream: Frames, truth: Truth) -> Measured:
    """Read the stream with one memory. Its seconds are those of this machine, now."""
    cuts = steps(memory.name)
    reading = built(memory, stream)
    young, age = reading, 0
    outputs: dict[int, list[Tensor]] = {}
    recalls: list[list[float]] = []
    for start, frames in cuts:
        out, now = reading.step(stream.step(start, frames)), start + frames
        if not age and now >= YOUNG:
            young, age = Reading(reading.state.fork()), now
        if start >= LATE:
            outputs[start] = out
            asked = questions(stream, now)
            recalls.append([stream.recalled(one, reading.ask(stream.question(now, frames, one))) for one in asked])
    pairs = [
        (ours, theirs)
        for start, full in truth.of(memory, cuts).items()
        for ours, theirs in zip(outputs[start], full, strict=True)
    ]
    off = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
    size = sum(float(theirs.square().sum()) for _, theirs in pairs)
    state = reading.state
    nexts = stream.step(age, frames), stream.step(now, frames)
    # In turns, so that a machine that slows down slows both.
    times = [(young.timed(nexts[0]), reading.timed(nexts[1])) for _ in range(TIMED)]
    return Measured(
        recall=tuple(mean(values) for values in zip(*recalls, strict=True)),
        error=(off / size) ** 0.5,
        held=max(
            len(state.held(layer, head=head)) for layer in range(stream.layers) for head in range(stream.kv_heads)
        ),
        nbytes=state.nbytes,
        ms=1000 * median(old for _, old in times),
        slower=median(old / new for new, old in times),
        larger=state.nbytes / young.state.nbytes,
    )


def compare(
    names: Sequence[str] = (), stream: Frames = STREAM, say: Callable[[str], None] = lambda text: None
) -> Result:
    """Measure the memories `names` (none: all of them): a row for each, and under figures, as "NAME|recall",
    "NAME|error" and so on, the fields of `Measured`."""
    start = time.perf_counter()
    truth = Truth(stream)
    rows: list[Row] = []
    figures: dict[str, list[float]] = {}
    for name, memory in memories(names, stream).items():
        got = measured(memory, told(stream, name), truth)
        for key, value in vars(got).items():
            figures[f"{name}|{key}"] = [float(x) for x in (value if isinstance(value, tuple) else (value,))]
        bounded = None if name == "full" else got.larger == 1 and got.slower <= 1.1
        ours = f"bytes ×{got.larger:.2f}, a step ×{got.slower:.2f}"
        rows.append(
            Row(
                memory.spec, "bytes ×1, a step ×1", ours, bounded,
                f"held: {got.held / stream.frame:.1f} frames{GROWS.get(name, '')}",
            )
        )  # fmt: skip
        say(f"{name}: recall {mean(got.recall):.2f}, error {got.error:.2f}, {ours}")
    title = f"After {OLD} frames over after {YOUNG}, every memory on one stream, {BUDGET} frames to attend."
    return Result("compare", title, tuple(rows), time.perf_counter() - start, machine(), figures)
