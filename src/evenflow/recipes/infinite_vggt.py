"""InfiniteVGGT: the first frame for ever, and of all that came later the keys that are least like the others."""

from __future__ import annotations

from ..memory import LeastDiverse, Memory, Timeless
from .registry import register


@register(
    "infinite-vggt",
    paper="InfiniteVGGT: Visual Geometry Grounded Transformer for Endless Streams, arXiv 2601.02281",
    claims=("infinite-vggt",),
)
def infinite_vggt(
    *, total_budget: int = 1_200_000, tau: float = 0.5, anchor: int = 1, frame: int | None = None
) -> Memory:
    """`anchor` first frames for ever, and in every head the most unusual keys of all later ones.

    total_budget: tokens summed over the layers (section 3; the default is for 24 layers). Before a frame attends, each
    layer gets softmax((1 − score) / tau) of it, by the scores of the frame before, and where it holds more, the keys
    that are most like their mean leave, in each head others. Rope has rows and columns only (`coordinates`), so no key
    ever turns again. VGGT turns two halves of a head, each in itself; bring its channels into the order of `Rope`.

    The official code keeps scores and the length of the anchor on the module, where the next sequence finds them: here
    they belong to the stream. It lets a budget fall below the anchor; here the anchor always stays. It makes every
    frame of the first call an anchor, the paper only the first frame. The paper scores by cosine to the mean key, the
    code by k̂ · μ: the order is the same, and the layers' scores are the code's.
    """
    return Memory(sink=anchor, evict=LeastDiverse(total_budget, tau), place=Timeless(), frame=frame, inside="both")
