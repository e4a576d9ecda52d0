"""Weighted k-means that goes on: what was seen stays as centroids with weights, and every new item is grouped with them.

Source: Flash-VStream, arXiv 2406.08085 (temporal memory) and 2506.23825 (context synopsis).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as fn


def weighted_kmeans(
    gram: Tensor, weight: Tensor, start: Tensor, rounds: int = 10, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Group n items of weight [n] into k ≤ n groups: how much of each item is in each mean, [k, n], rows of sum one, and
    each item's group, int64 [n].

    gram: float64 [n, n], items' inner products, which is all that distances need as a mean is a mixture of items: its
    cost is that of one round. start: int64 [k], different items to begin with. Ends after `rounds`, or when all means
    together have moved by less than `tolerance`. A group that has lost all its items takes the one that is furthest from
    its own mean (the paper says a random one), so that no group is empty, in a scene that stands still neither.
    """
    count, items = len(start), torch.arange(len(gram), device=gram.device)
    share = fn.one_hot(start, len(gram)).double()
    for _ in range(rounds):
        inner = share @ gram
        squared = gram.diagonal()[:, None] - 2 * inner.mT + (inner * share).sum(1)
        group = _filled(squared.clamp_min(0), count)
        total = weight.new_zeros(count).index_add_(0, group, weight)
        mixed = torch.zeros_like(share).index_put_((group, items), weight / total[group])
        moved, share = mixed - share, mixed
        if float(((moved @ gram) * moved).sum(1).clamp_min(0).sqrt().sum()) < tolerance:
            break
    return share, group


def cheapest(gram: Tensor, weight: Tensor) -> Tensor:
    """All items but one, int64 [n − 1]: the lighter of the two whose joining moves what was seen least (Ward)."""
    squared = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    cost = squared.clamp_min(0) * weight[:, None] * weight / (weight[:, None] + weight)
    cost.fill_diagonal_(torch.inf)
    pair = torch.stack([cost.argmin() // len(gram), cost.argmin() % len(gram)])
    leaves = pair[weight[pair].argmin()]
    items = torch.arange(len(gram) - 1, device=gram.device)
    return items + (items >= leaves)


def drawn(generator: torch.Generator, count: int) -> Tensor:
    """All of `count` items but one, at random, on the CPU."""
    return torch.randperm(count, generator=generator)[1:].sort().values


def _filled(squared: Tensor, count: int) -> Tensor:
    """The nearest group of each item, int64 [n], such that no group is empty. squared: distances [n, k], squared."""
    far, group = squared.min(1)
    items = torch.arange(len(group), device=group.device)
    empty = torch.bincount(group, minlength=count) == 0
    nearest = torch.full((count,), torch.inf, dtype=far.dtype, device=far.device).scatter_reduce(0, group, far, "amin")
    first = torch.full((count,), len(group), device=group.device).scatter_reduce(
        0, group, torch.where(far <= nearest[group], items, len(group)), "amin"
    )  # of each group the item that stays whatever happens
    spare = torch.where(first[group] == items, -1.0, far)
    vacant = empty.nonzero()[:, 0]
    return group.index_copy(0, spare.argsort(descending=True, stable=True)[: len(vacant)], vacant)


@dataclass(frozen=True, eq=False)
class Summary:
    """What a stream has shown, in order of time.

    mean: [k, d]; weight: float64 [k], items behind each mean; time: float64 [k], their mean time.
    """

    mean: Tensor
    weight: Tensor
    time: Tensor

    @classmethod
    def empty(cls, dim: int, like: Tensor) -> Summary:
        """Of nothing; means in the dtype and on the device of `like`."""
        nothing = torch.zeros(0, dtype=torch.float64, device=like.device)
        return cls(like.new_zeros(0, dim), nothing, nothing)

    def joined(self, item: Tensor, time: float, most: int, random: torch.Generator | None = None) -> Summary:
        """With one more item [d], in at most `most` means. random: draws the item that k-means does not begin with; None:
        it is the one that is cheapest to join with another."""
        x = torch.cat([self.mean, item[None].to(self.mean.dtype)])
        weight = torch.cat([self.weight, self.weight.new_ones(1)])
        times = torch.cat([self.time, self.time.new_full((1,), time)])
        if len(x) <= most:
            return Summary(x, weight, times)
        gram = (x @ x.mT).double()
        start = cheapest(gram, weight) if random is None else drawn(random, len(x)).to(x.device)
        share, group = weighted_kmeans(gram, weight, start)
        total = weight.new_zeros(most).index_add_(0, group, weight)
        at = share @ times
        order = at.argsort(stable=True)
        return Summary(share[order].to(x.dtype) @ x, total[order], at[order])
