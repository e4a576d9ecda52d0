"""Wan's video autoencoder as a stream: latent by latent, what its causal convolutions remember in the caller's hands.

The network is `diffusers.AutoencoderKLWan`. Its own `encode` and `decode` take whole videos; here the features that
every causal convolution keeps (its last two input frames) come in and go out, so that any number of streams share one
network, and a stream may be cut anywhere: the calls of the network, and so the bits, are the same. They are those of
diffusers, too (only its convolution of a single pixel sees all frames at once, which torch rounds otherwise where a
latent has fewer than 16 pixels). Source: Wan 2.1; Self Forcing, arXiv 2506.08009, streaming decode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import fill, read_weights

SKIPPED = "Rep"  # what diffusers puts where a temporal up-sampler, at the first latent, was passed by


@dataclass(frozen=True)
class WanState:
    """Where a stream stands between two calls. It is never written to: keep it to go back, share it to fork.

    features: what convolution number n remembers, [B, C, 1 or 2, h, w]; an empty tensor for an up-sampler that was
    passed by once. waiting: frames [B, n < 4, 3, H, W] that make no latent yet. begun: latents so far.
    """

    features: Mapping[int, Tensor] = field(default_factory=dict)
    waiting: Tensor | None = None
    begun: int = 0


class WanCodec:
    """Frames in [−1, 1] to normalised latents and back.

    Latents are (z − mean)/std per channel, z the mode of the encoder's distribution. The first frame of a stream makes
    a latent of its own, then every four: F latents are 4(F−1)+1 frames. vae: a `diffusers.AutoencoderKLWan`.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        self.time = int(config.scale_factor_temporal)
        self.side = int(config.scale_factor_spatial)
        self.channels = int(config.z_dim)
        self.mean, self.std = (
            torch.tensor(one, dtype=vae.dtype, device=vae.device)[:, None, None, None]
            for one in (config.latents_mean, config.latents_std)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights."""
        kind: torch.dtype = self.vae.dtype
        return kind

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie."""
        place: torch.device = self.vae.device
        return place

    @torch.no_grad()
    def encode(self, frames: Tensor, state: WanState | None = None) -> tuple[Tensor, WanState]:
        """Frames [B, n, 3, H, W] in [−1, 1] → latents [B, F, channels, H/8, W/8] of all groups that are complete.

        n may be 0 or more. state: what the call before gave; None starts a stream. Raises ValueError on a wrong shape.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        side = self.side
        if frames.ndim != 5 or frames.shape[2] != 3 or frames.shape[-1] % side or frames.shape[-2] % side:
            raise ValueError(f"frames are {tuple(frames.shape)}; expected [B, n, 3, H, W], H and W multiples of {side}")
        state = state or WanState()
        x = frames.to(self.device, self.dtype)
        if state.waiting is not None:
            _same(state.waiting[:, :0], x[:, :0], "frames")
            x = torch.cat([state.waiting, x], 1)
        features, begun, latents = dict(state.features), state.begun, []
        while x.shape[1] >= (self.time if begun else 1):
            group, x = x.split([n := self.time if begun else 1, x.shape[1] - n], 1)
            pixels = group.transpose(1, 2)
            if self.vae.config.patch_size is not None:
                pixels = patchify(pixels, self.vae.config.patch_size)
            made, features = self._through(self.vae.encoder, pixels, features, "encoder")
            z = self.vae.quant_conv(made)[:, : self.channels]
            latents.append(((z - self.mean) / self.std).transpose(1, 2))
            begun += 1
        height, width = frames.shape[-2] // side, frames.shape[-1] // side
        out = torch.cat(latents, 1) if latents else x.new_zeros(len(x), 0, self.channels, height, width)
        return out, WanState(features, x.clone(), begun)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: WanState | None = None) -> tuple[Tensor, WanState]:
        """Latents [B, F, channels, h, w] → frames [B, 4·F, 3, 8h, 8w] in [−1, 1]; 3 fewer where a stream starts.

        state: what the call before gave; None starts a stream. Raises ValueError on a wrong shape.
        """
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != self.channels:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected [B, F ≥ 1, {self.channels}, h, w]")
        state = state or WanState()
        z = latents.to(self.device, self.dtype).transpose(1, 2)
        z = z * self.std + self.mean
        features, begun, frames = dict(state.features), state.begun, []
        if begun:
            _same(features[0][:, :, :1].transpose(1, 2)[:, :0], latents[:, :0], "latents")
        for one in z.split(1, 2):
            one = self.vae.post_quant_conv(one)
            made, features = self._through(self.vae.decoder, one, features, "decoder", first_chunk=not begun)
            if self.vae.config.patch_size is not None:
                made = unpatchify(made, self.vae.config.patch_size)
            frames.append(made.clamp(-1, 1).transpose(1, 2))
            begun += 1
        return torch.cat(frames, 1), WanState(features, None, begun)

    def _through(
        self, half: Any, x: Tensor, features: Mapping[int, Tensor], name: str, **more: Any
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One group through the encoder or decoder, which writes what its convolutions remember into a list."""
        count = self.vae._cached_conv_counts[name]
        slots: list[Tensor | str | None] = [None] * count
        for number, kept in features.items():
            slots[number] = kept if kept.numel() else SKIPPED
        made = half(x, feat_cache=slots, feat_idx=[0], **more)
        empty = x.new_zeros(0)
        return made, {n: empty if isinstance(kept, str) else kept for n, kept in enumerate(slots) if kept is not None}


def _same(held: Tensor, coming: Tensor, what: str) -> None:
    if held.shape[0] != coming.shape[0] or held.shape[-2:] != coming.shape[-2:]:
        raise ValueError(
            f"{what} of {coming.shape[0]} rows of {tuple(coming.shape[-2:])} in a stream of {held.shape[0]} of "
            f"{tuple(held.shape[-2:])}; state=None starts another stream"
        )


def load_wan_codec(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> WanCodec:
    """The codec of a diffusers folder (config.json beside its weights) or of Wan's own file (Wan2.1_VAE.pth).

    Raises ValueError with what is missing, left over, or of the wrong shape.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights, place = read_weights(path), Path(path)
    told = (place if place.is_dir() else place.parent) / "config.json"
    own = "encoder.conv1.weight" in weights  # Wan's names, and Wan's shape
    shape = {} if own or not told.is_file() else json.loads(told.read_text(encoding="utf-8"))
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan.from_config(shape)
    fill(vae, convert_wan_vae_to_diffusers(weights) if own else weights, str(path), dtype, device)
    return WanCodec(vae)
