"""What one session keeps for attention, and the operations every session needs: append, undo, copy, save, forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import MemoryState
from .layout import Geometry, Memory
from .ring import Ring
from .rope import Rotary
from .step import Step, Track


class Held:
    """What one layer holds.

    window: rotated keys and values in slots `[null | sinks | window]`. head_keys: the keys of sinks as they came,
    un-rotated, [B, H_kv, S, D], for their positions move. head_at: the lag at which the window's copy of them is
    rotated now, None where it has to be made again.
    """

    def __init__(self, window: Ring, head_keys: Tensor) -> None:
        self.window, self.head_keys = window, head_keys
        self.head_at: tuple[int, ...] | None = None
        self._swapped: Tensor | None = None

    def turn_head(self, rotary: Rotary, cos: Tensor, sin: Tensor, slots: slice) -> None:
        """Rotate the head's keys into their window slots; their swapped channels are kept until the keys change."""
        into = self.window.keys.narrow(2, slots.start, slots.stop - slots.start)
        if self._swapped is None:
            self._swapped = rotary.swapped(self.head_keys)
        if cos.dtype == into.dtype:
            torch.mul(self.head_keys, cos, out=into).addcmul_(self._swapped, sin)
        else:
            into.copy_(torch.addcmul(self.head_keys * cos, self._swapped, sin))

    def head_changed(self) -> None:
        """Must be called whenever `head_keys` was written to."""
        self.head_at = self._swapped = None


class RingState(MemoryState):
    """A memory whose oldest token leaves: sinks and a ring of the newest tokens."""

    def __init__(self, memory: Memory, geometry: Geometry) -> None:
        self.memory, self.geometry = memory, geometry
        if memory.null == "learned" and geometry.sink_logits is None:
            raise ValueError(f"{memory.name} needs one logit per layer and head: give sink_logits=[layers, heads]")
        self.null = int(memory.null is not None or geometry.sink_logits is not None)
        self.head = self.null + memory.sink
        with torch.inference_mode(False):
            tracks: dict[Any, Track] = {}
            self.tracks: list[Track] = []
            self.held_layers: list[Held] = []
            for rope, reach in zip(geometry.rope, geometry.reach, strict=True):
                track = tracks.setdefault((rope, reach), self._track(rope, reach))
                self.tracks.append(track)
                self.held_layers.append(self._empty(track.size))
            logits = geometry.sink_logits
            self.null_logits = None if logits is None else logits.detach().to(geometry.device, torch.float64)
        self._rows = [0] * geometry.batch
        self._floor = [0] * geometry.batch  # the earliest position each row can still go back to
        self._time: Tensor | None = None
        self._current: Step | None = None

    def _track(self, rope: Any, reach: int | None) -> Track:
        geometry, window = self.geometry, self.memory.window
        rotary = None if rope is None else Rotary(rope, geometry.head_dim, geometry.dtype, geometry.device)
        sizes = [size for size in (window, None if reach is None else reach - 1) if size is not None]
        return Track(rotary, reach, min(sizes) if sizes else None)

    def _empty(self, size: int | None) -> Held:
        g, memory = self.geometry, self.memory
        window = Ring(memory.sink, self.head, size, g.batch, g.kv_heads, g.head_dim, g.value_dim, g.dtype, g.device)
        head_keys = torch.zeros(g.batch, g.kv_heads, self.head - self.null, g.head_dim, dtype=g.dtype, device=g.device)
        return Held(window, head_keys)

    # -- one step ------------------------------------------------------------------------------------------------

    def step(
        self, m: int, tags: Mapping[str, Tensor] | None = None, commit: bool = True, mask: Tensor | None = None,
        row: int | None = None,
    ) -> Step:  # fmt: skip
        if row is not None:
            raise ValueError(f"{self.memory.name} holds one copy; row={row} needs a memory with rows")
        self._step_size(m, mask, self.geometry.batch)
        return Step(self, m, self._checked(tags or {}, m, self.geometry.batch, mask, self._time), commit, mask)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the memory keeps, used or reserved."""
        return sum(t.nbytes for held in self.held_layers for t in self._tensors(held))

    @staticmethod
    def _tensors(held: Held) -> tuple[Tensor, ...]:
        return held.window.keys, held.window.values, held.head_keys

    def held(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        if not 0 <= layer < self.geometry.layers or not 0 <= row < self.geometry.batch:
            raise ValueError(
                f"no layer {layer}, row {row}: there are {self.geometry.layers} layers and {self.geometry.batch} rows"
            )
        track, kept, position = self.tracks[layer], self.held_layers[layer], self._rows[row]
        sink = self.memory.sink
        lag = int(self.memory.place.lag(torch.tensor(position), self.memory.capacity))
        near = position - lag - (track.reach or position + 1)
        sinks = [s for s in range(min(sink, position)) if s > near]
        index = kept.window.index(torch.tensor([position], device=self.geometry.device))[0]
        oldest = 0 if track.size is None else position - track.size
        return sinks + sorted(j for j in index.tolist() if j >= max(sink, oldest))

    # -- undo, copy, forget --------------------------------------------------------------------------------------

    def _advanced(self, rows: list[int]) -> None:
        """Rows have consumed so many tokens now; a window that has wrapped keeps one token more than it shows."""
        sizes = [track.size for track in self.tracks if track.size is not None]
        wraps = self.memory.sink + min(sizes) + 1 if sizes else None
        self._floor = [
            floor if wraps is None or row <= wraps or row == before else row - 1
            for floor, row, before in zip(self._floor, rows, self._rows, strict=True)
        ]
        self._rows = rows

    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly.

        Possible while nothing that the earlier state needs was overwritten: always for the last token, and for any
        number as long as the window has not wrapped. Raises ValueError otherwise; the memory is then unchanged.
        """
        self._idle("truncate")
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or n > min(self._rows):
            raise ValueError(f"cannot undo {n!r} tokens; rows have consumed {self._rows}")
        spare = min(row - floor for row, floor in zip(self._rows, self._floor, strict=True))
        if n > spare:
            raise ValueError(
                f"cannot undo {n} tokens, only {spare}: newer tokens have overwritten what the window held then; "
                "fork before, or try with step(commit=False)"
            )
        self._rows = [row - n for row in self._rows]
        self._time = self._time if n == 0 else None  # of what is last now it was not kept
        for kept in self.held_layers:
            kept.head_changed()

    @torch.inference_mode(False)
    def fork(self) -> RingState:
        """An independent copy; what happens to one is never seen by the other."""
        self._idle("fork")
        twin = object.__new__(RingState)
        twin.__dict__.update(self.__dict__)
        twin.held_layers = [self._empty(track.size) for track in self.tracks]
        twin.load_state_dict(self.state_dict())
        return twin

    @torch.inference_mode(False)
    def reset(self, keep_sink: bool = False) -> None:
        """Forget everything, or with `keep_sink` everything but the first S tokens of each row."""
        self._idle("reset")
        sink = self.memory.sink
        self._rows = [min(row, sink) if keep_sink else 0 for row in self._rows]
        self._floor = [0] * len(self._rows)
        self._time = None
        for track, kept in zip(self.tracks, self.held_layers, strict=True):
            fresh = self._empty(track.size)
            if keep_sink:
                fresh.head_keys[:, :, :sink] = kept.head_keys[:, :, :sink]
                sinks = slice(self.null, self.null + sink)
                fresh.window.values[:, :, sinks] = kept.window.values[:, :, sinks]
            kept.__dict__.update(fresh.__dict__)

    @torch.inference_mode(False)
    def reorder(self, rows: Tensor) -> None:
        """Row `i` continues what row `rows[i]` was (beam search, best of several). rows: int64 [B]."""
        self._idle("reorder")
        batch = self.geometry.batch
        if tuple(rows.shape) != (batch,) or bool(((rows < 0) | (rows >= batch)).any()):
            raise ValueError(f"rows is {rows.tolist()}; expected {batch} row numbers from 0 to {batch - 1}")
        rows = rows.to(self.geometry.device)
        for kept in self.held_layers:
            for tensor in self._tensors(kept):
                tensor.copy_(tensor.index_select(0, rows))
            kept.head_changed()
        if self._time is not None:
            self._time = self._time[rows.to(self._time.device)]
        self._rows = [self._rows[row] for row in rows.tolist()]
        self._floor = [self._floor[row] for row in rows.tolist()]

    def seek(self, position: int) -> None:
        """Continue as if what is held had been reached at stream index `position`, later than now.

        The memory must be full (what it holds would otherwise not be what it holds at `position`). Window keys are
        turned by the difference, so the scores of all later queries are those of a stream that is that much longer.
        """
        self._idle("seek")
        shift, full = position - max(self._rows), self.memory.capacity
        if full is None or min(self._rows) < full or len(set(self._rows)) > 1 or shift < 0:
            raise ValueError(
                f"cannot seek from {self._rows} to {position}: rows must stand at one position, with a bounded memory "
                f"full ({full} tokens), and can only move forward"
            )
        for track, kept in zip(self.tracks, self.held_layers, strict=True):
            window = kept.window
            filled = window.keys[:, :, self.head :]
            if track.rotary is not None:
                cos, sin = track.rotary.span(shift, 1)
                turned = track.rotary.rotate(filled, cos / track.rotary.scale, sin / track.rotary.scale)
                filled.copy_(turned)
            for tensor in (window.keys, window.values):
                tensor[:, :, self.head :] = tensor[:, :, self.head :].roll(shift % window.slots, 2)
        self._floor = [floor + shift for floor in self._floor]
        self._rows = [position] * self.geometry.batch

    # -- save and resume -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later memory of the same shape needs to go on bit for bit: tensors and plain numbers."""
        self._idle("state_dict")
        state: dict[str, Any] = {"positions": self.positions, "floor": torch.tensor(self._floor)}
        if self._time is not None:
            state["time"] = self._time.clone()
        for layer, kept in enumerate(self.held_layers):
            used = self.head + min(kept.window.slots, max(max(self._rows) - self.memory.sink, 0))
            state[f"layers.{layer}.keys"] = kept.window.keys[:, :, :used].clone()
            state[f"layers.{layer}.values"] = kept.window.values[:, :, :used].clone()
            state[f"layers.{layer}.head_keys"] = kept.head_keys.clone()
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        self._idle("load_state_dict")
        names = {"positions", "floor"} | {f"layers.{n}.{part}" for n in range(len(self.tracks)) for part in PARTS}
        if not names <= set(state) <= names | {"time"}:
            raise ValueError(
                f"state does not fit: missing {sorted(names - set(state))}, unknown {sorted(set(state) - names)}"
            )
        rows, floor = (torch.as_tensor(state[name]).tolist() for name in ("positions", "floor"))
        if len(rows) != self.geometry.batch or len(floor) != len(rows) or min(rows) < 0:
            raise ValueError(f"state has positions {rows}; expected {self.geometry.batch} counts")
        fresh = []
        for layer, track in enumerate(self.tracks):
            kept = self._empty(track.size)
            kept.window.reserve(max(rows))
            used = self.head + min(kept.window.slots, max(max(rows) - self.memory.sink, 0))
            parts = (kept.window.keys[:, :, :used], kept.window.values[:, :, :used], kept.head_keys)
            for part, into in zip(PARTS, parts, strict=True):
                tensor = state[f"layers.{layer}.{part}"]
                if tensor.shape != into.shape or tensor.dtype != into.dtype:
                    raise ValueError(
                        f"layers.{layer}.{part} is {tensor.dtype} {tuple(tensor.shape)}; "
                        f"this memory holds {into.dtype} {tuple(into.shape)}"
                    )
                into.copy_(tensor)
            fresh.append(kept)
        self.held_layers = fresh
        self._rows, self._floor = rows, floor
        time = state.get("time")
        self._time = None if time is None else time.clone()


PARTS = ("keys", "values", "head_keys")
