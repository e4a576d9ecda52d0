"""All sessions of one video model."""

from __future__ import annotations

import threading
import time
from typing import Any

from .limits import Limits
from .protocol import LIMITS, Refused, SessionCreate, Timeline
from .session import Session
from .source import Choice, Source
from .store import Store, new_identity
from .take import Take
from .worker import Worker


class Room:
    """Opens, finds and lets go sessions; the seats in the model are few, and a session without clients gives way."""

    def __init__(self, source: Source, store: Store, limits: Limits = LIMITS) -> None:
        self.source, self.store, self.limits = source, store, limits
        self.sessions: dict[str, Session] = {}
        self.leaving: dict[str, Session] = {}  # until they are saved
        self.worker = Worker(source.name)
        self._lock = threading.RLock()
        self._choices: dict[str, list[Choice]] | None = None

    def choices(self) -> dict[str, list[Choice]]:
        """The memories and schedules that can be asked for, and why others cannot."""
        if self._choices is None:
            self._choices = self.source.choices()
        return self._choices

    def create(self, event: SessionCreate) -> Session:
        """A new session. Raises Refused when all seats are taken."""
        timeline = Timeline(
            prompt=event.prompt or self.source.prompt,
            seed=event.seed or 0,
            memory=event.memory or self.source.memory,
            schedule=event.schedule or self.source.schedule,
        )
        session = self._seat(new_identity(), Take(self.source, self.limits, timeline))
        session.playback.pace = event.pace or 1.0
        session.playing = event.start
        return session

    def resume(self, identity: str) -> Session:
        """The session of that name, from the model or from disk. Raises Refused when there is none."""
        with self._lock:
            if identity in self.sessions:
                return self.sessions[identity]
            if identity in self.leaving:
                raise Refused("busy", "that session is just being saved", "try again in a moment")
        meta, path = self.store.read(identity)
        if meta.get("source") != self.source.name:
            raise Refused(
                "refused", f"that session is of the model {meta.get('source')}", f"this is {self.source.name}"
            )
        try:
            session = self._seat(identity, Take.restored(self.source, self.limits, meta["take"], path))
            session.restore(meta)
        except (KeyError, TypeError, ValueError) as error:
            self.sessions.pop(identity, None)
            if isinstance(error, Refused):
                raise
            raise Refused("damaged", "what was saved of that session cannot be read", "begin a new one") from None
        return session

    def _seat(self, identity: str, take: Take) -> Session:
        with self._lock:
            if identity in self.sessions:
                return self.sessions[identity]
            if len(self.sessions) >= self.limits.seats:
                idle = [session for session in self.sessions.values() if session.left is not None]
                if not idle:
                    taken = f"all {self.limits.seats} seats of this server are taken"
                    raise Refused("full", taken, "try again when somebody has left, or start another server")
                self.leave(min(idle, key=lambda session: session.left or 0.0))
            session = Session(identity, self.source, self.store, self.limits, take, self.worker.wake)
            self.sessions[identity] = session
            self._count()
        self.worker.add(session)
        return session

    def leave(self, session: Session, forget: bool = False) -> None:
        """Take a session from the model, and keep it on disk unless it is to be forgotten."""
        with self._lock:
            if self.sessions.pop(session.identity, None) is None:
                return
            self.leaving[session.identity] = session
            self._count()

        def end() -> None:
            try:
                session.retire(keep=not forget)
            finally:
                self.worker.remove(session)
                with self._lock:
                    self.leaving.pop(session.identity, None)

        session.last(end)

    def sweep(self) -> None:
        """Let go of sessions that nobody has come back to."""
        limit = time.monotonic() - self.limits.keep
        for session in list(self.sessions.values()):
            if session.left is not None and session.left < limit:
                self.leave(session)

    def close(self) -> None:
        """Save what runs, and end."""
        for session in list(self.sessions.values()):
            self.leave(session)
        until = time.monotonic() + 10.0
        while self.leaving and time.monotonic() < until:
            time.sleep(0.01)
        self.worker.stop()

    def described(self) -> dict[str, Any]:
        """How full it is."""
        return {"sessions": len(self.sessions), "seats": self.limits.seats}

    def _count(self) -> None:
        for session in self.sessions.values():
            session.sharers = len(self.sessions)
