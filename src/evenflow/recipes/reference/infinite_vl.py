"""InfiniteVL (arXiv 2512.08829): layers of window attention, and layers whose memory is a matrix, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, cat, exp, sigmoid, stack, zeros

from ...memory import Rope
from .plain import attention, rotated


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One head of one stream: q, k [T, D_k], v [T, D_v], beta, g [T] → o [T, D_v] and the state [D_k, D_v]."""
    s = zeros(k.shape[1], v.shape[1]).double() if state is None else state.clone()
    out = []
    for t in range(len(q)):
        s = exp(g[t]) * s
        predicted = s.T @ k[t]
        error = beta[t] * (v[t] - predicted)
        s = s + k[t][:, None] * error[None]
        out.append(s.T @ q[t])
    return stack(out), s


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Every channel of x [T, C] over its last K tokens, weight [C, K], oldest tap first; zeros before the stream."""
    out = zeros(x.shape).to(x)
    kernel = weight.shape[1]
    for t in range(len(x)):
        for tap in range(kernel):
            source = t - kernel + 1 + tap
            if source >= 0:
                out[t] += weight[:, tap] * x[source]
    return out


def normalised(x: Tensor) -> Tensor:
    """x [D] with length 1, or less where it is hardly longer than nothing."""
    return x / math.sqrt(float((x * x).sum()) + 1e-6)


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def delta_layer(x: Tensor, w: Mapping[str, Tensor], heads: int) -> Tensor:
    """A whole delta layer over a stream x [T, dim], normed before; w: weights by the names of the network's layer."""
    inner = silu(convolved(x @ w["qkv.weight"].T, w["conv"]))
    key, value = len(w["qkv.weight"]), w["norm"].shape[0]
    key = (key - heads * value) // (2 * heads)  # of one head
    parts = []
    for h in range(heads):
        q = inner[:, h * key : (h + 1) * key]
        k = inner[:, (heads + h) * key : (heads + h + 1) * key]
        v = inner[:, 2 * heads * key + h * value : 2 * heads * key + (h + 1) * value]
        q = stack([normalised(row) for row in q]) / math.sqrt(key)
        k = stack([normalised(row) for row in k])
        beta = sigmoid(x @ w["beta.weight"][h])
        g = -exp(w["a_log"][h]) * (1 + exp(x @ w["step.weight"][h] + w["step_bias"][h])).log()
        o = delta(q, k, v, beta, g)[0]
        o = stack([row / math.sqrt(float((row * row).mean()) + 1e-5) for row in o]) * w["norm"]
        parts.append(o * silu(x @ w["gate.weight"][h * value : (h + 1) * value].T))
    return cat(parts, 1) @ w["out.weight"].T


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor | Sequence[Any], rope: Rope | None, window: int | None
) -> Tensor:
    """q [H_q, T, D], k [H_kv, T, D], v [H_kv, T, D_v]; places: a position an axis of each token. Each query sees itself
    and the window − 1 tokens before it."""
    q, k = rotated(q, places, rope), rotated(k, places, rope)
    out = []
    for t in range(q.shape[1]):
        first = 0 if window is None else max(0, t - window + 1)
        out.append(attention(q[:, t : t + 1], k[:, first : t + 1], v[:, first : t + 1]))
    return cat(out, 1)
