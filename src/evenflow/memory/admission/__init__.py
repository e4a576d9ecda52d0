"""Admission: what decides, before any memory, which items of a stream get in, and when that is worth a word."""

from .curve import Curvature, CurveState, curvature
from .door import Door, DoorState, Doorway, Whole
from .drop import TokenDrop
from .fifo import Fifo, Held
from .gate import ClipEnd, Gate, Novelty, NoveltyPeak, OneToken, SkipUnit, newest_share
from .salience import Cached, Recomputed, Salient
from .similar import SimilarFrames, SimilarState
from .verdict import FULL, LOW, NONE, Admission, Verdict

__all__ = [
    "FULL", "LOW", "NONE", "Admission", "Cached", "ClipEnd", "Curvature", "CurveState", "Door", "DoorState", "Doorway",
    "Fifo", "Gate", "Held", "Novelty", "NoveltyPeak", "OneToken", "Recomputed", "Salient", "SimilarFrames", "SimilarState", "SkipUnit", "TokenDrop",
    "Verdict", "Whole", "curvature", "newest_share",
]  # fmt: skip
