"""Reward Forcing: the last frames, and first frames that become the moving average of all that has left."""

from __future__ import annotations

from ..memory import Averaged, Contiguous, Memory, Oldest
from .registry import register


@register(
    "reward-forcing",
    paper="Reward Forcing: Efficient Streaming Video Generation with Rewarded Distribution Matching Distillation, "
    "arXiv 2512.04678",
    claims=("reward-forcing",),
)
def reward_forcing(
    *, window: int = 9, sink: int = 3, alpha: float = 0.999, chunk: int = 3, frame: int | None = None
) -> Memory:
    """The last `window` frames, among them the chunk being generated and `sink` frames that average what has left.

    The sink begins as the first frames. When a chunk pushes frames out of the window, at its first pass, each is
    averaged into the sink, keys and values, token by token: S ← alpha · S + (1 − alpha) · what leaves (section on
    EMA-Sink), and the chunk sees the sink that has been updated. So the sink forgets by half in ln ½ / ln alpha chunks,
    693 as released. alpha = 1 is a static sink, alpha = 0 a plain window. Keys are averaged un-rotated and stand at
    their places in the cache, 0 to `window` − 1, however long the stream.

    The released code overwrites the head of the sink when what leaves is not exactly as long as the sink; here frame t
    goes into sink frame t mod `sink`, the same thing where the lengths agree. In its training configuration nothing
    ever leaves, so that the average acts at inference alone. The paper's other half, the rewarded distillation, is
    training and no matter of memory.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    return Memory(
        sink=sink, window=window - sink, evict=Oldest(with_fresh=True), fold=Averaged(alpha), place=Contiguous(),
        frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
