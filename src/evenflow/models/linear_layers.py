"""Layers whose memory is a matrix, in `transformers` models: their states, kept by the session and taken back by it.

A gated delta layer (Qwen3-Next, Qwen3.5) carries the last inputs of a short convolution and one matrix a head. The
model asks a cache for both; here the cache is a sheet for one call, which reads the states of before and writes new
ones, so that nothing changes until the call has ended well. Source: Gated DeltaNet, arXiv 2412.06464.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASS = "GatedDeltaNet"  # what the classes of such layers are called, after the name of the model
# By layer: the convolution's last inputs [B, channels, kernel], and the matrices [B, H, D_k, D_v].
States = dict[int, tuple[Tensor, Tensor]]


def linear_modules(tower: nn.Module) -> list[Any]:
    """The layers of `tower` that keep a matrix, in order."""
    return [module for module in tower.modules() if type(module).__name__.endswith(CLASS)]


def note_inputs(modules: list[Any]) -> None:
    """Make these modules, of a twin, write down what they read, wherever a `Sheet` goes with it."""

    def note(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        sheet = next((value for value in (*args, *options.values()) if isinstance(value, Sheet)), None)
        if sheet is not None and sheet.inputs is not None:
            sheet.inputs[module.layer_idx] = args[0] if args else options["hidden_states"]

    for module in modules:
        module.register_forward_pre_hook(note, with_kwargs=True)


class Sheet:
    """The cache of one call: states of before are read, never written to; what layers say comes into `after`.

    Keys and values pass through it, as those belong to the memory.
    """

    def __init__(self, before: States, log: bool) -> None:
        self.before, self.after = before, dict(before)
        self.inputs: dict[int, Tensor] | None = {} if log else None
        self._tails: dict[int, Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def has_previous_state(self, layer_idx: int | None = None) -> bool:
        return bool(self.before)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, **_: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        if layer_idx not in self.before:
            return None
        # A single token is written into it in place.
        self._tails[layer_idx] = self.before[layer_idx][0].clone()
        return self._tails[layer_idx]

    def update_conv_state(self, inputs: Tensor, layer_idx: int, conv_kernel_size: int, **_: Any) -> Tensor:
        tail = self._tails.get(layer_idx)
        if tail is None:
            tail = inputs.new_zeros(*inputs.shape[:2], conv_kernel_size)
        whole = torch.cat([tail, inputs], -1)
        self._tails[layer_idx] = whole[..., -conv_kernel_size:].clone()
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before[layer_idx][1] if layer_idx in self.before else None

    def update_recurrent_state(self, state: Tensor, layer_idx: int, **_: Any) -> Tensor:
        self.after[layer_idx] = (self._tails[layer_idx], state)
        return state


@dataclass(frozen=True, eq=False)
class Read:
    """A call of `m` tokens from position `start`, and what each layer read in it, [B, m, hidden]."""

    start: int
    m: int
    inputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Mark:
    """A moment that can be gone back to."""

    position: int
    states: States


class LinearStates:
    """What the matrix layers of one session keep. States are replaced and never written to, so copies share them.

    undo: of how many tokens, the last ones, the states can be taken back: by the states of some `undo` tokens ago and
    what the layers have read since, which they read again. 0 keeps neither.
    """

    position: int
    states: States
    _marks: list[Mark]
    _log: list[Read]

    def __init__(self, modules: list[Any], batch: int, undo: int) -> None:
        self.modules, self.batch, self.undo = modules, batch, undo
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of all states, and of what is kept for undoing."""
        sets = [self.states, *(mark.states for mark in self._marks)]
        tensors = [t for states in sets for pair in states.values() for t in pair]
        tensors += [t for read in self._log for t in read.inputs.values()]
        return sum({id(t): t.nbytes for t in tensors}.values())

    def sheet(self) -> Sheet:
        """What the next call of the model is given."""
        return Sheet(self.states, bool(self.undo))

    def take(self, sheet: Sheet, m: int) -> None:
        """Take over what a call of `m` tokens has left on its sheet."""
        if self.undo:
            self._log = [*self._log, Read(self.position, m, dict(sheet.inputs or {}))]
        self.states, self.position = sheet.after, self.position + m
        self._remember()

    def _remember(self) -> None:
        """Mark this moment when the last mark is `undo` tokens old, and let go of what no undoing needs."""
        if not self.undo:
            return
        if self.position - self._marks[-1].position >= self.undo:
            self._marks = [*self._marks, Mark(self.position, self.states)]
        while len(self._marks) > 1 and self._marks[1].position <= self.position - self.undo:
            self._marks = self._marks[1:]
        self._log = [read for read in self._log if read.start >= self._marks[0].position]

    def check_truncate(self, n: int) -> None:
        """Raise ValueError, with the reason, where the last `n` tokens cannot be taken back."""
        if n and not any(mark.position <= self.position - n for mark in self._marks):
            kept = self.position - self._marks[0].position if self._marks else 0
            raise ValueError(
                f"cannot undo {n} tokens, only {kept}: a layer's matrix does not tell what went into it, and this session "
                f"keeps what {self.undo} tokens need; open it with a larger undo, or fork before"
            )

    @torch.inference_mode()
    def truncate(self, n: int) -> None:
        """Take back the last `n` tokens: from the last mark before, layers read again what is left."""
        self.check_truncate(n)
        target = self.position - n
        if not n:
            return
        self._marks = [mark for mark in self._marks if mark.position <= target]
        mark, log = self._marks[-1], self._log
        self.position, self.states = mark.position, mark.states
        self._log = [read for read in log if read.start < mark.position]
        for read in log[len(self._log) :]:
            kept = min(read.m, target - read.start)
            if kept > 0:
                sheet = self.sheet()
                for module in self.modules:
                    hidden = read.inputs[module.layer_idx][:, :kept].clone()
                    module(hidden, sheet)
                self.take(sheet, kept)

    def fork(self) -> LinearStates:
        """An independent copy."""
        return copy.copy(self)

    def question(self) -> LinearStates:
        """A copy to ask, which keeps nothing for undoing."""
        twin = copy.copy(self)
        twin.undo, twin._marks, twin._log = 0, [], []
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.states = {}
        self._start(0)

    def _start(self, position: int) -> None:
        """Undoing begins here."""
        self.position = position
        self._marks = [Mark(position, self.states)] if self.undo else []
        self._log = []

    def reorder(self, rows: Tensor) -> None:
        """Row `i` continues what row `rows[i]` was; nothing before can be undone."""
        self.states = {
            layer: (conv[rows.to(conv.device)], matrix[rows.to(matrix.device)])
            for layer, (conv, matrix) in self.states.items()
        }
        self._start(self.position)

    def state_dict(self) -> dict[str, Tensor]:
        """All states by name, and the position; undoing begins anew."""
        named = {
            f"linear.{layer}.{name}": tensor.clone()
            for layer, pair in self.states.items()
            for name, tensor in zip(("conv", "matrix"), pair, strict=True)
        }
        return named | {"linear.position": torch.tensor(self.position)}

    def loaded(self, state: Mapping[str, Any], like: States) -> LinearStates:
        """A session that goes on from what `state_dict` gave. Raises ValueError where it does not fit.

        like: states of this model, by which shapes and dtypes are known.
        """
        position = int(state.get("linear.position", -1))
        names = {f"linear.{layer}.{name}" for layer in like for name in ("conv", "matrix")} if position else set()
        if position < 0 or set(state) != names | {"linear.position"}:
            raise ValueError(f"state of the matrix layers is {sorted(state)}; expected {sorted(names)} and a position")
        twin = copy.copy(self)
        twin.states = {}
        for layer, pair in like.items() if position else ():
            held = []
            for name, known in zip(("conv", "matrix"), pair, strict=True):
                tensor = state[f"linear.{layer}.{name}"]
                if tensor.shape != (self.batch, *known.shape[1:]) or tensor.dtype != known.dtype:
                    raise ValueError(
                        f"linear.{layer}.{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {known.dtype} "
                        f"{(self.batch, *known.shape[1:])}"
                    )
                held.append(tensor.to(known.device, copy=True))
            twin.states[layer] = (held[0], held[1])
        twin._start(position)
        return twin
