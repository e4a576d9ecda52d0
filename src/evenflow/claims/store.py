"""A stream of 200,000 tokens kept whole in 64 MiB of RAM and a disk: any block is found, at even cost, after any crash.

What ReKV (arXiv 2503.00540, sections 2.3 and 3.2) builds on: all keys and values off the device, one mean key a block
on it, and a question's query decides what comes back.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..memory.store import Snapshot, Store, StoreWarning
from .registry import Bench, claim

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 2, 4, 64, 100
TOKENS, RAM, DEVICE = 200_000, 64 << 20, 1 << 20
PLACES = (20_000, 100_000, 200_000)
ASKED = 4  # blocks that an answer reads in every layer, and those of a scene
QUESTIONS = 25  # of each age, each about another scene
_WRITER = """
import os, signal, sys
from evenflow.claims.store import feed, opened
from evenflow.memory import folder
inner, count = folder.record, 0
def dying(tensors, meta):
    global count
    count += 1
    data = inner(tensors, meta)
    if count == int(sys.argv[2]):
        # A torn record: half of it reaches the file, and the process is gone.
        name = max(os.scandir(store.path), key=lambda entry: (entry.name.endswith(sys.argv[3]), entry.name)).path
        with open(name, "ab") as file:
            file.write(data[: len(data) // 2])
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return data
store = opened(sys.argv[1], ram=4 << 20)
folder.record = dying
for number in range(1000):
    feed(store, number)
    held = [block.id for shelf in store._shelves for block in shelf.blocks if block.span is not None]
    print(*held, flush=True)
"""


def opened(disk: str | Path, ram: int = RAM) -> Store:
    """The store of this stream."""
    return Store(LAYERS, ram_bytes=ram, disk=disk, device_bytes=DEVICE)


def block(number: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [H_kv, BLOCK, D], float16, of one block: what all share, what is its own, and noise."""
    seeded = torch.Generator().manual_seed(LAYERS * number + layer)
    noise = torch.randn(2, KV_HEADS, BLOCK, HEAD_DIM, generator=seeded)
    noise[0] += 3.0 + direction(number, layer)[:, None]
    return noise[0].half(), noise[1].half()


def direction(number: int, layer: int) -> Tensor:
    """What a block is about, [H_kv, D]: its scene, and something of its own; also the question about it."""
    own, scene = (
        torch.randn(KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(place * LAYERS + layer + 10**6 * kind))
        for kind, place in ((1, number), (2, number // ASKED))
    )
    return scene + own / 2


def feed(store: Store, number: int) -> None:
    """One block of the stream, in all layers."""
    for layer in range(LAYERS):
        keys, values = block(number, layer)
        store.put(layer, keys, values, first=number * BLOCK, index={"mean": keys.float().mean(1).flatten()})


def answer(store: Store | Snapshot, number: int) -> tuple[list[int], float, float, bool]:
    """The best block of each layer for a question about block `number`, seconds to score all and to fetch the best,
    and whether it came back unchanged."""
    queries = [direction(number, layer).flatten() for layer in range(LAYERS)]
    best, keys, scoring, fetching = [], [], 0.0, 0.0
    for layer, query in enumerate(queries):
        start = time.perf_counter()
        index = store.index(layer)
        ids = index.ids[(index.tensors["mean"] @ query).topk(ASKED).indices]
        scored = time.perf_counter()
        found = store.fetch(layer, ids)
        found.concatenated()
        scoring, fetching = scoring + scored - start, fetching + time.perf_counter() - scored
        best.append(found.first[0] // BLOCK)
        keys.append((found.keys[0], found.values[0]))
    same = all(
        torch.equal(got, meant)
        for layer in range(LAYERS)
        for got, meant in zip(keys[layer], block(number, layer), strict=True)
    )
    return best, scoring, fetching, same


@claim("store")
def store(bench: Bench) -> None:
    """200,000 tokens kept in 64 MiB of RAM and a disk: any block is found, at even cost, and survives a kill."""
    with tempfile.TemporaryDirectory(prefix="evenflow-store-") as folder:
        _stream(bench, Path(folder) / "stream")
        _kills(bench, Path(folder))


def _stream(bench: Bench, disk: Path) -> None:
    seconds: dict[int, dict[str, float]] = {}
    snapshots: dict[int, Snapshot] = {}
    near, index, found, asked, most = [], [], 0, 0, 0
    start = time.perf_counter()
    with opened(disk) as kept:
        for number in range(TOKENS // BLOCK):
            feed(kept, number)
            most = max(most, kept.levels.ram)
            tokens = (number + 1) * BLOCK
            if tokens not in PLACES:
                continue
            seconds[tokens] = {}
            for age, share in (("old", 0.0), ("middle", 0.5), ("young", 1.0)):
                times = []
                first = int(share * (number + 1 - QUESTIONS * ASKED))
                for needle in range(first, first + QUESTIONS * ASKED, ASKED):
                    best, scoring, fetching, same = answer(kept, needle)
                    asked, found = asked + 1, found + (best == [needle] * LAYERS and same)
                    times.append(scoring + fetching)
                seconds[tokens][age] = median(times)
            snapshots[tokens] = kept.snapshot()
            index.append(
                sum(tensor.nbytes for layer in range(LAYERS) for tensor in (kept.index(layer).tensors["mean"],))
            )
            near.append(kept._near_used)
            bench.say(f"{tokens:,} tokens, {kept.levels.disk / 2**20:,.0f} MiB on disk")
        took = time.perf_counter() - start
        turns = _in_turns(snapshots)
        levels, lost = kept.levels, len(kept.lost)
    size = TOKENS * LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    bench.row(
        "stream", "whole, off the device", f"{TOKENS:,} tokens, {size / 2**20:,.0f} MiB", lost == 0,
        f"{size / RAM:.1f} × the RAM; {levels.disk / 2**20:,.0f} MiB on disk, {lost} blocks lost, {took:.0f} s with making it",
    )  # fmt: skip
    bench.row("most RAM at any moment", "≤ 64 MiB", f"{most / 2**20:.1f} MiB", most <= RAM)
    bench.row("the block asked for is the best of all, bit by bit", "all ages", f"{found} of {asked}", found == asked)
    for tokens, by_age in seconds.items():
        shown = ", ".join(f"{age} {1e3 * spent:.2f} ms" for age, spent in by_age.items())
        bench.row(f"answer after {tokens:,} tokens", "–", shown, None, "in RAM whole" if tokens == PLACES[0] else "")
    scores, fetches = ({tokens: median(spent) for tokens, spent in part.items()} for part in turns)
    whole = {tokens: scores[tokens] + fetches[tokens] for tokens in PLACES}
    for what, part, paper in (
        ("reading the best blocks from disk", fetches, "flat"),
        ("scoring every block", scores, "–"),
        ("the whole answer", whole, "flat"),
    ):
        ratio = part[PLACES[2]] / part[PLACES[0]]
        bench.row(
            f"{what}, 200,000 tokens over 20,000", paper, f"×{ratio:.2f}", ratio <= 1.25 if paper == "flat" else None,
            ", ".join(f"{1e3 * part[tokens]:.2f}" for tokens in PLACES) + " ms; old questions to three snapshots, in turns"
            + ("; what grows is scoring, one vector a block" if part is whole else ""),
        )  # fmt: skip
    bench.row(
        "blocks brought back, bytes on the device", "flat", f"≤ {max(near) / 2**20:.2f} MiB", max(near) <= DEVICE,
        ", ".join(f"{held / 2**20:.2f}" for held in near),
    )  # fmt: skip
    bench.row(
        "index, share of keys and values", "one vector a block", f"{index[-1] / size:.2%}",
        index[-1] * 2 * BLOCK * 2 == size * 4, f"{index[-1] / 2**20:.1f} MiB in float32: the only part that grows",
    )  # fmt: skip
    bench.figures["answer, ms over tokens|x"] = [float(tokens) for tokens in PLACES]
    for age in ("old", "middle", "young"):
        bench.figures[f"answer, ms over tokens|x|{age}"] = [float(tokens) for tokens in PLACES]
        bench.figures[f"answer, ms over tokens|y|{age}"] = [1e3 * seconds[tokens][age] for tokens in PLACES]


def _in_turns(snapshots: dict[int, Snapshot]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Seconds to score and to fetch, by tokens in the snapshot: questions about the oldest scenes, all on disk by now.

    In turns, so that a machine that slows down slows all of them; each about another scene, so that none finds its
    blocks on the device.
    """
    scoring: dict[int, list[float]] = {tokens: [] for tokens in snapshots}
    fetching: dict[int, list[float]] = {tokens: [] for tokens in snapshots}
    for scene in range(PLACES[0] // BLOCK // ASKED):
        for turn in range(len(snapshots)):
            tokens = PLACES[(scene + turn) % len(PLACES)]
            _, scored, fetched, _ = answer(
                snapshots[tokens], (scene + 7 * turn) % (PLACES[0] // BLOCK // ASKED) * ASKED
            )
            scoring[tokens].append(scored)
            fetching[tokens].append(fetched)
    return scoring, fetching


def _kills(bench: Bench, folder: Path) -> None:
    kept, whole, torn, confirmed_in_all = 0, 0, 0, 0
    for records, suffix in ((9, ".blocks"), (50, ".blocks"), (51, ".journal"), (75, ".blocks"), (120, ".journal")):
        disk = folder / f"killed-{records}{suffix}"
        done = subprocess.run(
            [sys.executable, "-c", _WRITER, str(disk), str(records), suffix],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = done.stdout.splitlines()
        confirmed = {int(id) for id in lines[-1].split()} if lines else set()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            again = Store.recover(disk / "store-0000", ram_bytes=0)
        torn += any(issubclass(warning.category, StoreWarning) for warning in told)
        for layer in range(LAYERS):
            for id in again.index(layer).ids.tolist():
                fetched = again.fetch(layer, [id])
                keys, values = block(id // LAYERS, layer)
                whole += (
                    id in confirmed and torch.equal(fetched.keys[0], keys) and torch.equal(fetched.values[0], values)
                )
        confirmed_in_all += len(confirmed)
        kept += done.returncode == -9
        again.close()
    bench.row(
        "confirmed blocks after a kill in the middle of a spill", "all", f"{whole} of {confirmed_in_all}",
        whole == confirmed_in_all > 0 and kept == torn == 5, f"{kept} kills; {torn} torn ends were seen and told",
    )  # fmt: skip
