"""Drawn tracks as condition channels: which pixel a named point is at, at every frame.

Source: MotionStream, arXiv 2511.01266 (track encoding). A canvas is zero where nothing is said. Where two tracks meet in
one cell their embeddings are added (unconfirmed in the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8  # channels of a track's name, for each of the 4 pixel frames of a latent


def named(ids: Tensor, width: int = WIDTH) -> Tensor:
    """Embeddings [N, width] of track names: sines and cosines of `ids`, whole numbers [N]."""
    omega = 100.0 ** (-torch.arange(width // 2) / (width // 2))
    angle = ids.float()[:, None] * omega.to(ids.device)
    return torch.cat([angle.sin(), angle.cos()], -1)


def canvas(points: Tensor, visible: Tensor, ids: Tensor, size: tuple[int, int], stride: tuple[int, int, int]) -> Tensor:
    """Condition channels [F, time·width, rows, columns] of tracks.

    points: x and y in pixels, [P, N, 2] for P = time·F pixel frames; visible: bool [P, N], False also for a point that
    lies outside; ids: whole numbers [N]; size: rows and columns of the canvas; stride: pixel frames, rows and columns
    of pixels of one of its cells.
    """
    time, (rows, columns) = stride[0], size
    frames, width = len(points), WIDTH
    if frames % time:
        raise ValueError(f"tracks have {frames} frames; give whole groups of {time}")
    cell = torch.stack([points[..., 1] / stride[1], points[..., 0] / stride[2]], -1).floor().long()
    inside = visible & (cell >= 0).all(-1) & (cell < torch.tensor([rows, columns], device=cell.device)).all(-1)
    frame, track = inside.nonzero(as_tuple=True)
    at = cell[frame, track]
    drawn = torch.zeros(frames, rows, columns, width, device=points.device)
    drawn.index_put_((frame, at[:, 0], at[:, 1]), named(ids, width)[track], accumulate=True)
    return drawn.unflatten(0, (-1, time)).permute(0, 1, 4, 2, 3).flatten(1, 2)
