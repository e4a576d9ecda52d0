"""How models meet a memory: `transformers` decoders, read and written as endless streams."""

from .axes import grid_places
from .engine import unfit
from .families import Unsupported
from .loading import load, tiny_path
from .stream import Stream, open_stream, resume_stream

__all__ = ["Stream", "Unsupported", "grid_places", "load", "open_stream", "resume_stream", "tiny_path", "unfit"]
