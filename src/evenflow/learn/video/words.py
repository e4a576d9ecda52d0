"""Teach the tiny text encoder to read before a video model learns to draw: `python -m evenflow.learn.video.words --out FILE`.

At every noun of a description of a scene it tells that thing's colour, shape, size and motion, and at every word the place,
the light and the camera. What hangs together in a sentence then stands together in one embedding when a video model,
whose steps cost ten times as much, begins to attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as fn

from ...models.video import PRESETS
from ...models.video.files import save_words
from ...models.video.words import Words, split
from ...world import CAMERAS, COLOURS, LIGHTS, MOTIONS, PLACES, SHAPES, SIZES, VOCABULARY, Scene, describe, draw_scene
from .clips import VARIETY
from .run import Average, Run

OF_THINGS: dict[str, Sequence[str]] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "motion": MOTIONS,
}  # fmt: skip
OF_SCENES: dict[str, Sequence[str]] = {"place": PLACES, "light": LIGHTS, "camera": CAMERAS}


def nouns(text: str, length: int) -> list[int]:
    """Where a description names its things: places of shapes among its words."""
    return [n for n, word in enumerate(split(text)[:length]) if word in SHAPES]


class Reader(nn.Module):
    """What an embedding tells, by linear maps that are thrown away after training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = {name: len(words) for name, words in (OF_THINGS | OF_SCENES).items()}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in sizes.items()})

    def loss(self, embeddings: Tensor, texts: Sequence[str], scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
        """Cross entropy of embeddings [B, length, dim], and the share of what was told right about things."""
        places = [(row, n) for row, text in enumerate(texts) for n in nouns(text, embeddings.shape[1])]
        things = [thing for scene in scenes for thing in scene.things]
        at = embeddings[tuple(torch.tensor(places).T)]
        everywhere = embeddings.flatten(0, 1)[(filled := embeddings.abs().sum(-1) > 0).flatten()]
        owner = torch.arange(len(scenes))[:, None].expand(filled.shape)[filled]
        total, right = at.new_zeros(()), []
        for name, words in OF_THINGS.items():
            wanted = torch.tensor([words.index(getattr(thing, name)) for thing in things])
            said = self.heads[name](at)
            total = total + fn.cross_entropy(said, wanted)
            right.append((said.argmax(-1) == wanted).float().mean())
        for name, words in OF_SCENES.items():
            wanted = torch.tensor([words.index(getattr(scene, name)) for scene in scenes])[owner]
            total = total + 0.5 * fn.cross_entropy(self.heads[name](everywhere), wanted)
        return total, torch.stack(right).mean()


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, curve and words.safetensors.")],
    minutes: Annotated[float, typer.Option(help="Minutes to train.", min=0)] = 3.0,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Teach the tiny text encoder to read descriptions of the world."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    config, random = PRESETS["tiny"], np.random.default_rng(seed)
    words = Words(sorted(VOCABULARY), config.text_dim, config.text_len)
    reader, variety = Reader(config.text_dim), replace(VARIETY, things=(1, 3))
    parameters = [*words.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = Average(words, 0.99)
    run = Run(out, minutes, {"words": words, "reader": reader}, {"all": optimizer}, {"words": average})
    for figures in run.steps("words", every=200):
        scenes = [draw_scene(random, variety) for _ in range(batch)]
        texts = [describe(scene, seed=int(random.integers(1 << 30))) for scene in scenes]
        loss, right = reader.loss(words.encode(texts), texts, scenes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = run.rate(rate)
        optimizer.step()
        optimizer.zero_grad()
        average.update(words)
        figures.update(loss=float(loss), right=float(right))
    average.into(words)
    save_words(words, out / "words.safetensors")


if __name__ == "__main__":
    typer.run(main)
