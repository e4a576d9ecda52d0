"""How much one client may ask for, and one server hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server grants. All sizes in bytes, all times in seconds."""

    message: int = 256 * 1024  # of one message from a client
    prompt: int = 2000  # characters
    points: int = 512  # of a drawn path
    tracks: int = 16  # drawn paths at once
    picture: int = 4096  # pixels along the longer side of a given image
    history: int = 1000  # entries of a timeline
    seats: int = 4  # sessions that are held in the model at once
    sockets: int = 64  # open connections
    viewers: int = 4  # connections that watch one session
    pending: int = 32  # requests of a session that wait for their turn
    events: int = 128  # answers that wait for a slow client
    event_rate: float = 20.0  # messages a second, over long
    event_burst: float = 60.0
    byte_rate: float = 128 * 1024.0  # of messages a second, over long
    byte_burst: float = 1024 * 1024.0
    strikes: int = 200  # messages refused in a row before the connection is closed
    stalled: float = 15.0  # after so long without reading anything a client is let go
    keep: float = 600.0  # a session without a client stays in the model for so long
    autosave: float = 20.0  # between two savings of a session that runs
    saved: int = 64  # sessions kept on disk, the newest
    recording: float = 600.0  # of one recording
    text: int = 1024 * 1024  # characters that wait to be read


class Bucket:
    """A token bucket: `rate` a second over long, `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self.level, self.at = burst, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Whether `amount` may pass now; what may not is not counted."""
        now = self.clock()
        self.level, self.at = min(self.burst, self.level + (now - self.at) * self.rate), now
        if amount > self.level:
            return False
        self.level -= amount
        return True
