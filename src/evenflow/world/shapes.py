"""Shapes by signed distance, and textures, both in a thing's own coordinates (radius 1, y downwards).

Only operations that IEEE 754 rounds exactly are used (no sine, no power), so that a pixel's value depends neither on how
many frames are drawn at once nor on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .words import SHAPES

Array = NDArray[np.float32]

REACH = 1.36  # no shape reaches further from its centre than this many radii
_TRIANGLE = ((0.0, -1.346), (1.14, 0.673), (-1.14, 0.673))  # its centroid is the centre, as it is of all shapes
_TIP, _NOTCH = 1.34, 0.62  # radii of a star's corners
_FOLD = (math.cos(math.pi / 5), math.sin(math.pi / 5))


def distance(shape: int, x: Array, y: Array) -> Array:
    """Signed distance, negative inside, of points to the shape with this index in SHAPES; in radii, same shape as x."""
    return _DISTANCES[shape](x, y)


def darkness(texture: int, x: Array, y: Array, radius: Array) -> Array:
    """How much of the texture's dark colour shows at each point, 0 to 1.

    texture: its index in TEXTURES, not plain. radius: in pixels, broadcast against x; edges are one pixel wide.
    """
    if texture == 1:
        return _soft(_wave(y + np.float32(0.25)), radius)
    if texture == 2:
        x, y = x * np.float32(1.2), y * np.float32(1.2)
        u, v = x - np.floor(x) - np.float32(0.5), y - np.floor(y) - np.float32(0.5)
        return np.clip((np.float32(0.3) - np.sqrt(u * u + v * v)) * radius * np.float32(0.8) + np.float32(0.5), 0, 1)
    a = _soft(_wave(x * np.float32(0.8)), radius)
    b = _soft(_wave(y * np.float32(0.8)), radius)
    return a + b - np.float32(2) * a * b


def _wave(x: Array) -> Array:
    """A triangle wave of period 1 that is 0.5 at 0.25 and 0.75, 1 at 0 and 0 at 0.5."""
    return np.abs(x - np.floor(x) - np.float32(0.5)) * np.float32(2)


def _soft(wave: Array, radius: Array) -> Array:
    return np.clip((wave - np.float32(0.5)) * radius * np.float32(0.5) + np.float32(0.5), 0, 1)


def _edge(x: Array, y: Array, a: tuple[float, float], b: tuple[float, float]) -> Array:
    """Signed distance to the line from a to b, negative on its right as seen on the screen."""
    length = math.hypot(b[0] - a[0], b[1] - a[1])
    nx, ny = (b[1] - a[1]) / length, (a[0] - b[0]) / length
    return x * np.float32(nx) + y * np.float32(ny) - np.float32(nx * a[0] + ny * a[1])


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(1)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.9)


def _triangle(x: Array, y: Array) -> Array:
    x = np.abs(x)
    return np.maximum(_edge(x, y, _TRIANGLE[0], _TRIANGLE[1]), _edge(x, y, _TRIANGLE[1], _TRIANGLE[2]))


def _star(x: Array, y: Array) -> Array:
    """Folded at its axes of symmetry onto half of the arm that points up, of which one edge is left."""
    x = np.abs(x)
    nx, ny = np.float32(_FOLD[0]), np.float32(_FOLD[1])
    for _ in range(2):
        beyond = np.float32(2) * np.maximum(x * nx + y * ny, np.float32(0))
        x, y = np.abs(x - beyond * nx), y - beyond * ny
    return _edge(x, y, (0.0, -_TIP), (_NOTCH * _FOLD[1], -_NOTCH * _FOLD[0]))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.84)) - np.float32(0.28)


def _diamond(x: Array, y: Array) -> Array:
    # A narrow rhombus, so that no turned square looks like it.
    return np.asarray(np.abs(x) * np.float32(0.874) + np.abs(y) * np.float32(0.486) - np.float32(0.65), np.float32)


def _heart(x: Array, y: Array) -> Array:
    """Two discs, and below them what their tangents from the tip enclose."""
    x, y = np.abs(x), y - np.float32(0.164)
    dx, dy = x - np.float32(0.5), y + np.float32(0.42)
    lobe = np.sqrt(dx * dx + dy * dy) - np.float32(0.62)
    below = np.maximum(_edge(x, y, (0.985, -0.033), (0.0, 1.2)), np.float32(-0.05) - y)
    return np.asarray(np.minimum(lobe, below), np.float32)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(1.15), np.minimum(x, y) - np.float32(0.4))


_DISTANCES: tuple[Callable[[Array, Array], Array], ...] = (
    _circle, _square, _triangle, _star, _ring, _diamond, _heart, _cross,
)  # fmt: skip
assert len(_DISTANCES) == len(SHAPES)
