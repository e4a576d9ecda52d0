"""Every recipe at a size that tests can run: what the invariant suite needs to know of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import evenflow as ef

FLAT = ef.Rope()
VIDEO = ef.Rope.axial((4, 2, 2))


@dataclass(frozen=True)
class Case:
    """params: a small memory. large: parameters under which nothing leaves or is left out in a stream of 60 tokens;
    None where that cannot be (`why` says so). step: tokens in a step; any: whether the rule is per token, so that any
    cut gives the same. bounded: whether bytes stay what they are. full: by what time "everything is held" looks the
    same, a step of `step` tokens counting as one chunk."""

    params: dict[str, Any]
    large: dict[str, Any] | None
    step: int = 1
    any_cut: bool = False
    bounded: bool = True
    why: str = ""
    rope: ef.Rope | None = FLAT
    tags: Callable[[int, int], dict[str, Tensor]] | None = None  # (first token, count) → tags of a step
    geometry: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 16  # roundings of the dtype that half precision may differ by


def video(params: dict[str, Any], large: dict[str, Any] | None, **more: Any) -> Case:
    """Frames of 2 tokens in chunks of 3 frames."""
    return Case({"frame": 2, **params}, None if large is None else {"frame": 2, **large}, step=6, rope=VIDEO, **more)


def grid(first: int, count: int) -> dict[str, Tensor]:
    """The two tokens of each frame stand side by side."""
    column = torch.arange(first, first + count) % 2
    return {"coordinates": torch.stack([torch.zeros_like(column), column], -1)}


def prompts(first: int, count: int) -> dict[str, Tensor]:
    """The same, and another prompt every 12 frames."""
    return {**grid(first, count), "segment": torch.arange(first, first + count) // 24}


def routes(first: int, count: int) -> dict[str, Tensor]:
    """The same, and chunks of six tokens are dropped, averaged and kept in turn."""
    return {**grid(first, count), "route": torch.arange(first, first + count) // 6 % 3}


def branching(first: int, count: int) -> dict[str, Tensor]:
    """The same, and from the fifth chunk of six tokens on, each of two branches for two chunks, then none for one."""
    chunk = torch.arange(first, first + count) // 6
    code = torch.tensor([1, 3, 2, 4, 0])[chunk % 5]
    return {**grid(first, count), "route": torch.where(chunk < 5, 0, code)}


CASES: dict[str, Case] = {
    "anchor-forcing": video({"window": 6}, {"window": 50, "trained": 60}, tags=prompts),
    "deep-forcing": video(
        {"window": 12, "capacity": 9, "sink": 3, "recent": 4}, {"window": 50, "capacity": 40}, tags=grid
    ),
    "dvgt2": Case({"window": 4, "frame": 2}, {"window": 40, "frame": 2}, step=2, rope=VIDEO, tags=grid),
    "forcing-kv": video({"segments": 2}, {"segments": 2, "recent": 60, "static_recent": 60}, tags=grid),
    "full": Case({}, {}, any_cut=True, bounded=False),
    "infinite-vggt": Case(
        {"total_budget": 24, "frame": 2}, {"total_budget": 1000, "frame": 2}, step=2, rope=None, tags=grid
    ),
    "kvpo": video(
        {"window": 9, "physical": 12, "nearest": 4, "blocks": 2, "branches": 2},
        {"window": 50, "physical": 60, "nearest": 47}, tags=branching,
    ),
    "learned-sink": Case({"window": 13}, None, any_cut=True, why="its softmax has one more term"),
    "live-vlm": Case(
        {"cache_size": 12, "recent_frames": 1, "clip_frames": 4, "observe": 2, "prompt": 2, "frame": 2},
        {"cache_size": 100, "prompt": 2, "frame": 2}, step=8,
    ),
    "liveact": Case(
        {"steps": 1, "sink": 1, "memory": 1, "short": 2, "frame": 1}, None, step=4, rope=VIDEO, tags=grid,
        why="the past is convolved however long the stream",
    ),
    "longlive": video({"window": 12}, {"window": 50}, tags=grid),
    "motionstream": video({}, {"window": 20}),
    "recompute": Case({"window": 13}, {"window": 500}, any_cut=True),
    "rekv": Case(
        {"n_init": 2, "n_local": 13, "frame": 4, "retrieve_size": 2}, {"n_init": 2, "n_local": 500, "frame": 4}, any_cut=True
    ),
    "reward-forcing": video({"alpha": 0.9}, {"window": 50}, tags=grid),
    "rolling-forcing": video({"budget": 9}, {"budget": 60}, tags=grid),
    "self-forcing": video({"window": 12}, {"window": None}, tags=grid),
    "stream-t1": video({"window": 6, "max_sink": 9, "alpha": 0.9}, {"window": 51}, tags=routes),
    "streamdiffusion-v2": Case(
        {"frame": 2, "steps": 1}, {"frame": 2, "steps": 1, "num_kv_cache": 40, "t_reset": 60}, step=2, rope=VIDEO, tags=grid
    ),
    "streaming-llm": Case({"sink": 4, "window": 13}, {"sink": 4, "window": 500}, any_cut=True),
    "temp-cache": video({"window": 12, "tau": 0.3, "match": "key"}, {"tau": 2.0}, tags=grid),
    # Few bits have few clusters; heads of their own hash alike however many there are, as copies of heads must.
    "v-rex": Case(
        {"window": 13, "n_hp": 4, "th_hd": 2, "th_r": 0.5, "per_head": True, "page": 4}, {"window": 5, "th_r": 1.0}, any_cut=True
    ),
    "window": Case({"window": 13}, {"window": 500}, any_cut=True),
    "zero-sink": Case({"sink": 1, "window": 13}, None, any_cut=True, why="its softmax has one more term"),
    "knot-forcing": video({}, None, why="the reference stands ahead of its time, wherever it is"),
    "hybrid-forcing": video({}, {"window": 60, "ratio": 1.0, "horizon": 100}),
    "streaming-vlm": Case(
        {"window": 2, "text_round": 2, "text_sink": 4, "text_window": 6}, {"text_sink": 500}, step=4
    ),
}  # fmt: skip
