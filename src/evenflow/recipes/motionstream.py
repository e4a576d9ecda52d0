"""MotionStream: the first chunk and the last one, each at its place in the cache, however long the stream."""

from ..memory import Contiguous, Memory, Oldest
from .registry import register


@register(
    "motionstream",
    paper="MotionStream: Real-Time Video Generation with Interactive Motion Controls, ICLR 2026, arXiv 2511.01266",
    claims=("motionstream",),
)
def motionstream(*, sink: int = 1, window: int = 1, chunk: int = 3, frame: int | None = None) -> Memory:
    """The first `sink` chunks and the last `window` ones, of `chunk` frames each, beside the chunk being generated.

    Sinks stand at the first positions, the window directly behind them, the fresh chunk behind that (section on
    positions), so that no position exceeds (sink + window + 1) · chunk − 1: 8 as the paper recommends it, c3 s1 w1. While
    the stream is shorter, positions are those of the shorter cache. Clean chunks are what is kept; the paper's text does
    not say whether by a pass of their own, which is assumed here as in Self-Forcing (the step that is not commit=False).

    Window keys are kept un-rotated as in the paper. Sink keys are, too, and turned to the same place at every read,
    where the paper keeps them turned: the same numbers. No public code was found to compare with.
    """
    for name, value, least in (("sink", sink, 0), ("window", window, 1), ("chunk", chunk, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    return Memory(
        sink=sink * chunk,
        window=window * chunk,
        evict=Oldest(),
        place=Contiguous(),
        frame=frame,
        chunk=chunk,
        inside="both",
    )
