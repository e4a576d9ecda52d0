"""Video and pictures, in and out: files through PyAV, raw frames through a pipe.

A video is a stream of uint8 arrays [H, W, 3]; nothing here holds more than a few of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Size = tuple[int, int]  # rows and columns of pixels


class NotVideo(ValueError):
    """A file that holds no pictures."""


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("video files need PyAV: pip install 'evenflow[video]'") from error
    return av


def read_frames(
    source: str | os.PathLike[str], size: Size | None = None, fps: float | None = None, limit: int | None = None
) -> Iterator[np.ndarray]:
    """The frames of a video file, uint8 [H, W, 3], one by one.

    size: they are cut to this shape in the middle, then resized. fps: the rate wanted: frames are repeated or left out
    by their times (None: as they are). limit: at most so many. Raises NotVideo (a ValueError) for a file without
    pictures, OSError for one that cannot be opened.
    """
    av = _av()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise NotVideo(f"{path} holds no pictures")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            made = _paced((f for f in container.decode(stream)), fps)
            for number, frame in enumerate(made):
                if limit is not None and number >= limit:
                    return
                yield fitted(frame, size)
    except av.error.FFmpegError as error:
        raise NotVideo(f"{path} is no video that can be read ({error.strerror})") from error


def _paced(frames: Iterator[VideoFrame], fps: float | None) -> Iterator[VideoFrame]:
    """Frame n of the new rate is the newest one at n / fps seconds."""
    if fps is None:
        yield from frames
        return
    last, start, at, n, seen = None, 0.0, 0.0, 0, 0
    for frame in frames:
        now = float(frame.time) if frame.time is not None else seen / fps
        start = now if last is None else start
        at = now - start
        while last is not None and n / fps < at - 1e-6:
            yield last
            n += 1
        last, seen = frame, seen + 1
    end = at + (at / (seen - 1) if seen > 1 else 1 / fps)  # the last frame is there as long as others
    while last is not None and n / fps < end - 1e-6:
        yield last
        n += 1


def fitted(frame: VideoFrame, size: Size | None) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3]: cut in the middle to the shape wanted, then resized to it."""
    if size is None or (frame.height, frame.width) == size:
        return frame.to_ndarray(format="rgb24")
    height, width = size
    scale = max(height / frame.height, width / frame.width)
    rows, columns = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    whole = frame.reformat(width=columns, height=rows, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


def read_image(source: str | os.PathLike[str], size: Size | None = None) -> np.ndarray:
    """A picture (PNG, JPEG, WebP …), uint8 [H, W, 3]; see `read_frames` for what is raised."""
    for image in read_frames(source, size, limit=1):
        return image
    raise NotVideo(f"{source} holds no pictures")


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write a picture, uint8 [H, W, 3], as PNG."""
    av = _av()
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1, 1)
    packets = [*codec.encode(av.VideoFrame.from_ndarray(image, "rgb24")), *codec.encode(None)]
    Path(path).write_bytes(b"".join(bytes(packet) for packet in packets))


class VideoWriter:
    """Writes an MP4 file (H.264), frame by frame; closed in any case, so that what was written can be played.

    Use it as a context, also when what makes the frames may be interrupted: the file is written beside its place as
    `.part`, in pieces that can be played even after a crash, and gets its name when it is closed. quality: H.264's CRF,
    0 (exact) to 51. Raises ValueError for frames of another shape, OSError for a place that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, quality: int = 18) -> None:
        self.path, self.fps, self.quality = Path(path), Fraction(fps).limit_denominator(1001), quality
        self.written = 0
        self._part = self.path.with_name(self.path.name + ".part")
        self._container: Any = None
        self._stream: Any = None
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(2, "No such folder", str(self.path.resolve().parent))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3] or [H, W, 3]."""
        av = _av()
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [n, H, W, 3]")
        if self._stream is None:
            self._open(av, frames.shape[1:3])
        if (self._stream.height, self._stream.width) != frames.shape[1:3]:
            raise ValueError(
                f"frames of {frames.shape[1]}×{frames.shape[2]} pixels in a video of "
                f"{self._stream.height}×{self._stream.width}"
            )
        for frame in frames:
            made = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
            made.pts, made.time_base = self.written, 1 / self.fps
            self._container.mux(self._stream.encode(made))
            self.written += 1

    def _open(self, av: Any, size: Size) -> None:
        if size[0] % 2 or size[1] % 2:
            raise ValueError(f"a video of {size[0]}×{size[1]} pixels; MP4 needs even numbers")
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        self._container = av.open(str(self._part), "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=self.fps, options={"crf": str(self.quality)})
        self._stream.height, self._stream.width, self._stream.pix_fmt = *size, "yuv420p"
        self._stream.codec_context.time_base = 1 / self.fps
        self._stream.codec_context.gop_size = max(1, round(float(self.fps) * 2))

    def close(self) -> None:
        """Finish the file. Without a single frame there is none."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode(None))
        finally:
            container.close()
        self._part.replace(self.path)


class RawWriter:
    """Writes frames as they are, rgb24, into a pipe: for `ffplay -f rawvideo -pixel_format rgb24 -video_size WxH -`."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.file = sys.stdout.buffer if file is None else file
        self.written = 0

    def __enter__(self) -> RawWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.flush()

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [n, H, W, 3] or [H, W, 3]."""
        self.file.write(np.ascontiguousarray(frames).tobytes())
        self.file.flush()
        self.written += 1 if frames.ndim == 3 else len(frames)
