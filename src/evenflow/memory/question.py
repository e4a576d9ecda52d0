"""Questions to a memory: read-only, on what it held at one moment, while the stream goes on.

The question's first step selects what it needs, layer by layer, from its own queries (`Recall.retrieve`); further
steps are appended behind what was selected, causally, at contiguous places. The stream never learns of any of it.
Source: ReKV, arXiv 2503.00540, sections 2.3 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .arena import Table
from .chunks import ArenaState
from .chunkstep import ChunkStep
from .evict import Never
from .layout import Memory
from .place import Contiguous
from .view import View


class Growing(Never):
    """Nothing leaves, and every layer holds its own selection."""

    content = True


class Question(ArenaState):
    """What `ArenaState.question` returns: a memory of its own that starts with what it retrieves.

    `with question.retrieve(m)` passes the question through all layers: each selects, attends what it selected and the
    question itself, and keeps only the selection. `with question.step(m)` then appends, as to any memory: the prompt,
    and the answer token by token. Without `retrieve` the first step selects with its own queries.
    """

    def __init__(self, source: ArenaState) -> None:
        self.source = source.snapshot()
        memory = Memory(
            window=None, evict=Growing(), place=source.memory.recall.answer_place or Contiguous(), frame=1,
            inside="causal", rows=source.memory.rows, name="question",
        )  # fmt: skip
        super().__init__(replace(memory, params={"of": source.memory.spec}), source.geometry)
        self._rows = list(source._rows)
        self.tables = [table.widened(self.batch, 1) for table in self.tables]  # rows select different tokens
        self.asked = False

    def retrieve(self, m: int, tags: Mapping[str, Tensor] | None = None) -> ChunkStep:
        """A step of which nothing stays but what its queries select; selecting again replaces the selection."""
        self._idle("retrieve")
        if self.asked and len(self._rows) and self._rows != self.source._rows:
            raise RuntimeError("the answer has begun; ask another question to select anew")
        self.asked = False
        return self.step(m, tags, commit=False)

    def _open(self, m: int, *options: Any) -> ChunkStep:
        opened = super()._open(m, *options)
        if not self.asked:
            opened.before_layer = self._mount
        return opened

    def _mount(self, layer: int, query: Tensor) -> None:
        """Put what the question selects in this layer at the front of its slots."""
        source, g = self.source, self.geometry
        table, frame = source.tables[source.table(layer)], source.frame or 1
        consumed = torch.tensor(source._rows[: len(table.index)], device=g.device)
        mine = {name: tensor for own in source.mine[layer].values() for name, tensor in own.items()}
        view = View(
            g, layer, g.layers, frame, query.shape[2], source.memory.sink * frame, source.memory.fold.slots(frame),
            source._window(frame), False, False, consumed, torch.zeros_like(consumed), consumed[:, None][:, :0], table.index, table.tags, {},
            consumed < 0, table.weight, query, mine=mine, store=source.store, batch=self.batch, causal=True,
            source=lambda: (source.slots[layer].keys, source.slots[layer].values),
        )  # fmt: skip
        keys, values, index = source.memory.recall.retrieve(view)
        index = index.reshape(1, 1, -1) if index.ndim == 1 else index[:, None]
        self.slots[layer].keys, self.slots[layer].values = keys.clone(), values.clone()
        self.tables[layer] = Table(index.clone(), mine=self.tables[layer].mine)
        if layer == g.layers - 1:
            self.asked = True

    def held(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        """Stream indices of what was selected, then the question's own tokens, counted on from where the stream stood."""
        return super().held(layer, row, head)
