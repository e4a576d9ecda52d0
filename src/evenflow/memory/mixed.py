"""Layers of several kinds in one stream: a window of any recipe, a state of one size, or both, under one set of operations.

A pattern says what each layer keeps. InfiniteVL's is one layer of window attention, then three of the gated delta rule;
Spatial-TTT's is three layers with a window and fast weights beside it, then one that attends everything. Any `Memory` may
be the window, so a state goes with any recipe.

    state = Mixed(pattern=((window,), (delta,), (delta,), (delta,))).build(layers=36, heads=16, kv_heads=2, head_dim=128)
    with state.step(m) as step:
        near = step.attend(layer, q, k, v)  # in layers with a memory of keys and values
        far = step.fold(layer, q, k, v, beta=beta, g=g)  # in layers with a state; what else it takes is the rule's
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .base import MemoryState
from .composition import Composition, Kind
from .delta import Delta
from .layout import Geometry, Memory
from .step import sign


class Rule(Protocol):
    """What folds a stream into a state of one size: a frozen dataclass, whose states are never written to.

    A state has `tensors`, all that it keeps.
    """

    about: ClassVar[str]

    def begin(self, geometry: Geometry, first: Any = None) -> Any:
        """The state before the first token."""

    def fold(self, state: Any, q: Tensor, k: Tensor, v: Tensor, *how: Tensor, **named: Tensor) -> tuple[Tensor, Any]:
        """What is read for each token, and the state after all."""

    def packed(self, state: Any) -> dict[str, Tensor]:
        """The state as tensors by name."""

    def unpacked(self, begun: Any, packed: Mapping[str, Tensor]) -> Any:
        """What `packed` gave. Raises ValueError where it does not fit."""


Part = Memory | Rule


@dataclass(frozen=True)
class Mixed(Composition):
    """pattern: what each layer keeps, repeated until there are enough: a `Memory`, a rule, or one of each."""

    pattern: tuple[tuple[Any, ...], ...] = field(default=((Memory(window=1020, sink=4),), (Delta(),)))
    kind: ClassVar[Kind] = "mixed"

    def __post_init__(self) -> None:
        for parts in self.pattern:
            memories = [part for part in parts if isinstance(part, Memory)]
            if not parts or len(memories) > 1 or len(parts) - len(memories) > 1:
                raise ValueError(f"a layer keeps {parts!r}; expected a memory, a rule, or one of each")
            if any(not hasattr(part, "fold") for part in parts):
                raise TypeError(f"a layer keeps {parts!r}; a part is a `Memory`, or a rule such as `Delta`")
        if not self.memories:
            raise ValueError("no layer keeps keys and values, and a stream is counted by one that does; give it one")
        if any(memory.recompute or memory.rows > 1 or memory.retrieves for memory in self.memories):
            raise ValueError("layers are read once and together, so no memory may recompute, have rows, or retrieve")

    @property
    def memories(self) -> list[Memory]:
        """Different memories, in order."""
        found: list[Memory] = []
        for part in (part for parts in self.pattern for part in parts if isinstance(part, Memory)):
            found += [part] if part not in found else []
        return found

    @property
    def rules(self) -> list[Rule]:
        """Different rules, in order."""
        found: list[Rule] = []
        for part in (part for parts in self.pattern for part in parts if not isinstance(part, Memory)):
            found += [part] if part not in found else []
        return found

    @property
    def outline(self) -> str:
        def told(part: Part) -> str:
            return part.spec if isinstance(part, Memory) else type(part).__name__

        return " ".join("[ " + " + ".join(map(told, parts)) + " ]" for parts in self.pattern)

    def answered(self, verb: str) -> tuple[str, str]:
        name, does = self.memories[0].answered(verb)
        if verb == "fold" and self.rules:
            name, does = type(self.rules[0]).__name__, self.rules[0].about
        return name, does

    def build(self, *, first: Mapping[int, Any] | None = None, undo: int = 0, **geometry: Any) -> MixedState:
        """Empty memories and states for one model and one stream (or a batch in step).

        geometry: as for `Memory.build`, of all layers. first: by layer, what a rule begins from, if it does. undo: how
        many of the last tokens `truncate` can take back for certain, at the cost of copies and of what they brought.
        """
        return MixedState(self, Geometry.of(**geometry), first or {}, undo)


@dataclass(frozen=True, eq=False)
class Mark:
    """A moment that can be gone back to. Memories are copies that nobody writes to; states are never written to."""

    memories: tuple[MemoryState, ...]
    states: dict[int, Any]

    @property
    def position(self) -> int:
        """Tokens consumed by then."""
        return self.memories[0].position


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that was taken at a position: its tags, and what every layer was given, in order."""

    position: int
    m: int
    tags: Mapping[str, Tensor]
    calls: tuple[tuple[str, int, tuple[Tensor, ...], dict[str, Tensor]], ...]

    def first(self, m: int) -> Taken:
        """The first m tokens of it."""

        def cut(name: str, x: Tensor) -> Tensor:
            if name == "convolve":
                return x[:, :m] if x.ndim == 3 else x
            return x[:, :, :m]

        calls = tuple(
            (name, layer, tuple(cut(name, x) for x in given), {key: cut(name, x) for key, x in how.items()})
            for name, layer, given, how in self.calls
        )
        tags = {name: tag[..., :m, :] if name == "coordinates" else tag[..., :m] for name, tag in self.tags.items()}
        return Taken(self.position, m, tags, calls)


class MixedStep:
    """A step, in which every layer does once what it has parts for. logs: whether what it is given is kept for undoing."""

    def __init__(self, state: MixedState, m: int, logs: bool) -> None:
        self.state, self.m, self.logs = state, m, logs
        self.after: dict[int, Any] = {}
        self.signs: list[Tensor] = []
        self.done: set[tuple[str, int]] = set()
        self.calls: list[tuple[str, int, tuple[Tensor, ...], dict[str, Tensor]]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention through the layer's memory, see `MemoryState.attend`."""
        own = self._once("attend", layer, self.state.places)
        out = self.state.memories[own[0]].attend(own[1], q, k, v)
        if len(self.state.memories) > 1:  # one alone looks for itself, before it keeps anything
            self.signs.append(sign(k, v))
        self._done("attend", layer, (q, k, v), {})
        return out

    @torch.no_grad()
    def fold(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how: Tensor) -> Tensor:
        """What the layer's state says to every query, and takes in with every key and value: [B, H, m, D_v].

        q, k [B, H, m, D], v [B, H, m, D_v]; how: what else the rule takes (`beta` and `g`; `rates` and `momenta`).
        """
        rule = self._once("fold", layer, self.state.rules)
        if q.ndim != 4 or q.shape[2] != self.m:
            raise ValueError(f"q is {tuple(q.shape)}; this step has {self.m} tokens, [B, H, {self.m}, D]")
        out, self.after[layer] = rule.fold(self._latest(layer), q, k, v, **how)
        self.signs += [sign(k, v), *(x.double().sum() for x in how.values())]
        self._done("fold", layer, (q, k, v), how)
        return out

    @torch.no_grad()
    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """The causal convolution before a layer's `Delta`, with what it remembers: x [B, m, channels], weight [channels, kernel].

        Call it before `fold`.
        """
        rule = self._once("convolve", layer, self.state.rules)
        if not isinstance(rule, Delta):
            raise ValueError(f"layer {layer} keeps {rule!r}, which has no convolution; `Delta` has")
        out, self.after[layer] = rule.convolve(self._latest(layer), x, weight)
        self.signs.append(x.double().sum())
        self._done("convolve", layer, (x, weight), {})
        return out

    def _latest(self, layer: int) -> Any:
        return self.after.get(layer, self.state.states[layer])

    def _once(self, name: str, layer: int, where: Mapping[int, Any]) -> Any:
        if self.state._current is not self:
            raise RuntimeError("this step is over; open another one")
        if layer not in where:
            raise ValueError(f"layer {layer} has nothing to {name} with; layers {[*where]} have")
        if (name, layer) in self.done:
            raise RuntimeError(f"layer {layer} was asked to {name} twice in one step")
        return where[layer]

    def _done(self, name: str, layer: int, given: tuple[Tensor, ...], how: dict[str, Tensor]) -> None:
        self.done.add((name, layer))
        if self.logs:  # copies, as whoever feeds may go on writing into the same buffers
            named = {key: x.clone() for key, x in how.items()}
            self.calls.append((name, layer, tuple(x.clone() for x in given), named))

    def _complete(self) -> None:
        """Raises where something is missing or no number, before anything is kept."""
        missing = [layer for layer in self.state.places if ("attend", layer) not in self.done]
        missing += [layer for layer in self.state.rules if ("fold", layer) not in self.done]
        if missing:
            raise RuntimeError(f"the step ended before layers {missing} were read; nothing was stored")
        if self.signs and not bool(torch.stack([one.double() for one in self.signs]).isfinite().all()):
            raise ValueError("what layers were given holds NaN or infinity; nothing was stored")


class MixedState:
    """The memories and states of one stream; `Mixed.build` makes them. Whatever is refused leaves it as it was."""

    _marks: list[Mark]
    _log: list[Taken]

    def __init__(self, mixed: Mixed, geometry: Geometry, first: Mapping[int, Any], undo: int) -> None:
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of tokens, 0 or more")
        self.mixed, self.geometry, self.undo = mixed, geometry, undo
        layers = [mixed.pattern[layer % len(mixed.pattern)] for layer in range(geometry.layers)]
        self.rules: dict[int, Rule] = {
            n: part for n, parts in enumerate(layers) for part in parts if not isinstance(part, Memory)
        }
        self.places: dict[int, tuple[int, int]] = {}  # which memory a layer attends through, and as which of its layers
        counts = [0] * len(mixed.memories)
        for layer, parts in enumerate(layers):
            for part in parts:
                if isinstance(part, Memory):
                    number = mixed.memories.index(part)
                    self.places[layer] = (number, counts[number])
                    counts[number] += 1
        if 0 in counts:
            raise ValueError(f"{geometry.layers} layers are fewer than a pattern of {len(mixed.pattern)} needs")
        self.memories = tuple(
            memory.build(**_of(geometry, [layer for layer, at in self.places.items() if at[0] == number]))
            for number, memory in enumerate(mixed.memories)
        )
        self._begun = {layer: rule.begin(geometry, first.get(layer)) for layer, rule in self.rules.items()}
        self._current: MixedStep | None = None
        self.states = dict(self._begun)
        self._forget_marks()

    # -- a step ----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, m: int, tags: Mapping[str, Tensor] | None = None, commit: bool = True) -> Iterator[MixedStep]:
        """A step of m fresh tokens, in which every layer attends, folds, or both; see `MemoryState.step`.

        Nothing changes unless the context ends without an error after every layer has done what it has parts for.
        """
        if self._current is not None:
            raise RuntimeError("a step is open already; end it first")
        step, position = MixedStep(self, m, commit and self.undo > 0), self.position
        with ExitStack() as stack:
            for memory in self.memories:
                stack.enter_context(memory.step(m, tags=tags, commit=commit))
            self._current = step
            try:
                yield step
                step._complete()
            finally:
                self._current = None
        if not commit:
            return
        self.states = self.states | step.after
        if self.undo:
            known = {name: torch.as_tensor(tag).clone() for name, tag in (tags or {}).items()}
            self._log = [*self._log, Taken(position, m, known, tuple(step.calls))]
            self._remember()

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens consumed so far."""
        return self.memories[0].position

    @property
    def nbytes(self) -> int:
        """Bytes of memories, states, and what is kept for undoing."""
        kept = [*self.memories, *(memory for mark in self._marks for memory in mark.memories)]
        states = [self.states, *(mark.states for mark in self._marks)]
        tensors = {id(x): x.nbytes for each in states for one in each.values() for x in one.tensors}
        logged = (x for taken in self._log for _, _, given, how in taken.calls for x in (*given, *how.values()))
        return sum(m.nbytes for m in kept) + sum(tensors.values()) + sum(x.nbytes for x in logged)

    def held(self, layer: int) -> list[int]:
        """Stream indices that the next query of a layer can attend; none where it keeps a state alone."""
        if not 0 <= layer < self.geometry.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {self.geometry.layers}")
        at = self.places.get(layer)
        return [] if at is None else self.memories[at[0]].held(at[1])

    # -- undo, copy, forget ----------------------------------------------------------------------------------------

    def _remember(self, start: bool = False) -> None:
        """Take a mark when the last one is `undo` tokens old, and let go of what no undoing needs."""
        now = self.position
        if start or now - self._marks[-1].position >= self.undo:
            self._marks = [*self._marks, Mark(tuple(memory.fork() for memory in self.memories), self.states)]
        while len(self._marks) > 1 and self._marks[1].position <= now - self.undo:
            self._marks = self._marks[1:]
        self._log = [taken for taken in self._log if taken.position >= self._marks[0].position]

    def _forget_marks(self) -> None:
        self._marks, self._log = [], []
        if self.undo:
            self._remember(start=True)

    def truncate(self, n: int) -> None:
        """Undo the last n tokens, exactly: by going back to a mark, and giving every layer again what came since.

        What follows is bit for bit what follows where they never came, the rest having come in the same pieces. Raises
        ValueError, with the reason, where no mark is as old, or where a step that brings frames would be cut.
        """
        self._idle("truncate")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.position:
            raise ValueError(f"cannot undo {n!r} tokens; {self.position} were consumed")
        target = self.position - n
        old = [number for number, mark in enumerate(self._marks) if mark.position <= target]
        if n and not old:
            raise ValueError(
                f"cannot undo {n} tokens: a state does not tell what went into it, and this one keeps what {self.undo} "
                "tokens need; build it with a larger undo, fork before, or try with step(commit=False)"
            )
        if not n:
            return
        mark, log = self._marks[old[-1]], self._log
        twin = copy.copy(self)
        twin.memories, twin.states = tuple(memory.fork() for memory in mark.memories), mark.states
        twin._marks = self._marks[: old[-1] + 1]
        twin._log = [taken for taken in log if taken.position < mark.position]
        for taken in log[len(twin._log) :]:
            if (stop := min(taken.m, target - taken.position)) > 0:
                twin._take(taken.first(stop))
        self.memories, self.states, self._marks, self._log = twin.memories, twin.states, twin._marks, twin._log

    def _take(self, taken: Taken) -> None:
        with self.step(taken.m, taken.tags) as step:
            for name, layer, given, how in taken.calls:
                getattr(step, name)(layer, *given, **how)

    def fork(self) -> MixedState:
        """An independent copy; what happens to one is never seen by the other."""
        self._idle("fork")
        twin = copy.copy(self)  # marks, states and what was given are never written to
        twin.memories = tuple(memory.fork() for memory in self.memories)
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self._idle("reset")
        for memory in self.memories:
            memory.reset()
        self.states = dict(self._begun)
        self._forget_marks()

    def _idle(self, what: str) -> None:
        if self._current is not None:
            raise RuntimeError(f"{what} is not possible inside a step")

    # -- save and resume -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, except what undoing needs: that begins anew."""
        self._idle("state_dict")
        memories = (memory.state_dict() for memory in self.memories)
        said = {f"memories.{n}.{name}": value for n, state in enumerate(memories) for name, value in state.items()}
        for layer, rule in self.rules.items():
            said |= {f"states.{layer}.{name}": x for name, x in rule.packed(self.states[layer]).items()}
        return said

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        self._idle("load_state_dict")
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for key, value in state.items():
            what, _, rest = key.partition(".")
            number, _, name = rest.partition(".")
            groups.setdefault((what, number), {})[name] = value
        wanted = {("memories", str(n)) for n in range(len(self.memories))} | {("states", str(n)) for n in self.rules}
        if set(groups) != wanted:
            raise ValueError(f"state holds {sorted(groups)}; expected {sorted(wanted)}")
        states = {n: rule.unpacked(self._begun[n], groups["states", str(n)]) for n, rule in self.rules.items()}
        memories = tuple(memory.fork() for memory in self.memories)
        for at, memory in enumerate(memories):
            memory.load_state_dict(groups["memories", str(at)])
        if len({memory.position for memory in memories}) > 1:
            raise ValueError(f"memories stand at {[memory.position for memory in memories]}; expected one position")
        self.memories, self.states = memories, states
        self._forget_marks()


def _of(geometry: Geometry, layers: list[int]) -> dict[str, Any]:
    """What `Memory.build` takes for some of the layers."""
    one = {name: getattr(geometry, name) for name in ("heads", "kv_heads", "head_dim", "value_dim", "alibi", "softcap", "batch", "dtype", "device")}  # fmt: skip
    each = {name: [getattr(geometry, name)[layer] for layer in layers] for name in ("rope", "reach", "scale")}
    logits = None if geometry.sink_logits is None else geometry.sink_logits[layers]
    return {**one, **each, "layers": len(layers), "sink_logits": logits}
