"""One step of a memory: where fresh tokens go, what each of them sees, and how it is computed.

Two ways compute the same thing. A decode step (one fresh token) writes one slot of the window in place and attends a
slice of the buffer: nothing is copied. A block of fresh tokens attends `[head | window | fresh]` under a mask that
gives every query exactly what it would see if tokens came one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import softmax_attention
from .channels import score_channels
from .rope import Rotary
from .verbs import Fresh, Recall

if TYPE_CHECKING:
    from .state import Held, RingState

QUERIES = 128  # Queries of a block that share one mask and one slice of keys: small wastes calls, large wastes scores.


@dataclass(frozen=True, eq=False)
class Track:
    """What layers with the same rotation and reach share: `size` is the number of window tokens they keep."""

    rotary: Rotary | None
    reach: int | None
    size: int | None


@dataclass(eq=False)
class Single:
    """One fresh token per row: worked out once per step and track, used by all its layers."""

    slot: int | Tensor  # where the token goes: one slot for all rows, or int64 [B]
    sinks: int | Tensor  # its place among the sinks for all rows (−1: none), or int64 [B]
    start: int  # the slots start..stop are attended
    stop: int
    lag: tuple[int, ...]
    turn: tuple[Tensor, Tensor] | None  # cosine and sine of the token, [R, 1, 1, D]
    head_turn: tuple[Tensor, Tensor] | None  # of sinks and memory, [R, 1, S + M, D]
    bias: Tensor | None  # [R or 1, 1 or H_q, 1, stop − start]


@dataclass(eq=False)
class Slice:
    """Queries first..last−1 of a block and the columns they attend."""

    first: int
    last: int
    window: bool  # whether held window slots can be seen; if not, fresh columns start at `low`
    low: int
    bias: Tensor  # [R, 1 or H_q, last − first, columns]


@dataclass(eq=False)
class Block:
    """Many fresh tokens per row: worked out once per step and track, used by all its layers."""

    index: Tensor  # int64 [R, m], stream index of each column (of the next counted one, for an uncounted column)
    used: int  # window slots that may hold something
    turn: tuple[Tensor, Tensor] | None  # of the fresh tokens, [R, 1, m, D]
    query_turn: tuple[Tensor, Tensor] | None  # of the queries as sinks and memory see them, [R, 1, m, D]
    head_turn: tuple[Tensor, Tensor] | None  # of sinks and memory, [S + M, D]
    slices: list[Slice]
    buffers: dict[str, Tensor] = field(default_factory=dict)


class Step:
    """The context that `RingState.step` opens."""

    def __init__(self, state: RingState, m: int, tags: Mapping[str, Tensor], commit: bool, mask: Tensor | None) -> None:
        self.state, self.m, self.tags, self.commit = state, m, tags, commit
        admitted = state.memory.admit.admitted(Fresh(m, state.geometry.batch, tags, mask))
        counted = mask if admitted is None else admitted if mask is None else admitted & mask
        self.counted = None if counted is None or bool(counted.all()) else counted.to(state.geometry.device)
        g = state.geometry
        self.shapes = (
            (g.batch, g.heads, m, g.head_dim),
            (g.batch, g.kv_heads, m, g.head_dim),
            (g.batch, g.kv_heads, m, g.value_dim),
        )
        self.rows = state._rows
        self.uniform = self.counted is None and len(set(self.rows)) == 1
        self.plans: dict[Track, Single | Block] = {}
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}
        self.signs: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Step:
        if self.state._current is not None:
            raise RuntimeError("a step is already open on this memory; steps do not nest")
        self.state._current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state._current = None
        if kind is not None or not self.commit:
            return self._undo()
        missing = [layer for layer in range(len(self.state.tracks)) if layer not in self.fresh]
        if missing:
            self._undo()
            raise RuntimeError(f"the step ended before layers {missing} attended; nothing was stored")
        if not bool(torch.stack(self.signs).isfinite().all()):
            self._undo()
            raise ValueError("keys or values hold NaN or infinity; nothing was stored")
        with torch.no_grad():
            for layer, kept in enumerate(self.state.held_layers):
                self._store(layer, kept)
        counts = [self.m] * len(self.rows) if self.counted is None else self.counted.sum(1).tolist()
        self.state._advanced([row + count for row, count in zip(self.rows, counts, strict=True)])
        if "time" in self.tags:
            self.state._time = self.state._clock(self.tags["time"], slice(None))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `RingState.attend`."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.attend(layer, q, k, v)
        self._check(layer, q, k, v)
        state = self.state
        track, kept = state.tracks[layer], state.held_layers[layer]
        plan = self.plans.get(track)
        if plan is None:
            if self.m == 1 and self.counted is None:
                plan = _single(state, track, kept, self.rows, self.uniform)
            else:
                plan = _block(state, track, kept, self)
            self.plans[track] = plan
        if self.counted is not None:
            # What padding holds must not matter, not even NaN.
            k = k.masked_fill(~self.counted[:, None, :, None], 0)
            v = v.masked_fill(~self.counted[:, None, :, None], 0)
        self.signs.append(sign(k, v))
        if isinstance(plan, Single):
            return self._attend_single(layer, plan, track, kept, q, k, v)
        return self._attend_block(layer, plan, track, kept, q, k, v)

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        g = self.state.geometry
        if not 0 <= layer < g.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {g.layers}")
        if layer in self.fresh:
            raise RuntimeError(f"layer {layer} attended twice in one step; every layer attends once")
        for name, tensor, shape in zip("qkv", (q, k, v), self.shapes, strict=True):
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
            if tensor.dtype != g.dtype:
                raise ValueError(f"{name} is {tensor.dtype}; this memory holds {g.dtype}")

    # -- one fresh token -----------------------------------------------------------------------------------------

    def _attend_single(
        self, layer: int, plan: Single, track: Track, kept: Held, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        state, window, rotary, slot = self.state, kept.window, track.rotary, plan.slot
        self.fresh[layer] = (k, v)
        self._store_single_sink(plan, kept, k)
        if not self.commit:
            rows = torch.arange(len(k), device=k.device)
            self.before[layer] = window.keys[rows, :, slot].clone(), window.values[rows, :, slot].clone()
        turned = k
        if rotary is not None and plan.turn is not None:
            both = rotary.rotate(torch.cat((q, k), 1), *plan.turn)
            q, turned = both.narrow(1, 0, q.shape[1]), both.narrow(1, q.shape[1], k.shape[1])
        if isinstance(slot, int):
            window.keys.narrow(2, slot, 1).copy_(turned)
            window.values.narrow(2, slot, 1).copy_(v)
        else:
            rows = torch.arange(len(k), device=k.device)
            window.keys[rows, :, slot] = turned[:, :, 0]
            window.values[rows, :, slot] = v[:, :, 0]
        if kept.head_at != plan.lag and state.head > state.null:
            slots = slice(state.null, state.head)
            if rotary is None or plan.head_turn is None:
                window.keys[:, :, slots] = kept.head_keys
            else:
                kept.turn_head(rotary, *plan.head_turn, slots)
            kept.head_at = plan.lag
        length = plan.stop - plan.start
        keys, values = window.keys.narrow(2, plan.start, length), window.values.narrow(2, plan.start, length)
        bias = plan.bias
        if state.null_logits is not None:
            bias = _with_null_logits(
                state.null_logits[layer], q.new_zeros(1, 1, 1, plan.stop) if bias is None else bias
            )
        bias = recalled(state.memory.recall, q, keys, bias)
        return softmax_attention(q, keys, values, bias, state.geometry.scale[layer], state.geometry.softcap)

    def _store_single_sink(self, plan: Single, kept: Held, k: Tensor) -> None:
        if isinstance(plan.sinks, int):
            if plan.sinks >= 0:
                kept.head_keys[:, :, plan.sinks] = k[:, :, 0]
                kept.head_changed()
            return
        row = (plan.sinks >= 0).nonzero()[:, 0]
        if len(row):
            kept.head_keys[row, :, plan.sinks[row]] = k[row, :, 0]
            kept.head_changed()

    # -- a block of fresh tokens ---------------------------------------------------------------------------------

    def _attend_block(
        self, layer: int, plan: Block, track: Track, kept: Held, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        state, window, g = self.state, kept.window, self.state.geometry
        self._store_sinks(plan, kept, k, v)
        turned = q
        if track.rotary is not None and plan.turn is not None:
            turned, k = track.rotary.rotate(q, *plan.turn), track.rotary.rotate(k, *plan.turn)
        self.fresh[layer] = (k, v)
        extra_q, extra_k = _head_channels(state, layer, plan, track, kept, q)
        extra, null, head, used = extra_q.shape[-1], state.null, state.head, plan.used
        width = g.head_dim + extra
        # The library's fused kernel wants values as wide as keys.
        value_width = max(width, g.value_dim) if extra else g.value_dim
        shape = (g.batch, g.kv_heads, head + used + self.m)
        if plan.buffers.get("keys") is None or plan.buffers["keys"].shape[-1] != width:
            plan.buffers = {"keys": k.new_zeros(*shape, width), "values": v.new_zeros(*shape, value_width)}
        keys, values = plan.buffers["keys"], plan.buffers["values"]
        if track.rotary is None:
            keys[:, :, null:head, : g.head_dim] = kept.head_keys
        keys[:, :, :head, g.head_dim :] = extra_k
        keys[:, :, head : head + used, : g.head_dim] = window.keys[:, :, head : head + used]
        keys[:, :, head + used :, : g.head_dim] = k
        values[:, :, : head + used, : g.value_dim] = window.values[:, :, : head + used]
        values[:, :, head + used :, : g.value_dim] = v
        query = torch.cat([turned, extra_q], -1) if extra else turned
        out = q.new_empty(g.batch, g.heads, self.m, g.value_dim)
        for part in plan.slices:
            stop = head + used + part.last
            if part.window:
                seen_keys, seen_values = keys[:, :, :stop], values[:, :, :stop]
            else:
                fresh = slice(head + used + part.low, stop)
                seen_keys = torch.cat([keys[:, :, :head], keys[:, :, fresh]], 2)
                seen_values = torch.cat([values[:, :, :head], values[:, :, fresh]], 2)
            piece = query[:, :, part.first : part.last]
            bias = part.bias
            if state.null_logits is not None and g.softcap is not None:
                bias = _with_null_logits(state.null_logits[layer], bias)
            seen = recalled(state.memory.recall, piece, seen_keys, bias)
            result = softmax_attention(piece, seen_keys, seen_values, seen, g.scale[layer], g.softcap)
            out[:, :, part.first : part.last] = result[..., : g.value_dim]
        return out

    def _store_sinks(self, plan: Block, kept: Held, k: Tensor, v: Tensor) -> None:
        """Fresh tokens that become sinks go to their (empty) slots at once: later queries of the block see them there."""
        state, sink = self.state, self.state.memory.sink
        if min(self.rows) >= sink:
            return
        kept.head_changed()
        if self.uniform:
            first = self.rows[0]
            count = min(sink - first, self.m)
            kept.head_keys[:, :, first : first + count] = k[:, :, :count]
            kept.window.values[:, :, state.null + first : state.null + first + count] = v[:, :, :count]
            return
        index = plan.index.expand(len(k), -1)
        row, column = (index < sink if self.counted is None else (index < sink) & self.counted).nonzero(as_tuple=True)
        kept.head_keys[row, :, index[row, column]] = k[row, :, column]
        kept.window.values[row, :, state.null + index[row, column]] = v[row, :, column]

    # -- the end of a step ---------------------------------------------------------------------------------------

    def _undo(self) -> None:
        """Empty or restore the slots that were written early; everything else is as it was."""
        state, sink = self.state, self.state.memory.sink
        for layer in self.fresh:
            kept, plan = state.held_layers[layer], self.plans[state.tracks[layer]]
            if isinstance(plan, Single):
                rows = torch.arange(state.geometry.batch, device=state.geometry.device)
                keys, values = self.before.get(layer, (0, 0))
                kept.window.keys[rows, :, plan.slot], kept.window.values[rows, :, plan.slot] = keys, values
                size = state.tracks[layer].size
                if layer not in self.before and size is not None:
                    # What the slot held was no longer visible, but going back one token would need it.
                    wrapped = [row > sink + size for row in self.rows]
                    state._floor = [
                        row if lost else floor
                        for row, lost, floor in zip(self.rows, wrapped, state._floor, strict=True)
                    ]
            for row, consumed in enumerate(self.rows):
                kept.head_keys[row, :, consumed:sink] = 0
                kept.window.values[row, :, state.null + consumed : state.null + sink] = 0
            kept.head_changed()

    def _store(self, layer: int, kept: Held) -> None:
        """Write the fresh tokens of a committed step into the window, folding what leaves."""
        state, track = self.state, self.state.tracks[layer]
        plan = self.plans[track]
        keys, values = self.fresh[layer]
        if isinstance(plan, Single):
            return
        sink, window = state.memory.sink, kept.window
        window.reserve(max(self.rows) + self.m)
        if self.uniform:
            # Whole runs of slots: at most two, as the window wraps at most once in what it can hold.
            end = self.rows[0] + self.m
            at = max(self.rows[0], sink, end - window.slots)
            while at < end:
                start = int(window.slot(torch.tensor(at)))
                run = min(end - at, state.head + window.slots - start)
                first = at - self.rows[0]
                window.keys[:, :, start : start + run] = keys[:, :, first : first + run]
                window.values[:, :, start : start + run] = values[:, :, first : first + run]
                at += run
            return
        index = plan.index.expand(len(keys), -1)
        counted = torch.ones_like(index, dtype=torch.bool) if self.counted is None else self.counted
        total = index[:, :1] + counted.sum(1, keepdim=True)
        row, column = (counted & (index >= sink) & (index >= total - window.slots)).nonzero(as_tuple=True)
        slots = window.slot(index[row, column])
        window.keys[row, :, slots] = keys[row, :, column]
        window.values[row, :, slots] = values[row, :, column]


def _with_null_logits(logits: Tensor, bias: Tensor) -> Tensor:
    """`bias` [R, 1 or H_q, c, n] with the null key's logit of every head in the first column."""
    bias = bias.expand(-1, len(logits), -1, -1).clone()
    bias[..., 0] = logits[:, None]
    return bias


def sign(keys: Tensor, values: Tensor) -> Tensor:
    """One number a layer, which tells at the end, with one look at all of them, whether anything stored is not finite."""
    # A product of many numbers in bfloat16 is slow on a CPU, one in float16 overflows.
    if keys.shape == values.shape and keys.dtype not in (torch.bfloat16, torch.float16):
        return torch.dot(keys.reshape(-1), values.reshape(-1))
    return keys.sum(dtype=torch.float32) + values.sum(dtype=torch.float32)


def recalled(recall: Recall, query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias, with everything masked that the recall answer takes away."""
    if type(recall).visible is Recall.visible:
        return bias
    seen = recall.visible(query, keys, None if bias is None else bias > -torch.inf)
    if seen is None:
        return bias
    hidden = torch.zeros((), dtype=query.dtype, device=query.device).where(seen, -torch.inf)
    return hidden if bias is None else bias + hidden


# -- planning: what is the same for all layers of a track --------------------------------------------------------------


def _single(state: RingState, track: Track, kept: Held, rows: list[int], uniform: bool) -> Single:
    memory, g, null, head, window = state.memory, state.geometry, state.null, state.head, kept.window
    sink = memory.sink
    for of, held in zip(state.tracks, state.held_layers, strict=True):
        if of is track:
            held.window.reserve(max(rows) + 1)
    position = torch.tensor(rows[:1] if uniform else rows, device=g.device)
    lag = memory.place.lag(position, memory.capacity)
    lags = tuple(lag.tolist())
    youngest, oldest = min(rows), max(rows)
    stop = null + oldest + 1 if oldest < sink else head + min(max(oldest - sink + 1, 0), window.slots)
    # Sinks out of a sliding layer's reach are the first slots of the buffer: without a null key they are left out.
    beyond = 0 if track.reach is None else max(0, oldest - min(lags) - track.reach + 1)
    start = min(beyond, sink) if uniform and not null else 0
    masked = start < min(beyond, sink) or (not uniform and youngest + 1 < sink + window.slots)
    bias = None
    if masked or g.alibi is not None:
        at, index = position[:, None], window.index(position + 1)[:, : max(stop - head, 0)]
        bias = _bias(state, track, kept, at, at, lag[:, None], index)[..., start:stop]
    turn = head_turn = None
    if track.rotary is not None:
        turn = _turn(track.rotary, position[:, None], rows[0] if uniform else None)
        if head > null:
            places = torch.arange(head - null, device=g.device) + lag[:, None]
            head_turn = _turn(track.rotary, places, lags[0] if uniform else None)
    if uniform:
        sinks = rows[0] if rows[0] < sink else -1
        slot = null + sinks if sinks >= 0 else int(window.slot(position))
        return Single(slot, sinks, start, stop, lags, turn, head_turn, bias)
    slot_of = torch.where(position < sink, null + position, window.slot(position.clamp_min(sink)))
    return Single(slot_of, torch.where(position < sink, position, -1), start, stop, lags, turn, head_turn, bias)


def _block(state: RingState, track: Track, kept: Held, step: Step) -> Block:
    memory, g, window, m, rows = state.memory, state.geometry, kept.window, step.m, step.rows
    position = torch.tensor(rows[:1] if step.uniform else rows, device=g.device)
    counted = step.counted
    if counted is None:
        last = index = position[:, None] + torch.arange(m, device=g.device)
    else:
        # An uncounted column stands where the next counted one will, and sees what was there before.
        last = position[:, None] + counted.cumsum(1) - 1
        index = torch.where(counted, last, last + 1)
    lag = memory.place.lag(index, memory.capacity)
    used = min(window.slots, max(max(rows) - memory.sink, 0))
    held = window.index(position)[:, :used]
    turn = query_turn = head_turn = None
    if track.rotary is not None:
        turn = query_turn = _turn(track.rotary, index, rows[0] if step.uniform else None)
        if state.head > state.null:
            head_turn = track.rotary.span(0, state.head - state.null)
            if bool(lag.any()):
                query_turn = _turn(track.rotary, index - lag, None)
    slices = []
    for first in range(0, m, QUERIES):
        stop = min(first + QUERIES, m)
        queries = slice(first, stop)
        sees_window = used > 0 and (track.size is None or bool((index[:, first] < position + track.size).any()))
        low = 0
        if track.size is not None and not sees_window:
            low = int((index >= index[:, first : first + 1] - track.size).any(0).to(torch.uint8).argmax())
        columns = index[:, low:stop] if counted is None else torch.where(counted, index, -1)[:, low:stop]
        columns = torch.where(columns < memory.sink, -1, columns)
        keys = torch.cat([held.expand(len(columns), -1), columns], 1) if sees_window else columns
        bias = _bias(state, track, kept, index[:, queries], last[:, queries], lag[:, queries], keys)
        if counted is not None:
            # Padding sees itself, so that its (meaningless) output is finite.
            own = torch.arange(first, stop, device=g.device)
            row, query = (~counted[:, queries]).nonzero(as_tuple=True)
            bias[row, :, query, bias.shape[-1] - (stop - own[query])] = 0
        slices.append(Slice(first, stop, sees_window, low, bias))
    return Block(index, used, turn, query_turn, head_turn, slices)


def _bias(state: RingState, track: Track, kept: Held, index: Tensor, last: Tensor, lag: Tensor, keys: Tensor) -> Tensor:
    """What is added to the scores of queries over `[head | keys]`: −∞ where nothing may be seen, and ALiBi's slope.

    index, last, lag: int64 [R, c], stream index of the queries, of the last counted token up to each, and how far
    sinks and memory are moved up for it. keys: int64 [R, n], stream indices, −1 for nothing. Returns
    [R, 1 or H_q, c, head + n] in the memory's dtype.
    """
    g, sink = state.geometry, state.memory.sink
    place = torch.arange(sink, device=index.device)
    head = (index - lag)[..., None] - place
    exists = place <= last[..., None]
    if track.reach is not None:
        exists = exists & (head < track.reach)
    distance = index[..., None] - keys[:, None]
    seen = (keys[:, None] >= 0) & (keys[:, None] <= last[..., None])
    if track.size is not None:
        seen = seen & (distance <= track.size)
    if state.null:
        exists = torch.cat([torch.ones_like(index, dtype=torch.bool)[..., None], exists], -1)
        head = torch.cat([torch.zeros_like(index)[..., None], head], -1)
    seen, distance = torch.cat([exists, seen], -1), torch.cat([head, distance], -1)
    if g.alibi is None:
        bias = torch.zeros(seen.shape, dtype=g.dtype, device=seen.device)[:, None]
    else:
        bias = -g.alibi.to(seen.device, g.dtype)[:, None, None] * distance[:, None]
    return bias.masked_fill_(~seen[:, None], -torch.inf)


def _turn(rotary: Rotary, places: Tensor, start: int | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `places` [R, n] as [R, 1, n, D]; `start` when they are simply start, start + 1, …"""
    cos, sin = rotary.at(places) if start is None else rotary.span(start, places.shape[1])
    return (cos[:, None], sin[:, None]) if start is None else (cos[None, None], sin[None, None])


def _head_channels(
    state: RingState, layer: int, plan: Block, track: Track, kept: Held, q: Tensor
) -> tuple[Tensor, Tensor]:
    """Channels that let one softmax score the head as every query of a block sees it.

    Sinks trail the window, so each query meets them at another rotation than the window's. Their scores travel in
    channels of their own, in which window and fresh keys are zero: extra_q [B, H_q, m, X], extra_k
    [B, H_kv, head, X], with extra_q · extra_k the scores of null key, sinks and memory (before `scale`).
    """
    g, null, head = state.geometry, state.null, state.head
    queries: list[Tensor] = []
    keys: list[Tensor] = []

    def add_scores(scores: Tensor, first: int) -> None:
        for_queries, for_keys = score_channels(scores, g.kv_heads, q.dtype)
        queries.append(for_queries)
        keys.append(q.new_zeros(g.batch, g.kv_heads, head, for_keys.shape[-1]))
        keys[-1][:, :, first : first + scores.shape[-1]] = for_keys

    if track.rotary is not None and plan.query_turn is not None and plan.head_turn is not None:
        turned = track.rotary.rotate(q, *plan.query_turn)
        head_keys = track.rotary.rotate(kept.head_keys, *plan.head_turn)
        if 2 * (head - null) <= g.head_dim:
            grouped = turned.reshape(g.batch, g.kv_heads, -1, g.head_dim).to(track.rotary.dtype)
            scores = grouped @ head_keys.to(grouped.dtype).transpose(-1, -2)
            add_scores(scores.reshape(g.batch, g.heads, -1, head - null), null)
        else:
            queries.append(turned)
            keys.append(torch.cat([head_keys.new_zeros(g.batch, g.kv_heads, null, g.head_dim), head_keys], 2))
    if state.null_logits is not None and g.softcap is None:
        logit = state.null_logits[layer] / g.scale[layer]
        add_scores(logit[None, :, None, None].expand(g.batch, -1, q.shape[2], 1), 0)
    if not queries:
        return q[..., :0], q.new_zeros(g.batch, g.kv_heads, head, 0)
    return torch.cat(queries, -1), torch.cat(keys, -1)
