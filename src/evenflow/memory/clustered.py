"""All that was read, off the device by clusters of alike keys, and queries that take clusters until they have enough.

`Clustered` is the fold: every token joins a cluster when it arrives, and goes into that cluster's pages in host memory
when it leaves the window. `UntilMass` is the recall that goes with it: each query scores the clusters' mean keys, takes
the best until they hold a share of the attention, and attends their tokens beside what is held. Source: V-Rex, arXiv
2512.12284, section IV (hash-bit key clustering, WiCSum thresholding, light attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .clusters import Clusters, before
from .hashing import hyperplanes
from .mass import Weights, until_mass
from .pages import PageStore, Tokens
from .parts import Part, attention_of_parts
from .place import DistanceCeiling
from .store import Store
from .verbs import Fold, Recall
from .view import EMPTY, View

if TYPE_CHECKING:
    from .layout import Geometry, Memory


@lru_cache(maxsize=16)
def _planes(dim: int, bits: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hyperplanes(dim, bits, seed=seed, like=torch.empty(0, dtype=dtype, device=device))


@dataclass(frozen=True, eq=False)
class Joined:
    """What a step's tokens do to one layer's clusters, as the fold tells the recall.

    found, table: the tables before and after them, as many places as there are clusters after. fresh: [B, G, m, d], what
    joins. which: int64 [B, G, m], the cluster of each, −1 for padding. label: int64 [B, G, C], the cluster of what is in each
    slot. gone: what left the window in this step. shelf: as `PageStore` takes it. rotated: whether vectors are rotated keys.
    """

    found: Clusters
    table: Clusters
    fresh: Tensor
    which: Tensor
    label: Tensor
    gone: Held | None
    shelf: Tensor
    rotated: bool

    def labels(self, view: View) -> Tensor:
        """Cluster of each of the view's columns, int64 [B, G, n], −1 for none; fresh tokens are in their slots."""
        index, fresh = view.index, view.fresh
        real = (self.which[:, :1] < 0).to(torch.uint8).argsort(dim=-1, stable=True).expand_as(self.which)
        among = (index - view.consumed[:, None, None]).clamp(0, self.which.shape[-1] - 1)
        shape = (*self.which.shape[:2], index.shape[-1])
        new = self.which.gather(-1, real).gather(-1, among.expand(shape))
        label = pad(self.label, (0, max(0, int(view.column.max()) + 1 - self.label.shape[-1])), value=-1)
        return torch.where(fresh, new, label[..., view.column])


@dataclass(frozen=True)
class Clustered(Fold):
    """Every token joins a cluster of alike keys; what leaves the window goes into its cluster's pages in host memory.

    bits: random hyperplanes, one bit each. near: a token joins the nearest cluster that differs in fewer bits, else it opens
    one; 0: every token is its own. per_head: whether each key head has clusters of its own, or the heads' keys are one
    vector. unrotated: whether keys are hashed and averaged before their rotation, not after it as in the paper. page: tokens
    of one. ram_bytes: most that full pages take in RAM, None for no limit; disk, disk_bytes, device_bytes: see `Store`.

    On the device are the window and the table of clusters (bits of the first member, mean key, count), which grows with
    what is new in the stream. Members are told by the pages, in RAM.
    """

    near: int = 7
    bits: int = 32
    seed: int = 0
    per_head: bool = False
    unrotated: bool = False
    page: int = 16
    ram_bytes: int | None = None
    disk: str | None = None
    disk_bytes: int | None = None
    device_bytes: int = 0
    rotated: ClassVar[bool] = True
    cut_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits < 1 or not 0 <= self.near <= self.bits + 1:
            raise ValueError(f"bits is {self.bits}, near {self.near}; take 1 bit or more, and near from 0 to bits + 1")
        if self.page < 1:
            raise ValueError(f"page is {self.page}; it must be 1 token or more")

    def suits(self, memory: Memory) -> None:
        if memory.place.moves:
            raise ValueError(
                f"{type(memory.place).__name__} moves what is held, but keys off the device keep the rotation they left "
                "with; take a place that does not move, as Absolute"
            )
        if memory.rows > 1:
            raise ValueError(f"rows is {memory.rows}; clusters are those of one copy of a stream")
        if memory.evict.content:
            raise ValueError(f"{type(memory.evict).__name__} lets layers or heads lose different tokens; take Oldest")

    def groups(self, geometry: Geometry) -> int:
        """How many tables of clusters a row has."""
        return geometry.kv_heads if self.per_head else 1

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        """bits, mean and count of the table, label: int64 [B, G, C], cluster of what is in each slot; shelf: int64 [B]."""
        g, groups = geometry, self.groups(geometry)
        like = torch.empty(0, dtype=g.dtype, device=g.device)
        table = Clusters.empty((g.batch, groups), self.bits, g.kv_heads // groups * g.head_dim, like)
        label = torch.zeros(g.batch, groups, 0, dtype=torch.int64)
        return {**table.tensors(), "label": label, "shelf": torch.arange(g.batch)}

    def store(self, geometry: Geometry, frame: int) -> PageStore:
        g, groups = geometry, self.groups(geometry)
        limit = self.ram_bytes
        buffer = 0 if limit is None else limit // 8  # where the store collects what it writes at once
        blocks = Store(
            g.layers, g.device, ram_bytes=buffer, disk=self.disk, disk_bytes=self.disk_bytes,
            device_bytes=self.device_bytes, index="ram",
        )  # fmt: skip
        return PageStore(
            g.layers, groups, g.kv_heads // groups, (g.head_dim, g.value_dim), self.page, g.dtype, blocks,
            None if limit is None else limit - buffer,
        )  # fmt: skip

    def leave(self, view: View, leaving: Tensor) -> None:
        assert view.brought is not None
        if view.recache:
            raise ValueError("clusters count a token once; Clustered goes without `recache`")
        g, mine, groups = view.geometry, view.mine, self.groups(view.geometry)
        keys = view.brought[0]
        vectors = keys if self.unrotated else view.turned(keys, view.stream // view.frame)
        vectors = vectors.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [B, G, m, d]
        planes = _planes(vectors.shape[-1], self.bits, self.seed, g.dtype, g.device)
        there = view.index[..., -view.m :] != EMPTY
        real = None if bool(there.all()) else there.expand(vectors.shape[:3])
        found = Clusters.of(mine)
        table, which = found.join(vectors, planes, self.near, real)
        used = table.used()
        view.shared[Clustered, view.layer] = Joined(
            found.first(used), table.first(used), vectors, which, mine["label"], self._gone(view, leaving),
            mine["shelf"], not self.unrotated,
        )  # fmt: skip
        mine.update(table.tensors())

    def _gone(self, view: View, leaving: Tensor) -> Held | None:
        """Copies of what leaves the window, with the clusters it is in."""
        if not bool(leaving.any()):
            return None
        assert view.stored is not None
        label = view.mine["label"]
        leaving = leaving[:, :1]  # all heads lose the same
        count = leaving.sum(-1, keepdim=True)
        columns = (~leaving).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(count.max())]
        there = torch.arange(columns.shape[-1], device=columns.device) < count
        index = torch.where(there, view.index[:, :1].gather(-1, columns), EMPTY)
        columns = columns.expand(len(label), -1, -1)
        cluster = label.gather(-1, columns.clamp_max(label.shape[-1] - 1).expand(-1, label.shape[1], -1))
        cluster = torch.where(there, cluster, -1)
        keys, values = (x.gather(2, columns[..., None].expand(-1, x.shape[1], -1, x.shape[3])) for x in view.stored)
        return Held(keys, values, cluster, index.expand_as(cluster))

    def arrive(self, view: View) -> None:
        joined: Joined = view.shared[Clustered, view.layer]
        view.mine["label"] = joined.labels(view)
        if joined.gone is not None:
            gone = joined.gone
            view.store.put(view.layer, gone.keys, gone.values, gone.cluster, gone.index, view.mine["shelf"])


@dataclass(frozen=True)
class UntilMass(Recall):
    """A query takes clusters, best mean key first, until they hold `share` of the attention, and attends all their tokens.

    What is held and in the query's past it attends in any case. weights: what a token of a cluster with score s counts, of
    the sum of which a share is taken: e^s ("exp"), which is its attention if it were at the mean; or s above the least
    ("shifted"). union: whether what any query of a step takes is seen by all of them that share a key head, by a table
    that they have joined, as in the paper; the step is the chunk then. Otherwise each query has what it took itself by what
    came before it, and any cut gives the same. Goes with the fold `Clustered`.
    """

    share: float
    weights: Weights = "exp"
    union: bool = False

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"share is {self.share}; take a share above 0 of the attention, or 1 for all of it")
        if self.weights not in ("exp", "shifted"):
            raise ValueError(f"weights is {self.weights!r}; it must be 'exp' or 'shifted'")

    def suits(self, memory: Memory) -> None:
        if not isinstance(memory.fold, Clustered):
            raise ValueError(f"UntilMass takes clusters, and {type(memory.fold).__name__} makes none; use Clustered")
        if isinstance(memory.place, DistanceCeiling):
            raise ValueError(
                "keys that `DistanceCeiling` places anew for each query have no one mean; take another place"
            )

    @property
    def cut_free(self) -> bool:
        return not self.union

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        g, joined = view.geometry, view.shared[Clustered, view.layer]
        assert view.query is not None
        taken = self.taken(view, query if joined.rotated else view.query, joined, scale)
        if bool((joined.which < 0).any()):  # padding wants nothing
            taken = taken & (joined.which[:, :1] >= 0)[:, :, None, :, None]
        if self.union:
            taken = taken.any(3, keepdim=True).any(2, keepdim=True)
        parts = [Part(keys, values, _near(bias, g))]
        far = view.shared[UntilMass, view.layer] = view.store.fetch(view.layer, taken.any(3).any(2), joined.shelf)
        for tokens in far:
            sees = _of_pieces(taken, tokens)
            parts.append(
                Part(tokens.keys, tokens.values, self._cost(view, sees, tokens.index, tokens.head), tokens.head)
            )
        beside = [joined.gone, self._out_of_reach(view, joined, keys, values, bias)]
        if some := [held for held in beside if held is not None]:
            shape = (view.batch, *taken.shape[1:3], view.m, -1)
            sees = torch.cat([self._of_held(taken, held).expand(shape) for held in some], -1)
            k, v, index = (
                torch.cat(x, 2) for x in zip(*((held.keys, held.values, held.index) for held in some), strict=True)
            )
            parts.append(Part(k, v, self._cost(view, sees, index)))
        if len(parts) == 1:
            return super().attend(view, query, keys, values, bias, scale)
        return attention_of_parts(query, parts, scale, g.softcap, view.null)

    def taken(self, view: View, query: Tensor, joined: Joined, scale: float) -> Tensor:
        """Which clusters each query takes, bool [B, H_kv, queries that share the key head, m, C].

        query: [B, H_q, m, D], rotated if the vectors that were clustered are.
        """
        g, table = view.geometry, joined.table if self.union else joined.found
        query = query.unflatten(1, (g.kv_heads, -1)).to(torch.promote_types(query.dtype, torch.float32)) * scale
        scores = _products(query, _by_head(table.mean, g))
        count = table.count[:, :, None, None]
        if view.m > 1 and view.causal and not self.union:
            scores, count = _so_far(query, scores, joined, g)
        if g.softcap is not None:
            scores = g.softcap * torch.tanh(scores / g.softcap)
        return until_mass(scores, count, self.share, self.weights)

    def _of_held(self, taken: Tensor, held: Held) -> Tensor:
        """Which queries see what is held no more, or out of their reach, [B, H_kv, groups or 1, m or 1, n]."""
        sees = _of_tokens(taken, held.cluster)
        return sees if held.hidden is None else held.hidden & (sees | self.union)

    def _out_of_reach(
        self, view: View, joined: Joined, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> Held | None:  # fmt: skip
        """What is still held, but not seen any more by later queries of the step."""
        if view.m == 1 or bias is None:
            return None
        before = view.stream if view.causal else view.consumed[:, None].expand_as(view.stream)
        index = view.index[:, :1, None]
        hidden = (bias[:, :1] == -torch.inf) & (index >= 0) & (index < before[:, None, :, None])  # [R, 1, m, n]
        columns = hidden.flatten(0, 2).any(0).nonzero()[:, 0]
        if not len(columns):
            return None
        label = joined.labels(view)[..., columns]
        return Held(
            keys[:, :, columns], values[:, :, columns], label, index[:, :, 0, columns].expand_as(label),
            hidden[:, :, None, :, columns],
        )  # fmt: skip

    def _cost(self, view: View, sees: Tensor, index: Tensor, head: Tensor | None = None) -> Tensor:
        """What is added to scores of tokens that are not in the window: −∞ where a query does not see them.

        sees: bool [B, H_kv, groups or 1, m or 1, n], index [B, G, n]; for pieces [N, …, …, n / k], index [N, n], and head.
        """
        g = view.geometry
        reach, slopes = g.reach[view.layer], g.alibi
        apart = None
        if reach is not None or slopes is not None:
            sees = sees.repeat_interleave(index.shape[-1] // sees.shape[-1], -1)
            stream, index = view.stream // view.frame, index // view.frame
            if head is None:
                apart = (stream[:, None, :, None] - index[:, :, None])[:, :, None]  # [B, G, 1, m, n]
            else:
                apart = (stream.expand(view.batch, -1)[head // g.kv_heads][..., None] - index[:, None])[:, None]
        if reach is not None and apart is not None:
            sees = sees & (apart < reach)
        cost = torch.zeros(sees.shape, dtype=g.dtype, device=g.device).masked_fill_(~sees, -torch.inf)
        if slopes is not None and apart is not None:
            slopes = slopes.to(g.device, g.dtype).unflatten(0, (g.kv_heads, -1))[..., None, None]
            cost = cost - (slopes if head is None else slopes[head % g.kv_heads]) * apart
        return cost


@dataclass(frozen=True, eq=False)
class Held:
    """Keys [B, H_kv, n, D], values [B, H_kv, n, D_v], cluster and stream index int64 [B, G, n], −1 and EMPTY where less.

    hidden: bool [R, 1, 1, m, n], which queries do not see what is in the window; None: it is there for none.
    """

    keys: Tensor
    values: Tensor
    cluster: Tensor
    index: Tensor
    hidden: Tensor | None = None


def _near(bias: Tensor | None, geometry: Geometry) -> Tensor | None:
    """A bias [R, 1 or H_q, 1 or m, n] as one of [R, 1 or H_kv, 1 or groups, 1 or m, n]."""
    if bias is None:
        return None
    return bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (geometry.kv_heads, -1))


def _by_head(x: Tensor, geometry: Geometry) -> Tensor:
    """Vectors that were clustered, [B, G, n, d], as those of each key head: [B, H_kv, n, D]."""
    return x.unflatten(-1, (-1, geometry.head_dim)).transpose(2, 3).flatten(1, 2)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """query [B, H_kv, groups, m, D] times keys [B, H_kv, n, D]: [B, H_kv, groups, m, n] in the dtype of query."""
    scores = query.flatten(2, 3) @ keys.to(query.dtype).transpose(-1, -2)
    return scores.unflatten(2, query.shape[2:4])


def _of_tokens(taken: Tensor, cluster: Tensor) -> Tensor:
    """Whether tokens of clusters [B, G, n] are taken, bool [B, H_kv, …, …, n], by what is taken [B, H_kv, …, …, C]."""
    at = cluster[:, :, None, None].expand(*taken.shape[:-1], -1)
    return taken.gather(-1, at.clamp_min(0)) & (at >= 0)


def _of_pieces(taken: Tensor, tokens: Tokens) -> Tensor:
    """The same for pieces: bool [N, …, …, n / k]."""
    by_cluster = taken.flatten(0, 1).movedim(-1, 1).contiguous()  # [B · H_kv, C, …, …]
    sees = by_cluster[tokens.head[:, None], tokens.cluster.clamp_min(0)] & (tokens.cluster >= 0)[..., None, None]
    return sees.movedim(1, -1)


def _so_far(query: Tensor, scores: Tensor, joined: Joined, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Scores and counts of clusters as each query finds them, with those of the step's tokens that came before it.

    query [B, H_kv, groups, m, D]; scores [B, H_kv, groups, m, C] of the table before the step, which may be written to.
    The counts are [B, G, 1, m, C]. Only clusters that the step's tokens join change.
    """
    which, places = joined.which, scores.shape[-1]
    real, m = which >= 0, which.shape[-1]
    earlier = (before(m, which.device) & real[..., None, :]).to(query.dtype)  # [B, G, query, token]
    same = (which[..., :, None] == which[..., None, :]).to(query.dtype)
    more = (_products(query, _by_head(joined.fresh, geometry)) * earlier[:, :, None]) @ same[:, :, None]
    number = (earlier @ same).long()
    held = joined.found.count.gather(-1, which.clamp_min(0))  # [B, G, m]
    count = held[:, :, None] + number
    at = torch.where(real, which, places)  # one place more takes what is not there
    if not bool(real.all()):
        scores = pad(scores, (0, 1))
    at_scores = at[:, :, None, None].expand(*scores.shape[:-1], -1)
    sums = scores.gather(-1, at_scores) * held[:, :, None, None] + more
    scores.scatter_(-1, at_scores, sums / count[:, :, None].clamp_min(1))
    counts = pad(joined.found.count, (0, 1))[:, :, None].expand(-1, -1, m, -1)
    counts = counts.scatter(-1, at[:, :, None].expand_as(count), count)
    return scores[..., :places], counts[..., :places][:, :, None]
