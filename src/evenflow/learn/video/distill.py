"""Few-step distillation on the model's own roll-outs: `python -m evenflow.learn.video.distill --teacher FOLDER --clips FOLDER`.

Self Forcing, arXiv 2506.08009, section on training: the generator rolls out chunk by chunk with its cache, as it does
when it streams; of the calls of a chunk one, drawn for the whole clip, carries gradient, and its x0 is the chunk. The
loss matches distributions (DMD): a frozen teacher and a critic, which learns to denoise what the generator makes, see
the clip whole, and their difference is the gradient. With --length above one clip the cache goes on from clip to clip
(streaming long tuning of LongLive, arXiv 2509.22622), and prompts change on the way; give it the critic of the run before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from ...models.video import Text, VideoConfig, VideoTransformer
from ...models.video.files import load_transformer, load_words, save_transformer, save_words
from ...models.video.transformer import compiled
from ...models.video.words import Words
from ...world import describe, draw_scene, next_scene
from .attention import Clip, Rollout
from .clips import CHUNK, VARIETY, Shards, conditions
from .pretrain import shifted
from .run import Average, Run, best_device, grown, joined, shared


def warped(steps: tuple[int, ...], shift: float) -> list[float]:
    """Noise levels of nominal times (1000 is noise)."""
    return [float(shifted(torch.tensor(step / 1000), shift)) for step in steps]


@dataclass
class Sequence:
    """Streams being rolled out, one a row: their cache, prompts of the chunks to come, and tracks of these."""

    cache: Rollout
    prompts: list[list[str]]  # of each row, one a chunk
    tracks: Tensor  # condition channels [B, F, C, h, w] of the chunks to come; those behind its end have none
    at: int = 0  # chunks rolled out
    texts: dict[str, int] = field(default_factory=dict)


def blank(config: VideoConfig, batch: int, frames: int, device: torch.device | str = "cpu") -> Tensor:
    """Condition channels that say nothing, [batch, frames, C, h, w]."""
    return torch.zeros(batch, frames, config.in_channels - config.out_channels, *config.latent_size(), device=device)


def grid(config: VideoConfig) -> tuple[int, int]:
    """Rows and columns of the tokens of a frame."""
    height, width = config.latent_size()
    return height // config.patch[1], width // config.patch[2]


def fresh(
    model: VideoTransformer, random: np.random.Generator, stock: Shards | None, batch: int, chunks: int, window: int
) -> Sequence:
    """New streams of `chunks` chunks: prompts and tracks of clips from the stock, or scenes that change on the way."""
    config, device = model.config, model.head.head.weight.device
    cache = Rollout(model.rope, config.head_dim, *grid(config), sink=CHUNK, window=window, device=device)
    if stock is not None:
        clips = stock.draw(random, batch)
        prompts = [[clips.texts[n] for n in row] for row in clips.prompts.tolist()]
        tracks = conditions(random, clips.tracks, drop=0.6)
        return Sequence(cache, [row + row[-1:] * (chunks - len(row)) for row in prompts], tracks)
    prompts = []
    for _ in range(batch):
        scene = draw_scene(random, VARIETY)
        row: list[str] = []
        while len(row) < chunks:
            row += [describe(scene, seed=int(random.integers(1 << 30)))] * int(random.integers(3, 9))
            scene = next_scene(random, scene, VARIETY)
        prompts.append(row[:chunks])
    return Sequence(cache, prompts, blank(config, batch, 0, device))


def texts_of(words: Words, prompts: list[list[str]]) -> Tensor:
    """Embeddings [B, chunks, L, dim] of prompts, each different one encoded once."""
    numbers: dict[str, int] = {}
    said = torch.tensor([[numbers.setdefault(text, len(numbers)) for text in row] for row in prompts])
    return words.encode(list(numbers))[said]


def roll(
    model: VideoTransformer, words: Words, streams: Sequence, chunks: int, exit_step: int, sigmas: list[float],
    graded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`chunks` more chunks of every stream: x0 [B, F, C, H, W], texts [B, chunks, L, dim] and conditions of them.

    Calls before `exit_step` and the clean pass carry no gradient; neither does anything where `graded` is False.
    """
    config, batch, made, given = model.config, len(streams.prompts), [], []
    device = streams.tracks.device
    embedded = texts_of(words, [row[streams.at : streams.at + chunks] for row in streams.prompts]).detach()
    for n in range(chunks):
        first = (streams.at + n) * CHUNK
        tracks = streams.tracks[:, first : first + CHUNK]
        if tracks.shape[1] < CHUNK:
            tracks = blank(model.config, batch, CHUNK, device)
        text = model.read(embedded[:, n])
        streams.cache.room(CHUNK)
        x = torch.randn(batch, CHUNK, config.out_channels, *config.latent_size(), device=device)
        for step in range(exit_step + 1):
            with torch.set_grad_enabled(graded and step == exit_step), torch.autocast(device.type, torch.bfloat16):
                x0 = called(model, x, sigmas[step], tracks, text, streams.cache, keep=False)
            if step < exit_step:
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * torch.randn_like(x0)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            called(model, x0.detach(), 0.0, tracks, text, streams.cache, keep=True)
        made.append(x0)
        given.append(tracks)
    streams.at += chunks
    return torch.cat(made, 1), embedded, torch.cat(given, 1)


def called(
    model: VideoTransformer, x: Tensor, sigma: float, tracks: Tensor, text: Text, cache: Rollout, keep: bool
) -> Tensor:
    """x0 of one call on the frames of a chunk."""
    times = torch.full(x.shape[:2], 1000 * sigma, device=x.device)
    velocity = model(torch.cat([x, tracks], 2), times, text, cache.call(x.shape[1], keep))
    return x - sigma * velocity.float()


def seen_whole(model: VideoTransformer, x: Tensor, sigma: Tensor, tracks: Tensor, text: Tensor) -> Tensor:
    """x0 of clips that see themselves both ways, one noise level a row; text [B, G, L, dim], one a chunk."""
    attend = Clip(model.rope, model.config.head_dim, torch.arange(x.shape[1]), *grid(model.config), None, x.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        velocity = model(
            torch.cat([x, tracks], 2), 1000 * sigma[:, None].expand(x.shape[:2]), model.read(text.flatten(0, 1)), attend
        )
    return x - sigma[:, None, None, None, None] * velocity.float()


def noised(x: Tensor, shift: float, low: float = 0.02, high: float = 0.98) -> tuple[Tensor, Tensor, Tensor]:
    """x at a random level, the same for all frames of a row; the levels [B]; the noise."""
    sigma = shifted(torch.rand(len(x), device=x.device), shift).clamp(low, high)
    noise = torch.randn_like(x)
    wide = sigma[:, None, None, None, None]
    return (1 - wide) * x + wide * noise, sigma, noise


def matched(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The loss whose gradient with respect to x is (fake − real) / mean|x − real|: DMD, with x0-predictions."""
    with torch.no_grad():
        size = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = ((fake - real) / size).nan_to_num()
        target = (x - gradient).double()
    return 0.5 * (x.double() - target).square().mean()


@dataclass
class Distillation:
    """Generator, teacher and critic, and one step of each."""

    generator: VideoTransformer
    teacher: VideoTransformer
    critic: VideoTransformer
    words: Words
    guidance: float = 3.0

    def generator_loss(self, x: Tensor, tracks: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """How far clips [B, F, C, H, W] are from the teacher's, as its and the critic's predictions tell."""
        with torch.no_grad():
            noisy, sigma, _ = noised(x.detach(), self.generator.config.shift)
            fake = seen_whole(self.critic, noisy, sigma, tracks, text)
            said = seen_whole(self.teacher, noisy, sigma, tracks, text)
            unsaid = seen_whole(self.teacher, noisy, sigma, tracks, empty.expand_as(text))
            real = said + self.guidance * (said - unsaid)
        return matched(x, fake, real)

    def critic_loss(self, x: Tensor, tracks: Tensor, text: Tensor) -> Tensor:
        """Flow matching on what the generator made."""
        noisy, sigma, noise = noised(x, self.critic.config.shift)
        x0 = seen_whole(self.critic, noisy, sigma, tracks, text)
        velocity = (noisy - x0) / sigma[:, None, None, None, None]
        return (velocity - (noise - x)).square().mean()


def main(
    teacher: Annotated[Path, typer.Option(help="Folder of the model that is distilled.")],
    clips: Annotated[Path, typer.Option(help="Folder of shards, for prompts and tracks.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, curve and the model.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of a generator to start from (default: the teacher).")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0)] = 40.0,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Latent frames of a clip, a multiple of 3.", min=3)] = 12,
    length: Annotated[int, typer.Option(help="Latent frames of a roll-out; above --frames: long tuning.", min=3)] = 12,
    window: Annotated[int, typer.Option(help="Frames of the cache, 3 of them sinks.", min=6)] = 12,
    critic: Annotated[
        Path | None, typer.Option(help="Critic to go on with, critic.safetensors of a run (default: the teacher).")
    ] = None,
    rate: Annotated[float, typer.Option(help="Learning rate of the generator.")] = 1e-4,
    critic_rate: Annotated[float, typer.Option(help="Learning rate of the critic.")] = 2e-4,
    critic_updates: Annotated[int, typer.Option(help="Updates of the critic for each of the generator.", min=1)] = 3,
    guidance: Annotated[float, typer.Option(help="w of cond + w·(cond − uncond).")] = 1.0,
    average: Annotated[float, typer.Option(help="How much of the averaged weights stays at a step.")] = 0.97,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one).")] = None,
    resume: Annotated[bool, typer.Option("--resume")] = False,
) -> None:
    """Distil the tiny video model to few steps on its own roll-outs."""
    torch.set_num_threads(threads)
    rank, device = joined(), device or best_device()
    stock = Shards(clips, device)
    real = load_transformer(teacher / "transformer.safetensors").to(device)
    words = load_words(teacher / "words.safetensors").to(device)
    generator = copy.deepcopy(real) if base is None else load_transformer(base / "transformer.safetensors").to(device)
    judging = copy.deepcopy(real) if critic is None else load_transformer(critic).to(device)
    setup = Distillation(generator.train(), real.requires_grad_(False), judging.requires_grad_(True), words, guidance)
    if device != "cpu":
        for network in (generator, real, judging):
            compiled(network)
    optimizers = {
        "generator": torch.optim.AdamW(generator.parameters(), rate, betas=(0.0, 0.999), weight_decay=0.01),
        "critic": torch.optim.AdamW(setup.critic.parameters(), critic_rate, betas=(0.0, 0.999), weight_decay=0.01),
    }
    modules = {"generator": generator, "critic": setup.critic}
    run = Run(out, minutes, modules, optimizers, {"generator": Average(generator, average)})
    if resume:
        run.load()
    random = np.random.default_rng([seed, run.step, rank])
    torch.manual_seed(1000 * seed + 100 * run.step + rank)
    sigmas, streams, chunks = warped(generator.config.steps, generator.config.shift), None, frames // CHUNK
    with torch.no_grad():
        empty = words.encode([""])[:, None]
    for figures in run.steps("distill", every=50):
        if streams is None or (streams.at + chunks) * CHUNK > length:
            tracked = length == frames or random.random() < 0.5
            streams = fresh(generator, random, stock if tracked else None, batch, length // CHUNK, window)
        x, text, tracks = roll(generator, words, streams, chunks, int(random.integers(len(sigmas))), sigmas)
        loss = setup.generator_loss(x, tracks, text, empty)
        loss.backward()
        shared(generator.parameters())
        grown(optimizers["generator"], list(generator.parameters()), run.rate(rate, 20))
        run.averages["generator"].update(generator)
        for _ in range(critic_updates):
            error = setup.critic_loss(x.detach(), tracks, text)
            error.backward()
            shared(setup.critic.parameters())
            grown(optimizers["critic"], list(setup.critic.parameters()), run.rate(critic_rate, 20))
        figures.update(dmd=float(loss), critic=float(error), deviation=float(x.detach().std()))
        if run.first and run.step % 50 == 49:
            export(run, generator, words, out / "model")
    if run.first:
        export(run, generator, words, out / "model")
        save_transformer(setup.critic, out / "critic.safetensors")


def export(run: Run, generator: VideoTransformer, words: Words, folder: Path) -> None:
    """Write the averaged generator as the files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    twin = VideoTransformer(generator.config)
    run.averages["generator"].into(twin)
    save_transformer(twin, folder / "transformer.safetensors")
    save_words(words, folder / "words.safetensors")


if __name__ == "__main__":
    typer.run(main)
