"""Films: stretches of a world, with everything that is known about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import truth
from .actors import BLEND
from .describe import describe, understand
from .questions import Question, questions
from .render import render
from .scene import Scene, Thing, Variety, chosen, draw_scene, next_scene
from .sound import sound
from .stage import RADIUS, Stage, Stretch, X, Y


@dataclass(frozen=True)
class Film:
    """A stretch of a world. What is not asked for is not computed."""

    stretch: Stretch
    height: int
    width: int
    fps: float
    seed: int

    @property
    def frames(self) -> int:
        return self.stretch.frames

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [F, H, W, 3]."""
        return render(self.stretch, self.height, self.width, self.seed)

    @cached_property
    def prompts(self) -> list[tuple[int, str, Scene]]:
        """(frame, text, scene): the prompt in force at the film's first frame (frame 0), and each that begins later in it."""
        first = self.stretch.first
        return [
            (max(frame - first, 0), describe(scene, seed=self.seed * 1009 + frame), scene)
            for frame, scene in self.stretch.prompts
        ]

    @property
    def things(self) -> tuple[Thing, ...]:
        """The things that come up, as they are at the end; the N columns of tracks and masks."""
        return self.stretch.things

    @cached_property
    def _all_amodal(self) -> NDArray[np.bool_]:
        return truth.amodal_masks(self.stretch, self.height, self.width)

    @cached_property
    def _all_visible(self) -> NDArray[np.bool_]:
        return truth.visible_masks(self._all_amodal, self.stretch.depths)

    @property
    def amodal(self) -> NDArray[np.bool_]:
        """Where each thing is, hidden or not: bool [F, N, H, W]."""
        return self._all_amodal[1:]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """What is to be seen of each thing: bool [F, N, H, W]."""
        return self._all_visible[1:]

    @cached_property
    def tracks(self) -> NDArray[np.float64]:
        """The centre of each thing in pixels (x, y), [F, N, 2], pixel centres at halves; NaN where there is none."""
        table, size = self.stretch.actors[1:], min(self.height, self.width)
        return np.where(table[..., RADIUS, None] > 0, table[..., [X, Y]] * size, np.nan)

    @cached_property
    def radii(self) -> NDArray[np.float64]:
        """The radius of each thing in pixels, [F, N]; 0 where there is none."""
        return self.stretch.actors[1:, :, RADIUS] * min(self.height, self.width)

    @cached_property
    def visibility(self) -> NDArray[np.float64]:
        """What part of each thing is to be seen, [F, N], 0 to 1."""
        whole = truth.areas(self.stretch, min(self.height, self.width))[1:]
        return np.clip(self.masks.sum((2, 3)) / np.maximum(whole, 1), 0, 1)

    @cached_property
    def depth(self) -> NDArray[np.float32]:
        """How far away is what each pixel shows, [F, H, W], in widths of the view at distance 1."""
        return truth.depth_map(self.stretch, self.masks, self.height, self.width)

    @property
    def intrinsics(self) -> NDArray[np.float64]:
        """K [3, 3]."""
        return truth.intrinsics(self.height, self.width)

    @cached_property
    def poses(self) -> NDArray[np.float64]:
        """World to camera, [F, 4, 4]."""
        return truth.poses(self.stretch.camera[1:])

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """The centre of each thing in the world, [F, N, 3]; NaN where there is none."""
        return truth.points(self.stretch, self.height, self.width)

    @cached_property
    def landmarks(self) -> NDArray[np.float64]:
        """Points of the land that stay where they are, [M, 3]."""
        return truth.landmarks(self.stretch, self.height, self.width)

    @cached_property
    def events(self) -> list[truth.Event]:
        """All that happens, in order of time."""
        return truth.events(self.stretch, self.fps, self._all_amodal, self._all_visible)

    @cached_property
    def sound(self) -> NDArray[np.float32]:
        """Mono at 16 kHz."""
        return sound(self.stretch, self.width / min(self.height, self.width), self.fps)

    @cached_property
    def gaze(self) -> NDArray[np.float64]:
        """Where somebody looks who watches the film, in pixels (x, y), [F, 2]."""
        return self.stretch.gaze[1:] * min(self.height, self.width)

    @cached_property
    def questions(self) -> list[Question]:
        """What can be asked, with answers and the frames that show them."""
        return questions(self.stretch, self.events, self.visibility, self.tracks, min(self.height, self.width))


class World:
    """An endless world. `frames(n)` gives its next n frames; however it is cut, the frames are the same.

    scenes: the first scene, or several with `changes`, the frames at which the second and following begin (at least 12 apart). every:
    (fewest, most) frames from one change to the next, drawn at random, for ever; None: no change but those in `changes`.
    size: pixels, of both sides or (height, width). Raises ValueError that says what was expected.
    """

    def __init__(
        self,
        seed: int,
        scenes: Scene | str | Sequence[Scene | str] | None = None,
        changes: Sequence[int] | None = None,
        every: tuple[int, int] | None = None,
        variety: Variety | str = "full",
        size: int | tuple[int, int] = 64,
        fps: float = 16,
    ) -> None:
        self.seed, self.fps = int(seed), float(fps)
        self.height, self.width = (size, size) if isinstance(size, int) else size
        variety = chosen(variety)
        random = np.random.default_rng((self.seed, 0))
        given = [scenes] if isinstance(scenes, (Scene, str)) else list(scenes or [])
        known = [understand(scene) if isinstance(scene, str) else scene for scene in given]
        if not known:
            known = [draw_scene(random, variety)]
        times = list(changes or [])
        while len(known) < len(times) + 1:
            known.append(next_scene(random, known[-1], variety))
        if len(known) > len(times) + 1:
            raise ValueError(f"{len(known)} scenes need {len(known) - 1} frames in changes, got {times}")
        if any(b - a < BLEND + 2 for a, b in zip([0, *times], times, strict=False)):
            raise ValueError(f"changes must lie at least {BLEND + 2} frames apart and after the start, got {times}")
        script = dict(zip(times, known[1:], strict=True))
        self._stage = Stage(
            self.seed,
            known[0],
            _director(self.seed, script, every, variety),
            self.width / min(self.height, self.width),
            self.height / min(self.height, self.width),
            self.fps,
        )

    @property
    def position(self) -> int:
        """Frames given so far."""
        return self._stage.frame

    def frames(self, n: int) -> Film:
        """The next n frames."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return Film(self._stage.stretch(n), self.height, self.width, self.fps, self.seed)


def _director(
    seed: int, script: dict[int, Scene], every: tuple[int, int] | None, variety: Variety
) -> Callable[[int, Scene], Scene | None]:
    last = max(script, default=0)
    state = {"next": last, "count": 0}

    def due() -> int:
        assert every is not None
        random = np.random.default_rng((seed, 4, state["count"]))
        return state["next"] + int(random.integers(max(every[0], BLEND + 2), max(every[1], BLEND + 2) + 1))

    if every is not None:
        state["next"] = due()

    def scene_at(frame: int, scene: Scene) -> Scene | None:
        if frame in script:
            return script[frame]
        if every is None or frame < state["next"]:
            return None
        fresh = next_scene(np.random.default_rng((seed, 5, state["count"])), scene, variety)
        state["count"] += 1
        state["next"] = due()
        return fresh

    return scene_at


def film(
    seed: int,
    frames: int = 81,
    scenes: Scene | str | Sequence[Scene | str] | None = None,
    changes: Sequence[int] | int | None = None,
    variety: Variety | str = "full",
    size: int | tuple[int, int] = 64,
    fps: float = 16,
    truth: bool = True,
) -> Film:
    """A film of `frames` frames; see `World`. changes: frames at which the second and following scenes begin, or how many
    changes there are, then spread evenly. truth: compute all that is known of it now, instead of when it is asked for.
    """
    if isinstance(changes, int):
        changes = [round(frames * (k + 1) / (changes + 1)) for k in range(changes)]
    made = World(seed, scenes, changes, None, variety, size, fps).frames(frames)
    if truth:
        for name in TRUTHS:
            getattr(made, name)
    return made


TRUTHS = (
    "pixels", "prompts", "masks", "amodal", "tracks", "radii", "visibility", "depth", "poses", "points", "landmarks",
    "events", "sound", "gaze", "questions",
)  # fmt: skip
