"""Training by branches: a video model comes to do without routes what the best of its branches did with them.

Source: KVPO, arXiv 2605.14278, section on the objective, and its released training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...memory.chunks import ArenaState
from ...models.video import VideoTransformer
from .branches import Branches, explored, replayed
from .kvpo import KVPO, Advantages, advantages, against_anchor, objective
from .run import Average, grown

Reward = Callable[[Tensor], Tensor]  # latents [B, F, C, H, W] → [B] or [B, components]


@dataclass(frozen=True)
class Rates:
    """rate, decay: of AdamW. warmup: updates. sync: rollouts after which the old policy becomes the present one. average:
    how much of the averaged weights stays at an update. graded: steps of a block that carry a gradient."""

    rate: float = 1e-5
    decay: float = 0.01
    warmup: int = 5
    sync: int = 2
    average: float = 0.999
    graded: int = 2

    def __post_init__(self) -> None:
        if self.sync < 1 or self.graded < 1 or self.rate <= 0:
            raise ValueError(f"expected sync and graded of 1 or more and a rate over 0, got {self}")


def gains(
    branches: Branches, reward: Reward, config: KVPO, routed: int, weights: Tensor | None = None
) -> list[Advantages]:
    """Advantages of every history's branches. routed: frames of the routed blocks; what follows is judged as the whole."""
    groups, each = branches.frames.shape[:2]

    def apart(frames: Tensor) -> list[Tensor]:
        found = reward(frames.flatten(0, 1)).view(groups, each, -1)
        return [against_anchor(one[:-1], one[-1], weights) for one in found]

    local, rest = apart(branches.frames[:, :, :routed]), branches.frames[:, :, routed:]
    whole = apart(rest) if rest.shape[2] else [None] * groups
    return [advantages(*pair, config) for pair in zip(local, whole, strict=True)]


class Alignment:
    """A model in training, the policy that explores (old), the one before all training (first), and a slow average.

    A group in which all rewards are alike has advantages of 0.
    """

    def __init__(
        self, model: VideoTransformer, sigmas: Sequence[float], config: KVPO | None = None, rates: Rates | None = None
    ) -> None:
        self.model, self.sigmas = model, list(sigmas)
        self.config, self.rates = config or KVPO(), rates or Rates()
        self.old, self.first = (copy.deepcopy(model).requires_grad_(False) for _ in range(2))
        parameters = list(model.requires_grad_(True).parameters())
        self.optimizer = torch.optim.AdamW(parameters, self.rates.rate, weight_decay=self.rates.decay)
        self.average = Average(model, self.rates.average)
        self.rollouts = self.updates = 0

    def explore(self, state: ArenaState, text: Tensor, seed: int, latent: tuple[int, int], after: int = 0) -> Branches:
        """Branches of the old policy, which becomes the present model every `sync` rollouts. text: embeddings [N, L, dim]."""
        if self.rollouts % self.rates.sync == 0:
            self.old.load_state_dict(self.model.state_dict())
        self.rollouts += 1
        with torch.no_grad():
            return explored(self.old, state, self.old.read(text), self.sigmas, seed, latent, after)

    def learn(
        self, state: ArenaState, text: Tensor, branches: Branches, gained: Sequence[Advantages]
    ) -> dict[str, float]:
        """One update with the branches of `state`, which stays as it is: what the loss was made of, as means of the groups."""

        def energies(model: VideoTransformer) -> Tensor:
            return replayed(model, state, model.read(text), self.sigmas, branches, self.rates.graded)

        with torch.no_grad():
            old, first = energies(self.old), energies(self.first)
        each = zip(energies(self.model), old, first, gained, strict=True)
        losses = [objective(*parts, self.config) for parts in each]
        torch.stack([loss.total for loss in losses]).mean().backward()
        warm = min(1.0, (self.updates + 1) / max(1, self.rates.warmup))
        norm = grown(self.optimizer, list(self.model.parameters()), self.rates.rate * warm)
        self.updates += 1
        self.average.update(self.model)
        with torch.no_grad():
            return {
                "loss": float(torch.stack([loss.total for loss in losses]).mean()),
                "divergence": float(torch.stack([loss.divergence for loss in losses]).mean()),
                "energy": float(torch.stack([loss.energy for loss in losses]).mean()),
                "safe": sum(one.safe for one in gained) / len(gained),
                "norm": norm,
            }
