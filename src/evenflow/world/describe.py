"""Scenes to English, in a closed vocabulary, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import numpy as np

from .scene import Scene, Thing
from .words import CAMERAS, COLOURS, LIGHTS, MOTIONS, PLACES, SHAPES, SIZES, TEXTURES, WEATHERS

# Ways to say each word; the first is the usual one. All of them are read back as the word.
_MOTION: dict[str, tuple[str, ...]] = {
    "still": ("rests", "stays still", "hovers"),
    "drift left": ("drifts left", "floats left", "drifts to the left"),
    "drift right": ("drifts right", "floats right", "drifts to the right"),
    "bounce": ("bounces", "bounces around", "bounces off the borders"),
    "collide": ("collides", "bumps around", "collides with another"),
    "spin": ("spins", "turns", "rotates"),
    "enter": ("enters", "comes in", "arrives"),
    "leave": ("leaves", "goes out", "goes away"),
    "hide": ("hides", "hides behind another", "plays hide and seek"),
}
_PLACE: dict[str, tuple[str, ...]] = {
    "meadow": ("over a meadow", "above a meadow", "in a meadow"),
    "sea": ("over the sea", "above the sea", "by the sea"),
    "desert": ("over a desert", "above a desert", "in the desert"),
    "city": ("over a city", "above a city", "in a city"),
    "mountains": ("before mountains", "over mountains", "in the mountains"),
    "forest": ("before a forest", "above a forest", "by a forest"),
}
_LIGHT = {"day": ("by day", "in daylight"), "dusk": ("at dusk", "in the evening"), "night": ("at night", "by night")}
_WEATHER: dict[str, tuple[str, ...]] = {
    "clear": ("", "", "under a clear sky"),
    "rain": ("in the rain", "while it rains"),
    "snow": ("in the snow", "while it snows"),
    "fog": ("in fog", "in the fog"),
}
_CAMERA: dict[str, tuple[str, ...]] = {
    "still": ("", "the camera is still", "the camera rests"),
    "pan left": ("the camera pans left", "the camera moves left"),
    "pan right": ("the camera pans right", "the camera moves right"),
    "zoom in": ("the camera zooms in", "the camera moves in"),
    "zoom out": ("the camera zooms out", "the camera moves out"),
}
_GLUE = ("a", "an", "and", "nothing", "while")

# More words that are read, though never said.
_ALSO: dict[str, dict[str, str]] = {
    "shape": {
        "ball": "circle", "disc": "circle", "disk": "circle", "box": "square", "donut": "ring", "hoop": "ring",
        "rhombus": "diamond", "plus": "cross",
    },
    "colour": {"crimson": "red", "scarlet": "red", "golden": "yellow", "turquoise": "cyan", "violet": "purple", "magenta": "pink"},
    "size": {"little": "small", "tiny": "small", "big": "large", "huge": "large", "middling": "medium"},
    "texture": {"stripy": "striped", "spotted": "dotted", "checkered": "checked", "chequered": "checked"},
    "place": {
        "field": "meadow", "grass": "meadow", "ocean": "sea", "water": "sea", "beach": "sea", "dunes": "desert", "town": "city",
        "skyline": "city", "hills": "mountains", "mountain": "mountains", "woods": "forest", "trees": "forest",
    },
    "light": {
        "day": "day", "daylight": "day", "daytime": "day", "noon": "day", "morning": "day", "dusk": "dusk", "evening": "dusk",
        "sunset": "dusk", "twilight": "dusk", "night": "night", "midnight": "night",
    },
    "weather": {
        "clear": "clear", "rain": "rain", "rains": "rain", "rainy": "rain", "raining": "rain", "snow": "snow", "snows": "snow",
        "snowy": "snow", "snowing": "snow", "fog": "fog", "foggy": "fog", "mist": "fog", "misty": "fog",
    },
    # Stems of verbs: endings -s, -es, -ing are cut off before they are looked up.
    "motion": {
        "rest": "still", "stay": "still", "hover": "still", "still": "still", "stand": "still", "bounce": "bounce", "bounc": "bounce",
        "collide": "collide", "collid": "collide", "bump": "collide", "crash": "collide", "spin": "spin", "spinn": "spin",
        "turn": "spin", "rotate": "spin", "rotat": "spin", "enter": "enter", "come": "enter", "com": "enter", "arrive": "enter",
        "arriv": "enter", "leave": "leave", "leav": "leave", "go": "leave", "exit": "leave", "hide": "hide", "hid": "hide",
        "play": "hide",
    },
    "course": {"drift": "drift", "float": "drift", "move": "drift", "mov": "drift", "slide": "drift", "slid": "drift"},
    "pan": {"pan": "pan", "pann": "pan"},
    "zoom": {"zoom": "zoom"},
    "way": {"left": "left", "right": "right", "leftward": "left", "rightward": "right", "in": "in", "out": "out"},
    "camera": {"camera": "camera", "view": "camera"},
    "count": {"two": "2", "three": "3", "four": "4", "five": "5"},
}  # fmt: skip
for _kind, _words in (
    ("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("texture", TEXTURES), ("place", PLACES),
):  # fmt: skip
    _ALSO[_kind] |= {word: word for word in _words}
# Words that carry nothing here.
_STOP = (
    "a an and nothing while the to off around border with another behind seek away over above by before at it under sky is of "
    "there are one sized on into each other their its but then scene picture thing against"
)
_READ = {word: (kind, meaning) for kind, words in _ALSO.items() for word, meaning in words.items()}
_READ |= dict.fromkeys(_STOP.split(" "), ("stop", ""))


def describe(scene: Scene, seed: int | None = None) -> str:
    """A scene in natural English. seed: None says it in the usual way; a number chooses among ways to say it."""
    random = None if seed is None else np.random.default_rng((seed, 6))

    def pick(ways: tuple[str, ...]) -> str:
        return ways[0] if random is None else ways[int(random.integers(len(ways)))]

    things = [f"{_called(thing, pick)} {pick(_MOTION[thing.motion])}" for thing in scene.things]
    listed = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things or ["nothing"])
    where = " ".join(
        filter(None, (pick(_PLACE[scene.place]), pick(_LIGHT[scene.light]), pick(_WEATHER[scene.weather])))
    )
    camera = pick(_CAMERA[scene.camera])
    order = 0 if random is None else int(random.integers(3))
    if order == 1:
        return ", ".join(filter(None, (where, listed, camera)))
    if order == 2 and camera:
        return f"{camera} while {listed} {where}"
    return ", ".join(filter(None, (f"{listed} {where}", camera)))


def _called(thing: Thing, pick: Callable[[tuple[str, ...]], str]) -> str:
    size = pick(("medium", "")) if thing.size == "medium" else thing.size
    texture = pick(("", "plain")) if thing.texture == "plain" else thing.texture
    words = " ".join(filter(None, (size, texture, thing.colour, thing.shape)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _said() -> tuple[str, ...]:
    phrases = [*_GLUE, *SHAPES, *COLOURS, *SIZES, *TEXTURES]
    for table in (_MOTION, _PLACE, _LIGHT, _WEATHER, _CAMERA):
        for ways in table.values():
            phrases += ways
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = _said()  # every word that `describe` can say, sorted
assert set(_MOTION) == set(MOTIONS) and set(_LIGHT) == set(LIGHTS)
assert set(_PLACE) == set(PLACES) and set(_WEATHER) == set(WEATHERS) and set(_CAMERA) == set(CAMERAS)


def read(text: str) -> tuple[Scene, list[str]]:
    """The scene that a text describes, and the words of the text that could not be read.

    Words may come in any sensible order: adjectives before their noun, a motion after the things that move so. What is not
    said is medium, plain, still, a meadow, day, clear, a still camera. Raises ValueError where a thing has no colour or no
    shape, or nothing could be read at all.
    """
    things: list[dict[str, str]] = []
    waiting: dict[str, str] = {}  # adjectives of the thing to come
    unmoved: list[dict[str, str]] = []  # things whose motion is still to be said
    scene = {"place": "meadow", "light": "day", "weather": "clear", "camera": "still"}
    of_camera = False
    unknown: list[str] = []
    readable = False
    tokens = re.findall(r"[a-z]+|[,.;:]", text.lower())
    for at, token in enumerate(tokens):
        if not token.isalpha():
            of_camera = False
            continue
        kind, meaning = _look_up(token)
        readable |= kind not in ("unknown", "stop", "way")
        if kind == "unknown":
            unknown.append(token)
        elif kind in ("colour", "size", "texture", "count"):
            waiting[kind] = meaning
            of_camera = False
        elif kind == "shape":
            number = int(waiting.pop("count", "1"))
            for _ in range(number):
                thing = {**waiting, "shape": meaning}
                things.append(thing)
                unmoved.append(thing)
            waiting, of_camera = {}, False
        elif kind in ("place", "light", "weather"):
            scene[kind] = meaning
        elif kind == "camera":
            of_camera = True
            if at and tokens[at - 1] == "still":
                scene["camera"] = "still"
        elif kind in ("pan", "zoom", "course"):
            way = _way(tokens[at + 1 : at + 4])
            if kind == "course" and not of_camera:
                motion = f"drift {way}" if way in ("left", "right") else "drift right"
                for thing in unmoved:
                    thing["motion"] = motion
                unmoved = []
            elif way in ("left", "right"):
                scene["camera"] = f"pan {way}"
            else:
                scene["camera"] = f"zoom {way or 'in'}"
        elif kind == "motion" and not of_camera and not (token == "still" and tokens[at + 1 : at + 2] == ["camera"]):
            for thing in unmoved:
                thing["motion"] = meaning
            unmoved = []
    if not readable:
        raise ValueError(
            f"nothing in {text!r} could be read{_near(unknown, _READ)}; say for example {describe(_EXAMPLE)!r}"
        )
    if "colour" in waiting:
        near = _near(unknown, SHAPES)
        raise ValueError(
            f"something {waiting['colour']} has no shape in {text!r}"
            + near + f"; name one of {', '.join(SHAPES)}"
        )  # fmt: skip
    for thing in things:
        if "colour" not in thing:
            near = _near(unknown, COLOURS)
            raise ValueError(
                f"a {thing['shape']} has no colour in {text!r}"
                + near + f"; name one of {', '.join(COLOURS)}"
            )  # fmt: skip
    made = tuple(Thing(**{"motion": "still", **thing}) for thing in things)
    return Scene(made, **scene), unknown


def understand(text: str, strict: bool = False) -> Scene:
    """The scene that a text describes; see `read`. strict: words that cannot be read raise ValueError as well."""
    scene, unknown = read(text)
    if strict and unknown:
        raise ValueError(f"cannot read {', '.join(map(repr, unknown))} in {text!r}; leave them out or use other words")
    return scene


def _near(unknown: list[str], words: Iterable[str]) -> str:
    """A hint at the first word of `words` that one of the unknown ones resembles."""
    near = [other for word in unknown for other in get_close_matches(word, list(words), 1, 0.6)]
    return f" (did you mean {near[0]!r}?)" if near else ""


def _look_up(token: str) -> tuple[str, str]:
    for end in ("", "s", "es", "ing", "d", "ed"):
        stem = token.removesuffix(end) if end else token
        if (not end or token.endswith(end)) and stem in _READ:
            return _READ[stem]
    return "unknown", token


def _way(tokens: list[str]) -> str:
    for token in tokens:
        kind, meaning = _look_up(token)
        if kind == "way":
            return meaning
        if kind != "stop":
            break
    return ""


_EXAMPLE = Scene((Thing("circle", "red", "large"),), light="dusk", camera="pan left")
