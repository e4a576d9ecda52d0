"""Run the model afresh on the last tokens for every token: the reference for quality, at quadratic cost."""

from ..memory import Memory
from .registry import register


@register("recompute", paper="Xiao et al., arXiv 2309.17453, section 3.1 (sliding window with re-computation)")
def recompute(*, window: int = 2048, sink: int = 0) -> Memory:
    """No key outlives a token: the model reads its first `sink` and last `window` tokens anew each time.

    `window` counts the token being read, so at equal `window` it sees as many tokens as the paper's reference.
    """
    return Memory(sink=sink, window=window, recompute=True)
