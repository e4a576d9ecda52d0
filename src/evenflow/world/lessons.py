"""What patches of each shape, texture and size look like: learned, at first use, from a sheet on which they are all drawn.

Each class is a normal distribution in the numbers that `seeing` measures; a patch belongs to the likeliest class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .seeing import Floats, Ints, patches_of
from .shapes import darkness, distance
from .words import COLOURS, SHAPES, SIZES, TEXTURES

CELL = 36  # pixels of the sheet that one thing has to itself; things are as large as at 64×64
WAVY = 0.6  # pixels by which an unsteady hand misses
SHEETS = 9  # each thing upright on a third of them, turned anyhow on the others


@dataclass(frozen=True)
class Lesson:
    """Normal distributions: mean [C, D], whitening [C, D, D], volume [C] (log of what they spread over), kind [C] of `kinds`."""

    mean: Floats
    whitening: Floats
    volume: Floats
    kind: Ints
    kinds: int

    def likelihood(self, features: Floats) -> Floats:
        """Log likelihood [K, kinds] of features [K, D], for each kind of its best distribution; at least −30 below the best kind."""
        apart = np.einsum("cij,kcj->kci", self.whitening, features[:, None] - self.mean)
        each = -0.5 * (apart**2).sum(-1) - self.volume
        best = np.full((len(features), self.kinds), -np.inf)
        for column, kind in enumerate(self.kind.tolist()):
            best[:, kind] = np.maximum(best[:, kind], each[:, column])
        return np.maximum(best, best.max(1, keepdims=True) - 30)


@dataclass(frozen=True)
class Lessons:
    """shapes, textures: what to tell them by. areas [8, 3]: pixels that a patch of each shape and size has at 64×64."""

    shapes: Lesson
    textures: Lesson
    areas: Floats


def blurred(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] blurred by a Gaussian of `sigma` pixels."""
    reach = max(math.ceil(3 * sigma), 1)
    kernel = [math.exp(-0.5 * (step / max(sigma, 1e-6)) ** 2) for step in range(-reach, reach + 1)]
    result = pixels.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(result, [(reach, reach) if a == axis else (0, 0) for a in range(4)], "edge")
        result = np.zeros_like(result)
        for step, weight in enumerate(kernel):
            part = (slice(None),) * axis + (slice(step, step + pixels.shape[axis]),)
            result += np.float32(weight / sum(kernel)) * padded[part]
    return np.round(result).astype(np.uint8)


def noisy(pixels: NDArray[np.uint8], sigma: float, seed: int = 0) -> NDArray[np.uint8]:
    """Frames with Gaussian noise of standard deviation `sigma` (of 255) added."""
    noise = np.random.default_rng((seed, 8)).standard_normal(pixels.shape, np.float32) * np.float32(sigma)
    return np.clip(np.round(pixels + noise), 0, 255).astype(np.uint8)


def wavy(pixels: NDArray[np.uint8], sigma: float, seed: int = 0, grain: int = 4) -> NDArray[np.uint8]:
    """Frames drawn by an unsteady hand: every pixel from up to about `sigma` pixels beside, smoothly over `grain` pixels."""
    frames, height, width = pixels.shape[:3]
    coarse = np.random.default_rng((seed, 10)).standard_normal((2, frames, height // grain + 3, width // grain + 3))
    y, x = (np.arange(size, dtype=np.float32) / np.float32(grain) for size in (height, width))
    shift = np.stack([_between(field, y, x) for field in coarse.astype(np.float32)]) * np.float32(sigma)
    at_y, at_x = np.arange(height)[:, None] + shift[0], np.arange(width) + shift[1]
    frame = np.arange(frames)[:, None, None]
    top, left = np.floor(at_y).astype(int), np.floor(at_x).astype(int)
    down, right = (at_y - top)[..., None], (at_x - left)[..., None]

    def seen(dy: int, dx: int) -> NDArray[np.float32]:
        rows, columns = np.clip(top + dy, 0, height - 1), np.clip(left + dx, 0, width - 1)
        return pixels[frame, rows, columns].astype(np.float32)

    above = seen(0, 0) * (1 - right) + seen(0, 1) * right
    below = seen(1, 0) * (1 - right) + seen(1, 1) * right
    return np.round(above * (1 - down) + below * down).astype(np.uint8)


def _between(field: NDArray[np.float32], y: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """A field [F, h, w] at rows y and columns x, linearly between its points: [F, len(y), len(x)]."""
    row, column = y.astype(int), x.astype(int)
    down, right = (y - row)[:, None], x - column
    upper = field[:, row][:, :, column] * (1 - right) + field[:, row][:, :, column + 1] * right
    lower = field[:, row + 1][:, :, column] * (1 - right) + field[:, row + 1][:, :, column + 1] * right
    return np.asarray(upper * (1 - down) + lower * down, np.float32)


def _sheets() -> tuple[NDArray[np.uint8], Ints]:
    """Sheets [SHEETS, rows · CELL, columns · CELL, 3], each of one colour, and what each cell holds: shape, size, texture."""
    random = np.random.default_rng(9)
    kinds = [(s, z, t) for s in range(len(SHAPES)) for z in range(len(SIZES)) for t in range(len(TEXTURES))]
    columns = len(SIZES) * len(TEXTURES)
    grey = random.uniform(60, 210, (SHEETS, 1, 1, 1)) + random.uniform(-20, 20, (SHEETS, 1, 1, 3))
    sheets = np.broadcast_to(grey, (SHEETS, len(SHAPES) * CELL, columns * CELL, 3)).astype(np.float32)
    colours = np.array(list(COLOURS.values()), np.float32)[np.arange(SHEETS) % len(COLOURS)][:, None, None]
    at = (np.arange(CELL) + 0.5 - CELL / 2).astype(np.float32)
    for cell, (s, z, t) in enumerate(kinds):
        radius = np.float32(list(SIZES.values())[z])
        angle = random.uniform(0, 2 * math.pi, SHEETS)
        angle[: SHEETS // 3] = 0
        cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        dx, dy = random.uniform(-0.5, 0.5, (2, SHEETS, 1, 1)).astype(np.float32)
        x, y = (at[None, None] + dx) / radius, (at[None, :, None] + dy) / radius
        u, v = cos * x + sin * y, cos * y - sin * x
        alpha = np.clip(np.float32(0.5) - distance(s, u, v) * radius, 0, 1)[..., None]
        shade = 1 - darkness(t, u, v, np.array([radius]))[..., None] / 2 if t else np.float32(1)
        top, left = cell // columns * CELL, cell % columns * CELL
        under = sheets[:, top : top + CELL, left : left + CELL]
        under += alpha * (colours * shade - under)
    return np.round(np.clip(sheets, 0, 255)).astype(np.uint8), np.array(kinds)


@cache
def lessons() -> Lessons:
    """What is learned from clear, blurred and noisy sheets, and from some that an unsteady hand drew."""
    sheets, kinds = _sheets()
    columns = len(SIZES) * len(TEXTURES)
    known, outline, surface, area = [], [], [], []
    for frames in (sheets, blurred(sheets, 1.0), noisy(sheets, 12), wavy(sheets, WAVY)):
        patches = patches_of(frames, smallest=16)
        cell = (patches.y // CELL).astype(int) * columns + (patches.x // CELL).astype(int)
        known.append(kinds[cell])
        outline.append(patches.outline)
        surface.append(patches.surface)
        area.append(patches.area)
    shape, size, texture = np.concatenate(known).T
    areas = np.concatenate(area)
    table = [[areas[(shape == s) & (size == z)].mean() for z in range(len(SIZES))] for s in range(len(SHAPES))]
    return Lessons(
        _fitted(np.concatenate(outline), shape, size, len(SHAPES)),
        _fitted(np.concatenate(surface), texture, size, len(TEXTURES)),
        np.array(table),
    )


def _fitted(features: Floats, kind: Ints, size: Ints, kinds: int) -> Lesson:
    spread = features.std(0)
    means, whitenings, volumes, of = [], [], [], []
    for k in range(kinds):
        for z in range(len(SIZES)):
            chosen = features[(kind == k) & (size == z)]
            # Never surer than a twelfth of the spread of all: frames are worse than lessons.
            covariance = np.cov(chosen.T) + np.diag((spread / 12) ** 2)
            values, vectors = np.linalg.eigh(covariance)
            means.append(chosen.mean(0))
            whitenings.append((vectors / np.sqrt(values)).T)
            volumes.append(0.5 * np.log(values).sum())
            of.append(k)
    return Lesson(np.array(means), np.array(whitenings), np.array(volumes), np.array(of), kinds)
