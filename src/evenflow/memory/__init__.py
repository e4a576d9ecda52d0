"""Bounded attention memory: five verbs, one layout, exact at any distance from the start of a stream."""

from .admit import Everything
from .evict import Oldest
from .files import StateError, read_state, write_state
from .fold import Dropped
from .layout import Geometry, Memory
from .place import Absolute, Contiguous
from .recall import AllHeld
from .rope import Rope
from .state import MemoryState

__all__ = [
    "Absolute",
    "AllHeld",
    "Contiguous",
    "Dropped",
    "Everything",
    "Geometry",
    "Memory",
    "MemoryState",
    "Oldest",
    "Rope",
    "StateError",
    "read_state",
    "write_state",
]
