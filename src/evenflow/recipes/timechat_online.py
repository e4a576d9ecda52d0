"""TimeChat-Online: a token that repeats the one at its place before it does not get in; much that is new is worth a word."""

from typing import Literal

from ..memory.admission import Door, Novelty, TokenDrop
from .registry import register


@register(
    "timechat-online",
    paper="TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos, arXiv 2504.17343",
    claims=("admission",),
)
def timechat_online(
    *, threshold: float = 0.25, share: float | None = None, by: Literal["features", "pixels"] = "features",
    reference: Literal["previous", "last_kept"] = "previous", trigger: float | None = 0.4,
) -> Door:  # fmt: skip
    """Drops tokens by change, and speaks where more than `trigger` of a slice gets in; None: never unasked.

    threshold: the cosine over which a token is dropped (by features), or the mean difference under which it is (by
    pixels). share: drop so much of each slice instead. reference: "last_kept" lets in what changes little by little,
    which "previous", as published, never does. Tokens that get in keep the place that they had among all.
    """
    drop = TokenDrop(threshold, share, by, reference)
    return Door(lets=drop, speaks=None if trigger is None else Novelty(trigger))
