"""What every memory of features does alike: tensors by name, a lock between who writes and who asks, save and fork."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..keyed import keyed
from .kmeans import Summary

BANK = ("key", "detail", "number")
ANSWERS = {
    "admit": ("Everything", "Every frame gets in."),
    "evict": ("OldestDetail", "The oldest frame leaves the bank of details; means never leave."),
    "recall": ("HeaviestDetails", "A question reads all means, and the details nearest to the heaviest."),
}


def pooled(frames: Tensor, size: int) -> Tensor:
    """Means over equal squares: [n, H, W, D] → [n, size, size, D]. Raises ValueError where they do not fit."""
    if frames.shape[1] % size or frames.shape[2] % size:
        raise ValueError(f"a grid of {tuple(frames.shape[1:3])} cannot be divided into {size}×{size} equal squares")
    return adaptive_avg_pool2d(frames.movedim(-1, 1), size).movedim(1, -1)


class FeatureState:
    """One session's memory of features. position: frames (or units) so far.

    One thread feeds and any may read: what is read is a copy, all of one moment, and feeding waits for no more than that
    copy. Undoing is refused, as a mean does not tell what went into it; fork before, or read on a fork.
    """

    def __init__(self, held: dict[str, Tensor], bank: int, seed: int | None) -> None:
        self.held, self.bank, self._seed, self.position = held, bank, seed, 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(tensor.nbytes for tensor in self.held.values())

    @property
    def random(self) -> torch.Generator | None:
        """Draws for the next item, if anything is drawn."""
        return None if self._seed is None else keyed(self._seed, self.position)

    @property
    def summary(self) -> Summary:
        """The means, their weights and times."""
        return Summary(self.held["mean"], self.held["weight"], self.held["time"])

    def remember(self, summary: Summary, key: Tensor, detail: Tensor) -> None:
        """Take over a summary with one item more, whose `key` [d] and `detail` go to the bank in place of the oldest.

        To be called with the lock held."""
        self.held |= {"mean": summary.mean, "weight": summary.weight, "time": summary.time}
        slot = self.position % self.bank
        for name, row in zip(BANK, (key, detail, torch.tensor(self.position)), strict=True):
            self.held[name][slot] = row
        self.position += 1

    def heaviest(self, count: int) -> Tensor:
        """Slots of the bank whose keys are nearest to the `count` heaviest means, in order of time: int64 [≤ count].

        A mean takes what no heavier one has taken, so that as many come back as there are. Raises ValueError before the
        first item.
        """
        if not self.position:
            raise ValueError("nothing was fed yet; feed before a question")
        filled, summary = min(self.position, self.bank), self.summary
        chosen = summary.weight.argsort(descending=True, stable=True)[:count]
        distance = torch.cdist(summary.mean[chosen], self.held["key"][:filled].to(summary.mean.dtype))
        slots = []
        for one in distance[:filled]:
            slots.append(one.argmin())
            distance[:, slots[-1]] = torch.inf
        taken = torch.stack(slots)
        return taken[self.held["number"][taken].argsort()]

    def truncate(self, n: int) -> None:
        """Raises ValueError for all but n = 0."""
        if n:
            raise ValueError("a memory of means cannot take frames back out of them; fork before what may be undone")

    def fork(self) -> Self:
        """An independent copy."""
        twin = object.__new__(type(self))
        with self._lock:
            twin.__dict__ |= self.__dict__ | {"held": {name: x.clone() for name, x in self.held.items()}}
        twin._lock = threading.Lock()
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit."""
        with self._lock:
            return {name: x.clone() for name, x in self.held.items()} | {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        if set(state) != set(self.held) | {"position"}:
            raise ValueError(f"state holds {sorted(state)}; expected {sorted([*self.held, 'position'])}")
        for name, x in self.held.items():
            there = state[name]
            grows = name not in BANK  # what does not, has a fixed number of rows as well
            if there.dtype != x.dtype or there.shape[grows:] != x.shape[grows:]:
                raise ValueError(
                    f"{name} is {there.dtype} {tuple(there.shape)}; this memory holds {x.dtype} {tuple(x.shape)}"
                )
        with self._lock:
            self.held = {name: state[name].to(x.device, copy=True) for name, x in self.held.items()}
            self.position = int(state["position"])

    def checked(self, frames: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
        """`frames`, if they are [n, *shape] and finite. Raises ValueError otherwise."""
        if tuple(frames.shape[1:]) != shape or frames.ndim != len(shape) + 1:
            raise ValueError(f"{what} are {tuple(frames.shape)}; expected [n, {', '.join(map(str, shape))}]")
        if not bool(frames.isfinite().all()):
            raise ValueError(f"{what} hold values that are no numbers; nothing was remembered of them")
        return frames


def bank(size: int, key: int, detail: tuple[int, ...], dim: int, like: Tensor) -> dict[str, Tensor]:
    """An empty summary of means [dim], and an empty bank of `size` items."""
    nothing = Summary.empty(dim, like.to(torch.promote_types(like.dtype, torch.float32)))
    return {
        "mean": nothing.mean, "weight": nothing.weight, "time": nothing.time,
        "key": like.new_zeros(size, key), "detail": like.new_zeros(size, *detail),
        "number": torch.full((size,), -1, device=like.device),
    }  # fmt: skip
