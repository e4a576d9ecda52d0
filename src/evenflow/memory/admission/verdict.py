"""What an admission says of the items of a stream, and the shape that every admission has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")

NONE, LOW, FULL = 0, 1, 2  # resolutions in which an item gets in


@dataclass(frozen=True, eq=False)
class Verdict:
    """On the n items of one call.

    keep: bool [n], or [n, tokens] where items are let in by parts; a mask over the stream as it came, so what is taken
    with it (`items[keep]`, `positions[keep]`) is still where it was. resolution: int64 [n], `NONE`, `LOW` or `FULL`.
    novelty: float32 [n], 0 for what was there before to 1 for what is all new; the first item of a stream is all new.
    """

    keep: Tensor
    resolution: Tensor
    novelty: Tensor

    @property
    def inside(self) -> Tensor:
        """Bool [n]: of which items something gets in."""
        return self.keep if self.keep.ndim == 1 else self.keep.flatten(1).any(1)

    @classmethod
    def of(cls, keep: Tensor, novelty: Tensor | None = None) -> Verdict:
        """Where what gets in does so in full. novelty: None means the share of an item that gets in."""
        parts = keep.flatten(1) if keep.ndim > 1 else keep[:, None]
        novelty = parts.float().mean(1) if novelty is None else novelty.float()
        return cls(keep, torch.where(parts.any(1), FULL, NONE), novelty)


class Admission(Protocol[State]):
    """What decides, before any memory, which items of a stream get in.

    A frozen dataclass. Its state is tensors and counts, of a size that does not grow, and never changed in place, so a
    fork is the state itself. Items of one call are judged as if they came one by one.
    """

    def start(self) -> State:
        """The state before the first item."""

    def step(self, items: Tensor, state: State) -> tuple[Verdict, State]:
        """Judge items [n, …], float, n ≥ 0. Raises ValueError, and changes nothing, for items that do not fit."""


def checked(items: Tensor, dims: tuple[int, ...], shape: str, like: Tensor | None = None) -> Tensor:
    """`items`, if they are finite numbers, [n, …] with so many axes, and `like`, which those before left, fits them."""
    if not items.is_floating_point() or items.ndim not in dims:
        raise ValueError(f"items are {items.dtype} {tuple(items.shape)}; expected float {shape}")
    if like is not None and (items.shape[items.ndim - like.ndim :] != like.shape or wide(items) != wide(like)):
        raise ValueError(
            f"items are {items.dtype} {tuple(items.shape)}, what came before is {like.dtype} {tuple(like.shape)} each; "
            "begin a stream of other items with start()"
        )
    if not bool(items.isfinite().all()):
        raise ValueError("items hold NaN or infinity; leave such items out or repair them, nothing was judged")
    return items


def wide(x: Tensor) -> torch.dtype:
    """What is computed in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Along the last axis, in float32 at least and never over 1; of two zero vectors 1, of a zero and another 0."""
    a, b = a.to(wide(a)), b.to(wide(b))
    lengths = a.norm(dim=-1), b.norm(dim=-1)
    product = lengths[0] * lengths[1]
    alike = (a * b).sum(-1) / product.clamp_min(torch.finfo(product.dtype).tiny)
    return torch.where((lengths[0] == 0) & (lengths[1] == 0), 1, alike).clamp(-1, 1)
