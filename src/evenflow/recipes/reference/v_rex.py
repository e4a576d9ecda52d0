"""V-Rex (arXiv 2512.12284): all tokens in clusters of alike keys; each query takes clusters until their mass is enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, cat

from ...memory import Rope
from .plain import Call, attention, rotated


@dataclass
class Cluster:
    """Bits of its first key, its keys, the stream indices they belong to."""

    bits: Tensor
    keys: list[Tensor] = field(default_factory=list)
    members: list[int] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        return sum(self.keys[1:], self.keys[0]) / len(self.keys)


def clustered(table: list[Cluster], keys: Tensor, index: list[int], planes: Tensor, th_hd: int) -> list[Cluster]:
    """The table with keys [n, d] of tokens `index` in it, one after the other (stage A)."""
    table = [Cluster(c.bits, [*c.keys], [*c.members]) for c in table]
    for key, at in zip(keys, index, strict=True):
        bits = key @ planes > 0
        distances = [int((bits ^ c.bits).sum()) for c in table]
        near = min(range(len(table)), key=lambda c: (distances[c], c), default=None)
        if near is None or distances[near] >= th_hd:
            table.append(Cluster(bits, [key], [at]))
        else:
            table[near].keys.append(key)
            table[near].members.append(at)
    return table


def wicsum(s: Tensor, counts: Tensor, th_r: float, weights: str = "exp") -> list[int]:
    """The clusters one query takes: best first by score s [C], until weight · count reaches th_r of the sum (stage B)."""
    if th_r >= 1:
        return [*range(len(s))]
    if not len(s):
        return []
    weight = (s - s.max()).exp() if weights == "exp" else s - s.min()
    mass = (weight * counts).double().tolist()
    enough, taken, so_far = th_r * sum(mass) * (1 - 1e-12), [], 0.0
    for c in sorted(range(len(s)), key=lambda c: (-float(s[c]), c)):
        if so_far >= enough:
            break
        taken.append(c)
        so_far += mass[c]
    return sorted(taken)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int = 1, window: int, planes: Tensor, **options: Any
) -> list[list[Tensor]]:
    """Per layer and call; planes [d, n_hp] of every layer: random in the paper, given here. options: as `run`."""
    return run(layers, rope, window=window, planes=planes, **options)[0]


def run(
    layers: list[list[Call]], rope: Rope | None, *, window: int, planes: Tensor, th_hd: int = 7, th_r: float = 0.3,
    per_head: bool = False, union: bool = False, weights: str = "exp", unrotated: bool = False,
) -> tuple[list[list[Tensor]], list[list[list[Cluster]]]]:  # fmt: skip
    """Outputs per layer and call; per layer and head (one, unless per_head) the clusters at the end.

    window: how many tokens before it are on the device for a query, which attends all of them. union: a call as a frame
    of the paper, all of it clustered before any of it is scored, and what one query takes is for all; else token by token,
    each scored before it is clustered, and each has only what it took itself.
    """
    outputs, ends = [], []
    for calls in layers:
        kv_heads = calls[0].k.shape[0]
        state = State(calls[0].k[:, :0], calls[0].v[:, :0], [[] for _ in range(kv_heads if per_head else 1)])
        out = []
        for call in calls:
            m = call.k.shape[1]
            pieces = [slice(0, m)] if union else [slice(i, i + 1) for i in range(m)]
            after, y = state, []
            for piece in pieces:
                q, k, v = call.q[:, piece], call.k[:, piece], call.v[:, piece]
                got, after = step(after, q, k, v, rope, window, planes, th_hd, th_r, union, weights, unrotated)
                y.append(got)
            out.append(cat(y, 1))
            if call.commit:
                state = after
        outputs.append(out)
        ends.append(state.tables)
    return outputs, ends


@dataclass
class State:
    """Rotated keys [H_kv, n, D] and values of all tokens so far, and the tables of clusters."""

    k: Tensor
    v: Tensor
    tables: list[list[Cluster]]


def step(
    state: State, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, window: int, planes: Tensor, th_hd: int,
    th_r: float, union: bool, weights: str, unrotated: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """What the queries q [H_q, m, D] of the next tokens read, and the state with these tokens."""
    n, (kv_heads, m, dim), heads = state.k.shape[1], k.shape, q.shape[0]
    groups, one = heads // kv_heads, len(state.tables) == 1
    index = [*range(n, n + m)]
    query, fresh = rotated(q, index, rope), rotated(k, index, rope)
    judging, clustering = (q, k) if unrotated else (query, fresh)
    parts = clustering.transpose(0, 1).reshape(1, m, -1) if one else clustering
    new = [clustered(t, part, index, planes, th_hd) for t, part in zip(state.tables, parts, strict=True)]
    keys, values = cat([state.k, fresh], 1), cat([state.v, v], 1)
    own = []
    for h in range(heads):
        kv = h // groups
        table = (new if union else state.tables)[0 if one else kv]
        part = slice(kv * dim, kv * dim + dim) if one else slice(None)
        own.append([taken(row, table, part, th_r, weights) for row in judging[h]])
    out = []
    for h in range(heads):
        kv = h // groups
        of_all = {token for other in own[kv * groups : kv * groups + groups] for tokens in other for token in tokens}
        for i in range(m):
            near = {*range(max(n - window, 0), n + m)}
            seen = sorted(t for t in (of_all if union else own[h][i]) | near if t <= n + i)
            out.append(attention(query[h : h + 1, i : i + 1], keys[kv, seen][None], values[kv, seen][None]))
    return cat(out, 1).reshape(heads, m, -1), State(keys, values, new)


def taken(q: Tensor, table: list[Cluster], part: slice, th_r: float, weights: str) -> set[int]:
    """Stream indices that a query [D] takes from a table, by that part of its clusters' mean keys."""
    s = [float(q @ c.mean[part]) * q.shape[0] ** -0.5 for c in table]
    counts = [len(c.members) for c in table]
    chosen = wicsum(q.new_tensor(s), q.new_tensor(counts), th_r, weights)
    return {at for c in chosen for at in table[c].members}
