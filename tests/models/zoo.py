"""Small random models of the real `transformers` classes, one per supported family and feature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 67
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25,
}  # fmt: skip


def small(name: str, drop: tuple[str, ...] = (), **extra: Any) -> Callable[[], PreTrainedModel]:
    """A maker of a random `{name}ForCausalLM`; `drop` names entries of `SMALL` its config does not know."""

    def make() -> PreTrainedModel:
        text = "Text" if name == "Gemma3" else ""
        config = getattr(transformers, f"{name}{text}Config")(
            **{key: value for key, value in SMALL.items() if key not in drop} | extra
        )
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
            model.set_experts_implementation("eager")  # the grouped kernel has no float64
        return model

    return make


def yarn(factor: float = 4.0) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": factor, "original_max_position_embeddings": 128}


NO_GQA = ("num_key_value_heads",)
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": small("Llama"),
    "llama-linear": small("Llama", rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}),
    "llama-llama3": small(
        "Llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "llama-yarn": small("Llama", rope_parameters=yarn()),
    "mistral": small("Mistral", sliding_window=None),
    "mistral-sliding": small("Mistral", sliding_window=9),
    "qwen2": small("Qwen2"),
    "qwen2-sliding": small("Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": small("Qwen3", head_dim=16),
    "gemma2": small("Gemma2", head_dim=16, sliding_window=9, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "gemma3": small(
        "Gemma3", head_dim=16, sliding_window=9, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": small("Phi3", sliding_window=None),
    "phi3-sliding": small("Phi3", sliding_window=9),
    "gpt-neox": small(
        "GPTNeoX", NO_GQA, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    ),
    "falcon": small("Falcon", ("num_key_value_heads", "intermediate_size"), alibi=False, multi_query=True),
    "falcon-new": small(
        "Falcon", ("num_key_value_heads", "intermediate_size"), alibi=False, new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon-alibi": small("Falcon", ("num_key_value_heads", "intermediate_size"), alibi=True, multi_query=False),
    "bloom": small(
        "Bloom", ("num_key_value_heads", "intermediate_size", "num_attention_heads", "max_position_embeddings",
                  "num_hidden_layers"), n_head=4, n_layer=2,
    ),
    "mpt": small(
        "Mpt", ("num_key_value_heads", "intermediate_size", "num_attention_heads", "max_position_embeddings",
                "num_hidden_layers", "hidden_size"), d_model=32, n_heads=4, n_layers=2, max_seq_len=512,
    ),
    "gpt-oss": small(
        "GptOss", head_dim=16, sliding_window=9, num_local_experts=3, num_experts_per_tok=2, rope_parameters=yarn(),
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere": small("Cohere"),
}  # fmt: skip


def tower(name: str, sections: list[int], **vision: Any) -> Callable[[], PreTrainedModel]:
    """A maker of a random `{name}ForConditionalGeneration`, whose text tower turns `sections` of channels by t, h, w."""

    def make() -> PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
        text = SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": rope}
        sees = {"depth": 1, "num_heads": 2, "patch_size": 4} | vision
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=sees, **SPECIAL)
        model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        return model

    return make


SPECIAL = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
SEES = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
TOWERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2-vl": tower("Qwen2VL", [2, 3, 3], embed_dim=16, hidden_size=32, mlp_ratio=2),
    "qwen2.5-vl": tower("Qwen2_5_VL", [2, 3, 3], **SEES, window_size=16, fullatt_block_indexes=[0]),
    "qwen3-vl": tower("Qwen3VL", [4, 2, 2], **SEES, num_position_embeddings=16, deepstack_visual_indexes=[]),
}
MATRICES: dict[str, Any] = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip


def qwen3_5() -> PreTrainedModel:
    """A random Qwen3.5 text model: gated delta layers, and attention on three interleaved axes."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SMALL | MATRICES, rope_parameters=rope))


HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-next": small(
        "Qwen3Next", **MATRICES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3.5": qwen3_5,
}  # fmt: skip
INTERLEAVED = {"cohere"}
OWN_ATTENTION = {"falcon", "falcon-new", "falcon-alibi", "bloom", "mpt"}


@cache
def shared(name: str) -> PreTrainedModel:
    """One instance per name for all tests; do not change it."""
    return fresh(name)


def fresh(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = (FAMILIES | TOWERS | HYBRIDS)[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at ones and zeros, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(count: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random ids [batch, count] of the small vocabulary."""
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))
