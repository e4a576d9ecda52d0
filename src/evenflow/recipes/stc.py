"""STC: of each frame the tokens get in that stand out, in it and against what came before."""

from ..memory.admission import Door, Salient
from .registry import register


@register(
    "stc",
    paper="Accelerating Streaming Video Large Language Models via Hierarchical Token Compression, arXiv 2512.00891",
    claims=("admission",),
)
def stc(*, dropped: float = 0.75, alpha: float = 0.5, window: int = 32) -> Door:
    """Drops `dropped` of every frame's tokens, those nearest to the mean of the last `window` frames and of their own.

    alpha: weight of the past. What an encoder need not compute anew, the other half of the method, is
    `evenflow.memory.admission.Recomputed`.
    """
    return Door(lets=Salient(dropped, alpha, window))
