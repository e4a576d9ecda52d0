"""Published memory methods, one short file each, found by name.

A recipe is a plain function that returns a `Memory`; the decorator `register` gives it its name, its paper and its
claims. `recipe("streaming-llm", sink=4)` and `parse("streaming-llm(sink=4)")` are the same thing.
"""

import sys
from types import ModuleType

from . import (
    anchor_forcing,
    deep_forcing,
    dvgt2,
    forcing_kv,
    full,
    hybrid_forcing,
    infinite_vggt,
    knot_forcing,
    kvpo,
    learned_sink,
    live_vlm,
    liveact,
    longlive,
    motionstream,
    recompute,
    rekv,
    reward_forcing,
    rolling_forcing,
    self_forcing,
    stream_t1,
    streamdiffusion_v2,
    streaming_llm,
    streaming_vlm,
    temp_cache,
    v_rex,
    window,
    zero_sink,
)
from .registry import RecipeInfo, parse, recipe, recipes, register

__all__ = [
    "RecipeInfo",
    "anchor_forcing",
    "deep_forcing",
    "dvgt2",
    "forcing_kv",
    "full",
    "hybrid_forcing",
    "infinite_vggt",
    "knot_forcing",
    "kvpo",
    "learned_sink",
    "live_vlm",
    "liveact",
    "longlive",
    "motionstream",
    "parse",
    "recipe",
    "recipes",
    "recompute",
    "register",
    "rekv",
    "reward_forcing",
    "rolling_forcing",
    "self_forcing",
    "stream_t1",
    "streamdiffusion_v2",
    "streaming_llm",
    "streaming_vlm",
    "temp_cache",
    "v_rex",
    "window",
    "zero_sink",
]


class _Room(ModuleType):
    """`evenflow.recipes` is this room and, called, the list of what is in it."""

    def __call__(self) -> list[RecipeInfo]:
        return recipes()


sys.modules[__name__].__class__ = _Room
