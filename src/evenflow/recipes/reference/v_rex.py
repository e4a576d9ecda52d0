"""V-Rex (arXiv 2512.12284): all tokens in clusters of alike keys; each query takes clusters until their mass is enough."""

from __future__ import annotations

from dataclasses import dataclass, field

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


def wicsum(s: Tensor, counts: Tensor, th_r: float) -> list[int]:
    """The clusters one query takes: best first by score s [C], until e^s · count reaches th_r of the sum (stage B)."""
    if th_r >= 1:
        return [*range(len(s))]
    if not len(s):
        return []
    mass = ((s - s.max()).exp() * counts).double().tolist()
    enough, taken, so_far = th_r * sum(mass) * (1 - 1e-12), [], 0.0
    for c in sorted(range(len(s)), key=lambda c: (-float(s[c]), c)):
        if so_far >= enough:
            break
        taken.append(c)
        so_far += mass[c]
    return sorted(taken)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int = 1, window: int, planes: Tensor, th_hd: int = 7,
    th_r: float = 0.3, per_head: bool = False, causal: bool = True,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; planes [d, n_hp] of every layer: random in the paper, given here."""
    return run(
        layers, rope, window=window, planes=planes, th_hd=th_hd, th_r=th_r, per_head=per_head, causal=causal
    )[0]  # fmt: skip


def run(
    layers: list[list[Call]], rope: Rope | None, *, window: int, planes: Tensor, th_hd: int, th_r: float,
    per_head: bool, causal: bool,
) -> tuple[list[list[Tensor]], list[list[list[Cluster]]]]:  # fmt: skip
    """Outputs per layer and call; per layer and head (one, unless per_head) the clusters at the end.

    window: how many tokens before a call are on the device, where everything is attended. causal: the call is scored
    before it is clustered, and a query has only what it took itself; else the paper's way, all of it together.
    """
    outputs, ends = [], []
    for calls in layers:
        kv_heads, _, dim = calls[0].k.shape
        groups = calls[0].q.shape[0] // kv_heads
        tables: list[list[Cluster]] = [[] for _ in range(kv_heads if per_head else 1)]
        k, v, out = calls[0].k[:, :0], calls[0].v[:, :0], []
        for call in calls:
            n, m = k.shape[1], call.k.shape[1]
            index = [*range(n, n + m)]
            query, fresh = rotated(call.q, index, rope), rotated(call.k, index, rope)
            parts = fresh if per_head else fresh.transpose(0, 1).reshape(1, m, -1)
            new = [clustered(t, part, index, planes, th_hd) for t, part in zip(tables, parts, strict=True)]
            heads = []
            for h in range(query.shape[0]):
                table = (tables if causal else new)[h // groups if per_head else 0]
                part = slice(None) if per_head else slice(h // groups * dim, (h // groups + 1) * dim)
                heads.append([taken(q, table, part, th_r) for q in query[h]])
            keys, values = cat([k, fresh], 1), cat([v, call.v], 1)
            y = []
            for h, rows in enumerate(heads):
                sharing = range(h // groups * groups, h // groups * groups + groups)
                union = {token for other in sharing for tokens in heads[other] for token in tokens}
                for i, own in enumerate(rows):
                    near = {*range(max(n - window, 0), n + m)}
                    seen = sorted(t for t in (own if causal else union) | near if t <= n + i)
                    kv = h // groups
                    y.append(attention(query[h : h + 1, i : i + 1], keys[kv, seen][None], values[kv, seen][None]))
            out.append(cat(y, 1).reshape(query.shape[0], m, -1))
            if call.commit:
                k, v, tables = keys, values, new
        outputs.append(out)
        ends.append(tables)
    return outputs, ends


def taken(q: Tensor, table: list[Cluster], part: slice, th_r: float) -> set[int]:
    """Stream indices that a rotated query [D] takes from a table, by that part of its clusters' mean keys."""
    s = [float(q @ c.mean[part]) * q.shape[0] ** -0.5 for c in table]
    counts = [len(c.members) for c in table]
    chosen = wicsum(q.new_tensor(s), q.new_tensor(counts), th_r)
    return {at for c in chosen for at in table[c].members}
