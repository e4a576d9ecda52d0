"""One lane of two, and a step of it: fresh tokens, and all that they see in one softmax, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lane_places import End
from .lane_store import Blocks
from .layout import Geometry
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
        held = [*self.source.store.view(layer, self.seen), *lane.store.view(layer, lane.length)]
        null = None if g.sink_logits is None else g.sink_logits[layer].to(g.device)
        out = q.new_empty(*q.shape[:-1], g.value_dim)
        for first in range(0, self.m, QUERIES):
            rows = slice(first, min(first + QUERIES, self.m))
            parts = [*held, (k[:, :, : rows.stop], v[:, :, : rows.stop])]
            ahead = None if self.ahead is None else self.ahead[: rows.stop - first, : rows.stop - first]
            out[:, :, rows] = attention(q[:, :, rows], parts, ahead, g.scale[layer], g.softcap, null)
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


def attention(
    query: Tensor, parts: Sequence[tuple[Tensor, Tensor]], last: Tensor | None, scale: float, softcap: float | None,
    null: Tensor | None,
) -> Tensor:  # fmt: skip
    """Softmax attention of query [B, H_q, m, D] over all parts, which are not copied together; [B, H_q, m, D_v].

    parts: keys [B, H_kv, n, D] and values [B, H_kv, n, D_v]. last: what is added to the scores of the last keys, [m, m].
    softcap: as in `softmax_attention`. null: logit of a key without a value, [H_q]. Only scores are put together: a
    decode step then needs two products a part and one softmax, and nothing is asked of the device.
    """
    batch, heads, m, dim = query.shape
    kv_heads, wide = parts[0][0].shape[1], torch.promote_types(query.dtype, torch.float32)
    # Half precision is scaled after the product, where nothing is rounded any more; else before, where it is smaller.
    late = query.dtype != wide
    grouped = (query if late else query * scale).reshape(batch, kv_heads, -1, dim)
    scores = torch.cat([grouped @ keys.transpose(-1, -2) for keys, _ in parts], -1).reshape(batch, heads, m, -1)
    scores = scores.to(wide) * scale if late else scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if last is not None:
        scores[..., -last.shape[1] :] += last
    if null is not None:
        scores = torch.cat([scores, null.to(wide).reshape(1, -1, 1, 1).expand(batch, -1, m, 1)], -1)
    weights = torch.softmax(scores, -1).reshape(batch, kv_heads, -1, scores.shape[-1])
    read = query.new_zeros(batch, kv_heads, weights.shape[2], parts[0][1].shape[-1], dtype=wide)
    at = 0
    for keys, values in parts:
        n = keys.shape[2]
        read += weights[..., at : at + n].to(values.dtype) @ values
        at += n
    return read.reshape(batch, heads, m, -1).to(query.dtype)
