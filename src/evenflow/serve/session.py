"""A live video: what is asked of it, the frames it makes, and who watches."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .limits import Limits
from .pictures import Film
from .playback import Playback
from .protocol import ClientItem, HistoryReplay, Refused, SessionUpdate, SettingsItem
from .source import Source
from .store import Store
from .take import Take

log = logging.getLogger("evenflow.serve")
QUIET = 0.2  # seconds between two `stats`


class Watcher(Protocol):
    """Who is told what happens; called from the model's thread."""

    def offer(self, event: dict[str, Any]) -> None: ...
    def frames(self) -> None:
        """There are new frames."""


@dataclass(frozen=True, slots=True)
class Request:
    """Something to be done at the next turn. received: when it came (monotonic clock)."""

    do: Callable[[], dict[str, Any] | None]
    watcher: Watcher | None
    event_id: str | None
    received: float
    steers: bool


class Session:
    """One video stream and its clients: a `Job` of the model's worker.

    Clients call `watch`, `unwatch` and `request` in any thread; what is requested, and every method that says so, runs
    in the thread of the model. When nobody watches, nothing is made.
    """

    def __init__(
        self, identity: str, source: Source, store: Store, limits: Limits, take: Take, wake: Callable[[], None]
    ) -> None:
        self.identity, self.source, self.store, self.limits, self.wake = identity, source, store, limits, wake
        self.take, self.playback = take, Playback(source.fps)
        self.playing = self.ended = False
        self.watchers: list[Watcher] = []
        self.left: float | None = time.monotonic()  # when the last watcher went
        self.latency: float | None = None  # seconds from the last change that was asked for to its first frame
        self.sharers = 1  # sessions that take turns in the model
        self._requests: deque[Request] = deque()
        self._lock = threading.Lock()
        self._steered: float | None = None
        self._saved, self._unsaved = time.monotonic(), False
        self._told = 0.0
        self._film: Film | None = None

    # -- in any thread -------------------------------------------------------------------------------------------------

    def watch(self, watcher: Watcher) -> None:
        """Let a client see what is made. Raises Refused when too many do."""
        with self._lock:
            if len(self.watchers) >= self.limits.viewers:
                raise Refused("full", f"{len(self.watchers)} clients watch this session already", "close one of them")
            self.watchers = [*self.watchers, watcher]
            self.left = None
        self.wake()

    def unwatch(self, watcher: Watcher) -> None:
        """A client has gone."""
        with self._lock:
            self.watchers = [other for other in self.watchers if other is not watcher]
            if not self.watchers and self.left is None:
                self.left = time.monotonic()

    def request(
        self,
        do: Callable[[], dict[str, Any] | None],
        watcher: Watcher | None,
        event_id: str | None,
        steers: bool = False,
    ) -> None:
        """Have `do` done before the next chunk; the event that it returns goes to all watchers.

        Raises Refused when too much waits already. What `do` raises is told to `watcher` alone. steers: what is seen
        changes by it, so that the time until then is measured.
        """
        with self._lock:
            if len(self._requests) >= self.limits.pending:
                raise Refused("busy", f"{len(self._requests)} requests wait already", "wait for their answers")
            self._requests.append(Request(do, watcher, event_id, time.monotonic(), steers))
        self.wake()

    def last(self, end: Callable[[], None]) -> None:
        """Have `end` done at the next turn instead of all that was requested."""
        with self._lock:
            self._requests.clear()
            self._requests.append(Request(end, None, None, time.monotonic(), False))
        self.ended = True
        self.wake()

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event to all watchers."""
        for watcher in self.watchers:
            watcher.offer(event)

    # -- turns in the model --------------------------------------------------------------------------------------------

    def wait(self, now: float) -> float | None:
        """See `Job`."""
        if self._requests:
            return 0.0
        due = [self._saved + self.limits.autosave - now] if self._unsaved else []
        if self.playing and self.watchers:
            due.append(self.playback.wait(now))
        return max(0.0, min(due)) if due else None

    def turn(self) -> None:
        """See `Job`."""
        self._answer()
        now = time.monotonic()
        if self.playing and self.watchers and not self.ended and self.playback.wait(now) <= 0:
            self._make(now)
        if self._unsaved and time.monotonic() - self._saved >= self.limits.autosave:
            self.save()

    def failed(self, error: Exception) -> None:
        """See `Job`."""
        self.playing = False
        said = str(error) or type(error).__name__
        self.tell(Refused("failed", f"the video stopped: {said}", "restart it, or choose other settings").event())

    def _answer(self) -> None:
        while True:
            with self._lock:
                if not self._requests:
                    return
                request = self._requests.popleft()
            try:
                event = request.do()
            except Exception as error:  # whatever one request does, the session goes on
                if not isinstance(error, (ValueError, TypeError)):
                    log.error("a request failed", exc_info=error)
                refused = (
                    error if isinstance(error, Refused) else Refused("refused", str(error), "ask for something else")
                )
                if request.watcher is not None:
                    request.watcher.offer(refused.event(request.event_id))
                continue
            if request.steers and self.playing:
                self._steered = self._steered or request.received
            if event is not None:
                self.tell(event if request.event_id is None else {**event, "event_id": request.event_id})

    def _make(self, began: float) -> None:
        scripted = bool(self.take.script)
        for entry in self.take.catch_up():
            self.tell({"type": "input.appended", **entry})
        frames = self.take.step()
        self._unsaved = True
        if len(frames):
            now = time.monotonic()
            first = self.playback.add(frames, began, now, time.time())
            if self._steered is not None:
                self.latency, self._steered = first - self._steered, None
            if self._film is not None:
                self._film.add(frames)
                if self._film.seconds >= self.limits.recording:
                    self.tell(self.record(False))
            for watcher in self.watchers:
                watcher.frames()
            if now - self._told >= QUIET:
                self._told = now
                self.tell(self.stats())
                self.tell({"type": "memory", **self.take.held()})
        if scripted and not self.take.script:
            self.tell({"type": "history.replayed", "position": self.take.position})

    # -- what is requested, in the model's thread ------------------------------------------------------------------------

    def welcome(self, watcher: Watcher, resumed: bool, event_id: str | None) -> None:
        """Tell a client that has come all there is to know."""
        self.take.begin()
        created = {"type": "session.created", "resumed": resumed, **self.described()}
        watcher.offer(created if event_id is None else {**created, "event_id": event_id})
        watcher.offer({"type": "memory", **self.take.held(everything=True)})

    def described(self) -> dict[str, Any]:
        """What a session is now."""
        take = self.take
        return {
            "session": self.identity,
            "settings": {
                "memory": take.memory, "schedule": take.schedule, "seed": take.seed, "pace": self.playback.pace,
            },
            "history": take.timeline.model_dump(exclude_none=True),
            "asked": take.asked.model_dump(exclude_none=True),
            "unknown": take.unknown(take.asked),
            "tracks": sorted(take.tracks),
            "position": take.position,
            "frame": self.playback.made,
            "playing": self.playing,
            "recording": self._film is not None,
        }  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """The `stats` event."""
        now, playback = time.monotonic(), self.playback
        return {
            "type": "stats",
            "fps": round(playback.rate(now), 2),
            "chunk_seconds": round(playback.service, 4),
            "latency": None if self.latency is None else round(self.latency, 3),
            "bytes": self.take.nbytes,
            "drift": round(self.take.drift, 4),
            "position": self.take.position,
            "frame": playback.made,
            "sharers": self.sharers,
            "recorded": None if self._film is None else round(self._film.seconds, 1),
        }

    def put(self, item: ClientItem) -> dict[str, Any]:
        """Answer `input.append`."""
        return {"type": "input.appended", **self.take.put(item)}

    def update(self, event: SessionUpdate) -> dict[str, Any]:
        """Answer `session.update`: another memory, schedule or seed begins the video anew."""
        take = self.take
        memory, schedule = event.memory or take.memory, event.schedule or take.schedule
        seed = take.seed if event.seed is None else event.seed
        if (memory, schedule, seed) != (take.memory, take.schedule, take.seed):
            take.put(SettingsItem(type="settings", memory=memory, schedule=schedule, seed=seed))
        self.playback.pace = event.pace or self.playback.pace
        return {"type": "session.updated", **self.described()}

    def restart(self) -> dict[str, Any]:
        """Answer `session.restart`: from the beginning, with what is asked for now."""
        self.take = self.take.again()
        return {"type": "session.updated", **self.described()}

    def replay(self, event: HistoryReplay) -> dict[str, Any]:
        """Answer `history.replay`: a timeline from its beginning."""
        history = event.history
        begin = history.model_copy(update={"entries": []})
        take = Take(self.source, self.limits, begin, history.entries)
        take.begin()  # what cannot be had is refused before the present video is given up
        self.take, self.playing = take, True
        return {"type": "session.updated", **self.described()}

    def play(self, on: bool) -> dict[str, Any]:
        """Answer `response.create` and `response.cancel`."""
        self.playing = on
        return {"type": "response.started" if on else "response.cancelled", "position": self.take.position}

    def record(self, on: bool) -> dict[str, Any]:
        """Answer `record.start` and `record.stop`."""
        if on == (self._film is not None):
            raise Refused(
                "refused", f"it is {'' if on else 'not '}being recorded", f"send record.{'stop' if on else 'start'}"
            )
        if on:
            self._film = Film(self.store.recording(self.identity), self.source.fps, self.source.size)
            return {"type": "record.started"}
        film, self._film = self._film, None
        assert film is not None
        size = film.close()
        if not size:
            raise Refused("refused", "nothing was shown while it recorded", "record a video that runs")
        address = f"/v1/sessions/{self.identity}/recording.mp4"
        return {
            "type": "record.done",
            "url": address,
            "seconds": round(film.seconds, 3),
            "frames": film.frames,
            "bytes": size,
        }

    def save(self) -> dict[str, Any]:
        """Answer `session.save`."""
        self._saved, self._unsaved = time.monotonic(), False
        if not self.take.begun:
            raise Refused("refused", "there is nothing to save yet", "start the video first")
        meta = {
            "take": self.take.state(), "pace": self.playback.pace, "playing": self.playing,
            "frame": self.playback.made, "chunk": self.playback.chunks, "source": self.source.name,
        }  # fmt: skip
        size = self.store.write(self.identity, meta, self.take.save)
        return {"type": "session.saved", "session": self.identity, "bytes": size, "frame": self.playback.made}

    def restore(self, meta: dict[str, Any]) -> None:
        """Go on counting where a saved session was."""
        self.playback.pace, self.playing = float(meta["pace"]), bool(meta["playing"])
        self.playback.made, self.playback.chunks = int(meta["frame"]), int(meta["chunk"])

    def retire(self, keep: bool) -> None:
        """End; keep what there is, or forget it."""
        if self._film is not None:
            self._film.close()
        if keep and self._unsaved:
            self.save()
        if not keep:
            self.store.forget(self.identity)
        self._unsaved = False
