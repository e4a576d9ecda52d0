"""Think-as-You-See: a thought a unit of video, on a lane of its own that counts for itself."""

from ..memory import Decoupled, Lanes
from .registry import register


@register(
    "tays",
    paper="Think-as-You-See: Streaming Chain-of-Thought Reasoning for Large Vision-Language Models, arXiv 2603.02872",
    claims=("lanes",),
)
def tays() -> Lanes:
    """Frames go on at the camera's rate, thoughts at the decoder's; both lanes count from 0.

    The delimiter that ends a thought is held back (`close("target", unit, held=1)`) and fed once the next unit is there.
    The video is one run of coordinates, two a second. A unit of which nothing is to be said costs one token: see
    `evenflow.memory.admission.SkipUnit`.
    """
    return Lanes(Decoupled(), "video")
