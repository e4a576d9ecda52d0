"""Keys and values of one read, by blocks of equal size: block 0 for ever, and a ring of the newest.

Each block has a place of its own that is written once a pass, and nothing is ever moved: softmax needs no order once keys
carry their rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Geometry


class BlockRing:
    """Keys [B, H_kv, head + slots · size, D] and values [B, H_kv, head + slots · size, D_v] of every layer.

    head: tokens of block 0. size: tokens of every later block; the last of a stream may have fewer. slots: later blocks
    that there is room for. again: block 0's keys are also kept as they came, un-rotated, to be turned anew.
    """

    def __init__(self, geometry: Geometry, head: int, size: int, slots: int, again: bool) -> None:
        g, self.head, self.size, self.slots = geometry, head, size, slots

        def room(tokens: int, dim: int) -> list[Tensor]:
            shape = (g.batch, g.kv_heads, tokens, dim)
            return [torch.zeros(shape, dtype=g.dtype, device=g.device) for _ in range(g.layers)]

        with torch.inference_mode(False):
            self.keys, self.values = (room(head + slots * size, dim) for dim in (g.head_dim, g.value_dim))
            self.raw = room(head, g.head_dim) if again else []

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; they never change."""
        return sum(t.nbytes for t in (*self.keys, *self.values, *self.raw))

    def start(self, block: int) -> int:
        """Where a block begins."""
        return self.head + (block - 1) % self.slots * self.size if block else 0

    def put(self, layer: int, block: int, keys: Tensor, values: Tensor) -> None:
        """Write a block's tokens, over what its place held."""
        here = slice(self.start(block), self.start(block) + keys.shape[2])
        self.keys[layer][:, :, here] = keys
        self.values[layer][:, :, here] = values

    def pieces(self, first: int, last: int, tokens: int) -> list[slice]:
        """Where block 0 and the blocks first..last lie, `last` with so many tokens, in as few pieces as there are."""
        if last == 0:
            return [slice(0, tokens)]
        end, begin = self.start(last) + tokens, self.start(first)
        spans = (
            [(0, self.head), (begin, end)] if begin < end else [(0, end), (begin, self.head + self.slots * self.size)]
        )
        if spans[0][1] == spans[1][0]:
            spans = [(0, spans[1][1])]
        return [slice(*span) for span in spans]

    def ordered(self, tensor: Tensor, first: int, last: int, tokens: int) -> Tensor:
        """A copy of block 0 and the blocks first..last of one of these tensors, oldest first."""
        found = [tensor[:, :, : self.head if last else tokens]]
        for block in range(first, last + 1):
            at = self.start(block)
            found.append(tensor[:, :, at : at + (tokens if block == last else self.size)])
        return torch.cat(found, 2)

    def restore(self, tensor: Tensor, given: Tensor, first: int, last: int) -> None:
        """Put back what `ordered` gave."""
        tensor[:, :, : self.head] = given[:, :, : self.head]
        at = self.head
        for block in range(first, last + 1):
            part = given[:, :, at : at + self.size]
            tensor[:, :, self.start(block) : self.start(block) + part.shape[2]] = part
            at += part.shape[2]
