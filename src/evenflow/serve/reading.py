"""A text that is read live: what comes in goes through a memory, and what is known of it goes out."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

from .limits import Limits
from .protocol import Refused

TURN = 128  # tokens read in one turn
SHOWN = 512  # tokens that a `read.progress` shows at most, the last ones
PIECE = 4096  # characters made tokens at once
QUIET = 0.1  # seconds between two `read.progress`


class TextStream(Protocol):
    """A stream through a language model, as `evenflow.open` gives it."""

    @property
    def nbytes(self) -> int: ...

    tokenizer: Any
    state: Any

    def consume(self, ids: list[int]) -> None: ...
    def surprisal(self, ids: list[int]) -> Any: ...


def spans(held: list[int]) -> list[list[int]]:
    """Runs of held stream indices, [first, last], in order; what was folded (−1) is left out."""
    kept = sorted(index for index in held if index >= 0)
    if not kept:
        return []
    ends = [at for at, (a, b) in enumerate(pairwise(kept)) if b > a + 1]
    firsts, lasts = [0, *(at + 1 for at in ends)], [*ends, len(kept) - 1]
    return [[kept[a], kept[b]] for a, b in zip(firsts, lasts, strict=True)]


class Reader:
    """A `Job` that reads for one client. `append` and `finish` are called in any thread."""

    def __init__(
        self,
        open_stream: Callable[[], TextStream],
        tell: Callable[[dict[str, Any]], None],
        limits: Limits,
        wake: Callable[[], None],
    ) -> None:
        self._open, self._tell, self._limits, self._wake = open_stream, tell, limits, wake
        self._stream: TextStream | None = None
        self._text: deque[str] = deque()
        self._waiting = 0  # characters in `_text`
        self._ids: deque[int] = deque()
        self._lock = threading.Lock()
        self._finishing = self._over = self._partial = False  # partial: what waits is the beginning of a word
        self.tokens, self._nats, self._counted, self._seconds = 0, 0.0, 0, 0.0
        self._lately: list[tuple[str, float]] = []
        self._since = (0, 0.0, 0, 0.0)  # tokens, nats, counted, seconds when progress was last told
        self._told = 0.0

    def append(self, text: str) -> None:
        """Read this too. Raises Refused when too much waits."""
        with self._lock:
            if self._finishing:
                raise Refused("refused", "the text has been finished", "begin a new one with read.create")
            if self._waiting + len(text) > self._limits.text:
                raise Refused("busy", f"{self._waiting:,} characters wait to be read", "send more when fewer wait")
            self._text.append(text)
            self._waiting, self._partial = self._waiting + len(text), False
        self._wake()

    def finish(self) -> None:
        """Read what there is, and tell the end."""
        with self._lock:
            self._finishing, self._partial = True, False
        self._wake()

    def wait(self, now: float) -> float | None:
        """See `Job`."""
        if self._over:
            return None
        fresh = self._stream is None or self._ids or (self._text and not self._partial) or self._finishing
        if fresh:
            return 0.0
        # What was read is told even where nothing more comes: whoever sends may be waiting for that.
        return max(0.0, self._told + QUIET - now) if self.tokens > self._since[0] else None

    def turn(self) -> None:
        """See `Job`."""
        if self._stream is None:
            self._begin()
        self._spell()
        if self._ids:
            ids = [self._ids.popleft() for _ in range(min(TURN, len(self._ids)))]
            self._read(ids)
        done = self._finishing and not self._ids and not self._text
        if done or (self.tokens > self._since[0] and time.monotonic() - self._told >= QUIET):
            self._tell({"type": "read.progress", **self._progress()})
        if done:
            self._over = True
            self._tell({"type": "read.finished", "tokens": self.tokens, "nats": self._mean(0, 0.0, 0)})

    def failed(self, error: Exception) -> None:
        """See `Job`."""
        self._over = True
        refused = error if isinstance(error, Refused) else Refused("refused", str(error), "choose another memory")
        self._tell(refused.event())

    def _begin(self) -> None:
        self._stream = self._open()
        start = getattr(self._stream.tokenizer, "bos_token_id", None)
        if start is not None:
            self._stream.consume([start])
        self._tell({"type": "read.created", **self._progress()})

    def _spell(self) -> None:
        """Text to tokens, up to the last space: words must not be cut where a message, or a turn, ends."""
        assert self._stream is not None
        with self._lock:
            if self._ids or not self._text:
                return
            text = "".join(self._text)
            end = len(text) if self._finishing and len(text) <= PIECE else text.rfind(" ", 1, PIECE)
            if end < 1:
                end = PIECE if len(text) > PIECE else 0
            self._text = deque([text[end:]] if end < len(text) else [])
            self._waiting, self._partial = len(text) - end, end == 0
        self._ids.extend(self._stream.tokenizer.encode(text[:end], add_special_tokens=False))

    def _read(self, ids: list[int]) -> None:
        assert self._stream is not None
        start = time.perf_counter()
        nats = self._stream.surprisal(ids)[0].tolist()
        self._seconds += time.perf_counter() - start
        known = [value for value in nats if not math.isnan(value)]
        self._nats, self._counted, self.tokens = (
            self._nats + sum(known),
            self._counted + len(known),
            self.tokens + len(ids),
        )
        words = self._stream.tokenizer.convert_ids_to_tokens(ids)
        self._lately += [
            (self._stream.tokenizer.convert_tokens_to_string([w]), n) for w, n in zip(words, nats, strict=True)
        ]
        del self._lately[:-SHOWN]

    def _mean(self, tokens: int, nats: float, counted: int) -> float:
        return (self._nats - nats) / (self._counted - counted) if self._counted > counted else math.nan

    def _progress(self) -> dict[str, Any]:
        """What is known now; the means are over what was read since this was last told."""
        assert self._stream is not None
        tokens, nats, counted, seconds = self._since
        rate = (self.tokens - tokens) / (self._seconds - seconds) if self._seconds > seconds else math.nan
        state = self._stream.state
        held = [] if state is None else state.held(0)
        told = {
            "tokens": self.tokens, "nats": self._mean(tokens, nats, counted), "nats_all": self._mean(0, 0.0, 0),
            "tokens_per_second": rate, "bytes": self._stream.nbytes, "held": spans(held), "count": len(held),
            "folded": sum(index < 0 for index in held), "waiting": self._waiting,
            "pieces": [[piece, value] for piece, value in self._lately],
        }  # fmt: skip
        self._since = (self.tokens, self._nats, self._counted, self._seconds)
        self._told, self._lately = time.monotonic(), []
        return told
