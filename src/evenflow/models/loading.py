"""Finds a model: an instance, a folder, a name, or the one that is shipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from .families import check_generates


def tiny_path() -> Path:
    """The folder of the shipped tiny model (transformers layout: weights, configuration, tokenizer)."""
    return Path(__file__).parent / "tiny"


def load(model: object, tokenizer: Any = None, dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer (None if there is none).

    model: a transformers model, the path of a folder that `save_pretrained` wrote, a hub name, or "tiny"; the folder of
    an omni model gives its thinker. dtype: for a model that is loaded, the dtype of its weights (default: as saved;
    float32 for "tiny"); a model that exists has to have it already. Raises TypeError or ValueError with what was expected.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating point type such as 'float32' or 'bfloat16'")
    if not isinstance(model, (str, os.PathLike)):
        check_generates(model)
        assert isinstance(model, PreTrainedModel)
        if kind is not None and kind != model.dtype:
            raise ValueError(f"the model is {model.dtype}, not {kind}; convert it first: model.to({kind})")
        return model, tokenizer
    name = os.fspath(model)
    place: str | Path = name
    if name == "tiny":
        place, kind = tiny_path(), kind or torch.float32
    if Path(place).exists():
        if not (Path(place) / "config.json").is_file():
            raise ValueError(
                f"{place} holds no model: there is no config.json; give a folder that save_pretrained wrote"
            )
    elif name == "tiny" or os.sep in name.strip(os.sep).partition(os.sep)[2] or name.startswith((os.sep, ".", "~")):
        raise FileNotFoundError(f"no model folder {place}")
    try:
        config = AutoConfig.from_pretrained(place)
        config = getattr(config, "thinker_config", config)  # Of an omni model, the part that reads and writes text.
        known = type(config)
        sees = known in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and known not in MODEL_FOR_CAUSAL_LM_MAPPING
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        loaded = family.from_pretrained(place, config=config, dtype=kind or "auto")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load a language model from {name}: {_first_line(error)}") from error
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, TypeError):
            tokenizer = None  # A model without a tokenizer is fed ids.
    return loaded, tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
