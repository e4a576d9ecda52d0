"""A layer of window attention with fast weights beside it, which learn what the window loses while the stream runs.

Source: Spatial-TTT, arXiv 2603.12255.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ...memory.fast_weights import FastState, FastWeights, feed, flushed, frame_convolution
from .config import HybridConfig, before_softplus

Heads = tuple[Tensor, Tensor, Tensor]
Turn = Callable[[Tensor], Tensor]


class FastLayer(nn.Module):
    """Window attention with fast weights beside it, which share its queries, keys and values; their outputs are added.

    rate: how much of a step a token's key and value make to begin with. The gate begins at nothing, so that the layer
    begins as window attention alone. fast_heads, rule: those of the config if None.
    """

    def __init__(
        self, config: HybridConfig, fast_heads: int | None = None, rule: FastWeights | None = None, rate: float = 1e-3
    ) -> None:
        super().__init__()
        fast_heads = config.fast_heads if fast_heads is None else fast_heads
        width, own = config.heads * config.head_dim, config.heads * config.head_dim // fast_heads
        if width % fast_heads or own < config.head_dim:
            raise ValueError(
                f"{fast_heads} fast heads do not get equal shares of {width} channels, at least {config.head_dim} each"
            )
        self.heads, self.fast_heads = [config.heads, config.kv_heads, config.kv_heads], fast_heads
        self.rule, self.turned = config.rule if rule is None else rule, config.head_dim
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

    def empty(self, batch: int) -> FastState:
        """The state of streams that have not begun."""
        w0, w1, w2 = self.first
        return FastState.begin((w0, w1, w2), batch)

    def forward(
        self, h: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], turn: Turn, state: FastState | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, FastState]:  # fmt: skip
        """h [B, T, dim], normed → the same shape, and the fast weights after it; state None begins a stream.

        attend: window attention over un-rotated q, k, v. turn: rotates [..., T, head_dim] to the tokens' places. grid:
        frames, rows and columns of a video that these tokens are the whole of, convolved before it is remembered.
        """
        heads = self.projected(h)
        wide = self.widened(*heads)
        if grid is not None:
            shown = (frame_convolution(x.unflatten(1, grid), w) for x, w in zip(wide, self.conv, strict=True))
            wide = [
                torch.cat([some, flushed(w, tail)], 1).flatten(1, 3)
                for (some, tail), w in zip(shown, self.conv, strict=True)
            ]
        return self.read(h, heads, wide, attend, turn, self.empty(len(h)) if state is None else state)

    def projected(self, h: Tensor) -> Heads:
        """Queries, keys and values, [B, T, heads, head_dim], un-rotated; both branches share them."""
        q, k, v = self.qkv(h).unflatten(-1, (sum(self.heads), -1)).split(self.heads, 2)
        return self.q_norm(q), self.k_norm(k), v

    def widened(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """What the fast weights' branch takes of them, [B, T, channels] each: what is convolved in a video."""
        groups, out = self.heads[0] // self.heads[1], []
        for number, x in enumerate((q, k, v)):
            x = (x if number == 0 else x.repeat_interleave(groups, 2)).flatten(2)
            out.append(x * self.scale[number] + self.offset[number] if number < 2 else x)
        return out

    def read(
        self, h: Tensor, heads: Heads, wide: Sequence[Tensor], attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        turn: Turn, state: FastState,
    ) -> tuple[Tensor, FastState]:  # fmt: skip
        """Both branches of tokens h, added. wide: as `widened` gives it, convolved where they are a video's."""
        q, k, v = heads
        near = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        inner = []
        for number, x in enumerate(wide):
            x = fn.silu(x).unflatten(-1, (self.fast_heads, -1)).transpose(1, 2)
            if number < 2:
                x = x / (x.norm(dim=-1, keepdim=True) + 1e-5)
                x = torch.cat([turn(x[..., : self.turned]), x[..., self.turned :]], -1)
            inner.append(x)
        rates = fn.softplus(self.rates(h) + self.bias).unflatten(-1, (self.fast_heads, 3)).transpose(1, 2)
        far, state = feed(self.rule, state, inner[0], inner[1], inner[2], rates, self.momenta(h).sigmoid().mT)
        far = self.norm(far) * fn.silu(self.gate(h)).mT[..., None]
        return self.out(near + far.transpose(1, 2).flatten(2)), state
