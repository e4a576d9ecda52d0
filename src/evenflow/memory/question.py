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

from .arena import Table, columns_of, gathered
from .chunks import ArenaState
from .chunkstep import ChunkStep
from .evict import Never
from .layout import Memory
from .place import Contiguous
from .view import EMPTY


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
        sinks = source.memory.sink * (self.source.frame or 1)
        memory = Memory(
            sink=sinks, window=None, evict=Growing(), place=source.memory.recall.answer_place or Contiguous(), frame=1,
            inside="causal", rows=source.memory.rows, name="question",
        )  # fmt: skip
        super().__init__(replace(memory, params={"of": source.memory.spec}), source.geometry)
        self.raw = memory.place.moves and not memory.place.packed  # nothing leaves, so places in the cache do not move
        self._rows = list(source._rows)
        self.tables = [table.widened(self.batch, 1) for table in self.tables]  # rows select different tokens
        self.asked = False
        self.selected: list[Tensor] = []  # stream indices by layer, int64 [R, G, n]

    def retrieve(self, m: int, tags: Mapping[str, Tensor] | None = None, mask: Tensor | None = None) -> ChunkStep:
        """A step of which nothing stays but what its queries select; selecting again replaces the selection.

        mask: bool [B, m], False for padding, which selects nothing.
        """
        self._idle("retrieve")
        if self.asked and len(self._rows) and self._rows != self.source._rows:
            raise RuntimeError("the answer has begun; ask another question to select anew")
        self.asked, self.selected = False, []
        self.tables = self.tables[:1] * self.geometry.layers
        return self.step(m, tags, commit=False, mask=mask)

    def _open(self, m: int, *options: Any) -> ChunkStep:
        if self.asked:
            self._join()
        opened = super()._open(m, *options)
        if not self.asked:
            opened.before_layer = self._mount
        return opened

    @torch.inference_mode(False)
    def _mount(self, layer: int, query: Tensor) -> None:
        """Put what the question selects in this layer at the front of its slots."""
        if self._current is not None and self._current.counted is not None:
            query = query.masked_fill(~self._current.counted[:, None, :, None], 0)
        source, g = self.source, self.geometry
        table = source.tables[source.table(layer)]
        keys, values, index = source.memory.recall.retrieve(source.between(layer, query.detach()))
        index = index.reshape({1: (1, 1, -1), 2: (len(index), 1, -1), 3: index.shape}[index.ndim])
        self.slots[layer].keys, self.slots[layer].values = keys.clone(), values.clone()
        self.tables[layer] = replace(_of_selected(table, index), mine=self.tables[layer].mine)
        self.selected.append(self.tables[layer].index)
        self._turn(layer)
        if layer == g.layers - 1:
            self.asked = True

    def _turn(self, layer: int) -> None:
        """Let what was selected lie rotated where it stands, once and for all."""
        rotary, step = self.rotaries[self.geometry.rope[layer]], self._current
        if self.raw or rotary is None or step is None:
            return
        view, place = self.between(layer), self.memory.place
        places = place.positions(view)
        at = places.keys
        if place.packed:  # heads that hold more start earlier, as all of them end together
            count = (view.index != EMPTY).sum(-1, keepdim=True)
            at = view.rank() + count[:, :1] - count
        if places.laid is not None:
            at = torch.where(view.column < view.sink, 0, at)
        cos, sin = rotary.at(step._axes(rotary, at, view.tags, places.coordinates, None))
        cos, sin = (cos, sin) if cos.ndim == 4 else (cos[:, None], sin[:, None])
        self.slots[layer].keys = rotary.rotate(self.slots[layer].keys, cos, sin)

    def _join(self) -> None:
        """One table for all layers as soon as they hold equally much, so that a step is planned once and not in each.

        Where positions are places in the cache, nobody asks any more which tokens of the stream these are.
        """
        first, *others = self.tables
        if not others or not self.memory.place.packed or any(len([*table.parts()]) > 1 for table in self.tables):
            return
        there = first.index != EMPTY
        if all(table.index.shape == there.shape and torch.equal(table.index != EMPTY, there) for table in others):
            self.tables, self.pending = [first], {}

    def held(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        """Stream indices of what was selected, then the question's own tokens, counted on from where the stream stood."""
        there = super().held(layer, row, head)
        if len(self.tables) < len(self.selected):
            index = self.selected[layer][row, min(head, self.selected[layer].shape[1] - 1)]
            known = index[index != EMPTY].tolist()
            there[: len(known)] = known
        return there

    def state_dict(self) -> dict[str, Any]:
        """Raises ValueError: what a question saw is the stream's."""
        raise ValueError("a question is not saved; save the stream it was asked of, and ask again")


def _of_selected(table: Table, index: Tensor) -> Table:
    """A table of what was selected, index int64 [R, G, n], with the weights and tags that the stream's table has of it."""
    if not table.index.shape[2] or (table.weight is None and not table.tags):
        return Table(index.clone())
    columns, there = columns_of(table.index, index)

    def of(part: Tensor) -> Tensor:
        found = gathered(part, columns)
        return found.masked_fill(~there.reshape(*there.shape, *[1] * (found.ndim - 3)), 0)

    return replace(table.map(of), index=index.expand_as(columns).clone())
