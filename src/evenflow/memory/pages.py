"""Tokens off the device, in pages that belong to clusters: what is alike lies together and comes back together.

A page holds tokens of one cluster. The tokens of a cluster whose page is not full yet lie loose in host RAM; a full page
lies there in one piece and, when `ram_bytes` are full, as a block of a `Store`, least recently used first, which moves it
on to disk. A cluster has an owner: a row of the batch or, where key heads have clusters of their own, a key head of a row.
Source: the KV management unit of V-Rex, arXiv 2512.12284, section V (a memory map by cluster, so that one transfer moves
many tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .segments import StoreError
from .shelves import Pair
from .store import Snapshot, Store
from .view import EMPTY

OWNER = 2**32  # a cluster's key is owner · OWNER + cluster
FREE = -1
SLOTS = 64  # of a tray, at first
PIECE = 256  # tokens of one head that are attended together


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens by the key heads that want them.

    keys [N, n, D] and values [N, n, D_v] of pieces, each of one key head: head, int64 [N], row · H_kv + head. cluster:
    int64 [N, n / k], as neighbours share one, −1 where a piece has no more. index: int64 [N, n], in the stream, or EMPTY.
    """

    keys: Tensor
    values: Tensor
    head: Tensor
    cluster: Tensor
    index: Tensor


@dataclass(eq=False)
class Tray:
    """Slots for runs of tokens of one cluster: keys [S, heads, run, D], values [S, heads, run, D_v], in RAM.

    key: int64 [S], which cluster, FREE where there is nothing. members: int64 [S, run], stream index. used: int64 [S],
    when it was last wanted. seen: so many of the first slots are read by others too.
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    members: Tensor
    used: Tensor
    pinned: bool
    seen: int = 0

    @classmethod
    def empty(cls, heads: int, run: int, dims: tuple[int, int], dtype: torch.dtype, pinned: bool) -> Tray:
        """Without slots."""
        keys, values = (torch.zeros(0, heads, run, dim, dtype=dtype) for dim in dims)
        key = torch.zeros(0, dtype=torch.int64)
        return cls(keys, values, key, key[:, None].expand(-1, run), key, pinned)

    def put(self, keys: Tensor, values: Tensor, key: Tensor, members: Tensor, now: int) -> None:
        """Put runs into the lowest free slots; slots double when there are too few."""
        slots = (self.key == FREE).nonzero()[:, 0]
        have = len(self.key)
        if len(slots) < len(key):
            more = max(have, SLOTS, len(key) - len(slots))
            self.keys, self.values = (self._moved(x, have + more) for x in (self.keys, self.values))
            self.key, self.used = (pad(x, (0, more), value=FREE) for x in (self.key, self.used))
            self.members = pad(self.members, (0, 0, 0, more), value=EMPTY)
            self.seen, slots = 0, torch.cat([slots, torch.arange(have, have + more)])
        slots = slots[: len(key)]
        if len(slots) and int(slots[0]) < self.seen:
            self.keys, self.values, self.seen = self._moved(self.keys, have), self._moved(self.values, have), 0
        self.keys[slots], self.values[slots] = keys, values
        self.key[slots], self.members[slots], self.used[slots] = key, members, now

    def free(self, slots: Tensor) -> None:
        """Nothing is in these slots any more."""
        self.key[slots] = FREE

    def _moved(self, x: Tensor, slots: int) -> Tensor:
        moved = torch.empty(slots, *x.shape[1:], dtype=x.dtype, pin_memory=self.pinned)
        moved[: len(x)] = x
        return moved

    def twin(self) -> Tray:
        """The same, to go on by itself; what is here now is shared until one of them needs its slot for something else."""
        there = (self.key != FREE).nonzero()[:, 0]
        self.seen = max(self.seen, int(there[-1]) + 1 if len(there) else 0)  # an older twin may read more
        same = {name: getattr(self, name)[: self.seen] for name in ("keys", "values")}
        own = {name: getattr(self, name)[: self.seen].clone() for name in ("key", "members", "used")}
        return replace(self, **same, **own)

    def contents(self) -> dict[str, Tensor]:
        """What is in the slots, by name."""
        there = self.key != FREE
        return {name: getattr(self, name)[there] for name in ("keys", "values", "key", "members")}

    def filled(self, contents: Mapping[str, Tensor], start: str) -> Tray:
        """Another one, like this, with what `contents` gave, under names that begin with `start`."""
        tray = replace(self, keys=self.keys[:0], values=self.values[:0], key=self.key[:0], members=self.members[:0],
                       used=self.used[:0], seen=0)  # fmt: skip
        keys, values, key, members = (contents[start + name] for name in ("keys", "values", "key", "members"))
        tray.put(keys, values, key, members, 0)
        return tray


@dataclass(frozen=True, eq=False)
class Rows:
    """Single heads of runs: slot and head, and place, the key head of which row wants it, int64 [n]; cluster [n], members
    [n, run].
    """

    slot: Tensor
    head: Tensor
    place: Tensor
    cluster: Tensor
    members: Tensor

    def then(self, more: Rows) -> Rows:
        """These, and more behind them."""
        return Rows(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(more).values(), strict=True)))

    def where(self, there: Tensor) -> Rows:
        """Those of which `there`, bool [n], is True."""
        return Rows(*(x[there] for x in vars(self).values()))


@dataclass(eq=False)
class Drawer:
    """One layer: loose tokens, full pages in RAM, and those in the store.

    far_key, far_block: int64 [F], of which cluster a page in the store is, and its number there. far_members: int64
    [F, size]. Tensors of far pages are never changed in place.
    """

    loose: Tray
    full: Tray
    far_key: Tensor
    far_block: Tensor
    far_members: Tensor

    def twin(self) -> Drawer:
        """The same, to go on by itself."""
        return replace(self, loose=self.loose.twin(), full=self.full.twin())

    def contents(self) -> dict[str, Tensor]:
        """All that is in it, by name."""
        trays = {"loose": self.loose.contents(), "full": self.full.contents()}
        near = {f"{name}.{part}": x for name, tray in trays.items() for part, x in tray.items()}
        return near | {name: getattr(self, name) for name in ("far_key", "far_block", "far_members")}

    def filled(self, contents: Mapping[str, Tensor]) -> Drawer:
        """Another one, like this, with what `contents` gave. Raises ValueError when that was of another kind."""
        own = self.contents()
        wrong = [
            name for name, x in own.items()
            if name not in contents or (contents[name].dtype, contents[name].shape[1:]) != (x.dtype, x.shape[1:])
        ]  # fmt: skip
        if wrong:
            raise StoreError(f"{', '.join(wrong)} in the state are not of pages like these")
        return Drawer(
            self.loose.filled(contents, "loose."), self.full.filled(contents, "full."),
            contents["far_key"], contents["far_block"], contents["far_members"],
        )  # fmt: skip


class PageStore:
    """Pages of `size` tokens of all layers. One thread writes.

    groups: owners a row of the batch has, each with `heads` key heads. ram_bytes: most that full pages take in RAM before
    they go to the store `blocks`, None for no limit. `shelf`, int64 [B], tells which row of before each row is now. What
    `put` brings is taken in when the next step asks or puts, so that a step which fails can take it back.
    """

    def __init__(
        self, layers: int, groups: int, heads: int, dims: tuple[int, int], size: int, dtype: torch.dtype,
        blocks: Store | Snapshot, ram_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.groups, self.heads, self.size, self.blocks, self.ram_bytes = groups, heads, size, blocks, ram_bytes
        pinned, none = blocks.store.device.type == "cuda", torch.zeros(0, dtype=torch.int64)
        self.drawers = [
            Drawer(
                Tray.empty(heads, 1, dims, dtype, pinned),
                Tray.empty(heads, size, dims, dtype, pinned),
                none,
                none,
                none.reshape(0, size),
            )
            for _ in range(layers)
        ]
        self.waiting: list[tuple[int, tuple[Tensor, ...], Tensor]] = []
        self.taken = 0

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, layer: int, keys: Tensor, values: Tensor, cluster: Tensor, index: Tensor, shelf: Tensor) -> None:
        """Take in keys [B, H_kv, n, D] and values [B, H_kv, n, D_v], from any device; nothing may write to them any more.

        cluster, index: int64 [B, G, n], those without a cluster (−1) are left out.
        """
        self.waiting.append((layer, (keys, values, cluster, index), shelf))

    @property
    def mark(self) -> int:
        """How many times something was put; from here on it cannot be taken back."""
        self.settle()
        return self.taken

    def rewind(self, mark: int) -> None:
        """Take back what was put since `mark` was read."""
        del self.waiting[mark - self.taken :]

    @torch.inference_mode(False)
    def settle(self) -> None:
        """Take in what waits."""
        waiting, self.waiting = self.waiting, []
        for layer, tokens, shelf in waiting:
            keys, values, cluster, index = (x.unflatten(1, (self.groups, -1)).flatten(0, 1).cpu() for x in tokens)
            owner, place = (cluster[:, 0] >= 0).nonzero(as_tuple=True)  # [B · G, n]
            key = self._owners(shelf)[owner] * OWNER + cluster[owner, 0, place]
            self.taken += 1
            drawer = self.drawers[layer]
            drawer.loose.put(
                keys[owner, :, place, None],
                values[owner, :, place, None],
                key,
                index[owner, 0, place, None],
                self.taken,
            )
            self._fill(drawer, key.unique())
        if waiting:
            self._spill()

    def _owners(self, shelf: Tensor) -> Tensor:
        """Owner number of each row and group, int64 [B · G]."""
        return (shelf.cpu()[:, None] * self.groups + torch.arange(self.groups)).flatten()

    def _fill(self, drawer: Drawer, touched: Tensor) -> None:
        """Make full pages of those of the clusters `touched` that have enough loose tokens, oldest first."""
        loose = drawer.loose
        if not len(touched):
            return
        of = torch.searchsorted(touched, loose.key).clamp_max(len(touched) - 1)
        mine = touched[of] == loose.key
        count = torch.bincount(of[mine], minlength=len(touched))
        slots = (mine & (count[of] >= self.size)).nonzero()[:, 0]
        if not len(slots):
            return
        slots = slots[loose.members[slots, 0].argsort()]
        slots = slots[of[slots].argsort(stable=True)]  # by cluster, then by age
        count = count[count >= self.size]
        pages = count // self.size
        which = torch.arange(len(count)).repeat_interleave(pages)
        number = torch.arange(len(which)) - (pages.cumsum(0) - pages)[which]
        first = (count.cumsum(0) - count)[which] + number * self.size
        chosen = slots[first[:, None] + torch.arange(self.size)]  # [pages, size]
        keys, values = (x[chosen, :, 0].transpose(1, 2) for x in (loose.keys, loose.values))
        drawer.full.put(keys, values, loose.key[chosen[:, 0]], loose.members[chosen, 0], self.taken)
        loose.free(chosen.flatten())

    def _spill(self) -> None:
        """Least recently used pages go to the store until the others fit, an eighth at once."""
        if self.ram_bytes is None:
            return
        tray = self.drawers[0].full
        page = sum(x.shape[1:].numel() * x.element_size() for x in (tray.keys, tray.values))
        there = [(drawer.full.key != FREE).nonzero()[:, 0] for drawer in self.drawers]
        held = sum(map(len, there))
        over = held - self.ram_bytes // page
        if over <= 0:
            return
        if isinstance(self.blocks, Snapshot):
            raise StoreError("a snapshot is read-only; write to the memory that it was taken of")
        used = torch.cat([drawer.full.used[slots] for drawer, slots in zip(self.drawers, there, strict=True)])
        leaving = torch.zeros(held, dtype=torch.bool)
        leaving[used.argsort(stable=True)[: max(over, held // 8)]] = True
        for layer, (drawer, go) in enumerate(zip(self.drawers, leaving.split([*map(len, there)]), strict=True)):
            slots, full = there[layer][go], drawer.full
            first = full.members[slots, 0].tolist()
            ids = [
                self.blocks.put(layer, full.keys[slot], full.values[slot], first=at)
                for slot, at in zip(slots.tolist(), first, strict=True)
            ]
            drawer.far_block = torch.cat([drawer.far_block, torch.tensor(ids, dtype=torch.int64)])
            drawer.far_key = torch.cat([drawer.far_key, full.key[slots]])
            drawer.far_members = torch.cat([drawer.far_members, full.members[slots]])
            full.free(slots)

    # -- reading -------------------------------------------------------------------------------------------------

    def fetch(self, layer: int, wanted: Tensor, shelf: Tensor) -> list[Tokens]:
        """All tokens of the clusters that each key head wants, bool [B, H_kv, C], on the device: full pages, and loose ones.

        Oldest first, wherever they are. What the store has lost is missing, and it says so.
        """
        self.settle()
        drawer, owners = self.drawers[layer], self._owners(shelf)
        heads = wanted.cpu().unflatten(1, (-1, self.heads)).flatten(0, 1)  # [rows · groups, heads, C]
        place = torch.full((int(owners.max()) + 1,), -1).index_copy(0, owners, torch.arange(owners.shape[0]))
        full = self._wanted(drawer.full.key, drawer.full.members, heads, place)
        loose = self._wanted(drawer.loose.key, drawer.loose.members, heads, place)
        drawer.full.used[full.slot] = self.taken
        found = (
            self._pieces(
                full, (drawer.full.keys, drawer.full.values), self._brought(layer, heads, place), wanted.device
            ),
            self._pieces(loose, (drawer.loose.keys, drawer.loose.values), None, wanted.device),
        )
        return [tokens for tokens in found if tokens is not None]

    def _wanted(self, key: Tensor, members: Tensor, heads: Tensor, place: Tensor) -> Rows:
        """What of these runs is wanted. heads: bool [n, heads, C]; place: int64 [owners], which of the n each is, or −1."""
        owner, cluster = key // OWNER, key % OWNER
        known = (key != FREE) & (owner < place.shape[0]) & (cluster < heads.shape[2])
        at = known.nonzero()[:, 0]
        at = at[place[owner[at]] >= 0]
        which, head = heads[place[owner[at]], :, cluster[at]].nonzero(as_tuple=True)
        slot = at[which]
        return Rows(slot, head, place[owner[slot]] * self.heads + head, cluster[slot], members[slot])

    def _brought(self, layer: int, heads: Tensor, place: Tensor) -> tuple[Rows, Pair] | None:
        """Wanted pages of the store: what they are, and keys and values of all of them, [pages, heads, size, …]."""
        drawer = self.drawers[layer]
        if not drawer.far_key.shape[0]:
            return None
        rows = self._wanted(drawer.far_key, drawer.far_members, heads, place)
        pages, page = rows.slot.unique(return_inverse=True)
        found = self.blocks.fetch(layer, drawer.far_block[pages]) if len(pages) else None
        if found is None or not found.ids:
            return None
        there = torch.isin(drawer.far_block[pages], torch.tensor(found.ids))
        rows = replace(rows, slot=(there.cumsum(0) - 1)[page]).where(there[page])
        return rows, (torch.stack(found.keys), torch.stack(found.values))

    def _pieces(
        self, near: Rows, tray: Pair, brought: tuple[Rows, Pair] | None, device: torch.device
    ) -> Tokens | None:  # fmt: skip
        """Runs of each head one after the other, oldest first, cut into pieces of one length."""
        rows = near if brought is None else near.then(brought[0])
        if not rows.slot.shape[0]:
            return None
        count = torch.bincount(rows.place)
        length = min(max(1, PIECE // rows.members.shape[1]), int(count.max()))  # in runs
        pieces = -(-count // length)
        head = torch.arange(count.shape[0]).repeat_interleave(pieces)
        column = (torch.arange(head.shape[0]) - (pieces.cumsum(0) - pieces)[head])[:, None] * length + torch.arange(
            length
        )
        order = rows.members[:, 0].argsort()
        order = order[rows.place[order].argsort(stable=True)]
        at = order[((count.cumsum(0) - count)[head][:, None] + column).clamp_max(order.shape[0] - 1)]
        none = column >= count[head][:, None]
        flat = (rows.slot * self.heads + rows.head)[at.flatten()]
        far = None if brought is None else (at >= near.slot.shape[0]).flatten()
        keys, values = (
            _picked(x, flat, far, None if brought is None else brought[1][n], device)
            .unflatten(0, at.shape)
            .flatten(1, 2)
            for n, x in enumerate(tray)
        )
        cluster = rows.cluster[at].masked_fill(none, -1)
        index = rows.members[at].masked_fill(none[..., None], EMPTY).flatten(1)
        return Tokens(keys, values, *(x.to(device) for x in (head, cluster, index)))

    # -- copies and saving ---------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes on the device: pages of the store that were brought back and are kept there."""
        return self.blocks.nbytes

    def fork(self) -> PageStore:
        """An independent copy; full pages are shared, as they never change."""
        return self._with(self.blocks.fork())

    def snapshot(self) -> PageStore:
        """What is here now, for reading."""
        return self._with(self.blocks.snapshot())

    def _with(self, blocks: Store | Snapshot) -> PageStore:
        self.settle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.waiting, twin.blocks = [], blocks
        twin.drawers = [drawer.twin() for drawer in self.drawers]
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on; of the store, see there."""
        self.settle()
        state = {f"blocks.{name}": tensor for name, tensor in self.blocks.state_dict().items()}
        for layer, drawer in enumerate(self.drawers):
            state |= {f"{layer}.{name}": tensor for name, tensor in drawer.contents().items()}
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when that was of other pages."""
        if isinstance(self.blocks, Snapshot):
            raise StoreError("a snapshot is read-only; load into a memory of its own")
        drawers = []
        for layer, drawer in enumerate(self.drawers):
            start = f"{layer}."
            drawers.append(drawer.filled({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}))
        start = "blocks."
        self.blocks.load_state_dict({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)})
        self.drawers, self.waiting = drawers, []


def _picked(x: Tensor, flat: Tensor, far: Tensor | None, brought: Tensor | None, device: torch.device) -> Tensor:
    """Single heads of runs, [n, run, …] on the device: number `flat` of x [S, heads, run, …] or, where `far`, of `brought`."""
    if far is None or brought is None:
        picked = x.new_empty(len(flat), *x.shape[2:], pin_memory=device.type == "cuda")
        return torch.index_select(x.flatten(0, 1), 0, flat, out=picked).to(device, non_blocking=True)
    picked = x.new_empty(len(flat), *x.shape[2:], device=device)
    picked[~far.to(device)] = x.flatten(0, 1)[flat[~far]].to(device)
    picked[far.to(device)] = brought.flatten(0, 1)[flat[far].to(brought.device)].to(device)
    return picked
