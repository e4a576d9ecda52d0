"""The block store: device, RAM and disk, what is lost, and what never is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenflow.memory import segments
from evenflow.memory.segments import StoreError
from evenflow.memory.store import Store, StoreWarning

Pair = tuple[Tensor, Tensor]
SIZE = 2 * 5 * (8 + 6) * 4  # bytes of one block


def pair(number: int, dtype: torch.dtype = torch.float32) -> Pair:
    """Keys and values that only block `number` has."""
    seeded = torch.Generator().manual_seed(number)
    return torch.randn(2, 5, 8, generator=seeded).to(dtype), torch.randn(2, 5, 6, generator=seeded).to(dtype)


def put(store: Store, number: int, dtype: torch.dtype = torch.float32) -> int:
    keys, values = pair(number, dtype)
    return store.put(number % store.layers, keys, values, first=5 * number, index={"mean": keys.mean(1)})


def same(store: Store, number: int, reader: object = None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether block `number` comes back bit by bit, where ids are numbers."""
    fetched = (reader or store).fetch(number % store.layers, [number])  # type: ignore[attr-defined]
    keys, values = pair(number, dtype)
    return fetched.ids == [number] and torch.equal(fetched.keys[0], keys) and torch.equal(fetched.values[0], values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks_in_ram", [0, 3, 100])
def test_blocks_come_back_bit_by_bit_from_ram_and_from_disk(
    tmp_path: Path, dtype: torch.dtype, blocks_in_ram: int
) -> None:
    store = Store(2, ram_bytes=blocks_in_ram * SIZE, disk=tmp_path)
    for number in range(12):
        assert put(store, number, dtype) == number
    assert all(same(store, number, dtype=dtype) for number in range(12))
    assert not store.lost
    assert (store.levels.disk > SIZE) == (blocks_in_ram < 100)


def test_a_block_is_a_copy() -> None:
    store = Store(1, ram_bytes=10 * SIZE)
    keys, values = pair(0)
    store.put(0, keys, values, first=0)
    keys.zero_(), values.zero_()
    assert same(store, 0)


def test_the_index_has_a_row_for_each_block(tmp_path: Path) -> None:
    store = Store(2, ram_bytes=3 * SIZE, disk=tmp_path)
    for number in range(41):
        put(store, number)
    index = store.index(1)
    assert index.ids.tolist() == list(range(1, 41, 2))
    assert index.first.tolist() == [5 * number for number in range(1, 41, 2)]
    assert set(index.count.tolist()) == {5}
    assert torch.equal(index.tensors["mean"], torch.stack([pair(n)[0].mean(1) for n in range(1, 41, 2)]))
    keys, values, places = store.fetch(1, [7, 3]).concatenated()
    assert torch.equal(keys, torch.cat([pair(7)[0], pair(3)[0]], 1)) and values.shape == (2, 10, 6)
    assert places.tolist() == [*range(35, 40), *range(15, 20)]
    assert Store(1, ram_bytes=0).index(0).ids.tolist() == []


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    store = Store(2, ram_bytes=10 * SIZE)
    put(store, 0)
    keys, values = pair(1)
    for wrong in (
        lambda: store.put(2, keys, values, first=0),
        lambda: store.put(0, keys, values[:, :4], first=0, index={"mean": keys.mean(1)}),
        lambda: store.put(0, keys, values, first=0),
        lambda: store.put(0, keys, values, first=0, index={"mean": keys.mean(1)[:1]}),
        lambda: store.put(1, keys, values, first=0, index={".id": keys}),
        lambda: Store(0, ram_bytes=1),
        lambda: Store(1, ram_bytes=-1),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert len(store) == 1 and store.levels.ram == SIZE


def test_the_least_recently_used_leaves_the_device_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(1, ram_bytes=0, disk=tmp_path, device_bytes=2 * SIZE)
    for number in range(4):
        put(store, number)
    read: list[int] = []
    load = segments.Span.load
    monkeypatch.setattr(segments.Span, "load", lambda span: (read.append(span.offset), load(span))[1])
    for number, reads in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        assert same(store, number)
        assert len(read) == reads


def test_the_least_recently_used_leaves_ram_first(tmp_path: Path) -> None:
    store = Store(1, ram_bytes=3 * SIZE, disk=tmp_path)
    for number in range(3):
        put(store, number)
    store.fetch(0, [0])
    put(store, 3)
    assert list(store._ram) == [2, 0, 3]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 5), st.one_of(st.none(), st.integers(0, 40_000)), st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(["put", "put", "put", "fetch", "drop", "flush", "prefetch"]), st.integers(0, 40)), max_size=60),
)  # fmt: skip
def test_limits_hold_at_every_moment_and_nothing_vanishes_in_silence(
    tmp_path_factory: pytest.TempPathFactory, ram: int, disk: int | None, near: int, calls: list[tuple[str, int]]
) -> None:
    store = Store(2, ram_bytes=ram * SIZE, disk=tmp_path_factory.mktemp("s"), disk_bytes=disk, device_bytes=near * SIZE)
    if disk is not None and store.levels.disk > disk:
        return  # less than an empty store takes
    made, dropped = 0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        for what, number in calls:
            if what == "put":
                assert put(store, made) == made
                made += 1
            elif what == "fetch" and number < made:
                assert same(store, number) == (number not in store.lost and number not in dropped)
            elif what == "drop" and number < made:
                store.drop([number])
                if number not in store.lost:
                    dropped.add(number)
            elif what == "prefetch" and number < made:
                store.prefetch(number % 2, [number]).result()
            elif what == "flush":
                try:
                    store.flush()
                except StoreError:
                    assert disk is not None
            levels = store.levels
            index = sum(shelf.nbytes for shelf in store._shelves)
            assert levels.ram <= ram * SIZE and levels.device - index <= near * SIZE
            assert levels.ram == sum(b.nbytes for b in store._ram.values())
            on_disk = sum(path.stat().st_size for path in store.path.iterdir())
            assert levels.disk == on_disk
            if disk is not None and not dropped:
                assert on_disk <= disk
        there = {int(id) for layer in range(2) for id in store.index(layer).ids}
        assert there | dropped | store.lost.keys() == set(range(made))
        assert not there & store.lost.keys()
        assert all(same(store, number) for number in there)
    store.close()


def test_prefetched_blocks_wait_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(1, ram_bytes=0, disk=tmp_path, device_bytes=10 * SIZE)
    for number in range(4):
        put(store, number)
    store.prefetch(0, [1, 3]).result()
    monkeypatch.setattr(segments.Span, "load", lambda span: pytest.fail("read again"))
    assert same(store, 1) and same(store, 3)
    store.close()


def test_a_snapshot_sees_one_moment_while_a_writer_goes_on(tmp_path: Path) -> None:
    store = Store(2, ram_bytes=4 * SIZE, disk=tmp_path, device_bytes=2 * SIZE)
    done, errors = threading.Event(), []

    def write() -> None:
        try:
            for number in range(300):
                put(store, number)
                if number % 7 == 6:
                    store.drop([number - 5])
        except Exception as error:
            errors.append(error)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    looks = 0
    while not done.is_set() or not looks:
        view = store.snapshot()
        ids = [view.index(layer).ids.tolist() for layer in (0, 1)]
        seen = sorted(ids[0] + ids[1])
        newest = seen[-1] if seen else -1
        gone = {n - 5 for n in range(6, newest + 1, 7)}
        # The last drop may not have come yet when its put has.
        assert set(range(newest + 1)) - set(seen) in (gone, gone - {newest - 5})
        assert all(same(store, number, view) for number in seen[:: max(1, len(seen) // 8)])
        assert [view.index(layer).ids.tolist() for layer in (0, 1)] == ids and len(view) == len(seen)
        looks += 1
    writer.join()
    assert not errors and looks > 1
    store.close()


WRITER = """
import sys
from pathlib import Path
from evenflow.memory import segments
from evenflow.memory.store import Store
from tests.memory.test_store import SIZE, put

store = Store(2, ram_bytes=8 * SIZE, disk=Path(sys.argv[1]), disk_bytes=None)
inner = segments.Appended.append
def told(file, records):
    offsets = inner(file, records)
    if file.path.suffix == ".journal" and file.path.stem != "base":
        print(file.size, flush=True)
    return offsets
segments.Appended.append = told
number = 0
while True:
    put(store, number)
    for block in list(store._shelves[number % 2].blocks)[-20:]:
        if block.span is not None and block.ram is None:
            print("confirmed", block.id, flush=True)
    number += 1
"""


@pytest.mark.parametrize("lines", [1, 40, 333])
def test_a_kill_in_the_middle_of_spilling_loses_nothing_confirmed(tmp_path: Path, lines: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(lines)]
    os.kill(process.pid, signal.SIGKILL)
    told += process.stdout.readlines()
    process.wait()
    confirmed = {int(line.split()[1]) for line in told if line.startswith("confirmed") and line.endswith("\n")}
    (folder,) = tmp_path.glob("store-*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # of a torn end, if it was hit
        store = Store.recover(folder, ram_bytes=8 * SIZE)
    there = {int(id) for layer in range(2) for id in store.index(layer).ids}
    assert confirmed <= there and not store.lost
    assert all(same(store, number) for number in there)
    assert torch.equal(
        store.index(0).tensors["mean"], torch.stack([pair(n)[0].mean(1) for n in sorted(there) if n % 2 == 0])
    )
    number = max(there) + 1
    assert store.put(number % 2, *pair(number), first=0, index={"mean": pair(number)[0].mean(1)}) == number
    store.flush()
    assert same(store, number)


def spilled(disk: Path, count: int = 6) -> Path:
    """The folder of a store whose blocks are all on disk, closed."""
    store = Store(1, ram_bytes=0, disk=disk)
    for number in range(count):
        put(store, number)
    store.close()
    assert store.path is not None
    return store.path


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_every_torn_journal_gives_what_is_whole_before_the_tear(tmp_path: Path, cut: int) -> None:
    folder = spilled(tmp_path)
    journal = folder / "000000.journal"
    os.truncate(journal, journal.stat().st_size - cut)
    with pytest.warns(StoreWarning, match="never confirmed"):
        store = Store.recover(folder, ram_bytes=0)
    kept = store.index(0).ids.tolist()
    assert kept == list(range(len(kept))) and 4 <= len(kept) <= 5
    assert all(same(store, number) for number in kept)


def test_a_flipped_byte_in_a_journal_costs_one_block(tmp_path: Path) -> None:
    folder = spilled(tmp_path)
    journal = folder / "000000.journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with pytest.warns(StoreWarning, match="1 damaged"):
        store = Store.recover(folder, ram_bytes=0)
    assert len(store) == 5 and all(same(store, int(number)) for number in store.index(0).ids)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6, 0.99])
def test_a_flipped_byte_in_a_segment_loses_one_block_and_says_so(tmp_path: Path, share: float) -> None:
    folder = spilled(tmp_path)
    store = Store.recover(folder, ram_bytes=0)
    file = folder / "000000.blocks"
    data = bytearray(file.read_bytes())
    data[int(share * len(data))] ^= 16
    file.write_bytes(data)
    hurt = int(share * 6)
    with pytest.warns(StoreWarning, match="stream goes on"):
        fetched = store.fetch(0, range(6))
    assert fetched.ids == [n for n in range(6) if n != hurt] and list(fetched.missing) == [hurt]
    assert all(torch.equal(keys, pair(n)[0]) for n, keys in zip(fetched.ids, fetched.keys, strict=True))
    assert str(file) in store.lost[hurt]
    assert store.index(0).ids.tolist() == fetched.ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.fetch(0, [hurt]).missing == {hurt: store.lost[hurt]}  # told once
    put(store, 6)


def test_a_cut_segment_and_a_missing_one(tmp_path: Path) -> None:
    folder = spilled(tmp_path)
    os.truncate(folder / "000000.blocks", 2 * SIZE)
    with pytest.warns(StoreWarning, match="cut off"):
        store = Store.recover(folder, ram_bytes=0)
    assert store.index(0).ids.tolist() == [0] and sorted(store.lost) == [1, 2, 3, 4, 5]
    folder = spilled(tmp_path / "other")
    (folder / "000000.blocks").unlink()
    with pytest.warns(StoreWarning, match="No such file"):
        store = Store.recover(folder, ram_bytes=10 * SIZE)
    assert len(store) == 0 and sorted(store.lost) == list(range(6))
    put(store, 6)
    assert same(store, 6)


def test_what_is_no_store_or_is_in_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        Store.recover(tmp_path, ram_bytes=0)
    store = Store(1, ram_bytes=0, disk=tmp_path)
    assert store.path is not None
    with pytest.raises(StoreError, match="another store"):
        Store.recover(store.path, ram_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep a store"):
        Store(1, ram_bytes=0, disk=tmp_path / "file")


def test_a_disk_limit_loses_the_oldest_first_and_says_so(tmp_path: Path) -> None:
    store = Store(1, ram_bytes=2 * SIZE, disk=tmp_path, disk_bytes=40_000)
    with pytest.warns(StoreWarning, match="disk_bytes") as told:
        for number in range(100):
            put(store, number)
    assert len([w for w in told if issubclass(w.category, StoreWarning)]) == 1
    kept = store.index(0).ids.tolist()
    assert kept == list(range(100 - len(kept), 100)) and len(kept) > 10
    assert sorted(store.lost) == list(range(100 - len(kept)))
    assert all(same(store, number) for number in kept)


def test_without_a_disk_the_oldest_are_lost(tmp_path: Path) -> None:
    store = Store(1, ram_bytes=3 * SIZE)
    with pytest.warns(StoreWarning, match="no disk"):
        for number in range(9):
            put(store, number)
    assert store.index(0).ids.tolist() == [6, 7, 8] and sorted(store.lost) == list(range(6))


def test_a_snapshot_outlives_what_the_store_loses(tmp_path: Path) -> None:
    store = Store(1, ram_bytes=2 * SIZE, disk=tmp_path, disk_bytes=20_000)
    for number in range(6):
        put(store, number)
    view = store.snapshot()
    with pytest.warns(StoreWarning):
        for number in range(6, 60):
            put(store, number)
    store.drop([59])
    assert {0, 1, 2, 3} <= store.lost.keys()
    assert all(same(store, number, view) for number in range(6))
    assert store.fetch(0, [59]).missing


@pytest.mark.parametrize("suffix", [".blocks", ".journal"])
def test_a_full_disk_does_not_stop_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    store = Store(1, ram_bytes=2 * SIZE, disk=tmp_path)
    for number in range(6):
        put(store, number)
    room = [True]
    inner: Callable[..., list[int]] = segments.Appended.append

    def full(file: segments.Appended, records: object) -> list[int]:
        if not room[0] and file.path.suffix == suffix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(file, records)

    monkeypatch.setattr(segments.Appended, "append", full)
    room[0] = False
    with pytest.warns(StoreWarning, match="No space left"):
        for number in range(6, 12):
            put(store, number)
    assert store.index(0).ids.tolist() == [10, 11] and sorted(store.lost) == list(range(10))
    with pytest.raises(StoreError, match="No space left"):
        store.flush()
    assert same(store, 10) and same(store, 11)
    room[0] = True
    for number in range(12, 18):
        put(store, number)
    assert store.index(0).ids.tolist() == list(range(10, 18))
    assert all(same(store, number) for number in range(10, 18))


def test_a_broken_write_leaves_no_torn_record_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(1, ram_bytes=0, disk=tmp_path)
    put(store, 0)
    size = store.levels.disk
    inner = os.pwrite
    calls = []

    def broken(file: int, data: memoryview, at: int) -> int:
        if calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        calls.append(at)
        return inner(file, data[:100], at)  # as a disk that fills up in the middle

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.warns(StoreWarning, match="Input/output error"):
        put(store, 1)
    monkeypatch.undo()
    assert store.levels.disk == size == sum(path.stat().st_size for path in store.path.iterdir())
    put(store, 2)
    assert store.index(0).ids.tolist() == [0, 2] and same(store, 0) and same(store, 2)


def test_dropped_blocks_stay_dropped_and_empty_files_go(tmp_path: Path) -> None:
    store = Store(1, ram_bytes=0, disk=tmp_path, disk_bytes=40_000)
    for number in range(20):
        put(store, number)
    files = len(list(store.path.glob("*.blocks")))
    assert files > 2
    store.drop(range(0, 18))
    assert len(list(store.path.glob("*.blocks"))) < files
    path = store.path
    del store
    again = Store.recover(path, ram_bytes=0)
    assert again.index(0).ids.tolist() == [18, 19] and not again.lost


def test_a_fork_shares_what_is_there_and_goes_on_alone(tmp_path: Path) -> None:
    store = Store(2, ram_bytes=4 * SIZE, disk=tmp_path, disk_bytes=60_000, device_bytes=2 * SIZE)
    for number in range(10):
        put(store, number)
    fork = store.fork()
    path = fork.path
    before = {file.name: file.stat().st_size for file in store.path.iterdir()}
    for number in range(10, 20):
        keys, values = pair(100 + number)
        fork.put(number % 2, keys, values, first=0, index={"mean": keys.mean(1)})
    assert {file.name: file.stat().st_size for file in store.path.iterdir()} == before
    assert len(store) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        for number in range(10, 80):  # until the original gives its oldest files up
            put(store, number)
    assert 0 in store.lost and 0 not in fork.lost
    assert all(same(fork, number) for number in range(10))
    assert torch.equal(fork.fetch(0, [12]).keys[0], pair(112)[0]) and same(store, 79)
    assert torch.equal(fork.index(0).tensors["mean"][5], pair(10 + 100)[0].mean(1))
    fork.flush()
    del fork
    with pytest.warns(StoreWarning, match="No such file"):
        again = Store.recover(path, ram_bytes=0)
    assert set(again.index(0).ids.tolist()) | set(again.index(1).ids.tolist()) | again.lost.keys() == set(range(20))
    assert torch.equal(again.fetch(0, [12]).keys[0], pair(112)[0])


def test_a_fork_that_writes_nothing_leaves_nothing_on_disk(tmp_path: Path) -> None:
    store = Store(2, ram_bytes=4 * SIZE, disk=tmp_path)
    for number in range(10):
        put(store, number)
    forks = [store.fork() for _ in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["store-0000"]
    assert all(same(fork, number) for fork in forks for number in range(10))
    for number in range(10, 20):
        put(forks[3], number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store-0000", "store-0001"]
    forks[3].flush()
    path = forks[3].path
    del forks
    again = Store.recover(path, ram_bytes=0)
    assert all(same(again, number) for number in range(20)) and not again.lost


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_index_in_ram_counts_there_and_finds_the_same(tmp_path: Path, on_disk: bool) -> None:
    given = {"ram_bytes": 3 * SIZE if on_disk else 100 * SIZE, "disk": tmp_path if on_disk else None}
    near, far = Store(2, **given), Store(2, **given, index="ram")
    for number in range(20):
        put(near, number)
        put(far, number)
        index = far.levels.index
        assert index == near.levels.index > 0 and (near.levels.device, far.levels.device, far.nbytes) == (index, 0, 0)
        assert far.levels.ram == near.levels.ram + index
    other = Store(2, **given, index="ram")
    other.load_state_dict(far.state_dict())
    for reader in (far, far.snapshot(), far.fork(), other):
        assert torch.equal(reader.index(1).tensors["mean"], near.index(1).tensors["mean"])
        assert reader.nbytes == 0 and all(same(far, number, reader) for number in range(20))
    with pytest.raises(ValueError, match="'device' or in 'ram'"):
        Store(1, ram_bytes=0, index="disk")


@pytest.mark.parametrize("ram", [0, 4, 100])
def test_what_was_put_since_a_mark_is_taken_back(tmp_path: Path, ram: int) -> None:
    store = Store(2, ram_bytes=ram * SIZE, disk=tmp_path)
    for number in range(6):
        put(store, number)
    mark = store.mark
    for number in range(6, 12):
        put(store, number)
    store.rewind(mark)
    assert [store.index(layer).ids.tolist() for layer in (0, 1)] == [[0, 2, 4], [1, 3, 5]] and not store.lost
    assert put(store, 12) == 12 and all(same(store, number) for number in (*range(6), 12))


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_state_brings_everything_back(tmp_path: Path, on_disk: bool) -> None:
    store = Store(2, ram_bytes=(4 if on_disk else 40) * SIZE, disk=tmp_path if on_disk else None)
    for number in range(20):
        put(store, number)
    state = store.state_dict()
    put(store, 20)
    other = Store(2, ram_bytes=40 * SIZE, disk=tmp_path if on_disk else None)
    put(other, 0)
    other.load_state_dict(state)
    assert len(other) == 20 and all(same(other, number) for number in range(20))
    assert torch.equal(other.index(1).tensors["mean"], store.index(1).tensors["mean"][:10])
    assert put(other, 20) == 20 and same(other, 20)
    assert (sum(tensor.nbytes for tensor in state.values()) < 20 * SIZE) == on_disk
    with pytest.raises(StoreError, match="layers"):
        Store(1, ram_bytes=0).load_state_dict(state)
    with pytest.raises(StoreError, match="not the state"):
        other.load_state_dict({})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_come_to_a_cuda_device(tmp_path: Path) -> None:
    store = Store(1, "cuda", ram_bytes=3 * SIZE, disk=tmp_path, device_bytes=2 * SIZE)
    for number in range(8):
        keys, values = pair(number)
        store.put(0, keys.cuda(), values.cuda(), first=0, index={"mean": keys.mean(1)})
    assert store.index(0).tensors["mean"].is_cuda
    store.prefetch(0, [1, 2]).result()
    for number in range(8):
        keys, values, _ = store.fetch(0, [number]).concatenated()
        assert keys.is_cuda and torch.equal(keys.cpu(), pair(number)[0]) and torch.equal(values.cpu(), pair(number)[1])
    assert all(block.ram is None or block.ram[0].is_pinned() for block in store._shelves[0].blocks)
    store.close()
