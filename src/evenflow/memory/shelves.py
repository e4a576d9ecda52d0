"""Blocks of keys and values, and what is known of them: one shelf a layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .segments import Span, StoreError

Pair = tuple[Tensor, Tensor]
ID, FIRST, COUNT = ".id", ".first", ".count"  # rows of every shelf; what `put` is given has other names


@dataclass(eq=False, slots=True)
class Block:
    """Where the keys and values of one block are: in RAM, on disk, or both."""

    id: int
    layer: int
    first: int
    count: int
    nbytes: int
    ram: Pair | None = None
    span: Span | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """What is known of a layer's blocks, one row each, by ascending id; never to be written into.

    ids: int64 [n] on the CPU. first, count: int64 [n], first stream index and number of tokens. tensors: what `put` was
    given, stacked, [n, …]. All but ids where the store keeps its index.
    """

    ids: Tensor
    first: Tensor
    count: Tensor
    tensors: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fetched:
    """Blocks on the device, in the order they were asked for. Their tensors belong to the store: read only.

    missing: why a block that was asked for is not here, by its id.
    """

    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    first: list[int]
    missing: dict[int, str]

    def concatenated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [..., n, D], values [..., n, D_v] of all blocks, and their stream indices int64 [n]."""
        if not self.ids:
            raise StoreError(f"there is nothing to concatenate; missing: {self.missing}")
        places = [
            first + torch.arange(k.shape[-2], device=k.device) for first, k in zip(self.first, self.keys, strict=True)
        ]
        return torch.cat(self.keys, -2), torch.cat(self.values, -2), torch.cat(places)


class Shelf:
    """One layer's blocks and their index rows, in buffers that double; only ever appended to."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.rows: dict[str, Tensor] = {}

    def fits(self, index: Mapping[str, Tensor]) -> None:
        """Raises ValueError when an index is not like those before."""
        got = {name: (tuple(t.shape), t.dtype) for name, t in index.items()}
        like = {name: (tuple(t.shape[1:]), t.dtype) for name, t in self.rows.items() if not name.startswith(".")}
        if self.rows and got != like:
            raise ValueError(f"the index of a block is {got}; earlier blocks of this layer have {like}")

    def append(self, block: Block, index: Mapping[str, Tensor], device: torch.device) -> None:
        """`index`: tensors anywhere, of the shapes of those before."""
        numbers = {FIRST: block.first, COUNT: block.count}
        row = {name: torch.tensor(number, device=device) for name, number in numbers.items()}
        row |= {ID: torch.tensor(block.id)} | {name: value.detach().to(device) for name, value in index.items()}
        n = len(self.blocks)
        for name, value in row.items():
            held = self.rows.get(name)
            if held is None or len(held) == n:
                grown = value.new_empty(max(16, 2 * n), *value.shape)
                if held is not None:
                    grown[:n] = held
                self.rows[name] = held = grown
            held[n] = value
        self.blocks.append(block)

    def place(self, id: int, n: int) -> int:
        """Where in the first n blocks it is, or would be."""
        return bisect_left(self.blocks, id, hi=n, key=lambda block: block.id)

    def find(self, id: int, n: int) -> Block | None:
        """Among the first n blocks."""
        at = self.place(id, n)
        return self.blocks[at] if at < n and self.blocks[at].id == id else None

    def without(self, ids: set[int]) -> Shelf:
        """Another shelf: readers of this one keep what they see."""
        kept = [at for at, block in enumerate(self.blocks) if block.id not in ids]
        shelf = Shelf()
        shelf.blocks = [self.blocks[at] for at in kept]
        shelf.rows = {
            name: rows[torch.tensor(kept, dtype=torch.int64, device=rows.device)] for name, rows in self.rows.items()
        }
        return shelf

    def twin(self, copies: Mapping[int, Block]) -> Shelf:
        """The same rows for other blocks. Its buffers are full, so whichever appends first does so elsewhere."""
        shelf = Shelf()
        shelf.blocks = [copies[block.id] for block in self.blocks]
        shelf.rows = {name: rows[: len(self.blocks)] for name, rows in self.rows.items()}
        return shelf

    def index(self, n: int, device: torch.device) -> Index:
        """The first n rows."""
        rows = {name: rows[:n] for name, rows in self.rows.items()}
        none = torch.zeros(0, dtype=torch.int64)
        return Index(rows.pop(ID, none), rows.pop(FIRST, none.to(device)), rows.pop(COUNT, none.to(device)), rows)

    def of(self, at: int) -> dict[str, Tensor]:
        """What block number `at` was put with."""
        return {name: rows[at] for name, rows in self.rows.items() if not name.startswith(".")}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, where the index is kept."""
        return sum(rows.nbytes for name, rows in self.rows.items() if name != ID)
