"""ReKV (arXiv 2503.00540): a sliding window that reads, and for each question the frames of all it has read."""

from __future__ import annotations

from torch import Tensor, arange, cat

from ...memory import Rope
from .plain import Call, attention, rotated

Pair = tuple[Tensor, Tensor]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int = 1, n_init: int, n_local: int
) -> list[list[Tensor]]:
    """Per layer and call: one query at a time, over the last n_local tokens and the first n_init."""
    outputs = []
    for calls in layers:
        keys, values, out = calls[0].k[:, :0], calls[0].v[:, :0], []
        for call in calls:
            k, v = cat([keys, call.k], 1), cat([values, call.v], 1)
            first = keys.shape[1]
            out.append(cat([one(call.q[:, i : i + 1], k, v, first + i, rope, n_init, n_local)
                            for i in range(call.q.shape[1])], 1))  # fmt: skip
            if call.commit:
                keys, values = k, v
        outputs.append(out)
    return outputs


def one(q: Tensor, k: Tensor, v: Tensor, p: int, rope: Rope | None, n_init: int, n_local: int) -> Tensor:
    """What the query q [H_q, 1, D] of token p reads from all un-rotated k and v up to it: [H_q, 1, D_v]."""
    if p < n_local:
        return attention(rotated(q, [p], rope), rotated(k[:, : p + 1], arange(p + 1), rope), v[:, : p + 1])
    window = [j for j in range(p - n_local + 1, p + 1) if j >= n_init]
    near = rotated(q, [p], rope), rotated(k[:, window], window, rope)
    far = rotated(q, [n_local - 1], rope), rotated(k[:, :n_init], [0] * n_init, rope)
    groups = q.shape[0] // k.shape[0]
    scores = [
        query @ key.repeat_interleave(groups, 0).transpose(1, 2) * q.shape[2] ** -0.5 for query, key in (far, near)
    ]
    seen = v[:, [*range(n_init), *window]].repeat_interleave(groups, 0)
    return cat(scores, 2).softmax(2) @ seen


def blocks(tokens: int, n_init: int, block: int) -> list[range]:
    """The stream indices of every block of a stream of that many tokens; the last one may not be full yet."""
    return [range(start, min(start + block, tokens)) for start in range(n_init, tokens, block)]


def representative(k: Tensor, heads: int) -> Tensor:
    """Mean of a block's un-rotated keys [H_kv, b, D], each head repeated for its queries: [H_q · D]."""
    return k.mean(1).repeat_interleave(heads // k.shape[0], 0).flatten()


def select(q: Tensor, representatives: list[Tensor], size: int, chunk: int = 1) -> list[int]:
    """The `size` blocks that a question's queries [H_q, m, D] like best, in groups of `chunk`, ascending."""
    if len(representatives) <= size:
        return [*range(len(representatives))]
    mean = q.mean(1).flatten()
    scores = [float(mean @ r) for r in representatives]
    groups = [scores[i : i + chunk] for i in range(0, len(scores), chunk)]
    means = [sum(group) / len(group) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-means[g], g))[: size // chunk]
    return sorted(i for g in best for i in range(g * chunk, g * chunk + len(groups[g])))


def ask(
    stream: list[Pair], question: list[Call], calls: list[list[Call]], rope: Rope | None, *, n_init: int, n_local: int,
    block: int, size: int, chunk: int = 1,
) -> tuple[list[list[int]], list[Tensor], list[list[Tensor]]]:  # fmt: skip
    """A question over all k, v [H_kv, n, D] that each layer has read, and what is said after it.

    Per layer: the stream indices retrieved, what the question reads, and what each of `calls` reads, which stand
    behind what was retrieved (the question does not: its prompt says it again). All that is there is read as if it were
    a stream: from token n_local on through the window.
    """
    retrieved, asked, answers = [], [], []
    for (keys, values), query, later in zip(stream, question, calls, strict=True):
        n = keys.shape[1]
        cut = blocks(n, n_init, block)
        ids = select(query.q, [representative(keys[:, part], query.q.shape[0]) for part in cut], size, chunk)
        index = [*range(min(n_init, n)), *(j for i in ids for j in cut[i])]
        retrieved.append(index)
        asked.append(append(keys[:, index], values[:, index], query, rope, n_init, n_local)[0])
        k, v, out = keys[:, index], values[:, index], []
        for call in later:
            y, k, v = append(k, v, call, rope, n_init, n_local)
            out.append(y)
        answers.append(out)
    return retrieved, asked, answers


def append(
    k: Tensor, v: Tensor, call: Call, rope: Rope | None, n_init: int, n_local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a call reads behind k, v, which are at positions 0, 1, 2, …; and k, v with it."""
    first = k.shape[1]
    k, v = cat([k, call.k], 1), cat([v, call.v], 1)
    out = [one(call.q[:, i : i + 1], k, v, first + i, rope, n_init, n_local) for i in range(call.q.shape[1])]
    return cat(out, 1), k, v
