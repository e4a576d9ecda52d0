"""LongLive: the first chunk of a video for ever, a short window, and the window computed anew when the prompt changes."""

from ..memory import Absolute, Contiguous, Memory, Oldest
from .registry import register


@register(
    "longlive",
    paper="LongLive: Real-time Interactive Long Video Generation, ICLR 2026, arXiv 2509.22622",
    claims=("longlive",),
)
def longlive(
    *, window: int = 12, sink: int = 3, global_sink: bool = True, infinity: bool = False, chunk: int = 3,
    frame: int | None = None,
) -> Memory:  # fmt: skip
    """The first `sink` frames and the newest that make `window` with them, the chunk being generated among these.

    At a prompt switch, which takes effect with the next chunk, the caller runs one clean pass of the last min(window, f)
    frames under the new prompt with `state.recache`: frames seen both ways replace those of the window (section
    KV-recache). global_sink: their first frames are not kept, the sinks stay as the old prompt made them, unless the
    pass reaches back to the start of the stream (inference); False: they become the sinks, and nothing of the old
    prompt is left (training). infinity: positions are numbers of frames in the buffer, not in the stream (the released
    variant without end; keys are then kept un-rotated).

    The first official recache zeroed sinks without writing them again, which leaves e^0 of every score on them; here a
    replaced sink is replaced. Zeroing, pointers and the recompute flag of the official code are what a step that is
    kept or not does here anyway. Sinks that a recache in steps of one frame reaches (12 < f < 15) are computed anew,
    where the official code drops their new keys. The official angles end at 1024 frames, here they do not.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    return Memory(
        sink=sink,
        window=window - sink,
        evict=Oldest(with_fresh=True),
        place=Contiguous() if infinity else Absolute(),
        frame=frame,
        chunk=chunk,
        inside="both",
        keep_sink=global_sink,
    )
