"""A world that goes on: actors, camera, place and palette, frame by frame, as numbers that the renderer draws from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .actors import BLEND, Actor, Happening, advance, cast, ease
from .scene import Scene, Thing
from .words import LIGHTS, PLACES, WEATHERS

Floats = NDArray[np.float64]
PAN = 0.45  # speed of a panning camera, in widths of the view at depth 1 a second
ZOOM = 0.20  # and of one that zooms, which goes forwards
NEAREST, FURTHEST = 0.85, -0.35  # as far as it goes; the nearest land is at 2
X, Y, ANGLE, RADIUS, RED, GREEN, BLUE, SHAPE0, SHAPE, TEXTURE0, TEXTURE, DONE, VX, VY, PHASE, COLUMNS = range(16)
LASTS = 0.06  # seconds that what happened can be heard


@dataclass(frozen=True)
class Stretch:
    """What `frames` frames are made of, from the frame `first` on; one row a frame, the first row the frame before `first`.

    actors [F + 1, N, COLUMNS]: x, y, angle, radius, colour, shape and texture before and now, how far from one to the other (1: done),
    velocity, phase of the hum; of the N actors `numbers` (radius 0 where one is not there); depths [N].
    camera [F + 1, 3]: position. place [F + 1, 3]: index before, index, how far from one to the other; sky [F + 1, 5]:
    light before, weather before, light, weather, how far. weights of the weathers follow from it.
    """

    first: int
    numbers: tuple[int, ...]
    depths: Floats
    actors: Floats
    camera: Floats
    place: Floats
    sky: Floats
    gaze: Floats  # [F + 1, 2]
    things: tuple[Thing, ...]  # of each actor, as it is at the end
    happenings: tuple[Happening, ...]
    heard: tuple[Happening, ...]  # those just before, which may still be heard
    prompts: tuple[tuple[int, Scene], ...]  # those that begin within, and the one before

    @property
    def frames(self) -> int:
        return len(self.actors) - 1


class Stage:
    """The state of a world. `scene_at(frame)` gives the scene that begins at a frame, or None; it is asked once a frame."""

    def __init__(
        self,
        seed: int,
        scene: Scene,
        scene_at: Callable[[int, Scene], Scene | None],
        width: float,
        height: float,
        fps: float,
    ) -> None:
        self.seed, self.width, self.height, self.fps = seed, width, height, fps
        self.scene = scene
        self.scene_at = scene_at
        self.frame = 0
        self.cast_so_far = 0
        self.actors: list[Actor] = []
        self.of_thing: list[Actor] = []  # the actor of each thing of the scene, in its order
        for thing in scene.things:
            self.of_thing.append(self._cast(thing, fresh=True))
        random = np.random.default_rng((seed, 2))
        start = {"zoom in": FURTHEST, "zoom out": NEAREST}.get(scene.camera, 0.6 * random.random() - 0.2)
        self.camera = [40 * random.random(), 0.0, start]
        self.moving = list(self._camera_wish())
        self.before, self.changed = scene, -BLEND
        self.prompts: list[tuple[int, Scene]] = [(0, scene)]
        self.gaze = [width / 2, height / 2]
        self.watched: int | None = None
        self.recent: list[Happening] = []
        self.row = self._row()

    def stretch(self, frames: int) -> Stretch:
        """The next `frames` frames."""
        first = self.frame
        rows: list[tuple] = [self.row]
        happened: list[Happening] = []
        heard = tuple(self.recent)
        things = {actor.number: actor.thing for actor in self.actors}
        prompts = [self.prompts[-1]]
        for _ in range(frames):
            scene = self.scene_at(self.frame, self.scene) if self.frame else None
            if scene is not None:
                happened += self._turn_to(scene)
                things |= {actor.number: actor.thing for actor in self.actors}
                prompts.append(self.prompts[-1])
            self.row = self._row()
            rows.append(self.row)
            happened += self._step()
        self.recent = [h for h in [*heard, *happened] if h.time >= self.frame / self.fps - LASTS]
        numbers = tuple(sorted({number for row in rows for number, *_ in row[0]}))
        place = {number: index for index, number in enumerate(numbers)}
        table = np.zeros((frames + 1, len(numbers), COLUMNS))
        depths = np.zeros(len(numbers))
        for at, (looks, *_) in enumerate(rows):
            for number, depth, look in looks:
                table[at, place[number]] = look
                depths[place[number]] = depth
        gather = (np.array([row[k] for row in rows], np.float64) for k in (1, 2, 3, 4))
        camera, places, sky, gaze = gather
        seen = tuple(things[number] for number in numbers)
        return Stretch(
            first, numbers, depths, table, camera, places, sky, gaze, seen, tuple(happened), heard, tuple(prompts)
        )

    def _cast(self, thing: Thing, fresh: bool) -> Actor:
        actor = cast(
            thing, self.cast_so_far, self.actors, self.width, self.height, self.frame, self.seed, fresh, self.fps
        )
        self.cast_so_far += 1
        self.actors.append(actor)
        return actor

    def _row(self) -> tuple:
        looks = [(actor.number, actor.depth, actor.look(self.frame)) for actor in self.actors]
        done = ease(self.frame - self.changed)
        before, now = self.before, self.scene
        place = (PLACES.index(before.place), PLACES.index(now.place), done)
        sky = (
            LIGHTS.index(before.light), WEATHERS.index(before.weather),
            LIGHTS.index(now.light), WEATHERS.index(now.weather), done,
        )  # fmt: skip
        return looks, tuple(self.camera), place, sky, tuple(self.gaze)

    def _camera_wish(self) -> tuple[float, float]:
        """Speed sideways and forwards."""
        kind, deep = self.scene.camera, self.camera[2]
        if kind == "zoom in":
            return 0.0, ZOOM * min(1.0, max(0.0, NEAREST - deep) / 0.1)
        if kind == "zoom out":
            return 0.0, -ZOOM * min(1.0, max(0.0, deep - FURTHEST) / 0.1)
        return {"pan left": -PAN, "pan right": PAN}.get(kind, 0.0), 0.0

    def _step(self) -> list[Happening]:
        happened = advance(self.actors, self.width, self.height, self.frame, self.fps)
        dt = 1 / self.fps
        for axis, wish in zip((0, 2), self._camera_wish(), strict=True):
            k = axis // 2
            self.moving[k] += (wish - self.moving[k]) * (1 - math.exp(-5 * dt))
            self.camera[axis] += self.moving[k] * dt
        self.frame += 1
        self._look(happened)
        gone = [actor for actor in self.actors if actor.dies is not None and self.frame - actor.dies >= BLEND]
        self.actors = [actor for actor in self.actors if actor not in gone]
        return happened

    def _look(self, happened: list[Happening]) -> None:
        """Eyes follow one thing; they leap to one to which something happens, and else now and then to another."""
        present = {actor.number: actor for actor in self.actors if actor.dies is None and 0 < actor.x < self.width}
        struck = [number for happening in happened for number in happening.things if number in present]
        random = np.random.default_rng((self.seed, 7, self.frame)) if self.frame % int(self.fps) == 0 else None
        if struck:
            self.watched = struck[0]
        elif present and (self.watched not in present or (random is not None and random.random() < 0.7)):
            numbers = sorted(present)
            self.watched = numbers[self.frame % len(numbers)]
        aim = (self.width / 2, self.height / 2)
        if self.watched in present:
            aim = (present[self.watched].x, present[self.watched].y)
        for axis, (to, ratio) in enumerate(zip(aim, (0.7548776662, 0.5698402910), strict=True)):
            tremor = 0.01 * (self.frame * ratio % 1 - 0.5)
            self.gaze[axis] += 0.55 * (to - self.gaze[axis]) + tremor

    def _turn_to(self, scene: Scene) -> list[Happening]:
        """Things go on as the things of the new scene that they resemble; others shrink away, new ones grow."""
        time = self.frame / self.fps
        happened = [Happening(time, "prompt changed", ())]
        partner = match(self.scene.things, scene.things)
        actors: list[Actor] = []
        for new, old in enumerate(partner):
            if old is None:
                actors.append(self._cast(scene.things[new], fresh=False))
                happened.append(Happening(time, "appear", (actors[-1].number,)))
            else:
                actors.append(self.of_thing[old])
                was = actors[-1].thing
                actors[-1].become(scene.things[new], self.frame)
                for what in ("colour", "shape", "size", "texture", "motion"):
                    if getattr(was, what) != getattr(actors[-1].thing, what):
                        happened.append(Happening(time, f"changed {what}", (actors[-1].number,)))
        for actor in self.of_thing:
            if actor not in actors:
                actor.dies = self.frame
                happened.append(Happening(time, "vanish", (actor.number,)))
        self.of_thing = actors
        self.before, self.scene, self.changed = self.scene, scene, self.frame
        self.prompts = [(self.frame, scene)]
        return happened


def match(before: tuple[Thing, ...], now: tuple[Thing, ...]) -> list[int | None]:
    """For each thing of `now` the index of the thing of `before` that it was; None for a new one. Most alike first."""

    def likeness(a: Thing, b: Thing) -> int:
        alike = (
            a.shape == b.shape,
            a.colour == b.colour,
            a.size == b.size,
            a.texture == b.texture,
            a.motion == b.motion,
        )
        return sum(weight * same for weight, same in zip((4, 4, 1, 1, 2), alike, strict=True))

    pairs = sorted(
        (
            (-likeness(a, b), abs(i - j), i, j)
            for i, a in enumerate(before)
            for j, b in enumerate(now)
            if likeness(a, b) >= 4
        )
    )
    partner: list[int | None] = [None] * len(now)
    taken = set()
    for _, _, i, j in pairs:
        if partner[j] is None and i not in taken:
            partner[j] = i
            taken.add(i)
    return partner
