"""What an answer to a verb may look at: one layer, in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import Geometry

EMPTY, FOLDED = -2, -1  # what stands in `View.index` for a slot that holds nothing, or something without one origin
FAR = torch.iinfo(torch.int64).max


@dataclass(eq=False)
class View:
    """One layer in one step, as an answer to a verb sees it.

    R is the batch size, or 1 while all rows hold the same; G the number of key heads, or 1 while all heads do.

    layer, layers: which one, of how many. frame: tokens in a frame; all other counts are in tokens. m: fresh tokens.
    sink, slots: sizes of the first two regions, columns 0..sink−1 and sink..sink+slots−1; the window has the others.
    window: its budget, None without a bound. commit: whether this call is kept. recache: whether it computes the last
    m tokens anew. consumed: int64 [R], tokens read before this step. coming: int64 [R],
    fresh tokens of each row that are real: m, or less where there is padding. stream: int64 [R, m], stream index of the fresh
    tokens. index: int64 [R, G, n], stream index of what each column holds, EMPTY or FOLDED; in `Evict.keep` and
    `Fold.leave` the fresh tokens are the last m columns, afterwards they have slots like everybody. tags: per column,
    [R, G, n, …], 0 where unknown. fresh_tags: per fresh token, [R, m, …]. weight: float [R, G, n], added to scores
    (a merged token counts for several: log of their number); None: zero. left: bool [R], whether anything left the
    window in this chunk. query: un-rotated, [B, H_q, m, D]. mine: this answer's own tensors. shared: what layers tell
    later layers within this step. causal: whether fresh tokens see only what came before them; reached: then, what
    `Evict.reach` says, for the answers asked after it. by_head: whether heads come to hold different tokens. store: what
    the fold keeps outside of the arena. brought: un-rotated keys and values of the fresh tokens, [B, H_kv, m, …]. stored:
    keys and values as they lie in the slots, [B, H_kv, C, …], before this step writes there; never to be written to.
    """

    geometry: Geometry
    layer: int
    layers: int
    frame: int
    m: int
    sink: int
    slots: int
    window: int | None
    commit: bool
    recache: bool
    consumed: Tensor
    coming: Tensor
    stream: Tensor
    index: Tensor
    tags: Mapping[str, Tensor]
    fresh_tags: Mapping[str, Tensor]
    left: Tensor
    weight: Tensor | None = None
    query: Tensor | None = None
    null: Tensor | None = None
    mine: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    causal: bool = False
    by_head: bool = False
    reached: int | Tensor | None = None
    store: Any = None
    batch: int = 1
    columns: Tensor | None = None
    brought: tuple[Tensor, Tensor] | None = None
    stored: tuple[Tensor, Tensor] | None = None
    every: Callable[[str], list[Tensor]] = lambda name: []
    source: Callable[[], tuple[Tensor, Tensor]] | None = None
    turn: Callable[[Tensor, Tensor, bool], Tensor] | None = None
    writer: Callable[..., None] | None = None

    @cached_property
    def column(self) -> Tensor:
        """int64 [n], the slot number of each column."""
        return torch.arange(self.index.shape[-1], device=self.index.device) if self.columns is None else self.columns

    # -- which columns are what ----------------------------------------------------------------------------------

    @property
    def apart(self) -> int:
        """How many key heads choose for themselves: all, where they come to hold different tokens; else 1, for all."""
        return max(self.index.shape[1], self.geometry.kv_heads if self.by_head else 1)

    @property
    def fresh(self) -> Tensor:
        """Bool [R, G, n]: fresh tokens."""
        return self.index >= self.consumed[:, None, None]

    @property
    def real(self) -> Tensor:
        """Bool [R, m]: fresh tokens that are no padding, which stands at the index of the next real token."""
        after = (self.consumed + self.coming)[:, None]
        return (self.stream < after) & (self.stream != torch.cat([self.stream[:, 1:], after], 1))

    @property
    def held(self) -> Tensor:
        """Bool [R, G, n]: columns that hold something from before this step."""
        return (self.index != EMPTY) & ~self.fresh

    @property
    def pinned(self) -> Tensor:
        """Bool [n]: columns of sinks and memory."""
        return self.column < self.sink + self.slots

    @property
    def origin(self) -> Tensor:
        """int64 [R, G, n]: where in the stream each column is from; what was folded, as if sinks and memory led it."""
        return torch.where(self.index == FOLDED, self.column, self.index)

    def order(self) -> Tensor:
        """int64 [R, G, n]: sorts columns into attention order: sinks, memory, window by stream index; nothing last."""
        start = self.sink + self.slots
        key = torch.where(self.column < start, self.column, self.index.clamp_min(0) + start)
        return torch.where(self.index == EMPTY, FAR, key)

    def rank(self) -> Tensor:
        """int64 [R, G, n]: place of each column in attention order, counted over what is there."""
        return self.order().argsort(dim=-1, stable=True).argsort(-1)

    def of_fresh(self, what: Tensor) -> Tensor:
        """int64 [R, m]: what [R, G, n] says of each fresh token, in the first head; those not there follow in a row."""
        if not self.m:
            return self.stream[:, :0]
        index, what = self.index[:, 0], what[:, 0].expand(self.index.shape[0], -1)
        number, column = index - self.consumed[:, None], torch.arange(self.m, device=index.device)
        number = torch.where(number < 0, self.m + 1, number)  # padding may stand one behind the last real token
        found = what.new_full((len(index), self.m + 2), -1).scatter_reduce(-1, number, what, "amax")
        found = found.gather(-1, self.stream - self.consumed[:, None])
        last = (found - column).amax(-1, keepdim=True)
        return torch.where(found >= 0, found, last + column)

    def lost(self) -> Tensor | None:
        """int64 [R, m]: how many window tokens have left between the start of a causal step and each query; None: none."""
        if self.reached is None or self.m == 1:
            return None
        distance = self.stream[:, :, None] - self.index[:, 0, None]
        seen = distance <= self.reached if isinstance(self.reached, int) else self.reached[:, 0]
        lost = (~seen & (distance > 0) & (self.index[:, 0, None] >= 0) & ~self.pinned).sum(-1)
        return lost if bool(lost.any()) else None

    # -- keys and values -----------------------------------------------------------------------------------------

    @cached_property
    def _content(self) -> tuple[Tensor, Tensor]:
        assert self.source is not None, "an answer that is not `content` decides without keys"
        return self.source()

    @property
    def keys(self) -> Tensor:
        """Un-rotated keys of all columns, [B, H_kv, n, D]."""
        return self._content[0]

    @property
    def values(self) -> Tensor:
        """Values of all columns, [B, H_kv, n, D_v]."""
        return self._content[1]

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, n, D] rotated to positions int64 [R, n] or [R, G, n] on the time axis, the others taken from the tags.

        For tokens that are not the view's columns, with a rope of several axes: [R, G, n, axes].
        """
        assert self.turn is not None
        fresh = x is self.query or (self.brought is not None and x is self.brought[0])
        return self.turn(x, positions, fresh)

    def write(
        self, columns: Tensor, keys: Tensor | None = None, values: Tensor | None = None, *,
        index: Tensor | int | None = None, weight: Tensor | None = None, tags: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Put something into the arena's columns, int64 [k] (all rows and heads) or [R, G, k].

        keys (un-rotated) and values [B, H_kv, k, D]; index: what they hold from now on (default FOLDED for memory
        slots; others keep theirs); weight: float, broadcastable to [R, G, k]; tags: [R, G, k, …], those of `self.tags`
        that change.
        """
        assert self.writer is not None
        self.writer(self, columns, keys, values, index, weight, tags)
