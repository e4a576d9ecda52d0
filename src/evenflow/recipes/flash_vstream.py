"""Flash-VStream: an encoder's frames summed up in as many tokens for an hour as for a minute."""

from typing import Literal

from ..memory.features import Flash, Star
from .registry import register


@register(
    "flash-vstream",
    paper="Flash-VStream: Efficient Real-Time Understanding for Long Video Streams, arXiv 2406.08085 and arXiv 2506.23825",
    claims=("flash-vstream",),
)
def flash_vstream(
    *, version: Literal[1, 2] = 2, bank: int = 300, means: int | None = None, details: int | None = None,
    seed: int | None = None,
) -> Flash | Star:  # fmt: skip
    """Means of all frames with their weights, and details of the heaviest, which become tokens when somebody asks.

    version: 2 is Flash Memory, 60 means in low resolution and 30 details (11,520 tokens, on three axes); 1 is STAR, 25
    means, an abstract, 3 details and the newest frame (681 tokens). means, details: other numbers of them. bank: frames
    that may become details; of older ones only the means know. seed: None begins k-means without the mean that is
    cheapest to join with another; a number at random, as the papers do.
    """
    if version not in (1, 2):
        raise ValueError(f"version is {version!r}; expected 1 (STAR) or 2 (Flash Memory)")
    if version == 2:
        return Flash(synopsis=means or 60, details=details or 30, bank=bank, seed=seed)
    return Star(temporal=means or 25, retrieved=details or 3, bank=bank, seed=seed)
