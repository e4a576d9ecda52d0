"""Answers to *recall*: what may a query see?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AllHeld:
    """A query sees every token that is held and not in its future."""

    def visible(self, query: Tensor, keys: Tensor, allowed: Tensor | None) -> None:
        return None
