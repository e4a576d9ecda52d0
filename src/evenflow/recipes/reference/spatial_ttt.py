"""Spatial-TTT (arXiv 2603.12255): a network as memory, trained on the stream one chunk at a time, as slow as can be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, enable_grad, stack, zeros

Weights = list[Tensor]  # W0 [h, d], W1 [d, h], W2 [h, d]


def network(weights: Weights, x: Tensor) -> Tensor:
    """f(x) of one token x [d]."""
    a, b = weights[0] @ x, weights[2] @ x
    return weights[1] @ (a * torch.sigmoid(a) * b)


@dataclass
class Memory:
    """One fast head of one stream. pending: keys, values, rates [3] and momenta of tokens not yet learned."""

    weights: Weights
    chunk: int
    prenorm: bool = False
    momentum: Weights = field(default_factory=list)
    pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.main = list(self.weights)
        self.norms = [[float(row.norm()) for row in weight] for weight in self.weights]
        self.momentum = [zeros(weight.shape).to(weight) for weight in self.weights]

    def gradients(self) -> Weights:
        """By automatic differentiation, weight by weight, as each has its own rate."""
        out = []
        for number in range(3):
            with enable_grad():
                own = [weight.detach().clone().requires_grad_() for weight in self.weights]
                aim = sum(rates[number] * (network(own, k) @ v) for k, v, rates, _ in self.pending)
                assert isinstance(aim, Tensor)
                out.append(torch.autograd.grad(aim, own[number])[0])
        return out

    def update(self) -> None:
        """One step of ascent on the chunk."""
        share = sum(float(beta) for *_, beta in self.pending) / len(self.pending)
        self.momentum = [g + share * m for g, m in zip(self.gradients(), self.momentum, strict=True)]
        self.main = [weight + step for weight, step in zip(self.main, self.momentum, strict=True)]
        self.weights = [
            stack([row / (float(row.norm()) + 1e-5) * n for row, n in zip(weight, norms, strict=True)])
            for weight, norms in zip(self.main, self.norms, strict=True)
        ]
        if not self.prenorm:
            self.main = list(self.weights)
        self.pending = []

    def feed(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, beta: Tensor) -> Tensor:
        """q, k, v [T, d], rates [T, 3], beta [T] → what queries read, [T, d]: each before its own chunk is learned."""
        out = []
        for t in range(len(q)):
            if len(self.pending) == self.chunk:
                self.update()
            out.append(network(self.weights, q[t]))
            self.pending.append((k[t], v[t], rates[t], beta[t]))
        return stack(out)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Channel by channel over neighbours in time, row and column; x [t, h, w, C], weight [C, 3, 3, 3], edges repeated."""
    frames, rows, columns, _ = x.shape
    out = zeros(x.shape).to(x)
    for t in range(frames):
        for r in range(rows):
            for c in range(columns):
                for i in range(3):
                    for j in range(3):
                        for n in range(3):
                            at = (
                                min(max(t + i - 1, 0), frames - 1),
                                min(max(r + j - 1, 0), rows - 1),
                                min(max(c + n - 1, 0), columns - 1),
                            )
                            out[t, r, c] += weight[:, i, j, n] * x[at]
    return out
