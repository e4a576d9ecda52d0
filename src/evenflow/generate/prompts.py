"""What a stream is asked for: prompts, blends of prompts, and transitions from one to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Way = Literal["linear", "slerp"]
Weights = dict[str, float]
KEPT = 16  # embeddings of prompts that are not in use but may be asked for again


def weights_of(prompts: str | Mapping[str, float]) -> Weights:
    """One prompt, or prompts with weights that sum to 1 afterwards. Raises TypeError or ValueError on anything else."""
    if isinstance(prompts, str):
        return {prompts: 1.0}
    if not isinstance(prompts, Mapping) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"a prompt is {prompts!r}; expected a text, or texts with their weights: {{'a cat': 0.7, …}}")
    total = 0.0
    for prompt, weight in prompts.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {prompt!r} is {weight!r}; it must be a number, 0 or more")
        total += weight
    if not total:
        raise ValueError("all weights are 0; give at least one prompt a weight")
    return {prompt: weight / total for prompt, weight in prompts.items() if weight}


@dataclass(frozen=True)
class Wish:
    """What is wanted at a time: the prompts `now`, or on the way from `before` to them.

    start, over: seconds; the way begins at `start` and ends `over` later. way: embeddings are mixed linearly, or turned
    from one direction to the other, token by token (spherical).
    """

    now: Weights
    before: Weights = field(default_factory=dict)
    start: float = 0.0
    over: float = 0.0
    way: Way = "linear"

    def share(self, seconds: float) -> float:
        """How far the way to `now` has been gone, 0 to 1."""
        if not self.before or seconds >= self.start + self.over:
            return 1.0
        return max(0.0, (seconds - self.start) / self.over)

    def at(self, seconds: float) -> Weights:
        """What is in force, as weights."""
        share = self.share(seconds)
        mixed = {prompt: (1 - share) * weight for prompt, weight in self.before.items()} if share < 1 else {}
        for prompt, weight in self.now.items():
            mixed[prompt] = mixed.get(prompt, 0.0) + share * weight
        return {prompt: weight for prompt, weight in mixed.items() if weight > 0}

    def turned(self, now: Weights, seconds: float, over: float, way: Way) -> Wish:
        """The wish after another one was made at `seconds`."""
        return Wish(now, self.at(seconds), seconds, over, way) if over else Wish(now)

    def settled(self) -> Wish:
        """The end of the way."""
        return replace(self, before={}, start=0.0, over=0.0)

    def said(self, seconds: float) -> str:
        """In words: the prompt, or what is mixed."""
        parts = sorted(self.at(seconds).items(), key=lambda item: -item[1])
        if len(parts) == 1:
            return parts[0][0]
        return " + ".join(f"{weight:.0%} {prompt}" for prompt, weight in parts)


def checked(over: float, way: str) -> None:
    """Raises ValueError for a transition that there is not."""
    if way not in get_args(Way):
        raise ValueError(f"way is {way!r}; it must be one of {', '.join(get_args(Way))}")
    if isinstance(over, bool) or not isinstance(over, (int, float)) or not 0 <= over < math.inf:
        raise ValueError(f"over is {over!r}; it must be a number of seconds, 0 or more")


class Embeddings:
    """Texts become what a network reads; each prompt is encoded once while it is in use.

    encode: list of texts → float [n, L, D]. read: embeddings [1, L, D] → what the network takes (`Text`).
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], read: Callable[[Tensor], Any]) -> None:
        self.encode, self.read = encode, read
        self._known: dict[str, Tensor] = {}
        self._last: tuple[Any, Any] = (None, None)

    def of(self, prompt: str) -> Tensor:
        """The embedding of one prompt, [1, L, D]."""
        if prompt not in self._known:
            made = self.encode([prompt])
            if not bool(made.isfinite().all()):
                raise ValueError(f"the text encoder made NaN of {prompt!r}")
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[prompt] = made
        return self._known[prompt]

    def mixed(self, weights: Weights) -> Tensor:
        """The weighted sum of embeddings."""
        return torch.stack([weight * self.of(prompt) for prompt, weight in weights.items()]).sum(0)

    def text(self, wish: Wish, seconds: float) -> Any:
        """What the network reads at a time; made anew only where it has changed."""
        share = wish.share(seconds)
        key = (wish, share) if share < 1 else (wish.now, 1.0)
        if self._last[0] != key:
            target = self.mixed(wish.now)
            if share < 1:
                blend = torch.lerp if wish.way == "linear" else slerp
                target = blend(self.mixed(wish.before), target, share)
            self._last = key, self.read(target)
        return self._last[1]


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a to b along a great circle, vector by vector of the last axis, lengths linearly; linear where they are parallel."""
    long_a, long_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = (a * b).sum(-1, keepdim=True) / (long_a * long_b).clamp_min(1e-20)
    angle = cosine.clamp(-1, 1).arccos()
    sine = angle.sin()
    straight = torch.lerp(a, b, share)
    turned = ((1 - share) * angle).sin() / sine * a / long_a + (share * angle).sin() / sine * b / long_b
    ok = (sine > 1e-4) & (long_a > 0) & (long_b > 0)
    return torch.where(ok, turned * torch.lerp(long_a, long_b, share), straight)
