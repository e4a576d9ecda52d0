"""Records on disk that a crash cannot confuse: append-only files of framed, checksummed safetensors.

A record is a head (magic, CRC-32 of the payload, length of the payload) and a payload, one safetensors file in memory
with JSON beside its tensors. CRC-32 finds damage, not forgery. A folder holds segments, which carry keys and values,
each with its journal, which carries what is known of a block and where it lies. A block is confirmed once its journal
record is on the disk, which is always after its segment is. What follows the last whole record of a journal was never
confirmed. Nothing read is ever executed.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

_HEAD = struct.Struct("<4sIQ")
_MAGIC = b"evfb"


class StoreError(ValueError):
    """What a store keeps on disk cannot be read or does not fit."""


def record(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """One framed record; tensors anywhere, `meta` JSON-able."""
    body = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    payload = safetensors.torch.save(body, {"evenflow": json.dumps(meta)})
    return _HEAD.pack(_MAGIC, zlib.crc32(payload), len(payload)) + payload


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of one framed record; raises StoreError when it is cut or changed."""
    if len(data) < _HEAD.size:
        raise StoreError("is cut off")
    magic, checksum, length = _HEAD.unpack_from(data)
    payload = data[_HEAD.size :]
    if magic != _MAGIC or len(payload) != length:
        raise StoreError("is cut off, or its head is damaged")
    if zlib.crc32(payload) != checksum:
        raise StoreError("is damaged: its checksum does not match its content")
    try:
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        return safetensors.torch.load(payload), json.loads(header["__metadata__"]["evenflow"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"is no record: {error}") from error


class Appended:
    """A file that only grows, and only by what reached the disk; readable from any thread.

    A deleted file can be read as long as somebody holds this object: snapshots and forks do.
    """

    def __init__(self, path: Path, *, write: bool = False, create: bool = False) -> None:
        flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
        self.path = path
        self._file = os.open(path, flags | os.O_CLOEXEC, 0o644)
        self.size = os.fstat(self._file).st_size

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def append(self, records: Iterable[bytes]) -> list[int]:
        """Write and sync; the offsets. After an OSError the file is as it was."""
        offsets, at = [], self.size
        try:
            for data in records:
                offsets.append(at)
                rest = memoryview(data)
                while rest:
                    written = os.pwrite(self._file, rest, at)
                    rest, at = rest[written:], at + written
            os.fsync(self._file)
        except OSError:
            self.cut(self.size)
            raise
        self.size = at
        return offsets

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, or what there is."""
        pieces = []
        while length and (piece := os.pread(self._file, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def cut(self, size: int) -> None:
        """Forget everything from `size` on."""
        os.ftruncate(self._file, size)
        self.size = size

    def lock(self) -> None:
        """Be the only writer; raises StoreError when another one is at work."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"{self.path} is written by another store; close that one, or fork it") from error

    def unlock(self) -> None:
        """Let others write."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def delete(self) -> None:
        """Take its name away."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Span:
    """Where a record lies."""

    file: Appended
    offset: int
    length: int

    def load(self) -> dict[str, Tensor]:
        """Its tensors; raises StoreError naming the file when it is missing, cut or changed."""
        try:
            return unpack(self.file.read(self.offset, self.length))[0]
        except OSError as error:
            raise StoreError(f"{self.file.path} cannot be read: {error.strerror}") from error
        except StoreError as error:
            raise StoreError(f"{self.file.path}: the record at byte {self.offset:,} {error}") from error


def replay(journal: Appended) -> tuple[list[tuple[dict[str, Tensor], dict[str, Any]]], int, int]:
    """All whole records of a journal, in order, the byte after the last, and how many in between are damaged."""
    data = journal.read(0, journal.size)
    records: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    at = end = damaged = passed = 0
    while 0 <= at <= len(data) - _HEAD.size:
        stop = at + _HEAD.size + _HEAD.unpack_from(data, at)[2]
        try:
            records.append(unpack(data[at:stop]))
        except StoreError:
            passed += 1
            at = data.find(_MAGIC, at + 1)
        else:
            damaged, at, end = passed, stop, stop
    return records, end, damaged


def sync_folder(path: Path) -> None:
    """Make names in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def own_folder(disk: Path) -> Path:
    """A new folder inside `disk` that nobody else has."""
    disk.mkdir(parents=True, exist_ok=True)
    number = len(list(disk.glob("store-*")))
    while True:
        path = disk / f"store-{number:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        sync_folder(disk)
        return path
