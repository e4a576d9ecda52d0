"""LiveAct (arXiv 2603.11746): anchors, compressed latents, short-term latents, the block being generated."""

from __future__ import annotations

import torch
from torch import Tensor

from ...memory import Rope
from .plain import Call
from .self_forcing import Frame, attend, frames_of


def compressed(frames: list[Tensor], weights: Tensor, grouping: str) -> Tensor:
    """Five latents [H, F, D] → one, by a convolution of kernel and stride 5 with `weights` [5]."""
    if grouping == "temporal":
        return torch.stack([weight * frame for weight, frame in zip(weights, frames, strict=True)]).sum(0)
    tokens = torch.cat(frames, 1)
    count = frames[0].shape[1]
    fives = [tokens[:, 5 * i : 5 * i + 5] for i in range(count)]
    return torch.stack([(weights[:, None] * five).sum(1) for five in fives], 1)


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, sink: int = 2, memory: int = 2, short: int = 2,
    grouping: str = "temporal", weights: Tensor | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """Per copy (`Call.row`) a list of latents in the order of the slots; see the card's sections 3 and 4."""
    outputs = []
    for layer, calls in enumerate(layers):
        slots: dict[int | None, list[Frame]] = {}
        kernel = torch.full((5,), 0.2, dtype=torch.float64) if weights is None else weights[layer].double()
        out = []
        for call in calls:
            held = list(slots.get(call.row, []))
            if len(held) > sink + memory + short:
                gone = held[sink:-short]
                fives = [gone[5 * n : 5 * n + 5] for n in range(memory)]
                assert len(gone) == 5 * memory, "after the first one, blocks are of 4 · memory latents"
                folded = [
                    Frame(
                        compressed([f.k for f in five], kernel, grouping),
                        compressed([f.v for f in five], kernel, grouping),
                        five[0].where,  # a latent's place in the picture; all latents have the same
                    )
                    for five in fives
                ]
                held = held[:sink] + folded + held[-short:]
            there = held + frames_of(call, frame)
            times = list(range(len(held), len(there)))
            out.append(attend(call, times, list(enumerate(there)), rope, frame))
            if call.commit:
                slots[call.row] = there
        outputs.append(out)
    return outputs
