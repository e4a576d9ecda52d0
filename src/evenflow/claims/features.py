"""What memories of features promise: a fixed number of tokens that still knows old scenes, at the same cost for ever."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from ..memory.features import Flash, FlashState, Star, StarState, pooled
from .registry import Bench, claim

SIDE, DIM = 16, 1024  # of the features of CLIP ViT-L/14 at 224 pixels, as the paper pools them


def shown(seconds: int, scenes: int = 40, lasting: int = 12, dim: int = 32) -> Tensor:
    """Features [seconds, 8, 8, dim], one a second: places that come back, with something that moves before each."""
    made = torch.Generator().manual_seed(0)
    places = torch.randn(scenes, 8, 8, dim, generator=made)
    order = torch.randint(scenes, (-(-seconds // lasting),), generator=made).repeat_interleave(lasting)[:seconds]
    return places[order] + 0.15 * torch.randn(seconds, 8, 8, dim, generator=made)


def forgotten(state: StarState, frames: Tensor) -> tuple[float, float]:
    """Mean distance of all frames to what the memory's means, and a queue of as many frames, know of them; over that to
    the mean of all."""
    coarse = pooled(frames, state.config.coarse).flatten(1)
    means = state.summary.mean
    spread = (coarse - coarse.mean(0)).norm(dim=1).mean()
    queue = coarse[-len(means) :]
    ours, theirs = (torch.cdist(coarse, held).amin(1).mean() / spread for held in (means, queue))
    return float(ours), float(theirs)


def aged(
    old: StarState | FlashState, fresh: StarState | FlashState, given: tuple[Tensor, ...], turns: int
) -> list[float]:
    """Seconds of a frame on an old memory and on a fresh one, in turns: medians."""
    took: tuple[list[float], list[float]] = ([], [])
    for n in range(2 * turns):
        start = time.perf_counter()
        (old, fresh)[n % 2].feed(*given)
        took[n % 2].append(time.perf_counter() - start)
    return [median(one) for one in took]


@claim("flash-vstream")
def flash_vstream(bench: Bench) -> None:
    """A fixed number of tokens sums up hours of video, keeps old scenes, and costs the same for every frame."""
    seconds = 20_000 if bench.full else 2_000
    frames = shown(seconds)
    errors = {}
    for name, seed in (("cheapest", None), ("drawn", 0)):
        state = Star(bank=60, seed=seed).build(frames.shape[-1])
        state.feed(frames)
        errors[name], queue = forgotten(state, frames)
        bench.say(f"{name}: {errors[name]:.2f}")
    bench.row(
        f"distance of {seconds:,} frames of 40 places to 25 means, over that of a queue of 25 frames", "lower",
        f"{errors['cheapest'] / queue:.2f}", errors["cheapest"] < queue,
        f"{errors['cheapest']:.2f} and {queue:.2f} of the spread; k-means begun at random, as published, {errors['drawn']:.2f}",
    )  # fmt: skip
    bench.row(
        "frames in all weights", f"{seconds:,}", f"{float(state.summary.weight.sum()):,.0f}",
        float(state.summary.weight.sum()) == seconds,
    )  # fmt: skip
    star(bench)
    flash(bench)


def star(bench: Bench) -> None:
    """The first version at its published size."""
    turns = 60 if bench.full else 20
    frames = torch.randn(60, SIDE, SIDE, DIM, generator=torch.Generator().manual_seed(1))
    old, fresh = (Star().build(DIM) for _ in range(2))
    for _ in range(10 if bench.full else 3):
        old.feed(frames)
    fresh.feed(frames[:30])
    bench.row("tokens, first version", "681", f"{len(old.read().tokens)}", len(old.read().tokens) == 681)
    late, early = aged(old, fresh, (frames[:1],), turns)
    bench.row(
        f"time of a frame after {old.position} over after {fresh.position}", "flat", f"{late / early:.2f}", late / early < 1.1,
        f"{1e3 * late:.1f} ms a frame of {SIDE}×{SIDE}×{DIM} on a core; {old.nbytes / 1e6:.0f} MB",
    )  # fmt: skip
    start = time.perf_counter()
    old.read()
    bench.row("milliseconds in which a question has what it reads", "–", f"{1e3 * (time.perf_counter() - start):.1f}")


def flash(bench: Bench) -> None:
    """The second version, at its published number of tokens; features are narrower than the model's 1,280."""
    dim = 160
    made = torch.Generator().manual_seed(2)
    full, half = torch.randn(70, 32, 32, dim, generator=made), torch.randn(70, 16, 16, dim, generator=made)
    old, fresh = (Flash(bank=100).build(dim) for _ in range(2))
    for _ in range(6 if bench.full else 2):
        old.feed(full, half)
    fresh.feed(full, half)
    count = len(old.read().coordinates)
    bench.row("tokens, second version", "11,520", f"{count:,}", count == 11_520)
    late, early = aged(old, fresh, (full[:1], half[:1]), 20)
    bench.row(
        f"time of a unit after {old.position} over after {fresh.position}", "flat", f"{late / early:.2f}", late / early < 1.1,
        f"{1e3 * late:.1f} ms a unit of 32×32×{dim}; {old.nbytes / 1e6:.0f} MB",
    )  # fmt: skip
