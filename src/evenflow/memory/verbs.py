"""The five questions every memory answers, as five small protocols.

A memory method is five answers: which fresh items get in (`Admit`), which held tokens leave (`Evict`), what becomes of
what leaves (`Fold`), what a query may see (`Recall`), and which positions held tokens get (`Place`). An answer is a
frozen dataclass; its parameters are its fields. Whatever must be remembered between steps lives in tensors that the
memory owns, so that saving, forking and resetting need no help from the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fresh:
    """What a step brings: `count` columns, their tags, and which of them are real (None: all of them)."""

    count: int
    batch: int
    tags: Mapping[str, Tensor]
    real: Tensor | None  # bool [B, m]


@runtime_checkable
class Window(Protocol):
    """A container for the window part of one layer, made by an `Evict` answer.

    keys, values: [B, H_kv, head + slots, D]; the first `head` slots belong to sinks and folded memory and are the
    memory's own, the rest hold the window in whatever order the container likes.
    """

    keys: Tensor
    values: Tensor
    slots: int

    def reserve(self, tokens: int) -> None:
        """Make room for a window of `tokens` tokens (only a container without a bound has anything to do)."""

    def index(self, consumed: Tensor) -> Tensor:
        """Stream index held in each window slot, [R, slots], −1 where none, when `consumed` [R] tokens were read."""

    def slot(self, index: Tensor) -> Tensor:
        """Slot among `keys` and `values` in which the token with stream index `index` belongs."""


class Admit(Protocol):
    """Which fresh items get in?"""

    def admitted(self, fresh: Fresh) -> Tensor | None:
        """Bool [B, m], False for a token that is neither kept nor counted; None admits every token."""


class Evict(Protocol):
    """Which held tokens leave?"""

    def window(
        self, *, sink: int, head: int, size: int | None, batch: int, heads: int, key_dim: int, value_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> Window:  # fmt: skip
        """A container that keeps `size` tokens before the fresh one (None: all of them)."""


class Fold(Protocol):
    """What becomes of what leaves?"""

    @property
    def slots(self) -> int:
        """Number of memory slots between sinks and window; 0 means that what leaves is dropped."""

    def fold(self, keys: Tensor, values: Tensor, count: Tensor, left: Tensor, left_values: Tensor) -> None:
        """Fold one row's leaving tokens into its memory, in place, oldest first.

        keys, values: the memory of one row and layer, [H_kv, slots, D], keys un-rotated. count: int64 [1], how many
        tokens were folded before. left, left_values: the leaving tokens [H_kv, n, D], keys un-rotated.
        """


class Recall(Protocol):
    """What may a query see?"""

    def visible(self, query: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Bool mask over held and fresh tokens, or None to see everything that is allowed.

        query: rotated, [B, H_q, m, D]; keys: rotated, [B, H_kv, n, D]; allowed: bool, broadcastable to [B, H_q, m, n]
        (None: all). The answer has that shape, and may only take away.
        """


class Place(Protocol):
    """Which positions do held tokens get?"""

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        """How far sinks and memory are moved up for a query at stream index `position` (int64, any shape).

        The window stays at its stream positions, which no score can tell from any other contiguous numbering; only
        what lies before the gap has to move. `capacity` counts sink + memory + window; None has no bound.
        """
