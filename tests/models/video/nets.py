"""Small random networks, ours and those of `diffusers` with the same weights."""

from __future__ import annotations

import torch

from evenflow.models.video import VideoConfig, VideoTransformer

SMALL = VideoConfig(
    "small", dim=48, ffn_dim=80, heads=4, layers=3, in_channels=5, out_channels=5, text_dim=20, text_len=7, freq_dim=32
)


def network(config: VideoConfig = SMALL, seed: int = 0, dtype: torch.dtype = torch.float32) -> VideoTransformer:
    """A network whose every parameter matters: norms and biases are random, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoTransformer(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def theirs(config: VideoConfig):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
    ).eval()  # fmt: skip


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
