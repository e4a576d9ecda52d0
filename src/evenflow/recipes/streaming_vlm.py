"""StreamingVLM: first and recent words outlive the pictures, and what is left is numbered without gaps."""

from __future__ import annotations

from ..memory import Memory, RoundsByModality, TextFirst
from .registry import register


@register(
    "streaming-vlm",
    paper="StreamingVLM: Real-Time Understanding for Infinite Video Streams, ICLR 2026, arXiv 2510.09608",
    claims=("streaming-vlm",),
)
def streaming_vlm(
    *, window: int = 16, text_round: int = 16, text_sink: int = 512, text_window: int = 512, slice_step: float = 1.0
) -> Memory:
    """Pictures of the last `window` rounds, and words: the first `text_sink` and the last `text_window` of old rounds.

    Tokens say what they are: `modality` 0 for words to remember (the text before the stream, the model's answers), 1
    for vision, anything else for text that belongs to its round (time stamps, questions, turn markers); `segment` is
    the round or second, from 1, and 0 outside of rounds; `coordinates` (row, column) place vision tokens, and a slice
    ends where they start again. slice_step: distance of slices in time (Qwen2.5-VL: tokens_per_second · 2 / fps).

    Before a round is read, pictures older than `window` rounds leave, answers older than `text_round` rounds move behind
    the older text, and what is too much there leaves from its middle (section 3.1). Keys are kept un-rotated, so moving
    changes a position and nothing else; positions are recomputed for what is left, and never exceed its length. The
    rule is per step: within one, tokens attend causally to all that was left before it. Text without tags is sinks and
    recent words at their positions in the cache.

    The official code finds turns by their marker tokens, whose numbers (4 of a header, one of an end) stand outside of
    its two budgets; and counts a newline, so that 511 recent words survive. Here a budget is the number of words. A
    standing instruction belongs in segment 0: in a round it leaves with it.
    """
    return Memory(
        evict=RoundsByModality(window, text_round, text_sink, text_window),
        place=TextFirst(text_round, slice_step),
    )
