"""StreamDiffusion's filter: a frame is skipped by chance, the likelier the more it is like the last one that got in."""

from ..memory.admission import Door, SimilarFrames
from .registry import register


@register(
    "streamdiffusion",
    paper="StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation, arXiv 2312.12491",
    claims=("admission",),
)
def streamdiffusion(*, threshold: float = 0.98, most: int = 10, seed: int = 0) -> Door:
    """Skips a frame with probability 1 − (1 − cos)/(1 − threshold), and after `most` skips none.

    seed: with a frame's number, the key of its chance. What the paper does to frames that get in is a schedule of
    `evenflow.generate`, "batch".
    """
    return Door(lets=SimilarFrames(threshold, most, seed))
