"""Layers of window attention between layers whose memory is a matrix, or beside fast weights: exact near by, compressed
for ever, never larger.

Source: InfiniteVL, arXiv 2512.08829, first version: the language model. Its vision encoder is that of Qwen2.5-VL and not
here: pictures come as features. Names of parameters are ours. Layers with fast weights: Spatial-TTT, arXiv 2603.12255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ...memory.delta import DeltaState, chunked_delta, gated_delta, short_convolution, unit
from ...memory.fast_weights import FastState
from ...memory.rope import Rotary
from .config import HybridConfig, Kind, before_softplus
from .fast import FastLayer, Turn

State = DeltaState | FastState
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class WindowLayer(nn.Module):
    """Attention whose keys and positions belong to whoever attends."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2).split(self.heads, 1)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class DeltaLayer(nn.Module):
    """A gated delta rule behind a short convolution, without positions, its reads normed and gated.

    Begins as the paper's does from scratch: decay rates uniform up to 16, steps log-uniform from 0.001 to 0.1.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.delta_heads
        self.heads, self.key_dim, self.value_dim = heads, config.key_dim, config.value_dim
        self.widths = [heads * config.key_dim, heads * config.key_dim, heads * config.value_dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = nn.Parameter((2 * torch.rand(sum(self.widths), config.kernel) - 1) * config.kernel**-0.5)
        self.beta, self.step = nn.Linear(dim, heads, bias=False), nn.Linear(dim, heads, bias=False)
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
        self.step_bias = nn.Parameter(
            before_softplus(torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1))))
        )
        self.norm = nn.Parameter(torch.ones(config.value_dim))
        self.gate = nn.Linear(dim, heads * config.value_dim, bias=False)
        self.out = nn.Linear(heads * config.value_dim, dim, bias=False)

    @torch.no_grad()
    def begin_gently(self) -> None:
        """As a layer begins that takes the place of attention: half of every error written, hardly a decay, and a
        convolution that changes nothing."""
        for parameter in (self.a_log, self.step.weight, self.beta.weight, self.conv):
            parameter.zero_()
        self.conv[:, -1] = 1
        self.step_bias.copy_(before_softplus(torch.full_like(self.step_bias, 1e-3)))

    def empty(self, batch: int) -> DeltaState:
        """The state of streams that have not begun."""
        weight = self.qkv.weight
        return DeltaState.empty(
            batch, self.heads, self.key_dim, self.value_dim, sum(self.widths), self.conv.shape[1], weight.dtype, weight.device
        )  # fmt: skip

    def forward(self, x: Tensor, state: DeltaState, mask: Tensor | None = None) -> tuple[Tensor, DeltaState]:
        """x [B, T, dim], normed; mask: bool [B, T], False for padding, which leaves no trace. Returns the output and
        the state after it."""
        wide = state.matrix.dtype
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        inner, tail = short_convolution(self.qkv(x), self.conv, state.tail, mask)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in fn.silu(inner).split(self.widths, -1)
        )
        beta = self.beta(x).to(wide).sigmoid()
        g = -self.a_log.to(wide).exp() * fn.softplus(self.step(x).to(wide) + self.step_bias.to(wide))
        if mask is not None:
            beta, g = (number.masked_fill(~mask[..., None], 0) for number in (beta, g))
        form = chunked_delta if self.training else gated_delta
        o, matrix = form(unit(q) * self.key_dim**-0.5, unit(k), v, beta.mT, g.mT, state.matrix)
        o = fn.rms_norm(o.to(wide), (self.value_dim,), self.norm.to(wide), 1e-5).to(x.dtype)
        y = self.out(o.transpose(1, 2).flatten(2) * fn.silu(self.gate(x)))
        return y, DeltaState(matrix, tail)


class Block(nn.Module):
    """A layer of any kind, then a feed-forward network, each behind a norm."""

    def __init__(self, config: HybridConfig, kind: Kind) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(config.dim, config.eps), nn.RMSNorm(config.dim, config.eps)
        made = {"delta": DeltaLayer, "fast": FastLayer}.get(kind, WindowLayer)
        self.mixer: WindowLayer | DeltaLayer | FastLayer = made(config)
        self.up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def fed(self, x: Tensor) -> Tensor:
        """The feed-forward network, added."""
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(fn.silu(gate) * value)


class Hybrid(nn.Module):
    """Hidden vectors of tokens, given `attend` for the layers that attend and a state for each that keeps one."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.norm = nn.RMSNorm(config.dim, config.eps)

    def empty(self, batch: int) -> tuple[State, ...]:
        """States of the layers that keep one, before a stream begins."""
        mixers = (cast(Block, block).mixer for block in self.blocks)
        return tuple(mixer.empty(batch) for mixer in mixers if not isinstance(mixer, WindowLayer))

    def forward(
        self, x: Tensor, attend: Attend, states: Sequence[State] | None = None, mask: Tensor | None = None,
        turn: Turn | None = None, grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, tuple[State, ...]]:  # fmt: skip
        """x [B, T, dim], embedded; attend(layer, q, k, v), layers counted among those that attend; states: None begins a
        stream; mask: bool [B, T], False for padding. turn, grid: for layers with fast weights, see `FastLayer`; what a
        whole film of `grid` is, is read at once. Returns normed hidden vectors and the states after them."""
        left = iter(self.empty(len(x)) if states is None else states)
        after: list[State] = []
        for number, kind in enumerate(self.config.kinds):
            begun = next(left) if kind in ("delta", "fast") else None
            x, state = self.through(number, x, attend, begun, mask, turn, grid)
            after += [] if state is None else [state]
        return self.norm(x), tuple(after)

    def through(
        self, number: int, x: Tensor, attend: Attend, state: State | None = None, mask: Tensor | None = None,
        turn: Turn | None = None, grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """One block alone, as layer-wise distillation needs it; a layer that keeps a state begins a stream without one."""
        block = cast(Block, self.blocks[number])
        own = self.attends(number, attend)
        if isinstance(block.mixer, DeltaLayer):
            begun = state if isinstance(state, DeltaState) else block.mixer.empty(len(x))
            y, after = block.mixer(block.norm(x), begun, mask)
            return block.fed(x + y), after
        if isinstance(block.mixer, FastLayer):
            if turn is None or mask is not None:
                raise ValueError(
                    "a layer with fast weights turns its keys, and takes no padding; give `turn`, and no mask"
                )
            y, learned = block.mixer(block.norm(x), own, turn, state if isinstance(state, FastState) else None, grid)
            return block.fed(x + y), learned
        return block.fed(x + block.mixer(block.norm(x), own)), None

    def attends(self, number: int, attend: Attend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`attend` of one block, by its place among those that attend."""
        layer = sum(kind != "delta" for kind in self.config.kinds[:number])
        return lambda q, k, v: attend(layer, q, k, v)

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, dim] → […, vocabulary], by the weights that embed."""
        return fn.linear(hidden, self.embedding.weight)


class Windowed:
    """Attention of all tokens of a stream at once, each over its window: what training and oracles use as `attend`."""

    def __init__(self, config: HybridConfig, places: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """places: int64 [T, 3], time, row and column of every token."""
        rotary = Rotary(config.rope, config.head_dim, dtype, places.device)
        self.rotary, self.angles = rotary, rotary.at(torch.cat([torch.zeros_like(places[:, :1]), places], 1))
        age = torch.arange(len(places), device=places.device)
        age, self.full = age[:, None] - age, {n for n, kind in enumerate(config.attending) if kind == "full"}
        self.past = age >= 0
        self.mask = self.past & (age < (len(places) if config.window is None else config.window))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.turn(q), self.turn(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = self.past if layer in self.full else self.mask
        return fn.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def turn(self, x: Tensor) -> Tensor:
        """`x` [..., T, head_dim], each token turned to its place."""
        cos, sin = self.angles  # not `rotate`, which writes large ones in place: no gradient goes through that
        return torch.addcmul(x * cos, self.rotary.swapped(x), sin)


def in_a_row(first: int, count: int) -> Tensor:
    """Places of text, int64 [count, 3]: the same number on all three axes."""
    return torch.arange(first, first + count)[:, None].expand(-1, 3)


def frame_places(
    base: int, seconds: float, rows: int, columns: int, per_second: float = 2.0, per_grid: float = 1.0
) -> Tensor:
    """Places of a frame at `seconds` of a video that begins at place `base`, int64 [rows·columns, 3].

    Frames within one grid of `per_grid` seconds share their time; rows and columns are the same for every frame. That
    all three count from `base` is as Qwen2.5-VL numbers pictures; the released demo says so of time alone.
    """
    time = base + math.floor(seconds / per_grid) * max(round(per_grid * per_second), 1)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack([row, column], -1).reshape(-1, 2) + base
    return torch.cat([torch.full_like(grid[:, :1], time), grid], 1)
