"""The whole past, for ever: what every bounded memory is compared with."""

from ..memory import Memory
from .registry import register


@register("full", paper="Vaswani et al., Attention Is All You Need, arXiv 1706.03762")
def full() -> Memory:
    """Everything is kept: exact attention, memory that grows with the stream.

    Models leave the positions they were trained on once the stream is longer than that, and quality collapses.
    """
    return Memory(window=None)
