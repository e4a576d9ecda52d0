"""Live understanding: a stream of frames through a door into a language model, which may speak after each of them."""

from .watching import Seen, Watching

__all__ = ["Seen", "Watching"]
