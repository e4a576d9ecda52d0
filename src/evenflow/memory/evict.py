"""Answers to *evict*: which held tokens leave?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .verbs import Evict
from .view import FAR, View

if TYPE_CHECKING:
    from .layout import Memory

TICK = 1e-6  # seconds; ages are told no finer, so that equal steps of time hold equally many items


@dataclass(frozen=True)
class Oldest(Evict):
    """The oldest window tokens leave, the same ones in every head and layer; sinks never do.

    with_fresh: whether the window's budget counts the fresh tokens too (video papers say "9 frames, including the 3
    that are being generated"), or what is kept before them.
    """

    with_fresh: bool = False
    in_order: ClassVar[bool] = True
    cut_free: ClassVar[bool] = True

    def keep(self, view: View) -> Tensor | None:
        if view.window is None:
            return None
        # Of a causal step the first query decides what must still be there, of a chunk the last one.
        first = view.consumed - view.window
        if self.with_fresh:
            first = first + (view.coming.clamp_max(1) if view.causal else view.coming)
        return (view.index >= first[:, None, None]) | view.pinned

    def reach(self, view: View) -> int | None:
        return None if view.window is None else view.window - (1 if self.with_fresh else 0)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        if window is None:
            return None
        return sink + slots + (max(window, m) if self.with_fresh else window + m)


@dataclass(frozen=True)
class Never(Evict):
    """Nothing leaves: the memory grows with the stream, unless its fold keeps it small.

    room: slots for so many tokens beside sinks and memory are made at once; None: as they are needed.
    """

    room: int | None = None
    in_order: ClassVar[bool] = True
    cut_free: ClassVar[bool] = True

    def suits(self, memory: Memory) -> None:
        if memory.window is not None:
            raise ValueError(f"window is {memory.window}, but nothing ever leaves with `Never`; leave it None")

    def keep(self, view: View) -> Tensor | None:
        return torch.ones_like(view.index, dtype=torch.bool)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return None if self.room is None else sink + slots + self.room


@dataclass(frozen=True)
class LastSeconds(Evict):
    """What is more than `seconds` older than the newest fresh item leaves; sinks never do.

    Every token says when it is, in seconds, by its tag `time`. In a causal step each query counts from its own time, as
    if fed one by one. Of a frame all tokens leave, when its newest is too old. A `window` bounds what is held at any
    rate: then the last `window` tokens at most.
    """

    seconds: float
    needs: ClassVar[tuple[str, ...]] = ("time",)
    in_order: ClassVar[bool] = True
    cut_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (
            isinstance(self.seconds, bool)
            or not isinstance(self.seconds, (int, float))
            or not 0 <= self.seconds < math.inf
        ):
            raise ValueError(f"seconds is {self.seconds!r}; it must be a number of seconds, 0 or more")

    def keep(self, view: View) -> Tensor:
        time = view.tags["time"]
        if view.m:  # of a causal step the first query decides what must still be there, of a chunk the newest item
            now = view.fresh_tags["time"][: len(time), 0 if view.causal else -1]
        else:
            now = torch.where(view.index >= 0, time, -torch.inf).amax((1, 2))
        kept = self._recent(view, now[:, None])[:, :, 0] | view.fresh | view.pinned
        within = Oldest().keep(view)
        return kept if within is None else kept & within

    def reach(self, view: View) -> Tensor:
        recent = self._recent(view, view.fresh_tags["time"][: len(view.index)])
        return recent if view.window is None else recent & _within(view, view.window)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return Oldest().columns(sink, slots, window, m)

    def _recent(self, view: View, now: Tensor) -> Tensor:
        """What a query at each of the times `now` [R, q] still sees, bool [R, G, q, n]."""
        index, there = view.index[:, :, None], (view.index >= 0) & ~view.pinned
        young = there[:, :, None] & (view.tags["time"][:, :, None] >= now[:, None, :, None] - (self.seconds + TICK))
        first = torch.where(young, index, FAR).amin(-1, keepdim=True)
        return index >= first // view.frame * view.frame


@dataclass(frozen=True)
class LastByModality(Evict):
    """Of each modality the last tokens stay, however much of another comes between; sinks never leave.

    last: how many of which, a mapping or pairs, by the number in the tag `modality` (0 where it is not given); frames,
    where the memory counts frames. Counted are those before a query, beside sinks and memory; it sees itself too.
    others: how many of all that is not named, taken together; None: everything. A `window` bounds what is held of any
    modality: then the last `window` tokens at most. Where places close the gaps (`Contiguous`), those that open within a
    step close when it ends; where they do not (`Absolute`), any cut gives the same.
    """

    last: Mapping[int, int] | Iterable[tuple[int, int]]
    others: int | None = None
    cut_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        pairs = self.last.items() if isinstance(self.last, Mapping) else self.last
        last = tuple(sorted((int(modality), count) for modality, count in pairs))
        counts = [count for _, count in last] + ([] if self.others is None else [self.others])
        if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"last is {last}, others {self.others!r}; give whole numbers of tokens, 0 or more")
        if len(dict(last)) < len(last):
            raise ValueError(f"last is {last}; name every modality once")
        object.__setattr__(self, "last", last)

    def keep(self, view: View) -> Tensor:
        kept = self._seen(view, view.consumed[:, None])[:, :, 0] | view.fresh | view.pinned
        within = Oldest().keep(view)
        return kept if within is None else kept & within

    def reach(self, view: View) -> Tensor:
        seen = self._seen(view, view.stream)
        return seen if view.window is None else seen & _within(view, view.window)

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return Oldest().columns(sink, slots, window, m)

    def _seen(self, view: View, at: Tensor) -> Tensor:
        """What a query at each of the stream indices `at` [R, q] still sees, bool [R, G, q, n]."""
        index, there = view.index, (view.index >= 0) & ~view.pinned
        at = at[:, None].expand(*index.shape[:2], -1).contiguous()
        modality = view.tags.get("modality", torch.zeros_like(index))
        unnamed = there
        seen = torch.zeros(*at.shape, index.shape[2], dtype=torch.bool, device=index.device)
        for number, count in dict(self.last).items():
            mine = there & (modality == number)
            unnamed = unnamed & ~mine
            seen |= self._newest(index, mine, at, count * view.frame)
        if self.others is None:
            return seen | unnamed[:, :, None]
        return seen | self._newest(index, unnamed, at, self.others * view.frame)

    def _newest(self, index: Tensor, some: Tensor, at: Tensor, count: int) -> Tensor:
        """Of `some` columns [R, G, n] the last `count` before each index `at` [R, G, q], and later ones: [R, G, q, n]."""
        order = torch.cat([torch.where(some, index, FAR).sort(-1).values, torch.full_like(index[..., :1], FAR)], -1)
        first = order.gather(-1, (torch.searchsorted(order, at) - count).clamp_min(0))
        return some[:, :, None] & (index[:, :, None] >= first[..., None])


def _within(view: View, window: int) -> Tensor:
    """What is at most `window` tokens before each query, bool [R, G, m, n]."""
    return view.stream[:, None, :, None] - view.index[:, :, None] <= window
