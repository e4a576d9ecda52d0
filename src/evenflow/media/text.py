"""Text that arrives for ever: a file, standard input, a log that somebody else is writing.

Text is handed on line by line, so that whoever encodes it gets the same tokens however the bytes arrived. Only a line
of more than `LONGEST` bytes is cut, always at the same place.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

LONGEST = 1 << 16  # bytes of a line that are handed on at once
BLOCK = 1 << 16  # bytes asked for at a time
POLL = 0.2  # seconds between two looks at a log that has not grown


class NotText(ValueError):
    """Bytes that are no UTF-8 text."""


@dataclass(frozen=True)
class Line:
    """A line with its end (the last one may have none). number: from 1. offset: of its first byte in the source."""

    text: str
    number: int
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + len(self.text.encode())


def lines(
    source: str | os.PathLike[str], follow: bool = False, offset: int = 0, number: int = 1
) -> Generator[Line | None, None, None]:
    """The lines of a file or pipe, or of standard input for "-"; None whenever the source has nothing more for the moment.

    follow: wait for the file to grow, for ever; a file that shrinks or is replaced is read from its start, as `tail -F`
    does. offset, number: where to begin in a file, and the number of the line that begins there. Raises NotText (a
    ValueError) for bytes that are no text, OSError for what cannot be opened, ValueError for what cannot be followed.
    """
    name = "standard input" if str(source) == "-" else str(source)
    blocks = _standard_input() if str(source) == "-" else _file(Path(source), follow, offset)
    if follow and str(source) == "-":
        raise ValueError("standard input ends by itself; --follow is for files")
    pending, fresh = b"", offset
    for block in blocks:
        if block is None:
            yield None
            continue
        if isinstance(block, Restart):
            if pending:
                yield Line(_decoded(pending, name, fresh), number, fresh)
            pending, fresh, number = b"", 0, 1
            continue
        pending += block
        while pending:
            cut = pending.find(b"\n", 0, LONGEST) + 1
            ends = cut > 0
            if not ends:
                if len(pending) < LONGEST + 4:
                    break
                cut = _whole(pending, LONGEST)
            yield Line(_decoded(pending[:cut], name, fresh), number, fresh)
            pending, fresh, number = pending[cut:], fresh + cut, number + ends
    if pending:
        yield Line(_decoded(pending, name, fresh), number, fresh)


class Restart:
    """A followed file that begins anew."""


def _file(path: Path, follow: bool, offset: int) -> Iterator[bytes | Restart | None]:
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    file: BinaryIO = path.open("rb")
    try:
        if not path.is_file():  # a pipe, which cannot be sought in and gives what there is
            if follow:
                raise ValueError(f"{path} is a pipe and ends by itself; --follow is for files")
            yield from _arriving(file.fileno())
            return
        if offset > path.stat().st_size:
            if not follow:
                raise ValueError(
                    f"{path} is shorter than what was read of it ({offset:,} bytes): it is another file now"
                )
            offset = 0  # rotated while nobody looked
            yield Restart()
        file.seek(offset)
        while True:
            while block := file.read(BLOCK):
                yield block
            if not follow:
                return
            yield None
            time.sleep(POLL)
            try:
                now = path.stat()
                if now.st_ino == os.fstat(file.fileno()).st_ino and now.st_size >= file.tell():
                    continue
                fresh = path.open("rb")
            except FileNotFoundError:
                continue  # between the two halves of a rotation
            while block := file.read(BLOCK):
                yield block
            file.close()
            file = fresh
            yield Restart()
    finally:
        file.close()


def _standard_input() -> Iterator[bytes | None]:
    if sys.stdin is None:
        raise ValueError("standard input is closed; give it a text, or name a file")
    yield from _arriving(sys.stdin.fileno())


def _arriving(handle: int) -> Iterator[bytes | None]:
    """Bytes as they come through a pipe; None when the next ones have to be waited for."""
    while True:
        if not select.select([handle], [], [], 0)[0]:
            yield None
        block = os.read(handle, BLOCK)
        if not block:
            return
        yield block


def _whole(data: bytes, at: int) -> int:
    """The last place up to `at` that is not in the middle of a character."""
    while at > 1 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _decoded(data: bytes, name: str, offset: int) -> str:
    at = data.find(b"\0")
    if at >= 0:
        raise NotText(f"{name} is not text: there is a zero byte at offset {offset + at:,}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at offset {offset + error.start:,}"
        raise NotText(f"{name} is not UTF-8 text: {wrong}") from None
