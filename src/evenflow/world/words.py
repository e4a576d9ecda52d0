"""The closed vocabulary of the world: everything that a scene can be made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "heart", "cross")
# Saturated, at least 24 degrees of hue apart; backgrounds are muted, so that a thing's colour can be told on all of them.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (248, 134, 18),
    "yellow": (250, 226, 40),
    "green": (28, 178, 62),
    "cyan": (30, 208, 222),
    "blue": (38, 84, 236),
    "purple": (136, 46, 208),
    "pink": (246, 84, 176),
}
# Radius in 1/64 of the shorter side of the view, so in pixels at 64×64.
SIZES: dict[str, float] = {"small": 5.0, "medium": 8.0, "large": 11.0}
TEXTURES = ("plain", "striped", "dotted", "checked")
MOTIONS = ("still", "drift left", "drift right", "bounce", "collide", "spin", "enter", "leave", "hide")
PLACES = ("meadow", "sea", "desert", "city", "mountains", "forest")
LIGHTS = ("day", "dusk", "night")
WEATHERS = ("clear", "rain", "snow", "fog")
CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
MOST_THINGS = 5


def check(kind: str, word: object, right: Iterable[str]) -> None:
    """Raise ValueError, naming the nearest right word, unless `word` is one of `right`."""
    words = tuple(right)
    if word in words:
        return
    near = get_close_matches(str(word).lower().replace("_", " "), words, 1, 0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"no {kind} {word!r}{hint}; there are {', '.join(words)}")
