"""Admission by salience: tokens far from the recent past and from their own frame; and which of an encoder's are done anew.

Source: STC, arXiv 2512.00891, its pruner and its cacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .verdict import Verdict, checked, cosine, wide


@dataclass(frozen=True)
class Salient:
    """The ⌊tokens · (1 − dropped)⌋ tokens of each frame that are furthest from two anchors; of equal ones the first.

    Items are frames of tokens, [n, tokens, d], as a language model would get them. A token's score is alpha · (1 − cos to
    the mean of the last `window` frames' means) + (1 − alpha) · (1 − cos to the mean of its own frame); of the first
    frame, which has no past, the second alone. The weighted sum is the paper's equation (its text says product, and its
    code's default takes other kernels); the window is not given there, and its code never forgets.

    novelty: the mean over a frame's tokens of 1 − cos to the past, 1 at most. The state holds the means of the frames
    in the window, float32 or wider, [k, d], None before the first.
    """

    dropped: float = 0.75
    alpha: float = 0.5
    window: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.dropped <= 1 or not 0 <= self.alpha <= 1 or self.window < 1:
            raise ValueError(f"expected dropped and alpha from 0 to 1 and a window of 1 or more, got {self}")

    def start(self) -> Tensor | None:
        return None

    def step(self, items: Tensor, state: Tensor | None) -> tuple[Verdict, Tensor | None]:
        checked(items, (3,), "[n, tokens, d]", None if state is None else state[-1:].expand(items.shape[1], -1))
        x = items.to(wide(items))
        means = x.mean(1)
        keeps, news = [], []
        count = int(items.shape[1] * (1 - self.dropped) + 1e-9)  # 0.3 of 10 is 3
        for frame, mean in zip(x, means, strict=True):
            far = 1 - cosine(frame, mean)
            if state is None:
                news.append(far.new_ones(()))
            else:
                past = 1 - cosine(frame, state.mean(0))
                far = self.alpha * past + (1 - self.alpha) * far
                news.append(past.mean().clamp_max(1))
            rank = far.argsort(descending=True, stable=True).argsort()
            keeps.append(rank < count)
            state = (mean[None] if state is None else torch.cat([state, mean[None]]))[-self.window :].clone()
        if not keeps:
            return Verdict.of(items.new_zeros(items.shape[:2], dtype=torch.bool)), state
        return Verdict.of(torch.stack(keeps), torch.stack(news)), state


@dataclass(frozen=True, eq=False)
class Cached:
    """reference: keys of the last frame that was encoded whole, [tokens, d]; number: frames so far."""

    reference: Tensor | None = None
    number: int = 0


@dataclass(frozen=True)
class Recomputed:
    """Which tokens of a frame a layer of an encoder computes anew; for the others it takes what it had for the reference.

    Items are the layer's keys, all heads of a token together, [n, tokens, d]. Every `interval`-th frame is encoded whole
    and becomes the reference; of the others the int(tokens · share) tokens, one at least, whose keys are least like the
    reference's at their place are, of equal ones the first. One a layer, with a state of its own. interval 1: always whole.

    novelty: 1 − the mean cosine to the reference, 1 at most and of the first frame. Everything gets in: it is the work
    that is chosen, not the tokens, so `resolution` is FULL.
    """

    share: float = 0.25
    interval: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.interval < 1:
            raise ValueError(f"expected a share from 0 to 1 and an interval of 1 or more, got {self}")

    def start(self) -> Cached:
        return Cached()

    def step(self, items: Tensor, state: Cached) -> tuple[Verdict, Cached]:
        checked(items, (3,), "[n, tokens, d]", state.reference)
        number = state.number + torch.arange(len(items), device=items.device)
        before = 0 if state.reference is None else 1
        known = items if state.reference is None else torch.cat([state.reference[None], items])
        # The frame that each is compared with, by its place in `known`: the last whole one, before this call or in it.
        latest = (number // self.interval * self.interval - state.number + before).clamp_min(0)
        alike = cosine(items, known[latest])
        count = min(max(int(items.shape[1] * self.share), 1), items.shape[1])
        whole = number % self.interval == 0
        keep = (alike.argsort(dim=-1, stable=True).argsort(-1) < count) | whole[:, None]
        novelty = (1 - alike.mean(-1)).clamp(0, 1)
        if not len(items):
            return Verdict.of(keep, novelty), state
        novelty[: max(0, 1 - state.number)] = 1
        return Verdict.of(keep, novelty), Cached(known[latest[-1]].clone(), state.number + len(items))
