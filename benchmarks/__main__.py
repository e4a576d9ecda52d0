"""Run every benchmark, one after the other: `python -m benchmarks [--quick] [--out FOLDER] [NAME ...]`.

Prints a table for each; the folder gets results.json and results.png. --quick takes small sizes: a trial of the
program, not of the library.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from . import beyond, bookkeeping, decode, feed, growth, recipes, store, video
from .showing import figure, tables
from .timing import machine

ALL: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": decode.measure,
    "bookkeeping": bookkeeping.measure,
    "feed": feed.measure,
    "growth": growth.measure,
    "store": store.measure,
    "recipes": recipes.measure,
    "video": video.measure,
    "beyond": beyond.measure,
}
QUICK: dict[str, Callable[..., dict[str, Any]]] = {
    "decode": partial(decode.measure, length=256, layers=2, rounds=5, recomputed=1),
    "bookkeeping": partial(bookkeeping.measure, rounds=50),
    "feed": partial(feed.measure, rounds=2),
    "growth": partial(growth.measure, places=(512, 1024, 2048), steps=5),
    "store": partial(store.measure, blocks=8, rounds=3),
    "recipes": partial(recipes.measure, frames=(8,), budget=12, heads=2, dim=16, rounds=2),
    "beyond": partial(beyond.measure, device="cpu"),
    "video": partial(video.measure, device="cpu", chunks=2, memories=video.MEMORIES[:1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", choices=[[], *ALL], metavar="NAME", help=f"some of {', '.join(ALL)}; all if none"
    )
    parser.add_argument(
        "--quick", "--dry", action="store_true", help="small sizes: a trial of the program, not of the library"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results.json and results.png")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console, notices = Console(), Console(stderr=True)
    measures = QUICK if asked.quick else ALL
    results: dict[str, Any] = {"machine": machine(), "quick": asked.quick}
    for name in asked.names or ALL:
        with notices.status(name):
            results[name] = measures[name](say=lambda text: notices.print(f"… {text}", highlight=False))
        for table in tables(name, results[name]):
            console.print(table)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure(results, asked.out / "results.png")
    console.print(f"{asked.out / 'results.json'}, {asked.out / 'results.png'}")


if __name__ == "__main__":
    main()
