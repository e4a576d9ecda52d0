"""Reads how a model rotates its queries and keys from the model's own rotary module."""

from __future__ import annotations

import copy
import types

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
    typed = kind is not None and hasattr(rotary, f"{kind}_inv_freq")
    prefix = f"{kind}_" if typed else ""
    scaling = getattr(rotary, "rope_type", "default")
    if (scaling[kind] if isinstance(scaling, dict) else scaling) in ("dynamic", "longrope"):
        rotary = copy.deepcopy(rotary)
        device = next(rotary.buffers()).device
        with torch.no_grad():
            for last in (0, length - 1):  # Position 0 first: it undoes what an earlier, longer input has left behind.
                positions = torch.tensor([[last]], device=device)
                rotary(torch.zeros(1, device=device), positions, **({"layer_type": kind} if typed else {}))
    frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq")
    scale = getattr(rotary, f"{prefix}attention_scaling", 1.0)
    return Rope(inv_freq=tuple(frequencies.double().tolist()), style=style, scale=float(scale))


def hold(rotary: nn.Module, cosine: float, sine: float) -> None:
    """Make `rotary` give the same cosine and sine for every channel and position.

    With (1, 0) queries and keys come out as they went in: position, and a factor on cosine and sine (yarn, longrope),
    then belong to the `Rope` alone, which keeps partial rotary right: channels that do not rotate are not scaled
    either. With (0, 1) they come out turned by a quarter, which shows how channels are paired; see `style_of`.
    """
    forward, known = types.MethodType(type(rotary).forward, rotary), {}

    def held(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        key = x.dtype, layer_type
        if key not in known:
            cos, sin = forward(x, position_ids[..., :1], **({} if layer_type is None else {"layer_type": layer_type}))
            known[key] = torch.full_like(cos, cosine), torch.full_like(sin, sine)
        return known[key]

    vars(rotary)["forward"] = held


def style_of(raw: Tensor, turned: Tensor, pairs: int) -> Style | None:
    """How the channels of `raw` [..., D] pair up, given the same turned by a quarter; None if nothing rotates.

    Raises ValueError for a pairing that is neither of the two known ones.
    """
    if torch.equal(raw, turned):
        return None
    first, second = turned[..., :pairs], turned[..., pairs : 2 * pairs]
    if torch.equal(first, -raw[..., pairs : 2 * pairs]) and torch.equal(second, raw[..., :pairs]):
        return "half"
    even, odd = turned[..., 0 : 2 * pairs : 2], turned[..., 1 : 2 * pairs : 2]
    if torch.equal(even, -raw[..., 1 : 2 * pairs : 2]) and torch.equal(odd, raw[..., 0 : 2 * pairs : 2]):
        return "interleaved"
    raise ValueError("rotary pairs of channels are neither halves nor neighbours")
