"""Frames to small pictures and back, and to a film."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..media import VideoWriter
from .protocol import Refused

QUALITIES = (90, 75, 55, 35)  # steps down for a client that does not keep up
SMALL = 256 * 256  # pixels up to which WebP costs no time worth counting
THUMB = 32  # pixels along the longer side of a picture of what the memory holds
SHOWN = 256  # pixels of a film's shorter side, at least: players smooth what they enlarge


def encode(frame: np.ndarray, quality: int) -> tuple[str, bytes]:
    """Format and bytes of a frame, uint8 [H, W, 3]."""
    small = frame.shape[0] * frame.shape[1] <= SMALL
    out = io.BytesIO()
    if small:
        Image.fromarray(frame).save(out, "WEBP", quality=quality, method=2)
    else:
        Image.fromarray(frame).save(out, "JPEG", quality=quality)
    return ("webp" if small else "jpeg"), out.getvalue()


def thumb(frame: np.ndarray) -> str:
    """A small picture of a frame, as a data address."""
    image, out = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((THUMB, THUMB), Image.Resampling.BOX)
    image.save(out, "WEBP", quality=60, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def decode(data: str, size: tuple[int, int], longest: int) -> np.ndarray:
    """The picture in `data` (base64), cut from its middle to fill `size` (rows, columns), uint8 [H, W, 3].

    Raises Refused for what is no picture, or one of more than `longest` pixels along a side.
    """
    try:
        image: Image.Image = Image.open(
            io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG", "JPEG", "WEBP")
        )
        if max(image.size) > longest:
            raise Refused(
                "too_large", f"the picture has {image.size[0]}×{image.size[1]} pixels", f"at most {longest} a side"
            )
        image = image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise Refused("bad_picture", "that is no PNG, JPEG or WebP picture", "send one of these in base64") from None
    height, width = size
    scale = max(width / image.width, height / image.height)
    box = (width / scale, height / scale)
    left, top = (image.width - box[0]) / 2, (image.height - box[1]) / 2
    cut = image.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + box[0], top + box[1]))
    return np.asarray(cut, dtype=np.uint8)


class Film:
    """A recording that grows chunk by chunk; the file takes its name when it is closed.

    path: its name. fps: frames a second. size: rows and columns of a frame; small frames are enlarged a whole number
    of times, pixel by pixel.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self._writer = VideoWriter(path, fps)
        self._scale = max(1, -(-SHOWN // min(size)))

    @property
    def frames(self) -> int:
        """How many it has."""
        return self._writer.written

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return float(self.frames / self._writer.fps)

    def add(self, frames: np.ndarray) -> None:
        """Frames uint8 [n, H, W, 3]."""
        self._writer.write(frames.repeat(self._scale, 1).repeat(self._scale, 2))

    def close(self) -> int:
        """End it; bytes of the file, 0 when there was no frame."""
        self._writer.close()
        return self._writer.path.stat().st_size if self.frames else 0


class Drift:
    """How far colours and contrast have gone from where a scene began: 0 for not at all, 1 from black to white.

    Means and deviations of the three colours over a chunk, in [0, 1]; the distance of the six numbers (root mean square)
    from those of the second chunk after the scene was asked for. A cheap sign of a video that fades or burns, which says
    nothing of its content.
    """

    def __init__(self) -> None:
        self._first: np.ndarray | None = None
        self._chunks = 0

    def anew(self) -> None:
        """Another scene was asked for."""
        self._chunks = 0

    def of(self, frames: np.ndarray) -> float:
        """The drift of a chunk, uint8 [n, H, W, 3]."""
        flat = frames.reshape(-1, 3).astype(np.float32) / 255
        now = np.concatenate([flat.mean(0), flat.std(0)])
        self._chunks += 1
        if self._first is None or self._chunks <= 2:
            self._first = now
        return float(np.sqrt(np.mean((now - self._first) ** 2)))
