"""What a session needs of a video model, and nothing more; `models.py` has the real ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .protocol import Way


class Chunk(Protocol):
    """Frames that came out of one step: uint8 [n, H, W, 3]."""

    @property
    def frames(self) -> np.ndarray: ...


class Video(Protocol):
    """A video stream, as `evenflow.generate` has it."""

    @property
    def position(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def step(self) -> Chunk: ...
    @property
    def seconds(self) -> float: ...
    def ask(
        self, prompt: str | Mapping[str, float], how: str | None = None, over: float = 0.0, way: Way = "linear"
    ) -> None: ...
    def draw(self, points: Sequence[Sequence[float]], id: int | None = None) -> int: ...
    def erase(self, id: int) -> None: ...
    def show(self, image: Any) -> None: ...
    def held(self) -> list[tuple[int, str]]: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...


@dataclass(frozen=True)
class Choice:
    """A memory or a schedule that may be asked for.

    refused: schedules with which this model cannot use this memory, and why; no schedule is refused by itself.
    """

    name: str
    summary: str
    defaults: dict[str, Any]
    paper: str | None = None
    refused: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """A loaded video model, from which sessions open streams. All of it is called in the thread that owns the model.

    name: for people. fps: frames a second the videos are meant for. size: rows and columns of pixels. stride: pixel
    frames of a latent frame. prompt, memory, schedule: what is used when nothing is asked for. suggestions: prompts
    that the model knows.
    """

    name: str
    fps: float
    size: tuple[int, int]
    stride: int
    prompt: str
    memory: str
    schedule: str
    suggestions: list[str]

    def open(self, *, prompt: str | Mapping[str, float], memory: str, schedule: str, seed: int) -> Video:
        """A fresh stream. Raises ValueError for a memory or schedule that cannot be had, with the reason."""

    def resume(self, path: Path) -> Video:
        """The stream that was saved there."""

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that the model does not know and skips."""

    def choices(self) -> dict[str, list[Choice]]:
        """ "memories" and "schedules"."""
