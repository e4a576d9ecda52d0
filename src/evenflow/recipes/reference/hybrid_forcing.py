"""Hybrid Forcing (arXiv 2604.10103): sparse softmax over sink and window, plus a linear state of all that left them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, arange, cat, stack, zeros

from ...memory import Rope
from .plain import Call, attention, rotated


@dataclass
class State:
    """One layer's linear state: mean of φ(k) [H, D], mean of rotated k ⊗ v [H, D, D_v], how many tokens are in it."""

    kmean: Tensor
    kv: Tensor
    count: int = 0


def places(call: Call, first: int, frame: int) -> Tensor:
    """(t, row, column) of each token of a call whose first frame stands at time `first`: [m, axes]."""
    time = (first + arange(call.k.shape[1]) // frame)[:, None]
    return cat([time, call.tags["coordinates"]], 1) if "coordinates" in call.tags else time


def kept_blocks(q: Tensor, k: Tensor, ratio: float, block: int) -> list[list[int]]:
    """For each block of one head's queries [m, D], the blocks of its keys [n, D] that it attends."""
    means = [part.mean(0) for part in k.split(block)]
    kept = []
    for part in q.split(block):
        scores = [float(part.mean(0) @ mean) for mean in means]
        best = sorted(range(len(means)), key=lambda b: -scores[b])
        kept.append(sorted(best[: max(1, int(ratio * len(means)))]))
    return kept


def sparse(q: Tensor, k: Tensor, v: Tensor, ratio: float, block: int) -> Tensor:
    """Softmax of each block of queries [H_q, m, D] over the blocks of keys that it keeps."""
    out = []
    for h in range(q.shape[0]):
        key, value = (x[h * k.shape[0] // q.shape[0]] for x in (k, v))
        parts = []
        for part, kept in zip(q[h].split(block), kept_blocks(q[h], key, ratio, block), strict=True):
            seen = [i for i in range(len(key)) if i // block in kept]
            parts.append(attention(part[None], key[None, seen], value[None, seen])[0])
        out.append(cat(parts))
    return stack(out)


def absorb(state: State, k: Tensor, turned: Tensor, v: Tensor) -> State:
    """The state with one more chunk: k un-rotated and rotated [H, s, D], v [H, s, D_v]."""
    n, s = state.count, k.shape[1]
    kmean = (k.relu().sum(1) + n * state.kmean) / (n + s)
    kv = (turned.transpose(-1, -2) @ v + n * state.kv) / (n + s)
    return State(kmean, kv, n + s)


def linear(state: State, features: Tensor, turned: Tensor) -> Tensor:
    """What queries read: φ(q) and its rotation [H_q, m, D] → [H_q, m, D_v]."""
    groups = features.shape[0] // state.kmean.shape[0]
    kmean, kv = state.kmean.repeat_interleave(groups, 0), state.kv.repeat_interleave(groups, 0)
    return (turned @ kv) / ((features * kmean[:, None]).sum(-1, keepdim=True) + 1e-6)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, sink: int = 3, window: int = 6, horizon: int = 21,
    ratio: float = 0.2, block: int = 64, projection: Tensor | None = None, raw_query: bool = False,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; projection [layers, D_v, D_v + 1] is weight and bias of each layer's P."""
    return run(
        layers, rope, frame=frame, sink=sink, window=window, horizon=horizon, ratio=ratio, block=block,
        projection=projection, raw_query=raw_query,
    )[0]  # fmt: skip


def run(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, sink: int, window: int, horizon: int, ratio: float,
    block: int, projection: Tensor | None, raw_query: bool,
) -> tuple[list[list[Tensor]], list[list[State]]]:  # fmt: skip
    """Outputs per layer and call; per layer the state after each committed call."""
    outputs, states = [], []
    for layer, calls in enumerate(layers):
        frames: list[Call] = []  # committed ones
        heads, dim, wide = calls[0].k.shape[0], calls[0].k.shape[2], calls[0].v.shape[2]
        state, taken = State(zeros(heads, dim).double(), zeros(heads, dim, wide).double()), 0
        out, history = [], []
        for call in calls:
            fresh, f = call.k.shape[1] // frame, len(frames)
            start = min(f, horizon - fresh)  # where the queries stand
            first = max(f + fresh - window, 0)  # first frame of the window
            here, now = places(call, start, frame), state
            for t in range(taken, first):
                turned = rotated(frames[t].k, places(frames[t], t - f + start, frame), rope)
                now = absorb(now, frames[t].k, turned, frames[t].v)
            old = [(t, t) for t in range(min(sink, f))]
            old += [(t, t - f + start) for t in range(max(first, sink), f)]
            held = [rotated(frames[t].k, places(frames[t], at, frame), rope) for t, at in old]
            k = cat([*held, rotated(call.k, here, rope)], 1)
            v = cat([*(frames[t].v for t, _ in old), call.v], 1)
            y = sparse(rotated(call.q, here, rope), k, v, ratio, block)
            if projection is not None and now.count:
                features = call.q.relu()
                read = linear(now, features, rotated(call.q if raw_query else features, here, rope))
                y = y + read @ projection[layer, :, :-1].T + projection[layer, :, -1]
            out.append(y)
            if call.commit:
                state, taken = now, max(first, taken)
                history.append(state)
                for n in range(fresh):
                    part = slice(n * frame, (n + 1) * frame)
                    tags = {name: tag[part] for name, tag in call.tags.items()}
                    frames.append(Call(call.q[:, part], call.k[:, part], call.v[:, part], tags=tags))
        outputs.append(out)
        states.append(history)
    return outputs, states
