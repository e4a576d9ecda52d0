"""Putting and fetching blocks, beside what the bytes alone take: a copy in memory, a synced write, a read of a file."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from evenflow.memory.store import Store

from .timing import interleaved


def measure(
    *, tokens: int = 196, heads: int = 4, dim: int = 128, blocks: int = 32, rounds: int = 9,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Blocks of one frame in one layer of a 7B model (196 tokens, 4 key heads of 128, float16), `blocks` at a time.

    Files are warm in the page cache for the store and for the floor alike.
    """
    say("store: timing")
    torch.manual_seed(0)
    keys, values = (torch.randn(heads, tokens, dim).half() for _ in range(2))
    nbytes = blocks * (keys.nbytes + values.nbytes)
    mean = keys.float().mean(1).flatten()
    raw = torch.cat([keys.flatten(), values.flatten()]).view(torch.uint8)
    with tempfile.TemporaryDirectory(prefix="evenflow-bench-") as folder:
        plain = Path(folder) / "plain"
        plain.write_bytes(raw.numpy().tobytes() * blocks)
        near = Store(1, ram_bytes=2 * nbytes)
        far = Store(1, ram_bytes=0, disk=Path(folder) / "far")
        spiller = Store(1, ram_bytes=2 * nbytes, disk=Path(folder) / "spill")
        for number in range(blocks):
            near.put(0, keys, values, first=number)
            far.put(0, keys, values, first=number)

        def put_in_ram() -> None:
            store = Store(1, ram_bytes=2 * nbytes)
            for _ in range(blocks):
                store.put(0, keys, values, first=0, index={"mean": mean})

        def spill() -> None:
            ids = [spiller.put(0, keys, values, first=0) for _ in range(blocks)]
            spiller.flush()
            spiller.drop(ids)

        def write() -> None:
            with (Path(folder) / "written").open("wb") as file:
                for _ in range(blocks):
                    file.write(raw.numpy())
                file.flush()
                os.fsync(file.fileno())

        def read() -> list[bytes]:
            with plain.open("rb", buffering=0) as file:
                return [file.read(len(raw)) for _ in range(blocks)]

        ids = list(range(blocks))
        seconds = interleaved(
            {
                "copy in memory (floor)": lambda: [(keys.clone(), values.clone()) for _ in range(blocks)],
                "put, in RAM": put_in_ram,
                "fetch from RAM": lambda: near.fetch(0, ids),
                "write and sync a file (floor)": write,
                "put and flush to disk": spill,
                "read a file (floor)": read,
                "read a file and its CRC-32": lambda: [zlib.crc32(piece) for piece in read()],
                "fetch from disk": lambda: far.fetch(0, ids),
            },
            rounds,
        )
    for store in (near, far, spiller):
        store.close()
    return {
        "title": f"Store: {blocks} blocks of {(keys.nbytes + values.nbytes) / 1e3:,.0f} kB",
        "gigabytes a second": {name: nbytes / median(times) / 1e9 for name, times in seconds.items()},
        "microseconds a block": {name: 1e6 * median(times) / blocks for name, times in seconds.items()},
    }
