"""What is true of a stretch: masks, tracks, depth, cameras, events, gaze."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import places
from .render import outline_rows, patches
from .shapes import REACH, distance
from .stage import DONE, RADIUS, SHAPE, SHAPE0, Floats, Stretch, X, Y

HIDDEN = 0.4  # of what lies within the view; a thing that shows less is occluded


@dataclass(frozen=True)
class Event:
    """Something that happened. time: seconds since the world began; frame: of the film, the first that shows it or began with it.

    things: the columns of the things in the film's tracks. what: "bounce", "collide", "enter", "leave", "appear", "vanish",
    "occluded", "seen again", "changed colour" (shape, size, texture, motion), "prompt changed". by: what hides the thing.
    """

    time: float
    frame: int
    what: str
    things: tuple[int, ...] = ()
    by: int | None = None


def amodal_masks(stretch: Stretch, height: int, width: int) -> NDArray[np.bool_]:
    """Where each thing is, hidden or not, bool [F + 1, N, H, W], for each row of the stretch; at least half of a pixel counts."""
    rows = len(stretch.actors)
    masks = np.zeros((rows, len(stretch.numbers), height, width), bool)
    for index in range(len(stretch.numbers)):
        for part, alpha, _, (top, left, h, w) in patches(stretch, index, slice(0, rows), height, width):
            inside = alpha >= 0.5
            for k, (y, x) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
                masks[part.start + k, index, y : y + h, x : x + w] = inside[k]
    return masks


def visible_masks(amodal: NDArray[np.bool_], depths: Floats) -> NDArray[np.bool_]:
    """What of each thing no nearer one hides; same shape as `amodal`."""
    visible = amodal.copy()
    taken = np.zeros((len(amodal), *amodal.shape[2:]), bool)
    for index in np.argsort(depths, kind="stable").tolist():
        visible[:, index] &= ~taken
        taken |= amodal[:, index]
    return visible


@cache
def area(shape: int) -> float:
    """Of a shape with radius 1, measured on a fine grid."""
    steps = 400
    at = ((np.arange(steps) + 0.5) / steps * 2 - 1).astype(np.float32) * np.float32(REACH)
    x, y = np.meshgrid(at, at)
    return float((distance(shape, x, y) < 0).mean()) * (2 * REACH) ** 2


def areas(stretch: Stretch, size: int) -> Floats:
    """Pixels that each thing would cover if nothing hid it and the view had no end, [F + 1, N]."""
    table = np.array([area(shape) for shape in range(8)])
    before, now = table[stretch.actors[..., SHAPE0].astype(int)], table[stretch.actors[..., SHAPE].astype(int)]
    done = stretch.actors[..., DONE]
    return (before * (1 - done) + now * done) * (stretch.actors[..., RADIUS] * size) ** 2


def depth_map(stretch: Stretch, visible: NDArray[np.bool_], height: int, width: int) -> NDArray[np.float32]:
    """Distance along the camera's axis of what each pixel shows, [F, H, W]; the sky is at SKY_DEPTH."""
    rows = slice(1, None)
    camera, place = stretch.camera[rows], stretch.place[rows]
    index = np.where(place[:, 2] < 0.5, place[:, 0], place[:, 1]).astype(int)
    depth = np.full((len(camera), height, width), places.SKY_DEPTH, np.float32)
    y = (np.arange(height) + 0.5)[:, None]
    for layer, away in enumerate(places.DEPTHS):
        edge = outline_rows(index, layer, camera, height, width)[:, None, :]
        np.copyto(depth, (away - camera[:, 2, None, None]).astype(np.float32), where=y >= edge)
    for n, away in enumerate(stretch.depths.tolist()):
        depth[visible[:, n]] = away
    return depth


def intrinsics(height: int, width: int) -> Floats:
    """K [3, 3]: the focal length is the shorter side, the centre that of the picture; pixel centres lie at halves."""
    size = min(height, width)
    return np.array([[size, 0, width / 2], [0, size, height / 2], [0, 0, 1.0]])


def poses(camera: Floats) -> Floats:
    """World to camera, [F, 4, 4], of cameras at these positions [F, 3]; x right, y down, z forwards."""
    result = np.broadcast_to(np.eye(4), (len(camera), 4, 4)).copy()
    result[:, :3, 3] = -camera
    return result


def points(stretch: Stretch, height: int, width: int) -> Floats:
    """Where the centre of each thing is in the world, [F, N, 3]; NaN where there is none."""
    size = min(height, width)
    table, depth = stretch.actors[1:], stretch.depths
    x = (table[..., X] - width / size / 2) * depth
    y = (table[..., Y] - height / size / 2) * depth
    world = np.stack([x, y, np.broadcast_to(depth, x.shape)], -1) + stretch.camera[1:, None]
    world[table[..., RADIUS] <= 0] = np.nan
    return world


def project(points: Floats, poses: Floats, intrinsics: Floats) -> Floats:
    """Pixels [F, N, 2] of world points [F, N, 3] (or [N, 3], that stay) seen by cameras [F, 4, 4]."""
    seen = np.einsum("fij,fnj->fni", poses[:, :3, :3], np.broadcast_to(points, (len(poses), *points.shape[-2:])))
    seen = seen + poses[:, None, :3, 3]
    flat = seen @ intrinsics.T
    return flat[..., :2] / flat[..., 2:]


def landmarks(stretch: Stretch, height: int, width: int, count: int = 8) -> Floats:
    """Points [3 · count, 3] of the world that stay: on the outlines of the layers of the film's first place, far to near."""
    size, found = min(height, width), []
    place, camera = int(stretch.place[1, 1]), stretch.camera[1]
    for layer, depth in enumerate(places.DEPTHS):
        still = np.array([[camera[0], 0.0, 0.0]])
        rows = outline_rows(np.array([place]), layer, still, height, width)[0]
        column = ((np.arange(count) + 0.5) / count * width).astype(int)
        x = camera[0] + (column + 0.5 - width / 2) / size * depth
        y = (rows[column] - height / 2) / size * depth
        found.append(np.stack([x, y, np.full(count, depth)], -1))
    return np.concatenate(found)


def events(stretch: Stretch, fps: float, amodal: NDArray[np.bool_], visible: NDArray[np.bool_]) -> list[Event]:
    """All that happens in a stretch, in order of time. Masks [F + 1, N, H, W] of all rows."""
    column = {number: index for index, number in enumerate(stretch.numbers)}
    found = []
    for happening in stretch.happenings:
        things = tuple(column[number] for number in happening.things)
        frame = min(int(np.ceil(happening.time * fps - 1e-6)) - stretch.first, stretch.frames - 1)
        found.append(Event(happening.time, max(frame, 0), happening.kind, things))
    found += _hidings(stretch, fps, amodal, visible)
    return sorted(found, key=lambda event: (event.time, event.what, event.things))


def _hidings(stretch: Stretch, fps: float, amodal: NDArray[np.bool_], visible: NDArray[np.bool_]) -> list[Event]:
    whole, shown = amodal.sum((2, 3)), visible.sum((2, 3))
    there = whole >= 8
    hidden = there & (shown < HIDDEN * whole)
    found = []
    for frame, n in np.argwhere(hidden[1:] & ~hidden[:-1] & there[:-1]).tolist():
        nearer = [m for m in range(len(stretch.numbers)) if stretch.depths[m] < stretch.depths[n]]
        shared = [(amodal[frame + 1, n] & visible[frame + 1, m]).sum() for m in nearer]
        time = (stretch.first + frame) / fps
        found.append(Event(time, frame, "occluded", (n,), nearer[int(np.argmax(shared))]))
    for frame, n in np.argwhere(~hidden[1:] & hidden[:-1] & there[1:]).tolist():
        found.append(Event((stretch.first + frame) / fps, frame, "seen again", (n,)))
    return found
