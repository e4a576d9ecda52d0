"""Running a memory by hand: random queries, keys and values in any cut."""

import torch
from torch import Tensor

from evenflow.memory import MemoryState

Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(state: MemoryState, length: int, seed: int = 0) -> list[Inputs]:
    """Per layer q [B, H_q, N, D], k and v [B, H_kv, N, D]."""
    g = state.geometry
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(g.batch, heads, length, dim, generator=generator, dtype=torch.float64).to(g.dtype)

    return [
        (draw(g.heads, g.head_dim), draw(g.kv_heads, g.head_dim), draw(g.kv_heads, g.value_dim))
        for _ in range(g.layers)
    ]


def feed(state: MemoryState, inputs: list[Inputs], start: int, stop: int, **options: object) -> list[Tensor]:
    """One step with the tokens start..stop−1; what each layer gives."""
    with state.step(stop - start, **options):
        return [
            state.attend(layer, *(tensor[:, :, start:stop] for tensor in tensors))
            for layer, tensors in enumerate(inputs)
        ]


def run(state: MemoryState, inputs: list[Inputs], cuts: list[int]) -> list[Tensor]:
    """Feed everything in steps of the given lengths (the last one repeats); outputs [B, H_q, N, D_v] per layer."""
    length, at, number = inputs[0][0].shape[2], 0, 0
    pieces: list[list[Tensor]] = []
    while at < length:
        stop = min(length, at + cuts[min(number, len(cuts) - 1)])
        pieces.append(feed(state, inputs, at, stop))
        at, number = stop, number + 1
    return [torch.cat(layer, 2) for layer in zip(*pieces, strict=True)]
