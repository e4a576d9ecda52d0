"""Both lanes of a finished stream as one sequence, for training: what each token sees, and where it stands.

A forward pass over the packed sequence with this mask and these positions gives what the two lanes give as they grow.
Sources: Speak While Watching, arXiv 2601.06843, section 3; TaYS, arXiv 2603.02872, section 3; Think While Watching,
arXiv 2603.11896, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lane_places import End, LanePlace, placed, words


def packed_mask(target: Tensor, unit: Tensor, *, shift: bool = False) -> Tensor:
    """Which tokens each token of a packed sequence may attend, bool [..., N, N] (row: query, column: key).

    target: bool [..., N], whether a token is of the target lane; the others are of the source lane. unit: int64 [..., N],
    the unit of each, −1 for padding, which nobody attends but itself. Lanes may be packed in any order (all that is seen,
    then all that is said; or unit by unit), each in its own.

    The source lane sees itself, causally. The target lane sees the source lane's units up to its own, and itself,
    causally. shift: a token of the target lane sees of the source lane what the next one sees, which it predicts: the last
    of a unit, held back in a stream, then belongs to the unit that it ends. Without, it counts as the next unit's first.
    """
    if target.dtype != torch.bool or target.shape != unit.shape or unit.is_floating_point():
        raise ValueError(
            f"target is {target.dtype} {tuple(target.shape)}, unit {unit.dtype} {tuple(unit.shape)}; expected bool and "
            "whole numbers of one shape"
        )
    real = unit >= 0
    sees = _of_next(target & real, unit) if shift else unit
    order = torch.arange(unit.shape[-1], device=unit.device)
    before = order <= order[:, None]
    seen = unit[..., None, :] <= sees[..., :, None]
    asks, said = target[..., :, None], target[..., None, :]
    mask = torch.where(said, asks & before, torch.where(asks, seen, before)) & real[..., None, :]
    return mask | (order == order[:, None])


def _of_next(target: Tensor, unit: Tensor) -> Tensor:
    """For each token of the target lane the unit of its next one; the last keeps its own."""
    order = (~target).to(torch.uint8).argsort(dim=-1, stable=True)
    following = torch.minimum(target.cumsum(-1), target.sum(-1, keepdim=True) - 1).clamp_min(0)
    return torch.where(target, unit.gather(-1, order).gather(-1, following), unit)


def packed_positions(
    place: LanePlace, source: Sequence[Sequence[int | Tensor]], target: Sequence[int], *, axes: int = 1,
    origin: str = "unit",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the tokens of both lanes stand, int64 [S, axes] and [T, axes], each lane in its order.

    source: the runs of each unit, in order: a number of words, or int64 [m, axes], the coordinates of picture tokens.
    target: tokens of each unit, each whole; a unit fewer than in `source` has none. origin: see `Lanes`.
    """
    seen: list[Tensor] = []
    said: list[Tensor] = []
    ends: tuple[list[End], list[End]] = ([], [])
    began = -1  # where the coordinates of the run that goes on count from
    for unit, runs in enumerate(source):
        top = place.before_source(unit, *ends)
        began = began if origin == "video" else -1
        for run in runs:
            fresh = words(top + 1 + torch.arange(run), axes) if isinstance(run, int) else placed(run, top, began)
            if len(fresh):
                seen.append(fresh)
                top, began = max(top, int(fresh[:, :axes].max())), int(fresh[-1, axes])
        ends[0].append(End(sum(map(_size, runs)) + (ends[0][-1].length if unit else 0), top))
        count, before = target[unit] if unit < len(target) else 0, place.before_target(unit, *ends)
        said.append(words(before + 1 + torch.arange(count), axes))
        ends[1].append(End(count + (ends[1][-1].length if unit else 0), before + count))
    empty = torch.zeros(0, axes + 1, dtype=torch.int64)
    return torch.cat([empty, *seen])[:, :axes], torch.cat([empty, *said])[:, :axes]


def _size(run: int | Tensor) -> int:
    return run if isinstance(run, int) else len(run)


def packed_loss(
    logits: Tensor, ids: Tensor, target: Tensor, learned: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the target lane's tokens, each predicted where the one before it in that lane was fed.

    logits [..., N, V]; ids int64, target and learned bool, [..., N]. learned: whose prediction counts; what only seeds a
    unit (header, prompt) and what is seen does not. weights: float [V], of each id (TaYS: ½ for `<skip>`, 1 otherwise);
    the mean is over weights. The first token of the lane is predicted nowhere. Raises ValueError if nothing counts.
    """
    order = (~target).to(torch.uint8).argsort(dim=-1, stable=True)
    before = order.roll(1, -1)  # in the lane's order; what comes round to the first is masked
    ids, counts = ids.gather(-1, order), (target & learned).gather(-1, order)
    counts[..., 0] = False
    scores = logits.gather(-2, before[..., None].expand_as(logits))
    if not bool(counts.any()):
        raise ValueError("no token counts: `learned` must hold tokens of the target lane behind its first")
    return torch.nn.functional.cross_entropy(scores[counts], ids[counts], weight=weights)
