"""Video models of any shape with random weights: what tests and benchmarks run on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .codec import TIME, TinyCodec
from .config import PRESETS, VideoConfig
from .model import Codec, VideoModel
from .transformer import VideoTransformer


class RandomText:
    """Embeddings that a prompt's letters draw: as many rows as it has words, and one, then zeros."""

    def __init__(self, config: VideoConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._one(prompt) for prompt in prompts]).to(self.device, self.dtype)

    def _one(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        rows = min(len(prompt.split()) + 1, self.config.text_len)
        drawn = torch.randn(rows, self.config.text_dim, generator=torch.Generator().manual_seed(seed))
        return torch.cat([drawn, drawn.new_zeros(self.config.text_len - rows, self.config.text_dim)])


def random_model(
    config: VideoConfig | str = "tiny", seed: int = 0, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", vae_dim: int = 96,
) -> VideoModel:  # fmt: skip
    """A model with the shape of a preset or of `config`, its weights drawn by `seed` on `device`.

    A latent of 4×4 pixels gets the tiny codec, one of 8×8 Wan's autoencoder, whose first layer is `vae_dim` wide (96 as
    published).
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"no preset {config!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[config]
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        transformer = VideoTransformer(config)
    drawn(transformer, generator, dtype)
    codec: Codec
    if config.stride[1:] == (4, 4) and config.stride[0] == TIME:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            codec = TinyCodec(config.out_channels).to(device, dtype).eval().requires_grad_(False)
    elif config.stride == (4, 8, 8):
        from diffusers import AutoencoderKLWan

        from .wan_vae import WanCodec

        count = config.out_channels
        with torch.device("meta"):
            vae: Any = AutoencoderKLWan(
                base_dim=vae_dim, z_dim=count, latents_mean=[0.0] * count, latents_std=[1.0] * count
            )
        drawn(vae, generator, dtype)
        codec = WanCodec(vae)
    else:
        raise ValueError(f"stride is {config.stride}; there is a codec of (4, 4, 4) and one of (4, 8, 8)")
    return VideoModel(config, transformer, codec, RandomText(config, dtype, device), ("weights are random",))


def drawn(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Give a module on the meta device weights: norms 1, biases 0, all else as large as keeps activations."""
    nn.Module.to(module, dtype=dtype)  # diffusers' own says a word about it
    module.to_empty(device=generator.device).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim < 2 or name.endswith("gamma"):
            parameter.fill_(1)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
