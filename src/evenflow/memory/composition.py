"""What every recipe returns, whatever it keeps its stream in: answers to the five questions, under the name of a paper."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Kind = Literal["memory", "lanes", "linked", "mixed", "features", "door"]


def about(answer: object) -> str:
    """What an answer does: the first paragraph of its docstring, in one line."""
    return " ".join((inspect.getdoc(answer) or "").partition("\n\n")[0].split())


@dataclass(frozen=True, kw_only=True)
class Composition(ABC):
    """name, params: as a recipe was asked for, so that `spec` can be parsed again.

    kind: what it is built for. "memory": keys and values of one stream, for attention; "lanes": two streams of which
    one reads the other; "linked": two modalities of one clock; "mixed": layers with a window, a state of one size, or
    both; "features": frames that become tokens when asked; "door": what stands before any of them.
    """

    name: str = "memory"
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kind: ClassVar[Kind]
    answers: ClassVar[Mapping[str, tuple[str, str]]] = {}  # by verb, where they are the same for all of a kind

    @property
    def spec(self) -> str:
        """The string that names this composition, as `recipe` parses it."""
        inside = ", ".join(f"{key}={value!r}" for key, value in self.params.items())
        return f"{self.name}({inside})" if inside else self.name

    @property
    def outline(self) -> str:
        """What is kept, in one line for people; the spec, where a kind has nothing shorter to say."""
        return self.spec

    def answered(self, verb: str) -> tuple[str, str]:
        """The name of the answer to a verb, and what it does in a sentence."""
        return self.answers[verb]

    def verbs(self) -> dict[str, str]:
        """The five answers by their names."""
        return {verb: self.answered(verb)[0] for verb in ("admit", "evict", "fold", "recall", "place")}

    @abstractmethod
    def build(self, *given: Any, **geometry: Any) -> Any:
        """What keeps one stream; each kind says what it takes."""
