"""Evenflow runs models on endless streams at even cost: flat memory, flat latency, exact positions."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import generate, open, resume, resume_video, video
    from .memory import Memory, Rope
    from .recipes import recipe, recipes

__version__ = "0.1.0"

__all__ = ["Memory", "Rope", "__version__", "generate", "open", "recipe", "recipes", "resume", "resume_video", "video"]

# Names are looked up on first use: `import evenflow` alone loads neither torch nor transformers.
_HOME = {
    "open": "api",
    "resume": "api",
    "generate": "api",
    "video": "api",
    "resume_video": "api",
    "recipe": "recipes",
    "recipes": "recipes",
    "Memory": "memory",
    "Rope": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'evenflow' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Door(ModuleType):
    """`evenflow.generate` is the function, also after something was imported from the room of the same name."""

    @property
    def generate(self) -> Any:
        return __getattr__("generate")

    @generate.setter
    def generate(self, room: ModuleType) -> None:
        """The import of a room would put it here."""


sys.modules[__name__].__class__ = _Door
