"""Answers to *fold*: what becomes of what leaves?"""

from __future__ import annotations

from dataclasses import dataclass

from .verbs import Fold


@dataclass(frozen=True)
class Dropped(Fold):
    """What leaves is gone: nothing beyond sinks and window is remembered."""
