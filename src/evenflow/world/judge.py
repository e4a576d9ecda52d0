"""A judge that looks at pixels alone: which things they show, how these move, before what, and how well it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import backdrop
from .lessons import lessons
from .seeing import Floats, Ints, Patches, check_pixels, colours_of, grown, patches_in, smoothed
from .words import COLOURS, SHAPES, SIZES, TEXTURES

SHARE = 0.15  # of the frames in which a thing must be seen to count
LEAP = 14.0  # pixels of 64 that a thing may move from one sight of it to the next
STRANGE = 10.0  # steps of 255 from every known place: not recognised


@dataclass(frozen=True)
class Seen:
    """One thing. x, y, area [F]: its centre and size in pixels, NaN where it is not seen. speed: median, in pixels a frame;

    velocity: median (x, y), of pixels a frame. radius: in pixels, 0 to 1 of certainty about the shape: `sure`. rgb: mean colour.
    """

    colour: str
    shape: str
    size: str
    texture: str
    x: Floats
    y: Floats
    area: Floats
    speed: float
    velocity: tuple[float, float]
    sure: float
    rgb: tuple[float, float, float]

    @property
    def share(self) -> float:
        """Of the frames in which it is seen."""
        return float(np.mean(~np.isnan(self.x)))


@dataclass(frozen=True)
class Quality:
    """How a clip is drawn, each a mean over its frames.

    sharpness: share of the brightness's changes from pixel to pixel that is fine (0 to 1; falls when blurred). contrast: standard deviation of
    brightness, of 1. saturation: of 1. flicker: how much coarse blocks of brightness turn back from frame to frame, of 1.
    motion: mean absolute difference from frame to frame, of 1.
    """

    sharpness: float
    contrast: float
    saturation: float
    flicker: float
    motion: float


@dataclass(frozen=True)
class Reading:
    """What a clip shows. counts [F]: things seen in each frame. place, light, weather: "" where not recognised; strangeness: how far
    it is from the nearest known place, in steps of 255. camera: what it does. profile [16, 4]: see `backdrop.profile`.
    """

    frames: int
    height: int
    width: int
    things: tuple[Seen, ...]
    counts: Ints
    place: str
    light: str
    weather: str
    strangeness: float
    camera: str
    quality: Quality
    profile: Floats

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(colour, shape) of each thing, sorted."""
        return tuple(sorted((thing.colour, thing.shape) for thing in self.things))

    @cached_property
    def signature(self) -> Floats:
        """Numbers [96] that stay while the same things are before the same place: colours by area, pairs by presence, backdrop."""
        area, pair = np.zeros(len(COLOURS)), np.zeros((len(COLOURS), len(SHAPES)))
        for thing in self.things:
            c = list(COLOURS).index(thing.colour)
            area[c] += np.nanmean(thing.area) / (self.height * self.width)
            pair[c, SHAPES.index(thing.shape)] += thing.share
        behind = np.nan_to_num(self.profile[::2, :3] / 255, nan=0.5).ravel()
        return np.concatenate([10 * area, pair.ravel(), behind])


def judge(pixels: NDArray[np.uint8]) -> Reading:
    """What a clip [F, H, W, 3] of uint8 shows. Raises TypeError or ValueError for other arrays."""
    check_pixels(pixels)
    frames, height, width = pixels.shape[:3]
    planes = smoothed(pixels)
    colours = colours_of(planes)
    things = _things(patches_in(planes, colours), frames, min(height, width))
    background = ~grown(grown(colours >= 0))
    seen = backdrop.profile(planes, background)
    (place, light, weather), strangeness = backdrop.recognise(seen)
    if strangeness > STRANGE:
        place = light = weather = ""
    motion = backdrop.camera_motion(planes, background)
    counts = np.sum([~np.isnan(thing.x) for thing in things], axis=0, dtype=np.int64) + np.zeros(frames, np.int64)
    return Reading(
        frames, height, width, things, counts, place, light, weather, strangeness,
        backdrop.camera_word(motion, min(height, width)), quality(pixels), seen,
    )  # fmt: skip


def quality(pixels: NDArray[np.uint8]) -> Quality:
    """How a clip [F, H, W, 3] is drawn."""
    check_pixels(pixels)
    values = pixels.astype(np.float32) / np.float32(255)
    light = values.mean(3)
    fine = np.abs(np.diff(light, n=2, axis=1)).mean() + np.abs(np.diff(light, n=2, axis=2)).mean()
    steep = np.abs(np.diff(light, axis=1)).mean() + np.abs(np.diff(light, axis=2)).mean()
    frames, height, width = light.shape
    h, w = max(height // 8, 1), max(width // 8, 1)
    blocks = light[:, : height // h * h, : width // w * w].reshape(frames, height // h, h, width // w, w).mean((2, 4))
    turns = np.abs(blocks[2:] - 2 * blocks[1:-1] + blocks[:-2]) if frames > 2 else np.zeros(1)
    moves = np.abs(np.diff(values, axis=0)) if frames > 1 else np.zeros(1)
    return Quality(
        float(fine / max(2 * float(steep), 1e-6)),
        float(light.std((1, 2)).mean()),
        float((values.max(3) - values.min(3)).mean()),
        float(turns.mean()),
        float(moves.mean()),
    )


def _things(patches: Patches, frames: int, size: int) -> tuple[Seen, ...]:
    known = lessons()
    shapes, textures = known.shapes.likelihood(patches.outline), known.textures.likelihood(patches.surface)
    found = []
    for colour in np.unique(patches.colour).tolist():
        for members in _tracks(patches, np.flatnonzero(patches.colour == colour), frames, size):
            found.append(_seen(patches.of(members), shapes[members], textures[members], frames, size))
    return tuple(found)


def _tracks(patches: Patches, members: Ints, frames: int, size: int) -> list[Ints]:
    """Patches of one colour, told apart into things: in each frame a patch goes to the nearest thing not yet found."""
    tracks: list[list[int]] = []
    at = 0
    while at < len(members):
        frame = patches.frame[members[at]]
        here = [m for m in members[at : at + 64].tolist() if patches.frame[m] == frame]
        at += len(here)
        free = list(range(len(tracks)))
        for m in here:
            near = [
                (float(np.hypot(patches.x[m] - patches.x[tracks[t][-1]], patches.y[m] - patches.y[tracks[t][-1]])), t)
                for t in free
            ]
            apart, best = min(near, default=(np.inf, -1))
            if apart <= LEAP * size / 64:
                tracks[best].append(m)
                free.remove(best)
            else:
                tracks.append([m])
    tracks.sort(key=len, reverse=True)
    things: list[list[int]] = []
    for track in tracks:
        times = set(patches.frame[track].tolist())
        for thing in things:
            together = times & set(patches.frame[thing].tolist())
            if len(together) <= 0.1 * len(times):  # it left on one side and came back on the other
                thing += [m for m in track if patches.frame[m] not in together]
                break
        else:
            things.append(track)
    most = max((float(np.median(patches.area[thing])) for thing in things), default=0.0)
    lasting = [t for t in things if len(t) >= max(SHARE * frames, 1) and np.median(patches.area[t]) >= 0.15 * most]
    return [np.array(sorted(thing, key=lambda m: int(patches.frame[m]))) for thing in lasting]


def _seen(patches: Patches, shapes: Floats, textures: Floats, frames: int, size: int) -> Seen:
    clear = patches.alone if patches.alone.sum() >= min(2, len(patches.frame)) else np.ones(len(patches.frame), bool)
    if not patches.alone.sum() >= 2:  # what is cut off looks smaller and otherwise: trust the largest sights
        clear = patches.area >= 0.9 * patches.area.max()
    said = shapes[clear].mean(0) * min(int(clear.sum()), 4)
    shape = int(said.argmax())
    likely = np.exp(said - said.max())
    areas = np.sqrt(lessons().areas[shape])
    measured = float(np.sqrt(np.median(patches.area[clear]))) * 64 / size
    kind = int(measured > (areas[0] + areas[1]) / 2) + int(measured > (areas[1] + areas[2]) / 2)
    x, y, area = (np.full(frames, np.nan) for _ in range(3))
    x[patches.frame], y[patches.frame], area[patches.frame] = patches.x, patches.y, patches.area
    whole = np.full(frames, False)
    whole[patches.frame[clear]] = True
    both = whole[1:] & whole[:-1]
    if not both.any():
        both = ~np.isnan(x[1:]) & ~np.isnan(x[:-1])
    vx, vy = np.diff(x)[both], np.diff(y)[both]
    near = np.hypot(vx, vy) <= LEAP * size / 64
    vx, vy = vx[near], vy[near]
    speed = float(np.median(np.hypot(vx, vy))) if len(vx) else 0.0
    velocity = (float(np.median(vx)), float(np.median(vy))) if len(vx) else (0.0, 0.0)
    texture = TEXTURES[int(textures[clear].mean(0).argmax())]
    red, green, blue = patches.rgb[clear].mean(0).tolist()
    return Seen(
        list(COLOURS)[int(patches.colour[0])], SHAPES[shape], list(SIZES)[kind], texture,
        x, y, area, speed, velocity, float(likely[shape] / likely.sum()), (red, green, blue),
    )  # fmt: skip
