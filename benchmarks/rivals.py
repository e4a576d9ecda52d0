"""What one would use instead of a memory, each as a function that reads one token."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)  # fmt: skip

import evenflow as ef

STATIC = "benchmark-static"
Read = Callable[[Tensor], Tensor]  # ids [1, 1] to logits [1, 1, V]


def llama(layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 32_000) -> LlamaForCausalLM:
    """A Llama with random weights in float32: 12 layers, 768 wide unless said otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=16_384, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def evenflow(model: PreTrainedModel, spec: str, prompt: Tensor) -> Read:
    """A stream that has read `prompt` [1, T]."""
    stream = ef.open(model, memory=spec, batch=1)
    stream.consume(prompt)
    return stream.feed


def dynamic(model: PreTrainedModel, prompt: Tensor) -> Read:
    """transformers' cache that keeps everything: grows by one token a call."""
    return _cached(model, DynamicCache(config=model.config), prompt)


def sliding(model: LlamaForCausalLM, window: int, prompt: Tensor) -> Read:
    """transformers' cache of a sliding window (no sinks, positions of the stream), over the same weights."""
    known = model.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    config = MistralConfig(
        **{name: known[name] for name in (*names, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")},
        rope_parameters=known["rope_parameters"], tie_word_embeddings=model.config.tie_word_embeddings,
        sliding_window=window,
    )  # fmt: skip
    with torch.device("meta"):
        twin = MistralForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    return _cached(twin.eval(), DynamicCache(config=config), prompt)


def _call(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, **options: Any) -> Tensor:
    # transformers renames this argument.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache}, **options).logits


def _cached(model: PreTrainedModel, cache: DynamicCache, prompt: Tensor) -> Read:
    def read(ids: Tensor) -> Tensor:
        return _call(model, ids, cache)

    for piece in prompt.split(512, 1):
        read(piece)
    return read


class RawKeys(DynamicCache):
    """The definition as it reads: raw keys are kept, all of them rotated at every step, tensors concatenated.

    The model runs at position 0, where its rotation is the identity; keys are handed out turned by their distance to
    the query, which is all that scores see. Arrived tokens are put behind, and what is too old is cut out, by a
    concatenation each.
    """

    def __init__(self, model: PreTrainedModel, sink: int, window: int) -> None:
        super().__init__()
        self.sink, self.window, self.rotary = sink, window, model.base_model.rotary_emb
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.turn: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            old_keys, old_values = self.kept[layer]
            key, value = torch.cat([old_keys, key], 2), torch.cat([old_values, value], 2)
        self.kept[layer] = key, value
        if layer == 0 or self.turn is None:
            distance = torch.arange(1 - key.shape[2], 1)[None]
            self.turn = self.rotary(value, distance)
        cos, sin = self.turn
        half = key.shape[-1] // 2
        swapped = torch.cat([-key[..., half:], key[..., :half]], -1)
        return key * cos + swapped * sin, value

    def evict(self) -> None:
        """Keep the first `sink` and the last `window` tokens."""
        for layer, pair in self.kept.items():
            if pair[0].shape[2] > self.sink + self.window:
                first, last = slice(0, self.sink), slice(pair[0].shape[2] - self.window, None)
                keys, values = (torch.cat([x[:, :, first], x[:, :, last]], 2) for x in pair)
                self.kept[layer] = keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept[layer_idx][0].shape[2] if layer_idx in self.kept else 0


def raw_keys(model: PreTrainedModel, sink: int, window: int, prompt: Tensor) -> Read:
    """The definition, full at once: what it holds after `prompt` [1, T ≥ sink + window] is taken from a dense pass.

    Decoding token by token takes minutes to fill it; the time of a step does not depend on what is held.
    """
    cache = RawKeys(model, sink, window)
    zero = torch.zeros(1, 1, dtype=torch.long)
    tokens = prompt[:, : sink + window]

    def read(ids: Tensor) -> Tensor:
        logits = _call(model, ids, cache, position_ids=zero)
        cache.evict()
        return logits

    dense = DynamicCache(config=model.config)
    _cached(model, dense, tokens)
    half_turn = model.base_model.rotary_emb(dense.layers[0].values, torch.arange(tokens.shape[1])[None])
    for number, layer in enumerate(dense.layers):
        cos, sin = half_turn
        half = layer.keys.shape[-1] // 2
        swapped = torch.cat([-layer.keys[..., half:], layer.keys[..., :half]], -1)
        cache.kept[number] = layer.keys * cos - swapped * sin, layer.values  # turned back
    return read


def recomputed(model: PreTrainedModel, length: int, prompt: Tensor) -> Read:
    """The model run afresh on its last `length` tokens."""
    held = prompt[:, -length:]

    def read(ids: Tensor) -> Tensor:
        nonlocal held
        held = torch.cat([held, ids], 1)[:, -length:]
        with torch.no_grad():
            return model(input_ids=held, use_cache=False, logits_to_keep=1).logits

    return read


def uncached(model: PreTrainedModel) -> Read:
    """The model on one token that sees nothing but itself: a step without any memory."""

    def read(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return read


class Static:
    """Keys and values in buffers of a fixed size: each token overwrites the next slot, all slots are attended."""

    def __init__(self, model: PreTrainedModel, size: int) -> None:
        config = model.config
        shape = (1, config.num_key_value_heads, size, config.head_dim)
        self.keys = [torch.randn(shape, dtype=model.dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.randn(shape, dtype=model.dtype) for _ in range(config.num_hidden_layers)]
        self.slot = 0


def _static_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, static: Static, **_: Any
) -> tuple[Tensor, None]:
    keys, values = static.keys[module.layer_idx], static.values[module.layer_idx]
    keys.select(2, static.slot).copy_(key.select(2, 0))
    values.select(2, static.slot).copy_(value.select(2, 0))
    # Heads that share keys are one product with several rows, as a careful reader would write it.
    grouped = query.view(1, keys.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, keys, values, scale=module.scaling)
    return out.view(1, 1, -1, query.shape[-1]), None


AttentionInterface.register(STATIC, _static_attention)


def bare(model: PreTrainedModel, size: int) -> Read:
    """The same model over `Static` buffers: its own rotation, plain attention, no book kept of anything."""
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation(STATIC)
    static = Static(model, size)
    position = torch.full((1, 1), size - 1)

    def read(ids: Tensor) -> Tensor:
        static.slot = (static.slot + 1) % size
        with torch.no_grad():
            return twin(input_ids=ids, position_ids=position, use_cache=False, static=static).logits

    return read
