"""What hybrid networks are built of, and those of the papers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ...memory import FastWeights, Memory, Rope, Timeless

Kind = Literal["window", "delta", "fast", "full"]


@dataclass(frozen=True)
class HybridConfig:
    """What a hybrid network is built of.

    pattern: kinds of layers, repeated until there are `layers`: window attention, the gated delta rule, window attention
    with fast weights beside it, or attention to everything. window: tokens that a query of a window layer sees, itself
    among them; None: all. sections: how many pairs of channels turn with time, row and column. key_dim and value_dim are
    those of a head of a delta layer, kernel the reach of its convolution. fast_heads, rule: of fast weights.
    """

    name: str
    vocabulary: int
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    sections: tuple[int, int, int]
    delta_heads: int = 1
    key_dim: int = 1
    value_dim: int = 1
    pattern: tuple[Kind, ...] = ("window", "delta", "delta", "delta")
    kernel: int = 4
    fast_heads: int = 4
    rule: FastWeights = field(default_factory=FastWeights)
    theta: float = 1e6
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if 2 * sum(self.sections) != self.head_dim:
            raise ValueError(
                f"sections {self.sections} are no {self.head_dim // 2} pairs of channels, half of head_dim"
            )
        if self.window is not None and self.window < 2:
            raise ValueError(f"window is {self.window}; a query sees itself and what was before it, so 2 or more")
        if not self.pattern or set(self.pattern) - {*get_args(Kind)}:
            raise ValueError(f"pattern is {self.pattern}; give kinds of layers, of {', '.join(get_args(Kind))}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.layers))

    @property
    def rope(self) -> Rope:
        """How a memory has to turn queries and keys: by three coordinates, time, row and column, and nothing else."""
        series = tuple(self.theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2))
        axes = tuple(axis for axis, pairs in enumerate(self.sections, 1) for _ in range(pairs))
        return Rope(inv_freq=series, axes=axes)

    @property
    def attending(self) -> tuple[Kind, ...]:
        """The kinds of those layers that attend, in order."""
        return tuple(kind for kind in self.kinds if kind != "delta")

    @property
    def memory(self) -> Memory:
        """What window layers keep: each token where its coordinates say, until `window` − 1 have come after it."""
        return Memory(window=None if self.window is None else self.window - 1, place=Timeless(), name="hybrid-window")


PRESETS: dict[str, HybridConfig] = {
    config.name: config
    for config in (
        HybridConfig(
            "infinite-vl", vocabulary=151_936, dim=2048, ffn_dim=11_008, layers=36, heads=16, kv_heads=2, head_dim=128,
            window=8192, delta_heads=16, key_dim=128, value_dim=256, sections=(16, 24, 24),
        ),
        HybridConfig(
            "toy", vocabulary=64, dim=64, ffn_dim=128, layers=4, heads=4, kv_heads=2, head_dim=16, window=12, delta_heads=2,
            key_dim=16, value_dim=32, sections=(2, 3, 3),
        ),
        HybridConfig(
            "toy-spatial", vocabulary=64, dim=64, ffn_dim=128, layers=4, heads=4, kv_heads=2, head_dim=16, window=12,
            sections=(2, 3, 3), pattern=("fast", "fast", "fast", "full"), fast_heads=2, rule=FastWeights(chunk=16),
        ),
    )
}  # fmt: skip


def before_softplus(x: Tensor) -> Tensor:
    """What softplus makes `x` of."""
    return x + (-torch.expm1(-x)).log()
