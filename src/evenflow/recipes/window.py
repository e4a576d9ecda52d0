"""The last tokens and nothing else: the baseline that fails once the first token has left."""

from ..memory import Memory
from .registry import register


@register("window", paper="Beltagy et al., Longformer, arXiv 2004.05150, as the baseline of arXiv 2309.17453")
def window(*, window: int = 2048) -> Memory:
    """The last `window` tokens, at their positions in the cache; no sink."""
    return Memory(window=window)
