"""What a client's events do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import protocol as p
from .room import Room
from .session import Session
from .viewer import Viewer


class Live:
    """One client of a room: it has one session at a time."""

    def __init__(self, room: Room, viewer: Viewer) -> None:
        self.room, self.viewer = room, viewer
        self.session: Session | None = None

    def handle(self, event: Any) -> None:
        """Do what an event asks, or have it done in its turn. Raises Refused with the reason."""
        match event:
            case p.FrameAck():
                self.viewer.ack(event.frame)
            case p.SessionCreate():
                self._free()
                self._enter(self.room.create(event), False, event.event_id)
            case p.SessionResume():
                self._free()
                self._enter(self.room.resume(event.session), True, event.event_id)
            case p.SessionClose():
                session = self._mine()
                self.gone()
                self.room.leave(session, event.forget)
                closed = {"type": "session.closed", "session": session.identity}
                self.viewer.offer(closed if event.event_id is None else {**closed, "event_id": event.event_id})
            case _:
                session = self._mine()
                do, steers = self._work(session, event)
                session.request(do, self.viewer, event.event_id, steers)

    def gone(self) -> None:
        """The client has left, or leaves its session."""
        if self.session is not None:
            self.session.unwatch(self.viewer)
            self.session = None
            self.viewer.watch(None)

    def _work(self, session: Session, event: Any) -> tuple[Callable[[], dict[str, Any]], bool]:
        """What is to be done in the model's thread, and whether it changes what is seen."""
        match event:
            case p.InputAppend():
                return lambda: session.put(event.item), True
            case p.SessionUpdate():
                return lambda: session.update(event), False
            case p.SessionRestart():
                return session.restart, False
            case p.SessionSave():
                return session.save, False
            case p.ResponseCreate() | p.ResponseCancel():
                return lambda: session.play(isinstance(event, p.ResponseCreate)), False
            case p.RecordStart() | p.RecordStop():
                return lambda: session.record(isinstance(event, p.RecordStart)), False
            case p.HistoryReplay():
                return lambda: session.replay(event), False
        raise p.Refused("bad_event", f"{event.type} is not understood", "see docs/live.md")

    def _free(self) -> None:
        if self.session is not None and self.session.ended:
            self.gone()
        if self.session is not None:
            raise p.Refused("refused", "this connection has a session already", "send session.close first")

    def _mine(self) -> Session:
        if self.session is None or self.session.ended:
            raise p.Refused("refused", "this connection has no session", "send session.create or session.resume first")
        return self.session

    def _enter(self, session: Session, resumed: bool, event_id: str | None) -> None:
        session.watch(self.viewer)
        self.session = session
        self.viewer.watch(session)

        def welcome() -> None:
            try:
                session.welcome(self.viewer, resumed, event_id)
            except Exception:
                self.room.leave(session, forget=not resumed)  # it never began, and its seat is free again
                raise

        session.request(welcome, self.viewer, event_id)
