"""Sources and sinks of streams."""

from .text import Line, NotText, lines
from .video import NotVideo, RawWriter, VideoWriter, read_frames, read_image, write_image

__all__ = [
    "Line", "NotText", "NotVideo", "RawWriter", "VideoWriter", "lines", "read_frames", "read_image", "write_image",
]  # fmt: skip
