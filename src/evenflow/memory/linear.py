"""A fold into a linear-attention state: everything that the window has passed, in a matrix of fixed size.

Source: Hybrid Forcing, arXiv 2604.10103.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arena import standing
from .place import shift
from .verbs import Fold
from .view import View

if TYPE_CHECKING:
    from .layout import Geometry


@dataclass(frozen=True)
class LinearState(Fold):
    """Running means of φ(k) and of rotated k ⊗ v over all tokens that left or that the window has passed, φ = ReLU.

    A token is taken in when it leaves, or when the first chunk that no longer sees it in the window arrives: so sinks are
    too, at the position that they would have in the window. horizon: frames, no position of key or query reaches it, as
    with `Clipped`; None: positions in the stream.

    projection: what is done to the read before it is added to the attention, shared by the heads of a layer: weight and,
    in the last column, bias, float [layers, D_v, D_v + 1]; or one number p for p · identity; None: the state is kept, but
    not read. raw_query: whether the numerator reads with rotated q, not φ(q).
    """

    horizon: int | None = None
    projection: Tensor | float | None = None
    raw_query: bool = False

    def serves(self, geometry: Geometry) -> None:
        expected = (geometry.layers, geometry.value_dim, geometry.value_dim + 1)
        if isinstance(self.projection, Tensor) and tuple(self.projection.shape) != expected:
            raise ValueError(f"projection has shape {tuple(self.projection.shape)}; expected {expected}, or a number")

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        g, wide = geometry, torch.promote_types(geometry.dtype, torch.float32)
        return {
            "kmean": torch.zeros(g.batch, g.kv_heads, g.head_dim, dtype=wide),
            "kv": torch.zeros(g.batch, g.kv_heads, g.head_dim, g.value_dim, dtype=wide),
            "count": torch.zeros(g.batch, dtype=torch.int64),  # of the head that took most in
            "until": torch.zeros(g.batch, dtype=torch.int64),  # stream index up to which all is taken in
        }

    def leave(self, view: View, leaving: Tensor) -> None:
        mine, past = view.mine, leaving
        if view.window is not None:
            coming = view.coming.clamp_max(1) if view.causal else view.coming
            first = (view.consumed + coming - view.window).expand(view.batch)
            past = leaving | ((view.index >= 0) & (view.index < first[:, None, None]))
        past = past & (view.index >= mine["until"][:, None, None])  # [B, G, n]
        if view.window is not None:
            mine["until"] = torch.maximum(first, mine["until"])
        if not past.any():
            return
        wide = mine["kv"].dtype
        where = (view.index - self._back(view)[:, None]) // view.frame
        if past.shape[:2] == (1, 1):
            columns = past[0, 0].nonzero()[:, 0]
            keys, values = (x.index_select(2, columns) for x in (view.keys, view.values))
            where = standing(view, columns, where.index_select(2, columns))
        else:
            keys, values = torch.where(past[..., None], view.keys, 0), view.values
        features = keys.to(wide).relu().sum(2)
        products = view.turned(keys, where).to(wide).transpose(-1, -2) @ values.to(wide)
        count = mine["count"] + past.sum(-1).amax(1)
        before, after = (n.to(wide)[:, None, None] for n in (mine["count"], count.clamp_min(1)))
        mine["kmean"] = (before * mine["kmean"] + features) / after
        mine["kv"] = (before[..., None] * mine["kv"] + products) / after[..., None]
        mine["count"] = count

    def read(self, view: View) -> Tensor | None:
        weights, mine = self.projection, view.mine
        if weights is None or view.query is None or not mine["count"].any():
            return None
        wide = mine["kv"].dtype
        groups = view.geometry.heads // view.geometry.kv_heads
        features = view.query.relu()
        source = view if self.raw_query else replace(view, query=features)
        assert source.query is not None
        at = (view.stream - self._back(view)) // view.frame
        turned = source.turned(source.query, at).to(wide).unflatten(1, (-1, groups))
        below = features.to(wide).unflatten(1, (-1, groups)) @ mine["kmean"][:, :, None, :, None] + 1e-6
        read = ((turned @ mine["kv"][:, :, None]) / below).flatten(1, 2)
        if isinstance(weights, Tensor):
            weight = weights[view.layer].to(read)
            read = read @ weight[:, :-1].T + weight[:, -1] * (mine["count"] > 0)[:, None, None, None]
        else:
            read = weights * read
        return read.to(view.query.dtype)

    def _back(self, view: View) -> Tensor:
        """int64 [R, 1]: by how many tokens the stream is moved back."""
        return torch.zeros_like(view.stream[:, :1]) if self.horizon is None else shift(view, self.horizon)
