"""Numbers to pixels: backgrounds with parallax, things, weather; vectorised over frames.

Arrays are [F, 3, H, W] float32 of 0 to 255 until the end. Only exactly rounded operations are used on the way, so that
how many frames are drawn at once changes no byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from . import places
from .shapes import REACH, darkness, distance
from .stage import ANGLE, BLUE, DONE, RADIUS, RED, SHAPE, SHAPE0, TEXTURE, TEXTURE0, Stretch, X, Y
from .words import WEATHERS

Array = NDArray[np.float32]
AT_ONCE = 16  # frames drawn together, so that they stay in the cache
F4 = np.float32


def render(stretch: Stretch, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """The pixels of a stretch, uint8 [F, H, W, 3]."""
    pixels = np.empty((stretch.frames, height, width, 3), np.uint8)
    for start in range(0, stretch.frames, AT_ONCE):
        stop = min(start + AT_ONCE, stretch.frames)
        rows = slice(start + 1, stop + 1)  # the first row of a stretch is the frame before
        canvas = _background(stretch, rows, height, width)
        lit = _palette(stretch, rows)[:, places.LIT].astype(F4)
        for index in np.argsort(-stretch.depths, kind="stable"):
            for part, alpha, dark, window in patches(stretch, int(index), rows, height, width):
                _paint(canvas, stretch.actors[rows][part, index], alpha, dark, window, lit[part], part)
        _fall(canvas, stretch, rows, seed)
        np.clip(canvas, 0, 255, out=canvas)
        canvas += F4(0.5)
        pixels[start:stop] = canvas.transpose(0, 2, 3, 1).astype(np.uint8)
    return pixels


def _palette(stretch: Stretch, rows: slice, before: bool = False) -> NDArray[np.float64]:
    """The look [F, 39] of each frame's place (or of the place before), light and weather blended."""
    place = stretch.place[rows, 0 if before else 1].astype(int)
    sky = stretch.sky[rows]
    result = np.empty((len(sky), 39))
    for at, (p, entry) in enumerate(zip(place.tolist(), sky.tolist(), strict=True)):
        light0, weather0, light, weather, done = entry
        now = places.look(p, int(light), int(weather))
        if done < 1 and (light0, weather0) != (light, weather):
            now = (1 - done) * places.look(p, int(light0), int(weather0)) + done * now
        result[at] = now
    return result


def _background(stretch: Stretch, rows: slice, height: int, width: int) -> Array:
    canvas = _place(stretch, rows, height, width, before=False)
    before, now, done = stretch.place[rows].T
    blending = np.flatnonzero((done < 1) & (before != now))
    if len(blending):
        start, stop = int(blending[0]), int(blending[-1]) + 1
        part = slice(rows.start + start, rows.start + stop)
        old = _place(stretch, part, height, width, before=True)
        weight = np.where(before != now, 1 - done, 0)[start:stop].astype(F4)[:, None, None, None]
        canvas[start:stop] += (old - canvas[start:stop]) * weight
    return canvas


def _place(stretch: Stretch, rows: slice, height: int, width: int, before: bool) -> Array:
    palette = _palette(stretch, rows, before)
    frames, size = len(palette), min(height, width)
    sky = palette[:, places.SKY].reshape(frames, 2, 3, 1).astype(F4)
    down = ((np.arange(height) + 0.5) / height).astype(F4)
    fade = np.minimum(down * F4(1.7), F4(1))
    canvas = np.empty((frames, 3, height, width), F4)
    canvas[:] = (sky[:, 0] + (sky[:, 1] - sky[:, 0]) * fade)[..., None]
    _sun_and_clouds(canvas, palette, stretch.camera[rows, 0], size)
    land = palette[:, places.LAND].reshape(frames, 3, 2, 3, 1).astype(F4)
    index = stretch.place[rows, 0 if before else 1].astype(int)
    for layer in range(len(places.DEPTHS)):
        edge = outline_rows(index, layer, stretch.camera[rows], height, width)
        top = max(int(np.floor(edge.min() - 0.5)), 0)
        if top >= height:
            continue
        edge = edge.astype(F4)
        y = (np.arange(top, height) + 1).astype(F4)
        cover = np.clip(y[:, None] - edge[:, None, :], 0, 1)
        # Colours run from the outline's usual height to the foot of the picture.
        base = edge.min(1)[:, None]
        run = np.clip((y - base) / (F4(height) - base + F4(1)), 0, 1)[:, None]
        colour = land[:, layer, 0] + (land[:, layer, 1] - land[:, layer, 0]) * run
        below = canvas[:, :, top:]
        below += cover[:, None] * (colour[..., None] - below)
    return canvas


def outline_rows(
    place: NDArray[np.int_], layer: int, camera: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float64]:
    """How high the outline of a layer stands in each column, in pixels from the top, [F, W].

    A column looks at the world's x = camera x + (column − centre) / focal length · (depth − camera z).
    """
    size, depth = min(height, width), places.DEPTHS[layer]
    away = depth - camera[:, 2]
    column = (np.arange(width) + 0.5 - width / 2) / size
    x = camera[:, 0, None] + column * away[:, None]
    t = x * (places.SAMPLES / (places.PERIOD * depth))
    whole = np.floor(t)
    part = t - whole
    at = whole.astype(np.int64) % places.SAMPLES
    rise = np.empty(x.shape)
    base = np.empty(len(x))
    for p in np.unique(place).tolist():
        chosen = place == p
        table = places.outline(p, layer)
        low = table[at[chosen]]
        rise[chosen] = low + (table[at[chosen] + 1] - low) * part[chosen]
        base[chosen] = places.base(p, layer)
    # World height of a point of the outline: (base + rise − middle) · depth; on the screen that is divided by the distance.
    return height / 2 + (base[:, None] - 0.5 + rise) * (depth / away)[:, None] * height


def _sun_and_clouds(canvas: Array, palette: NDArray[np.float64], camera: NDArray[np.float64], size: int) -> None:
    _, _, height, width = canvas.shape
    rows = max(int(height * 0.5), 1)
    x = (np.arange(width) + 0.5).astype(F4) / F4(size)
    y = (np.arange(rows) + 0.5).astype(F4) / F4(size)
    sky = canvas[:, :, :rows]
    sun = palette[:, places.SUN].astype(F4)
    if sun[:, 3].any():
        cx, cy, r = F4(width / size * 0.76), F4(0.17), F4(0.075)
        dx, dy = x - cx, (y - cy)[:, None]
        apart = np.sqrt(dx * dx + dy * dy)
        disc = np.clip((r - apart) * F4(size) + F4(0.5), 0, 1) + F4(0.25) * np.clip(F4(1) - apart / F4(0.24), 0, 1)
        cover = np.minimum(disc, F4(1)) * sun[:, 3, None, None]
        sky += cover[:, None] * (sun[:, :3, None, None] - sky)
    stars = palette[:, places.STARS].astype(F4)
    if stars.any():
        random = np.random.default_rng(8)
        row, column = (random.random(14) * rows * 0.8).astype(int), (random.random(14) * width).astype(int)
        sky[:, :, row, column] += (stars[:, None] * (F4(50) + F4(90) * random.random(14).astype(F4)))[:, None]
    amount = palette[:, places.CLOUD.stop - 1].astype(F4)
    if amount.any():
        colour = palette[:, places.CLOUD][:, :3].astype(F4)[:, :, None, None]
        wide = width / size + 0.6
        for start, level, long, thick in ((0.1, 0.13, 0.20, 0.055), (0.75, 0.26, 0.24, 0.05), (1.3, 0.08, 0.16, 0.045)):
            centre = (start - camera / 16) % wide - 0.3
            dx = (x - centre.astype(F4)[:, None]) / F4(long)
            dy = (y - F4(level)) / F4(thick)
            puff = np.clip(F4(1.15) - (dx * dx)[:, None, :] - (dy * dy)[:, None], 0, 1) * amount[:, None, None]
            sky += puff[:, None] * (colour - sky)


def patches(
    stretch: Stretch, index: int, rows: slice, height: int, width: int
) -> Iterator[tuple[slice, Array, Array | None, tuple[NDArray[np.int_], NDArray[np.int_], int, int]]]:
    """Where an actor covers the view, run of frames by run in which its shapes and textures are the same.

    Yields the run (within rows), how much it covers [f, h, w] of each pixel of a window, how dark its texture is there (None if plain), and the window:
    its upper row and left column in each frame, its height and width.
    """
    table = stretch.actors[rows, index]
    kinds = table[:, [SHAPE0, SHAPE, TEXTURE0, TEXTURE]]
    present = table[:, RADIUS] > 1e-6
    key = np.concatenate([kinds, present[:, None], (table[:, DONE] < 1)[:, None]], 1)
    borders = [0, *(np.flatnonzero((key[1:] != key[:-1]).any(1)) + 1).tolist(), len(table)]
    for start, stop in pairwise(borders):
        if stop == start or not present[start]:
            continue
        part = slice(start, stop)
        yield part, *_patch(table[part], height, width)


def _patch(table: NDArray[np.float64], height: int, width: int) -> tuple:
    size = min(height, width)
    radius = table[:, RADIUS] * size
    reach = int(np.ceil(radius.max() * REACH + 1))
    h, w = min(2 * reach + 1, height), min(2 * reach + 1, width)
    cx, cy = table[:, X] * size, table[:, Y] * size
    left = np.clip(np.floor(cx) - reach, 0, width - w).astype(np.int64)
    top = np.clip(np.floor(cy) - reach, 0, height - h).astype(np.int64)
    # In radii, from the centre of the thing to the centres of the pixels.
    scale = 1 / radius
    x = ((np.arange(w) + 0.5) * scale[:, None] + ((left - cx) * scale)[:, None]).astype(F4)
    y = ((np.arange(h) + 0.5) * scale[:, None] + ((top - cy) * scale)[:, None]).astype(F4)
    angle = table[:, ANGLE]
    if angle.any():
        cos = np.array([np.cos(a) for a in angle.tolist()], F4)[:, None, None]
        sin = np.array([np.sin(a) for a in angle.tolist()], F4)[:, None, None]
        u = cos * x[:, None, :] + sin * y[:, :, None]
        v = cos * y[:, :, None] - sin * x[:, None, :]
    else:
        u = np.broadcast_to(x[:, None, :], (len(table), h, w))
        v = np.broadcast_to(y[:, :, None], (len(table), h, w))
    pixels = radius.astype(F4)[:, None, None]
    shape0, shape, texture0, texture = table[0, [SHAPE0, SHAPE, TEXTURE0, TEXTURE]].astype(int).tolist()
    done = table[:, DONE].astype(F4)[:, None, None]
    blending = bool((done < 1).any())
    alpha = np.clip(F4(0.5) - distance(shape, u, v) * pixels, 0, 1)
    if blending and shape0 != shape:
        old = np.clip(F4(0.5) - distance(shape0, u, v) * pixels, 0, 1)
        alpha = old + (alpha - old) * done
    dark: Array | None = None
    if texture:
        dark = darkness(texture, u, v, pixels)
    if blending and texture0 != texture:
        dark = dark * done if dark is not None else None
        if texture0:
            old = darkness(texture0, u, v, pixels) * (F4(1) - done)
            dark = old if dark is None else dark + old
    return alpha, dark, (top, left, h, w)


DARK = F4(0.5)  # what a texture's dark colour is of the thing's colour


def _paint(
    canvas: Array, table: NDArray[np.float64], alpha: Array, dark: Array | None, window: tuple, lit: Array, part: slice
) -> None:
    top, left, h, w = window
    colour = table[:, RED : BLUE + 1].astype(F4) * lit[:, :3] + lit[:, 3:]
    frames = range(part.start, part.stop)
    if dark is not None:
        shade = F4(1) - dark * (F4(1) - DARK)
    for k, (frame, y, x) in enumerate(zip(frames, top.tolist(), left.tolist(), strict=True)):
        under = canvas[frame, :, y : y + h, x : x + w]
        over = colour[k, :, None, None] * shade[k] if dark is not None else colour[k, :, None, None]
        under += alpha[k] * (over - under)


def _fall(canvas: Array, stretch: Stretch, rows: slice, seed: int) -> None:
    """Rain and snow: drops that fall at the view's own speed, each a short streak or a dot."""
    _, weather0, _, weather, done = stretch.sky[rows].T
    frames, _, height, width = canvas.shape
    size = min(height, width)
    number = stretch.first + np.arange(rows.start - 1, rows.stop - 1)
    for kind, count, vx, vy, colour, strength in (
        ("rain", 26, -0.012, 0.085, (206, 214, 226), 0.55),
        ("snow", 30, 0.006, 0.022, (255, 255, 255), 0.9),
    ):
        code = WEATHERS.index(kind)
        amount = np.where(weather == code, done, 0) + np.where(weather0 == code, 1 - done, 0)
        if not amount.any():
            continue
        random = np.random.default_rng((seed, 3, code))
        px, py, pace = random.random(count), random.random(count), 0.8 + 0.4 * random.random(count)
        x = (px + number[:, None] * vx * pace) % 1 * width
        y = (py + number[:, None] * vy * pace) % 1 * height
        unit = size / 64
        dots = ((0, 0), (-0.14, 1), (-0.28, 2), (-0.42, 3)) if kind == "rain" else ((0, 0),)
        at = np.arange(frames)[:, None]
        steps = max(round(unit), 1)
        for ox, oy in dots:
            for sy in range(steps):
                for sx in range(steps):
                    col = (np.floor(x + ox * unit) + sx).astype(int) % width
                    row = (np.floor(y + oy * unit) + sy).astype(int) % height
                    weight = F4(strength) * amount.astype(F4)[:, None]
                    for channel in range(3):
                        under = canvas[at, channel, row, col]
                        canvas[at, channel, row, col] = under + weight * (F4(colour[channel]) - under)
