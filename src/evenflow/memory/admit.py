"""Answers to *admit*: which fresh items get in?"""

from __future__ import annotations

from dataclasses import dataclass

from .verbs import Admit


@dataclass(frozen=True)
class Everything(Admit):
    """Every fresh token gets in."""
