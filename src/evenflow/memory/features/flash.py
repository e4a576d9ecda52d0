"""Flash Memory of Flash-VStream, second version: means of all that was seen in low resolution, details of the heaviest.

Source: Flash-VStream, arXiv 2506.23825, section 3. Verbs: all units are admitted; what is alike is folded into means
with weights and times; of the details the oldest leave; all means and the details of the heaviest are recalled, placed
on three axes at the time of what they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..composition import Composition, Kind
from .state import ANSWERS, FeatureState, bank


@dataclass(frozen=True)
class Flash(Composition):
    """synopsis: means in low resolution; details: units in full resolution; bank: units that may be details, in all.

    full: rows and columns of a unit's features before the model's merger, which makes one token of merge × merge of
    them; low resolution has half as many each way. At the defaults 30·256 + 60·64 = 11,520 tokens. The paper keeps every
    unit in its bank, on disk if need be; here the bank is bounded, and of a mean whose units have left it the detail is
    the unit most like it that is still there. seed: as in `Star`.
    """

    synopsis: int = 60
    details: int = 30
    full: tuple[int, int] = (32, 32)
    merge: int = 2
    bank: int = 300
    seed: int | None = None
    kind: ClassVar[Kind] = "features"
    answers: ClassVar = ANSWERS | {
        "fold": ("Means", "Every unit goes, in low resolution, into the nearest of the means, which keep weights and times."),
        "place": ("TimeRowColumn", "Three axes: time, row and column of what a token comes from."),
    }  # fmt: skip

    @property
    def outline(self) -> str:
        return f"[ means {self.synopsis} in low resolution | details {self.details} of {self.bank} units ]"

    def __post_init__(self) -> None:
        if any(side % (2 * self.merge) for side in self.full):
            raise ValueError(f"full is {self.full}; rows and columns must divide by {2 * self.merge}, half of them too")
        if self.details > self.bank:
            raise ValueError(f"{self.details} details need a bank of as many units at least, not {self.bank}")

    def build(self, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> FlashState:
        """An empty memory of features of `dim` channels."""
        return FlashState(self, dim, torch.zeros(0, dtype=dtype, device=device))


@dataclass(frozen=True, eq=False)
class Reading:
    """What a question reads.

    details: [n, *full, D], units `numbers` int64 [n]; synopsis: [k, *half, D] of `times` float64 [k]. coordinates:
    int64 [tokens, 3], time, row and column of each token that the merger makes of the details, then of the synopsis,
    from 0 on: add where the pictures begin. version: units that it knows of.
    """

    details: Tensor
    synopsis: Tensor
    numbers: Tensor
    times: Tensor
    coordinates: Tensor
    version: int


def grids(times: Tensor, rows: int, columns: int) -> Tensor:
    """Time, row and column of every token of units at `times` [n]: int64 [n·rows·columns, 3]."""
    axes = (torch.arange(n, device=times.device) for n in (rows, columns))
    grid = torch.cartesian_prod(*axes)
    return torch.cat(
        [times.repeat_interleave(len(grid))[:, None].long(), grid.repeat(len(times), 1)], 1
    )  # fmt: skip


class FlashState(FeatureState):
    """A session's Flash memory."""

    def __init__(self, config: Flash, dim: int, like: Tensor) -> None:
        self.half = (config.full[0] // 2, config.full[1] // 2)
        size = self.half[0] * self.half[1] * dim
        super().__init__(bank(config.bank, size, (*config.full, dim), size, like), config.bank, config.seed)
        self.config, self.dim = config, dim

    @torch.no_grad()
    def feed(self, full: Tensor, half: Tensor) -> None:
        """Features of the next units in both resolutions, [n, *full, D] and [n, *half, D]. Raises ValueError, and takes
        none, if they do not fit."""
        self.checked(full, (*self.config.full, self.dim), "units in full resolution")
        self.checked(half, (*self.half, self.dim), "units in half resolution")
        if len(full) != len(half):
            raise ValueError(f"{len(full)} units in full resolution and {len(half)} in half; give both of each")
        for detail, key in zip(full, half.flatten(1), strict=True):
            summary = self.summary.joined(key, self.position, self.config.synopsis, self.random)
            with self._lock:
                self.remember(summary, key, detail)

    @torch.no_grad()
    def read(self) -> Reading:
        """A copy of what a question is answered from. Raises ValueError before the first unit."""
        with self._lock:
            slots = self.heaviest(self.config.details)
            details, numbers = self.held["detail"][slots], self.held["number"][slots]
            summary, version = self.summary, self.position
        rows, columns = (side // self.config.merge for side in self.config.full)
        fine = grids(numbers, rows, columns)
        coarse = grids(summary.time.round(), rows // 2, columns // 2) + len(fine)
        synopsis = summary.mean.view(-1, *self.half, self.dim).to(details.dtype)
        return Reading(details, synopsis, numbers, summary.time, torch.cat([fine, coarse]), version)
