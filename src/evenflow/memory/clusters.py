"""Clusters of alike vectors, grown as vectors arrive: an index over tokens that are kept elsewhere.

A vector joins the cluster whose bits are nearest to its own, if fewer than `near` bits differ (of equal ones the
oldest), else it opens a cluster, whose bits are its own for good. Vectors are taken one after the other; what depends
on that order is only which of them open a cluster, so all else is done at once. Source: stage A of V-Rex, arXiv
2512.12284, section IV.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .hashing import hamming, hash_bits


@dataclass(frozen=True, eq=False)
class Clusters:
    """A table of C places for clusters in each of the leading dimensions; those with no members are free.

    bits: bool [..., C, n_bits]. mean: [..., C, d], mean of the members. count: int64 [..., C].
    """

    bits: Tensor
    mean: Tensor
    count: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], bits: int, dim: int, like: Tensor) -> Clusters:
        """No clusters in a table of the leading dimensions `shape`; means in dtype and on the device of `like`."""
        count = torch.zeros(*shape, 0, dtype=torch.int64, device=like.device)
        return cls(count.new_zeros(*shape, 0, bits, dtype=torch.bool), like.new_zeros(*shape, 0, dim), count)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        return {"bits": self.bits, "mean": self.mean, "count": self.count}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Clusters:
        """From what `tensors` gave (other names are left alone)."""
        return cls(tensors["bits"], tensors["mean"], tensors["count"])

    def join(self, x: Tensor, planes: Tensor, near: int, real: Tensor | None = None) -> tuple[Clusters, Tensor]:
        """The table with vectors x [..., m, d] in it, and the number of each one's cluster: int64 [..., m].

        planes: [d, n_bits]; real: bool [..., m], default all; others get −1 and change nothing.
        """
        m, device = x.shape[-2], x.device
        real = torch.ones(x.shape[:-1], dtype=torch.bool, device=device) if real is None else real
        bits = hash_bits(x, planes)
        old = hamming(bits, self.bits).masked_fill((self.count == 0)[..., None, :], planes.shape[-1] + 1)
        new = hamming(bits, bits)
        earlier = before(m, device)
        far = real & ~(old < near).any(-1)
        opens, blocked = far, earlier & (new < near)
        while True:  # opens unless near an earlier one that opens: settles from the first on, in a few rounds
            again = far & ~(blocked & opens[..., None, :]).any(-1)
            if torch.equal(again, opens):
                break
            opens = again

        used = (self.count > 0).sum(-1, keepdim=True)
        number = used + opens.cumsum(-1) - 1  # of the cluster that an opener opens
        to_new = new.masked_fill(~(opens[..., None, :] & (earlier | earlier.new_ones(m).diag())), planes.shape[-1] + 2)
        apart = torch.cat([old, to_new], -1)
        which = (apart == apart.amin(-1, keepdim=True)).to(torch.uint8).argmax(-1)  # the first of the nearest
        width = self.count.shape[-1]
        of_new = number.gather(-1, (which - width).clamp_min(0))
        joined = torch.where(opens, number, torch.where(which < width, which, of_new))
        joined = torch.where(real, joined, -1)
        return self.grown(int(number.amax()) + 1 if m else 0)._with(x, bits, joined, opens), joined

    def used(self) -> int:
        """How many places are in use at most; clusters take them one after the other."""
        return int((self.count > 0).sum(-1).amax()) if self.count.numel() else 0

    def first(self, places: int) -> Clusters:
        """A view of the first places, with more made if there are too few."""
        whole = self.grown(places)
        return Clusters(whole.bits[..., :places, :], whole.mean[..., :places, :], whole.count[..., :places])

    def grown(self, clusters: int) -> Clusters:
        """The same with at least that many places; places double, so that growing stays cheap."""
        width = self.count.shape[-1]
        if clusters <= width:
            return self
        more = max(clusters, 2 * width) - width

        def longer(x: Tensor, dim: int) -> Tensor:
            return torch.cat([x, x.new_zeros(*x.shape[:dim], more, *x.shape[dim + 1 :])], dim)

        dim = self.count.ndim - 1
        return Clusters(longer(self.bits, dim), longer(self.mean, dim), longer(self.count, dim))

    def _with(self, x: Tensor, bits: Tensor, joined: Tensor, opens: Tensor) -> Clusters:
        """The table after x has joined: int64 `joined` [..., m], −1 for none. Only what changes is computed."""
        real = joined >= 0
        same = (joined[..., :, None] == joined[..., None, :]) & real[..., None, :]
        first = real & ~(same & before(x.shape[-2], x.device)).any(-1)  # of the vectors that join one cluster
        wide = torch.promote_types(x.dtype, torch.float32)
        at = joined.clamp_min(0)
        held = self.count.gather(-1, at)
        count = held + same.sum(-1)
        mean = self.mean.gather(-2, at[..., None].expand(*at.shape, x.shape[-1])).to(wide)
        mean = (mean * held[..., None] + same.to(wide) @ x.to(wide)) / count.clamp_min(1)[..., None]

        def put(into: Tensor, where: Tensor, what: Tensor) -> Tensor:
            *rows, _ = where.nonzero(as_tuple=True)
            return into.index_put((*rows, at[where]), what[where].to(into.dtype))

        return Clusters(put(self.bits, opens, bits), put(self.mean, first, mean), put(self.count, first, count))


def before(m: int, device: torch.device) -> Tensor:
    """Bool [m, m]: whether the second of two vectors comes before the first."""
    return torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
