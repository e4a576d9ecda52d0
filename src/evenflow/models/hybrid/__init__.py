"""Networks whose layers keep different kinds of memory: a window of keys, a matrix (InfiniteVL), fast weights
(Spatial-TTT); and sessions of them."""

from .config import PRESETS, HybridConfig, Kind
from .fast import FastLayer
from .frames import FrameSession
from .network import DeltaLayer, Hybrid, Windowed, WindowLayer, frame_places, in_a_row
from .session import HybridSession

__all__ = [
    "PRESETS", "DeltaLayer", "FastLayer", "FrameSession", "Hybrid", "HybridConfig", "HybridSession", "Kind", "WindowLayer", "Windowed",
    "frame_places", "in_a_row",
]  # fmt: skip
