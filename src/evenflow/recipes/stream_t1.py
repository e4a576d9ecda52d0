"""Stream-T1: LongLive's memory, in which a chunk that leaves is dropped, averaged into a sink or kept as one by its rewards."""

from __future__ import annotations

from ..memory import Absolute, Memory, Oldest, Routed
from .registry import register


@register(
    "stream-t1",
    paper="Stream-T1: Test-Time Scaling for Streaming Video Generation, arXiv 2605.04461",
    claims=("stream-t1", "stream-t1-search"),
)
def stream_t1(
    *, window: int = 12, sink: int = 3, max_sink: int = 15, alpha: float = 0.999, chunk: int = 3, frame: int | None = None
) -> Memory:  # fmt: skip
    """The first `sink` frames, up to `max_sink` − `sink` that became sinks, and the newest: window − sink with the fresh.

    What becomes of a chunk is decided when it is made and done when it leaves: the step that commits it carries the tag
    `route` (`evenflow.memory.routing`), from its rewards by `route`, without which it is dropped. So the window never
    gets shorter: appended sinks come on top of it, and at most window + max_sink − sink frames are attended. Positions
    are those of the stream; a sink that others were averaged into stays where it was.

    The paper sets flags after the clean pass; here they come with it, since rewards are of the finished frames, which are
    known before. The search over candidates, whose noise follows their parents', is `generate.SearchedStream`.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    return Memory(
        sink=sink, window=window - sink, evict=Oldest(with_fresh=True), fold=Routed(max_sink - sink, alpha),
        place=Absolute(), frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
