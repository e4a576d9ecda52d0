"""Drawn tracks as condition channels: which pixel a named point is at, at every frame.

Source: MotionStream, arXiv 2511.01266 (track encoding). A canvas is zero where nothing is said. Where two tracks meet in
one cell their embeddings are added (unconfirmed in the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8  # channels of a track's name, for each of the 4 pixel frames of a latent


def named(ids: Tensor, width: int = WIDTH) -> Tensor:
    """Embeddings [..., width] of track names: sines and cosines of `ids`, whole numbers [...]."""
    omega = 100.0 ** (-torch.arange(width // 2, device=ids.device) / (width // 2))
    angle = ids.float()[..., None] * omega
    return torch.cat([angle.sin(), angle.cos()], -1)


def canvas(points: Tensor, visible: Tensor, ids: Tensor, size: tuple[int, int], stride: tuple[int, int, int]) -> Tensor:
    """Condition channels [F, time·width, rows, columns] of tracks.

    points: x and y in pixels, [P, N, 2] for P = time·F pixel frames; visible: bool [P, N], False also for a point that
    lies outside; ids: whole numbers [N]; size: rows and columns of the canvas; stride: pixel frames, rows and columns
    of pixels of one of its cells. All may have a batch [B, …] in front, and so has what comes out.
    """
    time, (rows, columns) = stride[0], size
    frames, width = points.shape[-3], WIDTH
    if frames % time:
        raise ValueError(f"tracks have {frames} frames; give whole groups of {time}")
    cell = torch.stack([points[..., 1] / stride[1], points[..., 0] / stride[2]], -1).floor().long()
    inside = visible & (cell >= 0).all(-1) & (cell < torch.tensor([rows, columns], device=cell.device)).all(-1)
    frame = torch.arange(inside[..., 0].numel(), device=cell.device).view(*inside.shape[:-1], 1)
    at = torch.where(inside, (frame * rows + cell[..., 0]) * columns + cell[..., 1], 0)
    names = named(ids, width)[..., None, :, :] * inside[..., None]
    drawn = torch.zeros(frame.numel() * rows * columns, width, device=points.device)
    drawn.index_add_(0, at.flatten(), names.flatten(0, -2))
    drawn = drawn.view(*points.shape[:-3], -1, time, rows, columns, width)
    return drawn.movedim(-1, -3).flatten(-4, -3)
