"""Taking the best until they hold enough: how many that is differs from query to query.

Source: the weighted cumulative sum (WiCSum) threshold of V-Rex, arXiv 2512.12284, section IV, with e^score as weight: the
sum is then attention mass. As there, nothing is sorted but the scores around the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCHES = 64  # that scores are divided into before anything is sorted


def until_mass(scores: Tensor, counts: Tensor, share: float) -> Tensor:
    """Bool [..., C]: the best by score, the fewest that hold `share` of the sum of count · e^score.

    scores: float [..., C]; counts: broadcastable to it, 0 for what is not there. Of equal scores the earlier comes
    first. share ≥ 1 takes everything that is there. Raises ValueError for a share that is not above 0.
    """
    if not share > 0:
        raise ValueError(f"share is {share}; take a share above 0 of the sum")
    there = (counts > 0).expand_as(scores)
    if share >= 1 or not scores.shape[-1]:
        return there
    wide = scores.double().masked_fill(~there, -torch.inf)
    best = wide.amax(-1, keepdim=True)
    below = torch.where(there, best - wide, 0)  # 0 is the best
    mass = torch.where(there, (-below).exp() * counts, 0)
    # A hair less than said, so that the order in which a sum is taken does not decide.
    enough = share * (1 - 1e-12) * mass.sum(-1, keepdim=True)

    width = below.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) / STRETCHES
    stretch = (below / width).long().clamp_max(STRETCHES - 1)
    held = mass.new_zeros(*mass.shape[:-1], STRETCHES).scatter_add(-1, stretch, mass).cumsum(-1)
    edge = (held < enough).sum(-1, keepdim=True).clamp_max(STRETCHES - 1)  # where the threshold is crossed
    before = torch.nn.functional.pad(held, (1, 0)).gather(-1, edge)

    inside = there & (stretch == edge)
    place = torch.where(inside, inside.cumsum(-1) - 1, -1)
    most = int(place.amax()) + 1
    slot = torch.where(inside, place, most)
    few = wide.new_full((*wide.shape[:-1], most + 1), torch.inf).scatter(-1, slot, below)[..., :most]
    order = few.argsort(dim=-1, stable=True)
    sorted_mass = mass.new_zeros(*mass.shape[:-1], most + 1).scatter(-1, slot, mass)[..., :most].gather(-1, order)
    needed = before + sorted_mass.cumsum(-1) - sorted_mass < enough
    taken = torch.zeros_like(needed).scatter(-1, order, needed)
    taken = torch.nn.functional.pad(taken, (0, 1)).gather(-1, slot)
    return there & ((stretch < edge) | (inside & taken))
