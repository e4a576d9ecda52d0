"""The two ways a stream is read: through a memory of keys, or by running the model afresh for every token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..memory import Memory, MemoryState
from ..memory.chunks import ArenaState
from .decoder import Decoder
from .linear_layers import LinearStates

FRESH_TOKENS = 8192  # Tokens in one batch of re-computed windows: bounds the activations, not the result.


def unfit(memory: Memory) -> str | None:
    """Why text cannot be read through this memory; None where it can."""
    if memory.inside == "both":
        return "it is for chunks of video, whose tokens see each other both ways; those of a text see only what came before"
    if memory.rows > 1:
        return f"it keeps {memory.rows} copies, one for every denoising step, and a text is read once"
    if memory.frame != 1:
        return f"its tokens come in frames (frame={memory.frame}), and those of a text one by one (frame=1)"
    for verb in memory.verbs():
        for tag in getattr(memory, verb).needs:
            return f"it counts by the tag {tag!r}, which tokens of a text do not have; build it, and give tags with every step"
    return None


class Engine(Protocol):
    """What a stream needs of the way it is read. Every method leaves the engine as it was when it raises."""

    @property
    def positions(self) -> Tensor:
        """Tokens consumed by each row, int64 [B]."""

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None,
        last: bool,
        tags: Mapping[str, Tensor] | None = None,
        commit: bool = True,
    ) -> Tensor:
        """Consume ids [B, m], or features [B, m, hidden]; logits [B, m, V], or [B, 1, V] of the last column if `last`.

        tags: of each token, [B, m, …]. commit: False leaves no trace.
        """

    def fork(self) -> Engine:
        """An independent copy."""

    def question(self, ids: Tensor | None, mask: Tensor | None) -> Engine:
        """What answers questions from all that was consumed; ids [B, m] choose what memories that retrieve bring back."""

    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens."""

    def reset(self, keep_sink: bool = False) -> None:
        """Forget all, or all but the sinks."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class Attending:
    """Reads through a `MemoryState`: one pass over every token, in flat memory.

    Where a memory's rule is per step, a step is one token, as when it is written: so that any cut gives the same. What
    comes with tags is one step, as whoever knows what tokens are knows which belong together. linear: what layers keep
    that have a matrix in place of keys; None: the model has none.
    """

    def __init__(self, decoder: Decoder, state: MemoryState, linear: LinearStates | None = None) -> None:
        self.decoder, self.state, self.linear = decoder, state, linear

    @property
    def positions(self) -> Tensor:
        return self.state.positions

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (0 if self.linear is None else self.linear.nbytes)

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None,
        last: bool,
        tags: Mapping[str, Tensor] | None = None,
        commit: bool = True,
    ) -> Tensor:
        if self.state.memory.cut_free or ids.shape[1] == 1 or tags:
            return self.decoder.read(self.state, ids, mask, last, tags=tags, commit=commit, linear=self.linear)
        before = self.fork()
        if not commit:
            return before._stepwise(ids, mask, last)
        try:
            return self._stepwise(ids, mask, last)
        except BaseException:
            self.__dict__.update(before.__dict__)
            raise

    def _stepwise(self, ids: Tensor, mask: Tensor | None, last: bool) -> Tensor:
        pieces: dict[int, Tensor] = {}
        for column in range(ids.shape[1]):
            part = slice(column, column + 1)
            here = None if mask is None else mask[:, part]
            if here is None or bool(here.any()):
                logits = self.decoder.read(self.state, ids[:, part], here, last=True, linear=self.linear)
                if not last or column == ids.shape[1] - 1:
                    pieces[column] = logits
        nothing = torch.zeros_like(next(iter(pieces.values())))
        return torch.cat([pieces.get(column, nothing) for column in range(ids.shape[1])][-1 if last else 0 :], 1)

    def fork(self) -> Attending:
        return Attending(self.decoder, self.state.fork(), None if self.linear is None else self.linear.fork())

    def question(self, ids: Tensor | None, mask: Tensor | None) -> Attending:
        linear = None if self.linear is None else self.linear.question()
        if not isinstance(self.state, ArenaState) or not self.state.memory.retrieves:
            return Attending(self.decoder, self.state.fork(), linear)
        asked = self.state.question()
        if ids is not None:
            self.decoder.select(asked, ids, mask, linear)
        return Attending(self.decoder, asked, linear)

    def truncate(self, n: int) -> None:
        if self.linear is None:
            return self.state.truncate(n)
        if isinstance(n, int) and n > 0:
            self.linear.check_truncate(n)
        self.state.truncate(n)
        self.linear.truncate(n)

    def reset(self, keep_sink: bool = False) -> None:
        if self.linear is not None:
            if keep_sink:
                raise ValueError(
                    f"{self.decoder.name} has layers whose matrix cannot forget all but the sinks; reset without keep_sink"
                )
            self.linear.reset()
        self.state.reset(keep_sink)

    def reorder(self, rows: Tensor) -> None:
        """Row `i` continues what row `rows[i]` was. rows: int64 [B]."""
        self.state.reorder(rows)
        if self.linear is not None:
            self.linear.reorder(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.state.state_dict() | ({} if self.linear is None else self.linear.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.linear is None:
            return self.state.load_state_dict(state)
        own = {name: value for name, value in state.items() if name.startswith("linear.")}
        loaded = self.linear.loaded(own, self.decoder.like)
        self.state.load_state_dict({name: value for name, value in state.items() if name not in own})
        self.linear = loaded


class Recomputing:
    """Keeps token ids only: the first S and last W of each row are read from scratch for every token.

    The model runs with its own attention and positions from 0, so this is what the model itself says about its last
    tokens, at a cost per token that grows with the window.
    """

    def __init__(self, model: PreTrainedModel, memory: Memory, batch: int) -> None:
        assert memory.window is not None, "a memory that re-computes has a window"
        self.model, self.sink, self.span = model, memory.sink, memory.sink + memory.window
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.counts = [0] * batch

    @property
    def positions(self) -> Tensor:
        return torch.tensor(self.counts)

    @property
    def nbytes(self) -> int:
        return sum(8 * len(row) for row in self.rows)

    def read(
        self,
        ids: Tensor,
        mask: Tensor | None,
        last: bool,
        tags: Mapping[str, Tensor] | None = None,
        commit: bool = True,
    ) -> Tensor:
        if tags or ids.is_floating_point():
            raise ValueError("a memory that re-computes keeps token ids only; feed ids, without tags")
        after = self.fork()
        logits: Tensor | None = None
        windows: list[tuple[int, int, list[int]]] = []
        values = ids.tolist()
        for row, held in enumerate(after.rows):
            columns = range(ids.shape[1]) if mask is None else mask[row].nonzero()[:, 0].tolist()
            uncut = []
            for column in columns:
                held.append(values[row][column])
                after.counts[row] += 1
                if after.counts[row] <= self.span:
                    uncut.append(column)
                    continue
                if len(held) > self.span:
                    del held[self.sink]
                if not last or column == ids.shape[1] - 1:
                    windows.append((row, column, list(held)))
            if uncut:
                # As long as nothing has been cut away, one causal pass says the same as one pass per token.
                known = self.rows[row] + [values[row][column] for column in uncut]
                dense = self._model(torch.tensor([known]))[0, -len(uncut) :]
                logits = dense.new_zeros(*ids.shape, dense.shape[-1]) if logits is None else logits
                logits[row, uncut] = dense
        at_once = max(1, FRESH_TOKENS // self.span)
        for first in range(0, len(windows), at_once):
            some = windows[first : first + at_once]
            dense = self._model(torch.tensor([held for _, _, held in some]), logits_to_keep=1)[:, -1]
            logits = dense.new_zeros(*ids.shape, dense.shape[-1]) if logits is None else logits
            logits[[row for row, _, _ in some], [column for _, column, _ in some]] = dense
        assert logits is not None, "at least one token is real"
        if commit:
            self.rows, self.counts = after.rows, after.counts
        return logits[:, -1:] if last else logits

    def _model(self, ids: Tensor, **options: int) -> Tensor:
        accepted = inspect.signature(self.model.forward).parameters
        options = {name: value for name, value in options.items() if name in accepted}
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False, **options).logits
        if bool(logits.sum(dtype=torch.float32).isnan()):
            raise ValueError(f"{type(self.model).__name__} gives logits that are not numbers (NaN weights?)")
        return logits

    def fork(self) -> Recomputing:
        twin = copy.copy(self)
        twin.rows, twin.counts = [list(row) for row in self.rows], list(self.counts)
        return twin

    def question(self, ids: Tensor | None, mask: Tensor | None) -> Recomputing:
        return self.fork()

    def truncate(self, n: int) -> None:
        if not isinstance(n, int) or n < 0 or n > min(self.counts):
            raise ValueError(f"cannot undo {n!r} tokens; rows have consumed {self.counts}")
        for row, count in zip(self.rows, self.counts, strict=True):
            if n and count > len(row) and len(row) - n < self.span - 1:
                raise ValueError(
                    f"cannot undo {n} tokens: what they pushed out of the window is gone; fork before trying"
                )
        self.rows = [row[: len(row) - n] for row in self.rows]
        self.counts = [count - n for count in self.counts]

    def reset(self, keep_sink: bool = False) -> None:
        self.rows = [row[: self.sink] if keep_sink else [] for row in self.rows]
        self.counts = [len(row) for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        rows = {f"rows.{n}": torch.tensor(row, dtype=torch.int64) for n, row in enumerate(self.rows)}
        return {"positions": self.positions, **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        names = [f"rows.{n}" for n in range(len(self.rows))]
        if set(state) != {"positions", *names}:
            raise ValueError(f"state does not fit {len(names)} rows of token ids: it holds {sorted(state)}")
        self.rows = [state[name].tolist() for name in names]
        self.counts = state["positions"].tolist()
