"""From pixels to patches of colour: plain image analysis, vectorised over frames.

Things are saturated and backgrounds are muted, so a pixel that is saturated enough belongs to a thing, and its hue tells the
colour. Pixels of one colour that hang together are one patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .words import COLOURS

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
SATURATION, CHROMA = 0.48, 58.0  # at least, of a pixel of a thing
# At least, of one that need not stand out from its row, as the sea by night and sand at dusk do not.
SURE_SATURATION, SURE_CHROMA = 0.55, 90.0
DULL_SATURATION, DULL_CHROMA = 0.4, 26.0  # at least, of a pixel of a thing whose neighbour is one for sure
BRIGHTER = 1.3  # times the chroma of a seam, at least, has the thing that it surrounds
APART = 26.0  # steps of 255 at least, in some colour, from the median of its row
ALIKE = 0.86  # at least, cosine of the angle between their hues
SPREAD = 7  # pixels
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


def colours_of(planes: Singles) -> NDArray[np.int8]:
    """The index in COLOURS of the thing that each pixel of planes [3, F, H, W] shows, −1 for background; [F, H, W]."""
    high = planes.max(0)
    chroma = high - planes.min(0)
    result = np.full(high.shape, -1, np.int8)
    apart = np.abs(planes - np.median(planes, axis=3, keepdims=True)).max(0)
    vivid = (chroma >= CHROMA) & (chroma >= SATURATION * high)
    certain = (chroma >= SURE_CHROMA) & (chroma >= SURE_SATURATION * high)
    strong = np.nonzero(vivid & (certain | (apart >= APART)))
    result[strong] = _hues(planes, strong).argmax(1)
    _without_seams(result, strong, chroma)
    # The dark parts of a texture may be too dull by themselves: they belong to the thing beside them if they have its hue,
    # and are not what the rest of their row shows.
    dull = (chroma >= DULL_CHROMA) & (chroma >= DULL_SATURATION * high) & (apart >= APART)
    dull = (result < 0) & (dull | vivid)
    _spread(result, np.nonzero(dull), planes)
    return result


def _without_seams(result: NDArray[np.int8], strong: tuple[Ints, ...], chroma: Singles) -> None:
    """Take away, in place, what is but the seam between a thing and its background: another hue, and duller than its neighbour."""
    frame, y, x = strong
    height, width = result.shape[1:]
    here, own = result[strong], chroma[strong]
    seam = np.zeros(result.shape, bool)
    for _ in range(2):  # pixels that a seam may be wide
        found = np.zeros(len(frame), bool)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            beside = frame, np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)
            other = (result[beside] != here) & (result[beside] >= 0)
            found |= (other | seam[beside]) & (chroma[beside] > BRIGHTER * own)
        seam[strong] |= found
    result[seam] = -1


def _spread(result: NDArray[np.int8], dull: tuple[Ints, ...], planes: Singles) -> None:
    """Give dull pixels the colour of a thing beside them that has their hue, as far as SPREAD pixels from it; in place."""
    frame, y, x = dull
    alike = _hues(planes, dull) >= ALIKE
    height, width = result.shape[1:]
    for _ in range(SPREAD):
        given = np.full(len(frame), -1, np.int8)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            beside = result[frame, np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)]
            fits = (beside >= 0) & alike[np.arange(len(frame)), beside]
            given[fits] = beside[fits]
        if (given < 0).all():
            return
        result[frame, y, x] = given
        left = given < 0
        frame, y, x, alike = frame[left], y[left], x[left], alike[left]


def _hues(planes: Singles, at: tuple[Ints, ...]) -> Singles:
    """How like each of COLOURS the hues of some pixels are, [K, 8]: cosines in the plane of hues, where grey is the middle."""
    directions = _plane(*_PALETTE.T)
    directions = directions / np.hypot(*directions)
    seen = _plane(*(plane[at] for plane in planes))
    return (seen / np.maximum(np.hypot(*seen), 1e-6)).T @ directions


def _plane(r: Singles, g: Singles, b: Singles) -> Singles:
    return np.stack([r - np.float32(0.5) * (g + b), np.float32(0.8660254) * (g - b)])


def patches_of(pixels: NDArray[np.uint8], smallest: float | None = None) -> Patches:
    """The patches of colour of a clip [F, H, W, 3], frame by frame, the largest first of each colour; of `smallest` pixels at least."""
    planes = smoothed(pixels)
    return patches_in(planes, colours_of(planes), smallest)


def patches_in(planes: Singles, colours: NDArray[np.int8], smallest: float | None = None) -> Patches:
    """The same of what `smoothed` and `colours_of` give."""
    frames, height, width = colours.shape
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
    *found, fringe = _measured(planes, masks, colours, piece, k, y, x, frame, int(kept.sum()))
    result = Patches(frame[of_mask], colour[of_mask], *found).of(~fringe)
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


WAYS = ((2, False), (2, True), (1, False), (1, True))


def hanging_together(masks: NDArray[np.bool_]) -> Ints:
    """Labels [K, H, W] of what hangs together over edges within each mask; 0 outside, the highest index + 1 of a pixel of its patch inside.

    Along each line the highest label of a run is carried on by a running maximum that starts anew at each gap.
    """
    height, width = masks.shape[1:]
    big = height * width + 1
    kind: Any = np.int32 if (max(height, width) + 1) * big < 2**31 else np.int64
    labels: Any = masks * np.arange(1, big, dtype=kind).reshape(height, width)
    # In every direction, what a label is raised by so that the next run's are over all of this one's.
    gaps = [np.cumsum(np.flip(~masks, axis) if flip else ~masks, axis, kind) * kind(big) for axis, flip in WAYS]
    while True:
        before = labels
        for (axis, flip), gap in zip(WAYS, gaps, strict=True):
            carried = gap + (np.flip(labels, axis) if flip else labels)
            np.maximum.accumulate(carried, axis, out=carried)
            carried -= gap
            labels = (np.flip(carried, axis) if flip else carried) * masks
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
    """What `Patches` holds beside frame and colour, for pixels (k, y, x) of pieces `piece`; last, which are but fringes."""
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
    own = colours[frame[k], y, x]

    def others(apart: int) -> Floats:
        """Pixels from which, so far apart up, down, left or right, another thing is seen."""
        found = np.zeros(len(x), bool)
        for dy, dx in ((0, apart), (0, -apart), (apart, 0), (-apart, 0)):
            seen = colours[(frame[k], *beside(dy, dx))]
            found |= (seen >= 0) & (seen != own)
        return total(found)

    touching = others(1)
    border = (x == 0) | (y == 0) | (x == width - 1) | (y == height - 1)
    # Where a thing fades into its background or into another thing, a thin seam of a colour in between may come up.
    fringe = (touching > 0.3 * area) & (total(edge) > 0.55 * area)
    alone = (total(border) == 0) & (np.maximum(touching, others(3)) < 0.04 * area)  # seams lie between things
    rgb = np.stack([total(plane[frame[k], y, x]) for plane in planes], 1) / area[:, None]
    return area, cx, cy, alone, outline, _surface(planes, total, area, piece, frame[k], y, x, around, edge), rgb, fringe


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
