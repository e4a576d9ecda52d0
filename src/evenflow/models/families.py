"""What has to be known of single model families; everything else is read from the running model.

Falcon, Bloom and MPT compute attention inside their attention modules instead of asking the attention interface. On
the twin (never on the user's model) those modules get a forward of a few lines that uses the class's own weights and
asks like everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .linear_layers import linear_modules

# What stands where a model expects its attention function: (module, q, k, v, mask, scaling) → ([B, m, H, D], None).
Attention = Callable[..., tuple[Tensor, None]]


class Unsupported(ValueError):
    """A model that cannot be streamed, with the reason."""


@dataclass(frozen=True)
class OwnAttention:
    """A family whose attention modules have to be led to the attention interface.

    module: name of the attention class. forward: what the module does instead, given `ask`. slopes: ALiBi's slopes
    [heads] as the class builds them, or None where the model rotates. rounding: relative difference from the class's
    own logits that is the class's own rounding. inputs: extra arguments of the model's forward.
    """

    module: str
    forward: Callable[..., tuple[Tensor, None]]
    slopes: Callable[[PreTrainedModel], Tensor | None]
    rounding: float = 0.0
    inputs: Callable[[], dict[str, Any]] = dict


def _fused(module: Any, hidden: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a projection laid out as `[query … query | key | value]` per key head."""
    batch, m, _ = hidden.shape
    groups = module.num_heads // kv_heads
    fused = module.query_key_value(hidden).view(batch, m, kv_heads, groups + 2, module.head_dim)
    query = fused[..., :-2, :].flatten(2, 3)
    return query.transpose(1, 2), fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)


def _falcon(module: Any, ask: Attention, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
    # Attention of the class repeats keys for every query head before it caches them; the memory need not.
    query, key, value = _fused(module, hidden, module.num_kv_heads)
    out, _weights = ask(module, query, key, value, None, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), None


def _bloom(module: Any, ask: Attention, hidden: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
    query, key, value = _fused(module, hidden, module.num_heads)
    out, _weights = ask(module, query, key, value, None, scaling=module.inv_norm_factor)
    return residual + module.dense(out.flatten(2)), None


def _mpt(module: Any, ask: Attention, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        part.unflatten(2, (module.n_heads, module.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
    )
    out, _weights = ask(module, query, key, value, None, scaling=module.softmax_scale)
    return module.out_proj(out.flatten(2)), None


def _falcon_slopes(model: Any) -> Tensor | None:
    if not model.config.alibi:
        return None
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    config = model.config
    bias: Tensor = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), config.num_attention_heads, torch.float32)
    # Falcon adds its bias before it scales the scores.
    head_dim: int = config.hidden_size // config.num_attention_heads
    return bias[:, 0, 1].double() / math.sqrt(head_dim)


def _bloom_slopes(model: Any) -> Tensor:
    bias: Tensor = model.base_model.build_alibi_tensor(torch.ones(1, 2), model.config.n_head, torch.float32)
    return bias[:, 0, 1]


def _mpt_slopes(model: Any) -> Tensor:
    bias: Tensor = model.base_model.build_mpt_alibi_tensor(model.config.n_heads, 2)
    return bias[:, 0, 1] - bias[:, 0, 0]


OWN_ATTENTION = {
    # Falcon computes slope · position in bfloat16, so its bias is off by up to one part in 256.
    "falcon": OwnAttention("FalconAttention", _falcon, _falcon_slopes, rounding=1e-2),
    "bloom": OwnAttention("BloomAttention", _bloom, _bloom_slopes),
    # MPT converts its mask without looking whether there is one; a four-dimensional mask is passed on as it is.
    "mpt": OwnAttention(
        "MptAttention", _mpt, _mpt_slopes, inputs=lambda: {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
    ),
}


def head_of(model: Any) -> Any:
    """The language modelling head, None where a model has none."""
    return model.get_output_embeddings()


def tower_of(model: Any) -> Any:
    """The part of a model that reads text: all of it, or the language model beside a vision or audio tower."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def vocabulary_of(model: Any) -> int:
    """Number of token ids a model reads."""
    return int(model.get_input_embeddings().weight.shape[0])


def width_of(model: Any) -> int:
    """Channels of what a model's first layer reads."""
    return int(model.get_input_embeddings().weight.shape[1])


def check_generates(model: object) -> None:
    """Raise when `model` is no decoder that gives next-token logits."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a transformers model, the path of a model folder, or 'tiny'"
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise Unsupported(
            f"{name} is an encoder-decoder: its decoder reads a second, whole sequence; only decoders stream"
        )
    if head_of(model) is None:
        parts = [part for part, own in model.named_children() if isinstance(own, PreTrainedModel) and head_of(own)]
        if parts:
            raise Unsupported(f"{name} has no language modelling head; open the part that has: model.{parts[0]}")
        raise Unsupported(f"{name} has no language modelling head; open the ...ForCausalLM class of the same weights")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        raise Unsupported(f"{name} is spread over {sorted(map(str, devices))}; put the whole model on one device")


def check_streams(model: PreTrainedModel) -> None:
    """Raise `Unsupported` for what a memory of keys and values cannot stream, as far as it shows before running."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported(
            f"{name} uses latent attention: its keys are made anew from a compressed state and rotate in channels of "
            "their own, which the memory's layout of un-rotated keys does not describe"
        )
    words = model.get_input_embeddings()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    for path, module in tower_of(model).named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module is not words
            and longest is not None
            and longest <= module.num_embeddings <= longest + 8
        ):
            raise Unsupported(
                f"{name} learned one embedding per absolute position ({path}, {module.num_embeddings} rows): a stream "
                "has no such positions; models with rotary or ALiBi positions stream"
            )
    types, matrices = list(getattr(config, "layer_types", None) or ()), len(linear_modules(tower_of(model)))
    kinds = set(types) - {"full_attention", "sliding_attention"}
    if kinds == {"linear_attention"} and types.count("linear_attention") == matrices:
        if matrices < len(types):
            return
        raise Unsupported(
            f"{name} has layers of type linear_attention only; a stream counts by the keys of attention layers"
        )
    if kinds:
        raise Unsupported(
            f"{name} has layers of type {', '.join(sorted(kinds))}, whose state is not keys and values of single "
            "tokens; full and sliding attention stream, alone or between gated delta layers"
        )
