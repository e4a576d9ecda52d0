"""Two append-only memories, one of what is seen and one of what is said, that grow at the same time.

In one causal sequence, what is seen must wait until all that is said of what came before is out: its positions depend on
it. Two lanes cut that dependency. The source lane reads itself only. The target lane reads the source lane up to a unit,
and itself. So what is seen can be read far ahead, in another thread or on another stream of the device, and nothing that
is said changes a bit of it, nor is changed by how far ahead that was.

The word that opens what is said of unit u is predicted where the last word of unit u − 1 is fed. That word (a
delimiter, say) must see unit u already: it is held back, and fed as the first of the writes to unit u.

    state = Lanes(Gapped()).build(layers=28, heads=16, kv_heads=2, head_dim=128, rope=rope)
    with state.read(m, unit) as step:  # in one thread, for every unit; step.attend in every layer
        out = step.attend(layer, q, k, v)
    state.close("source", unit)
    state.wait("target", unit)  # in the other, until the unit was read
    with state.write(1, unit) as step:
        ...
    state.close("target", unit, held=1)  # a delimiter was sampled; it is written to the next unit

Sources: Speak While Watching, arXiv 2601.06843; TaYS, arXiv 2603.02872; Think While Watching, arXiv 2603.11896.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from .composition import Composition, Kind, about
from .lane_places import Decoupled, End, Interleaved, LanePlace, Overlapped, placed, words
from .lane_step import Lane, LaneStep
from .layout import Geometry

Which = Literal["source", "target"]


class Both(NamedTuple):
    """One number of each lane."""

    source: int
    target: int


@dataclass(frozen=True)
class Lanes(Composition):
    """Two lanes, whose positions `place` gives.

    origin: from where a picture's coordinates count: the first free position when its run of pictures began. A run goes
    on through several reads, and ends with words; with "unit" also with a unit, while with "video" a video is one run
    through all units (the caller then counts time through it).
    """

    place: LanePlace = field(default_factory=Decoupled)
    origin: Literal["unit", "video"] = "unit"
    kind: ClassVar[Kind] = "lanes"
    answers: ClassVar = {
        "admit": ("Everything", "Both lanes take every token."),
        "evict": ("Never", "Nothing leaves."),
        "fold": ("Dropped", "As nothing leaves, nothing is folded."),
        "recall": ("UpToUnit", "What is said of a unit sees what was seen up to it, and all said before; what is seen, itself alone."),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.place, LanePlace):
            raise TypeError(f"place is {self.place!r}; derive it from evenflow.memory.lane_places.LanePlace")
        if self.origin not in ("unit", "video"):
            raise ValueError(f"origin is {self.origin!r}; it must be 'unit' or 'video'")
        if self.origin == "video" and isinstance(self.place, Interleaved | Overlapped):
            raise ValueError(f"{type(self.place).__name__} places each unit anew, so a video is no one run; use 'unit'")

    @property
    def outline(self) -> str:
        return "[ source: units seen ] <- [ target: units said ]"

    def answered(self, verb: str) -> tuple[str, str]:
        if verb != "place":
            return super().answered(verb)
        return type(self.place).__name__, about(self.place)

    def build(self, **geometry: Any) -> LanesState:
        """Two empty lanes for one model and one stream (or a batch in step); see `Geometry.of` for the arguments."""
        served = Geometry.of(**geometry)
        if served.alibi is not None or any(reach is not None for reach in served.reach):
            raise ValueError("positions of two lanes may overlap: there is no distance that ALiBi or `reach` could use")
        return LanesState(self, served)


class LanesState:
    """The two lanes of one stream; `Lanes.build` makes them.

    One thread may read while another writes, each in steps of its own. Whatever is refused leaves both lanes as they
    were, and so does a step that fails or is not committed.
    """

    def __init__(self, lanes: Lanes, geometry: Geometry) -> None:
        self.lanes, self.geometry = lanes, geometry
        self.source, self.target = Lane(geometry), Lane(geometry)
        self._changed = threading.Condition(threading.RLock())

    # -- watching and speaking -----------------------------------------------------------------------------------

    @contextmanager
    def read(
        self, m: int, unit: int, tags: Mapping[str, Tensor] | None = None, commit: bool = True
    ) -> Iterator[LaneStep]:
        """A step of m fresh tokens of the source lane's `unit`; they see the source lane up to themselves.

        tags: `coordinates`, int64 [m, axes], places pictures on the rope's axes (time, row, column), counted from where
        their run began; what has none is words, one further than all before on every axis. commit: False attends and
        leaves the lane as it was. Raises ValueError if `unit` is not the open one, or cannot be placed yet.
        """
        with self._changed:
            self._takes(self.source, "source", m, unit)
            step = self._open(self.source, self._source_places(m, tags or {}), 0)
        yield from self._run(self.source, step, commit)

    @contextmanager
    def write(self, m: int, unit: int, commit: bool = True) -> Iterator[LaneStep]:
        """A step of m fresh tokens of the target lane's `unit`; they see the source lane up to and with that unit, and
        the target lane up to themselves. The first are those held back of the unit before, if any were.

        Raises ValueError if `unit` is not the open one, or was not read to its end.
        """
        with self._changed:
            self._takes(self.target, "target", m, unit)
            step = self._open(self.target, self._target_places(m), self.source.ends[unit].length)
        yield from self._run(self.target, step, commit)

    def close(self, lane: Which, unit: int, held: int = 0) -> None:
        """End the open unit of a lane; it may be empty. held: tokens of the target lane's unit that are fed with the next.

        Raises ValueError if `unit` is not the open one, or has not been fed what was held back of the one before.
        """
        with self._changed:
            of = self._lane(lane)
            self._idle(of, "close")
            self._turn(of, lane, unit)
            if isinstance(held, bool) or not isinstance(held, int) or held < 0 or (held and lane == "source"):
                raise ValueError(f"held is {held!r}; it counts tokens of the target lane's unit that are yet to come")
            if lane == "source":
                end = End(of.length, self._source_top())
            else:
                owed = self._owed(of.length)
                if owed > 0:
                    raise ValueError(
                        f"unit {unit - 1} is not whole: its last tokens, {owed} held back, must be written to unit {unit} first"
                    )
                end = End(of.length, self._target_start() + of.length - of.began - self._held_before() + held, held)
            of.ends.append(end)
            self._changed.notify_all()

    def wait(self, lane: Which, unit: int, timeout: float | None = None) -> bool:
        """Sleep until a lane's `unit` can be fed (or was); False when `timeout` seconds have passed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._reason(lane, unit) is None, timeout)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def position(self) -> Both:
        """Tokens that each lane has consumed."""
        return Both(self.source.length, self.target.length)

    @property
    def units(self) -> Both:
        """Closed units of each lane: the numbers of the open ones."""
        return Both(len(self.source.ends), len(self.target.ends))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the lanes keep, used or reserved."""
        return self.source.store.nbytes + self.target.store.nbytes

    def held(self, layer: int, lane: Which = "target") -> list[int]:
        """Indices of a lane's tokens that are held, in attention order: all of them, in every layer."""
        if not 0 <= layer < self.geometry.layers:
            raise ValueError(f"there is no layer {layer}; this memory has {self.geometry.layers}")
        return [*range(self._lane(lane).length)]

    def positions(self, lane: Which) -> Tensor:
        """Where a lane's tokens stand, int64 [n, axes]."""
        of = self._lane(lane)
        return of.store.placed(0, of.length)[:, : of.axes]

    # -- undo, copy, forget, save --------------------------------------------------------------------------------

    def truncate(self, lane: Which, n: int) -> None:
        """Undo the last n tokens of a lane, exactly, and the ends of units that came after the token then last.

        Raises ValueError where the other lane has built on them: on source tokens that a unit said of them may have seen,
        or on a unit's last position from which a unit that was read counts. Undo that first.
        """
        with self._changed:
            self._all_idle("truncate")
            of = self._lane(lane)
            if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= of.length:
                raise ValueError(f"cannot undo {n!r} tokens; the {lane} lane has {of.length}")
            length = of.length - n
            ends = [end for end in of.ends if n == 0 or end.length <= length]
            other = self.target if lane == "source" else self.source
            begun = len(other.ends) + (other.length > other.began)  # units that have anything to do with this lane
            if lane == "source" and (len(ends) < begun or (begun and length < ends[begun - 1].length)):
                raise ValueError(f"{begun} units were said of what was seen; undo what is said of them first")
            needed = self.lanes.place.said_before(begun - 1) if begun else 0
            if lane == "target" and len(ends) < needed:
                raise ValueError(f"unit {begun - 1} was read behind what was said of {needed} units; undo it first")
            of.length, of.ends = length, ends

    def fork(self) -> Self:
        """An independent copy; what happens to one is never seen by the other. Raises RuntimeError inside a step."""
        twin = type(self)(self.lanes, self.geometry)
        twin.load_state_dict(self.state_dict())
        return twin

    def reset(self) -> None:
        """Forget everything."""
        with self._changed:
            self._all_idle("reset")
            self.source, self.target = Lane(self.geometry), Lane(self.geometry)
            self._changed.notify_all()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later lanes of the same shape need to go on bit for bit."""
        with self._changed:
            self._all_idle("state_dict")
            state = {}
            for name, lane in (("source", self.source), ("target", self.target)):
                state[f"{name}.ends"] = torch.tensor(lane.ends, dtype=torch.int64).reshape(-1, 3)
                state[f"{name}.places"] = lane.store.placed(0, lane.length)
                for layer in range(self.geometry.layers):
                    pairs = lane.store.view(layer, lane.length)
                    for part, tensors in zip(("keys", "values"), zip(*pairs, strict=True), strict=False):
                        state[f"{name}.layers.{layer}.{part}"] = torch.cat(tensors, 2)
            return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        loaded = [self._loaded(name, state) for name in ("source", "target")]
        known = {name for _, names in loaded for name in names}
        if known != set(state):
            raise ValueError(f"state does not fit: unknown {sorted(set(state) - known)}")
        with self._changed:
            self._all_idle("load_state_dict")
            self.source, self.target = (lane for lane, _ in loaded)
            self._changed.notify_all()

    def _loaded(self, name: str, state: Mapping[str, Tensor]) -> tuple[Lane, list[str]]:
        g, lane = self.geometry, Lane(self.geometry)
        names = [f"{name}.ends", f"{name}.places"]
        filled = f"{name}.places" in state and len(state[f"{name}.places"]) > 0
        names += [f"{name}.layers.{n}.{part}" for n in range(g.layers) for part in ("keys", "values") if filled]
        if missing := sorted(set(names) - set(state)):
            raise ValueError(f"state does not fit: missing {missing}")
        length = len(state[names[1]])
        shapes: list[tuple[int, ...]] = [(len(state[names[0]]), 3), (length, lane.axes + 1)]
        for _ in range(g.layers if filled else 0):
            shapes += [(g.batch, g.kv_heads, length, dim) for dim in (g.head_dim, g.value_dim)]
        for key, shape, dtype in zip(names, shapes, [torch.int64] * 2 + [g.dtype] * 2 * g.layers, strict=False):
            if tuple(state[key].shape) != shape or state[key].dtype != dtype:
                raise ValueError(
                    f"{key} is {state[key].dtype} {tuple(state[key].shape)}; these lanes hold {dtype} {shape}"
                )
        lane.length, lane.ends = length, [End(*end) for end in state[names[0]].tolist()]
        lengths = [end.length for end in lane.ends]
        if lengths != sorted(lengths) or (lengths and lengths[-1] > length):
            raise ValueError(f"{names[0]} has units that end at {lengths}, in a lane of {length} tokens")
        lane.store.reserve(length)
        lane.store.place(0, state[names[1]])
        for layer in range(g.layers if filled else 0):
            lane.store.put(layer, 0, *(state[f"{name}.layers.{layer}.{part}"] for part in ("keys", "values")))
        return lane, names

    # -- a step --------------------------------------------------------------------------------------------------

    def _open(self, lane: Lane, places: Tensor, seen: int) -> LaneStep:
        lane.store.reserve(lane.length + len(places))
        lane.step = LaneStep(self, lane, places, seen)
        return lane.step

    def _run(self, lane: Lane, step: LaneStep, commit: bool) -> Iterator[LaneStep]:
        """Beyond `length` a lane may hold anything, so that nothing has to be undone."""
        try:
            yield step
            if commit:
                step._complete()
                with self._changed:
                    lane.store.place(lane.length, step.places)
                    lane.length += step.m
        finally:
            lane.step = None

    # -- positions -----------------------------------------------------------------------------------------------

    def _source_top(self) -> int:
        """The last position that the source lane has used, or must leave free."""
        lane = self.source
        before = self.lanes.place.before_source(len(lane.ends), self.source.ends, self.target.ends)
        own = lane.store.placed(lane.began, lane.length)[:, : lane.axes]
        return max(before, int(own.max())) if len(own) else before

    def _source_places(self, m: int, tags: Mapping[str, Tensor]) -> Tensor:
        lane, top = self.source, self._source_top()
        if unknown := sorted(set(tags) - {"coordinates"}):
            raise ValueError(f"unknown tags {unknown}; a lane's tokens have coordinates or none")
        if "coordinates" not in tags:
            return words(top + 1 + torch.arange(m), lane.axes)
        given = torch.as_tensor(tags["coordinates"]).cpu()
        if tuple(given.shape) != (m, lane.axes) or given.is_floating_point() or bool((given < 0).any()):
            raise ValueError(
                f"coordinates are {given.dtype} {tuple(given.shape)}; expected whole numbers from 0, ({m}, {lane.axes})"
            )
        run = lane.length > (lane.began if self.lanes.origin == "unit" else 0)
        origin = int(lane.store.placed(lane.length - 1, lane.length)[0, -1]) if run else -1
        return placed(given.long(), top, origin)

    def _target_start(self) -> int:
        return self.lanes.place.before_target(len(self.target.ends), self.source.ends, self.target.ends)

    def _held_before(self) -> int:
        return self.target.ends[-1].held if self.target.ends else 0

    def _owed(self, length: int) -> int:
        """Tokens held back of the unit before that have not come when the target lane has `length` tokens."""
        return self._held_before() - (length - self.target.began)

    def _target_places(self, m: int) -> Tensor:
        lane = self.target
        place = torch.arange(m) - self._owed(lane.length)  # among the unit's own tokens; negative for those held back
        before = lane.ends[-1].position if lane.ends else 0
        return words(torch.where(place < 0, before, self._target_start()) + 1 + place, lane.axes)

    # -- what is refused -----------------------------------------------------------------------------------------

    def _lane(self, name: Which) -> Lane:
        if name not in ("source", "target"):
            raise ValueError(f"there is no lane {name!r}; there are 'source' and 'target'")
        return self.source if name == "source" else self.target

    def _takes(self, lane: Lane, name: Which, m: int, unit: int) -> None:
        self._idle(lane, "a second step")
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"a step takes a whole number of fresh tokens, 1 or more; got {m!r}")
        self._turn(lane, name, unit)

    def _turn(self, lane: Lane, name: Which, unit: int) -> None:
        """Raises ValueError if `unit` is not the open unit of a lane, or cannot be fed yet."""
        now = len(lane.ends)
        if isinstance(unit, bool) or not isinstance(unit, int) or unit < now:
            raise ValueError(f"unit {unit!r} of the {name} lane is closed; its open unit is {now}")
        if unit > now:
            raise ValueError(f"unit {unit} of the {name} lane comes too early; close unit {now} first")
        if reason := self._reason(name, unit):
            raise ValueError(reason)

    def _reason(self, name: Which, unit: int) -> str | None:
        """Why a lane's unit cannot be fed yet, as far as the other lane is concerned."""
        if name == "target":
            read = len(self.source.ends)
            return None if unit < read else f"unit {unit} was not read to its end; read it and close it, or wait for it"
        needed, said = self.lanes.place.said_before(unit), len(self.target.ends)
        if said >= needed:
            return None
        return (
            f"unit {unit} stands behind what is said of unit {needed - 1}, which is not known yet; close that in the "
            f"target lane, or wait for it ({type(self.lanes.place).__name__})"
        )

    def _idle(self, lane: Lane, what: str) -> None:
        if lane.step is not None:
            raise RuntimeError(f"{what} is not possible while a step is open")

    def _all_idle(self, what: str) -> None:
        self._idle(self.source, what)
        self._idle(self.target, what)
