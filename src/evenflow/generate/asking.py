"""What a viewer asks of a stream: other prompts, and tracks that are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..memory.chunks import ArenaState
from .engine import Engine, Given
from .prompts import Embeddings, Way, Wish, checked, weights_of
from .schedule import Schedule
from .tracks import Track, checked_points

if TYPE_CHECKING:
    from ..models.video.model import VideoModel
    from .opening import Opened

HOW = ("keep", "clear", "recache", "anchored")


@dataclass(frozen=True)
class Asked:
    """A wish that is not yet in force: from latent frame `at` on, with the next chunk."""

    prompt: dict[str, float]
    how: str
    over: float
    way: Way
    at: int


class Asking:
    """The part of a `VideoStream` that takes wishes; they come into force with the next chunk."""

    model: VideoModel
    opened: Opened
    schedule: Schedule
    size: tuple[int, int]
    history: list[dict[str, Any]]
    _engine: Engine
    _prompts: Embeddings
    _wish: Wish
    _asked: list[Asked]
    _tracks: list[Track]
    _next_id: int
    _position: int
    _since: int
    _reference: bool
    _clean: list[Tensor]

    def ask(
        self, prompt: str | Mapping[str, float], how: str | None = None, over: float = 0.0, way: Way = "linear",
        at: int | None = None,
    ) -> None:  # fmt: skip
        """Another prompt (or several with weights) from the next chunk on; one a chunk, where several were asked.

        how: what becomes of the memory that the old prompt has left its mark on. "keep" it (smooth, but the old prompt
        stays), "clear" it (the scene jumps), "recache": compute it anew from the last clean frames under the new
        prompt (LongLive), "anchored": the same, and the new prompt's first chunk is remembered (anchor-forcing only).
        None: the best that the memory can do. over: seconds of a transition, in which texts are mixed ("linear", or
        "slerp"). at: latent frame from which on it holds (with the next chunk that begins there or later).
        """
        checked(over, way)
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or at < self._position):
            raise ValueError(f"at is {at!r}; it must be a latent frame from {self._position} on")
        wish = Asked(weights_of(prompt), self._how(how), float(over), way, self._position if at is None else at)
        self._prompts.mixed(wish.prompt)  # a text that cannot be read is told now
        self._asked.append(wish)
        self._note(
            "ask",
            self._position,
            prompt=wish.prompt,
            how=wish.how,
            over=wish.over,
            way=way,
            **({} if at is None else {"at": at}),
        )

    def blend(
        self, prompts: Mapping[str, float], how: str | None = None, over: float = 0.0, way: Way = "linear"
    ) -> None:
        """Several prompts at once, with weights: `ask` with a mapping."""
        self.ask(dict(prompts), how, over, way)

    def _how(self, how: str | None) -> str:
        state = self._engine.memory
        anew = isinstance(state, ArenaState) and state.memory.rows == 1
        anchors = self._engine.segments
        if how is None:
            return "anchored" if anchors else "recache" if anew else "keep"
        if how not in HOW:
            raise ValueError(f"how is {how!r}; it must be one of {', '.join(HOW)}")
        if how != "keep" and state is None:
            raise ValueError(
                f"how={how!r} is about memory, and {type(self.schedule).__name__.lower()} has none: take 'keep'"
            )
        if how == "anchored" and not anchors:
            raise ValueError("how='anchored' needs memory='anchor-forcing'; take 'recache'")
        if how == "recache" and not anew:
            assert state is not None
            raise ValueError(f"{state.memory.name} cannot be computed anew; take how='keep' or 'clear'")
        return how

    def draw(self, points: Sequence[Sequence[float]], id: int | None = None) -> int:
        """Draw a track: (seconds of the video, x, y in pixels), one point or more; its number, to go on with or to erase.

        One point is held still for good, until the track goes on. Points of a known `id` replace what it has from their
        first time on. A chunk follows what is drawn when it is begun.
        """
        if not self._engine.extra:
            raise ValueError(f"{self.model.config.name} was not made for drawn tracks")
        fresh = checked_points(points, self.size)
        if id is not None and (isinstance(id, bool) or not isinstance(id, int) or id < 0):
            raise ValueError(f"id is {id!r}; it must be a whole number, 0 or more")
        number = self._next_id if id is None else id
        before = next((track.points for track in self._tracks if track.id == number), ())
        track = Track(number, (*(point for point in before if point[0] < fresh[0][0]), *fresh))
        self._tracks = [*(other for other in self._tracks if other.id != number), track]
        self._next_id = max(self._next_id, number + 1)
        self._note("draw", self._position, points=[list(point) for point in fresh], id=number)
        return number

    def erase(self, id: int) -> None:
        """Take a track away."""
        if all(track.id != id for track in self._tracks):
            raise ValueError(f"there is no track {id!r}; there are {sorted(t.id for t in self._tracks)}")
        self._tracks = [track for track in self._tracks if track.id != id]
        self._note("erase", self._position, id=id)

    # -- what comes of it ----------------------------------------------------------------------------------------

    def _switch(self) -> None:
        """What was asked comes into force: one wish a chunk."""
        if not self._asked or self._asked[0].at > self._position:
            return
        asked, engine, before = self._asked[0], self._engine, self._wish
        self._wish = before.turned(
            asked.prompt, self._pixels(self._position) / self.model.config.fps, asked.over, asked.way
        )
        segment = engine.segment
        try:
            if asked.how == "clear":
                assert engine.memory is not None
                engine.memory.reset(keep_sink=self._reference)
                self._clean, self._since = [], self._position
            if asked.how in ("recache", "anchored"):
                engine.segment += asked.how == "anchored"
                self._anew()
        except BaseException as error:
            self._wish, engine.segment = before, segment
            if isinstance(error, Exception):  # told now; kept, it would stop every later chunk as well
                self._asked = self._asked[1:]
            raise
        self._asked = self._asked[1:]

    def _anew(self) -> None:
        latents = self._clean[-min(self.opened.keeps, self._position - self._since) :] if self._clean else []
        if latents:
            frames = range(self._position - len(latents), self._position)
            self._engine.know(frames, torch.stack(latents), self._given(self._ends()), again=True)

    def _prune(self) -> None:
        """Forget what is drawn of a past that nothing looks at any more."""
        past = self._pixels(self._position - self.opened.keeps - self.schedule.at_once) / self.model.config.fps
        self._tracks = [_from(track, past) for track in self._tracks if not track.over(past)]

    def _note(self, do: str, frame: int, **what: Any) -> None:
        self.history.append({"frame": frame, "do": do, **what})

    def _pixels(self, latents: int) -> int:
        return self.model.config.stride[0] * (latents - 1) + 1 if latents > 0 else 0

    def _ends(self) -> float:
        """Seconds at which the next chunk ends."""
        return self._pixels(self._position + self.schedule.emits) / self.model.config.fps

    def _given(self, seconds: float | None = None) -> Given:
        raise NotImplementedError


def _from(track: Track, past: float) -> Track:
    """A track without what lies before `past`, but for the last point before it."""
    early = sum(seconds < past for seconds, _, _ in track.points)
    return track if early < 2 else replace(track, points=track.points[early - 1 :])
