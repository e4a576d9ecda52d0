"""Matrices with their singular values brought near one, as the steps of the Muon optimizer are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-7


def orthogonal(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """Each matrix of [..., n, m] with its singular values brought near one, in bfloat16.

    steps: coefficients (a, b, c) of each step of Newton and Schulz, X ← a·X + (b·G + c·G²)·X with G = X·Xᵀ. Source: Muon,
    Jordan et al. 2024.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = (y / torch.linalg.matrix_norm(y, keepdim=True).clamp_min(EPS)).reshape(-1, *y.shape[-2:])
    for a, b, c in steps:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)
