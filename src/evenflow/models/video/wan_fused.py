"""Wan's decoder arranged for a GPU: the same weights and what they remember, in far fewer passes over memory.

As diffusers writes it, most of the time of a decode on a GPU goes into copies: padding before every convolution, norms
in six steps, and layouts turned for the kernels and back. Here channels lie last, convolutions pad themselves, and a
norm with its SiLU, or a residual sum with its bias, is one pass. Equal up to rounding; the plain arrangement stays the
one whose bits do not depend on how a stream is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from .wan_vae import WanCodec

LAST = torch.channels_last_3d
REMEMBERED = 2  # frames that a convolution over three of them keeps


def rms_silu(rows: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
    """SiLU of the RMS norm of rows [N, C], to which the bias of the convolution before is added first."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    x = rows.to(wide) if bias is None else rows.to(wide) + bias.to(wide)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    return fn.silu(x / size * (gamma.to(wide) * rows.shape[-1] ** 0.5)).to(rows.dtype)


def plus(rows: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """rows + bias + other, all [N, C] but bias [C]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(wide) + bias.to(wide) + other.to(wide)).to(rows.dtype)


def by_rows(over: Callable[..., Tensor], x: Tensor, *given: Any) -> Tensor:
    """`over` of x [B, C, T, H, W] as rows [N, C], and back; other tensors of that shape likewise."""
    given = tuple(_rows(one) if isinstance(one, Tensor) and one.ndim == 5 else one for one in given)
    first = x.movedim(1, -1)
    return over(_rows(x), *given).view(first.shape).movedim(-1, 1)


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] → [N, C], without a copy where channels lie last."""
    rows = x.movedim(1, -1).contiguous().flatten(0, -2)
    return rows.data  # which is no view: of a view's base, a compiler takes the shape for a constant


class Fused:
    """The two passes, compiled for any number of rows and channels; on a CPU they are left as they are."""

    def __init__(self, compiles: bool) -> None:
        self.rms_silu: Callable[..., Tensor] = torch.compile(rms_silu, dynamic=True) if compiles else rms_silu
        self.plus: Callable[..., Tensor] = torch.compile(plus, dynamic=True) if compiles else plus

    def normed(self, x: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
        # Parameters are detached, as a compiler takes the shape of one for a constant.
        return by_rows(self.rms_silu, x, bias if bias is None else bias.detach(), gamma.detach().flatten())

    def summed(self, x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        return by_rows(self.plus, x, bias.detach(), other)


def convolved(conv: nn.Conv3d, x: Tensor, slots: list[Any], at: list[int]) -> Tensor:
    """A causal convolution over three frames, without its bias; what it remembers is in `slots`, its number in `at`."""
    number = at[0]
    at[0] += 1
    before = slots[number]
    missing = REMEMBERED - (0 if before is None else before.shape[2])
    whole = x if before is None else torch.cat([before, x], 2)
    slots[number] = whole[:, :, -REMEMBERED:].clone()
    if missing:
        whole = fn.pad(whole, (0, 0, 0, 0, missing, 0))
    return fn.conv3d(whole, conv.weight, None, padding=(0, 1, 1))


class Residual(nn.Module):
    """A residual block with the weights of diffusers' one."""

    def __init__(self, block: Any, fused: Fused) -> None:
        super().__init__()
        self.block, self.fused = block, fused

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        block, fused = self.block, self.fused
        h = block.conv_shortcut(x)
        x = convolved(block.conv1, fused.normed(x, None, block.norm1.gamma), feat_cache, feat_idx)
        x = convolved(block.conv2, fused.normed(x, block.conv1.bias, block.norm2.gamma), feat_cache, feat_idx)
        return fused.summed(x, block.conv2.bias, h)


class Enlarged(nn.Module):
    """Twice the rows and columns, in the type that is there: every pixel four times needs no other."""

    def forward(self, x: Tensor) -> Tensor:
        return fn.interpolate(x, scale_factor=2.0, mode="nearest-exact").contiguous(memory_format=torch.channels_last)


class Ended(nn.Module):
    """The last norm with its SiLU, which diffusers then calls for nothing."""

    def __init__(self, norm: Any, fused: Fused) -> None:
        super().__init__()
        self.norm, self.fused = norm, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.normed(x, None, self.norm.gamma)


def compiles(codec: WanCodec) -> bool:
    """Whether compiling the passes pays: where one stays on the chip what several would move through its memory."""
    return codec.device.type == "cuda"


def fused(codec: WanCodec) -> WanCodec:
    """Rearrange the codec's decoder, in place; what a stream remembers of the old arrangement can be gone on with."""
    decoder = codec.vae.decoder
    passes = Fused(compiles(codec))
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=LAST)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    for part in (decoder.mid_block, *decoder.up_blocks):
        part.resnets = nn.ModuleList(Residual(block, passes) for block in part.resnets)
        for up in getattr(part, "upsamplers", None) or ():
            up.resample[0] = Enlarged()
    decoder.norm_out, decoder.nonlinearity = Ended(decoder.norm_out, passes), nn.Identity()
    return codec
