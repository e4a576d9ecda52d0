"""State on disk: one safetensors file, written so that a crash leaves the old one and damage is noticed.

The header's metadata holds the plain numbers as JSON and a SHA-256 over the whole file with the digest itself blanked
out, so any flipped or missing byte is found before a tensor is used. Nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

_BLANK = "0" * 64
_FIELD = b'"sha256":"'


class StateError(ValueError):
    """A state file that cannot be trusted or does not fit."""


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able `meta` to `path`, atomically: readers see the old file or the new one, whole."""
    path = Path(path)
    body = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = bytearray(safetensors.torch.save(body, {"evenflow": json.dumps(meta), "sha256": _BLANK}))
    at = _digest_at(data)
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}; the previous file, if any, is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of a file that `write_state` made; raises StateError when it is missing, cut or changed."""
    path = Path(path)
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    at = _digest_at(data)
    if at < 0:
        raise StateError(f"{path} is not a saved state, or its header is damaged")
    found = bytes(data[at : at + 64])
    data[at : at + 64] = _BLANK.encode()
    if hashlib.sha256(data).hexdigest().encode() != found:
        raise StateError(f"{path} is damaged: its checksum does not match its content; use an earlier copy")
    try:
        tensors = safetensors.torch.load(bytes(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header["__metadata__"]["evenflow"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"{path} is not a saved state: {error}") from error


def _digest_at(data: bytearray) -> int:
    """Offset of the digest in the header, −1 when there is none."""
    length = int.from_bytes(data[:8], "little")
    at = data.find(_FIELD, 8, 8 + length)
    return -1 if at < 0 or at + len(_FIELD) + 64 > len(data) else at + len(_FIELD)
