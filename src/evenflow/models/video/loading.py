"""Finds a video model: the one that is shipped, a folder, a file with a base to complete it, or a name of the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoints import load_transformer
from .config import VideoConfig
from .model import VideoModel
from .tiny import FILES, load_tiny

# Where a preset's weights are published, in the layout of diffusers.
HUB = {
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
PARTS = {
    "transformer": "a transformer (transformer/, or diffusion_pytorch_model.safetensors)",
    "vae": "an autoencoder (vae/, or Wan2.1_VAE.pth)",
    "text_encoder": "a text encoder (text_encoder/, or models_t5_umt5-xxl-enc-bf16.pth)",
    "tokenizer": "a tokenizer (tokenizer/, or google/umt5-xxl/)",
}
# What is fetched of a repository of the hub; pictures and examples are not.
WANTED = [
    "*.json", "*.safetensors", "*.pth", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*", "google/*",
]  # fmt: skip


def load_video(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu",
    *, base: str | os.PathLike[str] | None = None, config: VideoConfig | None = None, part: str | None = None,
) -> VideoModel:  # fmt: skip
    """A video model, whole.

    name_or_path: "tiny" (shipped), or a folder with another of its kind; a folder in the layout of diffusers
    (transformer/, vae/, text_encoder/, tokenizer/) or of Wan's release; a file with a transformer (Self-Forcing and its
    kin); a preset, "owner/repository" of the hub, or "owner/repository/file". base: where the parts come from that are
    not there, such as the autoencoder beside a file. dtype: of all weights; None keeps each part's own. config, part:
    see `checkpoints.load_transformer`. Raises FileNotFoundError or ValueError that says what is missing and what to do.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating point type such as 'float32' or 'bfloat16'")
    if name_or_path == "tiny":
        return load_tiny(kind, device)
    place = located(name_or_path)
    if place.is_dir() and all((place / name).is_file() for name in FILES):
        return load_tiny(kind, device, place)
    found = parts_of(place)
    if base is not None:
        found = dict(parts_of(located(base))) | found
    lacking = [said for name, said in PARTS.items() if name not in found]
    if lacking:
        raise ValueError(
            f"{name_or_path} holds no {'; no '.join(said.partition(' ')[2] for said in lacking)}: give base=, a folder "
            f"or hub name that does, such as {HUB['wan2.1-1.3b']}"
        )
    return _assembled(found, str(name_or_path), kind, device, config, part)


def _assembled(
    found: Mapping[str, Path], name: str, dtype: torch.dtype | None, device: torch.device | str,
    config: VideoConfig | None, part: str | None,
) -> VideoModel:  # fmt: skip
    from .umt5 import load_umt5
    from .wan_vae import load_wan_codec

    transformer = load_transformer(found["transformer"], config, part=part, dtype=dtype, device=device)
    codec = load_wan_codec(found["vae"], dtype, device)
    shape = transformer.config
    if codec.channels != shape.out_channels:
        raise ValueError(
            f"the autoencoder of {found['vae']} has {codec.channels} channels, the transformer {shape.out_channels}; "
            "they belong to different models"
        )
    shape = replace(shape, name=name, stride=(codec.time, codec.side, codec.side))
    transformer.config = shape
    text = load_umt5(found["text_encoder"], found["tokenizer"], length=shape.text_len, dtype=dtype, device=device)
    width = text.encoder.config.d_model
    if width != shape.text_dim:
        raise ValueError(
            f"the text encoder of {found['text_encoder']} gives {width} numbers a word, not {shape.text_dim}"
        )
    notes = tuple(f"{what} from {place}" for what, place in found.items())
    return VideoModel(shape, transformer, codec, text, notes)


def parts_of(place: Path) -> dict[str, Path]:
    """The parts of a model that lie in a folder, in either layout; a file is a transformer. Keys are those of PARTS."""
    if place.is_file():
        return {"transformer": place}
    found = {name: place / name for name in PARTS if (place / name).is_dir()}
    if "transformer" not in found:
        weights = [*place.glob("*.safetensors.index.json"), *place.glob("*.safetensors")]
        if weights:
            found["transformer"] = place if weights[0].suffix == ".json" else weights[0]
    own = {"vae": "*VAE*.pth", "text_encoder": "models_t5*.pth", "tokenizer": "google/*"}
    for name, pattern in own.items():
        there = sorted(place.glob(pattern))
        if there and name not in found:
            found[name] = there[0]
    return found


def located(name_or_path: str | os.PathLike[str]) -> Path:
    """The file or folder that is meant, fetched from the hub if it is not here.

    Raises FileNotFoundError for a path that does not exist, ValueError with what to do where the hub cannot be asked.
    """
    name = os.fspath(name_or_path)
    place = Path(name).expanduser()
    if place.exists():
        return place
    name = HUB.get(name, name)
    owner, _, rest = name.partition("/")
    if not rest or owner in ("", ".", "..", "~") or name.endswith("/"):
        raise FileNotFoundError(
            f"no video model {name_or_path}: no such file or folder, and there are tiny, {', '.join(HUB)}"
        )
    repository, _, file = rest.partition("/")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{repository}", file))
        return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=WANTED))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no file or folder here, and cannot be had from the hub ({first}). On a machine with a network: "
            f"hf download {owner}/{repository}{' ' + file if file else ''} --local-dir FOLDER; then name the folder"
        ) from error
