"""Names of a transformer's tensors: Wan's own, which are ours, and those of `diffusers`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Modules by both names, Wan's first; what a name has behind its module (weight, bias) is the same.
TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
# What training frameworks put into names, anywhere; and what savers put before them.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFIXES = ("model.", "module.", "diffusion_model.")


def bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without what wraps their names: `model.`, `module.`, `_fsdp_wrapped_module.` and their like.

    Raises ValueError where two names become one.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        short = name
        for wrapper in WRAPPERS:
            short = short.replace(wrapper, "")
        while short.startswith(PREFIXES):
            short = short.partition(".")[2]
        if short in found:
            raise ValueError(f"two tensors are {short} once their prefixes are gone, one of them {name}")
        found[short] = tensor
    return found


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `diffusers.WanTransformer3DModel`; unknown names stay."""
    return {_renamed(name, TOP, BLOCK): tensor for name, tensor in weights.items()}


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `diffusers.WanTransformer3DModel` under Wan's own names; unknown names stay."""
    top, block = ({theirs: ours for ours, theirs in table.items()} for table in (TOP, BLOCK))
    return {_renamed(name, top, block): tensor for name, tensor in weights.items()}


def native(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bare names of either kind as Wan's own."""
    weights = bare(weights)
    theirs = any(name.startswith("condition_embedder.") for name in weights)
    return from_diffusers(weights) if theirs else dict(weights)


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    inside = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    start, rest, table = (inside[1], inside[2], block) if inside else ("", name, top)
    for module in (rest, rest.rpartition(".")[0]):  # a parameter of its own, or one of a module
        if module in table:
            return start + table[module] + rest[len(module) :]
    return name
