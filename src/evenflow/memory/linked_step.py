"""A step of two linked modalities: one block of both, and the four reads of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .attention import softmax_attention
from .lane_step import QUERIES
from .layout import Geometry
from .linked_clock import Latents
from .linked_store import BlockRing
from .parts import attention_across
from .rope import Rope, Rotary
from .step import sign

if TYPE_CHECKING:
    from .linked_state import LinkedState

Read = Literal["video", "audio", "a2v", "v2a"]
Turn = tuple[Tensor, Tensor]  # cosine and sine
ASKS: dict[str, str] = {"video": "video", "audio": "audio", "a2v": "video", "v2a": "audio"}  # whose queries
GIVES: dict[str, str] = {"video": "video", "audio": "audio", "a2v": "audio", "v2a": "video"}  # whose keys


class Spin:
    """A rotary embedding of one read: of every head alike, or one table across the whole width before it is cut into heads."""

    def __init__(self, rope: Rope, geometry: Geometry) -> None:
        g = geometry
        width = g.heads * g.head_dim
        across = rope.inv_freq is not None and 2 * len(rope.inv_freq) == width and g.heads == g.kv_heads
        self.rope, self.across = rope, across and g.heads > 1
        self.rotary = Rotary(rope, width if self.across else g.head_dim, g.dtype, g.device)

    def at(self, places: Tensor) -> Turn:
        """Cosine and sine for tokens at places int64 [m, 3]."""
        rotary = self.rotary
        return rotary.at(places[:, : 1 + rotary.coordinates] if self.rope.axes else places[:, 0])

    def rotate(self, x: Tensor, turn: Turn) -> Tensor:
        """x [B, H, m, D] turned."""
        if not self.across:
            return self.rotary.rotate(x, *turn)
        return self.rotary.rotate(x.transpose(1, 2).flatten(2), *turn).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class LinkedStep:
    """One block of both modalities; every layer makes each of the four reads once, in any order.

    block: its number. latents: of video and audio in it. sinks: how many sink tokens stand before the audio (block 0).
    tokens: fresh tokens of each modality, sinks among those of audio. final: whether the stream ends with this block.
    """

    def __init__(self, state: LinkedState, latents: Latents, shift: int) -> None:
        self.state, self.latents, self.shift = state, latents, shift
        linked, block = state.linked, state.blocks
        self.block, self.sinks = block, 0 if block else linked.sinks
        self.tokens = linked.tokens(block, latents)
        self.final = block > 0 and latents != linked.latents(block)
        self.signs: dict[tuple[int, str], Tensor] = {}
        first = max(1, block - linked.window)
        self.pieces = {read: ring.pieces(first, block, self._fresh(GIVES[read])) for read, ring in state.rings.items()}

    def _fresh(self, modality: str) -> int:
        return self.tokens.video if modality == "video" else self.tokens.audio

    @torch.no_grad()
    def attend(self, layer: int, read: Read, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One read of a layer: of the fresh block itself, both ways, of the window's blocks and of block 0.

        read: "video" and "audio" are self-attention; "a2v" has video queries and audio keys, "v2a" audio queries and
        video keys. q [B, H_q, m, D], k [B, H_kv, n, D] un-rotated, v [B, H_kv, n, D_v], in the memory's dtype, m and n as
        `tokens` says. Returns [B, H_q, m, D_v]. Different reads may be made by different threads at once. Raises
        ValueError on a wrong shape, dtype, layer or read, RuntimeError when the step is over or a read is made twice.
        """
        self._check(layer, read, q, k, v)
        g, ring, spins = self.state.geometry[read], self.state.rings[read], self.state.spins[read]
        self.signs[layer, read] = sign(k, v)
        rope = g.rope[layer]
        spin = None if rope is None else spins[rope]
        if spin is not None:
            self._turn_block_0(layer, read, ring, spin, k)
            asks, gives = self.state.turns[read, spin.rope]
            q, k = spin.rotate(q, asks), spin.rotate(k, gives)
        ring.put(layer, self.block, k, v)
        parts = [(ring.keys[layer][:, :, piece], ring.values[layer][:, :, piece]) for piece in self.pieces[read]]
        null = None if g.sink_logits is None else g.sink_logits[layer].to(g.device)
        if len(parts) == 1:
            null = None if null is None else null.reshape(1, -1, 1, 1)
            return softmax_attention(q, *parts[0], None, g.scale[layer], g.softcap, null)
        rows = [attention_across(some, parts, None, g.scale[layer], g.softcap, null) for some in q.split(QUERIES, 2)]
        return torch.cat(rows, 2)

    def _turn_block_0(self, layer: int, read: str, ring: BlockRing, spin: Spin, k: Tensor) -> None:
        """With a horizon, block 0 comes along: its keys are turned anew, once for each block."""
        if not ring.raw:
            return
        if self.block == 0:
            ring.raw[layer].copy_(k)
        elif self.state.shifts.get((read, layer)) != self.shift:
            turn = spin.at(self.state.linked.places(GIVES[read], 0, self.shift))
            ring.keys[layer][:, :, : ring.head] = spin.rotate(ring.raw[layer], turn)
            self.state.shifts[read, layer] = self.shift

    def _check(self, layer: int, read: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.state.step_open is not self:
            raise RuntimeError("this step is over; open another one")
        if read not in ASKS:
            raise ValueError(f"there is no read {read!r}; there are {', '.join(map(repr, ASKS))}")
        g = self.state.geometry[read]
        if not 0 <= layer < g.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {g.layers}")
        if (layer, read) in self.signs:
            raise RuntimeError(f"layer {layer} made the read {read!r} twice in one step; each is made once")
        m, n = self._fresh(ASKS[read]), self._fresh(GIVES[read])
        shapes = (
            (g.batch, g.heads, m, g.head_dim),
            (g.batch, g.kv_heads, n, g.head_dim),
            (g.batch, g.kv_heads, n, g.value_dim),
        )
        for name, tensor, shape in zip("qkv", (q, k, v), shapes, strict=True):
            if tensor.shape != shape or tensor.dtype != g.dtype:
                raise ValueError(
                    f"{name} of {read} is {tensor.dtype} {tuple(tensor.shape)}; expected {g.dtype} {shape} in block {self.block}"
                )

    def _complete(self) -> None:
        """Raises an error if not every layer made its four reads with finite keys and values."""
        layers = self.state.geometry["video"].layers
        missing = [(layer, read) for layer in range(layers) for read in ASKS if (layer, read) not in self.signs]
        if missing:
            raise RuntimeError(f"the step ended before the reads {missing[:4]} were made; nothing was stored")
        if not bool(torch.stack([one.isfinite() for one in self.signs.values()]).all()):
            raise ValueError("keys or values hold NaN or infinity; nothing was stored")
