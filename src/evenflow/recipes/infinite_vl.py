"""InfiniteVL: one layer in four attends a window, the others keep a matrix of everything."""

from ..memory import Absolute, Delta, Memory, Mixed
from .registry import register


@register(
    "infinite-vl",
    paper="InfiniteVL: Synergizing Linear and Sparse Attention for Highly-Efficient, Unlimited-Input Vision-Language Models, arXiv 2512.08829",
    claims=("infinite-vl",),
)
def infinite_vl(*, window: int = 8192, ratio: int = 3, kernel: int = 4) -> Mixed:
    """A layer that attends the newest `window` tokens, itself among them, then `ratio` layers of the gated delta rule.

    kernel: tokens that the convolution before a matrix sees. Tokens of the window stand at their own place on the axes
    of time, row and column; a matrix knows no place. The language model that goes with it is
    `evenflow.models.hybrid.Hybrid`, which has its own session.
    """
    if window < 2 or ratio < 0:
        raise ValueError(f"window is {window} and ratio {ratio}; expected 2 or more, and 0 or more")
    near = Memory(window=window - 1, place=Absolute(), name="window", params={"window": window - 1})
    return Mixed(pattern=((near,), *((Delta(kernel=kernel),),) * ratio))
