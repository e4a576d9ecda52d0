"""One step of a memory in an arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arena import Made, Moves, Slots, Table, Undo, gathered, place, put, with_columns
from .channels import HALF, Elsewhere
from .rope import Rotary
from .step import recalled, sign
from .verbs import Fold, Fresh, Places, Recall
from .view import EMPTY, FOLDED, View

if TYPE_CHECKING:
    from .chunks import ArenaState

COPY = 64  # copying a slot takes about as long as attending it with so many queries, or as rotating it


@dataclass(eq=False)
class Seen:
    """What the queries of layers with one table, rotation and reach attend."""

    columns: Tensor | None  # int64 [k], the slots that are read; None: all
    copied: bool  # whether they are copied together, or are the first ones, and read in place
    keys: tuple[Tensor, Tensor] | None  # cosine and sine of the attended keys; None where they are stored rotated
    fresh: tuple[Tensor, Tensor] | None  # of the fresh tokens' keys, for what is stored rotated
    queries: tuple[Tensor, Tensor] | None
    head: Elsewhere | None  # where sinks and memory are met, if not where they are
    bias: Tensor | None  # [R, 1 or H_q, 1 or m, k]


@dataclass(eq=False)
class Plan:
    """What becomes of one table in this step."""

    table: Table  # as it will be
    moves: Moves
    before: Tensor  # int64 [R, G, C + m], what slots and fresh tokens hold before anything left
    tags: Mapping[str, Tensor]  # [R, G, C + m, …], of what is told there
    leaving: Tensor  # bool [R, G, C + m]
    left: Tensor  # bool [R]
    seen: dict[Any, Seen] = field(default_factory=dict)


class ChunkStep:
    """The context that `ArenaState.step` opens."""

    def __init__(
        self, state: ArenaState, m: int, frame: int, tags: Mapping[str, Tensor], commit: bool, mask: Tensor | None,
        rows: slice, recache: bool | None,
    ) -> None:  # fmt: skip
        self.state, self.m, self.frame, self.commit, self.rows, self.recache = state, m, frame, commit, rows, recache
        g = state.geometry
        self.batch = rows.stop - rows.start
        self.tags = {name: tag.to(g.device) for name, tag in tags.items()}
        admitted = state.memory.admit.admitted(Fresh(m, self.batch, tags, mask))
        counted = mask if admitted is None else admitted if mask is None else admitted & mask
        self.counted = None if counted is None or bool(counted.all()) else counted.to(g.device)
        ages = state._rows[rows]
        alike = self.batch == 1 or all(bool((tag == tag[:1]).all()) for tag in self.tags.values())
        whole = all(table.index.shape[0] == 1 for table in state.tables)
        self.uniform = self.counted is None and len(set(ages)) == 1 and whole and alike
        if self.uniform:
            ages = ages[:1]
        self.consumed = torch.tensor(ages, device=g.device) - (0 if recache is None else m)
        column = torch.arange(m, device=g.device)
        self.coming = torch.full_like(self.consumed, m) if self.counted is None else self.counted.sum(1)
        if self.counted is None:
            self.stream = self.consumed[:, None] + column
            self.index = self.stream[:, None]
        else:
            last = self.consumed[:, None] + self.counted.cumsum(1) - 1
            self.stream = torch.where(self.counted, last, last + 1)
            self.index = torch.where(self.counted, self.stream, EMPTY)[:, None]
            if self.frame > 1 and bool((self.counted.sum(1) % self.frame != 0).any()):
                raise ValueError(f"a row's real tokens are not whole frames of {self.frame}")
        self.pinned = state.memory.sink * frame + state.memory.fold.slots(frame)
        self.shapes = tuple(
            (self.batch, heads, m, dim)
            for heads, dim in ((g.heads, g.head_dim), (g.kv_heads, g.head_dim), (g.kv_heads, g.value_dim))
        )
        recall = type(state.memory.recall)
        # Whether nobody but the softmax looks at single scores.
        self.plain = g.softcap is None and g.dtype not in HALF
        self.plain &= recall.attend is Recall.attend and recall.visible is Recall.visible
        self.key = (tuple(state._rows[rows]), m, recache is not None)
        self.plans: dict[int, Plan] = {}
        self.mine: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.views: dict[int, View] = {}
        self.signs: list[Tensor] = []
        self.undo: Undo = []
        self.shared: dict[Any, Any] = {}
        self.before_layer: Callable[[int, Tensor], None] | None = None

    def __enter__(self) -> ChunkStep:
        state = self.state
        if state._current is not None:
            raise RuntimeError("a step is already open on this memory; steps do not nest")
        state._current = self
        self.started = state.frame is None
        if self.started:
            state.frame = self.frame
            state._own(self.frame)
        state._open_store()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state._current = None
        try:
            self._end(kind is not None)
        finally:
            # What layers see knows the step that knows it: left alone, all that it copied would wait for the collector.
            for kept in (self.views, self.plans, self.mine):
                kept.clear()
            self.signs.clear()
            self.undo.clear()
            self.before_layer = None

    def _end(self, failed: bool) -> None:
        state = self.state
        if failed:
            return self._undo(failed=True)
        if not self.commit:
            return self._undo()
        missing = [layer for layer in range(state.geometry.layers) if layer not in self.views]
        if missing:
            self._undo(failed=True)
            raise RuntimeError(f"the step ended before layers {missing} attended; nothing was stored")
        if not bool(torch.stack(self.signs).isfinite().all()):
            self._undo(failed=True)
            raise ValueError("keys or values hold NaN or infinity; nothing was stored")
        store = state.store
        mark = 0 if store is None else store.mark
        try:
            with torch.no_grad():
                for layer in range(state.geometry.layers):
                    view = self._after(layer)
                    view.mine = self._mine(layer, "fold")
                    state.memory.fold.arrive(view)
                    if state.table(layer) == layer:
                        view.mine = self._mine(layer, "evict")
                        state.memory.evict.arrive(view)
        except BaseException:
            self._undo(failed=True)
            if store is not None:
                store.rewind(mark)
            raise
        self._store()

    def _undo(self, failed: bool = False) -> None:
        """Take everything back that was written; what was decided for the chunk is kept for its next call."""
        for back in reversed(self.undo):
            back()
        if failed and self.started:
            self.state._forget()
        elif failed:
            self.state.pending = {}

    def _store(self) -> None:
        state, rows = self.state, self.rows
        fell = False
        for number, plan in self.plans.items():
            fell |= bool(plan.left.any())
            old, new = state.tables[number], plan.table
            new.mine = {verb: self._kept(old.mine[verb], self._mine(number, verb)) for verb in old.mine}
            state.tables[number] = _merged(old, new, rows, state.batch)
        for layer in range(state.geometry.layers):
            mine = state.mine[layer]
            state.mine[layer] = {verb: self._kept(mine[verb], self._mine(layer, verb)) for verb in mine}
        if self.recache is None:
            counts = [self.m] * self.batch if self.counted is None else self.counted.sum(1).tolist()
            state._rows[rows] = [row + count for row, count in zip(state._rows[rows], counts, strict=True)]
        if fell or self.recache is not None:
            state._floor = max(state._rows)
        if "time" in self.tags:
            state._time = state._clock(self.tags["time"], rows)
        state.pending = {}

    def _kept(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Own tensors after the step: those of rows that took no part are as they were."""
        if self.everybody:
            return new
        batch, part, made = self.state.batch, self.coming > 0, dict(new)
        for name, tensor in new.items():
            if name in old and len(old[name]) == batch:
                made[name] = whole = tensor.new_zeros(batch, *tensor.shape[1:])
                whole[tuple(slice(size) for size in old[name].shape)] = old[name]  # it may have grown
                chosen = part.expand(self.batch).reshape(-1, *[1] * (tensor.ndim - 1))
                whole[self.rows] = torch.where(chosen, tensor, whole[self.rows])
        return made

    @cached_property
    def everybody(self) -> bool:
        """Whether every row takes part."""
        return self.batch == self.state.batch and (self.counted is None or bool((self.coming > 0).all()))

    def _mine(self, number: int, verb: str) -> dict[str, Tensor]:
        """An answer's own tensors in this step: a copy of the table of them, to be thrown away or kept."""
        key = (number, verb)
        if key not in self.mine:
            own = self.state.tables[number].mine if verb in ("evict", "place") else self.state.mine[number]
            self.mine[key] = {name: self._part(tensor) for name, tensor in own[verb].items()}
        return self.mine[key]

    # -- one layer -----------------------------------------------------------------------------------------------

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `MemoryState.attend`."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.attend(layer, q, k, v)
        state, g = self.state, self.state.geometry
        self._check(layer, q, k, v)
        if self.before_layer is not None:
            self.before_layer(layer, q)
        if self.counted is not None:
            k = k.masked_fill(~self.counted[:, None, :, None], 0)
            v = v.masked_fill(~self.counted[:, None, :, None], 0)
        self.signs.append(sign(k, v))
        rotary, number = state.rotaries[g.rope[layer]], state.table(layer)
        before = partial(self._content, layer, k, v)
        plan = self.plans.get(number)
        if plan is None:
            plan = self.plans[number] = self._plan(layer, number, q, before)
        if type(state.memory.fold).leave is not Fold.leave:
            self._leave(layer, plan, q, (k, v), before)
        seen = self._seen(layer, number, plan, rotary, q)
        slots = self._slots(layer)
        turned = k if rotary is None or seen.fresh is None else rotary.rotate(k, *seen.fresh)
        put(slots.keys, plan.moves, turned, self.undo)
        put(slots.values, plan.moves, v, self.undo)
        view = self._after(layer, q)
        view.brought = k, v
        query = q if rotary is None or seen.queries is None else rotary.rotate(q, *seen.queries)
        keys, values = slots.keys, slots.values
        if seen.columns is not None:
            if seen.copied:
                keys, values = keys.index_select(2, seen.columns), values.index_select(2, seen.columns)
            else:
                keys, values = keys[:, :, : len(seen.columns)], values[:, :, : len(seen.columns)]
            view = replace(view, index=gathered(view.index, seen.columns), columns=seen.columns)
        bias, memory, lying = seen.bias, state.memory, keys
        if rotary is not None and seen.keys is not None:
            keys = rotary.rotate(keys, *seen.keys)
        if rotary is not None and seen.head is not None:
            lying = lying[:, :, : seen.head.count]
            if self.m == 1 and self.plain:
                bias = seen.head.bias(rotary, q, lying, query, keys, bias, g.scale[layer])
            else:
                query, keys, values = seen.head.met(rotary, q, lying, query, keys, values)
        view.mine = self._mine(layer, "recall")
        bias = recalled(memory.recall, query, keys, bias)
        out = memory.recall.attend(view, query, keys, values, bias, g.scale[layer])[..., : g.value_dim]
        view.mine = self._mine(layer, "fold")
        more = memory.fold.read(view)
        return out if more is None else out + more

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        g = self.state.geometry
        if not 0 <= layer < g.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {g.layers}")
        if layer in self.views:
            raise RuntimeError(f"layer {layer} attended twice in one step; every layer attends once")
        for name, tensor, shape in zip("qkv", (q, k, v), self.shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
            if tensor.dtype != g.dtype:
                raise ValueError(f"{name} is {tensor.dtype}; this memory holds {g.dtype}")

    def _slots(self, layer: int) -> Slots:
        """The layer's slots, of the rows that take part."""
        slots = self.state.slots[layer]
        if self.batch == self.state.batch:
            return slots
        part = object.__new__(Slots)
        part.keys, part.values = slots.keys[self.rows], slots.values[self.rows]
        return part

    def _content(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values of all slots and the fresh tokens, before anything of this step is written."""
        slots = self._slots(layer)
        return torch.cat([slots.keys, k], 2), torch.cat([slots.values, v], 2)

    def _rows_of(self, table: Table) -> Table:
        if table.index.shape[0] == 1 or self.batch == self.state.batch:
            return table
        return table.map(lambda part: part[self.rows])

    # -- planning ------------------------------------------------------------------------------------------------

    def _view(self, layer: int, index: Tensor, table: Table, q: Tensor | None, left: Tensor, **more: Any) -> View:
        state, g, frame = self.state, self.state.geometry, self.frame
        null = None if state.null_logits is None else state.null_logits[layer]
        return View(
            geometry=g, layer=layer, layers=g.layers, frame=frame, m=self.m, sink=state.memory.sink * frame,
            slots=state.memory.fold.slots(frame), window=state._window(frame), commit=self.commit,
            recache=self.recache is not None, consumed=self.consumed, coming=self.coming, stream=self.stream, index=index, tags=table.tags,
            fresh_tags=self.tags, left=left, weight=table.weight, query=q, null=null, shared=self.shared,
            causal=state.memory.inside == "causal", by_head=state.memory.by_head, store=state.store, batch=self.batch, every=self._every, turn=partial(self._turned, layer, table), **more,
        )  # fmt: skip

    def _every(self, name: str) -> list[Tensor]:
        """The evict answer's tensor of that name in every table, as it was before this step."""
        return [self._part(table.mine["evict"][name]) for table in self.state.tables]

    def _part(self, own: Tensor) -> Tensor:
        """The rows that take part, of an answer's own tensor of all rows."""
        return own[self.rows] if self.batch < self.state.batch and len(own) == self.state.batch else own

    def _plan(self, layer: int, number: int, q: Tensor, before: Callable[[], tuple[Tensor, Tensor]]) -> Plan:
        state, m = self.state, self.m
        table = self._rows_of(state.tables[number])
        if not self.uniform:
            table = table.widened(self.batch, 1)
        held = table.index
        for name in self.tags.keys() - table.tags.keys() - {"frame"}:
            unknown = self.tags[name].new_zeros(*held.shape, *self.tags[name].shape[2:])
            table = replace(table, tags={**table.tags, name: unknown})
        if self.recache is not None:
            column = torch.arange(held.shape[2], device=held.device)
            sinks = state.memory.sink * self.frame
            folded = (column >= sinks) & (column < self.pinned) & (not state.memory.fold.from_start)
            gone = (held >= self.consumed[:, None, None]) & ~folded
            if not self.recache:
                gone = gone | (column < sinks)
            held = torch.where(gone, EMPTY, held)
        index = torch.cat([held.expand(len(self.index), -1, -1), self.index.expand(-1, held.shape[1], -1)], 2)
        width = held.shape[2]
        tags = self._with_fresh(table.tags, index)
        key, keep, mine = state.pending.get(number, (None, None, {}))
        if key == self.key:
            self.mine[number, "evict"] = dict(mine)
        else:
            view = self._view(layer, index, replace(table, tags=tags, weight=None), q, self.consumed < 0, source=before)
            view.mine = self._mine(number, "evict")
            keep = state.memory.evict.keep(view)
            if state.memory.evict.content:  # tags decide anew: another call of that length may bring others
                state.pending[number] = (self.key, keep, dict(view.mine))
        stays, leaving = index, torch.zeros_like(index, dtype=torch.bool)
        if keep is not None:
            keep = keep | self._staying(held, index)
            index = index.expand(max(len(index), len(keep)), max(index.shape[1], keep.shape[1]), -1)
            leaving = (index != EMPTY) & ~keep
            leaving[..., width:] = False
            stays = torch.where(keep, index, EMPTY)
        left = leaving.flatten(1).any(1)
        after, coming = stays[..., :width], stays[..., width:]
        table = table.widened(*after.shape[:2])
        after, table, moves = self._assign(after, coming, table, number)
        table = replace(table, index=with_columns(after, moves.dst, moves.taken(coming)), mine={})
        for name, tag in table.tags.items():
            what = self._fresh_tag(name, tag, table.index)
            table.tags = {**table.tags, name: with_columns(tag, moves.dst, moves.taken(what))}
        for name in ("weight", "merged"):
            part = getattr(table, name)
            if part is not None:
                zero = part.new_zeros(*table.index.shape[:2], m)
                setattr(table, name, with_columns(part, moves.dst, moves.taken(zero)))
        return Plan(table, moves, index, tags, leaving, left)

    def _staying(self, held: Tensor, index: Tensor) -> Tensor:
        """Bool [R, G, C + m]: what stays whatever the evict answer says.

        Sinks come first: whatever the budget, the first tokens of a stream stay as long as there is room for sinks. And
        a row that takes no part loses nothing.
        """
        fold, width, sinks = self.state.memory.fold, held.shape[2], self.state.memory.sink * self.frame
        room = sinks - (held[..., :sinks] != EMPTY).sum(-1, keepdim=True)
        stays = (self.coming == 0)[:, None, None].repeat(1, *index.shape[1:])
        stays[..., width:] = self.stream[:, None] - self.consumed[:, None, None] < room
        if fold.from_start:
            stays[..., width:] |= self.stream[:, None] < sinks + fold.slots(self.frame)
        return stays

    def _with_fresh(self, tags: Mapping[str, Tensor], index: Tensor) -> Made:
        """Tags of all slots and the fresh tokens, with as many rows and heads as index [R, G, n] has."""
        alike = index.shape[:2]
        return Made(
            tags,
            lambda name, tag: torch.cat([tag.expand(*alike, *tag.shape[2:]), self._fresh_tag(name, tag, index)], 2),
        )

    def _fresh_tag(self, name: str, like: Tensor, index: Tensor) -> Tensor:
        """A tag of the fresh tokens [R, G, m, …], zeros where it was not given."""
        tag = self.tags.get(name)
        rows, heads, tail = index.shape[0], index.shape[1], like.shape[3:]
        if tag is None:
            return like.new_zeros(rows, heads, self.m, *tail)
        return tag[:rows, None].to(like.dtype).expand(rows, heads, self.m, *tail)

    def _assign(self, after: Tensor, coming: Tensor, table: Table, number: int) -> tuple[Tensor, Table, Moves]:
        """Slots for the fresh tokens that stay, lowest free ones first; more slots where there are not enough."""
        state, memory = self.state, self.state.memory
        sinks, slots = memory.sink * self.frame, memory.fold.slots(self.frame)
        free = after == EMPTY
        reserved = slice(sinks, sinks + (0 if memory.fold.from_start else slots))
        free[..., reserved] = False
        one = after.shape[0] == after.shape[1] == 1
        wanted = int((coming != EMPTY).sum(-1).max())
        missing = wanted - int(free.sum(-1).min())
        if missing > 0 or after.shape[2] < sinks + slots:
            have = after.shape[2]
            budget = memory.evict.columns(sinks, slots, state._window(self.frame), self.m)
            least = max(have + missing, sinks + slots + wanted)
            more = (budget if budget is not None and budget >= least else max(least, have + have // 4)) - have
            if memory.window is None and budget is None and have:
                more = max(more, have)
            self._grow(number, more)
            table, after = table.longer(more), torch.cat([after, after.new_full((*after.shape[:2], more), EMPTY)], 2)
            free = after == EMPTY
            free[..., reserved] = False
        if one:
            kept = (coming[0, 0] != EMPTY).nonzero()[:, 0].tolist()
            taken = free[0, 0].nonzero()[: len(kept), 0].tolist()
            return after, table, Moves.shared(kept, taken, after.device)
        src = (coming == EMPTY).to(torch.uint8).argsort(dim=-1, stable=True)[..., :wanted]
        dst = (~free).to(torch.uint8).argsort(dim=-1, stable=True)[..., :wanted]
        return after, table, Moves(src, dst)

    def _grow(self, number: int, columns: int) -> None:
        """More slots in every layer of a table, and in the table itself: they stay even if the step is undone."""
        state = self.state
        for layer in range(state.geometry.layers):
            if state.table(layer) == number:
                state.slots[layer].grow(columns)
        own = state.tables[number].mine
        state.tables[number] = state.tables[number].longer(columns)
        state.tables[number].mine = own
        if number in state.pending:
            key, keep, mine = state.pending[number]
            if keep is not None:
                at = keep.shape[2] - self.m
                gap = keep.new_zeros(*keep.shape[:2], columns)
                state.pending[number] = (key, torch.cat([keep[..., :at], gap, keep[..., at:]], 2), mine)

    def _leave(
        self, layer: int, plan: Plan, q: Tensor, fresh: tuple[Tensor, Tensor],
        before: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:  # fmt: skip
        """Let the fold have what leaves; it may write sinks and memory, which the queries then see."""
        grown = plan.table.index.shape[2] - (plan.before.shape[2] - self.m)
        if grown:

            def longer(part: Tensor, fill: float = 0) -> Tensor:
                at = part.shape[2] - self.m
                gap = part.new_full((*part.shape[:2], grown, *part.shape[3:]), fill)
                return torch.cat([part[:, :, :at], gap, part[:, :, at:]], 2)

            plan.before, plan.leaving = longer(plan.before, EMPTY), longer(plan.leaving)
            plan.tags = Made(plan.tags, lambda name, tag: longer(tag))
        view = self._view(layer, plan.before, Table(plan.before, tags=plan.tags), q, plan.left, source=before)
        view.writer = partial(self._write, layer, plan)
        slots = self._slots(layer)
        view.brought, view.stored = fresh, (slots.keys, slots.values)
        view.mine = self._mine(layer, "fold")
        self.state.memory.fold.leave(view, plan.leaving)

    def _write(
        self, layer: int, plan: Plan, view: View, columns: Tensor, keys: Tensor | None, values: Tensor | None,
        index: Tensor | int | None, weight: Tensor | None, tags: Mapping[str, Tensor] | None,
    ) -> None:  # fmt: skip
        slots, table = self._slots(layer), plan.table
        if columns.ndim > 1:
            table = plan.table = table.widened(*columns.shape[:2])
        if keys is not None:
            place(slots.keys, columns, keys, self.undo)
        if values is not None:
            place(slots.values, columns, values, self.undo)
        count = columns.shape[-1]
        memory = (columns >= view.sink) & (columns < view.sink + view.slots)
        shape = (*table.index.shape[:2], count)
        old = gathered(table.index, columns).expand(shape)
        told = index is not None
        if index is None:
            index = torch.where(memory, FOLDED, old)
        new = torch.as_tensor(index, device=old.device).expand(shape)
        plan.table.index = with_columns(plan.table.index, columns, new)
        if keys is not None and not told and bool((~memory & (new >= 0)).any()):
            merged = table.merged if table.merged is not None else torch.zeros_like(plan.table.index, dtype=torch.bool)
            plan.table.merged = with_columns(merged, columns, torch.ones(shape, dtype=torch.bool, device=old.device))
        if weight is not None:
            weights = table.weight
            if weights is None:
                weights = slots.keys.new_zeros(plan.table.index.shape)
            plan.table.weight = with_columns(weights, columns, weight.expand(shape))
        for name in (tags or {}).keys() & plan.table.tags.keys():
            tag = with_columns(plan.table.tags[name], columns, (tags or {})[name])
            plan.table.tags = {**plan.table.tags, name: tag}
        if layer in self.views:
            self.views[layer].index, self.views[layer].weight = plan.table.index, plan.table.weight

    # -- what is attended ----------------------------------------------------------------------------------------

    def _after(self, layer: int, q: Tensor | None = None) -> View:
        """The layer with the fresh tokens in their slots."""
        if layer not in self.views:
            plan, slots = self.plans[self.state.table(layer)], self._slots(layer)
            view = self._view(
                layer, plan.table.index, plan.table, q, plan.left, source=lambda: (slots.keys, slots.values)
            )
            view.writer = partial(self._write, layer, plan)
            self.views[layer] = view
        return self.views[layer]

    def _seen(self, layer: int, number: int, plan: Plan, rotary: Rotary | None, q: Tensor) -> Seen:
        g, memory = self.state.geometry, self.state.memory
        key = (g.rope[layer], g.reach[layer])
        if key in plan.seen:
            return plan.seen[key]
        view = self._view(layer, plan.table.index, plan.table, q, plan.left)
        view.mine = self._mine(number, "place")
        view.reached = memory.evict.reach(view) if memory.inside == "causal" else None
        among = memory.recall.among(view)
        if among is not None:
            view.index = torch.where(among, view.index, EMPTY)
        there = view.index != EMPTY
        everything = bool(there.all())
        columns, copied = (None, False) if everything else self._read(there)
        index = view.index if columns is None else view.index.index_select(2, columns)
        everything = everything or bool((index != EMPTY).all())
        keys = fresh = queries = head = None
        places = memory.place.positions(view)
        if rotary is not None:
            if self.state.raw:
                where = places.keys
                if not everything:  # what is not there stands with the queries, so that positions lie near each other
                    some = there if where.shape[1] > 1 else there.any(1, keepdim=True)
                    where = torch.where(
                        some if where.ndim == 3 else some[..., None], where, places.queries[:, None, -1:]
                    )
                keys = rotary.at(self._axes(rotary, where, plan.table.tags, places.coordinates, columns))
                keys = keys if keys[0].ndim == 4 else (keys[0][:, None], keys[1][:, None])
            queries = self._query_turn(rotary, places.queries, places.coordinates)
            if not self.state.raw:
                fresh = queries
                if places.laid is not None:
                    fresh = self._query_turn(rotary, places.laid, places.coordinates)
            if places.head_queries is not None:
                head = self._elsewhere(rotary, places, places.head_queries, plan.table.tags, columns)
        bias = self._bias(layer, index, everything, places, plan.table.weight, columns, view.reached)
        seen = plan.seen[key] = Seen(columns, copied, keys, fresh, queries, head, bias)
        return seen

    def _read(self, there: Tensor) -> tuple[Tensor | None, bool]:
        """Which slots attention reads, int64 [k], and whether it copies them; None: all. there: bool [R, G, C]."""
        used = there.any(1).any(0).nonzero()[:, 0]
        stop = int(used[-1]) + 1 if len(used) else there.shape[2]
        saved = (stop - len(used)) * (self.m + (COPY if self.state.raw else 0))
        if there.shape[0] == there.shape[1] == 1 and saved > COPY * len(used):
            return used, True
        return (None if stop == there.shape[2] else torch.arange(stop, device=there.device)), False

    def _elsewhere(
        self, rotary: Rotary, places: Places, queries: Tensor, tags: Mapping[str, Tensor], columns: Tensor | None
    ) -> Elsewhere:
        """Sinks and memory where `Places.head_queries` and `head_keys` say."""
        own, keys = places.coordinates, None

        def turned(positions: Tensor) -> tuple[Tensor, Tensor]:
            turn = rotary.at(self._axes(rotary, positions, tags, own, chosen))
            return turn if turn[0].ndim == 4 else (turn[0][:, None], turn[1][:, None])

        chosen = torch.arange(self.pinned, device=queries.device) if columns is None else columns
        chosen = chosen[chosen < self.pinned]
        if places.head_keys is not None:
            keys = turned(places.head_keys)
        there = queries if own else queries[..., 0]
        who = None if bool((there >= 0).all()) else (there >= 0)[:, None, :, None]
        near = None if who is None or self.state.raw else turned(places.keys[:, :, : self.pinned])
        return Elsewhere(len(chosen), self._query_turn(rotary, queries.clamp_min(0), own), keys, who, near)

    def _axes(
        self, rotary: Rotary, positions: Tensor, tags: Mapping[str, Tensor], own: bool, columns: Tensor | None
    ) -> Tensor:
        """Positions [R, G, n] with the tokens' coordinates behind, [R, G, n, axes], where the rope has several."""
        if rotary.coordinates and own:
            where = tags.get("coordinates")
            if where is None:
                where = positions.new_zeros(*positions.shape, rotary.coordinates)
            where = where[:, :, : positions.shape[2], : rotary.coordinates].to(positions.dtype)
            heads = max(positions.shape[1], where.shape[1])
            rows = max(positions.shape[0], where.shape[0])
            where, positions = where.expand(rows, heads, *where.shape[2:]), positions.expand(rows, heads, -1)
            positions = torch.cat([positions[..., None], where], -1)
        return positions if columns is None else positions.index_select(2, columns)

    def _query_turn(self, rotary: Rotary, positions: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the fresh tokens, [R, 1, m, D]."""
        if rotary.coordinates and own:
            where = self.tags.get("coordinates")
            where = positions.new_zeros(*positions.shape, rotary.coordinates) if where is None else where
            where = where[: len(positions) if self.uniform else self.batch, ..., : rotary.coordinates]
            positions = torch.cat([positions.expand(len(where), -1)[..., None], where.to(positions.dtype)], -1)
        cos, sin = rotary.at(positions)
        return cos[:, None], sin[:, None]

    def _turned(self, layer: int, table: Table, x: Tensor, positions: Tensor, fresh: bool) -> Tensor:
        rotary = self.state.rotaries[self.state.geometry.rope[layer]]
        if rotary is None:
            return x
        if fresh:
            return rotary.rotate(x, *self._query_turn(rotary, positions, True))
        positions = positions if positions.ndim > 2 else positions[:, None]
        return rotary.rotate(x, *rotary.at(self._axes(rotary, positions, table.tags, positions.ndim < 4, None)))

    def _bias(
        self, layer: int, index: Tensor, everything: bool, places: Places, weight: Tensor | None,
        columns: Tensor | None, back: int | Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """What is added to the scores, [R, 1 or H_q, 1 or m, n] in the memory's dtype; None where nothing is."""
        g, causal = self.state.geometry, self.state.memory.inside == "causal"
        reach = g.reach[layer]
        within = places.reach if causal else None
        hides = not everything or (causal and self.m > 1) or reach is not None or within is not None
        if not hides and weight is None and g.alibi is None:
            return None
        allowed = (index != EMPTY)[:, :, None]
        if causal and self.m > 1:
            query, held = self.stream[:, None, :, None], index[:, :, None]
            allowed = allowed & (held <= query)
            if back is not None:
                slot = torch.arange(index.shape[2], device=g.device) if columns is None else columns
                if isinstance(back, Tensor):
                    near = back if columns is None else back.index_select(3, columns)
                else:
                    near = held >= query - back
                allowed = allowed & (near | (slot < self.pinned))
        apart = None
        if reach is not None or within is not None or g.alibi is not None:
            apart = self._apart(places, columns)
        if reach is not None and apart is not None:
            allowed = allowed & (apart < reach)
        if within is not None and apart is not None:
            slot = torch.arange(index.shape[2], device=g.device) if columns is None else columns
            allowed = allowed & ((apart <= within) | (slot < self.pinned))
        if self.counted is not None:
            allowed = allowed | ~allowed.any(-1, keepdim=True)
        groups = g.heads // g.kv_heads
        bias = torch.zeros((), dtype=g.dtype, device=g.device).where(allowed, -torch.inf)
        if weight is not None:
            weight = weight if columns is None else weight.index_select(2, columns)
            bias = bias + weight[:, :, None].to(g.dtype)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(groups, 1)
        if g.alibi is not None and apart is not None:
            apart = apart.repeat_interleave(groups, 1) if apart.shape[1] > 1 else apart
            bias = bias - g.alibi.to(g.device, g.dtype)[:, None, None] * apart
        return bias

    def _apart(self, places: Places, columns: Tensor | None) -> Tensor:
        """How far before each query every key stands, [R, G, m, n], sinks and memory where the query meets them."""
        apart = places.queries[:, None, :, None] - places.keys[:, :, None]
        if places.head_queries is not None:
            keys = places.keys[..., : self.pinned] if places.head_keys is None else places.head_keys
            head = places.head_queries[:, None, :, None] - keys[:, :, None]
            elsewhere = (places.head_queries >= 0)[:, None, :, None]
            apart = apart.expand(*torch.broadcast_shapes(apart.shape[:3], head.shape[:3]), -1).clone()
            apart[..., : self.pinned] = torch.where(elsewhere, head, apart[..., : self.pinned])
        return apart if columns is None else apart.index_select(3, columns)


def _merged(old: Table, new: Table, rows: slice, batch: int) -> Table:
    """A table after a step in which only `rows` took part."""
    if rows == slice(0, batch):
        return new
    old = old.widened(batch, new.index.shape[1])
    names = dict(old.parts())

    def into(name: str, part: Tensor) -> Tensor:
        whole = names.get(name)
        whole = part.new_zeros(batch, *part.shape[1:]) if whole is None else whole.clone()
        whole[rows] = part
        return whole

    parts = {name: into(name, part) for name, part in new.parts()}
    tags = {name.removeprefix("tags."): part for name, part in parts.items() if name.startswith("tags.")}
    return Table(parts["index"], parts.get("weight"), parts.get("merged"), tags, new.mine)
