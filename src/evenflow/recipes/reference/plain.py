"""What every reference is written with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...memory import Rope


@dataclass(frozen=True)
class Call:
    """One step of one layer, for one stream: q [H_q, m, D], k [H_kv, m, D], v [H_kv, m, D_v], un-rotated, float64.

    commit, tags, row: as given to `memory.step` (tags without the batch dimension).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    commit: bool = True
    tags: dict[str, Tensor] = field(default_factory=dict)
    row: int | None = None


def rotated(x: Tensor, positions: Tensor | Sequence[Any], rope: Rope | None) -> Tensor:
    """`x` [..., n, D] with token r turned to positions[r]: a number, or one number an axis of the rope."""
    if rope is None or not x.shape[-2]:
        return x
    dim = x.shape[-1]
    frequencies, axes = rope.frequencies(dim), rope.axes or (0,) * (rope.rotated(dim) // 2)
    places = torch.as_tensor(positions, dtype=torch.float64).reshape(x.shape[-2], -1)
    out = x.clone()
    for c, (frequency, axis) in enumerate(zip(frequencies, axes, strict=True)):
        a, b = (c, c + len(frequencies)) if rope.style == "half" else (2 * c, 2 * c + 1)
        angle = places[:, axis] * frequency
        cos, sin = rope.scale * angle.cos(), rope.scale * angle.sin()
        out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√D + bias) v for q [H_q, m, D], k [H_kv, n, D], v [H_kv, n, D_v] → [H_q, m, D_v]; bias [H_q, m, n]."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v
