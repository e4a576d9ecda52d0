"""StreamingLLM: a few first tokens and the last ones, numbered inside the cache."""

from ..memory import Contiguous, Dropped, Memory, Oldest
from .registry import register


@register(
    "streaming-llm",
    paper="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453",
    claims=("streaming-llm",),
)
def streaming_llm(*, sink: int = 4, window: int = 2044) -> Memory:
    """The first `sink` tokens (attention sinks) and the last `window` ones, at their positions in the cache.

    A fresh token attends sink + window held tokens and itself (the paper trims after the step, section 3.2). What has
    left is forgotten: this lets a model run for ever, it does not lengthen what it can remember.
    """
    return Memory(sink=sink, window=window, evict=Oldest(), fold=Dropped(), place=Contiguous())
