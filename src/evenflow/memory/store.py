"""Blocks of attention memory off the device: device → host RAM → disk, with an index of all of them in one place.

A block is the keys and values of a stretch of the stream in one layer. It is copied when put and never changed. It lies
in RAM until `ram_bytes` are full; then those least recently used are written to disk, synced, and only then leave RAM.
Blocks that were brought back stay on the device as long as `device_bytes` allow, least recently used first out.

What cannot be kept is lost, oldest first, and said: it leaves the index and stands in `lost` with the reason, and a
`StoreWarning` tells each reason once. The stream that feeds the store never sees an exception for it.

One thread writes (`put`, `drop`, `flush`); any thread may read, and `snapshot` is what stood in the store at one
moment. Source of the layout: ReKV, arXiv 2503.00540, section 3 (blocks, one representative each, device cache).
"""

from __future__ import annotations

import errno
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .folder import Folder, Segment, located
from .segments import Appended, Span, StoreError
from .shelves import Block, Fetched, Index, Pair, Shelf


class StoreWarning(UserWarning):
    """Something was lost, and the stream goes on without it."""


@dataclass(frozen=True)
class Levels:
    """Bytes at each level. device: blocks brought back. disk: this store's own files. index: those of the index, which
    count on the device or in RAM as well, where it is."""

    device: int
    ram: int
    disk: int
    index: int


class Reading:
    """What a store and its snapshots share: they read the first `n` blocks of a shelf."""

    @property
    def store(self) -> Store:
        raise NotImplementedError

    def _shelf(self, layer: int) -> tuple[Shelf, int]:
        raise NotImplementedError

    def index(self, layer: int) -> Index:
        """The index of one layer."""
        with self.store._lock:
            shelf, n = self._shelf(layer)
            return shelf.index(n, self.store.index_device)

    def fetch(self, layer: int, ids: Sequence[int] | Tensor) -> Fetched:
        """Bring blocks to the device. What is lost, dropped or unknown is named in `missing`; the others come."""
        asked = [int(id) for id in ids]
        blocks = self._find(layer, asked)
        self.store._await(blocks)
        got, missing = self.store._bring(blocks)
        for id in asked:
            if id not in got and id not in missing:
                missing[id] = self.store.lost.get(id, f"layer {layer} has no such block here; see index({layer}).ids")
        found = [id for id in asked if id in got]
        self.store._tell()
        return Fetched(
            found, [got[id][1][0] for id in found], [got[id][1][1] for id in found], [got[id][0].first for id in found],
            missing,
        )  # fmt: skip

    def prefetch(self, layer: int, ids: Sequence[int] | Tensor) -> Future[None]:
        """Start bringing blocks to the device in a thread; they wait there as long as `device_bytes` allow."""
        return self.store._start(self._find(layer, [int(id) for id in ids]))

    def _find(self, layer: int, ids: list[int]) -> list[Block]:
        with self.store._lock:
            shelf, n = self._shelf(layer)
            return [block for block in (shelf.find(id, n) for id in ids) if block is not None]

    def __len__(self) -> int:
        """Number of blocks, of all layers."""
        with self.store._lock:
            return sum(self._shelf(layer)[1] for layer in range(self.store.layers))


class Snapshot(Reading):
    """The blocks that stood in a store at one moment; for any thread, while the store goes on.

    It keeps alive what it sees: blocks that the store drops or loses for want of room stay readable here.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        with store._lock:
            self._seen = [(shelf, len(shelf.blocks)) for shelf in store._shelves]

    @property
    def store(self) -> Store:
        """The store it was taken of."""
        return self._store

    def _shelf(self, layer: int) -> tuple[Shelf, int]:
        return self._seen[layer]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, which are the store's."""
        return self.store.nbytes

    @property
    def mark(self) -> int:
        """That of the store."""
        return self.store.mark

    def rewind(self, mark: int) -> None:
        """Not of a snapshot."""
        raise StoreError("a snapshot is read-only and takes nothing back; rewind the store")

    def snapshot(self) -> Self:
        """Itself: it never changes."""
        return self

    def fork(self) -> Self:
        """Itself: it never changes."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Not of a snapshot."""
        raise StoreError("a snapshot is read-only and is not saved; save the store")

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Not into a snapshot."""
        raise StoreError("a snapshot is read-only; load into a store")


class Store(Reading):
    """Blocks of `layers` layers (or of rows of layers), on `device`, in host RAM and on disk.

    ram_bytes: most that keys and values take in RAM (pinned, for a CUDA device). disk: a folder in which the store
    makes one of its own, so that states, forks and questions may all name the same; None: what RAM cannot hold is lost.
    disk_bytes: most that its files take, with all they need. device_bytes: most that blocks brought back take on the
    device (for a CPU device only blocks from disk count, the others are in RAM already). index: where it is kept, on top
    of these limits, as it never leaves. On the "device" scores need no copy, but bytes there grow with the stream, one
    vector a block; in "ram" they do not, and every scoring costs a copy of the query to the host and waits for it.

    `fork` shares blocks, which never change, and the files they are in; each goes on in a folder of its own, which a
    fork makes when it has something to write. A fork that is opened again after the original lost its oldest files has
    lost those blocks too; in memory it keeps them.
    """

    def __init__(
        self, layers: int, device: torch.device | str = "cpu", *, ram_bytes: int, disk: Path | str | None = None,
        disk_bytes: int | None = None, device_bytes: int = 0, index: Literal["device", "ram"] = "device",
    ) -> None:  # fmt: skip
        if index not in ("device", "ram"):
            raise ValueError(f"index is {index!r}; it is kept on the 'device' or in 'ram'")
        if layers < 1 or min(ram_bytes, device_bytes, disk_bytes or 0) < 0:
            raise ValueError(
                f"layers is {layers}, ram_bytes {ram_bytes}, disk_bytes {disk_bytes}, device_bytes {device_bytes}; "
                "a store has a layer at least, and no limit is negative"
            )
        self.layers, self.device = layers, torch.device(device)
        self.index_in, self.index_device = index, self.device if index == "device" else torch.device("cpu")
        self.ram_bytes, self.disk_bytes, self.device_bytes = ram_bytes, disk_bytes, device_bytes
        self.disk = None if disk is None else Path(disk)
        self.lost: dict[int, str] = {}
        self._lock = threading.RLock()  # what is where; never held while a file is read or written
        self._writing = threading.RLock()
        self._shelves = [Shelf() for _ in range(layers)]
        self._next = 0
        self._ram: OrderedDict[int, Block] = OrderedDict()
        self._ram_used = 0
        self._near: OrderedDict[int, tuple[Block, Pair]] = OrderedDict()
        self._near_used = 0
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[None]] = {}
        self._told: set[str] = set()
        self._untold: list[str] = []
        self._folder: Folder | None = None
        self._closed = False
        if self.disk is not None:
            try:
                self._opened()
            except OSError as error:
                raise StoreError(
                    f"cannot keep a store in {self.disk}: {error.strerror}; name another folder"
                ) from error

    # Writing

    def put(
        self, layer: int, keys: Tensor, values: Tensor, *, first: int, index: Mapping[str, Tensor] | None = None
    ) -> int:
        """Copy a block in; its id, which is higher than all before.

        keys: [..., n, D], values: [..., n, D_v]. first: stream index of its first token. index: tensors to find it by,
        of the same names, shapes and dtypes in all blocks of a layer; names do not begin with a dot.
        """
        index = index or {}
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer is {layer}; the store has layers 0 to {self.layers - 1}")
        if keys.ndim < 2 or keys.shape[:-1] != values.shape[:-1] or not keys.shape[-2]:
            raise ValueError(
                f"keys are {tuple(keys.shape)}, values {tuple(values.shape)}; they are [..., n, D] and [..., n, D_v], n ≥ 1"
            )
        if any(name.startswith(".") for name in index):
            raise ValueError(f"the index has names {list(index)}; names do not begin with a dot")
        with torch.inference_mode(False), self._writing:  # buffers must be writable outside of that mode too
            if self._closed:
                raise StoreError(f"the store is closed; open it again with Store.recover({str(self.path)!r}, …)")
            self._shelves[layer].fits(index)
            nbytes = keys.nbytes + values.nbytes
            fits = nbytes <= self.ram_bytes
            if fits:
                self._make_room(nbytes)
            with self._lock:
                pair = self._copied(keys), self._copied(values)
                block = Block(self._next, layer, first, keys.shape[-2], nbytes, ram=pair)
                self._next += 1
                self._shelves[layer].append(block, index, self.index_device)
                if fits:
                    self._ram[block.id] = block
                    self._ram_used += nbytes
            if not fits:
                self._spill([block])
        self._tell()
        return block.id

    def drop(self, ids: Iterable[int] | Tensor) -> None:
        """Remove blocks, wherever they are; ids that are not there are left alone."""
        gone = {int(id) for id in ids}
        with self._writing:
            with self._lock:
                gone &= {block.id for shelf in self._shelves for block in shelf.blocks}
                self._remove(gone)
            if gone and self._folder is not None:
                try:
                    self._folder.drop(gone)
                except OSError as error:
                    self._untold.append(f"blocks were dropped, but that could not be noted on disk: {error.strerror}")
        self._tell()

    @property
    def mark(self) -> int:
        """The id of the next block, for `rewind`."""
        return self._next

    def rewind(self, mark: int) -> None:
        """Remove what was put since `mark` was read."""
        self.drop(range(mark, self._next))

    def flush(self) -> None:
        """Confirm everything on disk. Raises StoreError if that cannot be; then the blocks stay where they are."""
        with self._writing:
            with self._lock:
                waiting = [block for block in self._ram.values() if block.span is None]
            why = self._confirm(waiting)
        self._tell()
        if why:
            raise StoreError(f"{len(why)} of {len(waiting)} blocks are not on disk: {next(iter(why.values()))}")

    def close(self) -> None:
        """End writing and prefetching. Files stay; what is in RAM only is not in them unless `flush` was called."""
        with self._writing, self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            if self._folder is not None:
                self._folder.base.unlock()
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What is where

    @property
    def store(self) -> Store:
        """Itself."""
        return self

    @property
    def path(self) -> Path | None:
        """Its own folder, for `recover`."""
        if self.disk is None:
            return None
        with self._writing:
            return self._opened().path

    @property
    def levels(self) -> Levels:
        """Bytes at each level, now."""
        with self._lock:
            index = sum(shelf.nbytes for shelf in self._shelves)
            near, far = (index, 0) if self.index_in == "device" else (0, index)
            disk = self._folder.size if self._folder else 0
            return Levels(near + self._near_used, far + self._ram_used, disk, index)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: the blocks brought back, and the index if it is there."""
        return self.levels.device

    def _shelf(self, layer: int) -> tuple[Shelf, int]:
        shelf = self._shelves[layer]
        return shelf, len(shelf.blocks)

    def _of(self, block: Block) -> dict[str, Tensor]:
        """The index of a block."""
        with self._lock:
            shelf = self._shelves[block.layer]
            return shelf.of(shelf.place(block.id, len(shelf.blocks)))

    def _copied(self, x: Tensor) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x.detach())

    def _opened(self) -> Folder:
        """The own folder, made when first needed. Raises OSError."""
        assert self.disk is not None
        if self._folder is None:
            self._folder = Folder.new(self.disk, self.layers, self.disk_bytes)
            self._inherit()
        return self._folder

    # From RAM to disk

    def _make_room(self, nbytes: int) -> None:
        """Before `nbytes` more come: what was least recently used leaves RAM, an eighth at once to sync less often."""
        leaving: list[Block] = []
        with self._lock:
            over = self._ram_used + nbytes - self.ram_bytes
            if over <= 0:
                return
            goal = max(over, self.ram_bytes // 8)
            for block in self._ram.values():
                leaving.append(block)
                goal -= block.nbytes
                if goal <= 0:
                    break
        self._spill(leaving)

    def _spill(self, blocks: Sequence[Block]) -> None:
        """Out of RAM, to disk or, where that fails, lost."""
        why = self._confirm(blocks)
        with self._lock:
            for block in blocks:
                if self._ram.pop(block.id, None):
                    self._ram_used -= block.nbytes
                if block.id not in why:
                    block.ram = None
        self._lose(why)

    def _confirm(self, blocks: Sequence[Block]) -> dict[int, str]:
        """Write blocks that are not on disk yet; why some still are not, by id."""
        why: dict[int, str] = {}
        group: list[Block] = []
        # Room may be made by giving up a file that holds some of these blocks: another look shows it, once.
        for _ in range(2):
            missing = [block for block in blocks if block.span is None and block.id not in why]
            for at, block in enumerate(missing):
                group.append(block)
                size = sum(member.nbytes for member in group)
                if at + 1 == len(missing) or self._folder is None or size >= self._folder.largest // 2:
                    why |= self._write(group)
                    group = []
        return why | {b.id: "its place on disk was needed" for b in blocks if b.span is None and b.id not in why}

    def _write(self, group: list[Block]) -> dict[int, str]:
        if self.disk is None:
            return {
                block.id: f"ram_bytes, {self.ram_bytes:,}, are used up, and the store has no disk" for block in group
            }
        while True:
            try:
                spans = self._opened().write(group, self._of)
            except OSError as error:
                segments = self._folder.segments if self._folder else []
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                oldest = next((segment for segment in segments if segment.blocks), None)
                if full and oldest is not None:
                    self._give_up(oldest, f"{error.strerror}: the oldest were given up")
                    continue
                where = self._folder.path if self._folder else self.disk
                return {block.id: f"cannot be written to {where}: {error.strerror}" for block in group}
            with self._lock:
                for block in group:
                    block.span = spans[block.id]
            return {}

    def _give_up(self, segment: Segment, reason: str) -> None:
        assert self._folder is not None
        with self._lock:
            only_there = [block for block in segment.blocks.values() if block.ram is None]
            for block in segment.blocks.values():
                if block.ram is not None:
                    block.span = None
            self._folder.delete(segment)
        self._lose({block.id: reason for block in only_there})

    def _lose(self, why: Mapping[int, str]) -> None:
        with self._lock:
            for id, reason in why.items():
                self.lost[id] = reason
                kind = reason.partition(":")[0]
                if kind not in self._told:
                    self._told.add(kind)
                    self._untold.append(f"block {id} is lost: {reason}; the stream goes on without it (see store.lost)")
            self._remove(set(why))

    def _remove(self, ids: set[int]) -> None:
        """Off the shelves, out of RAM and off the device. Snapshots keep what they see."""
        if not ids:
            return
        for layer, shelf in enumerate(self._shelves):
            if any(shelf.find(id, len(shelf.blocks)) for id in ids):
                self._shelves[layer] = shelf.without(ids)
        for id in ids:
            if (block := self._ram.pop(id, None)) is not None:
                self._ram_used -= block.nbytes
            if (near := self._near.pop(id, None)) is not None:
                self._near_used -= near[0].nbytes
        if self._folder is not None:
            self._folder.forget(ids)

    def _tell(self) -> None:
        """Warn at the end of a call, when everything is in order: a warning may be turned into an exception."""
        with self._lock:
            untold, self._untold = self._untold, []
        for text in untold:
            warnings.warn(text, StoreWarning, stacklevel=3)

    # To the device

    def _bring(self, blocks: Sequence[Block]) -> tuple[dict[int, tuple[Block, Pair]], dict[int, str]]:
        """Keys and values on the device, by id, and why some are missing."""
        got: dict[int, tuple[Block, Pair]] = {}
        far: list[tuple[Block, Span]] = []
        with self._lock:
            for block in blocks:
                if block.id in self._near:
                    self._near.move_to_end(block.id)
                    got[block.id] = self._near[block.id]
                elif block.ram is not None:
                    if block.id in self._ram:
                        self._ram.move_to_end(block.id)
                    got[block.id] = block, self._keep(block, block.ram)
                elif block.span is not None:
                    far.append((block, block.span))
        missing: dict[int, str] = {}
        for block, span in far:
            try:
                tensors = span.load()
            except StoreError as error:
                missing[block.id] = str(error)
                continue
            got[block.id] = block, self._keep(block, (tensors["keys"], tensors["values"]))
        with self._lock:
            there = {
                block.id for block, _ in far if self._shelves[block.layer].find(block.id, self._shelf(block.layer)[1])
            }
        self._lose({id: reason for id, reason in missing.items() if id in there})
        return got, missing

    def _keep(self, block: Block, pair: Pair) -> Pair:
        """Move to the device and keep it there as long as there is room."""
        if block.ram is not None and self.device.type == "cpu":
            return pair
        pair = pair[0].to(self.device, non_blocking=True), pair[1].to(self.device, non_blocking=True)
        with self._lock:
            if block.id not in self._near and block.nbytes <= self.device_bytes:
                while self._near_used + block.nbytes > self.device_bytes:
                    self._near_used -= self._near.popitem(last=False)[1][0].nbytes
                self._near[block.id] = block, pair
                self._near_used += block.nbytes
        return pair

    def _start(self, blocks: list[Block]) -> Future[None]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"store-{id(self)}")
            future = self._pool.submit(self._prefetch, blocks)
            for block in blocks:
                self._coming[block.id] = future
        return future

    def _await(self, blocks: Sequence[Block]) -> None:
        """What the thread is reading right now is not read twice."""
        with self._lock:
            coming = {self._coming[block.id] for block in blocks if block.id in self._coming}
        for future in coming:
            if future.running():
                future.result()

    def _prefetch(self, blocks: list[Block]) -> None:
        try:
            self._bring(blocks)
        finally:
            with self._lock:
                for block in blocks:
                    self._coming.pop(block.id, None)

    # Copies, saving, recovery

    def snapshot(self) -> Snapshot:
        """What stands in the store now, to be read by any thread while this goes on."""
        return Snapshot(self)

    def fork(self) -> Store:
        """A store with the same blocks that goes on by itself: own limits, own folder beside this one's."""
        with self._writing, self._lock:
            twin = Store(self.layers, self.device, **{**self._limits(), "disk": None})
            twin.disk = self.disk
            twin._next, twin.lost = self._next, dict(self.lost)
            copies = {block.id: replace(block) for shelf in self._shelves for block in shelf.blocks}
            twin._shelves = [shelf.twin(copies) for shelf in self._shelves]
            twin._ram = OrderedDict((id, copies[id]) for id in self._ram)
            twin._ram_used = self._ram_used
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """All that is needed to go on. With a disk: the index, and where blocks are, after a flush; else all blocks."""
        with self._writing:
            if self.disk is not None:
                with self._lock:
                    self._confirm([block for block in self._ram.values() if block.span is None])
            state: dict[str, Tensor] = {}
            table = []
            with self._lock:
                for layer, shelf in enumerate(self._shelves):
                    state |= {
                        f"index.{layer}.{name}": rows.clone()
                        for name, rows in shelf.index(len(shelf.blocks), self.index_device).tensors.items()
                    }
                    for block in shelf.blocks:
                        entry: list[Any] = [block.id, layer, block.first, block.count, block.nbytes]
                        if block.span is not None:
                            entry += [str(block.span.file.path.resolve()), block.span.offset, block.span.length]
                        elif block.ram is not None:
                            state[f"keys.{block.id}"], state[f"values.{block.id}"] = block.ram
                        table.append(entry)
                about = {"layers": self.layers, "next": self._next, "lost": list(self.lost.items()), "blocks": table}
        self._tell()
        return state | {"about": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` described. Blocks whose files are gone are lost, and said; the others are here."""
        try:
            about = json.loads(bytes(state["about"].cpu().numpy()))
            table, layers = about["blocks"], about["layers"]
        except (KeyError, ValueError) as error:
            raise StoreError(f"this is not the state of a store: {error}") from error
        if layers != self.layers:
            raise StoreError(f"the state is of {layers} layers, the store has {self.layers}")
        files: dict[Path, Appended | OSError] = {}
        why: dict[int, str] = {}
        with self._writing:
            self._clear()
            for id, layer, first, count, nbytes, *place in table:
                block = Block(id, layer, first, count, nbytes)
                shelf = self._shelves[layer]
                row = {name: state[f"index.{layer}.{name}"][len(shelf.blocks)] for name in _names(state, layer)}
                if place:
                    span = located(Path(place[0]), place[1], place[2], files)
                    if isinstance(span, str):
                        why[id] = span
                    else:
                        block.span = span
                else:
                    block.ram = self._copied(state[f"keys.{id}"]), self._copied(state[f"values.{id}"])
                with self._lock:
                    shelf.append(block, row, self.index_device)
            with self._lock:
                self._next, self.lost = about["next"], {int(id): text for id, text in about["lost"]}
            self._inherit()
            self._lose(why)
            self._admit_loaded()
        self._tell()

    @classmethod
    def recover(
        cls, path: Path | str, device: torch.device | str = "cpu", *, ram_bytes: int, disk_bytes: int | None = None,
        device_bytes: int = 0, index: Literal["device", "ram"] = "device",
    ) -> Store:  # fmt: skip
        """Open a store's own folder (`path` of the store) again, whatever ended the process that wrote it.

        Finds every confirmed block; a torn end is cut off and told as a `StoreWarning`, blocks whose files are missing
        or cut are lost. Raises StoreError if there is no store, or another process writes it.
        """
        folder, found = Folder.reopen(Path(path), disk_bytes)
        store = cls(
            folder.layers, device, ram_bytes=ram_bytes, disk_bytes=disk_bytes, device_bytes=device_bytes, index=index
        )
        store.disk, store._folder = folder.path.parent, folder
        for block in found.blocks:
            store._shelves[block.layer].append(block, found.index[block.id], store.index_device)
        store._next = 1 + max([block.id for block in found.blocks] + list(found.lost), default=-1)
        store._untold += found.notes
        store._lose(found.lost)
        store._tell()
        return store

    def _limits(self) -> dict[str, Any]:
        names = ("ram_bytes", "disk", "disk_bytes", "device_bytes")
        return {name: getattr(self, name) for name in names} | {"index": self.index_in}

    def _inherit(self) -> None:
        """Note in the own folder what lies in others' files, so that this store can be recovered by itself."""
        if self._folder is None:
            return
        try:
            self._folder.inherit([block for shelf in self._shelves for block in shelf.blocks], self._of)
        except OSError as error:
            self._untold.append(f"{self._folder.path} cannot be recovered after a crash: {error.strerror}")

    def _clear(self) -> None:
        with self._lock:
            ids = [block.id for shelf in self._shelves for block in shelf.blocks]
        self.drop(ids)
        with self._lock:
            self._shelves = [Shelf() for _ in range(self.layers)]

    def _admit_loaded(self) -> None:
        """Blocks that came as tensors go into RAM like blocks that were put, oldest first."""
        with self._lock:
            loaded = sorted(
                (b for shelf in self._shelves for b in shelf.blocks if b.ram is not None), key=lambda b: b.id
            )
        for block in loaded:
            if block.nbytes > self.ram_bytes:
                self._spill([block])
                continue
            self._make_room(block.nbytes)
            with self._lock:
                self._ram[block.id] = block
                self._ram_used += block.nbytes


def _names(state: Mapping[str, Tensor], layer: int) -> list[str]:
    start = f"index.{layer}."
    return [name.removeprefix(start) for name in state if name.startswith(start)]
