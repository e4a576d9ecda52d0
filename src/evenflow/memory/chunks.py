"""A memory in an arena: chunks arrive together, and any answer to the five verbs decides what becomes of them.

One step, one layer: what leaves is decided (`Evict.keep`, once a chunk), what it leaves behind is folded
(`Fold.leave`), the fresh tokens take the free slots, everything gets its position (`Place.positions`), the queries
attend what they may see (`Recall`), and at the end of a committed step the fold sees what arrived (`Fold.arrive`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from .arena import Slots, Table
from .base import MemoryState
from .chunkstep import ChunkStep
from .fold import Dropped
from .layout import VERBS, Geometry, Memory
from .rope import Rotary
from .verbs import Store
from .view import EMPTY, FAR, View

if TYPE_CHECKING:
    from .question import Question

KINDS = ("evict", "place")  # answers with one set of tensors a table; the others have one a layer


class ArenaState(MemoryState):
    """A memory whose answers decide freely what is held, layer by layer and head by head."""

    def __init__(self, memory: Memory, geometry: Geometry) -> None:
        self.memory, self.geometry = memory, geometry
        if memory.recompute:
            raise ValueError(f"{memory.name}: re-computation goes with the oldest token leaving, nothing else")
        self.batch = geometry.batch * memory.rows
        # Keys are stored rotated where they never turn again and nobody asks what they were.
        asked = (type(memory.fold) is not Dropped or memory.retrieves) and not memory.fold.rotated
        self.raw = memory.place.moves or memory.evict.content or asked
        self.rotaries = {
            rope: None if rope is None else Rotary(rope, geometry.head_dim, geometry.dtype, geometry.device)
            for rope in geometry.rope
        }
        logits = geometry.sink_logits
        self.null_logits = None if logits is None else logits.detach().to(geometry.device)[:, None, :, None, None]
        self._current: ChunkStep | None = None
        self._forget()
        self._open_store()  # here, so that a folder that cannot be used is told at once

    @torch.inference_mode(False)
    def _forget(self) -> None:
        g, memory = self.geometry, self.memory
        self.frame = memory.frame
        self._rows, self._floor, self._time = [0] * self.batch, 0, None
        like = torch.empty(0, dtype=g.dtype, device=g.device)
        self.slots = [Slots(self.batch, g.kv_heads, g.head_dim, g.value_dim, like) for _ in range(g.layers)]
        self.mine: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(g.layers)]
        empty = torch.full((self.batch if memory.rows > 1 else 1, 1, 0), EMPTY, device=g.device)
        differ = memory.evict.content or memory.fold.content
        self.tables = [Table(empty) for _ in range(g.layers if differ else 1)]
        self.pending: dict[int, tuple[Any, Tensor | None, dict[str, Tensor]]] = {}
        self.store: Store | None = None
        if self.frame is not None:
            self._own(self.frame)

    def _own(self, frame: int) -> None:
        """The answers' own tensors, as soon as it is known how long a frame is: those of every copy."""
        g, memory = replace(self.geometry, batch=self.batch), self.memory

        def made(verb: str) -> dict[str, Tensor]:
            made = getattr(memory, verb).tensors(g, frame)
            return {name: tensor.to(g.device) for name, tensor in made.items()}

        self.mine = [{verb: made(verb) for verb in ("fold", "recall")} for _ in range(g.layers)]
        self.tables = [Table(t.index, mine={verb: made(verb) for verb in KINDS}) for t in self.tables]

    def _open_store(self) -> None:
        """What the fold keeps outside of the arena, as soon as it is known how long a frame is."""
        if self.store is None and self.frame is not None:
            self.store = self.memory.fold.store(self.geometry, self.frame)

    def table(self, layer: int) -> int:
        """Which table tells what `layer` holds."""
        return layer if len(self.tables) > 1 else 0

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(
        self, m: int, tags: Mapping[str, Tensor] | None = None, commit: bool = True, mask: Tensor | None = None,
        row: int | None = None,
    ) -> ChunkStep:  # fmt: skip
        return self._open(m, tags, commit, mask, row, None)

    def recache(self, m: int, tags: Mapping[str, Tensor] | None = None, keep_sink: bool | None = None) -> ChunkStep:
        """A step whose `m` tokens are the last m of the stream computed anew; the position does not move.

        What is held of them is replaced. keep_sink: whether sinks that are older stay, or the first fresh tokens
        become the sinks (None: as the memory says). Source: LongLive, arXiv 2509.22622, section on KV-recache.
        """
        if m > min(self._rows):
            raise ValueError(f"cannot compute the last {m} tokens anew; rows have consumed {self._rows}")
        return self._open(m, tags, True, None, None, self.memory.keep_sink if keep_sink is None else keep_sink)

    def _open(
        self, m: int, tags: Mapping[str, Tensor] | None, commit: bool, mask: Tensor | None, row: int | None,
        recache: bool | None,
    ) -> ChunkStep:  # fmt: skip
        each, copies = self.geometry.batch, self.memory.rows
        if row is not None and not 0 <= row < copies:
            raise ValueError(f"there is no copy {row}; this memory has rows={copies}")
        batch = each if row is not None else self.batch
        self._step_size(m, mask, batch)
        rows = slice(0, self.batch) if row is None else slice(row * each, (row + 1) * each)
        before = None if self._time is None or recache is not None else self._time[rows]
        checked = self._checked(tags or {}, m, batch, mask, before)
        for name in (name for verb in VERBS for name in getattr(self.memory, verb).needs if name not in checked):
            raise ValueError(
                f"{self.memory.name} counts by the tag {name!r}; give it with every step, as tags={{{name!r}: ...}}"
            )
        frame = self.frame or self._frame_of(m, checked)
        if m % frame:
            raise ValueError(f"{m} tokens are not whole frames of {frame}; a step brings all tokens of a frame")
        return ChunkStep(self, m, frame, checked, commit, mask, rows, recache)

    def _frame_of(self, m: int, tags: Mapping[str, Tensor]) -> int:
        """How many tokens a frame has, from what the first step brings."""
        if "frame" in tags:
            first = tags["frame"][0]
            size = int((first == first[0]).sum())
            if m % size or not bool((first.reshape(-1, size) == first.reshape(-1, size)[:, :1]).all()):
                raise ValueError("the frame tags of the first step do not cut it into frames of equal length")
            return size
        return m // self.memory.chunk if m % self.memory.chunk == 0 else m

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values()) + (
            0 if self.store is None else self.store.nbytes
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        found: dict[str, Tensor] = {}
        for number, table in enumerate(self.tables):
            found |= {f"tables.{number}.{name}": part for name, part in table.parts()}
            for verb, own in table.mine.items():
                found |= {f"tables.{number}.{verb}.{name}": tensor for name, tensor in own.items()}
        for layer, (slots, mine) in enumerate(zip(self.slots, self.mine, strict=True)):
            found |= {f"layers.{layer}.keys": slots.keys, f"layers.{layer}.values": slots.values}
            for verb, own in mine.items():
                found |= {f"layers.{layer}.{verb}.{name}": tensor for name, tensor in own.items()}
        return found

    def held(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        g = self.geometry
        if not (0 <= layer < g.layers and 0 <= row < self.batch and 0 <= head < g.kv_heads):
            raise ValueError(
                f"no layer {layer}, row {row}, head {head}: there are {g.layers}, {self.batch} and {g.kv_heads}"
            )
        table = self.tables[self.table(layer)]
        if not table.index.shape[2]:
            return []
        view = self.between(layer)
        if not self.memory.evict.content:
            view.mine = dict(table.mine["evict"])
            keep = self.memory.evict.keep(view)
            if keep is not None:
                view.index = torch.where(keep, view.index, EMPTY)
        at = min(row, view.index.shape[0] - 1), min(head, view.index.shape[1] - 1)
        order, index = view.order()[at], view.index[at].clamp_min(-1)
        if table.merged is not None:
            merged = table.merged.expand_as(table.index)[
                min(row, table.index.shape[0] - 1), min(head, table.index.shape[1] - 1)
            ]
            index = torch.where(merged, -1, index)
        by = order.argsort(stable=True)[: int((order < FAR).sum())]
        there: list[int] = index[by].tolist()
        return there

    def between(self, layer: int, query: Tensor | None = None) -> View:
        """One layer between two steps, as an answer sees it: nothing is fresh but the queries of a question, if any.

        `mine` are the own tensors of fold and recall.
        """
        g, memory, frame, slots = self.geometry, self.memory, self.frame or 1, self.slots[layer]
        table = self.tables[self.table(layer)]
        consumed = torch.tensor(self._rows[: len(table.index)], device=g.device)
        return View(
            geometry=g, layer=layer, layers=g.layers, frame=frame, m=0 if query is None else query.shape[2],
            sink=memory.sink * frame, slots=memory.fold.slots(frame), window=self._window(frame), commit=query is None,
            recache=False, consumed=consumed, coming=torch.zeros_like(consumed), stream=consumed[:, None][:, :0],
            index=table.index, tags=table.tags, fresh_tags={}, left=consumed < 0, weight=table.weight, query=query,
            mine={name: tensor for own in self.mine[layer].values() for name, tensor in own.items()},
            causal=query is not None or memory.inside == "causal", by_head=memory.by_head, store=self.store, batch=self.batch,
            source=lambda: (slots.keys, slots.values),
        )  # fmt: skip

    def _window(self, frame: int) -> int | None:
        return None if self.memory.window is None else self.memory.window * frame

    # -- undo, copy, forget --------------------------------------------------------------------------------------

    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly: possible while nothing has left since, or was folded."""
        self._idle("truncate")
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or n > min(self._rows):
            raise ValueError(f"cannot undo {n!r} tokens; rows have consumed {self._rows}")
        if not n:
            return
        own = [
            *(own for mine in self.mine for own in mine.values()),
            *(o for t in self.tables for o in t.mine.values()),
        ]
        if any(own) or min(self._rows) - n < self._floor or n % (self.frame or 1):
            raise ValueError(
                f"cannot undo {n} tokens of {self.memory.name}: what they displaced or changed is gone, or they are no "
                "whole frames; fork before, or try with step(commit=False)"
            )
        rows = torch.tensor(self._rows, device=self.geometry.device)[:, None, None] - n
        for table in self.tables:
            first = rows if table.index.shape[0] > 1 else rows[:1]
            table.index = torch.where(table.index >= first, EMPTY, table.index)
        if self._time is not None:
            there = self.tables[0].index >= 0
            last = torch.where(there, self.tables[0].tags["time"], -torch.inf).amax((1, 2))
            self._time = last.expand(self.batch).clone()
        self._rows = [row - n for row in self._rows]
        self.pending = {}

    @torch.inference_mode(False)
    def fork(self) -> Self:
        return self._copy(None if self.store is None else self.store.fork())

    def snapshot(self) -> Self:
        """A copy that is only read, for a question: of the arena it has what the recall wants for one, of what lies
        outside it sees what is there now."""
        store = None if self.store is None else self.store.snapshot()
        wanted = [self.memory.recall.wanted(self.between(layer)) for layer in range(len(self.tables))]
        if any(one is None for one in wanted):
            return self._copy(store)
        self._idle("question")
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        columns = [one.flatten(0, 1).any(0).nonzero()[:, 0] for one in wanted if one is not None]
        twin.tables = [
            t.map(partial(Tensor.index_select, dim=2, index=c)) for t, c in zip(self.tables, columns, strict=True)
        ]
        twin.slots = [slots.only(columns[self.table(layer)]) for layer, slots in enumerate(self.slots)]
        twin._rows, twin.pending, twin.store = list(self._rows), {}, store
        return twin

    def _copy(self, store: Store | None) -> Self:
        self._idle("fork")
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._forget()
        twin.tables = twin.tables[: len(self.tables)]
        twin._take(self._state())
        twin.store = store
        return twin

    def question(self) -> Question:
        """A read-only question to what is held now; the stream may go on meanwhile, and any number be asked at once.

        Feed the question's tokens to what is returned, as to a memory: see `Question`.
        """
        from .question import Question

        return Question(self)

    @torch.inference_mode(False)
    def reset(self, keep_sink: bool = False) -> None:
        self._idle("reset")
        before, frame = self.__dict__.copy(), self.frame
        self._forget()
        if not keep_sink or not frame or not self.memory.sink:
            return
        sink = self.memory.sink * frame
        self.frame = frame
        self._own(frame)
        self._rows = [min(row, sink) for row in before["_rows"]]
        for mine, old in zip(self.mine, before["mine"], strict=True):
            for verb, own in mine.items():
                own |= getattr(self.memory, verb).kept(old[verb], sink)
        for number, table in enumerate(before["tables"]):
            mine = self.tables[number].mine
            self.tables[number] = table.map(lambda part: part[:, :, :sink].clone())
            self.tables[number].mine = mine
        for slots, old in zip(self.slots, before["slots"], strict=True):
            slots.keys, slots.values = old.keys[:, :, :sink].clone(), old.values[:, :, :sink].clone()

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        self._idle("reorder")
        if tuple(rows.shape) != (self.batch,) or bool(((rows < 0) | (rows >= self.batch)).any()):
            raise ValueError(f"rows is {rows.tolist()}; expected {self.batch} row numbers from 0 to {self.batch - 1}")
        if self.store is not None and len(set(rows.tolist())) < self.batch:
            raise ValueError(
                f"cannot go on from {rows.tolist()}: {self.memory.name} keeps blocks of every row outside of the memory, "
                "and rows may change places there but not become copies; fork the stream instead"
            )
        order = rows.to(self.geometry.device)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, order) if len(tensor) == self.batch and self.batch > 1 else tensor

        for number, table in enumerate(self.tables):
            self.tables[number] = table.map(moved)
            self.tables[number].mine = {v: {n: moved(t) for n, t in own.items()} for v, own in table.mine.items()}
        for slots in self.slots:
            slots.keys, slots.values = moved(slots.keys), moved(slots.values)
        self.mine = [{v: {n: moved(t) for n, t in own.items()} for v, own in mine.items()} for mine in self.mine]
        self._rows = [self._rows[row] for row in rows.tolist()]
        if self._time is not None:
            self._time = self._time[rows.to(self._time.device)]
        self.pending = {}

    @torch.inference_mode(False)
    def seek(self, position: int) -> None:
        """Continue as if what is held had been reached at stream index `position`: the window moves along, whole frames."""
        self._idle("seek")
        if self.store is not None:
            raise ValueError(f"cannot seek: what {self.memory.name} keeps outside of the memory stays where it was")
        shift = position - max(self._rows)
        if shift < 0 or len(set(self._rows)) > 1 or shift % (self.frame or 1):
            raise ValueError(
                f"cannot seek from {self._rows} to {position}: forward by whole frames, rows at one position"
            )
        start = self.memory.sink * (self.frame or 1)
        for number, table in enumerate(self.tables):
            late = (torch.arange(table.index.shape[2], device=table.index.device) >= start) & (table.index >= 0)
            if not self.raw:
                by = torch.tensor(shift // (self.frame or 1))
                for layer in range(self.geometry.layers):
                    rotary = self.rotaries[self.geometry.rope[layer]]
                    if self.table(layer) == number and rotary is not None:
                        axes = torch.cat([by[None], by.new_zeros(rotary.coordinates)]) if rotary.coordinates else by
                        keys = self.slots[layer].keys
                        cos, sin = rotary.at(axes)
                        keys.copy_(
                            torch.where(
                                late[..., None], rotary.rotate(keys, cos / rotary.scale, sin / rotary.scale), keys
                            )
                        )
            table.index = torch.where(late, table.index + shift, table.index)
        self._rows, self._floor = [position] * self.batch, self._floor + shift
        self.pending = {}

    # -- save and resume -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._idle("state_dict")
        state = self._state()
        if self.store is not None:
            state |= {f"store.{name}": tensor for name, tensor in self.store.state_dict().items()}
        return state

    def _state(self) -> dict[str, Any]:
        """What the arena itself needs to go on."""
        state: dict[str, Any] = {"positions": self.positions, "floor": torch.tensor([self._floor, self.frame or 0])}
        if self._time is not None:
            state["time"] = self._time.clone()
        state |= {name: tensor.clone() for name, tensor in self._tensors().items()}
        for number, (key, keep, mine) in self.pending.items():
            state[f"pending.{number}"] = torch.tensor([*key[0], *key[1:]])
            state |= {f"pending.{number}.keep": keep} if keep is not None else {}
            state |= {f"pending.{number}.mine.{name}": tensor for name, tensor in mine.items()}
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._idle("load_state_dict")
        fresh = object.__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        fresh._forget()
        fresh._take(state)
        self.__dict__.update(fresh.__dict__)

    def _take(self, state: Mapping[str, Any]) -> None:
        left = dict(state)
        try:
            positions = torch.as_tensor(left.pop("positions"))
            floor, frame = torch.as_tensor(left.pop("floor")).tolist()
            if tuple(positions.shape) != (self.batch,) or int(positions.min()) < 0 or frame < 0:
                raise ValueError(f"state has positions {positions.tolist()}; expected {self.batch} counts")
            if frame:
                if self.frame not in (None, frame):
                    raise ValueError(f"state has frames of {frame} tokens; this memory has frames of {self.frame}")
                self.frame = frame
                self._own(frame)
            self._rows, self._floor = positions.tolist(), floor
            time = left.pop("time", None)
            self._time = None if time is None else time.clone()
            for number, table in enumerate(self.tables):
                index = left.pop(f"tables.{number}.index")
                tags = {
                    n.rpartition(".")[2]: left.pop(n).clone()
                    for n in list(left)
                    if n.startswith(f"tables.{number}.tags.")
                }
                weight, merged = left.pop(f"tables.{number}.weight", None), left.pop(f"tables.{number}.merged", None)
                if index.dtype != torch.int64 or index.ndim != 3:
                    raise ValueError(
                        f"tables.{number}.index is {index.dtype} {tuple(index.shape)}; expected int64 of 3 axes"
                    )
                self.tables[number] = Table(index.clone(), weight, merged, tags, {
                    verb: _filled(table.mine[verb], left, f"tables.{number}.{verb}") for verb in KINDS if verb in table.mine
                })  # fmt: skip
            for layer, slots in enumerate(self.slots):
                for name in ("keys", "values"):
                    tensor, empty = left.pop(f"layers.{layer}.{name}"), getattr(slots, name)
                    columns = self.tables[self.table(layer)].index.shape[2]
                    if tensor.dtype != empty.dtype or tuple(tensor.shape) != (
                        *empty.shape[:2],
                        columns,
                        empty.shape[3],
                    ):
                        raise ValueError(
                            f"layers.{layer}.{name} is {tensor.dtype} {tuple(tensor.shape)}; this memory holds "
                            f"{empty.dtype} {(*empty.shape[:2], columns, empty.shape[3])}"
                        )
                    setattr(slots, name, tensor.clone())
                self.mine[layer] = {v: _filled(own, left, f"layers.{layer}.{v}") for v, own in self.mine[layer].items()}
            stored = {name.removeprefix("store."): left.pop(name) for name in list(left) if name.startswith("store.")}
            if stored:
                self._open_store()
                if self.store is None:
                    raise ValueError(f"state holds a store; {self.memory.name} keeps none")
                self.store.load_state_dict(stored)
            for name in [name for name in left if name.startswith("pending.") and name.count(".") == 1]:
                *key, m, recache = left.pop(name).tolist()
                number = int(name.partition(".")[2])
                start = f"{name}.mine."
                mine = {n.removeprefix(start): left.pop(n) for n in list(left) if n.startswith(start)}
                self.pending[number] = ((tuple(key), m, bool(recache)), left.pop(f"{name}.keep", None), mine)
        except KeyError as error:
            raise ValueError(f"state does not fit: missing {error}") from error
        if left:
            raise ValueError(f"state does not fit: unknown {sorted(left)}")


def _filled(own: dict[str, Tensor], state: dict[str, Any], start: str) -> dict[str, Tensor]:
    """An answer's own tensors from a saved state; those it has made since may be longer than at the start."""
    filled = {name: state.pop(f"{start}.{name}") for name in list(own)}
    for name, tensor in filled.items():
        if tensor.dtype != own[name].dtype or tensor.ndim != own[name].ndim:
            raise ValueError(f"{start}.{name} is {tensor.dtype} of {tensor.ndim} axes; expected {own[name].dtype}")
    return {name: tensor.clone() for name, tensor in filled.items()}
