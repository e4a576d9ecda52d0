"""Train the tiny video model from scratch on clips of the world: `python -m evenflow.learn.video.pretrain --clips FOLDER`.

Flow matching (velocity ε − x0 at x_σ = (1−σ)·x0 + σ·ε). In most steps a clip is causal, every chunk at a noise level of
its own, so that all of them learn from context of any noise (diffusion forcing; CausVid, arXiv 2412.07772), often with
clean context as in a stream. The others teach what rolling and buffered schedules and the teacher of distillation need:
clips that see themselves both ways, with levels that rise from front to back or are equal.

What a picture shows is learned from single latent frames (--frames 1), of which a batch holds a hundred where it holds
eight clips; a second run starts from that (--base) and learns how things move. `torchrun --nproc-per-node N -m
evenflow.learn.video.pretrain` shares the steps among N processes, each with a batch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as fn

from ...models.video import PRESETS, VideoConfig, VideoTransformer
from ...models.video.files import load_transformer, load_words, save_transformer, save_words
from ...models.video.transformer import compiled
from ...models.video.words import Words
from ...world import COLOURS, SHAPES, VOCABULARY
from .attention import Clip
from .clips import CHUNK, STRIDE, Clips, Shards, conditions
from .run import Average, Run, best_device, grown, joined, optimizers, shared

TOKEN, THING = 9.0, 15.0  # pixels from a thing's centre within which a token is called it, and its picture weighs more
DECIDED = 0.75  # the noise level below which it can be seen where things are
CAUSAL, RISING, EQUAL = "causal", "rising", "equal"


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of steps, and of what is left out. frames: latent frames of a training clip.

    things: how much more the loss weighs where a thing is; a small part of a picture, and what is looked at. named: how
    much telling the things in every token from the middle of the network weighs.
    """

    frames: int = 12
    rising: float = 0.12
    equal: float = 0.3
    clean: float = 0.5  # of causal steps: chunks before a random one are nearly clean
    sink: float = 0.3  # of steps: the first chunk of the clip before frames from later on
    no_text: float = 0.1
    no_tracks: float = 0.6
    things: float = 3.0
    named: float = 0.05


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise levels of even draws u in [0, 1], leaning towards noise."""
    return shift * u / (1 + (shift - 1) * u)


def levels(random: np.random.Generator, kind: str, batch: int, chunks: int, shift: float, clean: float) -> Tensor:
    """Noise levels of chunks, [batch, chunks]."""
    if kind == EQUAL:
        return shifted(torch.from_numpy(random.random((batch, 1))), shift).expand(-1, chunks).float()
    if kind == RISING:  # one draw in each of as many equal parts (StreamDiT, arXiv 2507.03745, section on training)
        u = (np.arange(chunks) + random.random((batch, chunks))) / chunks
        return shifted(torch.from_numpy(u), shift).float()
    sigma = shifted(torch.from_numpy(random.random((batch, chunks))), shift).float()
    for row in range(batch):
        if random.random() < clean:
            sigma[row, : random.integers(1, chunks)] = float(random.random() ** 2) * 0.2 * (random.random() < 0.7)
    return sigma


def cropped(random: np.random.Generator, clips: Clips, frames: int, sink: bool) -> tuple[Clips, Tensor]:
    """`frames` latent frames of every clip, at the same place, and where attention puts them, [frames]."""
    last, step = clips.latents.shape[1] - frames, min(frames, CHUNK)
    start = int(random.integers(last // step + 1)) * step
    if random.random() < 0.25:
        start = 0
    times = torch.arange(start, start + frames)
    if sink and frames > CHUNK:
        times[:CHUNK] = torch.arange(CHUNK)
    where = times if random.random() < 0.5 else torch.arange(frames)  # at their times, or as a buffer counts them
    pixels = (times[:, None] * STRIDE + torch.arange(STRIDE)).flatten()
    part = replace(
        clips,
        latents=clips.latents[:, times],
        prompts=clips.prompts[:, times[::CHUNK] // CHUNK],
        tracks=clips.tracks[:, pixels],
    )
    return part, where


def apart(tracks: Tensor, size: tuple[int, int], stride: tuple[int, int, int]) -> Tensor:
    """How far every cell of `size` is from every track, in pixels, at its nearest frame: [B, F, M, rows, columns].

    tracks: [B, time·F, M, 2]; stride: pixel frames, rows and columns of pixels of a cell. Infinite where there is none.
    """
    y, x = ((torch.arange(n, device=tracks.device) + 0.5) * s for n, s in zip(size, stride[1:], strict=True))
    points = tracks[..., None, None].nan_to_num(torch.inf)
    far = torch.hypot(points[..., 0, :, :] - x, points[..., 1, :, :] - y[:, None])
    return far.unflatten(1, (-1, stride[0])).amin(2)


class Named(nn.Module):
    """Tells the colour and shape of the thing in a token from the middle of the network; thrown away after training."""

    def __init__(self, transformer: VideoTransformer) -> None:
        super().__init__()
        self.colour = nn.Linear(transformer.config.dim, len(COLOURS) + 1)
        self.shape = nn.Linear(transformer.config.dim, len(SHAPES) + 1)
        middle = transformer.blocks[len(transformer.blocks) // 2]
        middle.register_forward_hook(self.seen)
        self.tokens = torch.empty(0)

    def seen(self, block: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        self.tokens = out

    def loss(self, far: Tensor, kinds: Tensor, known: Tensor) -> Tensor:
        """Cross entropy. far: `apart` of tokens; kinds [B, M, 2]; known: bool [B], rows whose kinds are right."""
        nearest = far.min(2)
        total = self.tokens.new_zeros((), dtype=torch.float32)
        for head, number in ((self.colour, 0), (self.shape, 1)):
            kind = kinds[..., number][:, None, :, None, None].expand(far.shape).gather(2, nearest.indices[:, :, None])
            label = torch.where(nearest.values < TOKEN, kind[:, :, 0] + 1, 0).flatten(1)
            told = fn.cross_entropy(head(self.tokens).float().transpose(1, 2), label, reduction="none")
            total = total + (told.mean(1) * known).sum() / known.sum().clamp_min(1)
        return total


class Pretraining:
    """The model, and one step of its training."""

    def __init__(self, config: VideoConfig, mix: Mix, seed: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.config, self.mix, self.device = config, mix, torch.device(device)
        self.words = Words(sorted(VOCABULARY), config.text_dim, config.text_len)
        self.transformer = VideoTransformer(config)
        started(self.transformer)
        self.named = Named(self.transformer)
        for module in (self.words, self.transformer, self.named):
            module.to(device)
        self.random = np.random.default_rng(seed)
        self.texts: list[str] = []  # of the stock, and the numbers of their words
        self.numbers = torch.empty(0, config.text_len, dtype=torch.int64, device=self.device)
        self.attends: dict[tuple[int, ...], Clip] = {}

    def told(self, clips: Clips, rows: Tensor) -> Tensor:
        """Embeddings [n, length, dim] of the texts with these numbers; each is split into words once."""
        if self.texts is not clips.texts:
            self.texts, self.numbers = clips.texts, self.numbers[:0]
        new = clips.texts[len(self.numbers) :]
        if new:
            self.numbers = torch.cat([self.numbers, self.words.numbers(new).to(self.device)])
        nothing = torch.zeros_like(self.numbers[:1])
        return self.words(torch.cat([self.numbers[rows.to(self.device)], nothing]))

    def attend(self, times: Tensor, height: int, width: int, chunk: int | None) -> Clip:
        """Attention of clips whose frames stand at `times`; angles are made once."""
        key = (*times.tolist(), height, width, chunk or 0)
        if key not in self.attends:
            rope, head_dim = self.transformer.rope, self.config.head_dim
            self.attends[key] = Clip(rope, head_dim, times, height, width, chunk, self.device)
        return self.attends[key]

    def loss(self, clips: Clips) -> dict[str, Tensor]:
        """Mean squared error of the velocity on one batch, and by kind of step."""
        random, mix, config = self.random, self.mix, self.config
        kind = random.choice([RISING, EQUAL, CAUSAL], p=[mix.rising, mix.equal, 1 - mix.rising - mix.equal])
        if mix.frames <= CHUNK:
            kind = EQUAL
        part, times = cropped(random, clips, mix.frames, random.random() < mix.sink)
        x0 = part.latents.to(self.device).float()
        batch, frames = x0.shape[:2]
        chunk = min(frames, CHUNK)
        sigma = levels(random, kind, batch, frames // chunk, config.shift, mix.clean).repeat_interleave(chunk, 1)
        sigma = sigma.to(self.device)
        noise = torch.randn_like(x0)
        wide = sigma[:, :, None, None, None]
        x = torch.cat([(1 - wide) * x0 + wide * noise, conditions(random, part.tracks, mix.no_tracks)], 2)
        different, said = part.prompts.unique(return_inverse=True)
        said[torch.from_numpy(random.random(batch) < mix.no_text)] = len(different)
        height, width = x.shape[-2] // config.patch[1], x.shape[-1] // config.patch[2]
        token = (config.stride[0], config.stride[1] * config.patch[1], config.stride[2] * config.patch[2])
        attend = self.attend(times, height, width, CHUNK if kind == CAUSAL else None)
        with torch.autocast(self.device.type, torch.bfloat16):
            text = self.transformer.read(self.told(part, different)[said.flatten().to(self.device)])
            velocity = self.transformer(x, 1000 * sigma, text, attend).float()
            one = (part.prompts == part.prompts[:, :1]).all(1).to(self.device)
            named = self.named.loss(apart(part.tracks, (height, width), token), part.kinds, one)
        error = (velocity - (noise - x0)).square().mean(2)
        near = apart(part.tracks, (x0.shape[-2], x0.shape[-1]), config.stride).amin(2) < THING
        near &= (sigma < DECIDED)[:, :, None, None]  # above, where things are is open: weights would make more of them
        counted = (sigma > 0.02).float()[:, :, None, None]  # clean context is there to be read
        loss, weighed = (
            (error * w).sum() / (counted.expand_as(error).sum().clamp_min(1))
            for w in (counted, counted * (1 + (mix.things - 1) * near))
        )
        figures = {"loss": loss, "named": named, str(kind): loss}
        return {"total": weighed + mix.named * named} | {name: value.detach() for name, value in figures.items()}


def started(transformer: VideoTransformer) -> None:
    """Weights to start from: blocks that do nothing yet, as gates begin at zero, and a head that says nothing."""
    nn.init.zeros_(transformer.head.head.weight)
    nn.init.zeros_(transformer.head.head.bias)
    projection = transformer.time_projection[1]
    assert isinstance(projection, nn.Linear)
    nn.init.normal_(projection.weight, std=0.02)
    nn.init.zeros_(projection.bias)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith("blocks.") and name.endswith("modulation"):
                parameter.zero_()
                parameter[:, (2, 5)] = 0.3  # gates


def export(run: Run, config: VideoConfig, words: Words, transformer: VideoTransformer, folder: Path) -> None:
    """Write the averaged weights as the files of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    twin, read = VideoTransformer(config), Words(words.vocabulary, config.text_dim, config.text_len)
    run.averages["transformer"].into(twin)
    run.averages["words"].into(read)
    save_transformer(twin, folder / "transformer.safetensors")
    save_words(read, folder / "words.safetensors")


def main(
    clips: Annotated[Path, typer.Option(help="Folder of shards that evenflow.learn.video.clips made.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, curve and the model.")],
    words: Annotated[
        Path | None, typer.Option(help="Words that can read already, of evenflow.learn.video.words.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of a model to start from.")] = None,
    frames: Annotated[int, typer.Option(help="Latent frames of a clip: 1, or a multiple of 3.", min=1)] = 12,
    minutes: Annotated[float, typer.Option(help="Minutes to train.", min=0)] = 90.0,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    average: Annotated[float, typer.Option(help="How much of the averaged weights stays at a step.")] = 0.998,
    untracked: Annotated[float, typer.Option(help="Share of clips whose tracks are not told.")] = 0.6,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train the tiny video model by flow matching."""
    torch.set_num_threads(threads)
    rank, device = joined(), device or best_device()
    stock, config = Shards(clips, device), PRESETS["tiny"]
    training = Pretraining(config, Mix(frames=frames, no_tracks=untracked), seed, device)
    if device != "cpu":
        compiled(training.transformer)
    if words is not None:
        training.words.load_state_dict(load_words(words).state_dict())
    if base is not None:
        training.transformer.load_state_dict(load_transformer(base / "transformer.safetensors").state_dict())
        training.words.load_state_dict(load_words(base / "words.safetensors").state_dict())
    modules = {"transformer": training.transformer, "words": training.words, "named": training.named}
    each = {name: optimizers(module, rate) for name, module in modules.items()}
    named = {f"{name}.{n}": o for name, many in each.items() for n, o in enumerate(many)}
    averages = {name: Average(modules[name], average) for name in ("transformer", "words")}
    run = Run(out, minutes, modules, named, averages)
    if resume:
        run.load()
    training.random = np.random.default_rng([seed, run.step, rank])
    torch.manual_seed(1000 * seed + 100 * run.step + rank)
    parameters = [p for module in modules.values() for p in module.parameters()]
    for figures in run.steps("pretrain", every=100):
        if run.step % 100 == 0:
            stock.refresh()
        losses = training.loss(stock.draw(training.random, batch))
        losses["total"].backward()
        shared(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in named.values():
            grown(optimizer, [], run.rate(rate))
        for name, slow in averages.items():
            slow.update(modules[name])
        figures.update({name: float(value.detach()) for name, value in losses.items()})
        if run.first and run.step % 500 == 499:
            export(run, config, training.words, training.transformer, out / "model")
    if run.first:
        export(run, config, training.words, training.transformer, out / "model")


if __name__ == "__main__":
    typer.run(main)
