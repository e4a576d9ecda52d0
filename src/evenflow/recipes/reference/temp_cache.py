"""TempCache, AnnSA and AnnCA (arXiv 2602.01801): keys that go on from frame to frame are one key that counts for more."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, arange, cat, stack, tensor
from torch.nn.functional import cosine_similarity

from ...memory import Rope
from .plain import Call, attention, rotated


@dataclass
class Group:
    """Tokens that are one: key [D], mean value [D_v], how many, place of the newest, frame of the newest, its index."""

    key: Tensor
    value: Tensor
    count: int
    place: Tensor
    frame: int
    index: int


def places(call: Call, first: int, frame: int) -> Tensor:
    """(t, row, column) of each token of a call whose first frame is number `first`: [m, axes]."""
    time = (first + arange(call.k.shape[1]) // frame)[:, None]
    return cat([time, call.tags["coordinates"]], 1) if "coordinates" in call.tags else time


def merge(
    groups: list[Group], probes: Tensor, keys: Tensor, values: Tensor, place: Tensor, number: int, first: int,
    tau: float, representative: str = "last",
) -> list[Group]:  # fmt: skip
    """The groups of one head after frame `number`, whose tokens (probes [n, D] search, keys [n, D]) begin at index `first`."""
    candidates = [g for g in groups if g.frame == number - 1]
    before = [g.key for g in candidates]  # every token of the frame is compared with what was there before the frame
    for j in range(len(keys)):
        new = Group(keys[j], values[j], 1, place[j], number, first + j)
        if candidates:
            best = int(stack([probes[j] @ key for key in before]).argmax())
            if float(cosine_similarity(keys[j], before[best], dim=0)) > tau:
                old = candidates[best]
                old.value = (old.count * old.value + values[j]) / (old.count + 1)
                if representative == "last":
                    old.key = keys[j]
                elif representative == "mean":
                    old.key = (old.count * old.key + keys[j]) / (old.count + 1)
                old.count, old.place, old.frame, old.index = old.count + 1, place[j], number, first + j
                continue
        groups = [*groups, new]
    return groups


def codes(x: Tensor, planes: Tensor) -> list[list[tuple[bool, ...]]]:
    """For each vector of x [n, D], its bits in each table of planes [tables, D, bits]."""
    return [[tuple((row @ table > 0).tolist()) for table in planes] for row in x]


def prompt_tokens(queries: Tensor, keys: Tensor, planes: Tensor) -> list[bool]:
    """AnnCA: which of a prompt's keys [n, D] share a bucket with any of the queries [m, D]."""
    asked = codes(queries, planes)
    return [any(a == b for q in asked for a, b in zip(q, key, strict=True)) for key in codes(keys, planes)]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, tau: float = 0.9, match: str = "query",
    representative: str = "last", planes: Tensor | None = None, sparse_layers: tuple[int, ...] | None = None,
    window: int | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; planes [tables, D, bits]: attention within their buckets and the own frame (None: everything)."""
    return run(
        layers, rope, frame=frame, tau=tau, match=match, representative=representative, planes=planes,
        sparse_layers=sparse_layers, window=window,
    )[0]  # fmt: skip


def run(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, tau: float, match: str = "query",
    representative: str = "last", planes: Tensor | None = None, sparse_layers: tuple[int, ...] | None = None,
    window: int | None = None,
) -> tuple[list[list[Tensor]], list[list[list[list[Group]]]]]:  # fmt: skip
    """Outputs per layer and call; per layer and committed call the groups of each head."""
    outputs, history = [], []
    for layer, calls in enumerate(layers):
        heads, share = calls[0].k.shape[0], calls[0].q.shape[0] // calls[0].k.shape[0]
        groups: list[list[Group]] = [[] for _ in range(heads)]
        out, after, done = [], [], 0
        for call in calls:
            here, m = places(call, done, frame), call.k.shape[1]
            # At its first call a chunk finds what a window of frames leaves of the groups.
            groups = [[g for g in own if window is None or g.frame >= done - window] for own in groups]
            q, fresh = rotated(call.q, here, rope), rotated(call.k, here, rope)
            result = []
            for h in range(call.q.shape[0]):
                own = groups[h // share]
                old = [rotated(g.key[None], g.place[None], rope) for g in own]
                k, v = cat([*old, fresh[h // share]]), cat([*(g.value[None] for g in own), call.v[h // share]])
                bias = tensor([math.log(g.count) for g in own] + [0.0] * m, dtype=k.dtype).expand(m, -1)
                if planes is not None and (sparse_layers is None or layer in sparse_layers):
                    asked, held = codes(q[h], planes), codes(k, planes)
                    for i in range(m):
                        for j in range(len(k)):
                            mine = j >= len(own) and (j - len(own)) // frame == i // frame
                            if not mine and not any(a == b for a, b in zip(asked[i], held[j], strict=True)):
                                bias = bias.clone()
                                bias[i, j] = -math.inf
                result.append(attention(q[h : h + 1], k[None], v[None], bias[None])[0])
            out.append(stack(result))
            if not call.commit:
                continue
            probes = call.q.unflatten(0, (heads, share)).mean(1) if match == "query" else call.k
            for n in range(m // frame):
                at = slice(n * frame, (n + 1) * frame)
                for h in range(heads):
                    groups[h] = merge(
                        groups[h], probes[h, at], call.k[h, at], call.v[h, at], here[at], done + n,
                        (done + n) * frame, tau, representative,
                    )  # fmt: skip
            done += m // frame
            after.append([[replace(g) for g in own] for own in groups])
        outputs.append(out)
        history.append(after)
    return outputs, history
