"""Timing side by side: rivals take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor

Step = Callable[[], object]


def interleaved(steps: Mapping[str, Step], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each, in turns; every other round goes backwards."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
                start = perf_counter()
                steps[name]()
                seconds[name].append(perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of how long `one` took, in units of `other`."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def reading(nbytes: int) -> Step:
    """Reads `nbytes` of memory once, the fastest way torch has here: what a decode step has to do with its cache."""
    data = torch.ones(nbytes // 4 // 1024, 1024)
    vector = torch.ones(1024)
    kernels: dict[str, Step] = {
        "sum": data.sum,
        "times a vector": lambda: data @ vector,
        "norm": lambda: data.view(-1).dot(data.view(-1)),
    }
    seconds = interleaved(kernels, rounds=7, warmup=2)
    return kernels[min(kernels, key=lambda name: median(seconds[name]))]


def multiplying(size: int = 1024) -> tuple[Step, int]:
    """A product of square matrices, and its floating point operations."""
    one: Tensor = torch.randn(size, size)
    return (lambda: one @ one), 2 * size**3


def machine() -> dict[str, Any]:
    """What a figure has to be read with."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
