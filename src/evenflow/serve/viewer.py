"""What goes out to one client: answers in order, the latest figures, and the newest frame."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from typing import Any

from fastapi import WebSocket

from .limits import Limits
from .pictures import QUALITIES, encode
from .protocol import FrameHeader, pack_frame
from .reading import SHOWN
from .session import Session

LATEST = ("stats", "memory", "read.progress")  # of these only the newest is worth sending
SETTLED = 3.0  # seconds without trouble after which quality goes up a step


def clean(value: Any) -> Any:
    """The same without numbers that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): clean(inner) for key, inner in value.items()}
    return [clean(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _joined(before: dict[str, Any] | None, event: dict[str, Any]) -> dict[str, Any]:
    """Figures in place of older ones of their kind, with what those would have shown and these do not repeat."""
    if before is None:
        return event
    if event["type"] == "memory":
        kept = {latent for latent, _ in event["held"]}
        thumbs = {**before["thumbs"], **event["thumbs"]}
        return {**event, "thumbs": {n: picture for n, picture in thumbs.items() if n in kept}}
    if event["type"] == "read.progress":
        return {**event, "pieces": [*before["pieces"], *event["pieces"]][-SHOWN:]}
    return event


class TooSlow(Exception):
    """The client does not read what it is sent."""


class Outbox:
    """Events on their way to one client, in bounded memory. `offer` may be called in any thread."""

    def __init__(self, socket: WebSocket, limits: Limits) -> None:
        self.socket, self.limits = socket, limits
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._answers: deque[dict[str, Any]] = deque()
        self._latest: dict[str, dict[str, Any]] = {}

    def offer(self, event: dict[str, Any]) -> None:
        """Send `event` when the client reads; figures that are newer replace older ones."""
        self._call(self._put, event)

    def close(self) -> None:
        """Send what is waiting, and no more."""
        self.over = True
        self._call(self._news.set)

    def _call(self, do: Any, *values: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(do, *values)
        except RuntimeError:  # the loop has ended, and the client with it
            self.over = True

    def _put(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind in LATEST:
            event = _joined(self._latest.get(kind), event)
            self._latest[kind] = event
        elif len(self._answers) < self.limits.events:
            # An answer closes what it answers: figures that came before it are told before it.
            self._answers += [*self._latest.values(), event]
            self._latest.clear()
        else:
            self.over = True  # a client that reads nothing while it asks for more
        self._news.set()

    async def run(self) -> None:
        """Send until closed. Raises TooSlow when the client has read nothing for long."""
        while not (self.over and not self._answers):
            while self._answers:
                await self._send(self._answers.popleft())
            while self._latest and not self._answers:
                await self._send(self._latest.pop(next(iter(self._latest))))
            self._news.clear()
            seconds = await self._more()
            if self._answers or self._latest or self.over:
                continue
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _more(self) -> float | None:
        """Send what is due beside events; seconds until there may be more."""
        return None

    async def _send(self, event: dict[str, Any]) -> None:
        await self._within(self.socket.send_text(json.dumps(clean(event), ensure_ascii=False)))

    async def _within(self, sending: Any) -> None:
        try:
            async with asyncio.timeout(self.limits.stalled):
                await sending
        except TimeoutError:
            self.over = True
            self._answers.clear()
            raise TooSlow from None


class Viewer(Outbox):
    """An outbox with frames: the newest that is due, never an older one.

    A slow client costs quality, first of the pictures and then of their number. One that sends `frame.ack` is never
    sent more than a second of frames that it has not seen; otherwise the connection itself holds back.
    """

    def __init__(self, socket: WebSocket, limits: Limits) -> None:
        super().__init__(socket, limits)
        self.session: Session | None = None
        self.sent = self.dropped = 0
        self._after = -1
        self._acked: int | None = None
        self._unseen: deque[int] = deque()
        self._level, self._trouble = 0, time.monotonic()

    def watch(self, session: Session | None) -> None:
        """Show the frames of this session from now on."""
        self.session, self._after, self._acked = session, -1, None
        if session is not None:
            self._after = session.playback.made - 1
        self._unseen.clear()

    def frames(self) -> None:
        """See `Watcher`."""
        self._call(self._news.set)

    def ack(self, frame: int) -> None:
        """The client has shown this frame."""
        self._acked = frame
        while self._unseen and self._unseen[0] <= frame:
            self._unseen.popleft()
        self._news.set()

    async def _more(self) -> float | None:
        session = self.session
        if session is None:
            return None
        now, playback = time.monotonic(), session.playback
        frame, due = playback.newest(self._after, now)
        if frame is None:
            return None if due is None else max(0.001, due - now)
        if self._acked is not None and len(self._unseen) >= playback.fps * playback.pace:
            self._down(now)
            return 0.25
        missed = frame.index - self._after - 1 if self._after >= 0 else 0
        if missed > 1:
            self._down(now)
        elif now - self._trouble > SETTLED:
            self._level, self._trouble = max(0, self._level - 1), now
        height, width = frame.pixels.shape[:2]
        form, body = await asyncio.to_thread(encode, frame.pixels, QUALITIES[self._level])
        header = FrameHeader(frame.index, frame.captured, frame.chunk, width, height, form)
        self._after = frame.index
        self.dropped += missed
        self.sent += 1
        if self._acked is not None:
            self._unseen.append(frame.index)
        await self._within(self.socket.send_bytes(pack_frame(header, body)))
        return 0.001 if due is None else max(0.001, due - time.monotonic())

    def _down(self, now: float) -> None:
        """Smaller pictures, at most one step a second."""
        if now - self._trouble > 1.0:
            self._level, self._trouble = min(len(QUALITIES) - 1, self._level + 1), now
