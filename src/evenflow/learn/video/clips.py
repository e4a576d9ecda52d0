"""Clips of the synthetic world as a video model is trained on them: latents, prompts of every chunk, tracks.

`python -m evenflow.learn.video.clips --out FOLDER --codec FILE` films them once, in shards that training reads while
more are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track as shown
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...models.video import PRESETS
from ...models.video.codec import TinyCodec
from ...models.video.files import load_codec
from ...models.video.tracks import canvas
from ...world import COLOURS, LIGHTS, SHAPES, VARIETIES, Film, Variety, film

TINY = PRESETS["tiny"]
CHUNK, STRIDE = TINY.chunk, TINY.stride[0]
PARTS = ("latents", "prompts", "tracks", "kinds")  # of a shard
# What the tiny model is to know: one or two plain things that are big enough to have a shape in 64 × 64 pixels, no weather.
VARIETY = replace(VARIETIES["easy"], shapes=("circle", "square", "triangle", "star", "ring"), lights=LIGHTS)


def pixel_frames(latents: int) -> int:
    """Pixel frames that make so many latent frames from the start of a stream."""
    return STRIDE * (latents - 1) + 1


def first_pixel(latent: int) -> int:
    """The first pixel frame of a latent frame."""
    return max(0, STRIDE * (latent - 1) + 1)


def filmed(seed: int, latents: int, variety: Variety = VARIETY) -> Film:
    """A film of the world as long as `latents` latent frames; prompts change with a chunk, at random about every 20th."""
    random = np.random.default_rng([seed, 7])
    chunks = range(2, latents // CHUNK)
    changes, last = [], 0
    for chunk in chunks:
        if chunk - last >= 3 and random.random() < 0.25:
            changes.append(first_pixel(chunk * CHUNK))
            last = chunk
    return film(seed, frames=pixel_frames(latents), changes=changes, variety=variety, truth=False)


def as_frames(pixels: np.ndarray) -> Tensor:
    """uint8 [n, H, W, 3] → float32 [n, 3, H, W] in [−1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips of one length: latents float16 [N, L, C, h, w]; prompts of every chunk, numbers [N, L/3] into `texts`;
    tracks in pixels float32 [N, 4·L, M, 2] (nan: not visible); the first latent's tracks stand four times; kinds: colour
    and shape of every track at the end, numbers int64 [N, M, 2], −1 where there is none."""

    latents: Tensor
    prompts: Tensor
    tracks: Tensor
    kinds: Tensor
    texts: list[str]


def coded(films: Sequence[Film], codec: TinyCodec, most: int = 4) -> Clips:
    """Films as clips. most: tracks that are kept of each."""
    texts: dict[str, int] = {}
    latents, prompts, tracks, kinds = [], [], [], []
    for made in films:
        z, _ = codec.encode(as_frames(made.pixels)[None])
        latents.append(z[0].half())
        said = [(start, texts.setdefault(text, len(texts))) for start, text, *_ in made.prompts]
        firsts = [first_pixel(chunk * CHUNK) for chunk in range(z.shape[1] // CHUNK)]
        prompts.append(torch.tensor([[n for start, n in said if start <= first][-1] for first in firsts]))
        points = np.where(made.visibility[..., None] > 0.3, made.tracks, np.nan)[:, :most]
        points = np.pad(points, ((STRIDE - 1, 0), (0, most - points.shape[1]), (0, 0)), constant_values=np.nan)
        points[: STRIDE - 1] = points[STRIDE - 1]
        tracks.append(torch.from_numpy(points.astype(np.float32)))
        kind = [(list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)) for thing in made.things[:most]]
        kinds.append(torch.tensor(kind + [(-1, -1)] * (most - len(kind))))
    return Clips(torch.stack(latents), torch.stack(prompts), torch.stack(tracks), torch.stack(kinds), list(texts))


class Shards:
    """Clips in files of a folder, which may become more while they are read; held on `device`, prompts on the CPU."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.held: dict[str, Clips] = {}
        self.texts: list[str] = []  # of all clips, each once; their prompts are numbers into it
        self._number: dict[str, int] = {}
        self.refresh()
        if not self.held:
            raise ValueError(f"{folder} holds no shards (*.safetensors); make some with evenflow.learn.video.clips")

    def refresh(self) -> None:
        """Take in shards that are new."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.held:
                with safe_open(path, "pt") as file:
                    texts = json.loads(file.metadata()["texts"])
                    latents, prompts, tracks, kinds = (file.get_tensor(name) for name in PARTS)
                numbers = torch.tensor([self._number.setdefault(text, len(self._number)) for text in texts])
                self.texts += list(self._number)[len(self.texts) :]
                latents, tracks, kinds = (x.to(self.device) for x in (latents, tracks, kinds))
                self.held[path.name] = Clips(latents, numbers[prompts], tracks, kinds, self.texts)

    def __len__(self) -> int:
        return sum(len(clips.latents) for clips in self.held.values())

    @property
    def length(self) -> int:
        """Latent frames of a clip."""
        return next(iter(self.held.values())).latents.shape[1]

    def draw(self, random: np.random.Generator, batch: int, files: int = 8) -> Clips:
        """`batch` clips at random, from a few files."""
        held = list(self.held.values())
        sizes = np.array([len(clips.latents) for clips in held])
        chosen = random.choice(len(held), size=min(files, batch), p=sizes / sizes.sum())
        drawn = []
        for which, count in zip(chosen, np.bincount(np.arange(batch) % len(chosen)), strict=True):
            rows = torch.from_numpy(random.integers(sizes[which], size=count))
            there = rows.to(self.device)
            clips = held[which]
            drawn.append((clips.latents[there], clips.prompts[rows], clips.tracks[there], clips.kinds[there]))
        latents, prompts, tracks, kinds = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return Clips(latents, prompts, tracks, kinds, self.texts)


def conditions(random: np.random.Generator, tracks: Tensor, drop: float = 0.5) -> Tensor:
    """Track channels [B, F, C, h, w] of tracks [B, 4·F, M, 2]: of some things only, under random names, or of none.

    A frame in five is left blank too, so that blank can mean "not said" (MotionStream, section on mid-frame masking).
    """
    batch, frames, most = tracks.shape[:3]
    told = (random.random((batch, 1, 1)) >= drop) & (random.random((batch, 1, most)) < 0.7)
    told = told & (random.random((batch, frames, 1)) >= 0.2)
    ids = torch.from_numpy(random.integers(0, 1000, (batch, most))).to(tracks.device)
    visible = ~tracks[..., 0].isnan() & torch.from_numpy(told).to(tracks.device)
    return canvas(tracks.nan_to_num(), visible, ids, TINY.latent_size(), TINY.stride)


def seeds(first: int, count: int, size: int) -> Iterator[range]:
    """Ranges of seeds, `size` each."""
    for start in range(first, first + count, size):
        yield range(start, min(start + size, first + count))


def main(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    codec: Annotated[Path, typer.Option(help="The codec that makes latents (codec.safetensors).")],
    count: Annotated[int, typer.Option(help="Number of clips.", min=1)] = 4096,
    latents: Annotated[int, typer.Option(help="Latent frames of a clip, a multiple of 3.", min=6)] = 24,
    shard: Annotated[int, typer.Option(help="Clips of a file.", min=1)] = 128,
    first: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Film clips of the synthetic world to train on."""
    torch.set_num_threads(1)
    coder = load_codec(codec)
    out.mkdir(parents=True, exist_ok=True)
    for some in shown(list(seeds(first, count, shard)), description="filming"):
        path = out / f"{some.start:08d}.safetensors"
        if path.exists():
            continue
        clips = coded([filmed(seed, latents) for seed in some], coder)
        parts = {name: getattr(clips, name) for name in PARTS}
        save_file(parts, path.with_suffix(".part"), {"texts": json.dumps(clips.texts)})
        path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    typer.run(main)
