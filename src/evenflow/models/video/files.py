"""The files of a tiny video model: transformer, codec and words, each a safetensors file that tells its own shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .codec import TinyCodec
from .config import PRESETS
from .transformer import VideoTransformer
from .words import Words


def store(module: nn.Module, path: Path, shape: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write a module's tensors and, in the header, `shape`; the old file stays until the new one is whole."""
    tensors = {name: t.detach().to(dtype).contiguous() for name, t in module.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(tensors, part, {"shape": json.dumps(dict(shape))})
    part.replace(path)


def shape_of(path: Path) -> dict[str, Any]:
    """The shape that `store` wrote. Raises ValueError for a file that it did not write, or that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["shape"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no part of a tiny video model ({error})") from None


def restore(module: nn.Module, path: Path) -> None:
    """Fill `module` with the tensors of a file. Raises ValueError where they do not fit."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in sorted(file.keys())}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from None


def load_codec(path: Path) -> TinyCodec:
    """The codec of a file."""
    codec = TinyCodec(**shape_of(path))
    restore(codec, path)
    return codec.eval()


def save_codec(codec: TinyCodec, path: Path) -> None:
    """Write a codec."""
    shape = {"channels": codec.channels, "width": codec.enter.out_channels, "depth": len(codec.body)}
    store(codec, path, shape, torch.float16)


def load_words(path: Path) -> Words:
    """The text encoder of a file."""
    words = Words(**shape_of(path))
    restore(words, path)
    return words.eval()


def save_words(words: Words, path: Path) -> None:
    """Write a text encoder."""
    shape = {
        "vocabulary": words.vocabulary, "dim": words.place.shape[1], "length": words.length,
        "layers": len(words.body.layers),
    }  # fmt: skip
    store(words, path, shape, torch.float16)


def load_transformer(path: Path) -> VideoTransformer:
    """The transformer of a file, in float32."""
    transformer = VideoTransformer(PRESETS[shape_of(path)["preset"]])
    restore(transformer, path)
    return transformer.eval()


def save_transformer(transformer: VideoTransformer, path: Path) -> None:
    """Write a transformer, one of the presets, in float16."""
    store(transformer, path, {"preset": transformer.config.name}, torch.float16)
