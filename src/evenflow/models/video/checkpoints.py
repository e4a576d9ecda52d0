"""Reads the weights of video transformers: any of the published layouts, whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import PRESETS, VideoConfig
from .names import native
from .transformer import VideoTransformer

SUFFIXES = (".safetensors", ".pt", ".pth")
# What training saves beside each other; the first that is there is what one generates with.
PARTS = ("generator_ema", "generator", "critic")
PLAIN = ("state_dict",)
SHOWN = 6  # names of a list that are written out in an error


def load_transformer(
    path: str | os.PathLike[str], config: VideoConfig | None = None, *, part: str | None = None,
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
) -> VideoTransformer:  # fmt: skip
    """The transformer whose weights lie in a file or folder.

    path: see `read_weights`. config: None takes it from the folder's config.json (diffusers layout), or the preset
    whose shapes the weights have. part: which of `generator_ema`, `generator` and `critic`, where training saved several.
    dtype: None keeps that of the file. Raises ValueError with what is missing, left over, or of the wrong shape.
    """
    weights = native(read_weights(path, part))
    config = config or config_beside(Path(path)) or config_of(weights)
    with torch.device("meta"):
        model = VideoTransformer(config)
    fill(model, weights, str(path), dtype, device)
    return model.eval()


def fill(
    model: nn.Module, weights: dict[str, Tensor], source: str, dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Give a model all of its tensors, which may stand on the meta device until then.

    weights is emptied, tensor by tensor, so that a large model is not held twice. dtype: of floating point tensors;
    None takes what most of the weights have, as one model has one. Raises ValueError if they do not fit.
    """
    expected = model.state_dict()
    wrong = misfits({name: tuple(tensor.shape) for name, tensor in expected.items()}, weights)
    if wrong:
        raise ValueError(f"{source} does not hold the weights of this model:\n{wrong}")
    packed = [
        name
        for name, tensor in weights.items()
        if expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    if packed:
        raise ValueError(f"{source} holds whole numbers where weights belong (a quantised model?): {_listed(packed)}")
    if dtype is None:
        sizes: dict[torch.dtype, int] = {}
        for tensor in weights.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        dtype = max((kind for kind in sizes if kind.is_floating_point), key=sizes.__getitem__, default=torch.float32)
        if dtype.itemsize == 1:
            dtype = torch.bfloat16  # what was stored in 8 bits is not calculated in them
    taken = {}
    for name, like in expected.items():
        taken[name] = weights.pop(name).to(device, dtype if like.is_floating_point() else like.dtype).contiguous()
    model.load_state_dict(taken, assign=True)
    model.requires_grad_(False)


def misfits(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> str:
    """What keeps weights from fitting: a line each for what is missing, left over, or shaped otherwise; or nothing."""
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, expected {expected[name]}"
        for name, tensor in given.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    kinds = (("missing", missing, len(expected)), ("not known", extra, len(given)), ("wrong shape", shapes, len(given)))
    return "\n".join(f"  {what}: {len(found)} of {of}: {_listed(found)}" for what, found, of in kinds if found)


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# -- files -----------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str], part: str | None = None) -> dict[str, Tensor]:
    """All tensors of a file (.safetensors, .pt, .pth) or a folder with one such file, or with shards and their index.

    part: see `load_transformer`. Files of torch are read without their programs. Raises FileNotFoundError, or
    ValueError that names what is wrong; nothing is ever read in part.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"no weights at {place}: there is no such file or folder")
    if not place.is_dir():
        return _part(_read(place), part, place)
    indices = sorted(place.glob("*.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{place} holds several indices: {_listed([i.name for i in indices])}; name the folder of one")
    if indices:
        return _part(_sharded(indices[0]), part, place)
    files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = (
            f"several files with weights and no index: {_listed([f.name for f in files])}" if files else "no weights"
        )
        raise ValueError(f"{place} holds {found}; name one file ({', '.join(SUFFIXES)}) or add its index.json")
    return _part(_read(files[0]), part, place)


def _read(file: Path) -> dict[str, Any]:
    """What one file holds, nested as it is."""
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is no file of weights; expected one that ends in {', '.join(SUFFIXES)}")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors ({_first_line(error)}); such files can run programs and are not read: "
            "save its state dict alone, as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no file of torch: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}; expected tensors by name")
    return found


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors that an index tells the files of."""
    try:
        where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards: expected JSON with a weight_map") from error
    absent = sorted({file for file in where.values() if not (index.parent / file).is_file()})
    if absent:
        raise ValueError(f"{index.parent} lacks {len(absent)} of its shards: {_listed(absent)}; get them again")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        held = _read(index.parent / file)
        lost = [name for name, home in where.items() if home == file and name not in held]
        if lost:
            raise ValueError(f"{index.parent / file} lacks {len(lost)} of its tensors: {_listed(lost)}")
        tensors |= {name: tensor for name, tensor in held.items() if where.get(name) == file}
    return tensors


def _part(found: Mapping[str, Any], part: str | None, place: Path) -> dict[str, Tensor]:
    """The tensors of one network: `found` nests them under its name, puts the name before theirs, or has no other."""
    flat = _flat(found)
    there = [name for name in (*PARTS, *PLAIN) if any(key.startswith(f"{name}.") for key in flat)]
    if part is not None and part not in there:
        raise ValueError(f"{place} holds no {part!r}; it holds {', '.join(there) or 'one network without a name'}")
    if not flat:
        raise ValueError(f"{place} holds no tensors")
    if not there:
        return flat
    start = f"{part or there[0]}."
    return {key.removeprefix(start): tensor for key, tensor in flat.items() if key.startswith(start)}


def _flat(found: Mapping[str, Any], start: str = "") -> dict[str, Tensor]:
    """Nested tensors under dotted names; counters, settings and the state of optimisers' numbers are no weights."""
    flat: dict[str, Tensor] = {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            flat[f"{start}{name}"] = value
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{start}{name}.")
    return flat


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# -- configurations --------------------------------------------------------------------------------------------------


def config_beside(path: Path) -> VideoConfig | None:
    """The configuration that lies with weights in diffusers' or Wan's own layout; None where there is none.

    Raises ValueError where it describes another kind of network.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.get("_class_name") == "WanTransformer3DModel":
            heads, width = told["num_attention_heads"], told["attention_head_dim"]
            config = VideoConfig(
                file.parent.name, dim=heads * width, ffn_dim=told["ffn_dim"], heads=heads, layers=told["num_layers"],
                in_channels=told["in_channels"], out_channels=told["out_channels"] or told["in_channels"],
                patch=tuple(told["patch_size"]), text_dim=told["text_dim"], freq_dim=told["freq_dim"], eps=told["eps"],
            )  # fmt: skip
            if not told["cross_attn_norm"] or told.get("image_dim") or told.get("added_kv_proj_dim"):
                raise ValueError(f"{file} describes a transformer with image tokens or without a cross-attention norm")
        elif told.get("_class_name") == "WanModel":
            config = VideoConfig(
                file.parent.name, dim=told["dim"], ffn_dim=told["ffn_dim"], heads=told["num_heads"],
                layers=told["num_layers"], in_channels=told["in_dim"], out_channels=told["out_dim"],
                text_len=told["text_len"], freq_dim=told["freq_dim"], eps=told["eps"],
            )  # fmt: skip
        else:
            raise ValueError(
                f"{file} describes {told.get('_class_name')!r}; expected WanTransformer3DModel or WanModel"
            )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} lacks {error} of a video transformer's configuration") from error
    return preset_like(config) or config


def preset_like(config: VideoConfig) -> VideoConfig | None:
    """The preset that builds the same network, if any: it knows its pictures and steps, which weights do not tell."""
    built = ("dim", "ffn_dim", "heads", "layers", "in_channels", "out_channels", "patch", "text_dim", "freq_dim", "eps")
    assert set(built) < {field.name for field in fields(VideoConfig)}
    for preset in PRESETS.values():
        if all(getattr(preset, name) == getattr(config, name) for name in built):
            return preset
    return None


def config_of(weights: Mapping[str, Tensor]) -> VideoConfig:
    """The preset that weights under native names have the shapes of; heads cannot be read off weights.

    Raises ValueError where none has.
    """
    try:
        dim, in_channels, *patch = weights["patch_embedding.weight"].shape
        seen = VideoConfig(
            "weights", dim=dim, in_channels=in_channels, patch=(patch[0], patch[1], patch[2]), heads=1,
            ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0], text_dim=weights["text_embedding.0.weight"].shape[1],
            layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            freq_dim=weights["time_embedding.0.weight"].shape[1],
            out_channels=weights["head.head.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
        )  # fmt: skip
    except (KeyError, IndexError, ValueError) as error:
        some = _listed(sorted(weights))
        raise ValueError(
            f"these are no weights of a Wan transformer ({_first_line(error)}); there are {some}"
        ) from error
    for preset in PRESETS.values():
        same = preset_like(replace(seen, heads=preset.heads)) if dim % preset.heads == 0 else None
        if same is not None:
            return same
    raise ValueError(
        f"no preset has dim {dim}, {seen.layers} layers, ffn {seen.ffn_dim}, text {seen.text_dim} and "
        f"{in_channels}→{seen.out_channels} channels: give config=VideoConfig(...), or a folder with its config.json"
    )
