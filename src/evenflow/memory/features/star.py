"""STAR memory of Flash-VStream, first version: the newest frame, means of all, an abstract, and frames brought back.

Source: Flash-VStream, arXiv 2406.08085, section 3. Verbs: all frames are admitted; what is alike is folded into means
with weights, and all into an abstract; of the frames themselves the oldest leave; all that is left is recalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..composition import Composition, Kind
from .state import ANSWERS, FeatureState, bank, pooled


class SemanticAttention(nn.Module):
    """Memory slots attend new items and move towards what they see: A ← (1 − α)·A + α·softmax(A·Wq·(e·Wk)ᵀ/√r)·e.

    The softmax is over the items, so of a single one every slot sees the same, and slots would become one: give groups.
    """

    def __init__(self, dim: int, rank: int = 32, alpha: float = 0.2) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, rank, bias=False), nn.Linear(dim, rank, bias=False)
        self.alpha = alpha

    def weights(self, memory: Tensor, items: Tensor) -> Tensor:
        """How much each slot [N, D] sees of each item [m, D]: [N, m], rows sum to one."""
        scores = self.query(memory) @ self.key(items).mT
        return (scores * self.query.out_features**-0.5).softmax(-1)

    def forward(self, memory: Tensor, items: Tensor) -> Tensor:
        """The slots after a group of items."""
        return torch.lerp(memory, self.weights(memory, items) @ items, self.alpha)


@dataclass(frozen=True)
class Star(Composition):
    """Sizes: frames (`temporal`, `abstract`, `retrieved`, `spatial` is one) and tokens a side (`fine`, `coarse`).

    bank: frames that may be brought back; the paper's 300, which its code does not keep to. group: frames that the
    abstract takes at a time (the code gives one, where all slots become equal). seed: None begins k-means without the mean
    that is cheapest to join with another; a number without one at random, as the paper does, by which scenes that have
    nothing in common become one and stay so. At the defaults 25·1 + 25·16 + 3·64 + 64 = 681 tokens.
    """

    temporal: int = 25
    abstract: int = 25
    retrieved: int = 3
    fine: int = 8
    coarse: int = 4
    bank: int = 300
    group: int = 25
    seed: int | None = None
    kind: ClassVar[Kind] = "features"
    answers: ClassVar = ANSWERS | {
        "fold": ("Means", "Every frame goes into the nearest of a few means, which keep weights and times, and all into an abstract."),
        "place": ("InOrder", "Abstract, means, details and the newest frame follow each other; a model numbers them as they come."),
    }  # fmt: skip

    @property
    def outline(self) -> str:
        return (
            f"[ abstract {self.abstract} | means {self.temporal} | details {self.retrieved} of {self.bank} frames | "
            "newest frame ]"
        )

    def build(
        self, dim: int, attention: SemanticAttention | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StarState:  # fmt: skip
        """An empty memory of features of `dim` channels. attention: the trained one; a random one without."""
        attention = SemanticAttention(dim) if attention is None else attention
        return StarState(self, dim, attention.to(device), torch.zeros(0, dtype=dtype, device=device))


@dataclass(frozen=True, eq=False)
class Reading:
    """What a question reads, each [tokens, D], in the order in which a language model gets it."""

    abstract: Tensor
    temporal: Tensor
    retrieved: Tensor
    spatial: Tensor
    frames: Tensor  # int64, numbers of the retrieved frames
    version: int  # frames that it knows of

    @property
    def tokens(self) -> Tensor:
        """All of them: 681 at the default sizes, once there were so many frames."""
        return torch.cat([self.abstract, self.temporal, self.retrieved, self.spatial])


class StarState(FeatureState):
    """A session's STAR memory."""

    def __init__(self, config: Star, dim: int, attention: SemanticAttention, like: Tensor) -> None:
        coarse = config.coarse**2 * dim
        held = bank(config.bank, coarse, (config.fine, config.fine, dim), coarse, like)
        precise = held["mean"].new_zeros
        super().__init__(held | {"abstract": precise(0, dim), "waiting": precise(0, dim)}, config.bank, config.seed)
        self.config, self.dim, self.attention = config, dim, attention

    @torch.no_grad()
    def feed(self, frames: Tensor) -> None:
        """Features [n, H, W, D] of the next frames, one after the other. Raises ValueError, and takes none, if they do
        not fit."""
        self.checked(frames, (*frames.shape[1:3], self.dim), "frames")
        fine = pooled(frames, self.config.fine)
        coarse = pooled(fine, self.config.coarse).flatten(1)
        whole = fine.mean((1, 2)).to(self.held["mean"].dtype)
        for number in range(len(frames)):
            summary = self.summary.joined(coarse[number], self.position, self.config.temporal, self.random)
            abstract, waiting = self._abstract(whole[number])
            with self._lock:
                self.held |= {"abstract": abstract, "waiting": waiting}
                self.remember(summary, coarse[number], fine[number])

    def _abstract(self, item: Tensor) -> tuple[Tensor, Tensor]:
        """Abstract and waiting items with one item more."""
        abstract, waiting = self.held["abstract"], self.held["waiting"]
        if len(abstract) < self.config.abstract:
            return torch.cat([abstract, item[None]]), waiting
        waiting = torch.cat([waiting, item[None]])
        if len(waiting) < self.config.group:
            return abstract, waiting
        return self.attention(abstract, waiting), waiting[:0]

    @torch.no_grad()
    def read(self) -> Reading:
        """A copy of what a question is answered from. Raises ValueError before the first frame."""
        with self._lock:
            slots = self.heaviest(self.config.retrieved)
            newest = (self.position - 1) % self.bank
            detail, number = self.held["detail"], self.held["number"]
            retrieved, spatial, frames = detail[slots], detail[newest].clone(), number[slots]
            abstract, temporal, version = self.held["abstract"], self.held["mean"], self.position
        parts = (abstract, temporal, retrieved, spatial)
        first, second, third, last = (x.reshape(-1, self.dim).to(detail.dtype) for x in parts)
        return Reading(first, second, third, last, frames, version)
