"""Reading a text through one or several memories at once, and what is known about it while it goes on."""

from __future__ import annotations

import heapq
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..media import Line
from ..models import Stream

POINT = 1024  # tokens between two points of a curve, at first
POINTS = 1024  # of a curve at most; then every other one goes, so that a stream without end has a curve with one
SHORT = 4  # a line of fewer tokens counts as one of so many: one odd word is no odd line


@dataclass
class Point:
    """What one memory had done after `position` tokens of text."""

    position: int
    nats: float  # summed so far
    counted: int  # tokens that have a surprisal
    seconds: float
    nbytes: int


@dataclass
class Track:
    """One memory that reads the text. stopped: why it does not read on."""

    name: str
    stream: Stream
    tokens: int = 0
    nats: float = 0.0
    counted: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    spacing: int = POINT
    stopped: str | None = None

    def read(self, ids: list[int]) -> torch.Tensor:
        """Read text tokens; their surprisal in nats, float32 [T]."""
        start = time.perf_counter()
        nats = self.stream.surprisal(ids)[0].cpu()
        self.seconds += time.perf_counter() - start
        known = nats[~nats.isnan()]
        self.nats += float(known.double().sum())
        self.counted += len(known)
        self.tokens += len(ids)
        if self.tokens - self.curve[-1].position >= self.spacing:
            self.mark()
        return nats

    def mark(self) -> None:
        """Put the present state on the curve."""
        self.curve.append(Point(self.tokens, self.nats, self.counted, self.seconds, self.stream.nbytes))
        if len(self.curve) > POINTS:
            del self.curve[1::2]
            self.spacing *= 2

    def finish(self) -> None:
        """The curve ends where the track does; a short rest joins the piece before it."""
        if not self.curve or self.curve[-1].position == self.tokens:
            return
        if len(self.curve) > 2 and self.tokens - self.curve[-1].position < self.spacing / 2:
            self.curve.pop()
        self.mark()

    @property
    def nats_per_token(self) -> float:
        """Mean surprisal so far; NaN before the first token."""
        return self.nats / self.counted if self.counted else math.nan

    def pieces(self) -> Iterator[tuple[Point, Point]]:
        """Neighbouring points of the curve."""
        return pairwise(self.curve)

    def lately(self, share: float = 0.25) -> tuple[float, float]:
        """Nats and seconds per token over the last share of the stream."""
        end = self.curve[-1]
        begin = next((p for p in reversed(self.curve) if p.position <= end.position * (1 - share)), self.curve[0])
        counted, tokens = end.counted - begin.counted, end.position - begin.position
        nats = (end.nats - begin.nats) / counted if counted else math.nan
        return nats, (end.seconds - begin.seconds) / tokens if tokens else math.nan


@dataclass(frozen=True, order=True)
class Odd:
    """A line and how surprising it was: nats per token."""

    nats: float
    number: int
    offset: int
    position: int  # of its first token in the stream of text
    text: str


@contextmanager
def whole() -> Iterator[None]:
    """Ctrl-C waits until this is done, so that what was read and what is known about it never part."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class Reading:
    """A text on its way through some tracks: lines in, tokens in chunks through every memory, odd lines noted."""

    def __init__(self, tracks: list[Track], encode: Callable[[str], list[int]], chunk: int, odd: int = 0) -> None:
        self.tracks, self.encode, self.chunk, self.keep = tracks, encode, chunk, odd
        self.odd: list[Odd] = []
        self.offset, self.number = 0, 1  # where the source goes on after the last line that was read
        self.tokens = 0
        self._ids: list[int] = []
        self._lines: list[tuple[Line, int]] = []  # with the number of their tokens in `_ids`

    def run(self, source: Iterable[Line | None], limit: int | None, patience: float | None) -> Iterator[None]:
        """Read the source; yields after every chunk.

        limit: tokens of text, up to the end of the line that reaches it. patience: seconds for each memory.
        """
        left = math.inf if limit is None else limit
        for track in self.tracks:
            track.mark()
        for line in source:
            if line is not None:
                ids = self.encode(line.text)
                left -= len(ids)
                self._ids += ids
                self._lines.append((line, len(ids)))
            if self._ids and (line is None or len(self._ids) >= self.chunk or left <= 0):
                with whole():
                    self._flush(patience)
                yield
            if left <= 0 or all(track.stopped for track in self.tracks):
                break
        if self._ids:
            with whole():
                self._flush(patience)
            yield
        for track in self.tracks:
            track.finish()

    def _flush(self, patience: float | None) -> None:
        ids, lines, self._ids, self._lines = self._ids, self._lines, [], []
        nats: torch.Tensor | None = None
        for track in self.tracks:
            if track.stopped:
                continue
            for at in range(0, len(ids), self.chunk):
                piece = track.read(ids[at : at + self.chunk])
                if track is self.tracks[0]:
                    nats = piece if nats is None else torch.cat([nats, piece])
            if patience is not None and track.seconds > patience:
                track.stopped = f"stopped at {track.tokens:,} tokens after {track.seconds:.0f} s"
        at = 0
        for line, count in lines:
            if nats is not None and self.keep and line.text.strip():
                mean = float(nats[at : at + count].nan_to_num(0.0).sum()) / max(count, SHORT)
                heapq.heappush(
                    self.odd, Odd(mean, line.number, line.offset, self.tokens + at, line.text.rstrip("\r\n"))
                )
                if len(self.odd) > self.keep:
                    heapq.heappop(self.odd)
            at += count
            self.offset, self.number = line.end, line.number + line.text.endswith("\n")
        self.tokens += len(ids)

    def notes(self) -> dict[str, Any]:
        """What a saved reading must remember beside the stream."""
        track = self.tracks[0]
        return {
            "offset": self.offset,
            "number": self.number,
            "tokens": track.tokens,
            "nats": track.nats,
            "counted": track.counted,
        }

    def recall(self, notes: dict[str, Any], same: bool = True) -> None:
        """Go on counting where a saved reading was, and if it is the `same` source, go on there in it too."""
        track = self.tracks[0]
        if same:
            self.offset, self.number = int(notes["offset"]), int(notes["number"])
        self.tokens = track.tokens = int(notes["tokens"])
        track.nats, track.counted = float(notes["nats"]), int(notes["counted"])
