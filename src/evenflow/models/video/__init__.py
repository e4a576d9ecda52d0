"""Causal video diffusion transformers and what surrounds them."""

from .config import PRESETS, VideoConfig
from .transformer import Attend, Text, VideoTransformer, places

__all__ = ["PRESETS", "Attend", "Text", "VideoConfig", "VideoTransformer", "places"]
