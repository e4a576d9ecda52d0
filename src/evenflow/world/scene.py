"""Scenes: what is to be seen, in words. How they are drawn at random, changed a little, and split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .words import (
    CAMERAS,
    COLOURS,
    LIGHTS,
    MOST_THINGS,
    MOTIONS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WEATHERS,
    check,
)

SETTING = ("place", "light", "weather", "camera")
ROUND = ("circle", "ring")  # turning shows only when they carry a texture


@dataclass(frozen=True)
class Thing:
    """One thing. Raises ValueError, naming the nearest right word, for a word that the world does not know."""

    shape: str
    colour: str
    size: str = "medium"
    texture: str = "plain"
    motion: str = "bounce"

    def __post_init__(self) -> None:
        check("shape", self.shape, SHAPES)
        check("colour", self.colour, COLOURS)
        check("size", self.size, SIZES)
        check("texture", self.texture, TEXTURES)
        check("motion", self.motion, MOTIONS)


@dataclass(frozen=True)
class Scene:
    """Things (at most 5) before a place, under a light and a weather, seen by a camera. Raises as `Thing` does."""

    things: tuple[Thing, ...]
    place: str = "meadow"
    light: str = "day"
    weather: str = "clear"
    camera: str = "still"

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(self.things))
        for thing in self.things:
            if not isinstance(thing, Thing):
                raise TypeError(f"things must be Thing objects, got {thing!r}")
        if len(self.things) > MOST_THINGS:
            raise ValueError(f"a scene holds at most {MOST_THINGS} things, got {len(self.things)}; leave some out")
        check("place", self.place, PLACES)
        check("light", self.light, LIGHTS)
        check("weather", self.weather, WEATHERS)
        check("camera", self.camera, CAMERAS)


@dataclass(frozen=True)
class Variety:
    """What scenes may be drawn from. Raises ValueError for an empty choice or a word that is not known.

    things: fewest and most things. split: "train" never draws what `held_out` holds out, "held-out" always draws
    something of it, "all" does not look.
    """

    things: tuple[int, int] = (1, 4)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    textures: tuple[str, ...] = TEXTURES
    motions: tuple[str, ...] = MOTIONS
    places: tuple[str, ...] = PLACES
    lights: tuple[str, ...] = LIGHTS
    weathers: tuple[str, ...] = WEATHERS
    cameras: tuple[str, ...] = CAMERAS
    split: str = "train"

    def __post_init__(self) -> None:
        fewest, most = self.things
        if not 0 <= fewest <= most <= MOST_THINGS:
            raise ValueError(f"things must be (fewest, most) within 0 to {MOST_THINGS}, got {self.things}")
        known: tuple[Iterable[str], ...] = (
            SHAPES, COLOURS, SIZES, TEXTURES, MOTIONS, PLACES, LIGHTS, WEATHERS, CAMERAS,
        )  # fmt: skip
        for entry, right in zip(fields(self)[1:-1], known, strict=True):
            chosen = getattr(self, entry.name)
            if not chosen:
                raise ValueError(f"{entry.name} is empty; choose at least one of {', '.join(right)}")
            for word in chosen:
                check(entry.name.removesuffix("s"), word, right)
        if most > len(self.colours):
            raise ValueError(f"{most} things need as many colours to differ in, got {len(self.colours)} colours")
        check("split", self.split, ("train", "held-out", "all"))


VARIETIES: dict[str, Variety] = {
    "easy": Variety(
        things=(1, 2),
        sizes=("medium", "large"),
        textures=("plain",),
        motions=("still", "drift left", "drift right", "bounce"),
        lights=("day", "night"),
        weathers=("clear",),
        cameras=("still", "pan left", "pan right"),
    ),
    "medium": Variety(
        things=(1, 3),
        textures=("plain", "striped"),
        motions=("still", "drift left", "drift right", "bounce", "collide", "spin"),
        weathers=("clear", "fog"),
    ),
    "full": Variety(),
}


def chosen(variety: Variety | str) -> Variety:
    """The variety that a name stands for. Raises ValueError for a name that is not known."""
    if isinstance(variety, str):
        check("variety", variety, VARIETIES)
        return VARIETIES[variety]
    return variety


def pair_held_out(colour: str, shape: str) -> bool:
    """Whether no training scene shows this colour on this shape: 10 of 64 pairs, each colour and shape among them."""
    return (3 * list(COLOURS).index(colour) + SHAPES.index(shape)) % 7 == 0


def combination_held_out(colour: str, shape: str, place: str) -> bool:
    """Whether no training scene shows this colour on this shape at this place: about one of 7 combinations."""
    return (list(COLOURS).index(colour) + 2 * SHAPES.index(shape) + 3 * PLACES.index(place)) % 7 == 3


def held_out(scene: Scene) -> bool:
    """Whether the scene shows a pair or a combination that training never sees."""
    return any(
        pair_held_out(thing.colour, thing.shape) or combination_held_out(thing.colour, thing.shape, scene.place)
        for thing in scene.things
    )


def fits(scene: Scene, split: str) -> bool:
    """Whether a scene may be drawn under a split; one without things belongs to every split."""
    return split == "all" or not scene.things or held_out(scene) == (split == "held-out")


def draw_scene(rng: np.random.Generator, variety: Variety | str = "full") -> Scene:
    """A scene at random; its things differ in colour. Raises ValueError if the variety holds none of its split."""
    variety = chosen(variety)
    for _ in range(1000):
        count = int(rng.integers(variety.things[0], variety.things[1] + 1))
        things: list[Thing] = []
        for _ in range(count):
            things.append(_draw_thing(rng, variety, things))
        scene = Scene(
            tuple(_company(rng, variety, things)),
            _pick(rng, variety.places),
            _pick(rng, variety.lights),
            _pick(rng, variety.weathers),
            _pick(rng, variety.cameras),
        )
        if fits(scene, variety.split):
            return scene
    raise ValueError(f"no scene of split {variety.split!r} can be drawn from this variety; give it more to choose from")


def next_scene(rng: np.random.Generator, scene: Scene, variety: Variety | str = "full") -> Scene:
    """A scene that differs from `scene` in one respect that a prompt may well change. Raises as `draw_scene` does."""
    variety = chosen(variety)
    for _ in range(1000):
        other = _changed(rng, scene, variety)
        if other != scene and fits(other, variety.split):
            return other
    raise ValueError(f"no change of {scene} stays within this variety; give it more to choose from")


def _changed(rng: np.random.Generator, scene: Scene, variety: Variety) -> Scene:
    things = list(scene.things)
    at = int(rng.integers(len(things))) if things else 0
    what = _pick(rng, (*("colour", "colour", "shape", "motion", "size", "texture", "add", "remove"), *SETTING))
    if what in SETTING:
        fresh_word: Any = _pick(rng, getattr(variety, what + "s"))
        return replace(scene, **{what: fresh_word})
    if what == "add":
        if len(things) < variety.things[1]:
            things.append(_draw_thing(rng, variety, things))
    elif what == "remove":
        if len(things) > max(variety.things[0], 1):
            del things[at]
    elif things:
        fresh = _draw_thing(rng, variety, things)
        things[at] = replace(things[at], **{what: getattr(fresh, what)})
    return replace(scene, things=tuple(_company(rng, variety, things)))


def _draw_thing(rng: np.random.Generator, variety: Variety, others: list[Thing]) -> Thing:
    taken = {thing.colour for thing in others}
    return Thing(
        _pick(rng, variety.shapes),
        _pick(rng, tuple(colour for colour in variety.colours if colour not in taken) or variety.colours),
        _pick(rng, variety.sizes),
        _pick(rng, variety.textures),
        _pick(rng, variety.motions),
    )


def _company(rng: np.random.Generator, variety: Variety, things: list[Thing]) -> list[Thing]:
    """Motions that need another thing, or a texture to be seen, become ones that do not."""
    colliding = sum(thing.motion == "collide" for thing in things)
    calm = tuple(m for m in variety.motions if m not in ("collide", "hide", "spin")) or ("still",)
    hiding = False
    result = []
    for thing in things:
        lonely = (thing.motion == "collide" and colliding < 2) or (
            thing.motion == "hide" and (len(things) < 2 or hiding)
        )
        unseen = thing.motion == "spin" and thing.shape in ROUND and thing.texture == "plain"
        hiding |= thing.motion == "hide"
        result.append(replace(thing, motion=_pick(rng, calm)) if lonely or unseen else thing)
    return result


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
