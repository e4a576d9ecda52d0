"""Reads how a model rotates its queries and keys from the model's own rotary module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..memory.rope import Rope, Style


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of `model` that owns rotary frequencies."""
    return [m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))]


def rope_of(rotary: nn.Module, kind: str | None, length: int, style: Style) -> Rope:
    """The rotation that `rotary` stands for when positions run from 0 to `length` − 1.

    kind: the layer type, for models that rotate each type of layer in its own way (Gemma 3). Frequencies that depend
    on the length (dynamic NTK, longrope) are what the module itself makes of that length; it is asked on a copy,
    since a transformers rotary module changes its buffers while it runs.
    """
    asked = copy.deepcopy(rotary)
    typed = kind is not None and hasattr(asked, f"{kind}_inv_freq")
    extra = {"layer_type": kind} if typed else {}
    device = next(asked.buffers()).device
    probe = torch.zeros(1, device=device)
    with torch.no_grad():
        for last in (0, length - 1):  # Position 0 first: it undoes what an earlier, longer input has left behind.
            asked(probe, position_ids=torch.tensor([[last]], device=device), **extra)
    prefix = f"{kind}_" if typed else ""
    frequencies: Tensor = getattr(asked, f"{prefix}inv_freq")
    scale = getattr(asked, f"{prefix}attention_scaling", 1.0)
    return Rope(inv_freq=tuple(frequencies.double().tolist()), style=style, scale=float(scale))


def hold_still(rotary: nn.Module) -> None:
    """Make `rotary` answer every position as position 0 is answered: cosine one, sine zero.

    Queries and keys then come out as they went in. A factor on cosine and sine (yarn, longrope) belongs to the `Rope`
    alone, which keeps partial rotary right: channels that do not rotate are not scaled either.
    """
    forward, known = rotary.forward, {}

    def still(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        key = x.dtype, layer_type
        if key not in known:
            cos, sin = forward(x, position_ids[:, :1], **({} if layer_type is None else {"layer_type": layer_type}))
            known[key] = torch.ones_like(cos), torch.zeros_like(sin)
        return known[key]

    vars(rotary)["forward"] = still
