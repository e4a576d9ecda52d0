"""A test double for a video model: it obeys the contract of a stream, and draws what it was asked for.

A frame is a moving gradient whose hue is that of the prompt (or blend) and on which drawn paths move as white squares, so
that a test can see in the pixels what was steered. Everything follows from (seed, latent frame, what was asked when).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenflow.serve import Choice

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 70), "blue": (50, 80, 235), "yellow": (240, 220, 50)}

NO_FRAMES = "it has no frames, and a video comes in frames"


def colour(prompt: str) -> np.ndarray:
    """The colour that a prompt names, or one made of its letters; float [3]."""
    for name, value in COLOURS.items():
        if name in prompt:
            return np.array(value, float)
    return np.frombuffer(hashlib.sha256(prompt.encode()).digest()[:3], np.uint8).astype(float)


@dataclass
class Chunk:
    frames: np.ndarray


class DoubleVideo:
    """One stream: 64×64 pixels, 4 of them a latent frame, three latent frames a chunk."""

    def __init__(self, prompt: str, memory: str, schedule: str, seed: int, seconds: float = 0.0) -> None:
        self.state = {"memory": memory, "schedule": schedule, "seed": seed, "latent": 0, "tracks": {}, "names": 0}
        self.state["weights"] = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt)
        self.image: np.ndarray | None = None
        self.slow = seconds

    @property
    def position(self) -> int:
        return self.state["latent"]

    @property
    def nbytes(self) -> int:
        return 4096 * len(self.held())

    @property
    def seconds(self) -> float:
        return max(0, 4 * self.position - 3) / 16

    def ask(self, prompt, how=None, over=0.0, way="linear"):
        weights = {prompt: 1.0} if isinstance(prompt, str) else dict(prompt)
        if any("forbidden" in text for text in weights):
            raise ValueError("this prompt is one that the double refuses")
        self.state["weights"] = weights

    def draw(self, points, id=None):
        if id is None:
            id = self.state["names"]
            self.state["names"] += 1
        self.state["tracks"][str(id)] = [list(point) for point in points]
        return id

    def erase(self, id):
        if str(id) not in self.state["tracks"]:
            raise ValueError(f"there is no track {id}")
        del self.state["tracks"][str(id)]

    def show(self, image):
        self.image = image

    def held(self):
        now = self.position
        window = [(n, "window") for n in range(max(3, now - 9), now)]
        return [(n, "sink") for n in range(min(3, now))] + window

    def step(self):
        if any("broken" in prompt for prompt in self.state["weights"]):
            raise RuntimeError("the double was asked to break")
        time.sleep(self.slow)
        total = sum(self.state["weights"].values())
        base = sum(weight / total * colour(prompt) for prompt, weight in self.state["weights"].items())
        first, count = (0, 9) if self.position == 0 else (4 * self.position - 3, 12)
        frames = np.empty((count, 64, 64, 3), np.uint8)
        ramp = np.linspace(0.5, 1.0, 64)
        for i in range(count):
            t = first + i + 7 * self.state["seed"]
            frames[i] = np.clip(base * np.roll(ramp, t)[None, :, None] * np.ones((64, 1, 1)), 0, 255)
            for points in self.state["tracks"].values():
                seconds, (s, x, y) = (first + i) / 16, np.array(points, float).T
                at = int(np.interp(seconds, s, y)), int(np.interp(seconds, s, x))
                frames[i, max(0, at[0] - 3) : at[0] + 3, max(0, at[1] - 3) : at[1] + 3] = 255
        if self.position == 0 and self.image is not None:
            frames[0] = self.image
        self.state["latent"] += 3
        return Chunk(frames)

    def save(self, path):
        Path(path).write_text(json.dumps(self.state))


class Double:
    """The model: what a room needs of one."""

    name, fps, size, stride = "double", 16.0, (64, 64), 4
    prompt, memory, schedule = "a green field", "longlive", "chunks"
    suggestions = ("a red ball", "a blue sea", "a yellow sun", "a green field")

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.opened = seconds, 0

    def open(self, *, prompt, memory, schedule, seed):
        for name, known in ((memory, self.choices()["memories"]), (schedule, self.choices()["schedules"])):
            found = next((choice for choice in known if choice.name == name.partition("(")[0]), None)
            if found is None:
                raise ValueError(f"no {name!r}; there are {', '.join(choice.name for choice in known)}")
            if schedule.partition("(")[0] in found.refused:
                raise ValueError(f"{name}: {found.refused[schedule.partition('(')[0]]}")
        self.opened += 1
        return DoubleVideo(prompt, memory, schedule, seed, self.seconds)

    def resume(self, path):
        video = DoubleVideo("", "", "", 0, self.seconds)
        video.state = json.loads(Path(path).read_text())
        return video

    def unknown(self, prompt):
        return [word for word in prompt.split() if word == "qwertz"]

    def choices(self):
        memories = [
            Choice("longlive", "Sinks and a short window.", {"window": 9, "sink": 3}, "LongLive, arXiv 2509.22622"),
            Choice("self-forcing", "A rolling window.", {"window": 21}, "Self Forcing, arXiv 2506.08009"),
            Choice("streaming-llm", "Sinks for text.", {}, None, dict.fromkeys(("chunks", "rolling"), NO_FRAMES)),
        ]
        schedules = [
            Choice("chunks", "A chunk at a time.", {}),
            Choice("rolling", "A window that rolls.", {"levels": 5}),
        ]
        return {"memories": memories, "schedules": schedules}
