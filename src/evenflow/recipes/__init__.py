"""Published memory methods, one short file each, found by name.

A recipe is a plain function that returns a `Memory`, or a `Composition` of another kind; the decorator `register` gives it its name, its paper and its
claims. `recipe("streaming-llm", sink=4)` and `parse("streaming-llm(sink=4)")` are the same thing.
"""

import sys
from types import ModuleType

from ..memory.composition import Kind
from . import (
    anchor_forcing,
    curve_stream,
    deep_forcing,
    dvgt2,
    flash_vstream,
    forcing_kv,
    full,
    hybrid_forcing,
    infinite_vggt,
    infinite_vl,
    knot_forcing,
    kvpo,
    learned_sink,
    live_vlm,
    liveact,
    longlive,
    motionstream,
    omniforcing,
    recompute,
    rekv,
    reward_forcing,
    rolling_forcing,
    self_forcing,
    spatial_ttt,
    speak_while_watching,
    stc,
    stream_t1,
    streamdiffusion,
    streamdiffusion_v2,
    streaming_llm,
    streaming_vlm,
    tays,
    temp_cache,
    think_while_watching,
    timechat_online,
    v_rex,
    videollm_online,
    window,
    zero_sink,
)
from .registry import RecipeInfo, composed, parse, recipe, recipes, register

__all__ = [
    "RecipeInfo",
    "anchor_forcing",
    "composed",
    "curve_stream",
    "deep_forcing",
    "dvgt2",
    "flash_vstream",
    "forcing_kv",
    "full",
    "hybrid_forcing",
    "infinite_vggt",
    "infinite_vl",
    "knot_forcing",
    "kvpo",
    "learned_sink",
    "live_vlm",
    "liveact",
    "longlive",
    "motionstream",
    "omniforcing",
    "parse",
    "recipe",
    "recipes",
    "recompute",
    "register",
    "rekv",
    "reward_forcing",
    "rolling_forcing",
    "self_forcing",
    "spatial_ttt",
    "speak_while_watching",
    "stc",
    "stream_t1",
    "streamdiffusion",
    "streamdiffusion_v2",
    "streaming_llm",
    "streaming_vlm",
    "tays",
    "temp_cache",
    "think_while_watching",
    "timechat_online",
    "v_rex",
    "videollm_online",
    "window",
    "zero_sink",
]


class _Room(ModuleType):
    """`evenflow.recipes` is this room and, called, the list of what is in it."""

    def __call__(self, kind: Kind | None = None) -> list[RecipeInfo]:
        return recipes(kind)


sys.modules[__name__].__class__ = _Room
