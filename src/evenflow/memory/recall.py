"""Answers to *recall*: what may a query see?"""

from __future__ import annotations

from dataclasses import dataclass

from .verbs import Recall


@dataclass(frozen=True)
class AllHeld(Recall):
    """A query sees every token that is held and not in its future."""
