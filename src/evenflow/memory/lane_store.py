"""Keys, values and positions that are only ever appended to, in blocks that never move.

Each block is as large as all before it, so there are few of them, and nothing that was handed out is ever copied,
moved or freed: another thread, or another stream of the device, may read the first n tokens while more come in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Geometry
from .ring import empty_slots

FIRST = 256  # tokens


class Block(NamedTuple):
    """Tokens start..stop−1: keys [B, H_kv, size, D] and values [B, H_kv, size, D_v] a layer, places int64 [size, axes + 1].

    places, which stay on the CPU: a token's position on every axis, and where the count of its coordinates began
    (−1: it has none).
    """

    start: int
    stop: int
    keys: list[Tensor]
    values: list[Tensor]
    places: Tensor


class Blocks:
    """The store of one lane."""

    def __init__(self, geometry: Geometry, axes: int) -> None:
        self.geometry, self.axes = geometry, axes
        self.blocks: list[Block] = []

    @property
    def room(self) -> int:
        """Tokens that the blocks hold."""
        return self.blocks[-1].stop if self.blocks else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or reserved."""
        return sum(t.nbytes for block in self.blocks for t in (*block.keys, *block.values, block.places))

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all.

        Blocks end at the same tokens however the lane grew, as sums depend on where they are split: a copy goes on bit for bit.
        """
        g, like = self.geometry, torch.empty(0, dtype=self.geometry.dtype, device=self.geometry.device)
        while tokens > self.room:
            start, size = self.room, max(FIRST, self.room)
            keys, values = (
                [empty_slots(g.batch, g.kv_heads, size, dim, like) for _ in range(g.layers)]
                for dim in (g.head_dim, g.value_dim)
            )
            places = torch.zeros(size, self.axes + 1, dtype=torch.int64)
            self.blocks.append(Block(start, start + size, keys, values, places))

    def put(self, layer: int, at: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens at..at+m−1 of a layer; there must be room."""
        m = keys.shape[2]
        for block, here, given in self._over(at, at + m):
            block.keys[layer][:, :, here] = keys[:, :, given]
            block.values[layer][:, :, here] = values[:, :, given]

    def place(self, at: int, places: Tensor) -> None:
        """Write where tokens at..at+m−1 stand, int64 [m, axes + 1]."""
        for block, here, given in self._over(at, at + len(places)):
            block.places[here] = places[given]

    def view(self, layer: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the first so many tokens of a layer, block by block, without a copy."""
        return [(b.keys[layer][:, :, here], b.values[layer][:, :, here]) for b, here, _ in self._over(0, tokens)]

    def placed(self, first: int, stop: int) -> Tensor:
        """Where tokens first..stop−1 stand, int64 [stop − first, axes + 1]; a copy."""
        found = [block.places[here] for block, here, _ in self._over(first, stop)]
        return torch.cat(found) if found else torch.zeros(0, self.axes + 1, dtype=torch.int64)

    def _over(self, first: int, stop: int) -> list[tuple[Block, slice, slice]]:
        """The blocks that hold tokens first..stop−1, which of theirs these are, and which of these they are."""
        found = []
        for block in self.blocks:
            low, high = max(first, block.start), min(stop, block.stop)
            if low < high:
                found.append((block, slice(low - block.start, high - block.start), slice(low - first, high - first)))
        return found
