"""A world of one moving blob, small enough for a video network that is trained and aligned on one core in minutes.

Frames of 8×8 pixels are latents of one channel and one token each, chunks are 2 frames. A blob of its own brightness and
speed moves in one of four diagonal directions, the text, and bounces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...models.video import VideoConfig, VideoTransformer
from ...models.video.dense import Dense, chunk_causal
from .pretrain import shifted, started
from .run import grown, optimizers

SIZE, WINDOW = 8, 10  # pixels of a side; frames that a chunk sees, its own among them
BLOBS = VideoConfig(
    "blobs", dim=64, ffn_dim=256, heads=4, layers=3, in_channels=1, out_channels=1, patch=(1, SIZE, SIZE), text_dim=4,
    text_len=1, freq_dim=32, stride=(1, 1, 1), size=(SIZE, SIZE), chunk=2,
)  # fmt: skip


def drawn(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [count, frames, 1, 8, 8], 2·blob − 0.4, and their directions as texts [count, 1, 4]."""

    def even(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    which = torch.randint(4, (count,), generator=generator)
    angle = (which + 0.5) * (math.pi / 2) + even(-0.3, 0.3, count)
    way = even(0.3, 0.8, count, 1) * torch.stack([angle.sin(), angle.cos()], 1)
    at = even(0, 10, count, 1, 2) + torch.arange(frames)[:, None] * way[:, None]
    at = 1 + 5 - (at % 10 - 5).abs()  # bounces between 1 and 6
    pixels = torch.arange(SIZE)
    row, column = (torch.exp(-((pixels - at[..., axis, None]) ** 2) / (2 * 1.1**2)) for axis in (0, 1))
    blob = even(0.4, 1, count, 1, 1, 1) * row[..., :, None] * column[..., None, :]
    return (2 * blob - 0.4)[:, :, None], torch.eye(4)[which][:, None]


def reward(frames: Tensor) -> Tensor:
    """Mean peak brightness less 0.3 times the mean acceleration of the centroid, [...] of [..., F, 1, 8, 8]."""
    frames = frames[..., 0, :, :]
    mass, pixels = (frames + 0.4).clamp_min(0) + 1e-6, torch.arange(SIZE, dtype=frames.dtype)
    whole = mass.sum((-2, -1))
    centre = torch.stack([(mass.sum(-1) * pixels).sum(-1) / whole, (mass.sum(-2) * pixels).sum(-1) / whole], -1)
    return frames.amax((-2, -1)).mean(-1) - 0.3 * centre.diff(n=2, dim=-2).norm(dim=-1).mean(-1)


def train(
    steps: int = 1500, seed: int = 0, batch: int = 48, rate: float = 2e-3, frames: int = 16,
    progress: Callable[[int, int, float], None] | None = None,
) -> VideoTransformer:  # fmt: skip
    """A network that denoises each chunk behind clean ones (teacher forcing), by flow matching."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), VideoTransformer(BLOBS)
    started(model)
    clean, chunk = chunk_causal(frames, BLOBS.chunk, window=WINDOW), torch.arange(frames) // BLOBS.chunk
    own = chunk[:, None] == chunk
    sees = torch.cat([torch.cat([clean, own & False], 1), torch.cat([clean & ~own, own], 1)])
    attend = Dense(model.rope, BLOBS.head_dim, torch.arange(frames).repeat(2), 1, 1, sees)
    made = optimizers(model, rate)
    for step in range(steps):
        x, text = drawn(batch, frames, generator)
        said = text * (torch.rand(batch, 1, 1, generator=generator) > 0.1)
        sigma = shifted(torch.rand(batch, frames // BLOBS.chunk, generator=generator), 3.0)
        sigma = sigma.repeat_interleave(BLOBS.chunk, 1)
        noise, wide = torch.randn(x.shape, generator=generator), sigma[..., None, None, None]
        past = x + 0.05 * (step % 2) * torch.randn(x.shape, generator=generator)
        velocity = model(
            torch.cat([past, (1 - wide) * x + wide * noise], 1), 1000 * torch.cat([0 * sigma, sigma], 1),
            model.read(said), attend,
        )[:, frames:]  # fmt: skip
        loss = (velocity - (noise - x)).square().mean()
        loss.backward()
        now = rate * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in made:
            grown(optimizer, list(model.parameters()), now)
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
    return model.eval()
