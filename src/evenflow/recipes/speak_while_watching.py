"""Speak While Watching: two lanes, of which the one that speaks never holds up the one that watches."""

from typing import Literal

from ..memory import Decoupled, Gapped, Interleaved, LanePlace, Lanes, Overlapped
from .registry import register


@register(
    "speak-while-watching",
    paper="Speak While Watching: Unleashing TRUE Real-Time Video Understanding Capability of MLLMs, arXiv 2601.06843",
    claims=("lanes",),
)
def speak_while_watching(
    *, scheme: Literal["interleaved", "overlapped", "decoupled", "gap"] = "gap", gap: int = 10_000
) -> Lanes:
    """What is said of a unit sees what was seen up to it; what is seen depends on nothing that is said.

    scheme: where units begin. "interleaved": one behind the other, the serial baseline; "overlapped" (OSPE): what is
    said of a unit together with the next unit; "decoupled" (GDPE): each lane counts from 0; "gap" (GIPE): what is said
    counts from `gap` + 1. With the last two a video is one run of coordinates through all its units, as in the released
    model; the caller counts time through.
    """
    places: dict[str, LanePlace] = {
        "interleaved": Interleaved(), "overlapped": Overlapped(), "decoupled": Decoupled(), "gap": Gapped(gap),
    }  # fmt: skip
    if scheme not in places:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(places)}")
    return Lanes(places[scheme], "video" if scheme in ("decoupled", "gap") else "unit")
