"""Aligning a few-step generator by its branches: a likelihood from what it would predict itself, and rewards against what it
does anyway.

Branches of one history attend other parts of it (recipe `kvpo`); all noise is shared. Each branch's noisy inputs are then
replayed with the history as it is in use, un-routed: the nearer the model's own clean prediction is to the branch's, the
likelier the branch. Raising a good branch's likelihood makes the model go there by itself. Source: KVPO, arXiv 2605.14278,
sections on trajectory velocity energy and anchor-relative optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-8
LOG_RATIO = 20.0  # bound of a log ratio, so that no exponential overflows


@dataclass(frozen=True)
class KVPO:
    """clip: of the ratio, from below and above. kl: weight of the divergence from the first policy. temperature: what
    energies are divided by; 1 as published, smaller where mean errors are so small that all branches look alike. local,
    whole: weights of the rewards of the perturbed chunk and of all that follows. bound: of an advantage. protect: "scale"
    halves the loss of a group in which no branch beats the anchor, "skip" drops it.
    """

    clip: tuple[float, float] = (0.9, 1.2)
    kl: float = 10.0
    temperature: float = 1.0
    local: float = 1.0
    whole: float = 0.5
    bound: float = 2.5
    protect: Literal["scale", "skip"] = "scale"

    def __post_init__(self) -> None:
        if not 0 < self.clip[0] <= 1 <= self.clip[1]:
            raise ValueError(f"clip is {self.clip}; it must hold 1, from above 0 on")
        if self.temperature <= 0 or self.bound <= 0 or self.kl < 0:
            raise ValueError(f"expected temperature and bound over 0 and kl of 0 or more, got {self}")
        if self.protect not in ("scale", "skip"):
            raise ValueError(f"protect is {self.protect!r}; expected 'scale' or 'skip'")


# -- likelihood ------------------------------------------------------------------------------------------------------


def energy(stored: Tensor, replayed: Tensor, sigmas: Tensor, floor: float = 1.0) -> Tensor:
    """Trajectory velocity energy of each branch, [G]: Σ over steps of the mean squared error of x0 over 2·max(σ, floor)².

    stored, replayed: clean predictions [G, steps, …] of the branch and of the model; sigmas: noise levels [steps].
    """
    if stored.shape != replayed.shape or stored.ndim < 3 or sigmas.shape != stored.shape[1:2]:
        raise ValueError(
            f"predictions are {tuple(stored.shape)} and {tuple(replayed.shape)}, levels {tuple(sigmas.shape)}; expected "
            "[G, steps, …] twice and [steps]"
        )
    error = (stored - replayed).square().flatten(2).mean(2)
    return (error / (2 * sigmas.clamp_min(floor).square())).sum(1)


def velocity_energy(stored: Tensor, replayed: Tensor, sigmas: Tensor, floor: float = 1.0) -> Tensor:
    """The same of velocities ε − x0 at equal inputs: an x0 is x − σv, so its error is σ times the velocity's."""
    scale = sigmas.view(1, -1, *(1,) * (stored.ndim - 2))
    return energy(scale * stored, scale * replayed, sigmas, floor)


def log_policy(energies: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithms of the Gibbs distribution over the branches of a group, [..., G]."""
    return (-energies / temperature).log_softmax(-1)


# -- rewards ---------------------------------------------------------------------------------------------------------


def against_anchor(rewards: Tensor, anchor: Tensor, weights: Tensor | None = None) -> Tensor:
    """How much better each branch was than the anchor, [G]: per component in deviations of all G + 1 rewards, then summed.

    rewards: [G] or [G, components]; anchor: [] or [components]; weights: [components], 1 each. 0 is as good as what the
    model does anyway; units of a reward do not matter.
    """
    rewards, anchor = rewards.view(len(rewards), -1), anchor.view(1, -1)
    if rewards.shape[1] != anchor.shape[1]:
        raise ValueError(f"branches have {rewards.shape[1]} rewards, the anchor {anchor.shape[1]}; expected as many")
    apart = (rewards - anchor) / (torch.cat([rewards, anchor]).std(0) + EPS)
    return apart.sum(1) if weights is None else apart @ weights


@dataclass(frozen=True, eq=False)
class Advantages:
    """value: [G], clamped. safe: whether at least one branch beat the anchor, on the perturbed chunk or on the whole."""

    value: Tensor
    safe: bool


def advantages(local: Tensor, whole: Tensor | None, config: KVPO) -> Advantages:
    """Fuse what `against_anchor` says of the perturbed chunk and of all that follows (None: nothing follows), [G] each.

    Each is divided by its deviation, and nothing is subtracted: a sign stays what it is.
    """
    fused, safe = torch.zeros_like(local), False
    for weight, apart in ((config.local, local), (config.whole, whole)):
        if apart is not None:
            fused = fused + weight * apart / (apart.std(correction=0) + EPS)
            safe |= bool((apart > 0).any())
    return Advantages(fused.clamp(-config.bound, config.bound), safe)


# -- objective -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loss:
    """total: what is to be minimised; policy and divergence: its parts; protection: s. energy: the mean of the group, which
    the objective cannot see, as it looks at differences: watch that it does not rise."""

    total: Tensor
    policy: Tensor
    divergence: Tensor
    protection: float
    energy: Tensor


def objective(energies: Tensor, old: Tensor, first: Tensor, gained: Advantages, config: KVPO) -> Loss:
    """The clipped objective of one group. energies: of the model as it is, [G]; old: as it was when the group was made;
    first: before all training; both without gradients.

    At energies = old the gradient of the policy's part by a branch's logit is −(A − π ΣA)/G. The anchor's slot has logit 0
    beside log-probabilities that sum to 1: its share is one half, whatever G, and none in a safe group.
    """
    log, log_old, log_first = (log_policy(e, config.temperature) for e in (energies, old.detach(), first.detach()))
    ratio = (log - log_old).clamp(-LOG_RATIO, LOG_RATIO).exp()
    least = torch.minimum(ratio * gained.value, ratio.clamp(*config.clip) * gained.value)
    policy, divergence = -least.mean(), (log.exp() * (log - log_first)).sum()
    protection = 1.0 if gained.safe else 0.5 if config.protect == "scale" else 0.0
    total = protection * (policy + config.kl * divergence)
    return Loss(total, policy, divergence, protection, energies.detach().mean())
