"""StreamingLLM as its paper defines it, written out in float64: what Evenflow is measured against.

Nothing here is shared with Evenflow's memory: raw keys, the whole cache rotated at its own indices for every token
(arXiv 2309.17453, section 3.2), and for a whole model a Llama spelled out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def turned(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary embedding of `x` [..., n, D] at `positions` [n]: channel c and c + D/2 turn together."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attended(query: Tensor, keys: Tensor, values: Tensor, theta: float = 10_000.0) -> Tensor:
    """What the newest token [H, 1, D] gets from raw `keys`, `values` [H_kv, n, D] that stand at indices 0 to n − 1."""
    n, groups = keys.shape[1], query.shape[0] // keys.shape[0]
    places = torch.arange(n)
    rotated = turned(keys, places, theta).repeat_interleave(groups, 0)
    scores = turned(query, places[-1:], theta) @ rotated.transpose(-1, -2) / query.shape[-1] ** 0.5
    return torch.softmax(scores, -1) @ values.repeat_interleave(groups, 0)


class StreamedLlama:
    """A Llama that reads one token at a time over the first `sink` and the last `window` raw keys of each layer."""

    def __init__(self, model: LlamaForCausalLM, sink: int, window: int) -> None:
        config: Any = model.config
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.sink, self.window = sink, window
        empty = torch.zeros(config.num_key_value_heads, 0, config.head_dim, dtype=torch.float64)
        self.kept = [(empty, empty) for _ in range(config.num_hidden_layers)]

    def read(self, token: int) -> Tensor:
        """Consume one token; logits float64 [V]."""
        config, theta = self.config, float(self.config.rope_parameters["rope_theta"])
        x = self.weights["model.embed_tokens.weight"][token]
        for layer, (keys, values) in enumerate(self.kept):
            normed = self._norm(x, f"model.layers.{layer}.input_layernorm")
            q, k, v = (
                self._product(normed, layer, f"self_attn.{name}_proj").view(-1, 1, config.head_dim) for name in "qkv"
            )
            keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
            x = x + self._product(attended(q, keys, values, theta).flatten(), layer, "self_attn.o_proj")
            normed = self._norm(x, f"model.layers.{layer}.post_attention_layernorm")
            gate = torch.nn.functional.silu(self._product(normed, layer, "mlp.gate_proj"))
            x = x + self._product(gate * self._product(normed, layer, "mlp.up_proj"), layer, "mlp.down_proj")
            n = keys.shape[1]
            if n > self.sink + self.window:
                kept = [*range(self.sink), *range(n - self.window, n)]
                keys, values = keys[:, kept], values[:, kept]
            self.kept[layer] = keys, values
        return self.weights["lm_head.weight"] @ self._norm(x, "model.norm")

    def _product(self, x: Tensor, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"] @ x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean() + self.config.rms_norm_eps).rsqrt() * self.weights[f"{name}.weight"]


def definition(model: LlamaForCausalLM, ids: Tensor, sink: int, window: int) -> Tensor:
    """Logits float64 [T, V] of `ids` [T]."""
    reader = StreamedLlama(model, sink, window)
    return torch.stack([reader.read(token) for token in ids.tolist()])
