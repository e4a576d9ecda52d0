"""Places: for each, a sky and three layers of land at depths, as outlines and colours under every light and weather."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .words import LIGHTS, PLACES, WEATHERS

DEPTHS = (8.0, 4.0, 2.0)  # of the layers, far to near, in units of the width that is seen at depth 1
SKY_DEPTH = 100.0
SAMPLES = 2048  # of an outline, over PERIOD widths of what is seen of its layer
PERIOD = 4.0

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """base: height of the outline on the screen, 0 top to 1 bottom. rise: how far it goes up and down from there.

    outline: "waves", "peaks", "steps", "trees" or "flat". top, bottom: its colours by day at the outline and at the foot of the picture.
    """

    outline: str
    base: float
    rise: float
    top: RGB
    bottom: RGB


_LAND: dict[str, tuple[Layer, Layer, Layer]] = {
    "meadow": (
        Layer("waves", 0.55, 0.06, (136, 160, 158), (136, 160, 150)),
        Layer("waves", 0.66, 0.05, (126, 154, 112), (112, 142, 104)),
        Layer("waves", 0.82, 0.03, (142, 168, 104), (116, 146, 92)),
    ),
    "sea": (
        Layer("waves", 0.56, 0.05, (150, 160, 168), (140, 152, 160)),
        Layer("flat", 0.58, 0.0, (112, 150, 166), (88, 128, 150)),
        Layer("waves", 0.88, 0.02, (216, 204, 176), (196, 180, 148)),
    ),
    "desert": (
        Layer("peaks", 0.57, 0.06, (186, 158, 146), (190, 164, 146)),
        Layer("waves", 0.68, 0.05, (208, 182, 142), (196, 168, 130)),
        Layer("waves", 0.82, 0.04, (216, 190, 148), (186, 156, 118)),
    ),
    "city": (
        Layer("steps", 0.50, 0.12, (150, 154, 168), (158, 160, 172)),
        Layer("steps", 0.62, 0.14, (116, 120, 136), (124, 126, 140)),
        Layer("flat", 0.88, 0.0, (128, 126, 128), (104, 102, 106)),
    ),
    "mountains": (
        Layer("peaks", 0.46, 0.16, (186, 194, 206), (140, 150, 166)),
        Layer("peaks", 0.64, 0.12, (122, 134, 150), (108, 120, 132)),
        Layer("waves", 0.84, 0.03, (132, 146, 124), (110, 124, 106)),
    ),
    "forest": (
        Layer("waves", 0.52, 0.05, (140, 160, 160), (136, 156, 152)),
        Layer("trees", 0.64, 0.16, (84, 116, 102), (76, 104, 92)),
        Layer("waves", 0.86, 0.02, (124, 132, 98), (102, 108, 82)),
    ),
}
# Of each light: sky above, sky at the horizon, what land is multiplied by, what things are multiplied by.
_LIGHT: dict[str, tuple[RGB, RGB, tuple[float, float, float], tuple[float, float, float]]] = {
    "day": ((146, 188, 226), (214, 228, 236), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "dusk": ((118, 98, 150), (240, 182, 144), (0.84, 0.68, 0.68), (1.0, 0.93, 0.90)),
    "night": ((18, 22, 48), (52, 60, 96), (0.42, 0.46, 0.58), (0.84, 0.86, 0.94)),
}
_SUN: dict[str, tuple[RGB, float]] = {
    "day": ((255, 248, 216), 0.9),
    "dusk": ((255, 206, 140), 0.95),
    "night": ((226, 230, 240), 0.95),
}
# Of each weather: how far sky and land go to its grey, how much more with depth, how far things do; sun and clouds left.
_WEATHER: dict[str, tuple[RGB, float, float, float, float, float, float]] = {
    "clear": ((210, 220, 230), 0.0, 0.0, 0.1, 0.0, 1.0, 0.5),
    "rain": ((122, 132, 146), 0.66, 0.30, 0.12, 0.08, 0.0, 0.9),
    "snow": ((226, 230, 236), 0.50, 0.42, 0.06, 0.0, 0.25, 0.6),
    "fog": ((202, 206, 210), 0.86, 0.40, 0.30, 0.20, 0.12, 0.0),
}


# Where a look keeps what. SKY: above and at the horizon; LAND: of each layer top and bottom; SUN and CLOUD: a colour and an
# amount; LIT: what a thing's colour is multiplied by, then what is added to it; STARS: an amount.
SKY, LAND, SUN, CLOUD, LIT, STARS = slice(0, 6), slice(6, 24), slice(24, 28), slice(28, 32), slice(32, 38), 38


@cache
def look(place: int, light: int, weather: int) -> NDArray[np.float64]:
    """All colours [39] of a place under a light and a weather, each given by its index: 0 to 255, amounts 0 to 1."""
    above, horizon, gain, lit = (np.array(entry, np.float64) for entry in _LIGHT[LIGHTS[light]])
    tint, sky_grey, land_grey, by_depth, thing_grey, sun_left, cloud = _WEATHER[WEATHERS[weather]]
    grey = np.array(tint, np.float64) * (1.0, 1.0, 1.0) * (gain + (0.08 if LIGHTS[light] == "night" else 0.0))
    sky = np.stack([above, horizon])
    sky += (grey - sky) * sky_grey
    layers = []
    for far, layer in zip((2, 1, 0), _LAND[PLACES[place]], strict=True):
        colours = np.array([layer.top, layer.bottom], np.float64) * gain
        colours += (grey - colours) * land_grey
        colours += (sky[1] - colours) * min(by_depth * far, 1.0)
        layers.append(colours)
    sun, amount = _SUN[LIGHTS[light]]
    return np.concatenate(
        [
            sky.ravel(),
            np.stack(layers).ravel(),
            sun,
            [amount * sun_left],
            (np.array((250, 250, 252)) * (0.25 + 0.75 * gain) * (1 - 0.35 * (WEATHERS[weather] == "rain"))),
            [cloud if LIGHTS[light] != "night" else cloud * 0.3],
            lit * (1 - thing_grey),
            grey * thing_grey,
            [float(LIGHTS[light] == "night" and WEATHERS[weather] == "clear")],
        ]
    )


def base(place: int, layer: int) -> float:
    """Height on the screen (0 top, 1 bottom) around which a layer's outline runs while the camera is at depth 0."""
    return _LAND[PLACES[place]][layer].base


@cache
def outline(place: int, layer: int) -> NDArray[np.float64]:
    """How far the outline lies above (negative) its base, [SAMPLES + 1], the last equal to the first; on the screen at depth 0."""
    entry = _LAND[PLACES[place]][layer]
    random = np.random.default_rng((77, place, layer))
    t = np.arange(SAMPLES) / SAMPLES
    if entry.outline == "waves":
        heights = sum(
            random.uniform(0.5, 1.0) / (1 + k / 4) * np.sin(2 * math.pi * (k * t + random.random()))
            for k in (3, 5, 8, 13)
        ) + np.zeros(SAMPLES)
    elif entry.outline == "peaks":
        heights = np.full(SAMPLES, -1.0)
        for k in range(11):
            centre, height, slope = (
                (k + random.uniform(0.2, 0.8)) / 11,
                random.uniform(0.2, 1.0),
                random.uniform(18, 30),
            )
            apart = np.abs((t - centre + 0.5) % 1 - 0.5)
            heights = np.maximum(heights, height - slope * apart)
    elif entry.outline == "steps":
        edges = np.sort(random.random(26))
        heights = random.uniform(-1, 1, 27)[np.searchsorted(edges, t) % 26]
    elif entry.outline == "trees":
        heights = np.full(SAMPLES, -1.0)
        for k in range(34):
            centre, height = (k + random.uniform(0.2, 0.8)) / 34, random.uniform(-0.1, 1.0)
            apart = np.abs((t - centre + 0.5) % 1 - 0.5)
            heights = np.maximum(heights, height - 70 * apart)
    else:
        heights = np.zeros(SAMPLES)
    heights = heights * -entry.rise
    # Steps would jump from pixel to pixel: spread them over a third of a pixel of 64
    heights = sum((np.roll(heights, shift) for shift in range(-4, 5)), np.zeros(SAMPLES)) / 9
    return np.append(heights, heights[0])
