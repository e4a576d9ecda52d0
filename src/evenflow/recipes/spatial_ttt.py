"""Spatial-TTT: fast weights that learn the stream beside a window, and every fourth layer attends everything."""

from ..memory import Absolute, FastWeights, Memory, Mixed
from .registry import register


@register(
    "spatial-ttt",
    paper="Spatial-TTT: Streaming Visual-based Spatial Intelligence with Test-Time Training, arXiv 2603.12255",
    claims=("spatial-ttt",),
)
def spatial_ttt(
    *, window: int = 2648, chunk: int = 2648, ratio: int = 3, anchor: int | None = None, muon: bool = False,
    prenorm: bool = False,
) -> Mixed:  # fmt: skip
    """`ratio` layers with the newest `window` tokens and fast weights, then one that attends everything, or `anchor` tokens.

    chunk: tokens that fast weights learn in one step. muon, prenorm: both on in the paper's training, both off in the
    released loader. The layers that attend everything grow with the stream, as published; with `anchor` all is bounded.
    """
    if window < 2:
        raise ValueError(f"window is {window}; a token sees itself and one more at least")
    near = Memory(window=window - 1, place=Absolute(), name="window", params={"window": window - 1})
    far = Memory(window=anchor, place=Absolute(), name="full" if anchor is None else "window")
    return Mixed(pattern=(*((near, FastWeights(chunk, muon, prenorm)),) * ratio, (far,)))
