"""Claims: what a paper promised, measured here and now, beside what the paper printed."""

from . import (
    admission,
    choosing,
    clustering,
    endless,
    exactness,
    exploring,
    features,
    folding,
    kinds,
    lanes,
    linking,
    live,
    quality,
    recalling,
    repeats,
    retrieving,
    routing,
    schedules,
    skipping,
    speed,
    states,
    store,
    streams_of_frames,
    timing,
    towers,
    trained,
    video,
    watching,
    windows,
)
from .registry import describe, names, report, run
from .result import Result, Row, markdown, table

__all__ = [
    "Result", "Row", "admission", "choosing", "clustering", "describe", "endless", "exactness", "exploring", "features", "folding", "kinds", "lanes", "linking", "live", "markdown", "names", "quality", "recalling", "repeats", "report",
    "retrieving", "routing",
    "run", "schedules", "skipping", "speed", "states", "store", "streams_of_frames", "table", "timing", "towers", "trained", "video", "watching", "windows",
]  # fmt: skip
