"""A store's own files: segments of blocks, each with its journal, and what it has of others.

`base.journal` tells the number of layers, which blocks lie in another store's segments (of which this one is a fork),
and which were dropped. A segment is deleted as a whole: when room is needed, oldest first, or when nothing in it is
wanted any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from .segments import Appended, Span, StoreError, own_folder, record, replay, sync_folder
from .shelves import Block

_SLACK = 1024  # bytes that head and header of a record take at most, besides 256 a tensor
_LARGEST = 1 << 30  # bytes of a segment


@dataclass(eq=False)
class Segment:
    """One file of blocks with its journal, and the blocks in it that are still wanted."""

    file: Appended
    journal: Appended
    blocks: dict[int, Block] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.file.size + self.journal.size

    def delete(self) -> None:
        # The journal first: without it the rest means nothing.
        self.journal.delete()
        self.file.delete()


@dataclass(frozen=True, eq=False)
class Found:
    """What a folder held when it was opened again. index: by block. lost: reasons by id. notes: what else to say."""

    blocks: list[Block]
    index: dict[int, dict[str, Tensor]]
    lost: dict[int, str]
    notes: list[str]


class Folder:
    """Written by one thread. limit: bytes of all its files, None: whatever the disk holds."""

    def __init__(self, path: Path, base: Appended, layers: int, limit: int | None) -> None:
        self.path, self.base, self.layers, self.limit = path, base, layers, limit
        self.largest = _LARGEST if limit is None else max(1, limit // 8)
        self.segments: list[Segment] = []
        self._next = 0
        self._open: Segment | None = None

    @classmethod
    def new(cls, disk: Path, layers: int, limit: int | None) -> Self:
        """A folder of its own inside `disk`. Raises OSError."""
        path = own_folder(disk)
        base = Appended(path / "base.journal", write=True, create=True)
        base.lock()
        base.append([record({}, {"layers": layers})])
        sync_folder(path)
        return cls(path, base, layers, limit)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self.base.size + sum(segment.size for segment in self.segments)

    def write(self, blocks: Sequence[Block], index: Callable[[Block], Mapping[str, Tensor]]) -> dict[int, Span]:
        """Confirm blocks that lie in RAM: segment, sync, journal, sync. Raises OSError, and then nothing was written."""
        rows = [index(block) for block in blocks]
        need = sum(block.nbytes + 2 * _SLACK for block in blocks)
        need += sum(256 + tensor.nbytes for row in rows for tensor in row.values())
        if self.limit is not None and self.base.size + need > self.limit:
            raise OSError(errno.EFBIG, f"{need:,} bytes at once do not fit into disk_bytes, {self.limit:,}")
        self.tidy()
        if self.limit is not None and self.size + need > self.limit:
            raise OSError(errno.ENOSPC, f"disk_bytes, {self.limit:,}, are used up")
        segment = self._segment()
        lengths: list[int] = []

        def records() -> Iterable[bytes]:
            for block in blocks:
                assert block.ram is not None
                data = record({"keys": block.ram[0], "values": block.ram[1]}, {"id": block.id})
                lengths.append(len(data))
                yield data

        start = segment.file.size
        offsets = segment.file.append(records())
        spans = {
            block.id: Span(segment.file, offset, length)
            for block, offset, length in zip(blocks, offsets, lengths, strict=True)
        }
        try:
            segment.journal.append(
                record(row, self._about(block, spans[block.id])) for block, row in zip(blocks, rows, strict=True)
            )
        except OSError:
            segment.file.cut(start)
            raise
        segment.blocks |= {block.id: block for block in blocks}
        return spans

    def inherit(self, blocks: Sequence[Block], index: Callable[[Block], Mapping[str, Tensor]]) -> None:
        """Note blocks that lie in another store's segments. Raises OSError."""
        self.base.append(
            record(index(block), self._about(block, block.span)) for block in blocks if block.span is not None
        )

    def drop(self, ids: Iterable[int]) -> None:
        """Note blocks that are not wanted any more, and delete segments in which none is. Raises OSError."""
        self.base.append([record({}, {"dropped": sorted(ids)})])
        self.tidy()

    def forget(self, ids: Iterable[int]) -> None:
        """These blocks need no room here any more."""
        gone = set(ids)
        for segment in self.segments:
            for id in gone & segment.blocks.keys():
                del segment.blocks[id]

    def tidy(self) -> None:
        """Delete segments in which nothing is wanted."""
        for segment in [segment for segment in self.segments if not segment.blocks and segment is not self._open]:
            self.delete(segment)

    def delete(self, segment: Segment) -> None:
        """Give its room back. Snapshots and forks that read it still can."""
        self.segments.remove(segment)
        if segment is self._open:
            self._open = None
        segment.delete()

    def _segment(self) -> Segment:
        if self._open is None or self._open.file.size >= self.largest:
            name, self._next = f"{self._next:06d}", self._next + 1
            file = Appended(self.path / f"{name}.blocks", write=True, create=True)
            journal = Appended(self.path / f"{name}.journal", write=True, create=True)
            self._open = Segment(file, journal)
            self.segments.append(self._open)
            sync_folder(self.path)
        return self._open

    def _about(self, block: Block, span: Span) -> dict[str, Any]:
        return {
            "id": block.id, "layer": block.layer, "first": block.first, "count": block.count, "nbytes": block.nbytes,
            "path": os.path.relpath(span.file.path, self.path), "offset": span.offset, "length": span.length,
        }  # fmt: skip

    @classmethod
    def reopen(cls, path: Path, limit: int | None) -> tuple[Self, Found]:
        """Open a folder again, whatever ended the process that wrote it. Raises StoreError if it is none, or in use."""
        try:
            base = Appended(path / "base.journal", write=True)
        except OSError as error:
            raise StoreError(
                f"{path} holds no store: {error.strerror} (base.journal); name the folder store-…"
            ) from error
        base.lock()
        records, end, damaged = replay(base)
        if not records or "layers" not in records[0][1]:
            raise StoreError(f"{base.path} is damaged at its beginning; the store cannot be opened")
        notes = _cut(base, end, damaged)
        folder = cls(path, base, records[0][1]["layers"], limit)
        dropped = {id for _, meta in records for id in meta.get("dropped", ())}
        entries = [(index, meta) for index, meta in records if "id" in meta]
        for name in sorted(path.glob("[0-9]*.journal")):
            journal = Appended(name, write=True)
            more, end, damaged = replay(journal)
            notes += _cut(journal, end, damaged)
            entries += more
            folder._next = int(name.stem) + 1
            try:
                file = Appended(name.with_suffix(".blocks"), write=True)
            except OSError:
                continue  # every block in it is found missing below
            notes += _cut(file, max([meta["offset"] + meta["length"] for _, meta in more], default=0), 0)
            folder.segments.append(Segment(file, journal))
        files: dict[Path, Appended | OSError] = {s.file.path.resolve(): s.file for s in folder.segments}
        found = Found([], {}, {}, notes)
        for index, meta in sorted(entries, key=lambda entry: entry[1]["id"]):
            if meta["id"] in dropped:
                continue
            span = located((path / meta["path"]).resolve(), meta["offset"], meta["length"], files)
            if isinstance(span, str):
                found.lost[meta["id"]] = span
                continue
            block = Block(meta["id"], meta["layer"], meta["first"], meta["count"], meta["nbytes"], span=span)
            found.blocks.append(block)
            found.index[block.id] = index
            for segment in folder.segments:
                if segment.file is span.file:
                    segment.blocks[block.id] = block
        return folder, found


def located(path: Path, offset: int, length: int, files: dict[Path, Appended | OSError]) -> Span | str:
    """The place of a record, or why it is not there. files: those opened so far."""
    if path not in files:
        try:
            files[path] = Appended(path)
        except OSError as error:
            files[path] = error
    file = files[path]
    if isinstance(file, OSError):
        return f"{path} cannot be opened: {file.strerror}"
    if offset + length > file.size:
        return f"{path} is cut off at byte {file.size:,}; the record was at {offset:,}"
    return Span(file, offset, length)


def _cut(file: Appended, end: int, damaged: int) -> list[str]:
    """Take off what is behind `end`; what to say of it."""
    notes = [f"{file.path}: {damaged} damaged records were passed over"] if damaged else []
    if end < file.size:
        notes.append(
            f"{file.path}: {file.size - end:,} bytes behind the last whole record were never confirmed; cut off"
        )
        file.cut(end)
    return notes
