"""Sources and sinks of streams."""

from .text import Line, NotText, lines

__all__ = ["Line", "NotText", "lines"]
