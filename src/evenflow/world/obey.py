"""Does a video show what was asked for, and does it stay the same? Both told from pixels alone, by the judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .describe import understand
from .judge import Reading, Seen, judge
from .scene import Scene, Thing

STILL, MOVING = 0.4, 0.55  # pixels of 64 a frame: at most while a thing rests, at least while it moves


@dataclass(frozen=True)
class Obedience:
    """How far a video shows a scene. scores: of 0 to 1 for each respect; one that cannot be told, as where there is nothing, is left out.

    count, colours, shapes, pairs (of colour and shape), sizes, textures, motion, camera, place, light, weather. obeyed: all pairs that
    were asked for are there, and no others.
    """

    scores: dict[str, float]
    obeyed: bool
    reading: Reading

    @property
    def overall(self) -> float:
        """The mean of all scores."""
        return float(np.mean(list(self.scores.values())))


def obeys(pixels: NDArray[np.uint8] | Reading, wanted: Scene | str) -> Obedience:
    """How far a clip [F, H, W, 3] (or what the judge read in it) shows a scene or what a text describes.

    Raises TypeError or ValueError for pixels that are none, ValueError for a text that cannot be read.
    """
    reading = pixels if isinstance(pixels, Reading) else judge(pixels)
    scene = understand(wanted) if isinstance(wanted, str) else wanted
    asked = Counter((thing.colour, thing.shape) for thing in scene.things)
    shown = Counter(reading.pairs)
    scores = {
        "count": 1 - min(abs(len(reading.things) - len(scene.things)) / max(len(scene.things), 1), 1.0),
        "camera": float(reading.camera == scene.camera),
        "place": float(reading.place == scene.place),
        "light": float(reading.light == scene.light),
        "weather": float(reading.weather == scene.weather),
    }
    if scene.things:
        scores["colours"] = _shared([t.colour for t in scene.things], [t.colour for t in reading.things])
        scores["shapes"] = _shared([t.shape for t in scene.things], [t.shape for t in reading.things])
        scores["pairs"] = _shared(list(asked.elements()), list(shown.elements()))
        couples = _couples(scene, reading)
        for name, agree in (
            ("sizes", lambda thing, seen: float(thing.size == seen.size)),
            ("textures", lambda thing, seen: float(thing.texture == seen.texture)),
            ("motion", lambda thing, seen: _moves_so(thing, seen, reading)),
        ):
            if couples:
                scores[name] = float(np.mean([agree(thing, seen) for thing, seen in couples]))
    return Obedience(scores, asked == shown, reading)


def _shared(asked: list, shown: list) -> float:
    """F1 of two multisets."""
    common = sum((Counter(asked) & Counter(shown)).values())
    return 2 * common / max(len(asked) + len(shown), 1)


def _couples(scene: Scene, reading: Reading) -> list[tuple[Thing, Seen]]:
    """Things asked for, and what was seen of the same colour, of the same shape if there are several."""
    free = list(reading.things)
    couples = []
    for thing in scene.things:
        alike = [seen for seen in free if seen.colour == thing.colour]
        if alike:
            best = max(alike, key=lambda seen: (seen.shape == thing.shape, seen.share))
            free.remove(best)
            couples.append((thing, best))
    return couples


def _moves_so(thing: Thing, seen: Seen, reading: Reading) -> float:
    """Whether what is seen of a thing fits its motion."""
    unit = min(reading.height, reading.width) / 64
    (vx, vy), speed = (v / unit for v in seen.velocity), seen.speed / unit
    there = np.flatnonzero(~np.isnan(seen.x))
    first, last = seen.x[there[0]], seen.x[there[-1]]
    edge = 0.22 * reading.width

    def outside(x: float) -> bool:
        return x < edge or x > reading.width - edge

    motion = thing.motion
    if motion in ("still", "spin"):
        return float(speed <= STILL)
    if motion in ("drift left", "drift right"):
        way = -1 if motion == "drift left" else 1
        return float(way * vx >= STILL and abs(vy) <= 0.6 * abs(vx))
    if motion in ("bounce", "collide"):
        return float(speed >= MOVING)
    if motion == "enter":  # it came from a side, or had come already
        return float(there[0] > 0 or outside(first) or speed <= STILL)
    if motion == "leave":
        return float(there[-1] < reading.frames - 1 or outside(last) or speed <= STILL)
    return float(speed > 0.2)


@dataclass(frozen=True)
class Drift:
    """How a later stretch of video differs from an earlier one; all 0 where they are alike.

    identity: 1 − F1 of the pairs (colour, shape) that both show. colour: mean distance of the colours of things that both show,
    of 1. backdrop: mean distance of the backdrops, of 1. sharpness, contrast, saturation, motion: later less earlier,
    of the earlier. signature: 1 − cosine of the readings' signatures.
    """

    identity: float
    colour: float
    backdrop: float
    sharpness: float
    contrast: float
    saturation: float
    motion: float
    signature: float


def drift(first: NDArray[np.uint8] | Reading, later: NDArray[np.uint8] | Reading) -> Drift:
    """What changed from one stretch of video to a later one, each [F, H, W, 3] or the judge's reading of it."""
    a, b = (part if isinstance(part, Reading) else judge(part) for part in (first, later))
    both = a.pairs or b.pairs
    apart = [
        float(np.abs(np.subtract(one.rgb, other.rgb)).mean()) / 255
        for one in a.things
        for other in b.things
        if (one.colour, one.shape) == (other.colour, other.shape)
    ]
    behind = np.abs(a.profile[:, :3] - b.profile[:, :3]) / 255
    relative = {
        name: getattr(b.quality, name) / max(getattr(a.quality, name), 1e-6) - 1
        for name in ("sharpness", "contrast", "saturation", "motion")
    }
    lengths = float(np.linalg.norm(a.signature) * np.linalg.norm(b.signature))
    return Drift(
        identity=1 - _shared(list(a.pairs), list(b.pairs)) if both else 0.0,
        colour=float(np.mean(apart)) if apart else 0.0,
        backdrop=float(np.nanmean(behind)) if not np.isnan(behind).all() else 0.0,
        signature=1 - float(a.signature @ b.signature) / max(lengths, 1e-9),
        **relative,
    )
