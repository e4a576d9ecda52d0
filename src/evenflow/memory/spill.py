"""Everything that was read, off the device in blocks, and questions that bring back the blocks they need.

`Spilled` is the fold: every complete block of un-rotated keys and values is copied into a store, with its mean key to
find it by. `TopBlocks` is the recall that goes with it. Source: ReKV, arXiv 2503.00540, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arena import columns_of, gathered
from .store import Store
from .verbs import Fold, Place, Recall
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory
    from .verbs import Store as Outside


@dataclass(frozen=True)
class Spilled(Fold):
    """Every complete block of tokens is copied off the device, with its mean key to find it by.

    block: tokens of one, counted from behind the sinks; while it is not complete the window must hold it, so it cannot be
    longer than that. ram_bytes, disk, disk_bytes, device_bytes: see `Store`. What leaves the window later is in the store
    already. The index is kept in RAM: what is held on the device does not grow with the stream, and every layer of a
    question waits for one product on the host. Rows of a batch have blocks of their own. After `reset` the files of before
    stay, as a saved stream may name them.
    """

    block: int
    ram_bytes: int
    disk: str | None = None
    disk_bytes: int | None = None
    device_bytes: int = 0
    cut_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be 1 token or more")

    def suits(self, memory: Memory) -> None:
        if memory.rows > 1:
            raise ValueError(f"rows is {memory.rows}; blocks are those of one copy of a stream")
        if not memory.evict.in_order:
            raise ValueError(
                f"evict is {type(memory.evict).__name__}; tokens of a block must not leave before others of it, so take Oldest"
            )
        if memory.frame and memory.window is not None and memory.window * memory.frame < self.block - 1:
            raise ValueError(
                f"block is {self.block} tokens; the window, {memory.window * memory.frame}, loses some before it is complete"
            )

    def serves(self, geometry: Geometry) -> None:
        if any(rope is not None and rope.coordinates for rope in geometry.rope):
            raise ValueError(
                "blocks keep no coordinates, so a rope of several axes could not turn them; give it one axis"
            )

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        """shelf: int64 [B], which of a layer's shelves is this row's. spilled: int64 [B], up to which stream index."""
        rows = torch.arange(geometry.batch)
        return {"shelf": rows, "spilled": torch.zeros_like(rows)}

    def store(self, geometry: Geometry, frame: int) -> Outside:
        g = geometry
        return Store(
            g.layers * g.batch, g.device, ram_bytes=self.ram_bytes, disk=self.disk, disk_bytes=self.disk_bytes,
            device_bytes=self.device_bytes, index="ram",
        )  # fmt: skip

    def arrive(self, view: View) -> None:
        if view.recache:
            raise ValueError("blocks that were copied off the device never change; Spilled goes without `recache`")
        if Spilled not in view.shared:
            read = (view.consumed + view.coming - view.sink).clamp_min(0)
            stop = view.sink + read // self.block * self.block
            start = view.mine["spilled"].clamp_min(view.sink)
            view.shared[Spilled] = stop, start.tolist(), stop.expand_as(start).tolist(), view.mine["shelf"].tolist()
        stop, starts, stops, shelves = view.shared[Spilled]
        if starts == stops:
            return
        keys, values = self._tokens(view, stop, max(b - a for a, b in zip(starts, stops, strict=True)))
        means = keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(3)
        for row, (first, last) in enumerate(zip(starts, stops, strict=True)):
            count = (last - first) // self.block
            for at in range(keys.shape[2] - count, keys.shape[2]):
                view.store.put(
                    view.layer * view.batch + shelves[row], keys[row, :, at], values[row, :, at],
                    first=last - (keys.shape[2] - at) * self.block, index={"mean": means[row, :, at].flatten()},
                )  # fmt: skip
        view.mine["spilled"] = stop.expand_as(view.mine["spilled"])

    def _tokens(self, view: View, stop: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The last so many before `stop`, as blocks: [B, H_kv, blocks, block, D] and with D_v."""
        wanted = stop[:, None] + torch.arange(-tokens, 0, device=stop.device)
        known = view.shared.get((Spilled, "columns"))
        if known is None or known[0] is not view.index:  # one table for all layers, or one each
            columns, there = columns_of(view.index, wanted)
            due = wanted[:, None] >= view.mine["spilled"].clamp_min(view.sink)[: len(wanted), None, None]
            if not bool((there | ~due).all()):
                raise ValueError(
                    f"tokens of a block had left before it was complete; give a window of {self.block} tokens or more"
                )
            known = view.shared[Spilled, "columns"] = view.index, columns
        keys, values = (gathered(x, known[1]).unflatten(2, (-1, self.block)) for x in (view.keys, view.values))
        return keys, values


@dataclass(frozen=True)
class TopBlocks(Recall):
    """A question sees the sinks and the `size` blocks whose mean key is nearest to its mean query, oldest first.

    Layer by layer, by un-rotated vectors: the product of all query heads at once with the block's mean keys, each repeated
    for the heads that share it. by: "cosine" divides it by the length of these, so that large keys are not preferred.
    chunk_size: so many neighbouring blocks are taken or left together, by their mean score.
    The block that is not complete yet is one of them; nothing else of the window is seen. Blocks that the store has lost
    are missing, and it says so. Goes with the fold `Spilled`. answer_place: where it all stands then.
    """

    size: int
    chunk_size: int = 1
    answer_place: Place | None = None
    by: Literal["product", "cosine"] = "product"

    def __post_init__(self) -> None:
        if self.by not in ("product", "cosine"):
            raise ValueError(f"by is {self.by!r}; blocks are compared by 'product' or 'cosine'")
        if not 1 <= self.chunk_size <= self.size:
            raise ValueError(
                f"size is {self.size}, chunk_size {self.chunk_size}; take 1 block or more, in chunks of so many at most"
            )

    def suits(self, memory: Memory) -> None:
        if not isinstance(memory.fold, Spilled):
            raise ValueError(
                f"fold is {type(memory.fold).__name__}; TopBlocks answers from the blocks that `Spilled` made"
            )

    def wanted(self, view: View) -> Tensor:
        spilled = view.mine["spilled"].clamp_min(view.sink)[: len(view.index), None, None]
        return (view.index != EMPTY) & ((view.column < view.sink) | (view.index >= spilled))

    def retrieve(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.query is not None
        wide = torch.promote_types(view.query.dtype, torch.float32)
        query = view.query.to(wide).mean(2).unflatten(1, (view.geometry.kv_heads, -1)).sum(2).flatten(1)
        found = [self._of_row(view, row, query[row]) for row in range(view.batch)]
        longest = max(len(index) for _, _, index in found)
        short = [longest - len(index) for _, _, index in found]
        keys, values = (
            torch.stack([pad(row[n], (0, 0, 0, missing)) for row, missing in zip(found, short, strict=True)])
            for n in (0, 1)
        )
        index = [pad(row[2], (0, missing), value=EMPTY) for row, missing in zip(found, short, strict=True)]
        return keys, values, torch.stack(index)

    def _of_row(self, view: View, row: int, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What one row sees: keys [H_kv, n, D], values [H_kv, n, D_v], stream index [n]. query: [H_kv · D]."""
        at = min(row, len(view.index) - 1)
        read, spilled = int(view.consumed[at]), max(int(view.mine["spilled"][row]), view.sink)
        rest = torch.arange(spilled, max(read, spilled), device=query.device)
        sinks = torch.arange(min(view.sink, read), device=query.device)
        columns = columns_of(view.index[at : at + 1], torch.cat([sinks, rest])[None])[0]
        keys, values = (gathered(x[row : row + 1], columns)[0] for x in (view.keys, view.values))
        parts = [(keys[:, : len(sinks)], values[:, : len(sinks)], sinks)]
        last = keys[:, len(sinks) :], values[:, len(sinks) :], rest

        ids = torch.zeros(0, dtype=torch.int64)
        if view.store is not None:
            shelf = view.layer * view.batch + int(view.mine["shelf"][row])
            known = view.store.index(shelf)
            ids = known.ids
        chosen = torch.arange(len(ids) + (len(rest) > 0))
        if len(chosen) > self.size:
            scores = self.scores(known.tensors["mean"], query)
            if len(rest):
                own = self.scores(last[0].to(query.dtype).mean(1).flatten()[None], query)
                scores = torch.cat([scores, own.to(scores.device)])
            chosen = best_groups(scores, self.size, self.chunk_size).cpu()
        fetched = chosen[chosen < len(ids)]
        if len(fetched):
            brought = view.store.fetch(shelf, ids[fetched])
            if brought.ids:
                parts.append(brought.concatenated())
        if len(fetched) < len(chosen):
            parts.append(last)
        return (
            torch.cat([keys for keys, _, _ in parts], 1), torch.cat([values for _, values, _ in parts], 1),
            torch.cat([index for _, _, index in parts]),
        )  # fmt: skip

    def scores(self, means: Tensor, query: Tensor) -> Tensor:
        """How near mean keys [n, H_kv · D] are to a query [H_kv · D], the sum over the heads that share one: [n]."""
        products = means @ query.to(means.device)
        return products if self.by == "product" else products / means.norm(dim=-1).clamp_min(1e-30)


def best_groups(scores: Tensor, size: int, chunk_size: int = 1) -> Tensor:
    """Places of the `size` best of scores [n], ascending: in groups of neighbours, by their mean; of equals the first."""
    n = len(scores)
    if n <= size:
        return torch.arange(n, device=scores.device)
    group = torch.arange(n, device=scores.device) // chunk_size
    count = group.bincount()
    means = scores.new_zeros(len(count)).index_add(0, group, scores) / count
    taken = torch.zeros_like(count, dtype=torch.bool)
    taken[means.argsort(descending=True, stable=True)[: size // chunk_size]] = True
    return taken[group].nonzero()[:, 0]
