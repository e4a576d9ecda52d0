"""Slots in no order: what an arena holds, and how things get in and out of it without moving anything else.

Softmax does not care in which order keys are summed, so a token stays in the slot it was written to until it leaves.
Which token that is stands in a `Table`: one for all layers while the same tokens leave everywhere, else one a layer,
with one row for the whole batch, and one column of slots for all heads, until rows or heads begin to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from .view import EMPTY, View

RUNS = 8  # so many runs of neighbouring slots are copied one by one; more are indexed at once


@dataclass(eq=False)
class Table:
    """What the slots of one layer (or of all) hold.

    index: int64 [R, G, C], stream index, EMPTY or FOLDED. weight: float [R, G, C], added to scores. merged: bool
    [R, G, C], whether several tokens are in it. tags: [R, G, C, …]. mine: own tensors of Evict and Place. A table is
    never changed in place, so that a step which fails, or is not committed, simply forgets the new one.
    """

    index: Tensor
    weight: Tensor | None = None
    merged: Tensor | None = None
    tags: Mapping[str, Tensor] = field(default_factory=dict)
    mine: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that have a column a slot, by name."""
        yield "index", self.index
        if self.weight is not None:
            yield "weight", self.weight
        if self.merged is not None:
            yield "merged", self.merged
        for name, tag in self.tags.items():
            yield f"tags.{name}", tag

    def map(self, of: Callable[[Tensor], Tensor]) -> Table:
        """A table with `of` done to every part."""
        parts = {name: of(part) for name, part in self.parts()}
        tags = {name.removeprefix("tags."): part for name, part in parts.items() if name.startswith("tags.")}
        return replace(self, index=parts["index"], weight=parts.get("weight"), merged=parts.get("merged"), tags=tags)

    def widened(self, rows: int, heads: int) -> Table:
        """The same, with at least that many rows and heads."""
        wide = max(self.index.shape[0], rows), max(self.index.shape[1], heads)
        if wide == tuple(self.index.shape[:2]):
            return self
        return self.map(lambda part: part.expand(*wide, *part.shape[2:]))

    def longer(self, columns: int) -> Table:
        """The same with `columns` more empty slots."""

        def more(part: Tensor) -> Tensor:
            shape = (*part.shape[:2], columns, *part.shape[3:])
            return torch.cat([part, part.new_full(shape, EMPTY) if part is self.index else part.new_zeros(shape)], 2)

        return self.map(more)


class Made(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for: `make` tells it from its tensor in `of`."""

    def __init__(self, of: Mapping[str, Tensor], make: Callable[[str, Tensor], Tensor]) -> None:
        self.of, self.make = of, make
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self.make(name, self.of[name])
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


@dataclass(frozen=True, eq=False)
class Moves:
    """Which fresh tokens go where: `src` among the fresh, `dst` among the slots.

    Both int64, [k] for all rows and heads, or [R, G, k]. runs: (first slot, first fresh token, length) of neighbours,
    None when there are too many.
    """

    src: Tensor
    dst: Tensor
    runs: tuple[tuple[int, int, int], ...] | None = None

    @classmethod
    def shared(cls, src: list[int], dst: list[int], device: torch.device) -> Moves:
        """The same for all rows and heads."""
        runs: list[tuple[int, int, int]] = []
        for s, d in zip(src, dst, strict=True):
            if runs and (d, s) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((d, s, 1))
        several = tuple(runs) if len(runs) <= RUNS else None
        at = torch.tensor([src, dst], dtype=torch.int64, device=device)
        return cls(at[0], at[1], several)

    def taken(self, fresh: Tensor) -> Tensor:
        """The part of `fresh` [R, G, m, …] that is kept, [R, G, k, …]."""
        if self.src.ndim == 1:
            return fresh if len(self.src) == fresh.shape[2] else fresh.index_select(2, self.src)
        return gathered(fresh, self.src)


def spread(columns: Tensor, like: Tensor) -> Tensor:
    """columns [R, G, k] as an index into `like` [B, H, n, …] along its third axis."""
    tail = like.shape[3:]
    wide = columns.expand(like.shape[0], like.shape[1], -1)
    return wide.reshape(*wide.shape, *[1] * len(tail)).expand(*wide.shape, *tail)


def gathered(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, H, n, …] at columns [k] or [R, G, k] → [B, H, k, …]."""
    if columns.ndim == 1:
        return x.index_select(2, columns)
    rows, heads = max(x.shape[0], columns.shape[0]), max(x.shape[1], columns.shape[1])
    x = x.expand(rows, heads, *x.shape[2:])
    return x.gather(2, spread(columns, x))


def with_columns(x: Tensor, columns: Tensor, what: Tensor) -> Tensor:
    """A copy of x [R, G, n, …] in which columns [k] or [R, G, k] hold `what` [R, G, k, …]."""
    if columns.ndim == 1:
        return x.index_copy(2, columns, what.to(x.dtype).expand(*x.shape[:2], *what.shape[2:]))
    rows = max(x.shape[0], columns.shape[0], what.shape[0])
    heads = max(x.shape[1], columns.shape[1], what.shape[1])
    x = x.expand(rows, heads, *x.shape[2:])
    what = what.to(x.dtype).expand(rows, heads, *what.shape[2:])
    return x.scatter(2, spread(columns, x), what)


def columns_of(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where stream indices wanted [R, k] or [R, G, k] stand among index [R, G, n], and whether they do: both [R, G, k]."""
    wanted = wanted if wanted.ndim == 3 else wanted[:, None]
    alike = torch.broadcast_shapes(index.shape[:2], wanted.shape[:2])
    ordered, order = index.expand(*alike, -1).sort(-1)
    wanted = wanted.expand(*alike, -1).contiguous()
    at = torch.searchsorted(ordered, wanted).clamp_max(index.shape[-1] - 1)
    return order.gather(-1, at), ordered.gather(-1, at) == wanted


def standing(view: View, columns: Tensor, time: Tensor) -> Tensor:
    """Complete positions, for `View.turned`, of what is in columns [k] or [R, G, k] and stands at `time` int64 [R, G, k].

    `time` itself, or [R, G, k, axes] with a rope of several axes, the others being the columns' coordinates.
    """
    rope = view.geometry.rope[view.layer]
    if rope is None or not rope.coordinates:
        return time
    known = view.tags.get("coordinates")
    if known is None:
        where = time.new_zeros(*time.shape, rope.coordinates)
    else:
        where = gathered(known[..., : rope.coordinates], columns).to(time)
    alike = torch.broadcast_shapes(time.shape, where.shape[:-1])
    return torch.cat([time.expand(alike)[..., None], where.expand(*alike, -1)], -1)


class Slots:
    """Keys and values of one layer: [B, H_kv, C, D] and [B, H_kv, C, D_v]."""

    def __init__(self, batch: int, heads: int, key_dim: int, value_dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, 0, key_dim)
        self.values = like.new_zeros(batch, heads, 0, value_dim)

    def only(self, columns: Tensor) -> Slots:
        """A copy of these slots, int64 [k]."""
        part = object.__new__(Slots)
        part.keys, part.values = self.keys.index_select(2, columns), self.values.index_select(2, columns)
        return part

    @torch.inference_mode(False)
    def grow(self, columns: int) -> None:
        """So many more slots, behind those that there are."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], old.shape[2] + columns, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


Undo = list[Callable[[], object]]


def put(into: Tensor, moves: Moves, what: Tensor, undo: Undo) -> None:
    """Write fresh `what` [B, H, m, D] into slots `into` [B, H, C, D]; `undo` learns how to take it back."""
    if moves.runs is None:
        return place(into, moves.dst, gathered(what, moves.src), undo)
    for dst, src, count in moves.runs:
        slots = into.narrow(2, dst, count)
        undo.append(partial(slots.copy_, slots.clone()))
        slots.copy_(what.narrow(2, src, count))


def place(into: Tensor, columns: Tensor, what: Tensor, undo: Undo) -> None:
    """Write `what` [B, H, k, D] into columns [k] or [R, G, k] of `into` [B, H, C, D]."""
    what = what.to(into.dtype)
    if columns.ndim == 1:
        undo.append(partial(into.index_copy_, 2, columns, into.index_select(2, columns)))
        into[:, :, columns] = what
        return
    index = spread(columns, into)
    undo.append(partial(into.scatter_, 2, index, into.gather(2, index)))
    into.scatter_(2, index, what.expand(index.shape))
