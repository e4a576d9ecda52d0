"""Attention over whole clips at once: what training and oracles use where a stream has its memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...memory import Rope
from ...memory.rope import Rotary
from .transformer import places


def chunk_causal(frames: int, chunk: int, sink: int = 0, window: int | None = None) -> Tensor:
    """Which frame may see which, bool [frames, frames]: both ways inside a chunk, and every chunk before it.

    window: only the newest so many frames, the chunk's own among them; sink: and the first so many.
    """
    at = torch.arange(frames)
    last = (at // chunk + 1) * chunk  # end of the chunk that a query is in
    seen = at[None, :] < last[:, None]
    if window is not None:
        seen &= (at[None, :] >= last[:, None] - window) | (at[None, :] < sink)
    return seen


class Dense:
    """Attention of all tokens of a clip, whose frames stand at `times`, through a mask over frames.

    times: int64 [F]; height, width: tokens of a frame; sees: bool [F, F] or [B, F, F], None for everything.
    """

    def __init__(
        self, rope: Rope, head_dim: int, times: Tensor, height: int, width: int, sees: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.rotary = Rotary(rope, head_dim, dtype, times.device)
        size, frames = height * width, len(times)
        where = torch.cat([times.repeat_interleave(size)[:, None], places(frames, height, width, times.device)], 1)
        self.angles = self.rotary.at(where)
        wide = sees if sees is None else sees.repeat_interleave(size, -1).repeat_interleave(size, -2)
        self.mask = wide if wide is None or wide.ndim == 2 else wide[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotary.rotate(x, *self.angles) for x in (q, k))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
