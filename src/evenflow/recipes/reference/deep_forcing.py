"""Deep Forcing (arXiv 2512.05081): a deep sink that moves along, and old tokens that stay if recent queries use them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, tensor

from ...memory import Rope
from .plain import Call, attention, rotated


@dataclass(frozen=True)
class Token:
    """One token, un-rotated: q [H_q, D], k [H_kv, D], v [H_kv, D_v], its number, frame, and place in the frame."""

    q: Tensor
    k: Tensor
    v: Tensor
    number: int
    time: int
    where: list[int]


@dataclass
class State:
    """A layer between calls: the sink stands at `start`; how often each token was selected."""

    cache: list[Token] = field(default_factory=list)
    voters: list[Token] = field(default_factory=list)
    start: int = 0
    used: Counter[int] = field(default_factory=Counter)
    count: int = 0


def turned(x: list[Tensor], times: list[int], tokens: list[Token], rope: Rope | None) -> Tensor:
    """[H, n, D], each at its time and place."""
    return rotated(torch.stack(x, 1), tensor([[t, *token.where] for t, token in zip(times, tokens, strict=True)]), rope)


def scores(queries: Tensor, keys: Tensor, fusion: str) -> Tensor:
    """φ [n] for recent queries [H_q, r, D] and keys [H_kv, n, D], both rotated: logits summed over heads."""
    groups = queries.shape[0] // keys.shape[0]
    logits = torch.einsum("hrd,hnd->rn", queries, keys.repeat_interleave(groups, 0))
    logits = logits / (queries.shape[2] ** 0.5 * queries.shape[0])
    return logits.sum(0) if fusion == "sum" else logits.amax(0)


def selected(phi: Tensor, candidates: list[int], count: int) -> set[int]:
    """The `count` candidates (places in the cache) of the highest score."""
    return set(sorted(candidates, key=lambda j: (-float(phi[j]), j))[: max(count, 0)])


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, window: int = 21, capacity: int = 16, sink: int = 10,
    recent: int = 4, fusion: str = "sum", reuse: int = 7,
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call; a decision is taken at the first call of a chunk and holds for the others."""
    outputs = []
    for calls in layers:
        state, decided, out = State(), None, []
        for call in calls:
            m = call.q.shape[1]
            where = call.tags.get("coordinates", torch.zeros(m, rope.coordinates if rope else 0)).tolist()
            fresh = [
                Token(call.q[:, i], call.k[:, i], call.v[:, i], state.count + i, (state.count + i) // frame, where[i])
                for i in range(m)
            ]
            cache, begins = state.cache + fresh, state.count // frame
            if decided is None:
                start, used, stay = state.start, state.used, {token.number for token in cache}
                if len(cache) > window * frame:
                    times = [token.time for token in cache]
                    votes = (state.voters + fresh)[-recent * frame :]
                    phi = scores(
                        turned([t.q for t in votes], [t.time for t in votes], votes, rope),
                        turned([t.k for t in cache], times, cache, rope),
                        fusion,
                    )
                    last = max(recent * frame, m)
                    middle = range(sink * frame, len(cache) - last)
                    free = [j for j in middle if not reuse or used[cache[j].number] < reuse]
                    chosen = selected(phi, free, (capacity - sink) * frame - last)
                    used = used + Counter(cache[j].number for j in chosen)
                    stay = {t.number for j, t in enumerate(cache) if j not in middle or j in chosen}
                    start = begins - (len(stay) // frame - sink) - sink
                decided = start, used, stay
            start, used, stay = decided
            cache = [token for token in cache if token.number in stay]
            places = [t.time + start if j < sink * frame else t.time for j, t in enumerate(cache)]
            keys = turned([t.k for t in cache], places, cache, rope)
            queries = turned([t.q for t in fresh], [t.time for t in fresh], fresh, rope)
            out.append(attention(queries, keys, torch.stack([t.v for t in cache], 1)))
            if call.commit:
                votes = (state.voters + fresh)[-recent * frame :]
                state, decided = State(cache, votes, start, used, state.count + m), None
        outputs.append(out)
    return outputs
