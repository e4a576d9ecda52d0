"""Memories of features: frames of an encoder, summed up in a number of tokens that stays the same, read when asked."""

from .flash import Flash, FlashState
from .kmeans import Summary, weighted_kmeans
from .star import SemanticAttention, Star, StarState
from .state import FeatureState, pooled

__all__ = [
    "FeatureState", "Flash", "FlashState", "SemanticAttention", "Star", "StarState", "Summary", "pooled",
    "weighted_kmeans",
]  # fmt: skip
