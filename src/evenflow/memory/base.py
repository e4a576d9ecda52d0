"""What every memory state can do, whatever it keeps its tokens in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor

from .layout import Geometry, Memory

TAGS = ("frame", "modality", "segment", "time", "coordinates", "route")


class MemoryState(ABC):
    """The memory of one stream (or of a batch of streams) in one model; `Memory.build` makes it.

    Rows of a batch may have consumed different numbers of tokens. Every tensor lives on `geometry.device`; a step
    writes in place and leaves no trace when it fails.
    """

    memory: Memory
    geometry: Geometry
    _rows: list[int]
    _time: Tensor | None
    _current: Any

    @abstractmethod
    def step(
        self, m: int, tags: Mapping[str, Tensor] | None = None, commit: bool = True, mask: Tensor | None = None,
        row: int | None = None,
    ) -> AbstractContextManager[Any]:  # fmt: skip
        """A context in which every layer attends once with `m` fresh tokens per row.

        tags: what is known of each token, under the names in `TAGS`; tensors of shape [m] or [B, m], coordinates with
        their axes behind. commit: False attends and leaves the memory as it was. mask: bool [B, m], False for columns
        that are padding: they are not stored and not counted, and their output means nothing. None: all are real.
        row: with `Memory.rows` copies, the one that attends; None: all of them, as one batch.

        The memory changes when the context ends without an error after every layer has attended, and at no other time.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the fresh queries over all they may see, in the current step.

        q [B, H_q, m, D], k [B, H_kv, m, D] un-rotated, v [B, H_kv, m, D_v], in the memory's dtype. Returns
        [B, H_q, m, D_v]. No gradient flows. Raises ValueError on a wrong shape, dtype or layer, RuntimeError outside
        a step or when a layer attends twice in one.
        """
        step = self._current
        if step is None:
            raise RuntimeError("attend was called outside a step; open one: `with memory.step(m): ...`")
        out: Tensor = step.attend(layer, q, k, v)
        return out

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors the memory keeps, used or reserved."""

    @abstractmethod
    def held(self, layer: int, row: int = 0, head: int = 0) -> list[int]:
        """Stream indices the next query of `row` can see in `layer` with key head `head`, in attention order.

        −1 stands for what was folded from several tokens.
        """

    @abstractmethod
    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly. Raises ValueError where that is no longer possible."""

    @abstractmethod
    def fork(self) -> Self:
        """An independent copy; what happens to one is never seen by the other."""

    @abstractmethod
    def reset(self, keep_sink: bool = False) -> None:
        """Forget everything, or with `keep_sink` everything but the first S tokens of each row."""

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Row `i` continues what row `rows[i]` was (beam search, best of several). rows: int64 [B]."""

    @abstractmethod
    def seek(self, position: int) -> None:
        """Continue as if what is held had been reached at stream index `position`, later than now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a later memory of the same shape needs to go on bit for bit: tensors and plain numbers."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""

    @property
    def position(self) -> int:
        """Tokens consumed so far. Rows of different age have no common position: then use `positions`."""
        if len(set(self._rows)) > 1:
            raise ValueError(f"rows are at different positions {self._rows}; read `positions`")
        return self._rows[0]

    @property
    def positions(self) -> Tensor:
        """Tokens consumed by each row, int64 [B]."""
        return torch.tensor(self._rows)

    def _idle(self, what: str) -> None:
        if self._current is not None:
            raise RuntimeError(f"{what} is not possible inside a step")

    def _step_size(self, m: int, mask: Tensor | None, batch: int) -> None:
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"a step takes a whole number of fresh tokens, 1 or more; got {m!r}")
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, m)):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; expected bool of shape ({batch}, {m})"
            )

    def _checked(
        self, tags: Mapping[str, Tensor], m: int, batch: int, mask: Tensor | None, before: Tensor | None
    ) -> dict[str, Tensor]:
        """Tags as tensors [B, m, …]. before: the time of the item before, float64 [B]; None: any will do."""
        checked = {}
        for name, value in tags.items():
            if name not in TAGS:
                raise ValueError(f"unknown tag {name!r}; a token's tags are {', '.join(TAGS)}")
            tag, behind = torch.as_tensor(value), int(name == "coordinates")  # axes that a token's own tag has
            if tag.ndim == 1 + behind and tag.shape[0] == m:
                tag = tag.expand(batch, *tag.shape)
            if tag.ndim != 2 + behind or tuple(tag.shape[:2]) != (batch, m):
                last = ", axes" * behind
                raise ValueError(
                    f"tag {name!r} has shape {tuple(tag.shape)}; expected ({m}{last or ','}) or ({batch}, {m}{last})"
                )
            checked[name] = tag
        if "time" in checked:
            checked["time"] = _in_order(checked["time"], mask, before)
        return checked

    def _clock(self, time: Tensor, rows: slice) -> Tensor:
        """The time of the last item of every row, float64 [B], after `time` [rows, m] was stored; −inf: not known."""
        known = self._time
        clock = time.new_full((len(self._rows),), -torch.inf) if known is None else known.to(time.device, copy=True)
        clock[rows] = time[:, -1]
        return clock


def _in_order(time: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """Times in seconds, float64 [B, m]; padding stands at the time of what precedes it, −inf where nothing does."""
    time = time.double()
    real = torch.ones_like(time, dtype=torch.bool) if mask is None else mask.to(time.device)
    start = time.new_full((len(time), 1), -torch.inf) if before is None else before.to(time.device)[:, None]
    latest = torch.cat([start, time.masked_fill(~real, -torch.inf)], 1).cummax(1).values
    for wrong, what in (
        (real & ~time.isfinite(), "time is no number"), (real & (time < latest[:, :-1]), "time runs backwards"),
    ):  # fmt: skip
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(f"{what} at row {row}, item {column}; give finite seconds that do not decrease")
    return latest[:, 1:]
