"""Muon with matrices of one shape updated together, which on a GPU takes a tenth of the calls of `torch.optim.Muon`.

Source: Muon, Jordan et al. 2024; the scale of updates: arXiv 2502.16982, section 2.2. Same arithmetic as
`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, one product for a stack of matrices where that does one for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.orthogonal import orthogonal

STEPS = [(3.4445, -4.775, 2.0315)] * 5


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal; for matrices inside a network. `lr` and decay are what AdamW would take.

    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every matrix that has a gradient; closure: computes the loss again, which is then returned."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                grads = torch.stack([p.grad for p in parameters if p.grad is not None])
                kept = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                momenta = torch.stack(kept).lerp_(grads, 1 - group["momentum"])
                update = orthogonal(grads.lerp_(momenta, group["momentum"]), STEPS)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_copy_(kept, momenta.unbind())
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, update.to(momenta.dtype).unbind(), alpha=-scale)
        return loss
