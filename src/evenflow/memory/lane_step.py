"""One lane of two, and a step of it: fresh tokens, and all that they see in one softmax, wherever it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lane_places import End
from .lane_store import Blocks
from .layout import Geometry
from .parts import attention_across
from .rope import Rotary
from .step import sign

if TYPE_CHECKING:
    from .lanes import LanesState

QUERIES = 256  # of a step that share one product: scores of a long step stay small


class Lane:
    """One of the two: its store, how many tokens of it count, and how its closed units ended. One writer at a time."""

    def __init__(self, geometry: Geometry) -> None:
        self.axes = 1 + max(0 if rope is None else rope.coordinates for rope in geometry.rope)
        self.store = Blocks(geometry, self.axes)
        self.length = 0
        self.ends: list[End] = []
        self.step: LaneStep | None = None
        # Own ones, for they keep tables as they go, and the other lane may be in another thread.
        g = geometry
        self.rotaries = {rope: Rotary(rope, g.head_dim, g.dtype, g.device) for rope in set(g.rope) if rope is not None}

    @property
    def began(self) -> int:
        """Tokens in the lane when the open unit began."""
        return self.ends[-1].length if self.ends else 0


class LaneStep:
    """A step of one lane, in which every layer attends once. positions: int64 [m, axes], where its tokens stand."""

    def __init__(self, state: LanesState, lane: Lane, places: Tensor, seen: int) -> None:
        self.geometry, self.lane, self.places, self.seen = state.geometry, lane, places, seen
        self.source = state.source
        self.m, self.positions = len(places), places[:, : lane.axes]
        g, m = state.geometry, self.m
        self.shapes = (
            (g.batch, g.heads, m, g.head_dim), (g.batch, g.kv_heads, m, g.head_dim), (g.batch, g.kv_heads, m, g.value_dim),
        )  # fmt: skip
        self.turns = {
            rope: rotary.at(self.positions[:, : 1 + rotary.coordinates] if rope.axes else self.positions[:, 0])
            for rope, rotary in lane.rotaries.items()
        }
        wide, most = torch.promote_types(g.dtype, torch.float32), min(m, QUERIES)
        self.ahead = torch.full((most, most), -torch.inf, dtype=wide, device=g.device).triu(1) if m > 1 else None
        self.signs: dict[int, Tensor] = {}

    @torch.no_grad()
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the fresh queries over all that this lane may see.

        q [B, H_q, m, D], k [B, H_kv, m, D] un-rotated, v [B, H_kv, m, D_v], in the memory's dtype. Returns
        [B, H_q, m, D_v]. Raises ValueError on a wrong shape, dtype or layer, RuntimeError when the step is over or a
        layer attends twice.
        """
        self._check(layer, q, k, v)
        g, lane = self.geometry, self.lane
        self.signs[layer] = sign(k, v)
        rope = g.rope[layer]
        if rope is not None:
            q, k = (lane.rotaries[rope].rotate(x, *self.turns[rope]) for x in (q, k))
        lane.store.put(layer, lane.length, k, v)
        seen = self.source.store.view(layer, self.seen)
        null = None if g.sink_logits is None else g.sink_logits[layer].to(g.device)
        out = q.new_empty(*q.shape[:-1], g.value_dim)
        for first in range(0, self.m, QUERIES):
            rows = slice(first, min(first + QUERIES, self.m))
            parts = [*seen, *lane.store.view(layer, lane.length + rows.stop)]
            ahead = None if self.ahead is None else self.ahead[: rows.stop - first, : rows.stop - first]
            out[:, :, rows] = attention_across(q[:, :, rows], parts, ahead, g.scale[layer], g.softcap, null)
        return out

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        g = self.geometry
        if self.lane.step is not self:
            raise RuntimeError("this step is over; open another one")
        if not 0 <= layer < g.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {g.layers}")
        if layer in self.signs:
            raise RuntimeError(f"layer {layer} attended twice in one step; every layer attends once")
        for name, tensor, shape in zip("qkv", (q, k, v), self.shapes, strict=True):
            if tensor.shape != shape or tensor.dtype != g.dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {g.dtype} {shape}")

    def _complete(self) -> None:
        """Raises an error if not all layers stored something finite. Waits for the device, so that what another stream
        of it is told of afterwards is there."""
        missing = [layer for layer in range(self.geometry.layers) if layer not in self.signs]
        if missing:
            raise RuntimeError(f"the step ended before layers {missing} attended; nothing was stored")
        if not bool(torch.stack([*self.signs.values()]).isfinite().all()):
            raise ValueError("keys or values hold NaN or infinity; nothing was stored")
