"""What windows of frames promise: Self-Forcing, LongLive, Anchor Forcing, MotionStream and Knot Forcing.

Recall is measured on the stream that all memories are compared on (`streams.py`): a needle is planted in a chunk, and a
question that asks for it gets a share of it back, 1 being all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import Absolute, Contiguous, Memory, MemoryState, Places, Rope, View
from ..memory.chunks import ArenaState
from ..recipes import recipe
from ..recipes.knot_forcing import RunningAhead
from ..recipes.reference import Call, self_forcing
from ..recipes.reference.knot_forcing import advanced
from .compare import Reading, built
from .registry import Bench, claim
from .streams import Frames, Step

CHUNK = 3  # frames, each chunk with a needle in its first one
STREAM = Frames(needle_every=CHUNK)


def at(number: int, stream: Frames = STREAM) -> Step:
    """A chunk of a stream."""
    return stream.step(number * CHUNK, CHUNK)


def recall(reading: Reading, planted: int, now: int, stream: Frames = STREAM) -> float:
    """What a question at chunk `now` gets back of the detail that chunk `planted` brought."""
    needle = stream.needle("detail", planted * CHUNK)
    return stream.recalled(needle, reading.ask(stream.question(now * CHUNK, CHUNK, needle)))


def by_age(memory: Memory, chunks: int, ages: Sequence[int]) -> list[float]:
    """Recall of details that are so many chunks old, once `chunks` chunks were read."""
    reading = built(memory, STREAM)
    for number in range(chunks):
        reading.step(at(number))
    return [recall(reading, chunks - age, chunks) for age in ages]


def took(reading: Reading, numbers: Sequence[int]) -> float:
    """Median seconds of a step, each timed by itself."""
    seconds = []
    for number in numbers:
        chunk = at(number)
        start = time.perf_counter()
        reading.step(chunk)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


# -- Self-Forcing --------------------------------------------------------------------------------------------------


@claim("self-forcing")
def self_forcing_(bench: Bench) -> None:
    """Chunks over a cache are one dense pass under a mask, and with a window bytes and time stay what they are."""
    dense(bench, 7)
    noisy(bench, 8)
    endless(bench, 200 if bench.full else 60)
    reach(bench, 60 if bench.full else 30)


def dense(bench: Bench, chunks: int) -> None:
    """The cache against the definition, in float32 as in the card's run, and in float64."""
    made, frame = torch.Generator().manual_seed(0), 16
    shape = 4, 3 * frame, 128
    tags = {"coordinates": torch.stack([torch.arange(3 * frame) % frame // 4, torch.arange(3 * frame) % 4], 1)}
    rope = Rope.axial((44, 42, 42))

    def draw() -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    calls = [Call(draw(), draw(), draw(), tags=tags) for _ in range(chunks)]
    expected = self_forcing.block_causal([calls], rope, frame=frame)[0]
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        state = recipe("self-forcing", frame=frame).build(layers=1, heads=4, head_dim=128, rope=rope, dtype=dtype)
        error = 0.0
        for call, whole in zip(calls, expected, strict=True):
            with state.step(3 * frame, tags=tags):
                out = state.attend(0, *(x[None].to(dtype) for x in (call.q, call.k, call.v)))[0]
            error = max(error, float((out - whole).abs().max()))
        bench.row(
            f"{chunks} chunks over the cache against one dense block-causal pass, {str(dtype)[6:]}",
            "≤ 1e-5" if dtype is torch.float32 else "–", f"{error:.0e}", error <= limit,
        )  # fmt: skip


def noisy(bench: Bench, chunks: int) -> None:
    """Four denoising passes of other content before each clean pass."""
    other = replace(STREAM, seed=1)
    one, many = (built(recipe("self-forcing", window=12, frame=STREAM.frame), STREAM) for _ in range(2))
    for number in range(chunks):
        for attempt in range(4):
            many.step(at(4 * number + attempt, other), commit=False)
        for reading in (one, many):
            reading.step(at(number))
    a, b = one.state.state_dict(), many.state.state_dict()
    bench.row(
        "what four noisy passes a chunk leave in the cache", "nothing",
        "nothing" if all(torch.equal(a[name], b[name]) for name in a) else "something",
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), "every tensor of the state, bit for bit",
    )  # fmt: skip


def endless(bench: Bench, chunks: int) -> None:
    """Bytes and time of a window and of a cache without one."""
    window = 12
    for name, memory in {
        "window of 12 frames": recipe("self-forcing", window=window, frame=STREAM.frame),
        "no window": recipe("self-forcing", window=None, frame=STREAM.frame),
    }.items():
        reading = young = built(memory, STREAM)
        early = 2 * window // CHUNK
        sizes = []
        for number in range(chunks):
            if number == early:
                young = Reading(reading.state.fork())
            reading.step(at(number))
            sizes.append(reading.state.nbytes)
        times = [(young.timed(at(early)), reading.timed(at(chunks))) for _ in range(15)]  # in turns
        larger = sizes[-1] / sizes[early - 1]
        slower = median(old / new for new, old in times)
        promised = name != "no window"
        bench.row(
            f"bytes after {chunks * CHUNK} frames over those after {2 * window}, {name}",
            "1" if promised else "grows", f"×{larger:.2f}", larger == 1 if promised else larger > 2,
        )  # fmt: skip
        bench.row(
            f"time of a chunk there, {name}", "< 1.2" if promised else "grows", f"×{slower:.2f}",
            slower < 1.2 if promised else None,
        )  # fmt: skip
        bench.figures[f"MB held over chunks|x|{name}"] = [float(n) for n in range(chunks)]
        bench.figures[f"MB held over chunks|y|{name}"] = [size / 1e6 for size in sizes]


def reach(bench: Bench, chunks: int) -> None:
    """What a window is: everything up to its length, and nothing beyond."""
    ages = list(range(1, 16))
    shares = by_age(recipe("self-forcing", frame=STREAM.frame), chunks, ages)
    inside = 21 // CHUNK - 1  # chunks that are held while the next one asks
    bench.row(
        "recall of a detail within the window of 21 frames, and beyond", "1 and 0",
        f"{min(shares[:inside]):.3f} and {max(map(abs, shares[inside:])):.3f}",
        min(shares[:inside]) > 0.99 and max(map(abs, shares[inside:])) < 0.05,
    )  # fmt: skip
    bench.figures |= {
        "recall of a detail over frames since|x|self-forcing, 21 frames": [float(age * CHUNK) for age in ages],
        "recall of a detail over frames since|y|self-forcing, 21 frames": shares,
    }


# -- LongLive ------------------------------------------------------------------------------------------------------


@claim("longlive")
def longlive(bench: Bench) -> None:
    """The opening is never lost, and a window computed anew forgets the old prompt but not what was to be seen."""
    opening(bench, 200 if bench.full else 60)
    switch(bench, 40 if bench.full else 12)
    price(bench)


def opening(bench: Bench, chunks: int, budget: int = 12) -> None:
    """A detail of the first chunk, asked for again and again, with the same budget in both memories."""
    memories = {
        "longlive": recipe("longlive", window=budget, frame=STREAM.frame),
        "longlive, infinity": recipe("longlive", window=budget, infinity=True, frame=STREAM.frame),
        "window": recipe("self-forcing", window=budget, frame=STREAM.frame),
    }
    held = {}
    for name, memory in memories.items():
        reading, shares = built(memory, STREAM), []
        for number in range(chunks):
            reading.step(at(number))
            shares.append(recall(reading, 0, number + 1))
        held[name] = len(reading.state.held(0)) // STREAM.frame
        ours = name != "window"
        bench.row(
            f"recall of a detail of the opening after {chunks * CHUNK} frames, {name}",
            "kept" if ours else "lost", f"{shares[-1]:.3f}", min(shares) > 0.99 if ours else None,
            f"{held[name]} frames held; least at any time {min(shares):.3f}",
        )  # fmt: skip
        recent = recall(reading, chunks - 1 - (budget - CHUNK) // CHUNK + 1, chunks)
        bench.row(f"recall of a detail {budget - CHUNK} frames old, {name}", "–", f"{recent:.3f}")
        bench.figures[f"recall of the opening over chunks|x|{name}"] = [float(n) for n in range(chunks)]
        bench.figures[f"recall of the opening over chunks|y|{name}"] = shares


@dataclass(frozen=True)
class Prompted:
    """A small random network of attention layers whose every input has the prompt added to it, as its keys then know.

    weights: per layer for q, k and v [width, width]; heads: of all three.
    """

    weights: tuple[tuple[Tensor, ...], ...]
    heads: int = 4

    @classmethod
    def made(cls, seed: int, layers: int = 4, width: int = 64) -> Prompted:
        """With random weights, for a seed always the same."""
        source = torch.Generator().manual_seed(seed)
        draw = [[torch.randn(width, width, generator=source).double() for _ in "qkv"] for _ in range(layers)]
        return cls(tuple(tuple(w / width**0.5 for w in layer) for layer in draw))

    def noise(self, tokens: int, seed: int) -> Tensor:
        """Latents or a prompt, [tokens, width]."""
        return torch.randn(tokens, len(self.weights[0][0]), generator=torch.Generator().manual_seed(seed)).double()

    def pass_(
        self,
        state: MemoryState,
        x: Tensor,
        prompt: Tensor,
        *,
        anew: bool = False,
        segment: int = 0,
        commit: bool = True,
    ) -> Tensor:
        """One pass over clean latents x [m, width], as a step or (anew) as a recache; what the last layer makes of it."""
        tags = {"segment": torch.full((len(x),), segment)}
        assert isinstance(state, ArenaState)
        with state.recache(len(x), tags=tags) if anew else state.step(len(x), tags=tags, commit=commit):
            for layer, weights in enumerate(self.weights):
                x = x + 0.5 * prompt
                q, k, v = ((x @ w).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for w in weights)
                x = x + state.attend(layer, q, k, v)[0].transpose(0, 1).flatten(1)
        return x


LITTLE = 1e-4  # so little that effects are in proportion to their causes


WAYS: dict[str, dict[str, bool]] = {
    "keep the cache": {},
    "compute anew, sinks stay": {"global_sink": True},
    "compute anew, sinks too": {"global_sink": False},
    "clear the cache": {},
}


def after_switch(net: Prompted, way: str, prompt: Tensor, last: Tensor, frame: int) -> Tensor:
    """The chunk after a switch from `prompt`, 8 chunks into a stream whose last 12 frames are `last`."""
    state = recipe("longlive", frame=frame, **WAYS[way]).build(
        layers=len(net.weights), heads=net.heads, head_dim=64 // net.heads, rope=Rope(), dtype=torch.float64
    )
    chunk, new = CHUNK * frame, net.noise(1, 9)
    for x in torch.cat([net.noise(4 * chunk, 5), last]).split(chunk):
        net.pass_(state, x, prompt)
    if "anew" in way:
        net.pass_(state, last, new, anew=True)
    if "clear" in way:
        state.reset()
    return net.pass_(state, net.noise(chunk, 7), new, commit=False)


def switch(bench: Bench, networks: int, frame: int = 8) -> None:
    """The chunk after a prompt switch: what the old prompt moves in it, and what the frames before it do."""
    leaks: dict[str, list[float]] = {way: [] for way in WAYS}
    sees: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(networks):
        net = Prompted.made(seed)
        prompt, last = net.noise(1, 1), net.noise(4 * CHUNK * frame, 6)
        other, others = prompt + LITTLE * net.noise(1, 2), last + LITTLE * net.noise(len(last), 8)
        for way in WAYS:
            base = after_switch(net, way, prompt, last, frame)
            leaks[way].append(float((after_switch(net, way, other, last, frame) - base).norm()))
            sees[way].append(float((after_switch(net, way, prompt, others, frame) - base).norm()))
    for way in WAYS:
        leak, sight = (
            median(a / b for a, b in zip(moved[way], moved["keep the cache"], strict=True)) for moved in (leaks, sees)
        )
        gone = way in ("compute anew, sinks too", "clear the cache")
        bench.row(
            f"what the old prompt moves in the chunk after a switch, keeping the cache = 100 %: {way}",
            "prompt ignored" if way == "keep the cache" else "prompt followed", f"{leak:.0%}",
            max(leaks[way]) == 0 if gone else None,
            "through the 3 sinks, on which an untrained network leans as on any frame" if way == "compute anew, sinks stay" else "",
        )  # fmt: skip
        bench.row(
            f"what the 12 frames before move in it, keeping the cache = 100 %: {way}",
            "scene jumps" if way == "clear the cache" else "smooth", f"{sight:.0%}",
            None if way == "keep the cache" else sight == 0 if way == "clear the cache" else sight > 0.5,
            f"median of {networks} random networks",
        )  # fmt: skip


def price(bench: Bench) -> None:
    """A recache of 12 frames beside the calls of the 13 chunks that are 10 s of video."""
    reading = built(recipe("longlive", frame=STREAM.frame), STREAM)
    for number in range(8):
        reading.step(at(number))
    chunk = took(reading, range(8, 28))
    twelve, seconds = STREAM.step(0, 12), []
    for _ in range(10):
        assert isinstance(reading.state, ArenaState)
        start = time.perf_counter()
        with reading.state.recache(twelve.m):
            for layer, tensors in enumerate(twelve.layers):
                reading.state.attend(layer, *tensors)
        seconds.append(time.perf_counter() - start)
    share = median(seconds) / (13 * 5 * chunk)
    bench.row(
        "a recache over the attention of 10 s of video, 13 chunks of 5 calls", "about 6 %", f"{share:.1%}", None,
        "the paper's is of the whole network; here attention alone, of frames of 32 tokens",
    )  # fmt: skip


# -- Anchor Forcing ------------------------------------------------------------------------------------------------

SWITCH = 10  # chunks from one prompt to the next, 30 frames


def prompted(number: int, asked: int | None = None) -> Step:
    """Chunk `number` (or a question in its place) whose `segment` says which prompt it belongs to."""
    chunk = at(number)
    if asked is not None:
        chunk = STREAM.question(number * CHUNK, CHUNK, STREAM.needle("detail", asked * CHUNK))
    return replace(chunk, tags={**chunk.tags, "segment": torch.full((chunk.m,), number // SWITCH)})


@claim("anchor-forcing")
def anchor_forcing(bench: Bench) -> None:
    """What appeared right after a prompt switch is still known long after the window has lost it."""
    junctions(bench, 6 if bench.full else 3)
    bounded(bench)


def junctions(bench: Bench, prompts: int) -> None:
    """A detail of the first chunk after each switch, asked for until the next switch."""
    frame = STREAM.frame
    memories = {
        "anchor-forcing": recipe("anchor-forcing", frame=frame),
        "without junction": recipe("anchor-forcing", junction=0, frame=frame),
        "longlive, as many frames held": recipe("longlive", window=18, frame=frame),
        "window, as many frames held": recipe("self-forcing", window=18, frame=frame),
    }
    ages = range(1, SWITCH)
    for name, memory in memories.items():
        reading = built(memory, STREAM)
        shares: dict[int, list[float]] = {age: [] for age in ages}
        for number in range((prompts + 1) * SWITCH):
            began = number // SWITCH * SWITCH  # the chunk that began this prompt
            if began and number > began:
                asked = reading.ask(prompted(number, began))
                shares[number - began].append(STREAM.recalled(STREAM.needle("detail", began * CHUNK), asked))
            reading.step(prompted(number))
        late = [share for age in ages if age * CHUNK >= 12 for share in shares[age]]
        ours = name == "anchor-forcing"
        bench.row(
            f"recall of a switch's first chunk, 12 to {ages[-1] * CHUNK} frames later, {name}",
            "better with a junction" if ours else "–", f"{sum(late) / len(late):.3f}",
            min(late) > 0.99 if ours else None,
            f"{prompts} switches, {len(reading.state.held(0)) // frame} frames held at the end",
        )  # fmt: skip
        bench.figures[f"recall of a switch's first chunk over frames since|x|{name}"] = [
            float(age * CHUNK) for age in ages
        ]
        bench.figures[f"recall of a switch's first chunk over frames since|y|{name}"] = [
            sum(shares[age]) / len(shares[age]) for age in ages
        ]


def bounded(bench: Bench) -> None:
    """The same stream from another origin, at the three regions' positions and at absolute ones."""
    for name, params in {"three regions": {}, "absolute": {"rope_enhance": False}}.items():
        near = built(recipe("anchor-forcing", frame=STREAM.frame, **params), STREAM)
        for number in range(2 * SWITCH):
            near.step(prompted(number))
        far = Reading(near.state.fork())
        far.state.seek(near.state.position + 10_000 * STREAM.frame * CHUNK)
        pairs = zip(near.step(prompted(2 * SWITCH)), far.step(prompted(2 * SWITCH)), strict=True)
        error = max(float((a - b).abs().max()) for a, b in pairs)
        ours = name == "three regions"
        bench.row(
            f"change of the outputs 10,000 chunks further on, {name} positions", "none" if ours else "–",
            f"{error:.0e}" if error else "0", error == 0 if ours else None,
        )  # fmt: skip


# -- MotionStream --------------------------------------------------------------------------------------------------


@claim("motionstream")
def motionstream(bench: Bench) -> None:
    """One first chunk and one last one, read at the same positions however long the stream, and at the same cost."""
    origin(bench, 8)
    kept(bench, 200 if bench.full else 60)
    cost(bench, 480 if bench.full else 160)


class Stored(Contiguous):
    """Positions in the cache, but keys are turned once, where they stood when they came: what the paper does not do."""

    moves: ClassVar[bool] = False


@dataclass(frozen=True)
class Told(Contiguous):
    """Writes down the largest position of each step."""

    largest: list[int] = field(default_factory=list)

    def positions(self, view: View) -> Places:
        places = super().positions(view)
        self.largest.append(max(int(places.keys[view.index >= 0].max()), int(places.queries.max())))
        return places


def origin(bench: Bench, chunks: int) -> None:
    """The same contents at another chunk index; and keys stored rotated, against the definition."""
    ours = recipe("motionstream", frame=STREAM.frame)
    outputs = {}
    for name, memory in {
        "window keys un-rotated": ours,
        "window keys stored rotated": replace(ours, place=Stored()),
        "absolute positions": replace(ours, place=Absolute()),
    }.items():
        near = built(memory, STREAM)
        for number in range(chunks):
            near.step(at(number))
        far = Reading(near.state.fork())
        far.state.seek(near.state.position + 1000 * STREAM.frame * CHUNK)
        outputs[name] = near.step(at(chunks))
        error = max(float((a - b).abs().max()) for a, b in zip(outputs[name], far.step(at(chunks)), strict=True))
        if name != "window keys stored rotated":
            promised = name == "window keys un-rotated"
            bench.row(
                f"change of the outputs 1,000 chunks further on, {name}", "≤ 1e-5" if promised else "–", f"{error:.0e}",
                error <= 1e-5 if promised else error > 1e-3,
                "" if promised else "the control: its sinks fall behind",
            )  # fmt: skip
        else:
            wrong = max(
                float((a - b).abs().max())
                for a, b in zip(outputs[name], outputs["window keys un-rotated"], strict=True)
            )
            bench.row(
                f"error of a memory with {name}", "violates it", f"{wrong:.0e}", wrong > 1e-3,
                "the control: one chunk reads keys that stand where it stands itself",
            )  # fmt: skip
    place = Told()
    told = built(replace(ours, place=place), STREAM)
    for number in range(100):
        told.step(at(number))
    bench.row("largest position in 100 chunks, c3 s1 w1", "8", f"{max(place.largest)}", max(place.largest) == 8)


def kept(bench: Bench, chunks: int) -> None:
    """The opening, with one sink chunk and one of window against two of window."""
    for name, params in {"s1 w1": {}, "s0 w2": {"sink": 0, "window": 2}}.items():
        reading, sizes = built(recipe("motionstream", frame=STREAM.frame, **params), STREAM), []
        for number in range(chunks):
            reading.step(at(number))
            sizes.append(reading.state.nbytes)
        share = recall(reading, 0, chunks)
        bench.row(
            f"recall of a detail of the opening after {chunks} chunks, {name}", "kept" if params == {} else "lost",
            f"{share:.3f}", share > 0.99 if params == {} else abs(share) < 0.05,
            f"{len(reading.state.held(0)) // STREAM.frame} frames held",
        )  # fmt: skip
        bench.row(
            f"bytes after {chunks} chunks over those after 4, {name}", "1", f"×{sizes[-1] / sizes[3]:.2f}",
            sizes[-1] == sizes[3],
        )  # fmt: skip


def cost(bench: Bench, frame: int) -> None:
    """Attention of a chunk over 9 frames against 21: larger frames than the other streams have, so that it dominates."""
    stream = replace(STREAM, frame=frame, layers=1, heads=4, kv_heads=4, head_dim=128, quiet=64)
    readings = {w: built(recipe("motionstream", window=w, sink=s, frame=frame), stream) for w, s in ((1, 1), (6, 0))}
    times: dict[int, list[float]] = {window: [] for window in readings}
    chunks = [at(number, stream) for number in range(10)]
    for chunk in chunks + chunks:  # in turns
        for window, reading in readings.items():
            start = time.perf_counter()
            reading.step(chunk)
            times[window].append(time.perf_counter() - start)
    ratio = median(times[1][8:]) / median(times[6][8:])
    bench.row(
        "attention time of a chunk, s1 w1 over s0 w6", "9/21 = 0.43", f"{ratio:.2f}", ratio < 0.6,
        f"{frame} tokens a frame, where the paper has 1,560",
    )  # fmt: skip


# -- Knot Forcing --------------------------------------------------------------------------------------------------


@claim("knot-forcing")
def knot_forcing(bench: Bench) -> None:
    """A reference that is never lost and never reached, no knot in the cache, and a border that hardly shows."""
    ahead(bench, 100_000 if bench.full else 10_000)
    identity(bench, 200 if bench.full else 60)
    borders(bench)


def ahead(bench: Bench, chunks: int) -> None:
    """The trigger, chunk after chunk, as the loop states it and as the memory answers it."""
    place = recipe("knot-forcing").place
    assert isinstance(place, RunningAhead)
    n, sequence, least, most, same = place.start, [], 10**9, 0, True
    for i in range(0, chunks * place.chunk, place.chunk):
        n = advanced(n, i, place.chunk, place.knot, place.stride)
        same &= n == int(place.ahead(torch.tensor(i)))
        least, most = min(least, n - i), max(most, n - i)
        sequence.append(n)
    bench.row(
        "where the reference stands for the first six chunks, c 3, k 1, s 4", "8, 8, 12, 16, 16, 20",
        ", ".join(map(str, sequence[:6])), sequence[:6] == [8, 8, 12, 16, 16, 20], "figures of a re-implementation",
    )  # fmt: skip
    shifts = (n - place.start) // place.stride
    bench.row(
        f"shifts in {chunks:,} chunks", f"about M · c / s = {chunks * place.chunk // place.stride:,}", f"{shifts:,}",
        abs(shifts - chunks * place.chunk / place.stride) <= 2 and same,
    )  # fmt: skip
    bench.row(
        f"frames from a chunk's first to the reference, over {chunks:,} chunks", "never reached: ≥ c + k = 4",
        f"{least} to {most}", least >= place.chunk + place.knot,
        f"a reference at position 0 would be {chunks * place.chunk:,} frames behind",
    )  # fmt: skip


def identity(bench: Bench, chunks: int) -> None:
    """A needle in the reference image, asked for after many chunks; denoising passes bring one frame more."""
    frame, picture = STREAM.frame, replace(STREAM, seed=1)
    memories = {
        "knot-forcing": recipe("knot-forcing", window=12, frame=frame),
        "window, as many frames attended": recipe("self-forcing", window=13 + CHUNK, frame=frame),
    }
    for name, memory in memories.items():
        reading, counts = built(memory, STREAM), set()
        reading.step(picture.step(0, 1))
        for number in range(chunks):
            for attempt in range(2):
                reading.step(replace(STREAM, seed=2 + attempt).step(number * CHUNK, CHUNK + 1), commit=False)
            reading.step(at(number))
            counts.add(len(reading.state.held(0)) // frame)
        needle = picture.needle("detail", 0)
        share = picture.recalled(needle, reading.ask(picture.question(chunks * CHUNK, CHUNK, needle)))
        ours = name == "knot-forcing"
        bench.row(
            f"recall of a detail of the reference after {chunks} chunks, {name}", "kept" if ours else "lost",
            f"{share:.3f}", share > 0.99 if ours else abs(share) < 0.05, f"{max(counts)} frames held at most",
        )  # fmt: skip
        if ours:
            bench.row(
                "frames in the cache, the knot never among them", "1 + min(L, m · c)", f"{min(counts)} to {max(counts)}",
                counts == {1 + min(12, 3 * m) for m in range(1, chunks + 1)}, "window of 12 frames",
            )  # fmt: skip


def borders(bench: Bench) -> None:
    """How much of what they attend the frames on both sides of a border share; the reference does not count."""
    chunk = 3
    for window in (6, 9, 18):
        state = recipe("knot-forcing", window=window, frame=1).build(layers=1, heads=1, head_dim=4, rope=None)
        contexts: list[set[int]] = []
        for m in [1] + [chunk] * 20:
            held = set(state.held(0))
            x = torch.zeros(1, 1, m, 4)
            with state.step(m):
                state.attend(0, x, x, x)
            contexts.append(held - {0} | set(range(state.position - m, state.position)))
        a, b = contexts[-2:]
        share = len(a & b) / len(a | b)
        length = window + chunk
        bench.row(
            f"shared context across a border, {window} frames held", f"(L − C)/(L + C) = {window / (length + chunk):.3f}",
            f"{share:.3f}", abs(share - window / (length + chunk)) < 1e-9, f"L = {length}, C = {chunk}",
        )  # fmt: skip
