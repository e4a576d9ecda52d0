"""Which of the frames of a live source that wait are worth processing: the newest. Which of those differ from the last
one that was processed is a matter of admission: `evenflow.memory.admission.SimilarFrames`.

Source: StreamDiffusion, arXiv 2312.12491, section on queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def newest(waiting: Sequence[T], count: int = 1) -> list[T]:
    """`count` frames of those that wait, evenly spread and ending with the newest, in order of time; the caller then
    empties its queue. Fewer where fewer wait."""
    if not waiting:
        return []
    count = min(count, len(waiting))
    stride = len(waiting) // count
    return [waiting[len(waiting) - 1 - stride * i] for i in reversed(range(count))]
