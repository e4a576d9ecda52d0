"""An eviction by diversity: the keys that are least unlike the others leave.

Source: InfiniteVGGT, arXiv 2601.02281, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .verbs import Evict
from .view import View

if TYPE_CHECKING:
    from .layout import Geometry, Memory


@dataclass(frozen=True)
class LeastDiverse(Evict):
    """Per head, the candidates whose keys are most like the mean key leave; layers share a budget by their last scores.

    total: tokens of all layers together. tau: temperature of the softmax that shares them out. Sinks and memory are no
    candidates, the tokens of a fresh chunk are; those of a causal step are not, as its first ones must not know the last.
    A layer's score is the mean of k̂ · μ over its candidates and heads (k̂: key of length one, μ: mean of these), which is
    the mean of ‖μ‖²: near 1 where all keys are alike.
    """

    total: int
    tau: float = 0.5
    content: ClassVar[bool] = True
    by_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.total < 1 or not self.tau > 0:
            raise ValueError(f"total is {self.total}, tau {self.tau}; take 1 token or more, and a temperature above 0")

    def suits(self, memory: Memory) -> None:
        if memory.window is not None:
            raise ValueError(f"window is {memory.window}, but `LeastDiverse` has a budget of its own; leave it None")

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"score": torch.zeros(geometry.batch, dtype=torch.float64, device=geometry.device)}

    def budget(self, view: View) -> Tensor:
        """int64 [B, 1, 1], tokens for this layer, sinks among them; one at least, so that there is something to attend."""
        shares = torch.softmax((1 - torch.stack(view.every("score"), -1)) / self.tau, -1)[:, view.layer]
        # A share that is a whole number but for its rounding is that number.
        return (self.total * shares + 1e-9).floor().long().clamp_min(1)[:, None, None]

    def keep(self, view: View) -> Tensor:
        there = (view.held | view.fresh).expand(view.batch, view.geometry.kv_heads, -1)
        stays = there & (view.pinned | (view.index < view.sink) | (view.fresh & view.causal))
        candidates = there & ~stays
        budget, count = self.budget(view), candidates.sum(-1, keepdim=True)

        keys = view.turned(view.keys, torch.zeros_like(view.index))
        keys = keys if keys.dtype == torch.float64 else keys.float()
        shorter = torch.where(candidates, 1 / torch.linalg.vector_norm(keys, dim=-1).clamp_min(1e-12), 0)
        mean = shorter[:, :, None] @ keys / count.clamp_min(1)[..., None]
        alike = (keys * mean).sum(-1) * shorter

        room = budget - stays.sum(-1, keepdim=True)
        rank = alike.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
        score = (alike.sum(-1) / count[..., 0].clamp_min(1)).mean(-1).double()
        view.mine["score"] = torch.where((count > room)[:, 0, 0], score, view.mine["score"])
        return stays | (candidates & (rank < room))
