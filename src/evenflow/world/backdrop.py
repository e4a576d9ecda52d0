"""What lies behind the things: place, light and weather by comparison with what the world draws, and how the camera moves."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .render import render
from .seeing import Floats
from .stage import COLUMNS, FURTHEST, NEAREST, Stretch
from .words import LIGHTS, PLACES, WEATHERS

BANDS = 16
STANDS = ((3.0, FURTHEST), (21.0, 0.25), (35.0, NEAREST), (9.0, 0.05))  # where the camera stands: sideways, forwards
PANS = 0.07  # pixels of 64 a frame that the land moves at least while the camera pans
STEADY = 5  # frames of a median over time
SKY = 0.42  # of the height, from the top, where sun, stars and clouds do not move with the land
ZOOMS = 0.0011  # of its distance from the middle, a frame, while it zooms


def bare(kinds: NDArray[np.int64], cameras: Floats) -> Stretch:
    """A stretch without things: kinds [F, 3] of place, light and weather, cameras [F, 3]."""
    at = np.concatenate([[0], np.arange(len(kinds))])  # the row before the first is like the first
    place, light, weather = kinds[at].T.astype(float)
    done = np.ones(len(at))
    nothing = np.zeros((len(at), 0, COLUMNS))
    sky = np.stack([light, weather, light, weather, done], 1)
    gaze = np.zeros((len(at), 2))
    return Stretch(
        0, (), np.zeros(0), nothing, cameras[at], np.stack([place, place, done], 1), sky, gaze, (), (), (), ()
    )


def profile(planes: NDArray[np.float32], background: NDArray[np.bool_]) -> Floats:
    """Mean colour and unevenness of each of BANDS bands of height, [BANDS, 4], over a clip's planes [3, F, H, W].

    background [F, H, W]: what to look at; a band that shows none is NaN.
    """
    height = planes.shape[2]
    band = np.arange(height) * BANDS // height
    weight = background.sum(2).astype(np.float64)  # [F, H]
    masked = planes * background
    sums = masked.sum(3, dtype=np.float64)
    squares = (masked[1] * planes[1]).sum(2, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        uneven = np.sqrt(np.maximum(squares / weight - (sums[1] / weight) ** 2, 0))
        result = np.empty((BANDS, 4))
        for b in range(BANDS):
            rows = band == b
            total = weight[:, rows].sum()
            result[b, :3] = sums[:, :, rows].sum((1, 2)) / total if total else np.nan
            result[b, 3] = np.nanmean(uneven[:, rows]) if total else np.nan
    return result


@cache
def _bank() -> tuple[NDArray[np.int64], Floats]:
    """kinds [T, 3] of place, light and weather, and their profiles [T, BANDS, 4]."""
    kinds = np.array(
        [(p, li, w) for p in range(len(PLACES)) for li in range(len(LIGHTS)) for w in range(len(WEATHERS))]
    )
    kinds = np.repeat(kinds, len(STANDS), 0)
    cameras = np.array([(x, 0.0, z) for x, z in STANDS] * (len(kinds) // len(STANDS)))
    pixels = render(bare(kinds, cameras), 64, 64, 0)
    planes = pixels.transpose(3, 0, 1, 2).astype(np.float32)
    everything = np.ones(pixels.shape[:3], bool)
    return kinds, np.stack([profile(planes[:, k : k + 1], everything[k : k + 1]) for k in range(len(kinds))])


def recognise(seen: Floats) -> tuple[tuple[str, str, str], float]:
    """((place, light, weather), distance) of the kind whose profile is nearest to `seen` [BANDS, 4], in steps of 255 a band."""
    kinds, bank = _bank()
    valid = ~np.isnan(seen[:, 0])
    if not valid.any():
        return ("", "", ""), float("inf")
    apart = np.abs(bank[:, valid] - seen[valid]) * np.array([1, 1, 1, 0.7])
    distance = apart.mean((1, 2))
    best = int(distance.argmin())
    place, light, weather = kinds[best].tolist()
    return (PLACES[place], LIGHTS[light], WEATHERS[weather]), float(distance[best])


def camera_motion(planes: NDArray[np.float32], background: NDArray[np.bool_]) -> tuple[float, float]:
    """(pixels to the right, part of the distance from the middle outwards) that the background moves in a frame.

    Least squares on what brightness keeps while it moves (Lucas and Kanade, 1981), frame by frame; the median of all frames.
    """
    frames, height, width = planes.shape[1:]
    top = int(SKY * height)
    light, background = planes[:, :, top:].mean(0), background[:, top:]
    apart = 1
    if frames >= 2 * STEADY:  # medians over time know nothing of rain and snow, and little of noise
        middle, apart = STEADY // 2, STEADY - 1
        light = np.median([light[k : frames - STEADY + 1 + k] for k in range(STEADY)], axis=0)
        background = background[middle : middle + len(light)]
    elif frames < 2:
        return 0.0, 0.0
    light = _softened(light)
    change = (light[apart:] - light[:-apart])[:, 1:-1, 1:-1]
    middle_light = (light[apart:] + light[:-apart]) / 2
    gx = (middle_light[:, 1:-1, 2:] - middle_light[:, 1:-1, :-2]) / 2
    gy = (middle_light[:, 2:, 1:-1] - middle_light[:, :-2, 1:-1]) / 2
    x = (np.arange(1, width - 1) + 0.5 - width / 2).astype(np.float32)
    y = (np.arange(top + 1, height - 1) + 0.5 - height / 2).astype(np.float32)
    # Rain, snow and edges of things change far more than land that moves does.
    use = (background[apart:] & background[:-apart])[:, 1:-1, 1:-1] & (np.abs(change) < 12)
    outwards = gx * x + gy * y[:, None]
    gx, outwards, change = gx * use, outwards * use, change * use
    pp, po, oo = ((a * b).sum((1, 2), dtype=np.float64) for a, b in ((gx, gx), (gx, outwards), (outwards, outwards)))
    pc, oc = ((a * change).sum((1, 2), dtype=np.float64) for a in (gx, outwards))
    pp, oo = pp + 20, oo + 2e4  # without land to see, nothing moves
    determinant = pp * oo - po * po
    sideways = -(oo * pc - po * oc) / determinant
    forwards = -(pp * oc - po * pc) / determinant
    return float(np.median(sideways)) / apart, float(np.median(forwards)) / apart


def _softened(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pictures [F, H, W], each pixel averaged with its neighbours 5 by 5, so that outlines may move by pixels between them."""
    for axis in (1, 2):
        wide = np.pad(light, [(2, 2) if a == axis else (0, 0) for a in range(3)], "edge").astype(np.float32)
        length = light.shape[axis]
        parts = [wide[(slice(None),) * axis + (slice(k, k + length),)] for k in range(5)]
        light = (parts[0] + parts[1] + parts[2] + parts[3] + parts[4]) / np.float32(5)
    return light


def camera_word(motion: tuple[float, float], size: int) -> str:
    """What the camera does, given how the background moves in a view of `size` pixels."""
    sideways, forwards = motion[0] * 64 / size / PANS, motion[1] / ZOOMS
    if max(abs(sideways), abs(forwards)) < 1:
        return "still"
    if abs(sideways) >= abs(forwards):
        return "pan left" if sideways > 0 else "pan right"
    return "zoom in" if forwards > 0 else "zoom out"
