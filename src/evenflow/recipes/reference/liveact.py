"""LiveAct, arXiv 2603.11746: anchor, two compressed latents, two short-term latents, the block being generated."""

from __future__ import annotations

import torch
from torch import Tensor

from ...memory import Rope
from .plain import Call, attention, rotated


def compressed(frames: list[Tensor], weights: Tensor, grouping: str) -> Tensor:
    """Five latents [H, F, D] → one, by a convolution of kernel and stride 5 with `weights` [5]."""
    if grouping == "temporal":
        return sum(weight * frame for weight, frame in zip(weights, frames, strict=True))
    tokens = torch.cat(frames, 1)
    count = frames[0].shape[1]
    return torch.stack([sum(weights[j] * tokens[:, 5 * i + j] for j in range(5)) for i in range(count)], 1)


def reference(
    layers: list[list[Call]],
    rope: Rope | None,
    *,
    frame: int,
    grouping: str = "temporal",
    weights: Tensor | None = None,
) -> list[list[Tensor]]:
    """Per copy (`Call.row`) a list of latents in the order of the slots; see the card's sections 3 and 4."""
    outputs = []
    for layer, calls in enumerate(layers):
        slots: dict[int | None, list[tuple[Tensor, Tensor]]] = {}
        outputs.append([])
        kernel = torch.full((5,), 0.2, dtype=torch.float64) if weights is None else weights[layer].double()
        for call in calls:
            held = list(slots.get(call.row, []))
            fresh = [(call.k[:, i : i + frame], call.v[:, i : i + frame]) for i in range(0, call.k.shape[1], frame)]
            while len(held) > 6:  # two anchors, two memories, then at most two short-term latents stay
                gone = held[2:4] + held[4:-2]
                assert len(gone) == 10, "blocks are of eight latents, the first of six"
                memory = [
                    tuple(compressed([pair[n] for pair in gone[a : a + 5]], kernel, grouping) for n in (0, 1))
                    for a in (0, 5)
                ]
                held = held[:2] + memory + held[-2:]
            there = held + fresh
            keys, values = (torch.cat([pair[n] for pair in there], 1) for n in (0, 1))
            axes = 1 if rope is None else 1 + rope.coordinates
            place = [[n // frame] + [0] * (axes - 1) for n in range(keys.shape[1])]
            query = rotated(call.q, place[-call.q.shape[1] :], rope)
            outputs[-1].append(attention(query, rotated(keys, place, rope), values))
            if call.commit:
                slots[call.row] = there
    return outputs
