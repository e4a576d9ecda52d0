"""Branches of one history that remember different parts of it: exploration by what is attended, not by noise.

Source: KVPO, arXiv 2605.14278, section on causal history routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .evict import Oldest
from .keyed import keyed
from .verbs import Recall
from .view import View

if TYPE_CHECKING:
    from .layout import Memory


@dataclass(frozen=True)
class Rerouted(Recall):
    """A step sees sinks and the newest frames; on a route, some of these give way to older ones that are still held.

    recent: frames that are seen beside sinks and memory, fresh ones among them. nearest: how many of these a route keeps;
    the others are drawn from the frames that are held all along the route. blocks: steps that a route lasts. branches:
    routes that fork at one place, as different from each other as so few frames allow. seed: of the draw, which is keyed
    by (seed, frame of the fork) for all branches, so that a fork or a replay draws the same.

    Which route a step takes is told by the tag `route` of its first token, a number that `route` makes; 0, and no tag,
    is the plain window. What is held is the same on every route. All fresh tokens are seen in any case.
    """

    recent: int
    nearest: int
    blocks: int = 5
    branches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nearest <= self.recent:
            raise ValueError(f"nearest is {self.nearest}; a route keeps from 1 to all {self.recent} recent frames")
        if self.blocks < 1 or self.branches < 1:
            raise ValueError(f"blocks is {self.blocks}, branches {self.branches}; take 1 of each, or more")

    def suits(self, memory: Memory) -> None:
        if memory.inside != "both":
            raise ValueError("a route is one step's; take inside='both'")
        if type(memory.evict) is not Oldest or memory.evict.with_fresh or (memory.window or 0) < self.recent:
            raise ValueError(
                f"routes lead through what is held beyond the {self.recent} recent frames: take Oldest() to evict, and a "
                f"window of as many frames or more, not {memory.window}"
            )

    def route(self, branch: int, block: int) -> int:
        """The tag of step `block` (0 is the first after the fork) on one of the `branches`."""
        if not 0 <= branch < self.branches or not 0 <= block < self.blocks:
            raise ValueError(
                f"there is no branch {branch}, block {block}: there are {self.branches} of {self.blocks} blocks"
            )
        return 1 + block * self.branches + branch

    def pool(self, fork: int, chunk: int, sink: int, window: int) -> range:
        """Frames that a route may bring back which forks at frame `fork`: held until its last step, and not the nearest.

        chunk: frames a step; sink, window: of the memory, in frames. Raises ValueError where there are too few.
        """
        frames = range(max(sink, fork + (self.blocks - 1) * chunk - window), max(0, fork - self.nearest))
        if len(frames) < self.recent - self.nearest:
            raise ValueError(
                f"at frame {fork} a route has {len(frames)} older frames to choose {self.recent - self.nearest} from; fork "
                "later, or hold more"
            )
        return frames

    def plan(self, branch: int, fork: int, pool: Sequence[int]) -> list[int]:
        """The older frames of one branch, in the order of time: a piece of one random order, shifted from branch to branch."""
        n = len(pool)
        order = torch.randperm(n, generator=keyed(self.seed, fork)).tolist()
        start = branch * max(1, n // self.branches)
        return sorted(pool[order[(start + i) % n]] for i in range(self.recent - self.nearest))

    def among(self, view: View) -> Tensor:
        after, always = (view.consumed + view.coming)[:, None, None], view.pinned | view.fresh
        plain = (view.index >= after - self.recent * view.frame) | always
        tag = view.fresh_tags.get("route")
        routes = [] if tag is None else tag[: len(after), 0].tolist()
        if not any(routes):
            return plain
        assert view.window is not None  # `suits` asked for one
        chunk, frames = view.m // view.frame, view.index // view.frame
        sink, window = view.sink // view.frame, view.window // view.frame
        seen = plain.expand(len(routes), *plain.shape[1:]).clone()
        for row, (route, now, coming) in enumerate(
            zip(routes, view.consumed.tolist(), view.coming.tolist(), strict=True)
        ):
            if not route or not coming:
                continue
            if not 1 <= route <= self.branches * self.blocks:
                raise ValueError(
                    f"route is {route}; there are {self.branches * self.blocks}, numbered by `Rerouted.route`"
                )
            block, branch = divmod(route - 1, self.branches)
            fork = now // view.frame - block * chunk
            chosen = self.plan(branch, fork, self.pool(fork, chunk, sink, window))
            at = min(row, len(frames) - 1)
            older = torch.isin(frames[at], torch.tensor(chosen, device=frames.device))
            near = view.index[at] >= now + coming - self.nearest * view.frame
            seen[row] = older | near | always[min(row, len(always) - 1)]
        return seen


def fork_starts(memory: Memory, first: int = 21, then: int = 18, segments: int = 7) -> list[int]:
    """Frames at which branches of `memory`, whose recall is `Rerouted`, may fork.

    A video is cut into a first segment of `first` frames and more of `then`; a route lies in one of the first `segments`,
    begins at the start of a step once the window is full, and finds enough older frames. Raises ValueError where there
    is no such place.
    """
    recall, chunk, window = memory.recall, memory.chunk, memory.window
    if not isinstance(recall, Rerouted) or window is None:
        raise ValueError(f"{memory.name} has no routes; its recall is {type(recall).__name__}")
    found, start, length = list[int](), 0, first
    for _ in range(segments):
        for fork in range(start, start + length - recall.blocks * chunk + 1, chunk):
            if fork >= memory.sink + recall.recent:
                try:
                    recall.pool(fork, chunk, memory.sink, window)
                except ValueError:
                    continue
                found.append(fork)
        start, length = start + length, then
    if not found:
        raise ValueError(
            f"no route of {recall.blocks} steps of {chunk} frames fits into segments of {first} and {then} frames behind a "
            f"window of {memory.sink + recall.recent}"
        )
    return found


def drawn_fork(memory: Memory, seed: int, rollout: int, **segments: int) -> int:
    """One of `fork_starts`, each as likely, keyed by (seed, rollout)."""
    starts = fork_starts(memory, **segments)
    return starts[int(torch.randint(len(starts), (), generator=keyed(seed, rollout)))]
