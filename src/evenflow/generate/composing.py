"""Which schedule goes with which memory, and what the names of schedules mean.

| schedule | goes with |
|---|---|
| chunks | every memory of frames that keeps one copy, but `knot-forcing` (its first frame is a reference) |
| knots | `knot-forcing` of the same chunk and knot, and the plain memories below |
| rolling | `rolling-forcing`, and plain memories whose window holds all blocks in flight |
| buffer, rain | no memory: nothing is remembered beyond the buffer |
| batch | no memory (StreamDiffusion), or `streamdiffusion-v2` with a copy for each level |

*Plain* are memories where the oldest frame leaves and is dropped, and all others are seen: `self-forcing`, `longlive`, `motionstream`,
`dvgt2`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from ..memory import AllHeld, Dropped, Memory, Oldest, Timeless
from .flow import TABLE, Flow, Sampler, even
from .moving import Batch, Buffer, Rolling
from .schedule import Chunks, Knots, Schedule


def rain(K: int = 0, N: int = 4, c: int = 4, s: int = 1) -> Buffer:
    """RAIN's buffer: re-noised at every level, and grown from the first chunk."""
    return Buffer(K, N, c, s, start="growing", renoise=True)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "chunks": Chunks, "knots": Knots, "rolling": Rolling, "buffer": Buffer, "rain": rain, "batch": Batch,
}  # fmt: skip


KINDS: tuple[type[Any], ...] = (Chunks, Knots, Rolling, Buffer, Batch)


def parse_schedule(spec: str, **defaults: Any) -> Schedule:
    """The schedule that a string names: "chunks", "rolling(levels=5)", "buffer(0, 8, 2, 1)".

    Arguments are Python literals, by place or by name. defaults: what is meant where the string does not say (a
    model's chunk and levels), as far as the schedule has such a parameter. Raises ValueError with what was expected.
    """
    name, bracket, rest = spec.strip().partition("(")
    name = name.strip()
    if name not in SCHEDULES:
        near = get_close_matches(name.lower(), SCHEDULES, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no schedule {name!r}{hint}; there are {', '.join(sorted(SCHEDULES))}")
    make = SCHEDULES[name]
    takes = list(inspect.signature(make).parameters)
    shape = f"{name}({', '.join(takes)})"
    try:
        call = ast.parse(f"f({rest if bracket else ')'}", mode="eval").body
        assert isinstance(call, ast.Call)
        placed = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"cannot read the schedule {spec!r}; write {shape} with numbers") from None
    known = {key: value for key, value in defaults.items() if key in takes[len(placed) :]}
    if len(placed) > len(takes) or (wrong := set(named) - set(takes[len(placed) :])):
        said = f"{sorted(wrong)[0]!r}" if len(placed) <= len(takes) else f"{len(placed)} numbers"
        raise ValueError(f"schedule {name} does not take {said}; write {shape}")
    try:
        return make(*placed, **{**known, **named})
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {name}: {error}") from None


def sampler_of(schedule: Schedule, steps: tuple[float, ...], shift: float) -> Sampler:
    """What a schedule's levels mean for a model that was made for these nominal steps.

    The model's own steps where they are as many as levels, otherwise as many at equal distances; a buffer's levels are
    at equal distances in time, as StreamDiT has them, with a shift of its own.
    """
    if isinstance(schedule, Buffer):
        u, shift = [step / TABLE for step in even(schedule.levels)], schedule.shift
        return Flow(tuple(shift * x / (1 + (shift - 1) * x) for x in u), euler=not schedule.renoise)
    return Flow.of(steps if len(steps) == schedule.levels else even(schedule.levels), shift)


def compatible(schedule: Schedule, memory: Memory | None) -> str | None:
    """Why a schedule and a memory do not go together; None where they do."""
    if isinstance(schedule, Buffer):
        return None if memory is None else "a buffer remembers nothing beyond its frames: leave the memory out (None)"
    if memory is None:
        if isinstance(schedule, Batch):
            return None
        return "what is finished has to be remembered, or frames know nothing of each other: name a memory of frames"
    if memory.inside != "both" or memory.on_ring:
        return f"{memory.name} keeps tokens one by one, not frames: take self-forcing, longlive or another memory of frames"
    if isinstance(memory.place, Timeless):
        return f"{memory.name} gives frames no place in time, and a video has an order"
    if isinstance(schedule, Batch):
        return _for_batch(schedule, memory)
    if memory.rows > 1:
        alone = "batch" if memory.name == "streamdiffusion-v2" else "none of these schedules"
        return f"{memory.name} keeps a copy for each denoising step, without clean passes: it goes with {alone}"
    if memory.name == "knot-forcing" and not isinstance(schedule, Knots):
        return "knot-forcing keeps a reference image first, which only the schedule knots gives it"
    if isinstance(schedule, Knots):
        return _for_knots(schedule, memory)
    if isinstance(schedule, Rolling) and not (plain(memory) or memory.name == "rolling-forcing"):
        return f"{memory.name} decides with a chunk's first pass what leaves, and blocks in flight have no such pass"
    return _fits(schedule, memory)


def plain(memory: Memory) -> bool:
    """Whether frames simply leave when they are too old, and are gone, and are seen until then."""
    own = type(memory.evict) is Oldest and type(memory.fold) is Dropped and type(memory.recall) is AllHeld
    return own and memory.name not in ("rolling-forcing", "anchor-forcing", "knot-forcing", "hybrid-forcing")


def _for_batch(schedule: Batch, memory: Memory) -> str | None:
    if memory.name == "liveact":
        return "liveact counts in blocks of eight latents, and a stream batch brings them one by one"
    if memory.rows != schedule.levels:
        return (
            f"a batch of {schedule.levels} levels needs a memory with as many copies; {memory.name} has {memory.rows}: "
            f"take streamdiffusion-v2(steps={schedule.levels}), or none"
        )
    if not schedule.first:
        return "a memory with copies begins with frames that all of them know: let first be 1 or more"
    return None


def _for_knots(schedule: Knots, memory: Memory) -> str | None:
    if memory.name == "knot-forcing":
        asked = memory.params.get("chunk"), memory.params.get("knot")
        if asked != (schedule.chunk, schedule.knot):
            return f"knot-forcing was made for chunk={asked[0]}, knot={asked[1]}: give the schedule the same numbers"
        return None
    if not plain(memory):
        return f"{memory.name} looks at the frames of a pass, and those of a knot are made twice"
    return _fits(schedule, memory)


def _fits(schedule: Schedule, memory: Memory) -> str | None:
    counts = isinstance(memory.evict, Oldest) and memory.evict.with_fresh
    if counts and memory.window is not None and memory.window < schedule.at_once:
        return (
            f"a call brings {schedule.at_once} frames, and the window of {memory.name} has {memory.window}, "
            "these among them: make it larger"
        )
    return None
