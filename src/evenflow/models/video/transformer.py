"""The causal video diffusion transformer: Wan 2.1's network whose self-attention belongs to a memory.

Source: Wan 2.1; Self Forcing, arXiv 2506.08009, with one time for each latent frame. Names of tensors are those of the
native checkpoints. Tokens of a frame stand in rows, frames behind one another. The network never turns a query or key:
what it is given as `attend` does, a step of a memory or `Dense`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ...memory import Rope
from .config import VideoConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Led = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Text:
    """What cross-attention reads: keys and values of every layer, [B, heads, L, head_dim] each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def wave(t: Tensor, width: int) -> Tensor:
    """Sinusoids of times t [...], float64 [..., width]: cosines, then sines, of frequencies 10000^(−2i/width)."""
    half = width // 2
    omega = torch.pow(10_000.0, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * omega
    return torch.cat([angle.cos(), angle.sin()], -1)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm of x [..., dim], in its dtype. Where weights are of another (autocast), no fused kernel takes them."""
    if x.dtype == norm.weight.dtype:
        return norm(x)
    size = torch.linalg.vecdot(x, x)[..., None].float() / x.shape[-1]
    return x * torch.rsqrt(size + norm.eps).to(x.dtype) * norm.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention, with an RMS norm of queries and keys over all channels before they are heads."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, config.eps), nn.RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, n, dim] → [B, heads, n, head_dim]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        return self.split(normed(self.q(x), self.norm_q))

    def key(self, x: Tensor) -> Tensor:
        return self.split(normed(self.k(x), self.norm_k))

    def value(self, x: Tensor) -> Tensor:
        return self.split(self.v(x))

    def out(self, heads: Tensor) -> Tensor:
        return self.o(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and a feed-forward network, the first and last led by the time."""

    def __init__(self, config: VideoConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.eps = layer, config.eps
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor, text: Text, attend: Attend) -> Tensor:
        """x [B, n, dim]; e [B, F, 6, dim], one for each of the frames that the n tokens make."""
        q, k, v, led = self.before(x, e)
        heads = attend(self.layer, q, k, v)
        return self.after(x, heads, led, text.keys[self.layer], text.values[self.layer])

    def before(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Led]:
        """Queries, keys and values for self-attention, and what the time says of the rest."""
        shift, scale, *led = (self.modulation + e).to(x.dtype)[..., None, :, :].unbind(-2)
        own, h = self.self_attn, modulated(x, shift, scale, self.eps)
        return own.query(h), own.key(h), own.value(h), tuple(led)

    def after(self, x: Tensor, heads: Tensor, led: Led, keys: Tensor, values: Tensor) -> Tensor:
        """The rest of the block. heads: what self-attention saw; keys, values: the text's."""
        gate, shift, scale, gate2 = led
        x = gated(x, self.self_attn.out(heads), gate)
        x = x + self.read(self.norm3(x), keys, values)
        return gated(x, self.ffn(modulated(x, shift, scale, self.eps)), gate2)

    def read(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Cross-attention; frames read the text of their group where there are several a row."""
        grouped = x.reshape(len(keys), -1, x.shape[-1])
        return self.cross_attn.out(seen(self.cross_attn.query(grouped), keys, values)).reshape(x.shape)


def seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all queries to all keys: q [..., n, D], k and v [..., m, D] → [..., n, D].

    Where a gradient is wanted on a CPU it is two products, many times faster backwards there than the fused kernel.
    """
    if q.is_cuda or not torch.is_grad_enabled():
        return fn.scaled_dot_product_attention(q, k, v)
    weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1)
    return torch.matmul(weights.to(v.dtype), v)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x)·(1 + scale) + shift; x [B, n, dim], shift and scale [B, F, 1, dim]."""
    normed = fn.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, normed, 1 + scale).flatten(1, 2)


def gated(x: Tensor, by: Tensor, gate: Tensor) -> Tensor:
    """x + gate·by; x and by [B, n, dim], gate [B, F, 1, dim]."""
    frames = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, frames), by.unflatten(1, frames).to(x.dtype), gate).flatten(1, 2)


class Head(nn.Module):
    """From tokens to patches of velocity."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.eps = config.eps
        rows, columns = config.patch[1:]
        self.head = nn.Linear(config.dim, rows * columns * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation + e[..., None, :]).to(x.dtype)[..., None, :, :].unbind(-2)
        return self.head(modulated(x, shift, scale, self.eps))


class VideoTransformer(nn.Module):
    """Velocity of noisy latent frames, given their times, a text, and whatever `attend` remembers."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.head = Head(config)

    @property
    def rope(self) -> Rope:
        """How a memory has to turn this network's queries and keys: time, rows, columns."""
        pairs = self.config.head_dim // 2
        return Rope.axial((2 * (pairs - 2 * (pairs // 3)), 2 * (pairs // 3), 2 * (pairs // 3)))

    def read(self, text: Tensor) -> Text:
        """Keys and values of a text, embeddings [B, L, text_dim]: once for each prompt."""
        context = self.text_embedding(text)
        over = [cast(Block, block).cross_attn for block in self.blocks]
        return Text(tuple(a.key(context) for a in over), tuple(a.value(context) for a in over))

    def forward(self, x: Tensor, t: Tensor, text: Text, attend: Attend) -> Tensor:
        """Velocity ε − x0, [B, F, out_channels, H, W].

        x: noisy latents [B, F, in_channels, H, W]; t: time of each frame in [0, 1000], [B, F]; text: what `read` gave,
        for B rows, or B·G: then the frames of a row make G equal groups, each with a text of its own. attend(layer, q,
        k, v): self-attention over un-rotated [B, heads, F·h·w, head_dim].
        """
        if x.ndim != 5 or x.shape[2] != self.config.in_channels or tuple(t.shape) != tuple(x.shape[:2]):
            raise ValueError(
                f"latents {tuple(x.shape)} with times {tuple(t.shape)}; expected "
                f"[B, F, {self.config.in_channels}, H, W] and [B, F]"
            )
        rows, columns = self.config.patch[1:]
        if x.shape[-2] % rows or x.shape[-1] % columns:
            raise ValueError(f"latents of {x.shape[-2]}×{x.shape[-1]}; expected multiples of {rows}×{columns}")
        height, width = x.shape[-2] // rows, x.shape[-1] // columns
        weight = self.patch_embedding.weight
        patches = x.unflatten(-1, (width, columns)).unflatten(-3, (height, rows))  # [B, F, C, h, rows, w, columns]
        tokens = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, n, C·rows·columns]
        y = fn.linear(tokens.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)
        e = self.time_embedding(wave(t, self.config.freq_dim).to(weight.dtype))
        e6 = self.time_projection(e).unflatten(-1, (6, -1))
        for block in self.blocks:
            y = block(y, e6, text, attend)
        out = self.head(y, e).unflatten(1, (x.shape[1], height, width)).unflatten(-1, (rows, columns, -1))
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)  # [B, F, C, h, rows, w, columns] → latents


def places(frames: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Row and column of every token of `frames` frames, int64 [frames·height·width, 2]: a memory's `coordinates`."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([row, column], -1).reshape(-1, 2).repeat(frames, 1).to(device)


def compiled(model: VideoTransformer, **how: Any) -> VideoTransformer:
    """The same network with its blocks compiled, in place: what is before and after self-attention, which stays out.

    A memory keeps books, which no compiler follows; the rest of a block is one graph each, shared by all blocks. how:
    for `torch.compile`. Shapes are fixed: another number of frames, rows or columns compiles anew.
    """
    for block in model.blocks:
        for name in ("before", "after"):
            setattr(block, name, torch.compile(getattr(block, name), **{"dynamic": False, "fullgraph": True} | how))
    return model
