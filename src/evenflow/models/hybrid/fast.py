"""A layer of window attention with fast weights beside it, which learn what the window loses while the stream runs.

Source: Spatial-TTT, arXiv 2603.12255.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ...memory.fast_weights import FastState, FastWeights, feed, flushed, frame_convolution
from .network import HybridConfig, before_softplus


class FastLayer(nn.Module):
    """Window attention with fast weights beside it, which share its queries, keys and values; their outputs are added.

    rate: how much of a step a token's key and value make to begin with. The gate begins at nothing, so that the layer
    begins as window attention alone. Source: Spatial-TTT, arXiv 2603.12255. `Hybrid` and its session do not take it yet.
    """

    def __init__(
        self, config: HybridConfig, fast_heads: int = 4, rule: FastWeights | None = None, rate: float = 1e-3
    ) -> None:
        super().__init__()
        width, own = config.heads * config.head_dim, config.heads * config.head_dim // fast_heads
        if width % fast_heads or own < config.head_dim:
            raise ValueError(
                f"{fast_heads} fast heads do not get equal shares of {width} channels, at least {config.head_dim} each"
            )
        self.heads, self.fast_heads = [config.heads, config.kv_heads, config.kv_heads], fast_heads
        self.rule, self.turned = FastWeights() if rule is None else rule, config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.eps) for _ in "qk")
        self.scale, self.offset = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(2, width))
        self.conv = nn.Parameter(torch.zeros(3, width, 3, 3, 3))
        self.first = nn.ParameterList(torch.randn(fast_heads, own, own) / own**0.5 for _ in range(3))
        self.rates, self.momenta = nn.Linear(config.dim, 3 * fast_heads), nn.Linear(config.dim, fast_heads)
        self.gate, self.norm = nn.Linear(config.dim, fast_heads), nn.RMSNorm(own, config.eps)
        self.out = nn.Linear(width, config.dim, bias=False)
        with torch.no_grad():
            self.conv[..., 1, 1, 1] = 1
            for parameter in (self.gate.weight, self.gate.bias, self.rates.bias):
                parameter.zero_()
        self.bias = float(before_softplus(torch.tensor(rate, dtype=torch.float64)))

    def forward(
        self, h: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], turn: Callable[[Tensor], Tensor],
        state: FastState | None = None, grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, FastState]:  # fmt: skip
        """h [B, T, dim], normed → the same shape, and the fast weights after it; state None begins a stream.

        attend: window attention over un-rotated q, k, v. turn: rotates [..., T, head_dim] to the tokens' places. grid:
        frames, rows and columns of a video that these tokens are the whole of, convolved before it is remembered.
        """
        q, k, v = self.qkv(h).unflatten(-1, (sum(self.heads), -1)).split(self.heads, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        near = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        if state is None:
            w0, w1, w2 = self.first
            state = FastState.begin((w0, w1, w2), len(h))
        rates = fn.softplus(self.rates(h) + self.bias).unflatten(-1, (self.fast_heads, 3)).transpose(1, 2)
        far, state = feed(self.rule, state, *self._inner(q, k, v, turn, grid), rates, self.momenta(h).sigmoid().mT)
        far = self.norm(far) * fn.silu(self.gate(h)).mT[..., None]
        return self.out(near + far.transpose(1, 2).flatten(2)), state

    def _inner(
        self, q: Tensor, k: Tensor, v: Tensor, turn: Callable[[Tensor], Tensor], grid: tuple[int, int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the fast heads get of q, k, v [B, T, heads, head_dim]: [B, fast heads, T, channels] each."""
        groups, out = self.heads[0] // self.heads[1], []
        for number, x in enumerate((q, k, v)):
            x = (x if number == 0 else x.repeat_interleave(groups, 2)).flatten(2)
            if number < 2:
                x = x * self.scale[number] + self.offset[number]
            if grid is not None:
                shown, tail = frame_convolution(x.unflatten(1, grid), self.conv[number])
                x = torch.cat([shown, flushed(self.conv[number], tail)], 1).flatten(1, 3)
            x = fn.silu(x).unflatten(-1, (self.fast_heads, -1)).transpose(1, 2)
            if number < 2:
                x = x / (x.norm(dim=-1, keepdim=True) + 1e-5)
                x = torch.cat([turn(x[..., : self.turned]), x[..., self.turned :]], -1)
            out.append(x)
        return out[0], out[1], out[2]
