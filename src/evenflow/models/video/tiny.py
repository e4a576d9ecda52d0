"""The shipped video model: a transformer, a codec and words that were trained on the synthetic world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import PRESETS
from .files import load_codec, load_transformer, load_words
from .model import VideoModel
from .words import Words

FILES = ("transformer.safetensors", "codec.safetensors", "words.safetensors")


@dataclass(frozen=True, eq=False)
class Reader:
    """Prompts → embeddings, by a closed vocabulary; `unknown` tells which words of a prompt it has to skip."""

    words: Words

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return self.words.encode(prompts)

    def unknown(self, prompt: str) -> list[str]:
        return self.words.unknown(prompt)


def tiny_video_path() -> Path:
    """The folder of the shipped video model."""
    return Path(__file__).parent / "tiny"


def load_tiny(
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu", folder: Path | None = None
) -> VideoModel:
    """The shipped video model, or one that `evenflow.learn.video` wrote into `folder`, in float32 or `dtype`.

    Raises FileNotFoundError naming the parts that a folder lacks, ValueError for a part that is damaged.
    """
    place = tiny_video_path() if folder is None else folder
    lacking = [name for name in FILES if not (place / name).is_file()]
    if lacking:
        raise FileNotFoundError(f"{place} lacks {', '.join(lacking)} of a tiny video model")
    transformer, codec = load_transformer(place / FILES[0]), load_codec(place / FILES[1])
    words = load_words(place / FILES[2])
    for part in (transformer, codec, words):
        part.requires_grad_(False).to(device=device, dtype=dtype or torch.float32)
    notes = (
        "It knows one or two plain things (circle, square, triangle, star, ring) and six places by day, dusk and night.",
    )
    return VideoModel(PRESETS["tiny"], transformer, codec, Reader(words), notes)
