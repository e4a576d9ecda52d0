"""Slow, obvious re-statements of what a streamed model computes, for whole `transformers` models, in float64.

Two of them, which share nothing with Evenflow and nothing with each other:

- `stepwise_logits` feeds one token at a time and lets the model's *own* attention code do everything. Keys are kept as
  they come, before rotation: all-zero position ids make the model's rotary step the identity. Before every step the
  cache hands the model its keys turned by (position of the key in the cache − position of the query in the cache);
  scores see position differences only, so the query may stay unturned. After the step the cache drops what is neither
  among the first `sink` nor among the last `window` tokens. ALiBi, sliding layers, soft caps and learned sinks need no
  word here: the model's own code applies them to the positions in the cache.
- `masked_logits` runs all tokens in one pass through an attention function with an explicit mask and two rotations of
  the query, one for the window and one for the sinks (the parallel form of the same definition).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Model classes drop to float32 inside attention and norms even when they are float64; here they do not."""
    softmax, narrow = nn.functional.softmax, Tensor.float

    def wide_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    def wide(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return narrow(x, *args, **kwargs) if x.dtype in (torch.float32, torch.bfloat16) else x.double()

    with mock.patch.object(nn.functional, "softmax", wide_softmax), mock.patch.object(Tensor, "float", wide):
        yield


def turn(x: Tensor, position: Tensor, frequencies: Tensor | None, style: str = "half") -> Tensor:
    """Rotary embedding, written out: `x` [..., n, D] at `position` [n]; channels beyond 2·len(frequencies) stay."""
    if frequencies is None:
        return x
    angle = position.double()[:, None] * frequencies.double()
    cos, sin = angle.cos(), angle.sin()
    pairs = len(frequencies)
    if style == "half":
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([rotated, x[..., 2 * pairs :]], -1)


def layer_frequencies(model: PreTrainedModel) -> list[Tensor | None]:
    """The rotary frequencies of every layer, as the model's own `rotary_emb` holds them; None where nothing turns."""
    config = model.config
    layers = config.num_hidden_layers
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return [None] * layers
    rotary = model.base_model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return [rotary.inv_freq.double()] * layers
    return [getattr(rotary, f"{kind}_inv_freq").double() for kind in config.layer_types]


class RawKeyCache:
    """Stands in for a transformers cache: keeps raw keys, gives them out turned to where they stand in the cache."""

    is_compileable = False

    def __init__(
        self, sink: int, window: int | None, frequencies: Sequence[Tensor | None], style: str = "half"
    ) -> None:
        self.sink, self.window, self.frequencies, self.style = sink, window, frequencies, style
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert key.shape[2] == 1, "the definition is per token"
        if layer in self.keys:
            key, value = torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)
        n = key.shape[2]
        turned = turn(key, torch.arange(n) - (n - 1), self.frequencies[layer], self.style).to(key.dtype)
        kept = list(range(n))
        if self.window is not None and n > self.sink + self.window:
            kept = kept[: self.sink] + kept[n - self.window :]
        self.keys[layer], self.values[layer] = key[:, :, kept], value[:, :, kept]
        return turned, value

    def get_seq_length(self, layer: int = 0) -> int:
        return self.keys[layer].shape[2] if layer in self.keys else 0

    def get_query_offset(self, layer: int = 0) -> int:
        return self.get_seq_length(layer)

    def get_mask_sizes(self, query_length: int, layer: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer) + query_length, 0


def _call(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        kwargs["position_ids"] = torch.zeros_like(ids)
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def stepwise_logits(
    model: PreTrainedModel,
    ids: Tensor,
    sink: int,
    window: int | None,
    *,
    style: str = "half",
    frequencies: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits [B, T, V] in float64 of `ids` [B, T], one token at a time over a cache of raw keys."""
    twin = copy.deepcopy(model).double().eval()
    cache = RawKeyCache(sink, window, frequencies or layer_frequencies(model), style)
    name = "cache" if "cache" in inspect.signature(twin.forward).parameters else "past_key_values"
    with doubles():
        return torch.cat(
            [_call(twin, ids[:, t : t + 1], **{name: cache, "use_cache": True}) for t in range(ids.shape[1])], 1
        )


def masked_logits(
    model: PreTrainedModel,
    ids: Tensor,
    sink: int,
    window: int | None,
    *,
    style: str = "half",
    frequencies: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits [B, T, V] in float64 of `ids` [B, T] in one pass, for classes that use the attention interface."""
    turns = frequencies or layer_frequencies(model)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
        s_aux: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        frequency = turns[module.layer_idx]
        groups = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        steps = torch.arange(query.shape[2])
        for i in steps.tolist():
            seen_from_sinks = i if window is None else min(i, sink + window)
            window_turned = turn(query[:, :, i : i + 1], torch.tensor([i]), frequency, style)
            sink_turned = turn(query[:, :, i : i + 1], torch.tensor([seen_from_sinks]), frequency, style)
            columns, scores = [], []
            for j in range(i + 1):
                in_window = window is None or i - j <= window
                if j >= sink and not in_window:
                    continue
                distance = i - j if j >= sink else seen_from_sinks - j
                if sliding_window is not None and distance >= sliding_window:
                    continue
                k = turn(key[:, :, j : j + 1], torch.tensor([j]), frequency, style).repeat_interleave(groups, 1)
                q = window_turned if j >= sink else sink_turned
                columns.append(j)
                scores.append((q * k).sum(-1) * scale)
            score = torch.cat(scores, -1)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if s_aux is not None:
                score = torch.cat([score, s_aux.double()[None, :, None].expand(len(score), -1, 1)], -1)
            weight = torch.exp(score - score.amax(-1, keepdim=True))
            weight = (weight / weight.sum(-1, keepdim=True))[..., : len(columns)]
            seen = value[:, :, columns].repeat_interleave(groups, 1)
            out[:, :, i] = (weight[..., None] * seen).sum(2)
        return out.transpose(1, 2), None

    AttentionInterface.register("oracle", attention)
    twin = copy.deepcopy(model).double().eval()
    for module in twin.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "oracle"
    with doubles():
        return _call(twin, ids)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, measured in the largest expected magnitude (1 at least); NaN in either is infinite."""
    gap = (got.double() - expected.double()).abs().max().item()
    return math.inf if math.isnan(gap) else gap / max(1.0, expected.double().abs().max().item())
