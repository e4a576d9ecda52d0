"""Between pictures as people have them, uint8 [H, W, 3], and what a codec takes, floats in [−1, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def from_pixels(frames: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [n, H, W, 3] → float32 [1, n, 3, H, W]."""
    made = torch.from_numpy(np.ascontiguousarray(frames)).to(device)
    return (made.permute(0, 3, 1, 2)[None].float() / 127.5) - 1


def to_pixels(frames: Tensor) -> np.ndarray:
    """[1, n, 3, H, W] → uint8 [n, H, W, 3]; what lies outside of [−1, 1] is cut."""
    made = frames[0].permute(0, 2, 3, 1).float().clamp(-1, 1)
    return ((made + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def checked_video(frames: Any, size: tuple[int, int]) -> np.ndarray:
    """Frames as uint8 [n, H, W, 3] of that size. Raises TypeError or ValueError with what was expected."""
    made = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if made.dtype != np.uint8:
        raise TypeError(f"pictures hold {made.dtype}; expected uint8, 0 to 255")
    if made.ndim != 4 or made.shape[-1] != 3 or not len(made):
        raise ValueError(f"frames are {made.shape}; expected [n, H, W, 3]")
    if made.shape[1:3] != size:
        raise ValueError(f"pictures of {made.shape[1]}×{made.shape[2]} pixels; this stream's are {size[0]}×{size[1]}")
    return made


def checked_image(image: Any, size: tuple[int, int]) -> np.ndarray:
    """One picture, uint8 [H, W, 3], as a video of one frame."""
    made = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if made.ndim != 3:
        raise ValueError(f"an image is {made.shape}; expected [H, W, 3]")
    return checked_video(made[None], size)
