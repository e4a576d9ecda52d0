"""Causal video diffusion transformers and what surrounds them."""

from .config import PRESETS, VideoConfig
from .loading import load_video
from .model import Codec, VideoModel
from .transformer import Attend, Text, VideoTransformer, places
from .untrained import random_model

__all__ = [
    "PRESETS",
    "Attend",
    "Codec",
    "Text",
    "VideoConfig",
    "VideoModel",
    "VideoTransformer",
    "load_video",
    "places",
    "random_model",
]
