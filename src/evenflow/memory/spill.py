"""Everything that was read, off the device in blocks, and questions that bring back the blocks they need.

`Spilled` is the fold: every complete block of un-rotated keys and values is copied into a store, with its mean key to
find it by. `TopBlocks` is the recall that goes with it. Source: ReKV, arXiv 2503.00540, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    block: tokens of one, counted from behind the sinks; whatever leaves the window later is in the store already. Sinks and
    the block that is not complete yet are kept on the device, so that keys may lie rotated in the window. ram_bytes, disk,
    disk_bytes, device_bytes: see `Store`. The index is kept in RAM: what is held on the device does not grow with the
    stream, and every layer of a question waits for one product on the host. Rows of a batch have blocks of their own.
    After `reset` the files of before stay, as a saved stream may name them.
    """

    block: int
    ram_bytes: int
    disk: str | None = None
    disk_bytes: int | None = None
    device_bytes: int = 0
    cut_free: ClassVar[bool] = True
    rotated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be 1 token or more")

    def suits(self, memory: Memory) -> None:
        if memory.rows > 1:
            raise ValueError(f"rows is {memory.rows}; blocks are those of one copy of a stream")

    def serves(self, geometry: Geometry) -> None:
        if any(rope is not None and rope.coordinates for rope in geometry.rope):
            raise ValueError(
                "blocks keep no coordinates, so a rope of several axes could not turn them; give it one axis"
            )

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        """shelf: int64 [B], which of a layer's shelves is this row's. spilled: int64 [B], up to which stream index.

        keys, values: [B, H_kv, n, …] un-rotated, of sinks and what was not spilled yet; index: int64 [B, n], which these are.
        """
        g, rows = geometry, torch.arange(geometry.batch)
        return {
            "shelf": rows, "spilled": torch.zeros_like(rows), "index": torch.empty_like(rows)[:, None][:, :0],
            "keys": torch.zeros(g.batch, g.kv_heads, 0, g.head_dim, dtype=g.dtype),
            "values": torch.zeros(g.batch, g.kv_heads, 0, g.value_dim, dtype=g.dtype),
        }  # fmt: skip

    def kept(self, mine: Mapping[str, Tensor], sink: int) -> dict[str, Tensor]:
        index = torch.where(mine["index"] < sink, mine["index"], EMPTY)
        return {"index": index, "keys": mine["keys"], "values": mine["values"]}

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
            view.shared[Spilled] = self._due(view)
        due: Due = view.shared[Spilled]
        assert view.brought is not None
        keys, values = (torch.cat([view.mine[n], x], 2) for n, x in zip(("keys", "values"), view.brought, strict=True))
        if due.blocks is not None:
            self._put(view, due, *(gathered(x, due.blocks).unflatten(2, (-1, self.block)) for x in (keys, values)))
        view.mine |= {
            "spilled": due.stop, "index": due.index, "keys": gathered(keys, due.rest), "values": gathered(values, due.rest)
        }  # fmt: skip

    def _due(self, view: View) -> Due:
        """What becomes of the tokens that are kept and those that have come, the same in all layers."""
        batch, device = len(view.mine["index"]), view.stream.device
        fresh = torch.where(view.real, view.stream, EMPTY).expand(batch, -1)
        there = torch.cat([view.mine["index"], fresh], 1)[:, None]
        read = (view.consumed + view.coming - view.sink).clamp_min(0)
        stop = (view.sink + read // self.block * self.block).expand(batch)
        counts = (stop - view.mine["spilled"].clamp_min(view.sink)) // self.block
        tokens = int(counts.max()) * self.block
        kept = torch.cat([torch.arange(view.sink, device=device), torch.arange(self.block - 1, device=device)])
        kept = kept + torch.where(torch.arange(len(kept), device=device) < view.sink, 0, stop[:, None])
        rest, found = columns_of(there, kept)
        blocks = columns_of(there, stop[:, None] + torch.arange(-tokens, 0, device=device))[0] if tokens else None
        one = batch == 1
        return Due(
            stop, counts.tolist(), stop.tolist(), view.mine["shelf"].tolist(), torch.where(found[:, 0], kept, EMPTY),
            rest[0, 0] if one else rest, blocks[0, 0] if one and blocks is not None else blocks,
        )  # fmt: skip

    def _put(self, view: View, due: Due, keys: Tensor, values: Tensor) -> None:
        """Complete blocks, keys [B, H_kv, blocks, block, D] and values, into the store; of each row the last `counts`."""
        means = keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(3)
        for row, (count, stop, shelf) in enumerate(zip(due.counts, due.stops, due.shelves, strict=True)):
            for back in range(count, 0, -1):
                view.store.put(
                    view.layer * view.batch + shelf, keys[row, :, -back], values[row, :, -back],
                    first=stop - back * self.block, index={"mean": means[row, :, -back].flatten()},
                )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Due:
    """What becomes of the tokens that are kept and those that have come. stop, stops: up to which stream index each row is
    spilled then. counts: complete blocks of each row. shelves: their shelf. index: of what is kept. rest, blocks: where it,
    and the complete blocks, stand among both, [k] or [B, 1, k]; None: there are none."""

    stop: Tensor
    counts: list[int]
    stops: list[int]
    shelves: list[int]
    index: Tensor
    rest: Tensor
    blocks: Tensor | None


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
        return torch.zeros_like(view.index, dtype=torch.bool)  # sinks and the last block are the fold's own

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
        known = view.mine["index"][row]
        there = (known != EMPTY).nonzero()[:, 0]
        index, sinks = known[there], int((there < view.sink).sum())
        keys, values = (view.mine[name][row].index_select(1, there) for name in ("keys", "values"))
        parts = [(keys[:, :sinks], values[:, :sinks], index[:sinks])]
        last = keys[:, sinks:], values[:, sinks:], index[sinks:]

        ids = torch.zeros(0, dtype=torch.int64)
        if view.store is not None:
            shelf = view.layer * view.batch + int(view.mine["shelf"][row])
            stored = view.store.index(shelf)
            ids = stored.ids
        chosen = torch.arange(len(ids) + (len(last[2]) > 0))
        if len(chosen) > self.size:
            scores = self.scores(stored.tensors["mean"], query)
            if len(last[2]):
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
