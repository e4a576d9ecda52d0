"""One video from its beginning: the stream that makes it and the timeline of what was put in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .limits import Limits
from .pictures import Drift, decode, thumb
from .protocol import (
    BlendItem,
    ClientItem,
    Entry,
    EraseItem,
    ImageItem,
    PromptItem,
    Refused,
    SettingsItem,
    Timeline,
    TrackItem,
)  # fmt: skip
from .source import Source, Video

HELD = 64  # latent frames of a memory that are shown: half of them the oldest, half the newest


class Take:
    """A stream that is opened when it is first needed; all methods belong to the thread of the model.

    timeline: with what it began, and what was put in since; `Take(source, limits, timeline, entries)` with the same
    entries gives the same frames. script: entries still to be put in, at their time.
    """

    def __init__(self, source: Source, limits: Limits, timeline: Timeline, script: Iterable[Entry] = ()) -> None:
        self.source, self.limits, self.timeline = source, limits, timeline
        self.script = deque(script)
        self.memory, self.schedule, self.seed = timeline.memory, timeline.schedule, timeline.seed
        self.asked: PromptItem | BlendItem = PromptItem(type="prompt", text=timeline.prompt)
        self.tracks: set[int] = set()
        self.base = 0  # latent frames that earlier streams of this take made
        self.drift = 0.0
        self._open: Callable[[], Video] = self._fresh
        self._video: Video | None = None
        self._drift = Drift()
        self._thumbs: dict[int, str] = {}
        self._told: set[int] = set()  # of which thumbs the clients know

    # -- its state -----------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Latent frames made since the take began."""
        return self.base + (0 if self._video is None else self._video.position)

    @property
    def nbytes(self) -> int:
        """Bytes that the memory holds."""
        return 0 if self._video is None else self._video.nbytes

    @property
    def begun(self) -> bool:
        """Whether there is a stream, which can be saved."""
        return self._video is not None

    def again(self) -> Take:
        """A take that begins with what is asked for now."""
        blend = isinstance(self.asked, BlendItem)
        prompt = next(iter(self.asked.weights)) if isinstance(self.asked, BlendItem) else self.asked.text
        timeline = Timeline(prompt=prompt, seed=self.seed, memory=self.memory, schedule=self.schedule)
        return Take(self.source, self.limits, timeline, [Entry(at=0, item=self.asked)] if blend else [])

    def begin(self) -> None:
        """Open the stream now. Raises ValueError, with the reason, when it cannot be had."""
        self._stream()

    # -- making frames -------------------------------------------------------------------------------------------------

    def step(self) -> np.ndarray:
        """The next chunk, uint8 [n, H, W, 3]; n may be 0 where a schedule fills up first."""
        self.catch_up()
        video = self._stream()
        frames = video.step().frames
        if len(frames):
            self.drift = self._drift.of(frames)
            # The last pixel frame of each latent frame, from the newest back.
            for back, at in enumerate(range(len(frames) - 1, -1, -self.source.stride)):
                self._thumbs[video.position - 1 - back] = thumb(frames[at])
        return frames

    def catch_up(self) -> list[dict[str, Any]]:
        """Put in what the script has for now; its entries, as `put` returns them."""
        done = []
        while self.script and self.script[0].at <= self.position:
            done.append(self.put(self.script.popleft().item))
        return done

    def put(self, item: ClientItem | SettingsItem) -> dict[str, Any]:
        """Let an item take effect with the next chunk, and note it. Raises ValueError when the stream refuses it.

        Returns the entry of the timeline.
        """
        if len(self.timeline.entries) >= self.limits.history:
            raise Refused("full", f"the timeline has {self.limits.history:,} entries", "restart the video")
        match item:
            case PromptItem():
                self._stream().ask(item.text, item.how, item.over, item.way)
                self.asked = item
            case BlendItem():
                self._stream().ask(item.weights, item.how, item.over, item.way)
                self.asked = item
            case TrackItem():
                if item.id not in self.tracks and len(self.tracks) >= self.limits.tracks:
                    raise Refused("full", f"{len(self.tracks)} paths are drawn already", "erase one of them first")
                video = self._stream()
                points = [(video.seconds + after, x, y) for after, x, y in item.points]
                item = item.model_copy(update={"id": video.draw(points, item.id)})
                self.tracks.add(item.id or 0)
            case EraseItem():
                try:
                    self._stream().erase(item.id)
                except ValueError:
                    if item.id not in self.tracks:  # one that is over is forgotten by the stream itself
                        raise
                self.tracks.discard(item.id)
            case ImageItem():
                picture = decode(item.data, self.source.size, self.limits.picture)
                if self.position:
                    raise Refused(
                        "refused", "a picture can only be what a video begins with", "restart the video first"
                    )
                self._stream().show(picture)
            case SettingsItem():
                self._change(item)
        if isinstance(item, (PromptItem, BlendItem)):
            self._drift.anew()
        self.timeline.entries.append(Entry(at=self.position, item=item))
        return {"at": self.position, "item": item.model_dump(exclude_none=True), "unknown": self.unknown(item)}

    def unknown(self, item: ClientItem | SettingsItem) -> list[str]:
        """Words of an item that the model does not know, each once."""
        texts = [item.text] if isinstance(item, PromptItem) else item.weights if isinstance(item, BlendItem) else []
        return list(dict.fromkeys(word for text in texts for word in self.source.unknown(text)))

    def _change(self, item: SettingsItem) -> None:
        """Another stream takes over; when it cannot be had, the present one stays."""
        before = self.memory, self.schedule, self.seed
        self.memory, self.schedule, self.seed = item.memory, item.schedule, item.seed
        try:
            video = self._fresh()
        except Exception:
            self.memory, self.schedule, self.seed = before
            raise
        self.base, self._video = self.position, video
        self.tracks.clear()
        self._thumbs.clear()
        self._told.clear()
        self._drift = Drift()

    def _stream(self) -> Video:
        if self._video is None:
            self._video = self._open()
        return self._video

    def _fresh(self) -> Video:
        """A stream that begins with what is asked for now."""
        prompt = self.asked.text if isinstance(self.asked, PromptItem) else self.asked.weights
        return self.source.open(prompt=prompt, memory=self.memory, schedule=self.schedule, seed=self.seed)

    # -- what it holds -------------------------------------------------------------------------------------------------

    def held(self, everything: bool = False) -> dict[str, Any]:
        """The latent frames that the memory holds, with their region, and small pictures of those that are news.

        everything: all pictures, for a client that knows none.
        """
        held = [] if self._video is None else list(self._video.held())
        shown = held if len(held) <= HELD else held[: HELD // 2] + held[-HELD // 2 :]
        kept = {latent for latent, _ in shown}
        self._thumbs = {latent: picture for latent, picture in self._thumbs.items() if latent in kept}
        fresh = {n: picture for n, picture in self._thumbs.items() if everything or n not in self._told}
        self._told = set(self._thumbs)
        return {"held": [[latent, region] for latent, region in shown], "count": len(held), "thumbs": fresh}

    # -- kept on disk --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the stream. Only after it was begun."""
        self._stream().save(path)

    def state(self) -> dict[str, Any]:
        """All but the stream, as JSON can hold it."""
        return {
            "timeline": self.timeline.model_dump(exclude_none=True),
            "script": [entry.model_dump(exclude_none=True) for entry in self.script],
            "asked": self.asked.model_dump(),
            "settings": {"memory": self.memory, "schedule": self.schedule, "seed": self.seed},
            "tracks": sorted(self.tracks),
            "base": self.base,
        }

    @classmethod
    def restored(cls, source: Source, limits: Limits, state: dict[str, Any], path: Path) -> Take:
        """What `state` and `save` kept. The stream is read when it is needed. Raises ValueError for a damaged state."""
        take = cls(source, limits, Timeline.model_validate(state["timeline"]))
        take.script = deque(Entry.model_validate(entry) for entry in state["script"])
        kind = BlendItem if state["asked"]["type"] == "blend" else PromptItem
        take.asked = kind.model_validate(state["asked"])
        settings = SettingsItem.model_validate({"type": "settings", **state["settings"]})
        take.memory, take.schedule, take.seed = settings.memory, settings.schedule, settings.seed
        take.tracks, take.base = set(state["tracks"]), int(state["base"])
        take._open = lambda: source.resume(path)
        return take
