"""The real video models, as a `Source`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..generate import SCHEDULES, VideoStream, compatible, parse_schedule, resume_stream
from ..models.video import VideoModel
from ..recipes import parse, recipes
from .source import Choice

# What stands beside the recipes: see `evenflow.video`.
USUAL = Choice("default", "What the schedule was published with.", {})
NONE = "none"


class Videos:
    """Streams of one loaded model; `Source` says what each part is.

    memory: a spec, "default" or "none". suggestions: prompts to offer.
    """

    def __init__(
        self, model: VideoModel, *, prompt: str, memory: str = "default", schedule: str = "chunks",
        suggestions: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.prompt, self.memory, self.schedule = model, prompt, memory, schedule
        self.suggestions = list(suggestions)
        config = model.config
        self.name, self.fps, self.size, self.stride = config.name, float(config.fps), config.size, config.stride[0]

    def open(self, *, prompt: str | Mapping[str, float], memory: str, schedule: str, seed: int) -> VideoStream:
        """See `Source`."""
        return VideoStream(self.model, prompt, None if memory == NONE else memory, schedule, seed)

    def resume(self, path: str | os.PathLike[str]) -> VideoStream:
        """See `Source`."""
        return resume_stream(self.model, Path(path))

    def unknown(self, prompt: str) -> list[str]:
        """See `Source`."""
        tell = getattr(self.model.encode_text, "unknown", None)
        return [] if tell is None else list(tell(prompt))

    def choices(self) -> dict[str, list[Choice]]:
        """See `Source`. Every recipe is tried with every schedule that may go with it."""
        schedules = [
            Choice(name, (inspect.getdoc(make) or "").partition("\n")[0], {}) for name, make in SCHEDULES.items()
        ]
        memories = [USUAL, Choice(NONE, "Nothing is kept beyond the frames in flight.", {}, None, self._refused(NONE))]
        for info in recipes("memory"):
            memories.append(Choice(info.name, info.summary, info.defaults, info.paper, self._refused(info.name)))
        return {"memories": memories, "schedules": schedules}

    def _refused(self, memory: str) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for name in SCHEDULES:
            defaults: dict[str, Any] = {"chunk": self.model.config.chunk, "levels": len(self.model.config.steps)}
            try:
                schedule = parse_schedule(name) if name in ("batch", "rolling") else parse_schedule(name, **defaults)
                reason = compatible(schedule, None if memory == NONE else parse(memory))
                if reason is None:
                    self.open(prompt=self.prompt, memory=memory, schedule=name, seed=0)
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                reasons[name] = reason
        return reasons
