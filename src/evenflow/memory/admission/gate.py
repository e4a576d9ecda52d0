"""Emit gates: whether to speak after an item, or to stay silent. They follow an admission, and go with any memory.

Each is asked with what is known of the n items of a call, and says bool [n] as if they came one by one. A state of None
is the start of a stream; gates that need none return None.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from .verdict import wide

State = TypeVar("State")
Asks = Literal["logits", "tokens", "novelty", "number"]


class Gate(Protocol[State]):
    """What decides when to speak: a frozen dataclass. asks: what `step` is given, see `Door.emit`."""

    asks: ClassVar[Asks]

    def step(self, given: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Bool [n], after which of the items to speak, and the state after them."""


@dataclass(frozen=True)
class OneToken:
    """Silent where the model's next token is the one that means silence, and is so with `threshold` probability at least.

    Given logits [n, V] at the last token of each item. silent: that token. A higher threshold speaks more often: 0 is the
    most likely token, over 1 speaks always. Every other token means speech, whichever the model prefers; a head that
    only decides may give two logits.

    Source: VideoLLM-online, arXiv 2406.11816; 0.725 is its demo's, 0.5 to 0.8 what the paper suggests.
    """

    silent: int
    threshold: float = 0.725
    asks: ClassVar[Asks] = "logits"

    def step(self, given: Tensor, state: None = None) -> tuple[Tensor, None]:
        if given.ndim != 2 or not given.is_floating_point() or not 0 <= self.silent < given.shape[1]:
            raise ValueError(f"logits are {given.dtype} {tuple(given.shape)}; expected float [n, V], V > {self.silent}")
        share = given.to(wide(given)).softmax(-1)
        return (share[:, self.silent] < self.threshold) | (share.argmax(-1) != self.silent), None


@dataclass(frozen=True)
class SkipUnit:
    """Silent where the unit that was generated for an item begins with the token that means "nothing to say".

    Given the first token of each unit, int64 [n]. Silence costs one token.

    Source: Think-as-You-See, arXiv 2603.02872.
    """

    skip: int
    asks: ClassVar[Asks] = "tokens"

    def step(self, given: Tensor, state: None = None) -> tuple[Tensor, None]:
        if given.ndim != 1 or given.dtype != torch.int64:
            raise ValueError(
                f"tokens are {given.dtype} {tuple(given.shape)}; expected int64 [n], the first of each unit"
            )
        return given != self.skip, None


@dataclass(frozen=True)
class Novelty:
    """Speaks after items whose novelty is over `threshold`: at 0.4, where less than 60 % of a slice's tokens are dropped.

    Given the novelty of a verdict, float [n]. The first item of a stream is all new, so it speaks there too.

    Source: TimeChat-Online, arXiv 2504.17343, proactive response.
    """

    threshold: float = 0.4
    asks: ClassVar[Asks] = "novelty"

    def step(self, given: Tensor, state: None = None) -> tuple[Tensor, None]:
        return _novelty(given) > self.threshold, None


@dataclass(frozen=True)
class NoveltyPeak:
    """Speaks one item after a valley of the drop ratio: after one that is newer than those beside it.

    Given the novelty of a verdict, float [n]. Of equal ones in a row the last counts, and nothing up to `least`. With one
    item of delay it speaks once where a threshold alone would speak all through a fade. The state is the last novelty and
    whether it was a rise, [2].

    Source: TimeChat-Online, which takes the lowest tenth of all drop ratios of a recorded video (`newest_share`); of a
    stream that cannot be known.
    """

    least: float = 0.0
    asks: ClassVar[Asks] = "novelty"

    def step(self, given: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        path = _novelty(given).double()
        if not len(path):
            return path.bool(), state
        before = path.new_tensor([-torch.inf, 1]) if state is None else state.to(path)
        path = torch.cat([before[:1], path])
        up, down = path.diff() > 0, path.diff() < 0
        # On a plateau it depends on how it was reached: look back for the last change, which a running maximum finds.
        changed = torch.arange(len(up), device=up.device).where(up | down, -1).cummax(0).values
        rising = torch.where(changed < 0, before[1] > 0, up[changed.clamp_min(0)])
        was = torch.cat([before[1:] > 0, rising[:-1]])
        return down & was & (path[:-1] > self.least), torch.stack([path[-1], rising[-1].to(path)])


@dataclass(frozen=True)
class ClipEnd:
    """Speaks after the last item of every clip of `length` items.

    Given the index of each item in its stream, int64 [n], counted from 0.
    """

    length: int
    asks: ClassVar[Asks] = "number"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"clips have {self.length} items; expected 1 or more")

    def step(self, given: Tensor, state: None = None) -> tuple[Tensor, None]:
        if given.ndim != 1 or given.dtype != torch.int64:
            raise ValueError(f"indices are {given.dtype} {tuple(given.shape)}; expected int64 [n], one an item")
        return (given + 1) % self.length == 0, None


def newest_share(novelty: Tensor, share: float = 0.1) -> Tensor:
    """Bool [n]: the ⌈share · n⌉ newest items of a recording that is known whole, of equal ones the earlier.

    Source: TimeChat-Online, rule of its demo.
    """
    rank = _novelty(novelty).argsort(descending=True, stable=True).argsort()
    return rank < ceil(round(share * len(rank), 9))  # a tenth of 70 is 7, whatever 0.1 · 70 is


def _novelty(given: Tensor) -> Tensor:
    if given.ndim != 1 or not given.is_floating_point():
        raise ValueError(f"novelty is {given.dtype} {tuple(given.shape)}; expected float [n], one an item")
    if bool(given.isnan().any()):
        raise ValueError("novelty holds NaN; expected 0 to 1 for every item")
    return given
