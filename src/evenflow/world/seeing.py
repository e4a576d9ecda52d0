"""From pixels to patches of colour: plain image analysis, vectorised over frames.

Things are saturated and backgrounds are muted, so a pixel that is saturated enough belongs to a thing, and its hue tells the
colour. Pixels of one colour that hang together are one patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .words import COLOURS

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
SATURATION, CHROMA = 0.48, 58.0  # at least, of a pixel of a thing
SMALLEST = 22 / 4096  # of the picture, that a patch must cover
_PALETTE = np.array(list(COLOURS.values()), np.float32)


@dataclass(frozen=True)
class Patches:
    """All patches of a clip, K in number. frame, colour [K]: index of the frame, of the colour in COLOURS. area [K] in pixels; x, y [K]: centre.

    alone [K]: it touches neither the border nor another patch. outline [K, 8], surface [K, 4]: numbers that tell the shape and the
    texture, whatever the size and however it is turned. rgb [K, 3]: mean colour.
    """

    frame: Ints
    colour: Ints
    area: Floats
    x: Floats
    y: Floats
    alone: NDArray[np.bool_]
    outline: Floats
    surface: Floats
    rgb: Floats

    def of(self, chosen: NDArray[np.bool_] | Ints) -> Patches:
        return Patches(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def check_pixels(pixels: NDArray[np.uint8]) -> None:
    """Raises TypeError or ValueError unless pixels are uint8 [F, H, W, 3] of at least one frame."""
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be a numpy array of uint8, got {getattr(pixels, 'dtype', type(pixels).__name__)}")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape) < 1:
        raise ValueError(f"pixels must have the shape [frames, height, width, 3], got {list(pixels.shape)}")


def smoothed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Frames [F, H, W, 3] as [3, F, H, W], each pixel averaged with its neighbours by 1, 2, 1 both ways: noise tells nothing."""
    planes = np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)).astype(np.float32)
    for axis in (2, 3):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        wide = np.pad(planes, pad, "edge")
        before, after = ((slice(None),) * axis + (part,) for part in (slice(None, -2), slice(2, None)))
        planes = (planes * 2 + wide[before] + wide[after]) * np.float32(0.25)
    return planes


def colours_of(planes: NDArray[np.float32]) -> NDArray[np.int8]:
    """The index in COLOURS of the thing that each pixel of planes [3, F, H, W] shows, −1 for background; [F, H, W]."""
    red, green, blue = planes
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    strong = (chroma >= CHROMA) & (chroma >= SATURATION * high)
    # Direction in the plane of hues, where grey is the middle.
    at = np.nonzero(strong)
    r, g, b = red[at], green[at], blue[at]
    directions = _plane(*_PALETTE.T)
    directions = directions / np.hypot(*directions)
    u, v = _plane(r, g, b)
    likeness = u[:, None] * directions[0] + v[:, None] * directions[1]
    result = np.full(strong.shape, -1, np.int8)
    result[at] = likeness.argmax(1)
    return result


def _plane(r: Singles, g: Singles, b: Singles) -> Singles:
    return np.stack([r - np.float32(0.5) * (g + b), np.float32(0.8660254) * (g - b)])


def patches_of(pixels: NDArray[np.uint8], smallest: float | None = None) -> Patches:
    """The patches of colour of a clip [F, H, W, 3], frame by frame, the largest first of each colour; of `smallest` pixels at least."""
    frames, height, width = pixels.shape[:3]
    planes = smoothed(pixels)
    colours = colours_of(planes)
    counts = np.bincount((np.arange(frames)[:, None, None] * 9 + colours + 1).ravel(), minlength=frames * 9)
    smallest = SMALLEST * min(height, width) ** 2 if smallest is None else smallest
    frame, colour = np.nonzero(counts.reshape(frames, 9)[:, 1:] >= smallest)
    masks = colours[frame] == colour[:, None, None]
    labels = hanging_together(grown(masks))
    k, y, x = np.nonzero(masks)
    ids, piece = np.unique(k * (height * width + 1) + labels[k, y, x], return_inverse=True)
    area = np.bincount(piece, minlength=len(ids)).astype(np.float64)
    kept = area >= smallest
    renumbered = np.cumsum(kept) - 1
    chosen = kept[piece]
    piece, k, y, x = renumbered[piece[chosen]], k[chosen], y[chosen], x[chosen]
    of_mask = ids[kept] // (height * width + 1)
    found = _measured(planes, masks, colours, piece, k, y, x, frame, int(kept.sum()))
    result = Patches(frame[of_mask], colour[of_mask], *found)
    return result.of(np.lexsort((-result.area, result.colour, result.frame)))


def grown(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Each mask and all pixels beside it, so that what is a pixel apart hangs together."""
    upwards = masks.copy()
    upwards[:, 1:] |= masks[:, :-1]
    upwards[:, :-1] |= masks[:, 1:]
    sideways = upwards.copy()
    sideways[:, :, 1:] |= upwards[:, :, :-1]
    sideways[:, :, :-1] |= upwards[:, :, 1:]
    return sideways


def hanging_together(masks: NDArray[np.bool_]) -> Ints:
    """Labels [K, H, W] of what hangs together over edges within each mask; 0 outside, the highest index + 1 of a pixel of its patch inside.

    Along each line the highest label of a run is carried on by a running maximum that starts anew at each gap.
    """
    height, width = masks.shape[1:]
    big = height * width + 1
    labels = np.where(masks, np.arange(1, big).reshape(height, width), 0)
    while True:
        before = labels
        for axis in (2, 1):
            for flip in (False, True):
                inside, seen = (np.flip(part, axis) if flip else part for part in (masks, labels))
                run = np.cumsum(~inside, axis=axis) * big
                carried = np.maximum.accumulate(run + seen, axis=axis) - run
                carried = np.where(inside, carried, 0)
                labels = np.flip(carried, axis) if flip else carried
        if np.array_equal(before, labels):
            return labels


def _measured(
    planes: NDArray[np.float32],
    masks: NDArray[np.bool_],
    colours: NDArray[np.int8],
    piece: Ints,
    k: Ints,
    y: Ints,
    x: Ints,
    frame: Ints,
    count: int,
) -> tuple:
    """What `Patches` holds beside frame and colour, for pixels (k, y, x) of pieces `piece`."""
    height, width = masks.shape[1:]

    def total(values: NDArray) -> Floats:
        return np.asarray(np.bincount(piece, values, count), np.float64)

    def beside(dy: int, dx: int) -> tuple[Ints, Ints]:
        return np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)

    area = np.bincount(piece, minlength=count).astype(np.float64)
    cx, cy = total(x + 0.5) / area, total(y + 0.5) / area
    z = ((x + 0.5 - cx[piece]) + 1j * (y + 0.5 - cy[piece])) / np.sqrt(area / np.pi)[piece]
    square = np.abs(z) ** 2

    def turned(values: NDArray) -> Floats:
        return np.hypot(total(values.real), total(values.imag)) / area

    z2 = z * z
    around = [beside(dy, dx) for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    same = [masks[k, yy, xx] for yy, xx in around]
    edge = ~(same[0] & same[1] & same[2] & same[3])
    outline = np.stack(
        [
            total(square) / area,
            total(square * square) / area,
            turned(z2),
            turned(z2 * z),
            turned(square * z),
            turned(z2 * z2),
            turned(z2 * z2 * z),
            total(edge) / np.sqrt(area),
        ],
        1,
    )
    other = np.zeros(len(x), bool)
    for yy, xx in around:
        seen = colours[frame[k], yy, xx]
        other |= (seen >= 0) & (seen != colours[frame[k], y, x])
    border = (x == 0) | (y == 0) | (x == width - 1) | (y == height - 1)
    alone = (total(border) == 0) & (total(other) < 0.04 * area)
    rgb = np.stack([total(plane[frame[k], y, x]) for plane in planes], 1) / area[:, None]
    return area, cx, cy, alone, outline, _surface(planes, total, area, piece, frame[k], y, x, around, edge), rgb


def _surface(
    planes: Singles,
    total: Callable[[NDArray], Floats],
    area: Floats,
    piece: Ints,
    frame: Ints,
    y: Ints,
    x: Ints,
    around: list[tuple[Ints, Ints]],
    edge: NDArray[np.bool_],
) -> Floats:
    """How uneven the brightness is, how much in one direction, how steep, how lopsided; away from the edge."""
    value = planes.max(0).astype(np.float64)
    inner = ~edge
    count = np.maximum(total(inner), 1)
    bright = value[frame, y, x]
    mean = np.maximum(total(bright * inner) / count, 1)
    apart = np.where(inner, bright / mean[piece] - 1, 0)
    spread = np.sqrt(total(apart**2) / count)
    skew = total(apart**3) / count / np.maximum(spread, 0.03) ** 3
    (right, left, below, above) = (value[frame, yy, xx] for yy, xx in around)
    gx, gy = (right - left) * inner / mean[piece] / 2, (below - above) * inner / mean[piece] / 2
    xx, yy, xy = total(gx * gx), total(gy * gy), total(gx * gy)
    strength = xx + yy
    lean = np.hypot(xx - yy, 2 * xy) / np.maximum(strength, 1e-3)
    return np.stack([spread, lean, np.sqrt(strength / count), skew], 1)
