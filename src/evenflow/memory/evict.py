"""Answers to *evict*: which held tokens leave?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .ring import Ring


@dataclass(frozen=True)
class Oldest:
    """The oldest window token leaves, the same one in every head and layer; sinks never do."""

    def window(
        self, *, sink: int, head: int, size: int | None, batch: int, heads: int, key_dim: int, value_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> Ring:  # fmt: skip
        return Ring(sink, head, size, batch, heads, key_dim, value_dim, dtype, device)
