"""Bounded attention memory: five verbs, one layout, exact at any distance from the start of a stream."""

from .admit import Everything
from .attended import LeastAttended
from .base import MemoryState
from .clustered import Clustered, UntilMass
from .composition import Composition
from .delta import Delta
from .diverse import LeastDiverse
from .evict import LastByModality, LastSeconds, Never, Oldest
from .exploring import Rerouted
from .fast_weights import FastWeights
from .files import StateError, read_state, write_state
from .fold import Averaged, Convolved, Dropped
from .heads import ByHeadGroup
from .lane_masks import packed_loss, packed_mask, packed_positions
from .lane_places import Decoupled, Gapped, Interleaved, LanePlace, Overlapped
from .lanes import Lanes, LanesState
from .layout import Geometry, Memory
from .linear import LinearState
from .linked import Linked
from .linked_clock import Clock, Latents, Rate
from .linked_masks import linked_blocks, linked_mask, linked_places
from .linked_state import LinkedState
from .merging import Merged
from .mixed import Mixed, MixedState
from .place import Absolute, Clipped, Contiguous, DistanceCeiling, Realigned, Regions, Timeless
from .recall import AllHeld, BestBlocks, Pages, SameBucket
from .rope import Rope
from .rounds import RoundsByModality, TextFirst
from .routing import Routed
from .spill import Spilled, TopBlocks
from .state import RingState
from .thinning import Thinned
from .verbs import Admit, Evict, Fold, Fresh, Place, Places, Recall
from .view import EMPTY, FOLDED, View

__all__ = [
    "EMPTY",
    "FOLDED",
    "Absolute",
    "Admit",
    "AllHeld",
    "Averaged",
    "BestBlocks",
    "ByHeadGroup",
    "Clipped",
    "Clock",
    "Clustered",
    "Composition",
    "Contiguous",
    "Convolved",
    "Decoupled",
    "Delta",
    "DistanceCeiling",
    "Dropped",
    "Everything",
    "Evict",
    "FastWeights",
    "Fold",
    "Fresh",
    "Gapped",
    "Geometry",
    "Interleaved",
    "LanePlace",
    "Lanes",
    "LanesState",
    "LastByModality",
    "LastSeconds",
    "Latents",
    "LeastAttended",
    "LeastDiverse",
    "LinearState",
    "Linked",
    "LinkedState",
    "Memory",
    "MemoryState",
    "Merged",
    "Mixed",
    "MixedState",
    "Never",
    "Oldest",
    "Overlapped",
    "Pages",
    "Place",
    "Places",
    "Rate",
    "Realigned",
    "Recall",
    "Regions",
    "Rerouted",
    "RingState",
    "Rope",
    "RoundsByModality",
    "Routed",
    "SameBucket",
    "Spilled",
    "StateError",
    "TextFirst",
    "Thinned",
    "Timeless",
    "TopBlocks",
    "UntilMass",
    "View",
    "linked_blocks",
    "linked_mask",
    "linked_places",
    "packed_loss",
    "packed_mask",
    "packed_positions",
    "read_state",
    "write_state",
]
