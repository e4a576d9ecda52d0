"""Zero sink (softmax1): a key and a value of zeros take what attention a head does not want to give."""

from ..memory import Memory
from .registry import register


@register(
    "zero-sink",
    paper="Xiao et al., arXiv 2309.17453, section 3.3 (SoftMax-off-by-one, Miller 2023)",
)
def zero_sink(*, sink: int = 0, window: int = 2048) -> Memory:
    """The last `window` tokens, with 1 added to every softmax denominator; for models trained so.

    The paper's models still gained from a first token or two kept beside the zero sink (table 3): set `sink`.
    """
    return Memory(sink=sink, window=window, null="zero")
