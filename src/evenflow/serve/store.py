"""Where sessions and recordings lie on disk."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .protocol import Refused

FORMAT = 1
_IDENTITY = re.compile(r"[A-Za-z0-9_-]{22}")


def default_folder() -> Path:
    """The user's cache folder for this program."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "evenflow" / "live"


def new_identity() -> str:
    """A name that nobody guesses: 128 random bits in 22 letters."""
    return secrets.token_urlsafe(16)


class Store:
    """Sessions in a folder: a description `ID.json`, which names the file of the stream, and recordings `ID.mp4`.

    A description is replaced at once and only after its stream is written, so a crash leaves the pair before.
    folder: is made when needed, for this user only. keep: sessions; the oldest beyond that are forgotten.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, identity: str, ending: str) -> Path:
        if not _IDENTITY.fullmatch(identity):
            raise Refused("not_found", "that is no name of a session", "use the name that the server gave")
        return self.folder / f"{identity}{ending}"

    def write(self, identity: str, meta: dict[str, Any], save: Callable[[Path], None]) -> int:
        """Keep a session: `save` writes its stream to the path it is given. Returns bytes written."""
        described = self._path(identity, ".json")
        before = self._named(identity)
        stream = self._path(identity, f".{secrets.token_hex(4)}.evenflow")
        save(stream)
        part = described.with_suffix(".part")
        part.write_text(json.dumps({**meta, "format": FORMAT, "stream": stream.name}), encoding="utf-8")
        os.replace(part, described)
        if before is not None:
            before.unlink(missing_ok=True)
        self._prune()
        return stream.stat().st_size

    def read(self, identity: str) -> tuple[dict[str, Any], Path]:
        """What was kept of a session, and the path of its stream. Raises Refused when there is nothing."""
        path = self._path(identity, ".json")
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refused("not_found", "there is no session of that name any more", "begin a new one") from None
        except ValueError:
            raise Refused("damaged", "what was saved of that session cannot be read", "begin a new one") from None
        stream = self._named(identity)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or stream is None or not stream.is_file():
            raise Refused("damaged", "what was saved of that session is not whole", "begin a new one")
        return meta, stream

    def recording(self, identity: str) -> Path:
        """Where the last recording of a session is, or will be."""
        return self._path(identity, ".mp4")

    def forget(self, identity: str) -> None:
        """Remove all that was kept of a session."""
        for path in self.folder.glob(f"{self._path(identity, '').name}.*"):
            path.unlink(missing_ok=True)

    def _named(self, identity: str) -> Path | None:
        """The stream that a description names, if that is a name in this folder."""
        try:
            name = json.loads(self._path(identity, ".json").read_text(encoding="utf-8"))["stream"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        fits = isinstance(name, str) and re.fullmatch(rf"{re.escape(identity)}\.[0-9a-f]{{8}}\.evenflow", name)
        return self.folder / name if fits else None

    def _prune(self) -> None:
        kept = []
        for path in self.folder.glob("*.json"):
            try:
                kept.append((path.stat().st_mtime, path.stem))
            except FileNotFoundError:
                continue
        for _, identity in sorted(kept)[: -self.keep]:
            self.forget(identity)
