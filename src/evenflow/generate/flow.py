"""Noise levels, and what one network call makes of noisy latents: flow matching, and the consistency steps of LCM.

A *level* is a number 0 … T: 0 is what a frame enters with, T is clean. What a level means is a `Sampler`'s matter, which
frames hold which level is a schedule's. Random numbers come from a key (seed, frame, level) alone, so a stream that is
forked, resumed or cut otherwise draws the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..memory.keyed import keyed

TABLE = 1000  # entries of a noise table, and the time of pure noise


def noise(seed: int, key: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Gaussian numbers of one key, float32 on the CPU; the same on every machine, whatever else was drawn."""
    return torch.randn(*shape, generator=keyed(seed, *key))


@cache
def sigma_table(shift: float = 5.0) -> Tensor:
    """Noise levels σ of flow matching from 1 down, float64 [1000]: σ = s·u/(1 + (s − 1)·u) of u = 1, 0.999, …, 0.001.

    Source: Self Forcing, arXiv 2506.08009 (Wan's schedule).
    """
    u = torch.arange(TABLE, 0, -1, dtype=torch.float64) / TABLE
    return shift * u / (1 + (shift - 1) * u)


def nearest(sigma: Tensor | float, shift: float = 5.0) -> Tensor:
    """The entry of the table that is nearest to `sigma`, float64 of its shape."""
    table = sigma_table(shift)
    wanted = torch.as_tensor(sigma, dtype=torch.float64)
    return table[(wanted[..., None] - table).abs().argmin(-1)]


def warped(steps: Sequence[float], shift: float = 5.0) -> tuple[float, ...]:
    """Noise levels σ of nominal times: time d is entry 1000 − d of the table, 0 is clean."""
    table = sigma_table(shift)
    for step in steps:
        if not 0 <= step <= TABLE:
            raise ValueError(f"a step is {step}; nominal times lie between 0 and {TABLE}, which is noise")
    return tuple(0.0 if step < 1 else float(table[TABLE - round(step)]) for step in steps)


def even(levels: int) -> tuple[float, ...]:
    """Nominal times of so many levels at equal distances: 5 are 1000, 800, 600, 400, 200."""
    return tuple(TABLE * (levels - i) / levels for i in range(levels))


class Sampler(ABC):
    """What levels mean. `levels` is T; `times` what the network is told at each, and 0 for clean."""

    times: tuple[float, ...]

    @property
    def levels(self) -> int:
        """T, the number of noisy levels."""
        return len(self.times)

    def t(self, levels: Sequence[int]) -> list[float]:
        """What the network is told for frames at these levels."""
        return [self.times[level] if level < self.levels else 0.0 for level in levels]

    @abstractmethod
    def enter(self, source: Tensor | None, noise: Tensor) -> Tensor:
        """A latent at level 0: noise alone, or a given clean latent with the noise of level 0."""

    @abstractmethod
    def clean(self, x: Tensor, out: Tensor, before: Sequence[int]) -> Tensor:
        """The clean latents that the network's output means.

        x, out [B, F, C, H, W]; before: a level for each frame, F of them, or B·F where rows differ.
        """

    @abstractmethod
    def toward(self, x: Tensor, clean: Tensor, before: Sequence[int]) -> Tensor:
        """The output that would mean `clean`."""

    @abstractmethod
    def move(
        self, x: Tensor, out: Tensor, before: Sequence[int], after: Sequence[int], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Clean latents as the network sees them now, and latents at the levels `after`; in the dtype of x."""

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether `move` needs fresh noise."""


def _spread(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number a frame, or one a frame and row, float64, to be multiplied with [B, F, C, H, W]."""
    made = torch.tensor(list(numbers), dtype=torch.float64, device=like.device)
    return made.view(-1 if len(numbers) != like.shape[1] else 1, like.shape[1], 1, 1, 1)


@dataclass(frozen=True)
class Flow(Sampler):
    """Flow matching, x = (1 − σ)·x0 + σ·ε, network output v = ε − x0.

    sigmas: σ of levels 0 … T − 1. times: what the network is told, 1000·σ by default. euler: move along v instead of
    going to the clean latent and back to the next level with fresh noise. entry: σ that a given latent enters with,
    sigmas[0] by default. Computed in float64, as the released Self-Forcing does.
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...] = ()
    euler: bool = False
    entry: float | None = None

    def __post_init__(self) -> None:
        if not self.sigmas or any(b >= a for a, b in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError(f"noise levels are {self.sigmas}; they must fall, and there must be one or more")
        if not self.times:
            object.__setattr__(self, "times", tuple(TABLE * sigma for sigma in self.sigmas))

    @classmethod
    def of(cls, steps: Sequence[float], shift: float = 5.0, euler: bool = False) -> Flow:
        """The levels of nominal times, warped by the table of a shift."""
        return cls(warped(steps, shift), euler=euler)

    def sigma(self, levels: Sequence[int]) -> list[float]:
        """σ of levels."""
        return [self.sigmas[level] if level < self.levels else 0.0 for level in levels]

    def enter(self, source: Tensor | None, noise: Tensor) -> Tensor:
        if source is None:
            return noise
        sigma = self.sigmas[0] if self.entry is None else self.entry
        return ((1 - sigma) * source.double() + sigma * noise.double()).to(noise.dtype)

    def clean(self, x: Tensor, out: Tensor, before: Sequence[int]) -> Tensor:
        return (x.double() - self._sigma(before, x) * out.double()).to(x.dtype)

    def toward(self, x: Tensor, clean: Tensor, before: Sequence[int]) -> Tensor:
        return ((x.double() - clean.double()) / self._sigma(before, x)).to(x.dtype)

    def move(
        self, x: Tensor, out: Tensor, before: Sequence[int], after: Sequence[int], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        now, then, wide = self._sigma(before, x), self._sigma(after, x), out.double()
        clean = x.double() - now * wide
        if self.euler:
            return clean.to(x.dtype), (x.double() + (then - now) * wide).to(x.dtype)
        moved = clean if noise is None else (1 - then) * clean + then * noise.double()
        return clean.to(x.dtype), moved.to(x.dtype)

    @property
    def draws(self) -> bool:
        return not self.euler

    def _sigma(self, levels: Sequence[int], x: Tensor) -> Tensor:
        return _spread(self.sigma(levels), x)


SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0


@dataclass(frozen=True)
class Consistency(Sampler):
    """Steps of a latent consistency model, x_t = α·x0 + β·ε with α = √ᾱ_t, on timesteps of a 1000-step training.

    timesteps: of levels 0 … T − 1, noisiest first. alphas: √ᾱ of each. predicts: "noise" (Stable Diffusion) or "v"
    (RAIN). The clean latent is c_out·x̂0 + c_skip·x with the boundary scalings of LCM (σ_data 0.5, timestep scaling 10),
    and goes to the next level with fresh noise; after the last level ᾱ is 1. Computed in float64.

    Source: StreamDiffusion, arXiv 2312.12491; RAIN, arXiv 2412.19489.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    predicts: str = "noise"

    @classmethod
    def of(cls, timesteps: Sequence[int], predicts: str = "noise", zero_snr: bool = False) -> Consistency:
        """On Stable Diffusion's table: scaled-linear β from 0.00085 to 0.012; zero_snr makes the last step pure noise."""
        table = alpha_table(zero_snr)
        return cls(tuple(timesteps), tuple(float(table[t]) for t in timesteps), predicts)

    @property
    def times(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple(map(float, self.timesteps))

    def enter(self, source: Tensor | None, noise: Tensor) -> Tensor:
        if source is None:
            return noise
        alpha = self.alphas[0]
        return (alpha * source.double() + (1 - alpha**2) ** 0.5 * noise.double()).to(noise.dtype)

    def clean(self, x: Tensor, out: Tensor, before: Sequence[int]) -> Tensor:
        return self._clean(x, out, before).to(x.dtype)

    def _clean(self, x: Tensor, out: Tensor, before: Sequence[int]) -> Tensor:
        alpha, beta = self._alpha_beta(before, x)
        if self.predicts == "v":
            return alpha * x.double() - beta * out.double()
        return (x.double() - beta * out.double()) / alpha

    def toward(self, x: Tensor, clean: Tensor, before: Sequence[int]) -> Tensor:
        alpha, beta = self._alpha_beta(before, x)
        if self.predicts == "v":
            return ((alpha * x.double() - clean.double()) / beta).to(x.dtype)
        return ((x.double() - alpha * clean.double()) / beta).to(x.dtype)

    def move(
        self, x: Tensor, out: Tensor, before: Sequence[int], after: Sequence[int], noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scaled = [TIMESTEP_SCALING * t for t in self.t(before)]
        skip = [SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2) for t in scaled]
        keep = [t / (t**2 + SIGMA_DATA**2) ** 0.5 for t in scaled]
        clean = _spread(keep, x) * self._clean(x, out, before) + _spread(skip, x) * x.double()
        alpha, beta = self._alpha_beta(after, x)
        moved = alpha * clean if noise is None else alpha * clean + beta * noise.double()
        return clean.to(x.dtype), moved.to(x.dtype)

    @property
    def draws(self) -> bool:
        return True

    def _alpha_beta(self, levels: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        alphas = [self.alphas[level] if level < self.levels else 1.0 for level in levels]
        alpha = _spread(alphas, x)
        return alpha, (1 - alpha**2).clamp_min(0).sqrt()


@cache
def alpha_table(zero_snr: bool = False) -> Tensor:
    """√ᾱ of Stable Diffusion's 1000 training steps, float64 [1000]; zero_snr: rescaled so that the last has no signal."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TABLE, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0).sqrt()
    if zero_snr:
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    return alphas
