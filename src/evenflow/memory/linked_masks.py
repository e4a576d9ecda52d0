"""A finished stream of two linked modalities as one pass, for training: what each token sees, and where it stands.

A forward pass with these masks and positions gives what the memories give block by block.
Source: OmniForcing, arXiv 2603.11647, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linked import Linked
from .linked_step import ASKS, GIVES, Read


def linked_blocks(linked: Linked, modality: str, video: int) -> Tensor:
    """The block of each token of a stream of `video` video latents, int64 [tokens]; sinks, which come first, are of block 0."""
    counts = [linked.tokens(block, latents) for block, latents in enumerate(linked.blocks(video))]
    sizes = torch.tensor([count.video if modality == "video" else count.audio for count in counts])
    return torch.arange(len(counts)).repeat_interleave(sizes)


def linked_mask(linked: Linked, read: Read, video: int) -> Tensor:
    """Which keys each query of a read sees, bool [queries, keys], in a stream of `video` video latents.

    Its own block both ways, block 0, and the `window` blocks before its own; block 0 sees only itself.
    """
    asks, gives = (linked_blocks(linked, side[read], video) for side in (ASKS, GIVES))
    before = asks[:, None] - gives
    return (before >= 0) & ((before <= linked.window) | (gives == 0))


def linked_places(linked: Linked, modality: str, video: int) -> Tensor:
    """Where each token stands, int64 [tokens, 3]; see `Clock`.

    Raises ValueError for a stream beyond the horizon, where block 0 stands elsewhere for every block.
    """
    blocks = linked.blocks(video)
    if linked.shift(len(blocks) - 1):
        raise ValueError(
            f"one pass holds {linked.horizon} blocks behind block 0 at most, the horizon; got {len(blocks) - 1}"
        )
    return torch.cat([linked.places(modality, block, 0, latents) for block, latents in enumerate(blocks)])
