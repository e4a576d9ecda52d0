"""InfiniteVGGT: the first frame for ever, and of all that came later the keys that are least like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import Evict, Memory, Place, Places, View
from ..memory.layout import Geometry
from .registry import register


@dataclass(frozen=True)
class MostAlike(Evict):
    """Per head, the candidates whose keys are most like the mean key leave; layers share a budget by their last scores.

    total: tokens of all layers together. tau: temperature of the softmax that shares them out. Sinks are no candidates,
    fresh tokens are. A layer's score is the mean of k̂ · μ over its candidates and heads (k̂: key of length one, μ: mean
    of these), which is the mean of ‖μ‖²: near 1 where all keys are alike.
    """

    total: int
    tau: float
    content: ClassVar[bool] = True

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {"score": torch.zeros(geometry.batch, dtype=torch.float64, device=geometry.device)}

    def budget(self, view: View) -> Tensor:
        """int64 [B, 1, 1], tokens for this layer, sinks among them; one at least, so that there is something to attend."""
        shares = torch.softmax((1 - torch.stack(view.every("score"), -1)) / self.tau, -1)[:, view.layer]
        # A share that is a whole number but for its rounding is that number.
        return (self.total * shares + 1e-9).floor().long().clamp_min(1)[:, None, None]

    def keep(self, view: View) -> Tensor:
        there = (view.held | view.fresh).expand(view.batch, view.geometry.kv_heads, -1)
        anchor = there & (view.index < view.sink)
        candidates = there & ~anchor
        budget, count = self.budget(view), candidates.sum(-1, keepdim=True)

        keys = view.turned(view.keys, torch.zeros_like(view.index))
        units = torch.nn.functional.normalize(keys if keys.dtype == torch.float64 else keys.float(), dim=-1)
        units = torch.where(candidates[..., None], units, 0)
        mean = units.sum(2, keepdim=True) / count.clamp_min(1)[..., None]
        alike = (units * mean).sum(-1)

        room = budget - anchor.sum(-1, keepdim=True)
        rank = alike.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
        score = (alike.sum(-1) / count[..., 0].clamp_min(1)).mean(-1).double()
        view.mine["score"] = torch.where((count > room)[:, 0, 0], score, view.mine["score"])
        return anchor | (candidates & (rank < room))


@dataclass(frozen=True)
class Timeless(Place):
    """No token has a place in time; rows and columns stay as they came."""

    moves: ClassVar[bool] = False

    def positions(self, view: View) -> Places:
        return Places(torch.zeros_like(view.index), torch.zeros_like(view.stream))


@register(
    "infinite-vggt",
    paper="InfiniteVGGT: Visual Geometry Grounded Transformer for Endless Streams, arXiv 2601.02281",
    claims=("infinite-vggt",),
)
def infinite_vggt(
    *, total_budget: int = 1_200_000, tau: float = 0.5, anchor: int = 1, frame: int | None = None
) -> Memory:
    """`anchor` first frames for ever, and in every head the most unusual keys of all later ones.

    total_budget: tokens summed over the layers (section 3; the default is for 24 layers). Before a frame attends, each
    layer gets softmax((1 − score) / tau) of it, by the scores of the frame before, and where it holds more, the keys
    that are most like their mean leave, in each head others. Rope has rows and columns only (`coordinates`), so no key
    ever turns again. VGGT turns two halves of a head, each in itself; bring its channels into the order of `Rope`.

    The official code keeps scores and the length of the anchor on the module, where the next sequence finds them: here
    they belong to the stream. It lets a budget fall below the anchor; here the anchor always stays. It makes every
    frame of the first call an anchor, the paper only the first frame. The paper scores by cosine to the mean key, the
    code by k̂ · μ: the order is the same, and the layers' scores are the code's.
    """
    return Memory(sink=anchor, evict=MostAlike(total_budget, tau), place=Timeless(), frame=frame, inside="both")
