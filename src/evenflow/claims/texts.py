"""Real text for claims: books where there are some, else the documentation that every Python has with it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from ..api import open as open_stream
from ..models import Stream


def book_text() -> tuple[str, str]:
    """A long text, and what it is: the books in $EVENFLOW_DATA/books/valid, else Python's own help topics."""
    folder = Path(os.environ.get("EVENFLOW_DATA", "")) / "books" / "valid"
    books = sorted(folder.glob("*.txt")) if os.environ.get("EVENFLOW_DATA") else []
    if books:
        text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in books)
        return text, f"{len(books)} books the model has not seen"
    from pydoc_data.topics import topics

    return "\n".join(
        text for _, text in sorted(topics.items())
    ), "Python's help topics (prose and code, unlike its training)"


def perplexity(nats: Tensor) -> float:
    """e to the mean."""
    return math.exp(float(nats.double().mean()))


def tokens_of(stream: Stream, text: str, count: int) -> list[int]:
    """Token ids of the stream's sink token and the text, `count` in all; the text is repeated if it is too short."""
    ids: list[int] = []
    lines = text.splitlines(keepends=True)
    for first in range(0, len(lines), 4096):
        encoded = stream.tokenizer(lines[first : first + 4096], add_special_tokens=False)["input_ids"]
        ids += [token for line in encoded for token in line]
        if len(ids) >= count:
            break
    start = [stream.tokenizer.bos_token_id]
    return (start + ids * -(-count // len(ids)))[:count]


def recomputed_nats(stream: Stream, ids: list[int], places: list[int], window: int, sink: int = 0) -> Tensor:
    """Surprisal of the tokens at `places`, each from a fresh reading of the `sink` first and `window` tokens before it.

    What `recompute(window, sink)` says, at a sample of places: each place is independent of all others. float64 [n].
    """
    out = []
    for first in range(0, len(places), 16):
        some = places[first : first + 16]
        rows = [ids[:sink] + ids[place - window : place] for place in some]
        fresh = open_stream(stream.model, "full", batch=len(rows))
        fresh.consume(rows)
        out.append(-fresh.last_logits.double().log_softmax(-1)[torch.arange(len(some)), [ids[p] for p in some]])
    return torch.cat(out)
