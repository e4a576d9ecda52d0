"""Films: stretches of a world, with everything that is known about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .actors import BLEND
from .describe import describe, understand
from .render import render
from .scene import Scene, Variety, chosen, draw_scene, next_scene
from .stage import Stage, Stretch


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
    """A film of `frames` frames; see `World`. changes may be a number of changes, then spread evenly."""
    if isinstance(changes, int):
        changes = [round(frames * (k + 1) / (changes + 1)) for k in range(changes)]
    made = World(seed, scenes, changes, None, variety, size, fps).frames(frames)
    return made
