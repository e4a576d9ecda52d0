"""Chooses the next token from logits, with transformers' own logits processors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_WORD = (1 << 64) - 1


def uniform(*key: int) -> float:
    """A number in [0, 1) that depends on `key` and on nothing else.

    There is no hidden generator state: a stream that is saved, forked or replayed draws the same numbers. The mixing
    is splitmix64 (Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014), chained over the key.
    """
    word = 0
    for part in key:
        word = (word + (part & _WORD) + 0x9E3779B97F4A7C15) & _WORD
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        word ^= word >> 31
    return (word >> 11) * 2.0**-53


class Chooser:
    """Greedy at temperature 0, else sampling from what temperature, top_k and top_p leave."""

    def __init__(
        self,
        temperature: float,
        top_p: float,
        top_k: int | None,
        seed: int | None,
        processors: LogitsProcessorList | None,
    ) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; it must be a whole number, 1 or more, or None")
        self.processors = LogitsProcessorList(processors or [])
        self.sees_ids = bool(self.processors)
        self.greedy = temperature == 0
        if not self.greedy:
            if temperature != 1:
                self.processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_k is not None:
                self.processors.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self.processors.append(TopPLogitsWarper(float(top_p)))
        # Without a seed the draw still follows torch.manual_seed.
        self.seed = int(torch.randint(2**62, ())) if seed is None and not self.greedy else seed or 0

    def choose(self, ids: Tensor, logits: Tensor, positions: list[int]) -> Tensor:
        """Next token of each row, int64 [B]; ids [B, n] for processors that look back, logits [B, V]."""
        scores = self.processors(cast(torch.LongTensor, ids), logits.float()) if self.processors else logits
        if self.greedy:
            return scores.argmax(-1)
        mass = torch.softmax(scores.double(), -1).cumsum(-1)
        total = mass[:, -1:]
        draws = [[uniform(self.seed, row, position)] for row, position in enumerate(positions)]
        draw = torch.tensor(draws, dtype=torch.float64, device=mass.device) * total
        # Strictly below the total, so that rounding never lands behind the last token that has any mass.
        draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, draw, right=True)[:, 0]
