"""Shapes of the causal video transformer: Wan 2.1's two sizes, and a tiny one of the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoConfig:
    """What a video transformer is built of. Source: Wan 2.1; Self Forcing, arXiv 2506.08009.

    in_channels counts the latent's channels and, behind them, those of conditions (drawn tracks); out_channels is the
    latent's own number. patch: frames, rows and columns of latents in a token. stride: pixels of a latent in time, rows
    and columns. size: rows and columns of pixels of the videos that the weights were made for. steps: nominal times
    (1000 is noise) of the few-step sampler, and shift: how far its noise levels lean towards noise.
    """

    name: str
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    shift: float = 5.0
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    stride: tuple[int, int, int] = (4, 8, 8)
    size: tuple[int, int] = (480, 832)
    fps: int = 16
    chunk: int = 3

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"{self.heads} heads do not get an even, equal share of {self.dim} channels")
        if self.patch[0] != 1:
            raise ValueError(f"patch is {self.patch}; a token must be part of one frame, so its first number is 1")
        if self.in_channels < self.out_channels:
            raise ValueError(f"in_channels is {self.in_channels}; it counts the {self.out_channels} of the latent")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads

    def latent_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of latents of a video of `size` pixels (default: the model's own).

        Raises ValueError where tokens would not tile it.
        """
        height, width = size or self.size
        rows, columns = self.stride[1] * self.patch[1], self.stride[2] * self.patch[2]
        if height < rows or width < columns or height % rows or width % columns:
            raise ValueError(
                f"a video of {height}×{width} pixels; rows must be a multiple of {rows}, columns of {columns}"
            )
        return height // self.stride[1], width // self.stride[2]

    def tokens(self, latent: tuple[int, int]) -> int:
        """Tokens of one latent frame of that many rows and columns."""
        return (latent[0] // self.patch[1]) * (latent[1] // self.patch[2])


PRESETS: dict[str, VideoConfig] = {
    config.name: config
    for config in (
        VideoConfig(
            "tiny", dim=256, ffn_dim=1024, heads=4, layers=7, in_channels=56, out_channels=24, text_dim=128, text_len=48, freq_dim=128,
            shift=5.0, stride=(4, 4, 4), size=(64, 64),
        ),
        VideoConfig("wan2.1-1.3b", dim=1536, ffn_dim=8960, heads=12, layers=30),
        VideoConfig("wan2.1-14b", dim=5120, ffn_dim=13824, heads=40, layers=40),
    )
}  # fmt: skip
