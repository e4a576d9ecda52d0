"""Tokens of a vision model on three axes: time, row and column, as multi-axis rotary embeddings place them.

A word stands at one number on all axes, one behind the largest number so far; a picture's tokens stand at numbers of
their own, which come as the tag `coordinates`. Source: M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1; interleaved in
Qwen3-VL, arXiv 2511.21631.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..memory import Absolute, Contiguous, Memory, MemoryState, Place, TextFirst, Timeless
from ..memory.chunks import ArenaState
from ..memory.layout import Geometry
from ..memory.place import ending_together
from ..memory.question import Question
from ..memory.verbs import Places
from ..memory.view import EMPTY, FAR, View

AXES, END = 3, 3  # of a token's coordinates (t, h, w, end) the last is the first free number behind it
VISION = 1
BEYOND = FAR // 4


def axes_of(rotary: nn.Module) -> tuple[int, ...] | None:
    """Which axis turns each pair of channels, as the rotary module itself says; None where all turn alike.

    The module is shown, in place of frequencies, the number of the axis that these would be of.
    """
    arrange, frequencies = getattr(rotary, "recomposition_frequencies", None), getattr(rotary, "inv_freq", None)
    if arrange is None or frequencies is None:
        return None
    pairs = frequencies.shape[0]
    shown = torch.arange(AXES)[:, None, None, None].expand(AXES, 1, 1, pairs).clone()
    return tuple(arrange(shown)[0, 0, :pairs].tolist())


class AsTold(Place):
    """Tokens stand at their coordinates, wherever the stream has come to."""

    moves: ClassVar[bool] = False

    def serves(self, geometry: Geometry) -> None:
        if geometry.alibi is not None or any(reach is not None for reach in geometry.reach):
            raise ValueError("on several axes there is no distance that ALiBi, or a model's own window, could use")

    def positions(self, view: View) -> Places:
        return Places(*_keys_and_queries(view, _told(view)), coordinates=False)


class Closed(AsTold):
    """Tokens stand at their coordinates, except that behind a gap they stand directly behind what is before it.

    Tokens that were neighbours in the stream move together, so that the smallest number of those behind a gap is one more
    than the largest before it: for words, this is their place in the cache (StreamingLLM, section 3.2), and no number
    exceeds what held tokens take up. Ours: papers on streams of several axes renumber by kinds of tokens (`TextFirst`) or
    not at all. Let sinks end where a picture does; what is cut off of one moves.
    """

    moves: ClassVar[bool] = True

    def positions(self, view: View) -> Places:
        axes = [ending_together(axis, view) for axis in self._closed(view, _told(view)).unbind(-1)]
        keys, queries = _keys_and_queries(view, torch.stack(axes, -1))
        pinned = view.sink + view.slots
        if not pinned or view.reached is None or view.m == 1:
            return Places(keys, queries, coordinates=False)
        # Behind a gap that opens within a step the sinks come nearer, as if its tokens had come one by one.
        there = torch.cat([queries[..., :1], queries[..., 1:] - self._gap(view, keys)[..., None]], -1)
        return Places(keys, queries, there, keys[:, :, :pinned], coordinates=False)

    @staticmethod
    def _closed(view: View, told: Tensor) -> Tensor:
        """Numbers int64 [R, G, n, 3] without gaps."""
        order = view.order().argsort(dim=-1, stable=True)
        index, there = view.index.gather(-1, order), view.index.gather(-1, order) != EMPTY
        at = order[..., None].expand(*order.shape, AXES)
        told = told.gather(2, at)
        follows = torch.nn.functional.pad(index[..., 1:] == index[..., :-1] + 1, (1, 0)) & (index >= 0)
        block = (~follows).cumsum(-1) - 1
        low = told.amin(-1).masked_fill(~there, BEYOND)
        high = told.amax(-1).masked_fill(~there, -1)
        first = torch.full_like(low, BEYOND).scatter_reduce(-1, block, low, "amin")
        last = torch.full_like(high, -1).scatter_reduce(-1, block, high, "amax")
        extent = (last + 1 - first).clamp_min(0)
        base = (extent.cumsum(-1) - extent - first).gather(-1, block)
        closed = told + base[..., None]
        return torch.empty_like(closed).scatter_(2, at, closed)

    @staticmethod
    def _gap(view: View, keys: Tensor) -> Tensor:
        """int64 [R, m]: numbers between sinks and memory, and what each query sees of the window; 0 where none has left."""
        assert view.reached is not None
        index, stream = view.index[:, 0], view.stream
        apart = stream[:, :, None] - index[:, None]
        seen = apart <= view.reached if isinstance(view.reached, int) else view.reached[:, 0]
        seen = seen & (apart >= 0) & (index[:, None] >= 0) & ~view.pinned
        low = keys[:, 0, :, 1:].amin(-1)[:, None].masked_fill(~seen, BEYOND).amin(-1)
        head = view.pinned & (index != EMPTY)
        high = keys[:, 0, :, 1:].amax(-1).masked_fill(~head, -1).amax(-1)
        oldest = index[:, None].masked_fill(~seen, BEYOND).amin(-1)
        before = index.masked_fill(~head, -1).amax(-1, keepdim=True)
        return torch.where((oldest > before + 1) & (oldest < BEYOND), low - high[:, None] - 1, 0)


def _told(view: View) -> Tensor:
    """Coordinates of all columns, int64 [R, G, n, 3]."""
    told = view.tags["coordinates"][..., :AXES]
    return told.expand(*view.index.shape, AXES)


def _keys_and_queries(view: View, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Complete positions of columns and queries: before the three numbers, the axis of the memory's own time, which
    turns nothing."""
    queries = torch.stack([view.of_fresh(axis) for axis in numbers.unbind(-1)], -1)
    keys, queries = (torch.nn.functional.pad(x, (1, 0)) for x in (numbers, queries))
    return keys, queries


def on_axes(memory: Memory) -> tuple[Memory, int] | None:
    """A memory that places on three axes as `memory` does on one, and which of its axes is the model's first one.

    None where its way of placing is known on one axis only: then all axes turn with one number.
    """

    def lifted(place: Place | None) -> Place | None:
        kinds: dict[type, Place] = {Contiguous: Closed(), Absolute: AsTold(), Timeless: AsTold()}
        return kinds.get(type(place), place)

    if isinstance(memory.place, TextFirst):
        return memory, 0
    place, answer = lifted(memory.place), getattr(memory.recall, "answer_place", None)
    if not isinstance(place, AsTold) or memory.null or memory.recompute:
        return None
    recall: Any = memory.recall
    if memory.retrieves:
        recall = replace(recall, answer_place=lifted(answer or Contiguous()))
    return replace(memory, place=place, recall=recall), 1


def numbered(state: MemoryState, m: int, mask: Tensor | None, tags: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tags of a step, with the numbers of `m` tokens in `coordinates`, int64: (t, h, w, end), or what the memory counts by.

    tags: as given, [B, m, …]; without coordinates they are words. A fourth number is the first that is free behind a
    token, where that is more than its own say: of a picture that not all of is read. Raises ValueError for numbers that
    make no sense.
    """
    given = tags.get("coordinates")
    if given is not None and (given.is_floating_point() or bool((given < 0).any())):
        raise ValueError("coordinates are whole numbers from 0: (t, h, w) of each token")
    batch, device = state.geometry.batch, state.geometry.device
    if isinstance(state.memory.place, TextFirst):
        return {**tags, **({} if given is None else {"coordinates": _in_picture(given, tags.get("modality"))})}
    free = next_place(state).to(device)
    if given is None:
        count = torch.arange(m, device=device).expand(batch, m) if mask is None else mask.cumsum(1) - 1
        given = (free[:, None] + count.clamp_min(0))[..., None].expand(-1, -1, AXES)
    elif given.shape[-1] not in (AXES, AXES + 1):
        raise ValueError(f"coordinates have {given.shape[-1]} numbers a token; expected (t, h, w), or (t, h, w, end)")
    given = given.to(device, torch.int64)
    given, ends = given[..., :AXES], given[..., AXES:]
    behind = given.amax(-1) + 1
    behind = torch.maximum(behind, ends[..., 0]) if ends.shape[-1] else behind
    behind = behind if mask is None else behind.masked_fill(~mask, 0)
    end = torch.maximum(behind.cummax(1).values, free[:, None])
    return {**tags, "coordinates": torch.cat([given, end[..., None]], -1)}


def next_place(state: MemoryState) -> Tensor:
    """int64 [B]: the number of the next word, one more than the largest so far.

    Where the memory numbers what it holds by itself (`TextFirst`), any will do: how many tokens were read.
    """
    before = next_place(state.source) if isinstance(state, Question) else torch.zeros(state.geometry.batch).long()
    table = state.tables[0] if isinstance(state, ArenaState) else None
    if table is None or isinstance(state.memory.place, TextFirst):
        return state.positions
    if "coordinates" not in table.tags or not table.index.shape[2]:
        return before
    end = table.tags["coordinates"][..., END].masked_fill(table.index < 0, 0).amax((1, 2))
    return torch.maximum(before.to(end.device), end)


def _in_picture(given: Tensor, modality: Tensor | None) -> Tensor:
    """Rows and columns int64 [B, m, 2] within each picture, of (t, h, w) or of themselves."""
    if given.shape[-1] == 2:
        return given
    if given.shape[-1] != AXES:
        raise ValueError(f"coordinates have {given.shape[-1]} numbers a token; expected (t, h, w), or (row, column)")
    seen = torch.zeros(given.shape[:2], dtype=torch.bool) if modality is None else (modality == VISION).cpu()
    grid = given[..., 1:].cpu()
    goes_on = seen & torch.nn.functional.pad(seen[:, :-1], (1, 0))
    if bool((seen & ~goes_on & (grid[..., 0] != grid[..., 1])).any()):
        raise ValueError(
            "a picture begins in its middle; feed pictures whole, or give coordinates as (row, column) within them"
        )
    block = ((~goes_on).cumsum(1) - 1)[..., None].expand_as(grid)
    first = torch.full_like(grid, BEYOND).scatter_reduce(1, block, grid, "amin").gather(1, block)
    return torch.where(seen[..., None], grid - first, 0).to(given.device)


def grid_places(first: int, grid: tuple[int, int, int], merge: int = 2, interval: int = 1) -> Tensor:
    """Coordinates int64 [t · (h / merge) · (w / merge), 3] of a picture or video, as Qwen's `get_rope_index` numbers them.

    first: the number it begins at, `stream.next_place`. grid: (t, h, w) in patches, as the processor's `image_grid_thw`.
    merge: patches a token has on a side. interval: numbers from a frame to the next (Qwen2.5-VL's videos:
    tokens_per_second · seconds per frame). Positions from `get_rope_index`, [3, B, T], are coordinates once permuted:
    `positions.permute(1, 2, 0)`.
    """
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    if min(frames, rows, columns, interval) < 1 or first < 0:
        raise ValueError(
            f"grid {grid} of merge {merge} from {first} by {interval}: expected a token at least, and whole numbers"
        )
    axes = torch.meshgrid(torch.arange(frames) * interval, torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, AXES) + first


def single_axis(state: MemoryState) -> str | None:
    """Why coordinates cannot be used in this memory; None where they can."""
    if any(rope is not None and rope.axes for rope in state.geometry.rope):
        return None
    memory: Any = state.memory
    return (
        f"{memory.name} numbers tokens on one axis (place {type(memory.place).__name__}, fold "
        f"{type(memory.fold).__name__}), or the model has but one; feed without coordinates"
    )
