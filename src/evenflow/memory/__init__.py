"""Bounded attention memory: five verbs, one layout, exact at any distance from the start of a stream."""

from .admit import Everything
from .base import MemoryState
from .evict import LastByModality, LastSeconds, Never, Oldest
from .files import StateError, read_state, write_state
from .fold import Dropped
from .layout import Geometry, Memory
from .place import Absolute, Contiguous, DistanceCeiling
from .recall import AllHeld
from .rope import Rope
from .spill import Spilled, TopBlocks
from .state import RingState
from .verbs import Admit, Evict, Fold, Fresh, Place, Places, Recall
from .view import EMPTY, FOLDED, View

__all__ = [
    "EMPTY",
    "FOLDED",
    "Absolute",
    "Admit",
    "AllHeld",
    "Contiguous",
    "DistanceCeiling",
    "Dropped",
    "Everything",
    "Evict",
    "Fold",
    "Fresh",
    "Geometry",
    "LastByModality",
    "LastSeconds",
    "Memory",
    "MemoryState",
    "Never",
    "Oldest",
    "Place",
    "Places",
    "Recall",
    "RingState",
    "Rope",
    "Spilled",
    "StateError",
    "TopBlocks",
    "View",
    "read_state",
    "write_state",
]
