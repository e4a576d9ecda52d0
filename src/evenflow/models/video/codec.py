"""The tiny model's codec: principal components of blocks of pixels, and a small network that makes the picture sharp.

One latent frame stands for 4 pixel frames, one latent pixel for 4 × 4 of theirs; as with Wan's autoencoder the first
latent of a stream stands for one frame (it is coded as if it had been there before). Encoding is linear. Decoding adds
to the linear picture what a convolutional network, which also sees the latent before, makes of it. Latents are coded
one after another, so the result is the same bits however a stream is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

TIME, SIDE = 4, 4  # pixel frames, and rows and columns of pixels, of a latent
PATCH = 3 * TIME * SIDE * SIDE


def blocks(frames: Tensor) -> Tensor:
    """Frames [B, 4·F, 3, H, W] as blocks [B, F, 192, H/4, W/4]."""
    cut = frames.unflatten(1, (-1, TIME)).unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE))
    return cut.permute(0, 1, 2, 3, 5, 7, 4, 6).flatten(2, 5)  # [B, F, T, 3, y, x, h, w]


def unblocked(x: Tensor) -> Tensor:
    """The other way: [B, F, 192, h, w] → [B, 4·F, 3, 4h, 4w]."""
    cut = x.unflatten(2, (TIME, 3, SIDE, SIDE)).permute(0, 1, 2, 3, 6, 4, 7, 5)
    return cut.flatten(-2).flatten(-3, -2).flatten(1, 2)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(fn.silu(self.first(fn.silu(x))))


@dataclass(frozen=True)
class CodecState:
    """Where a stream stands: frames that do not make a latent yet [B, n < 4, 3, H, W], or the last latent decoded."""

    waiting: Tensor | None = None
    before: Tensor | None = None


class TinyCodec(nn.Module):
    """channels: components kept of a block's 192 numbers; width, depth: of the network that sharpens."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, channels: int = 24, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.zeros(PATCH))
        self.register_buffer("basis", torch.eye(PATCH)[:channels].contiguous())  # [channels, 192], orthonormal rows
        self.register_buffer("scale", torch.ones(channels))  # of a component, so that latents are of about unit size
        self.enter = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.leave = nn.Conv2d(width, PATCH, 3, padding=1)
        with torch.no_grad():
            for parameter in self.leave.parameters():
                parameter.zero_()

    def project(self, x: Tensor) -> Tensor:
        """Blocks [B, F, 192, h, w] → latents [B, F, channels, h, w]."""
        return torch.einsum("cp,bfphw->bfchw", self.basis, x - self.mean[:, None, None]) * self.scale[:, None, None]

    def linear(self, z: Tensor) -> Tensor:
        """Latents → blocks, without the network."""
        return torch.einsum("cp,bfchw->bfphw", self.basis, z / self.scale[:, None, None]) + self.mean[:, None, None]

    def sharpened(self, z: Tensor, before: Tensor) -> Tensor:
        """Blocks of latents [n, channels, h, w], each beside the one before it."""
        return self.linear(z[:, None])[:, 0] + self.leave(fn.silu(self.body(self.enter(torch.cat([z, before], 1)))))

    @torch.no_grad()
    def encode(self, frames: Tensor, state: CodecState | None = None) -> tuple[Tensor, CodecState]:
        """Frames [B, n, 3, H, W] in [−1, 1] → latents [B, F, channels, H/4, W/4] of all groups of 4 that are complete.

        Both ways the codec works in the type of its weights.

        state: what the call before gave; None starts a stream, whose first frame alone makes a latent.
        """
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[-1] % SIDE or frames.shape[-2] % SIDE:
            raise ValueError(
                f"frames are {tuple(frames.shape)}; expected [B, n, 3, H, W] with H and W multiples of {SIDE}"
            )
        frames = frames.to(self.basis.dtype)
        if state is None:
            frames = torch.cat([frames[:, :1].expand(-1, TIME - 1, -1, -1, -1), frames], 1)
        elif state.waiting is not None:
            frames = torch.cat([state.waiting, frames], 1)
        whole = frames.shape[1] // TIME * TIME
        each = [self.project(blocks(group)) for group in frames[:, :whole].split(TIME, 1) if group.shape[1]]
        height, width = frames.shape[-2] // SIDE, frames.shape[-1] // SIDE
        latents = torch.cat(each, 1) if each else frames.new_zeros(len(frames), 0, self.channels, height, width)
        return latents, CodecState(waiting=frames[:, whole:].clone())

    @torch.no_grad()
    def decode(self, latents: Tensor, state: CodecState | None = None) -> tuple[Tensor, CodecState]:
        """Latents [B, F, channels, h, w] → frames [B, 4·F, 3, 4h, 4w] in [−1, 1]; 3 fewer where a stream starts."""
        if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != self.channels:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected [B, F ≥ 1, {self.channels}, h, w]")
        latents = latents.to(self.basis.dtype)
        before, frames = None if state is None else state.before, []
        for latent in latents.unbind(1):
            made = self.sharpened(latent, latent if before is None else before)
            frames.append(unblocked(made[:, None])[:, TIME - 1 if before is None else 0 :])
            before = latent
        return torch.cat(frames, 1).clamp(-1, 1), CodecState(before=before)
