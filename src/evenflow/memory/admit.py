"""Answers to *admit*: which fresh items get in?"""

from __future__ import annotations

from dataclasses import dataclass

from .verbs import Fresh


@dataclass(frozen=True)
class Everything:
    """Every fresh token gets in."""

    def admitted(self, fresh: Fresh) -> None:
        return None
