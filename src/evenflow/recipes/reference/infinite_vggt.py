"""InfiniteVGGT (arXiv 2601.02281): the first frame, and of all other tokens those whose keys are least like the rest."""

from __future__ import annotations

import math

from torch import Tensor, cat, stack

from ...memory import Rope
from .plain import Call, attention, rotated


def budgets(scores: list[float], total: int, tau: float) -> list[int]:
    """Tokens for each layer: softmax((1 − score) / τ) of the total; a layer of like keys gets less."""
    weights = [math.exp((1 - score) / tau) for score in scores]
    return [math.floor(total * weight / sum(weights) + 1e-9) for weight in weights]


def similarity(keys: Tensor) -> Tensor:
    """k̂ · μ for each of one head's keys [n, D], k̂ of length one, μ their mean: [n]."""
    units = keys / keys.norm(dim=1, keepdim=True)
    return units @ units.mean(0)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, total_budget: int, tau: float = 0.5, anchor: int = 1
) -> list[list[Tensor]]:
    """Per layer and call; what leaves is decided in the first call of a chunk, before it attends (section 3)."""
    return run(layers, rope, frame=frame, total_budget=total_budget, tau=tau, anchor=anchor)[0]


def run(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, total_budget: int, tau: float = 0.5, anchor: int = 1
) -> tuple[list[list[Tensor]], list[list[list[list[int]]]], list[list[float]]]:
    """Outputs per layer and call; per committed call, layer and head the stream indices kept; the scores after it."""
    outputs: list[list[Tensor]] = [[] for _ in layers]
    scores, position = [0.0] * len(layers), 0
    stream = [[(first.k[h, :0], first.v[h, :0]) for h in range(len(first.k))] for first, *_ in layers]
    held: list[list[list[int]]] = [[[] for _ in heads] for heads in stream]
    chosen: dict[int, tuple[list[list[int]], float]] = {}
    kept, history = [], []
    for calls in zip(*layers, strict=True):
        limits = budgets(scores, total_budget, tau)
        for layer, call in enumerate(calls):
            m = call.k.shape[1]
            coordinates = call.tags.get("coordinates")
            turn = call.k.new_zeros(m, 1) if coordinates is None else cat([coordinates[:, :1] * 0, coordinates], 1)
            fresh = rotated(call.k, turn, rope)
            everything = [
                (cat([k, fresh[h]]), cat([v, call.v[h]])) for h, (k, v) in enumerate(stream[layer])
            ]  # fmt: skip
            if layer not in chosen:
                candidates = [[*old, *range(position, position + m)] for old in held[layer]]
                keys = [k for k, _ in everything]
                chosen[layer] = keep(candidates, keys, limits[layer], anchor * frame, scores[layer])
            sets = chosen[layer][0]
            k, v = (stack([pair[n][seen] for pair, seen in zip(everything, sets, strict=True)]) for n in (0, 1))
            outputs[layer].append(attention(rotated(call.q, turn, rope), k, v))
            if call.commit:
                stream[layer] = everything
        if calls[0].commit:
            position += calls[0].k.shape[1]
            held, scores = [chosen[n][0] for n in range(len(layers))], [chosen[n][1] for n in range(len(layers))]
            chosen = {}
            kept.append(held)
            history.append(scores)
    return outputs, kept, history


def keep(
    candidates: list[list[int]], keys: list[Tensor], budget: int, anchor: int, score: float
) -> tuple[list[list[int]], float]:
    """For each head, which stream indices of `candidates` stay in the budget (never less than the anchor); the score."""
    budget = max(budget, anchor, 1)
    if len(candidates[0]) <= budget:
        return candidates, score
    sets, like = [], []
    for indices, head in zip(candidates, keys, strict=True):
        firsts, others = indices[:anchor], indices[anchor:]
        alike = similarity(head[others])
        best = alike.argsort(stable=True)[: budget - anchor].tolist()
        sets.append(firsts + sorted(others[n] for n in best))
        like.append(float(alike.mean()))
    return sets, sum(like) / len(like)
