"""When frames are made and when they are seen."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture uint8 [H, W, 3]; due: when it is to be seen (monotonic clock); captured: when made (since 1970)."""

    index: int
    due: float
    captured: float
    chunk: int
    pixels: np.ndarray


class Playback:
    """Plays chunks of frames at an even pace, and tells when the next chunk is wanted.

    A chunk is wanted a little more than it takes to make before the last frame has been seen: early enough for an even
    picture, late enough that what is asked for is seen soon. A model that is slower than its videos plays slower, and
    as evenly. One thread adds; any thread looks.
    """

    def __init__(self, fps: float) -> None:
        self.fps, self.pace = fps, 1.0
        self.made = self.chunks = 0
        self.service = 0.0  # seconds from wanting a chunk to having it, lately
        self._until = self._wanted = 0.0  # when the last frame has been seen; when the next chunk is wanted
        self._frames: deque[Frame] = deque()
        self._rates: deque[tuple[float, int]] = deque(maxlen=16)
        self._lock = threading.Lock()

    def wait(self, now: float) -> float:
        """Seconds until the next chunk is wanted; not above 0 when it is."""
        return self._wanted - now

    def add(self, frames: np.ndarray, began: float, now: float, captured: float) -> float:
        """Play a chunk, uint8 [n, H, W, 3] with n above 0, that was begun at `began` and is there `now`.

        Returns when its first frame is due. A pause, with nothing made, is not counted as slowness: `began` counts then.
        """
        count = len(frames)
        idle = began - self._wanted > 2 * self.service + 0.5
        took = now - (began if idle or not self.chunks else max(self._wanted, self._rates[-1][0]))
        self.service = took if not self.service else 0.7 * self.service + 0.3 * took
        gap = max(1 / (self.fps * self.pace), self.service / count)
        first = max(self._until, now)
        fresh = [Frame(self.made + i, first + i * gap, captured, self.chunks, f) for i, f in enumerate(frames)]
        with self._lock:
            while len(self._frames) > 1 and self._frames[1].due <= now:  # nobody is shown an older one any more
                self._frames.popleft()
            self._frames.extend(fresh)
        self._until = first + count * gap
        # Never more than a chunk ahead: frames of large videos are many bytes, and what is ahead cannot be steered.
        self._wanted = max(now, self._until - min(count * gap, 1.25 * self.service + 0.03))
        self.made += count
        self.chunks += 1
        self._rates.append((now, count))
        return first

    def hurry(self, now: float) -> None:
        """The next chunk is wanted now: something new was asked for while nothing was played."""
        self._wanted = min(self._wanted, now)

    def newest(self, after: int, now: float) -> tuple[Frame | None, float | None]:
        """The newest frame that is due and comes after frame `after`, or None; and when the next one is due, if known."""
        soonest = None
        with self._lock:
            for frame in reversed(self._frames):
                if frame.index <= after:
                    break
                if frame.due <= now:
                    return frame, soonest
                soonest = frame.due
        return None, soonest

    def rate(self, now: float) -> float:
        """Frames made a second, over the last chunks; 0 when none was made lately."""
        rates = list(self._rates)
        if len(rates) < 2 or now - rates[-1][0] > 5.0:
            return 0.0
        return sum(count for _, count in rates[1:]) / max(1e-9, rates[-1][0] - rates[0][0])
