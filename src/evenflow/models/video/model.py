"""What a video stream runs on: a transformer, a codec and a reader of prompts, loaded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .config import VideoConfig
from .transformer import VideoTransformer


class Codec(Protocol):
    """Frames to latents and back, as streams: any cut gives the same bits. state=None starts a stream."""

    def encode(self, frames: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Frames [B, n, 3, H, W] in [−1, 1] → latents [B, F, C, h, w] of what is complete, and the state."""

    def decode(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Latents [B, F, C, h, w] → frames [B, n, 3, H, W] in [−1, 1], and the state."""


@dataclass(frozen=True, eq=False)
class VideoModel:
    """One model for any number of streams.

    encode_text: prompts → embeddings [B, text_len, text_dim]. notes: what whoever uses it should know of it, a sentence
    each.
    """

    config: VideoConfig
    transformer: VideoTransformer
    codec: Codec
    encode_text: Callable[[Sequence[str]], Tensor]
    notes: tuple[str, ...] = ()
