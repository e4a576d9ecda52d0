"""A session of a hybrid network: a window memory and the matrices of its delta layers, under the same operations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ...memory import MemoryState
from ...memory.delta import DeltaState
from .network import Hybrid


@dataclass(frozen=True, eq=False)
class Mark:
    """A moment that can be gone back to. The window is a copy that nobody writes to; states are never written to."""

    window: MemoryState
    states: tuple[DeltaState, ...]
    free: Tensor

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + sum(state.nbytes for state in self.states)


@dataclass(frozen=True, eq=False)
class Fed:
    """A step that was read: its input x [B, m, dim], places [B, m, 3], mask, and positions [B] before it."""

    x: Tensor
    places: Tensor
    mask: Tensor | None
    before: Tensor

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.places.nbytes


class HybridSession:
    """One endless stream (or a batch of them) through a hybrid network.

    A window memory and a matrix a delta layer, which are as large after a frame as after a million. undo: how many of
    the last tokens `truncate` can take back for certain. As a matrix forgets nothing on demand, this takes a copy of
    everything every `undo` tokens, two of which are kept, and the inputs since; 0 keeps nothing and refuses.
    """

    states: tuple[DeltaState, ...]
    free: Tensor  # int64 [B], behind the largest place so far
    _marks: list[Mark]
    _log: list[Fed]

    def __init__(self, model: Hybrid, batch: int = 1, undo: int = 0) -> None:
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of tokens, 0 or more")
        config, weight = model.config, model.embedding.weight
        if "window" not in config.kinds:
            raise ValueError(
                f"{config.name} has no window layer, and a session counts by the window's memory; give it one"
            )
        if {*config.kinds} - {"window", "delta"}:
            raise ValueError(f"{config.name} has layers with fast weights, or that attend everything; see FrameSession")
        self.model, self.batch, self.undo = model, batch, undo
        self.window = config.memory.build(
            layers=config.kinds.count("window"), heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim,
            rope=config.rope, batch=batch, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.reset()

    # -- where it is -----------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens consumed so far. Raises ValueError when rows are at different positions; then use `positions`."""
        return self.window.position

    @property
    def positions(self) -> Tensor:
        """Tokens consumed by each row, int64 [B]."""
        return self.window.positions

    @property
    def nbytes(self) -> int:
        """Bytes of window, matrices, and what is kept for undoing."""
        return self._now().nbytes + sum(m.nbytes for m in self._marks) + sum(fed.nbytes for fed in self._log)

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def feed(
        self, tokens: Tensor, places: Tensor | None = None, mask: Tensor | None = None, *, commit: bool = True,
        last: bool = False,
    ) -> Tensor:  # fmt: skip
        """Read tokens; their logits [B, m, vocabulary], or with `last` those of each row's last one, [B, 1, vocabulary].

        tokens: ids, whole numbers [m] or [B, m], or features [m, dim] or [B, m, dim] in the model's dtype. places:
        [m, 3] or [B, m, 3], time, row and column; None: text, that goes on behind the largest place so far. mask: bool
        [B, m], False for padding, which is not read. commit: False reads and leaves no trace. Any cut gives the same.
        Raises ValueError for what does not fit, and is then as it was.
        """
        x, mask = self._checked(tokens, mask)
        places = self._placed(places, x, mask)
        hidden = self._read(x, places, mask, commit)
        if last:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            newest = (real * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
            hidden = hidden.take_along_dim(newest[:, None, None], 1)
        return self.model.logits(hidden)

    def ask(self, question: Tensor, count: int) -> Tensor:
        """The most likely `count` tokens after a question, int64 [B, count], of which this stream never learns.

        question: as `tokens` of `feed`, text, at least one token.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count is {count!r}; an answer has a whole number of tokens, 1 or more")
        twin = self.question()
        out = [twin.feed(question, last=True).argmax(-1)]
        while len(out) < count:
            out.append(twin.feed(out[-1], last=True).argmax(-1))
        return torch.cat(out, 1)

    def _read(self, x: Tensor, places: Tensor, mask: Tensor | None, commit: bool) -> Tensor:
        before = self.positions
        with self.window.step(x.shape[1], tags={"coordinates": places}, commit=commit, mask=mask):
            hidden, states = self.model(x, self.window.attend, self.states, mask)
        if not commit:
            return hidden
        self.states = states
        there = places.amax(2) if mask is None else places.amax(2).masked_fill(~mask, -1)
        self.free = torch.maximum(self.free, there.amax(1) + 1)
        if self.undo:
            # Copies, as whoever feeds may go on writing into the same buffer.
            kept = None if mask is None else mask.clone()
            self._log = [*self._log, Fed(x.clone(), places.clone(), kept, before)]
            self._remember()
        return hidden

    def _checked(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens [B, m, dim] and a mask, None where all are real."""
        weight = self.model.embedding.weight
        size = (self.model.config.dim,) if tokens.is_floating_point() else ()
        if tokens.ndim == 1 + len(size):
            tokens = tokens[None]
        if tokens.ndim != 2 + len(size) or len(tokens) != self.batch or not tokens.shape[1] or tokens.shape[2:] != size:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}; expected ids [{self.batch}, m] or features "
                f"[{self.batch}, m, {self.model.config.dim}], at least one token"
            )
        if tokens.is_floating_point():
            if tokens.dtype != weight.dtype:
                raise ValueError(f"features are {tokens.dtype}; the model's dtype is {weight.dtype}")
        elif not bool(((tokens >= 0) & (tokens < len(weight))).all()):
            raise ValueError(f"ids must be 0 to {len(weight) - 1}; got {int(tokens.min())} to {int(tokens.max())}")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != tokens.shape[:2] or not bool(mask.any()):
                raise ValueError(
                    f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(tokens.shape[:2])} with a token in it"
                )
            mask = None if bool(mask.all()) else mask
        return (tokens if size else self.model.embedding(tokens)), mask

    def _placed(self, places: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """int64 [B, m, 3] for the tokens x [B, m, dim]."""
        m = x.shape[1]
        if places is None:
            count = torch.arange(m, device=x.device).expand(len(x), m) if mask is None else mask.cumsum(1) - 1
            return (self.free[:, None] + count.clamp_min(0))[..., None].expand(-1, -1, 3)
        if places.is_floating_point() or places.shape[-2:] != (m, 3) or places.shape[:-2] not in ((), (len(x),)):
            raise ValueError(
                f"places are {places.dtype} {tuple(places.shape)}; expected whole numbers [{m}, 3], or a set a row"
            )
        return places.to(x.device, torch.int64).expand(len(x), -1, -1)

    # -- undo, copy, forget ----------------------------------------------------------------------------------------

    def _now(self) -> Mark:
        return Mark(self.window, self.states, self.free)

    def _remember(self, start: bool = False) -> None:
        """Take a mark when the last one is `undo` tokens old, and let go of what no undoing needs."""
        now = self.positions
        if start or bool((now - self._marks[-1].window.positions >= self.undo).all()):
            self._marks = [*self._marks, Mark(self.window.fork(), self.states, self.free)]
        while len(self._marks) > 1 and bool((self._marks[1].window.positions <= now - self.undo).all()):
            self._marks = self._marks[1:]
        self._log = [fed for fed in self._log if bool((fed.before >= self._marks[0].window.positions).all())]

    @torch.no_grad()
    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly: by going back to a mark and reading again what is left.

        What follows is bit for bit what follows where they never came, the rest having come in the same pieces. Raises
        ValueError, with the reason, where no mark is as old.
        """
        target = self.positions - n
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or bool((target < 0).any()):
            raise ValueError(f"cannot undo {n!r} tokens; rows have consumed {self.positions.tolist()}")
        if n == 0:
            return
        old = [number for number, mark in enumerate(self._marks) if bool((mark.window.positions <= target).all())]
        if not old:
            raise ValueError(
                f"cannot undo {n} tokens: a matrix does not tell what went into it, and this session keeps what {self.undo} "
                "tokens need; open it with a larger undo, fork before, or try with commit=False"
            )
        mark, log = self._marks[old[-1]], self._log
        self.window, self.states, self.free = mark.window.fork(), mark.states, mark.free
        self._marks = self._marks[: old[-1] + 1]
        self._log = [fed for fed in log if bool((fed.before < mark.window.positions).any())]
        for fed in log[len(self._log) :]:
            real = torch.ones(fed.x.shape[:2], dtype=torch.bool) if fed.mask is None else fed.mask.cpu()
            kept = real & (fed.before[:, None] + real.cumsum(1) <= target[:, None])
            stop = int((kept.any(0) * torch.arange(1, len(kept[0]) + 1)).max())
            if stop:
                mask = kept[:, :stop].to(fed.x.device)
                self._read(fed.x[:, :stop], fed.places[:, :stop], None if bool(mask.all()) else mask, True)

    def fork(self) -> HybridSession:
        """An independent copy; what happens to one is never seen by the other."""
        twin = copy.copy(self)  # marks, states and what was read are never written to
        twin.window = self.window.fork()
        return twin

    def question(self) -> HybridSession:
        """A copy to ask, which keeps nothing for undoing."""
        twin = self.fork()
        twin.undo, twin._marks, twin._log = 0, [], []
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.window.reset()
        self.states = cast(tuple[DeltaState, ...], self.model.empty(self.batch))
        self.free = torch.zeros(self.batch, dtype=torch.int64, device=self.model.embedding.weight.device)
        self._forget_marks()

    def _forget_marks(self) -> None:
        self._marks, self._log = [], []
        if self.undo:
            self._remember(start=True)

    # -- save and resume -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, except what undoing needs: that begins anew."""
        window = {f"window.{name}": value for name, value in self.window.state_dict().items()}
        return (
            window | {"free": self.free.clone()} | {name: tensor.clone() for name, tensor in self._matrices().items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        window = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
        expected = self._matrices() | {"free": self.free}
        rest = {name: value for name, value in state.items() if not name.startswith("window.")}
        if set(rest) != set(expected):
            raise ValueError(f"state holds {sorted(rest)} beside the window; expected {sorted(expected)}")
        for name, tensor in expected.items():
            if rest[name].shape != tensor.shape or rest[name].dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {rest[name].dtype} {tuple(rest[name].shape)}; this session holds {tensor.dtype} {tuple(tensor.shape)}"
                )
        self.window.load_state_dict(window)
        mine = {name: rest[name].to(tensor.device, copy=True) for name, tensor in expected.items()}
        self.states = tuple(
            DeltaState(mine[f"delta.{n}.matrix"], mine[f"delta.{n}.tail"]) for n in range(len(self.states))
        )
        self.free = mine["free"]
        self._forget_marks()

    def _matrices(self) -> dict[str, Tensor]:
        return {
            f"delta.{n}.{name}": getattr(state, name)
            for n, state in enumerate(self.states)
            for name in ("matrix", "tail")
        }
