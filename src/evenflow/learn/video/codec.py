"""Fit the tiny codec to the synthetic world: `python -m evenflow.learn.video.codec --out codec.safetensors`.

First the principal components of 4×4×4 blocks, in closed form; then the network that sharpens what they give, on L1
error, from latents with a little noise, as a generator's are never quite right.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from ...models.video.codec import TIME, TinyCodec, blocks, unblocked
from ...models.video.files import load_codec, save_codec
from .clips import as_frames, filmed


def components(codec: TinyCodec, frames: Tensor) -> list[float]:
    """Set mean, basis and scale from frames [n, 4·F, 3, H, W]; the share of variance that each component carries.

    The scale is between none and whitening: deviation^(−1/2), then all latents to unit variance on average.
    """
    x = blocks(frames).movedim(2, -1).reshape(-1, codec.basis.shape[1]).double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = values[: codec.channels]
    scale = kept.clamp_min(1e-8) ** -0.25
    scale /= (scale**2 * kept).mean().sqrt()
    codec.mean.copy_(mean)
    codec.basis.copy_(vectors[:, : codec.channels].T)
    codec.scale.copy_(scale)
    return [float(share) for share in kept / values.sum()]


def whole_groups(seed: int, latents: int) -> Tensor:
    """A film [4·latents, 3, H, W] whose first frame stands four times, as the codec takes it."""
    frames = as_frames(filmed(seed, latents).pixels)
    return torch.cat([frames[:1].expand(TIME - 1, -1, -1, -1), frames])


def decoded(codec: TinyCodec, z: Tensor) -> Tensor:
    """Frames [B, 4·F, 3, H, W] of latents [B, F, C, h, w], all at once; the first latent is its own predecessor."""
    before = torch.cat([z[:, :1], z[:, :-1]], 1)
    with torch.autocast("cpu", torch.bfloat16):
        made = codec.sharpened(z.flatten(0, 1), before.flatten(0, 1))
    return unblocked(made.float().unflatten(0, z.shape[:2]))


def main(
    out: Annotated[Path, typer.Option(help="Where the codec is written.")],
    minutes: Annotated[float, typer.Option(help="Minutes to train the network.", min=0)] = 10.0,
    fit: Annotated[int, typer.Option(help="Films to take components from.", min=4)] = 96,
    films: Annotated[int, typer.Option(help="Films to train on, of 12 latent frames.", min=4)] = 600,
    channels: Annotated[int, typer.Option(min=4, max=192)] = 24,
    noise: Annotated[float, typer.Option(help="Most deviation of the noise on latents.", min=0)] = 0.1,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(help="First seed of the films.")] = 1_000_000,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the components in --out, train the network on.")
    ] = False,
) -> None:
    """Fit the codec of the tiny video model."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    codec = load_codec(out) if resume else TinyCodec(channels)
    if not resume:
        shares = components(codec, torch.stack([whole_groups(seed + n, 12) for n in range(fit)]))
        typer.echo(f"variance kept: {sum(shares):.4f}")
        save_codec(codec, out)
    if not minutes:
        return
    codec.train()
    stock = [(whole_groups(seed + n, 12) * 127.5 + 127.5).round().byte() for n in range(films)]
    optimizer = torch.optim.AdamW(codec.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    start, step, smooth = time.perf_counter(), 0, 0.0
    with Progress() as progress, out.with_suffix(".jsonl").open("a") as curve:
        bar = progress.add_task("codec", total=1.0)
        while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50, 3 * (1 - done) + 0.02)
            chosen = torch.randint(films, (batch,)).tolist()
            at = int(torch.randint(9, (1,))) * TIME
            frames = torch.stack([stock[n][at : at + 4 * TIME] for n in chosen]).float() / 127.5 - 1
            with torch.no_grad():
                z = codec.project(blocks(frames))
                linear = unblocked(codec.linear(z))
                z = z + noise * torch.rand(batch, 1, 1, 1, 1) * torch.randn_like(z)
            error = (decoded(codec, z) - frames).abs().mean()
            error.backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            lost = error.item()
            smooth = lost if not step else 0.98 * smooth + 0.02 * lost
            step += 1
            plain = float((linear - frames).abs().mean())
            progress.update(bar, completed=done, description=f"step {step}  L1 {smooth:.4f} (linear {plain:.4f})")
            if step % 100 == 0:
                save_codec(codec, out)
                curve.write(json.dumps({"step": step, "l1": round(smooth, 5), "linear": round(plain, 5)}) + "\n")
                curve.flush()
    save_codec(codec, out)


if __name__ == "__main__":
    typer.run(main)
