"""Prompt switches: scripts with a `Recache` among their calls, and a small network whose keys depend on its text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evenflow.memory import MemoryState
from evenflow.recipes.reference import Call
from evenflow.recipes.reference.longlive import Recache

from .drive import random_calls

HEADS, KV_HEADS, DIM = 4, 2, 12


def play(state: MemoryState, script: list[list[Call]]) -> list[list[Tensor]]:
    """The same calls on a memory of batch 1: outputs [H_q, m, D_v] per layer and call."""
    outputs: list[list[Tensor]] = [[] for _ in script]
    for calls in zip(*script, strict=True):
        first = calls[0]
        m, tags = first.q.shape[1], first.tags or None
        if isinstance(first, Recache):
            step = state.recache(m, tags=tags, keep_sink=first.keep_sink)
        else:
            step = state.step(m, tags=tags, commit=first.commit)
        with step:
            for layer, call in enumerate(calls):
                outputs[layer].append(state.attend(layer, call.q[None], call.k[None], call.v[None])[0])
    return outputs


def random_recache(frames: int, frame: int, *, keep_sink: bool | None = None, **changes) -> list[list[Call]]:
    """One `Recache` of random tokens a layer."""
    script = random_calls([frames * frame], **changes)
    return [[Recache(c.q, c.k, c.v, True, c.tags, keep_sink=keep_sink) for c in layer] for layer in script]


def joined(*scripts: Sequence[list[Call]]) -> list[list[Call]]:
    """Scripts one after another."""
    return [[call for part in layer for call in part] for layer in zip(*scripts, strict=True)]


class Network:
    """Random projections a layer; what a layer attends and its text are added to its input, so deeper keys know both."""

    def __init__(self, layers: int = 2, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        self.width = HEADS * DIM
        self.weights = [
            [
                torch.randn(self.width, size * DIM, generator=made, dtype=torch.float64) / self.width**0.5
                for size in (HEADS, KV_HEADS, KV_HEADS)
            ]
            for _ in range(layers)
        ]

    def prompt(self, seed: int) -> Tensor:
        """A text, float64 [width]."""
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def latents(self, tokens: int, seed: int = 0) -> Tensor:
        """Clean latents, float64 [tokens, width]."""
        return torch.randn(tokens, self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def __call__(
        self, state: MemoryState, x: Tensor, text: Tensor, *, recache: bool = False, commit: bool = True,
        tags: dict[str, Tensor] | None = None, keep_sink: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """One pass over latents x [m, width] under a text; what the last layer makes of them."""
        m = len(x)
        step = state.recache(m, tags=tags, keep_sink=keep_sink) if recache else state.step(m, tags=tags, commit=commit)
        with step:
            for layer, projections in enumerate(self.weights):
                x = x + 0.5 * text
                q, k, v = ((x @ w).unflatten(-1, (-1, DIM)).transpose(0, 1)[None] for w in projections)
                x = x + state.attend(layer, q, k, v)[0].transpose(0, 1).flatten(1)
        return x


def content(state: MemoryState) -> dict[str, Tensor]:
    """Keys and values of every layer as they are stored."""
    return {name: tensor for name, tensor in state.state_dict().items() if name.endswith((".keys", ".values"))}
