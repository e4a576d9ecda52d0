"""How far the judge itself errs, on films of which all is known: to be printed beside every figure that it gives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .film import Film, film
from .judge import Reading, judge
from .lessons import WAVY, blurred, noisy, wavy
from .obey import obeys
from .scene import Variety

# What may be done to frames before they are judged.
WORSE: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "clear": lambda pixels: pixels,
    "blur": lambda pixels: blurred(pixels, 1.0),
    "noise": lambda pixels: noisy(pixels, 12),
    "wavy": lambda pixels: wavy(pixels, WAVY),
    "blur and noise": lambda pixels: noisy(blurred(pixels, 1.2), 10),
}
ROWS = (
    "count", "colour", "shape", "pairs", "size", "texture", "place", "light", "weather", "camera", "obeyed if shown",
    "obeyed if not shown", "position error", "speed error",
)  # fmt: skip
SEEN = 0.25  # of a thing, in at least JUDGED of the frames: then it must be found
JUDGED = 0.2


def judge_errors(
    seed: int = 0,
    clips: int = 24,
    variety: Variety | str = "full",
    worse: str = "clear",
    frames: int = 21,
    size: int = 64,
) -> dict[str, float]:
    """What the judge gets right, as shares of 0 to 1 of `clips` films, and its mean errors in pixels and pixels a frame.

    count: number of things. colour: things of which one of that colour is found; shape, size, texture: of those found; pairs: clips in which
    all and only the pairs of colour and shape are found. place, light, weather, camera: clips. obeyed if shown, if not shown: clips that are
    said to obey their own scene, and that of another film. worse: a name in WORSE, what is done to the frames before.
    """
    if worse not in WORSE:
        raise ValueError(f"no way {worse!r} to make frames worse; there are {', '.join(WORSE)}")
    made = [film(seed * 100_003 + k, frames, variety=variety, size=size, truth=False) for k in range(clips)]
    marks: dict[str, list[float]] = defaultdict(list)
    for k, clip in enumerate(made):
        reading = judge(WORSE[worse](clip.pixels))
        _mark(marks, clip, reading)
        other = made[(k + 1) % clips].prompts[0][2]
        if sorted((t.colour, t.shape) for t in other.things) != list(_shown(clip)):
            marks["obeyed if not shown"].append(float(obeys(reading, other).obeyed))
    return {name: float(np.mean(marks[name])) if marks[name] else float("nan") for name in ROWS}


def _columns(clip: Film) -> list[int]:
    """The things that are to be seen long enough."""
    return np.flatnonzero((clip.visibility >= SEEN).mean(0) >= JUDGED).tolist()


def _shown(clip: Film) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((clip.things[n].colour, clip.things[n].shape) for n in _columns(clip)))


def _mark(marks: dict[str, list[float]], clip: Film, reading: Reading) -> None:
    columns, scene = _columns(clip), clip.prompts[0][2]
    marks["count"].append(float(len(reading.things) == len(columns)))
    marks["pairs"].append(float(reading.pairs == _shown(clip)))
    if len(columns) == len(scene.things):
        marks["obeyed if shown"].append(float(obeys(reading, scene).obeyed))
    for name in ("place", "light", "weather", "camera"):
        marks[name].append(float(getattr(reading, name) == getattr(scene, name)))
    for n in columns:
        thing = clip.things[n]
        alike = [seen for seen in reading.things if seen.colour == thing.colour]
        marks["colour"].append(float(bool(alike)))
        if not alike:
            continue
        seen = max(alike, key=lambda one: (one.shape == thing.shape, one.share))
        for name in ("shape", "size", "texture"):
            marks[name].append(float(getattr(seen, name) == getattr(thing, name)))
        whole = (clip.visibility[:, n] >= 0.9) & ~np.isnan(seen.x)
        if whole.any():
            apart = np.hypot(seen.x - clip.tracks[:, n, 0], seen.y - clip.tracks[:, n, 1])
            marks["position error"] += apart[whole].tolist()
        steps = np.linalg.norm(np.diff(clip.tracks[:, n], axis=0), axis=1)
        sure = whole[1:] & whole[:-1]
        if sure.any():
            marks["speed error"].append(abs(float(np.median(steps[sure])) - seen.speed))


def table(seed: int = 0, clips: int = 24, frames: int = 21) -> str:
    """`judge_errors` of the three varieties, and of worse frames, as a table in Markdown."""
    columns = [(variety, "clear") for variety in ("easy", "medium", "full")] + [("full", w) for w in list(WORSE)[1:]]
    found = [judge_errors(seed, clips, variety, worse, frames) for variety, worse in columns]
    heads = [variety if worse == "clear" else f"{variety}, {worse}" for variety, worse in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in ROWS:
        unit = {"position error": " (pixels)", "speed error": " (pixels a frame)"}.get(name, "")
        shown = [f"{entry[name]:.2f}" if unit else f"{100 * entry[name]:.0f} %" for entry in found]
        lines.append(f"| {name}{unit} | {' | '.join(shown)} |")
    return "\n".join(lines)
