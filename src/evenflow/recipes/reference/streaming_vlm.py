"""StreamingVLM (arXiv 2510.09608): first and last words, a few rounds of vision, and positions without gaps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, cat, stack, tensor

from ...memory import Rope
from .plain import Call, attention, rotated

TEXT, VISION, TURN = 0, 1, 2


@dataclass(frozen=True)
class Token:
    """A token of the stream. segment: its round, from 1; 0: words outside of all rounds. place: (row, column)."""

    index: int
    modality: int = TEXT
    segment: int = 0
    place: tuple[int, ...] = (0, 0)


def tokens_of(call: Call, first: int) -> list[Token]:
    """The tokens of a call, numbered from `first`; without tags they are words."""
    m = call.k.shape[1]
    kinds = call.tags["modality"].tolist() if "modality" in call.tags else [TEXT] * m
    rounds = call.tags["segment"].tolist() if "segment" in call.tags else [0] * m
    places = call.tags["coordinates"].tolist() if "coordinates" in call.tags else [(0, 0)] * m
    return [Token(first + n, kinds[n], rounds[n], tuple(places[n])) for n in range(m)]


def edited(
    held: list[Token], fresh: list[Token], *, window: int, text_round: int, text_sink: int, text_window: int
) -> list[Token]:
    """What is left of `held`, in order, before `fresh` are read: [text memory | what stands in its round]."""
    begun = [t.segment for t in fresh if t.segment > 0]
    now = max([min(begun, default=0), *(t.segment for t in held)])
    memory, standing = [], []
    for token in sorted(held, key=lambda t: t.index):
        if token.modality == TEXT and (token.segment <= 0 or token.segment <= now - text_round):
            memory.append(token)
        elif token.segment > now - (window if token.modality == VISION else text_round):
            standing.append(token)
    if len(memory) > text_sink + text_window:
        memory = memory[:text_sink] + memory[len(memory) - text_window :]
    return memory + standing


def positions(tokens: list[Token], slice_step: float = 1.0) -> list[tuple[int, int, int]]:
    """(t, row, column) of each: a word is 1 further on all three; an image starts there and ends at its largest number.

    A slice of an image ends where rows and columns start again.
    """
    out: list[tuple[int, int, int]] = []
    base = following = slices = 0
    last: Token | None = None
    for token in tokens:
        if token.modality != VISION:
            base = following
            here = (base, base, base)
        else:
            goes_on = last is not None and last.modality == VISION and last.segment == token.segment
            if last is None or not goes_on or token.index != last.index + 1:
                base, slices = following, 0
            elif token.place <= last.place:
                slices += 1
            here = (base + int(slices * slice_step), base + token.place[0], base + token.place[-1])
        out.append(here)
        following, last = max(following, *(p + 1 for p in here)), token
    return out


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int = 1, window: int = 16, text_round: int = 16,
    text_sink: int = 512, text_window: int = 512, slice_step: float = 1.0,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call: the cache is edited, then the fresh tokens attend causally to what is left."""
    outputs = []
    budget = {"window": window, "text_round": text_round, "text_sink": text_sink, "text_window": text_window}
    for calls in layers:
        stream: list[tuple[Tensor, Tensor]] = []  # raw key and value of every token ever read
        held: list[Token] = []
        out = []
        for call in calls:
            m = call.k.shape[1]
            fresh = tokens_of(call, len(stream))
            seen = edited(held, fresh, **budget) + fresh
            everything = [*stream, *((call.k[:, n], call.v[:, n]) for n in range(m))]
            places = tensor(positions(seen, slice_step))
            k, v = (stack([everything[t.index][part] for t in seen], 1) for part in (0, 1))
            k, q = rotated(k, places, rope), rotated(call.q, places[-m:], rope)
            ends = range(len(seen) - m + 1, len(seen) + 1)
            out.append(cat([attention(q[:, n : n + 1], k[:, :end], v[:, :end]) for n, end in enumerate(ends)], 1))
            if call.commit:
                stream, held = everything, seen
        outputs.append(out)
    return outputs
