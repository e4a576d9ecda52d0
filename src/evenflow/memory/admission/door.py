"""The door before a memory: an admission says what gets in, a gate after it says when to speak.

A door knows nothing of what is behind it: keys and values, two lanes, a matrix or features. It is asked twice about
items: once before they are read, and once after, by when it may need what the model said.

    door = Door(lets=TokenDrop(), speaks=Novelty())
    verdict, state = door.enter(items, door.start())
    ...                                  # read items[verdict.keep], however the memory does that
    speak, state = door.emit(state, logits=logits)  # after which of the items to speak
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..composition import Composition, Kind, about
from .gate import Gate
from .verdict import Admission, Verdict, checked

BEHIND = dict.fromkeys(
    ("evict", "fold", "recall", "place"), ("TheMemory's", "What the memory behind the door answers.")
)


@dataclass(frozen=True)
class Whole:
    """Every item gets in whole. Items are of any shape, [n, …]; each is as new as can be. There is no state."""

    def start(self) -> None:
        return None

    def step(self, items: Tensor, state: None = None) -> tuple[Verdict, None]:
        checked(items, tuple(range(1, items.ndim + 1)), "[n, …]")
        return Verdict.of(torch.ones(len(items), dtype=torch.bool, device=items.device)), None


@dataclass(frozen=True, eq=False)
class DoorState:
    """What a door knows of a stream: states of admission and gate, items so far, and the verdict on which the gate was
    not asked yet. Never changed in place, so a fork is the state itself."""

    admission: Any = None
    gate: Any = None
    number: int = 0
    open: Verdict | None = None


@dataclass(frozen=True)
class Door(Composition):
    """An admission, and the gate behind it; without a gate nothing is ever said unasked.

    lets: the admission. speaks: the gate. A gate that asks the model (`logits` or `tokens`) is not asked after an item of
    which nothing got in: the model has read nothing, so it stays silent and costs nothing.
    """

    lets: Admission[Any] = field(default_factory=Whole)
    speaks: Gate[Any] | None = None
    kind: ClassVar[Kind] = "door"

    @property
    def outline(self) -> str:
        gate = "never unasked" if self.speaks is None else type(self.speaks).__name__
        return f"-> {type(self.lets).__name__} -> [ any memory ] -> speaks: {gate}"

    def answered(self, verb: str) -> tuple[str, str]:
        if verb != "admit":
            return BEHIND[verb]
        return type(self.lets).__name__, about(self.lets)

    def build(self) -> Doorway:
        """A door that keeps its own state, for one stream."""
        return Doorway(self)

    def start(self) -> DoorState:
        """The state before the first item."""
        return DoorState(self.lets.start())

    def enter(self, items: Tensor, state: DoorState) -> tuple[Verdict, DoorState]:
        """Judge items [n, …]. Raises ValueError, and changes nothing, for items that do not fit, and RuntimeError where
        the gate has not been asked about those before."""
        if state.open is not None:
            raise RuntimeError(f"{len(state.open.novelty)} items are inside already; ask `emit` about them first")
        verdict, admission = self.lets.step(items, state.admission)
        inside = None if self.speaks is None else verdict
        return verdict, replace(state, admission=admission, open=inside, number=state.number + len(items))

    def emit(
        self, state: DoorState, *, logits: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, DoorState]:
        """After which of the items that entered last to speak, bool [n].

        logits: [k, V], what the model said at the last token of each item of which something got in. tokens: int64 [k],
        the first token of what it wrote for each. A gate looks at one of them, or at novelty or number, which are known
        here. Raises ValueError where what it looks at is missing, RuntimeError where no item entered.
        """
        if self.speaks is None or state.open is None:
            raise RuntimeError("no item has entered since the gate was asked, or this door has none")
        inside = state.open.inside
        n, after = len(inside), replace(state, open=None)
        asks = self.speaks.asks
        if asks == "novelty" or asks == "number":
            number = torch.arange(state.number - n, state.number, device=inside.device)
            speak, gate = self.speaks.step(state.open.novelty if asks == "novelty" else number, state.gate)
            return speak, replace(after, gate=gate)
        given, k = {"logits": logits, "tokens": tokens}[asks], int(inside.sum())
        if given is None or len(given) != k:
            got = "none" if given is None else f"{len(given)}"
            raise ValueError(
                f"{type(self.speaks).__name__} asks for {asks}, one of each of {k} items that got in; got {got}"
            )
        speak = torch.zeros_like(inside)
        if k:
            said, gate = self.speaks.step(given, state.gate)
            speak[inside] = said.to(speak.device)
            after = replace(after, gate=gate)
        return speak, after


class Doorway:
    """A door with the state of one stream. Whatever is refused leaves it as it was."""

    def __init__(self, door: Door, state: DoorState | None = None) -> None:
        self.door, self.state = door, door.start() if state is None else state

    @property
    def position(self) -> int:
        """Items so far."""
        return self.state.number

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def enter(self, items: Tensor) -> Verdict:
        """See `Door.enter`."""
        verdict, self.state = self.door.enter(items, self.state)
        return verdict

    def emit(self, *, logits: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """See `Door.emit`."""
        speak, self.state = self.door.emit(self.state, logits=logits, tokens=tokens)
        return speak

    def fork(self) -> Doorway:
        """An independent copy."""
        return Doorway(self.door, self.state)

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.door.start()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit."""
        return flat(self.state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        self.state = unflat(self.door.start(), state)


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """A state as tensors by name: of dataclasses, tensors, whole numbers and None, which has no name."""
    if value is None:
        return {}
    if not is_dataclass(value):
        return {name: torch.as_tensor(value).clone()}
    parts = (flat(getattr(value, f.name), f"{name}.{f.name}".lstrip(".")) for f in fields(value))
    return {key: tensor for part in parts for key, tensor in part.items()}


def unflat(like: DoorState, state: Mapping[str, Tensor]) -> DoorState:
    """What `flat` made, for a door whose first state is `like`. Raises ValueError where names or kinds differ."""
    left = dict(state)

    def filled(template: Any, name: str) -> Any:
        if is_dataclass(template):
            parts = {
                f.name: filled(getattr(template, f.name), f"{name}.{f.name}".lstrip(".")) for f in fields(template)
            }
            kind: Any = type(template)
            return kind(**parts)
        tensor = left.pop(name, None)
        if isinstance(template, int):
            if tensor is None or tensor.ndim or tensor.is_floating_point():
                raise ValueError(f"state does not fit: {name} is missing, or no whole number")
            return int(tensor)
        return None if tensor is None else tensor.clone()

    if "open.keep" in left:
        nothing = torch.zeros(0)
        like = replace(like, open=Verdict(nothing, nothing, nothing))
    done: DoorState = filled(like, "")
    if left:
        raise ValueError(f"state does not fit: this door knows nothing of {', '.join(sorted(left))}")
    return done
