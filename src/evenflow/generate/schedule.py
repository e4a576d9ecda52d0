"""Schedules: which frames hold which noise level at each network call, what is emitted, and what a memory keeps.

A schedule is arithmetic. `turn(n)` tells the calls of turn n and nothing else does, so where a stream stands is one
number, and forks, replays and resumed streams go on exactly. Frames are numbered from the start of what is generated;
levels are those of a `Sampler`: 0 is what a frame enters with, `levels` is clean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

Frames = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One network call.

    frames: what the network sees, in time order (or, with `rows`, block after block, each in a batch row of its own, the
    newest first). before, after: their levels before and after it. fresh: frames that enter right before it. emit:
    frames that are finished with it. commit: the memory keeps what this call attends; if not, it is as if it had not
    been. clean: a pass over finished frames for the memory's sake, whose output is ignored. pinned: the first so many
    frames are held as they are, and when the call emits, they become the mean of that and the network's view. aside:
    frames of which a copy is put aside before the call, to be what they are when the turn ends.
    """

    frames: Frames
    before: tuple[int, ...]
    after: tuple[int, ...]
    fresh: Frames = ()
    emit: Frames = ()
    commit: bool = False
    clean: bool = False
    pinned: int = 0
    rows: int = 0
    aside: Frames = ()

    def shifted(self, by: int) -> Call:
        """The same call, all frames so much later: of a stream that goes on from given ones."""
        frames, fresh, emit, aside = (
            tuple(frame + by for frame in some) for some in (self.frames, self.fresh, self.emit, self.aside)
        )
        return replace(self, frames=frames, fresh=fresh, emit=emit, aside=aside)


@dataclass(frozen=True)
class Schedule(ABC):
    """What all schedules share: `levels` noisy levels T, and `chunk` frames that are emitted together."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """T, the number of noisy levels a frame passes."""

    @property
    @abstractmethod
    def emits(self) -> int:
        """Frames that a turn emits once the stream runs."""

    @property
    def first_emits(self) -> int:
        """Frames of the first emission, where that is another number."""
        return self.emits

    @property
    def delay(self) -> int:
        """Turns before the first that emits."""
        return 0

    @property
    def at_once(self) -> int:
        """The most frames that one call brings to the memory."""
        return self.emits

    @abstractmethod
    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        """The calls of turn n ≥ 0. end: the stream has so many frames; None: it does not end. () when all are emitted."""

    def frames_of(self, n: int) -> Frames:
        """Frames that turn n emits, in a stream without end."""
        return tuple(frame for call in self.turn(n) for frame in call.emit)

    def continued(self, given: int) -> Schedule:
        """The schedule of a stream that goes on from so many given frames, so that its first chunk is like any other."""
        return self


def span(first: int, stop: int, end: int | None = None) -> Frames:
    """Frames first … stop − 1, as far as there are any."""
    return tuple(range(first, stop if end is None else min(stop, end)))


def at_least(**least: tuple[int, int]) -> None:
    for name, (value, bound) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, {bound} or more")


@dataclass(frozen=True)
class Chunks(Schedule):
    """Chunk by chunk: T calls over one chunk, then a clean pass that the memory keeps.

    chunk: frames of a chunk; 1 is frame by frame. first: of the first chunk (1: an independent first frame). Source:
    Self Forcing, arXiv 2506.08009, section on the inference loop; MotionStream, arXiv 2511.01266, is 3 levels, with
    one sink chunk and one window chunk in its memory (that it makes a clean pass of its own is assumed).
    """

    levels: int = 4
    chunk: int = 3
    first: int | None = None

    def __post_init__(self) -> None:
        at_least(levels=(self.levels, 1), chunk=(self.chunk, 1), first=(self.first_emits, 1))

    @property
    def emits(self) -> int:
        return self.chunk

    @property
    def first_emits(self) -> int:
        return self.chunk if self.first is None else self.first

    @property
    def at_once(self) -> int:
        return max(self.chunk, self.first_emits)

    def continued(self, given: int) -> Schedule:
        return Chunks(self.levels, self.chunk)

    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        start = self.first_emits + (n - 1) * self.chunk if n else 0
        frames = span(start, start + (self.chunk if n else self.first_emits), end)
        if not frames:
            return ()
        m, last = len(frames), self.levels
        calls = [
            Call(frames, (i,) * m, (i + 1,) * m, fresh=() if i else frames, emit=frames if i == last - 1 else ())
            for i in range(last)
        ]
        return (*calls, Call(frames, (last,) * m, (last,) * m, commit=True, clean=True))


@dataclass(frozen=True)
class Knots(Schedule):
    """Chunks that overlap: c + k frames are made, c emitted; the k others tie the next chunk to this one.

    In every chunk but the first, the first k frames are those k, held as they are at every level, and in the end the
    mean of both versions (section on the temporal knot). The memory keeps the clean pass of the c. With knot = 0 this
    is `Chunks`. Source: Knot Forcing, arXiv 2512.21734.
    """

    levels: int = 4
    chunk: int = 3
    knot: int = 1

    def __post_init__(self) -> None:
        at_least(levels=(self.levels, 1), chunk=(self.chunk, 1), knot=(self.knot, 0))
        if self.knot > self.chunk:
            raise ValueError(f"knot is {self.knot}; it must not be longer than a chunk of {self.chunk} frames")

    @property
    def emits(self) -> int:
        return self.chunk

    @property
    def at_once(self) -> int:
        return self.chunk + self.knot

    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        start, stop = n * self.chunk, (n + 1) * self.chunk
        done = span(start, stop, end)
        if not done:
            return ()
        frames, last = span(start, stop + self.knot), self.levels
        pinned, m = self.knot if n else 0, len(frames)
        calls = [
            Call(
                frames, (i,) * m, (i + 1,) * m, fresh=() if i else frames[pinned:], pinned=pinned,
                emit=done if i == last - 1 else (),
            )
            for i in range(last)
        ]  # fmt: skip
        return (*calls, Call(done, (last,) * len(done), (last,) * len(done), commit=True, clean=True))
