"""Taking the best until they hold enough: how many that is differs from query to query.

Source: the weighted cumulative sum (WiCSum) threshold of V-Rex, arXiv 2512.12284, section IV, with e^score as weight: the
sum is then attention mass. As there, nothing is sorted but the scores around the threshold.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weights = Literal["exp", "shifted"]
STRETCHES = 64  # that scores are divided into before anything is sorted


def until_mass(scores: Tensor, counts: Tensor, share: float, weights: Weights = "exp") -> Tensor:
    """Bool [..., C]: the best by score, the fewest that hold `share` of the sum of count · e^score.

    weights: "shifted" takes the score less the least one instead of e^score, which is then hardly ever near to all of it.
    scores: float [..., C]; counts: broadcastable to it, 0 for what is not there. Of equal scores the earlier comes
    first. share ≥ 1 takes everything that is there. Raises ValueError for a share that is not above 0.
    """
    if not share > 0:
        raise ValueError(f"share is {share}; take a share above 0 of the sum")
    there = counts > 0
    if share >= 1 or not scores.numel():
        return there.expand_as(scores)
    below, counted = -scores.double(), counts.double().expand_as(scores)  # how far each is below the best
    gaps = not bool(there.all())
    if gaps:
        below = below.masked_fill(~there, torch.inf)
    below -= below.amin(-1, keepdim=True)
    if gaps:
        below = below.masked_fill(~there, 0)
    most = below.amax(-1, keepdim=True)
    mass = ((-below).exp_() if weights == "exp" else most - below).mul_(counted)
    # A hair less than said, so that the order in which a sum is taken does not decide.
    enough = share * (1 - 1e-12) * mass.sum(-1, keepdim=True)

    width = (most / STRETCHES).clamp_min_(torch.finfo(torch.float64).tiny)
    stretch = (below / width).long().clamp_(0, STRETCHES - 1)  # also of what is no number
    held = mass.new_zeros(*mass.shape[:-1], STRETCHES).scatter_add_(-1, stretch, mass).cumsum(-1)
    edge = (held < enough).sum(-1, keepdim=True).clamp_max(STRETCHES - 1)  # where the threshold is crossed
    so_far = torch.nn.functional.pad(held, (1, 0)).gather(-1, edge).flatten()
    taken = stretch < edge
    inside = stretch == edge
    if gaps:
        taken, inside = taken & there, inside & there

    # Only what lies in the stretch with the threshold is sorted, side by side.
    at = inside.flatten().nonzero()[:, 0]
    row = at // scores.shape[-1]
    count = torch.bincount(row, minlength=len(so_far))
    place = torch.arange(len(at), device=at.device) - (count.cumsum(0) - count)[row]
    few, own = (mass.new_full((len(count), int(count.max())), fill) for fill in (torch.inf, 0.0))
    few[row, place], own[row, place] = below.flatten()[at], mass.flatten()[at]
    order = few.argsort(dim=-1, stable=True)
    own = own.gather(-1, order)
    needed = so_far[:, None] + own.cumsum(-1) - own < enough.flatten()[:, None]
    taken.view(-1)[at] = torch.empty_like(needed).scatter(-1, order, needed)[row, place]
    return taken
