"""Admission by difference: tokens that repeat the token at the same place before them do not get in.

Source: TimeChat-Online, arXiv 2504.17343, section on differential token drop (DTD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .verdict import Verdict, checked, cosine, wide

Measure = Literal["features", "pixels"]
Reference = Literal["previous", "last_kept"]


@dataclass(frozen=True)
class TokenDrop:
    """Drops a token whose likeness to the token at its place before exceeds a threshold.

    Items are slices of tokens, [n, tokens, d]; the first of a stream gets in whole. by: "features" drops where the
    cosine is over `threshold` (1 or more drops nothing; a larger one keeps more); "pixels" where the mean absolute
    difference is under it (0 drops nothing; a larger one drops more), of patches with values in [0, 1]. A slice that is
    made of several frames may be given as [n, frames, tokens, values]: its last frame is compared with the first frame
    of the slice before, as the released code does. share: drop int(share · tokens) of each slice instead, the most
    alike first and of equals the first.

    reference: what a token is compared with. "previous" is the paper's: the slice just before, dropped there or not.
    What changes by little steps is then dropped for ever, however far it goes. "last_kept" compares with the token that
    was last let in at that place, which is what a memory holds of it, so that no place is off by more than the threshold.

    The novelty of a slice is the share of it that gets in, 1 − drop ratio: see `gate.Novelty` for the paper's trigger.
    The state is one slice, [tokens, d], None before the first.
    """

    threshold: float = 0.25
    share: float | None = None
    by: Measure = "features"
    reference: Reference = "previous"

    def __post_init__(self) -> None:
        for name, known in (("by", Measure), ("reference", Reference)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(known))}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; expected the part of a slice that is dropped, 0 to 1")

    def start(self) -> Tensor | None:
        return None

    def step(self, items: Tensor, state: Tensor | None) -> tuple[Verdict, Tensor | None]:
        if self.by == "features":
            checked(items, (3,), "[n, tokens, d]", state)
        else:
            checked(items, (3, 4), "[n, tokens, values] or [n, frames, tokens, values]", state)
        now, shown = (items[:, -1], items[:, 0]) if items.ndim == 4 else (items, items)
        if not len(items):
            return Verdict.of(now.new_zeros(now.shape[:2], dtype=torch.bool)), state
        if self.reference == "previous":
            before = torch.cat([shown[:1] if state is None else state[None], shown[:-1]])
            keep = self._differ(now, before)
            if state is None:
                keep[0] = True
            return Verdict.of(keep), shown[-1].clone()
        rows = []
        for token, fresh in zip(now, shown, strict=True):
            differ = token.new_ones(len(token), dtype=torch.bool) if state is None else self._differ(token, state)
            state = fresh.clone() if state is None else torch.where(differ[:, None], fresh, state)
            rows.append(differ)
        return Verdict.of(torch.stack(rows)), state

    def _differ(self, now: Tensor, before: Tensor) -> Tensor:
        """Bool [..., tokens]: which tokens [..., tokens, d] are not dropped against those before."""
        if self.by == "features":
            change, limit = -cosine(now, before), -self.threshold
        else:
            change, limit = (now.to(wide(now)) - before.to(wide(before))).abs().mean(-1), self.threshold
        if self.share is None:
            return change >= limit
        rank = change.argsort(dim=-1, stable=True).argsort(-1)
        return rank >= int(self.share * change.shape[-1])
