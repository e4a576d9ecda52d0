"""Think While Watching: a note a segment of video, an answer a question, on a lane beside what was received."""

from ..memory import Decoupled, Lanes
from .registry import register


@register(
    "think-while-watching",
    paper="Think While Watching: Online Streaming Segment-Level Memory for Multi-Turn Video Reasoning in MLLMs, arXiv 2603.11896",
    claims=("lanes",),
)
def think_while_watching() -> Lanes:
    """Notes and answers see all that was received up to their unit, and all notes before; both lanes count from 0.

    A unit is a segment or a question; each picture's coordinates count from the first free position, as time stamps in
    words stand between them. Writing while the next unit is read gives what writing after it gives.
    """
    return Lanes(Decoupled(), "unit")
