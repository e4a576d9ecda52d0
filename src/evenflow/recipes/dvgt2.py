"""DVGT-2: a driving transformer that attends, view by view, to the same view in the last W frames."""

from ..memory import Absolute, Memory, Oldest
from .registry import register


@register(
    "dvgt2",
    paper="DVGT-2: Vision-Geometry-Action Model for Autonomous Driving at Scale, arXiv 2604.00813",
    claims=("dvgt2",),
)
def dvgt2(*, window: int = 4, frame: int | None = None) -> Memory:
    """The last `window` frames, the fresh one among them, at absolute times; no sink.

    This is the cache of the cross-frame attention, the only one of the model's three that looks back: batch rows are
    views, `coordinates` are (row + 1, column + 1), (0, 0) for the special tokens. Older frames leave before the new one
    attends, in every layer, so a stream equals one forward under a banded mask, and is not the same as reading the
    last `window` frames afresh: what a kept frame saw lives on in it.

    The official code never trims with window 1 (a slice from −0 keeps all), and its fp32 angles lose a stream's
    position, 2e−2 of the output after 10^7 frames; here every window trims and angles are exact anywhere. window = 4 is
    what the paper evaluates.
    """
    return Memory(window=window, evict=Oldest(with_fresh=True), place=Absolute(), frame=frame, inside="both")
