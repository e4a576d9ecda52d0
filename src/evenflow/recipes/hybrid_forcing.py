"""Hybrid Forcing: a short window read sparsely, and a linear-attention state of everything that left it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..memory import Fold, Memory, Oldest, Place, Places, Recall, View
from ..memory.arena import gathered
from ..memory.layout import Geometry
from ..memory.sparse import check_plain, sparse_attention
from .registry import register


def shift(view: View, horizon: int) -> Tensor:
    """int64 [R, 1], tokens by which the stream is moved back so that no position reaches `horizon` frames."""
    return (view.consumed + view.coming - horizon * view.frame).clamp_min(0)[:, None]


@dataclass(frozen=True)
class Clipped(Place):
    """Sinks stand at the start; window and queries at their own time, until that would pass the horizon."""

    horizon: int

    def positions(self, view: View) -> Places:
        back = shift(view, self.horizon)
        keys = torch.where(view.pinned, view.index, view.index - back[:, None])
        return Places(keys // view.frame, (view.stream - back) // view.frame)


@dataclass(frozen=True)
class BestBlocks(Recall):
    """Each block of `block` queries attends the best share `ratio` of key blocks, in the order sinks, window, fresh."""

    ratio: float
    block: int

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        if self.ratio == 1:
            return super().attend(view, query, keys, values, bias, scale)
        check_plain(view.geometry.softcap, view.null, "take ratio=1")
        order = view.order().argsort(dim=-1, stable=True)
        order = order[0, 0] if order.shape[:2] == (1, 1) else order
        if bias is not None:
            bias = gathered(bias.transpose(2, 3), order).transpose(2, 3)
        keys, values = gathered(keys, order), gathered(values, order)
        return sparse_attention(query, keys, values, ratio=self.ratio, block=self.block, scale=scale, bias=bias)


@dataclass(frozen=True, eq=False)
class LinearState(Fold):
    """Running means of φ(k) and of rotated k ⊗ v over all tokens that the window has passed, φ = ReLU.

    A token is taken in when the first chunk that no longer sees it in the window arrives, sinks too, at the position it
    would have there. projection: as in `hybrid_forcing`; raw_query: whether the numerator reads with rotated q, not φ(q).
    """

    horizon: int
    projection: Tensor | float | None
    raw_query: bool

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        g, wide = geometry, torch.promote_types(geometry.dtype, torch.float32)
        return {
            "kmean": torch.zeros(g.batch, g.kv_heads, g.head_dim, dtype=wide),
            "kv": torch.zeros(g.batch, g.kv_heads, g.head_dim, g.value_dim, dtype=wide),
            "count": torch.zeros(g.batch, dtype=torch.int64),
            "until": torch.zeros(g.batch, dtype=torch.int64),  # stream index up to which all is taken in
        }

    def leave(self, view: View, leaving: Tensor) -> None:
        if view.window is None:
            return
        mine, first = view.mine, (view.consumed + view.coming - view.window).expand(view.batch)
        past = (view.index[:, 0] >= mine["until"][:, None]) & (view.index[:, 0] < first[:, None])  # [B, n]
        if not past.any():
            return
        wide = mine["kv"].dtype
        turned = view.turned(view.keys, (view.index - shift(view, self.horizon)[:, None]) // view.frame).to(wide)
        inside = past[:, None, :, None]
        features = torch.where(inside, view.keys.to(wide).relu(), 0).sum(2)
        products = torch.where(inside, turned, 0).transpose(-1, -2) @ view.values.to(wide)
        count = mine["count"] + past.sum(-1)
        before, after = (n.to(wide)[:, None, None] for n in (mine["count"], count.clamp_min(1)))
        mine["kmean"] = (before * mine["kmean"] + features) / after
        mine["kv"] = (before[..., None] * mine["kv"] + products) / after[..., None]
        mine["count"], mine["until"] = count, torch.maximum(first, mine["until"])

    def read(self, view: View) -> Tensor | None:
        weights, mine = self.projection, view.mine
        if weights is None or view.query is None or not mine["count"].any():
            return None
        wide, back = mine["kv"].dtype, shift(view, self.horizon)
        groups = view.geometry.heads // view.geometry.kv_heads
        features = view.query.relu()
        source = view if self.raw_query else replace(view, query=features)
        assert source.query is not None
        turned = source.turned(source.query, (view.stream - back) // view.frame).to(wide).unflatten(1, (-1, groups))
        below = features.to(wide).unflatten(1, (-1, groups)) @ mine["kmean"][:, :, None, :, None] + 1e-6
        read = ((turned @ mine["kv"][:, :, None]) / below).flatten(1, 2)
        if isinstance(weights, Tensor):
            weight = weights[view.layer].to(read)
            read = read @ weight[:, :-1].T + weight[:, -1] * (mine["count"] > 0)[:, None, None, None]
        else:
            read = weights * read
        return read.to(view.query.dtype)


@register(
    "hybrid-forcing",
    paper="Long-Horizon Streaming Video Generation via Hybrid Attention with Decoupled Distillation, arXiv 2604.10103",
    claims=("hybrid-forcing",),
)
def hybrid_forcing(
    *, sink: int = 3, window: int = 6, horizon: int = 21, ratio: float = 0.2, block: int = 64,
    projection: Tensor | float | None = None, raw_query: bool = False, frame: int | None = None, chunk: int = 3,
) -> Memory:  # fmt: skip
    """`sink` first frames, the last `window` with the fresh ones among them, and a linear state of all that went before.

    Attention is softmax over the best `ratio` of key blocks of `block` tokens, in token order, chosen for each block of
    queries and each head by mean rotated query and key (1: all of them); plus P(read of the state). No position reaches
    `horizon` frames, the length of training: from there on window and queries stay where they are, sinks at the start.

    projection: what training learned for P, shared by the heads of a layer: weight and, in the last column, bias,
    float [layers, D_v, D_v + 1]; or one number p for p · identity; None for zero, where training starts: then the state
    is kept, but not read. A chunk enters the state once, when it leaves the window (the sinks too, although they stay).

    Details are the official code's, as the paper's text was not to be had. Where its two files differ, this follows the
    training file: keys are kept un-rotated, and the numerator reads with rotated φ(q); `raw_query` reads with rotated q,
    as the inference file does, and may explode where φ(q) is nearly zero. The code takes away the mean over heads of
    each key before it chooses blocks, where the mean over tokens was meant, which changes no choice: nothing is taken
    away here. Of fewer than 1/ratio blocks the code keeps none, here one stays.
    """
    return Memory(
        sink=sink, window=window, frame=frame, chunk=chunk, inside="both", evict=Oldest(with_fresh=True),
        fold=LinearState(horizon, projection, raw_query), recall=BestBlocks(ratio, block), place=Clipped(horizon),
    )  # fmt: skip
