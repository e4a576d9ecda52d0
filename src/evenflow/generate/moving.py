"""Schedules in which frames of different noise levels are in flight together: rolling window, buffer, stream batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .schedule import Call, Frames, Schedule, at_least, span


@dataclass(frozen=True)
class Rolling(Schedule):
    """T blocks at T levels together: each turn cleans all by one level, emits the oldest and admits a new one.

    The start uses the noisiest levels only, the end of a finite stream the cleanest. A finished block is kept by a clean
    pass; those of blocks still in flight, which the official code makes at the start, are left out. Source: Rolling
    Forcing, arXiv 2509.25161, sections on windows.
    """

    levels: int = 5
    chunk: int = 3

    def __post_init__(self) -> None:
        at_least(levels=(self.levels, 1), chunk=(self.chunk, 1))

    @property
    def emits(self) -> int:
        return self.chunk

    @property
    def delay(self) -> int:
        return self.levels - 1

    @property
    def at_once(self) -> int:
        return self.levels * self.chunk

    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        call = ladder(n, self.levels, self.chunk, 1, end)
        if not call:
            return ()
        done, m = call[0].emit, len(call[0].emit)
        last = (self.levels,) * m
        return (*call, Call(done, last, last, commit=True, clean=True)) if done else call


@dataclass(frozen=True)
class Buffer(Schedule):
    """A moving buffer of N chunks of c frames behind K clean ones; every chunk has a segment of s levels of its own.

    Each turn is s calls, after which the front chunk is clean and leaves, and noise enters at the back. T = s·N. Start:
    "uniform" makes a clip of the whole buffer as usual and puts every chunk aside when it has come to its level;
    "growing" begins with one chunk, and emits after N turns. Nothing is remembered beyond the buffer: positions are
    slots. N = 1 is an ordinary clip, c = s = 1 a diagonal queue (FIFO). The K frames are the last emitted, or of the
    `given` ones before the first, fewer where there are none. Source: StreamDiT, arXiv 2507.03745, section on the partition; RAIN, arXiv 2412.19489, is (0, 4, 4, 1) with
    re-noising and the growing start.
    """

    K: int = 0
    N: int = 8
    c: int = 2
    s: int = 1
    start: Literal["uniform", "growing"] = "uniform"
    renoise: bool = False
    shift: float = 1.0
    given: int = 0

    def __post_init__(self) -> None:
        at_least(K=(self.K, 0), N=(self.N, 1), c=(self.c, 1), s=(self.s, 1))
        if self.start not in ("uniform", "growing"):
            raise ValueError(f"start is {self.start!r}; it must be 'uniform' or 'growing'")
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}; it must be positive (1: levels at equal distances)")

    @property
    def levels(self) -> int:
        return self.s * self.N

    @property
    def emits(self) -> int:
        return self.c

    @property
    def delay(self) -> int:
        return self.N - 1 if self.start == "growing" else int(self._clips)

    @property
    def at_once(self) -> int:
        return self.K + self.N * self.c

    def continued(self, given: int) -> Schedule:
        return replace(self, given=given)

    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        if self._clips:
            if n == 0:
                return self._clip(end)
            n += self.N - 2  # the windows that are not yet whole are the clip's
        return ladder(n, self.N, self.c, self.s, end, self.K, self.given)

    @property
    def _clips(self) -> bool:
        """Whether the first turn makes a clip of the whole buffer."""
        return self.start == "uniform" and self.N > 1

    def _clip(self, end: int | None) -> tuple[Call, ...]:
        """All frames of the buffer level by level, as far as the front chunk needs it."""
        frames = span(0, self.N * self.c, end)
        chunks = [frames[at : at + self.c] for at in range(0, len(frames), self.c)]
        m, there = len(frames), {(self.N - 1 - i) * self.s: chunk for i, chunk in enumerate(chunks)}
        behind = span(-min(self.given, self.K), 0)
        clean = (self.levels,) * len(behind)
        return tuple(
            Call(
                behind + frames,
                clean + (i,) * m,
                clean + (i + 1,) * m,
                fresh=() if i else frames,
                aside=there.get(i, ()),
            )
            for i in range((self.N - 1) * self.s)
        )


def ladder(n: int, blocks: int, c: int, s: int, end: int | None, K: int = 0, given: int = 0) -> tuple[Call, ...]:
    """Window n over blocks of c frames: block b entered with window b, and has risen s levels with each since.

    Windows 0 … blocks − 2 have not yet all blocks, the last ones of a finite stream no longer. K clean frames before.
    """
    first = max(0, n - blocks + 1)
    frames = span(first * c, (n + 1) * c, end)
    if not frames:
        return ()
    behind = span(max(-given, first * c - K), first * c)
    calls = []
    for i in range(s):
        before = tuple((n - frame // c) * s + i for frame in frames)
        clean = (blocks * s,) * len(behind)
        fresh = tuple(f for f in frames if f // c == n) if i == 0 else ()
        done = tuple(f for f, level in zip(frames, before, strict=True) if level + 1 == blocks * s)
        calls.append(
            Call(behind + frames, clean + before, clean + tuple(b + 1 for b in before), fresh=fresh, emit=done)
        )
    return tuple(calls)


@dataclass(frozen=True)
class Batch(Schedule):
    """A stream batch: each call brings a new block and cleans the T newest blocks, each a batch row, by one level.

    Row i holds the block that came i calls ago at level i; it is finished T − 1 calls after it came. Rows do not see one
    another, and each has a memory copy of its own, where there is memory, which keeps every call: there is no clean
    pass. first: frames that come before all others and pass all levels one after another (StreamDiffusionV2 begins with
    two latents, which all copies keep as the last pass made them); 0 is none. slots: noise belongs to a level and is
    the same for every frame (StreamDiffusion), not fresh. Blocks are whole: a stream's end is that of a block.
    Sources: StreamDiffusion, arXiv 2312.12491; StreamDiffusionV2, arXiv 2511.07399, section on the stream batch.
    """

    levels: int = 2
    chunk: int = 1
    first: int = 2
    slots: bool = False

    def __post_init__(self) -> None:
        at_least(levels=(self.levels, 1), chunk=(self.chunk, 1), first=(self.first, 0))

    @property
    def emits(self) -> int:
        return self.chunk

    @property
    def first_emits(self) -> int:
        return self.first or self.chunk

    @property
    def delay(self) -> int:
        return 0 if self.first else self.levels - 1

    @property
    def at_once(self) -> int:
        return max(self.chunk, self.first)

    def turn(self, n: int, end: int | None = None) -> tuple[Call, ...]:
        if self.first and n == 0:
            frames = span(0, self.first)
            return tuple(
                Call(
                    frames, (i,) * self.first, (i + 1,) * self.first, fresh=() if i else frames,
                    emit=frames if i == self.levels - 1 else (), commit=i == self.levels - 1,
                )
                for i in range(self.levels)
            )  # fmt: skip
        newest = n - 1 if self.first else n
        rows = [
            (block, newest - block)
            for block in range(newest, newest - self.levels, -1)
            if block >= 0 and (end is None or self.first + block * self.chunk < end)
        ]
        if not rows:
            return ()

        def of(block: int) -> Frames:
            return span(self.first + block * self.chunk, self.first + (block + 1) * self.chunk)

        before = tuple(level for _, level in rows for _ in range(self.chunk))
        return (
            Call(
                tuple(frame for block, _ in rows for frame in of(block)), before, tuple(level + 1 for level in before),
                fresh=of(newest) if rows[0][0] == newest else (),
                emit=of(rows[-1][0]) if rows[-1][1] == self.levels - 1 else (), commit=True, rows=len(rows),
            ),
        )  # fmt: skip
