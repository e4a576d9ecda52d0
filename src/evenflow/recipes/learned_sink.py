"""Learned sink: one trained logit per head stands in every softmax denominator, as in gpt-oss."""

from ..memory import Memory
from .registry import register


@register(
    "learned-sink",
    paper="OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925 (after arXiv 2309.17453, section 3.3)",
)
def learned_sink(*, sink: int = 0, window: int = 2048) -> Memory:
    """The last `window` tokens, with e^b added to the softmax denominator, b a logit per head that the model brings."""
    return Memory(sink=sink, window=window, null="learned")
