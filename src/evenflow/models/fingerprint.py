"""Tells models apart, cheaply: so that a saved stream is only ever continued by the model that read it."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

SAMPLES = 64  # Numbers looked at per weight tensor.
# What may differ between two loadings of one model.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "output_attentions",
            "output_hidden_states", "return_dict", "architectures")  # fmt: skip


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and evenly spaced samples of every weight tensor.

    Any training step changes it. It does not read all weights: a change to single numbers can go unnoticed.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[::stride][:SAMPLES].to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()
