"""Carries out calls: latents in flight, one memory, one network. Knows nothing of prompts, pixels or files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..memory import MemoryState
from ..memory.chunks import ArenaState
from ..models.video import Text, places
from ..models.video.dense import Dense
from .flow import Sampler, noise
from .guidance import Guidance
from .schedule import Call

Network = Callable[[Tensor, Tensor, Any, Any], Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Given:
    """What a turn is given from outside.

    text, negative: what `network` reads, a `Text`. sources: clean latents that fresh frames start from, by frame.
    sampler: for this turn, in place of the engine's; only what level 0 means may differ. condition: frames → the channels behind their latents,
    [F, extra, H, W], None for zeros. seed: of this turn's noise, then keyed by (seed, frame of the turn, level), so that
    two turns with one seed draw alike; None: the engine's, by frames of the stream. follow: σ from −1 to 1, by which the
    first noise of a frame is σ·n + √(1 − σ²)·ε of its own draw ε and of n, the first noise of the frame as far before it
    as the turn has frames. route: what the memory is told of the turn's tokens, or a function that tells it of what
    `finish` made of the turn's latents, for the calls after that; None: nothing.
    """

    text: Any = None
    negative: Any = None
    sources: Mapping[int, Tensor] = field(default_factory=dict)
    sampler: Sampler | None = None
    condition: Callable[[Sequence[int]], Tensor | None] | None = None
    seed: int | None = None
    follow: float = 0.0
    route: int | Callable[[Any], int] | None = None

    @property
    def varied(self) -> bool:
        """Whether the noise is another than the engine's."""
        return self.seed is not None or self.follow != 0


class Engine:
    """What is in flight, and how a turn changes it.

    network(x, t, text, attend) → v: a `VideoTransformer`, or anything with its signature. shape: of a latent frame,
    (C, H, W). tokens: rows and columns of tokens of a frame. extra: condition channels that the network takes behind
    those of the latent. memory: None where frames see only what is in the same call. slots: noise belongs to a level
    and not to a frame. segments: whether the memory wants to know the prompt's number. Random numbers are keyed by
    (seed, frame, level).

    flight: latents by frame, float32 [C, H, W], never written to, so that a copy of the dict is a copy of the state.
    entered: likewise the first noise of the last turn's frames, where it was another than the engine's.
    """

    def __init__(
        self, network: Network, sampler: Sampler, shape: tuple[int, int, int], *, seed: int = 0,
        memory: MemoryState | None = None, tokens: tuple[int, int] = (1, 1), extra: int = 0, slots: bool = False,
        segments: bool = False, guidance: Guidance | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.network, self.sampler, self.shape, self.seed, self.memory = network, sampler, shape, seed, memory
        self.tokens, self.extra, self.slots, self.segments, self.guidance = tokens, extra, slots, segments, guidance
        self.device = torch.device(device)
        if guidance is not None and guidance.mode != "self" and memory is not None:
            raise ValueError(
                f"guidance {guidance.mode!r} evaluates more rows than {memory.memory.name} has; take 'self', or no memory"
            )
        self.flight: dict[int, Tensor] = {}
        self.anchors: dict[int, Tensor] = {}  # clean latents that guidance leads away from
        self.entered: dict[int, Tensor] = {}
        self.segment = 0
        self._dense: dict[int, Any] = {}
        self._places: dict[int, Tensor] = {}

    def noise(self, frame: int, level: int) -> Tensor:
        """The noise with which a frame comes to a level, [C, H, W]."""
        return noise(self.seed, (0 if self.slots else frame, level), self.shape).to(self.device)

    def _noise(self, frame: int, level: int, call: Call, given: Given) -> Tensor:
        """The same, in a turn that may have a seed of its own."""
        if given.seed is None:
            return self.noise(frame, level)
        return noise(given.seed, (call.frames.index(frame), level), self.shape).to(self.device)

    def _first(self, frame: int, call: Call, given: Given) -> Tensor:
        """The noise with which a frame enters, [C, H, W]."""
        own, before = self._noise(frame, 0, call, given), frame - len(call.frames)
        if not given.follow or before < 0:
            return own
        parent = self.entered.get(before)
        parent = self.noise(before, 0) if parent is None else parent
        return given.follow * parent + (1 - given.follow**2) ** 0.5 * own

    # -- a turn --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def turn(
        self, calls: Sequence[Call], following: Sequence[Call], given: Given, finish: Callable[[Tensor], T]
    ) -> list[T]:
        """Carry out the calls of a turn: what `finish` makes of the latents [n, C, H, W] that each emits.

        following: the calls of the next turn, which say what has to stay in flight. At most the last call changes the
        memory, and `finish` is called before it does. After an error memory and flight are as they were.
        """
        flight, anchors, entered = dict(self.flight), dict(self.anchors), self.entered
        done, aside, told = list[T](), dict[int, Tensor](), given
        try:
            for call in calls:
                if done and callable(told.route):
                    told = replace(told, route=told.route(done[-1]))
                done += self._call(call, told, finish, aside)
            self.flight |= aside
        except BaseException:
            self.flight, self.anchors, self.entered = flight, anchors, entered
            raise
        fresh = {frame for call in calls for frame in call.fresh} if given.varied else set()
        self.entered = {frame: first for frame, first in self.entered.items() if frame in fresh}
        stay = {frame for call in following for frame in call.frames if frame not in call.fresh}
        self.flight = {frame: latent for frame, latent in self.flight.items() if frame in stay}
        self.anchors = {frame: latent for frame, latent in self.anchors.items() if frame in stay}
        return done

    def _call(self, call: Call, given: Given, finish: Callable[[Tensor], T], aside: dict[int, Tensor]) -> list[T]:
        self._enter(call, given)
        aside |= {frame: self.flight[frame] for frame in call.aside}
        x = torch.stack([self.flight[frame] for frame in call.frames]).unflatten(0, (call.rows or 1, -1))
        with self._step(call, x, given) as attend:
            out = self._guided(call, x, given, attend)
            if call.clean:
                return []
            clean, moved = self._moved(call, x, out, given)
            self.flight |= dict(zip(call.frames, moved.flatten(0, 1), strict=True))
            at = [call.frames.index(frame) for frame in call.emit]
            return [finish(clean.flatten(0, 1)[at])] if at else []

    def _enter(self, call: Call, given: Given) -> None:
        sampler = given.sampler or self.sampler
        for frame in call.fresh:
            source, first = given.sources.get(frame), self._first(frame, call, given)
            self.flight[frame] = sampler.enter(source, first)
            if given.varied:
                self.entered = {**self.entered, frame: first}
            if self.guidance is not None and self.guidance.mode == "self":
                self.anchors[frame] = torch.zeros_like(self.flight[frame]) if source is None else source

    def _moved(self, call: Call, x: Tensor, out: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        """Clean latents and those at the next levels; a pinned frame stays, or becomes the mean of both its versions."""
        sampler, fresh = given.sampler or self.sampler, None
        if sampler.draws and any(level < sampler.levels for level in call.after):
            pairs = zip(call.frames, call.after, strict=True)
            drawn = [
                self._noise(f, level, call, given) if level < sampler.levels else torch.zeros_like(x[0, 0])
                for f, level in pairs
            ]
            fresh = torch.stack(drawn).view_as(x)
        clean, moved = sampler.move(x, out, call.before, call.after, fresh)
        if call.pinned:
            held, rest = x[:, : call.pinned], slice(call.pinned, None)
            kept = (held + clean[:, : call.pinned]) / 2 if call.emit else held
            clean, moved = torch.cat([kept, clean[:, rest]], 1), torch.cat([kept, moved[:, rest]], 1)
        return clean, moved

    # -- the network ---------------------------------------------------------------------------------------------

    def _guided(self, call: Call, x: Tensor, given: Given, attend: Any) -> Tensor:
        sampler, by = given.sampler or self.sampler, self.guidance
        times = sampler.t(call.before)
        if by is None or not by.active or call.clean:
            return self._network(call, x, times, given.text, given, attend)
        rows = len(x)
        if by.mode == "full":
            both = self._network(
                call, torch.cat([x, x]), times * 2, texts(given.negative, rows, given.text, rows), given, attend
            )
            return by.mix(both[rows:], both[:rows])
        if by.mode == "onetime" and call.fresh:
            first, size = x[:1], len(times) // rows
            text = texts(given.negative, 1, given.text, rows)
            both = self._network(call, torch.cat([first, x]), times[:size] + times, text, given, attend)
            anchors = sampler.clean(first, both[:1], call.before[:size])[0]
            self.anchors |= dict(zip(call.frames[:size], anchors, strict=True))
            out = both[1:]
        else:
            out = self._network(call, x, times, given.text, given, attend)
        anchor = torch.stack([self.anchors[frame] for frame in call.frames]).view_as(x)
        return by.mix(out, sampler.toward(x, anchor, call.before).to(out.dtype))

    def _network(self, call: Call, x: Tensor, times: Sequence[float], text: Any, given: Given, attend: Any) -> Tensor:
        """x [R, F, C, H, W] with one time a frame → the network's output; rows that a memory has and x lacks are made."""
        t = torch.tensor(times, dtype=torch.float32, device=x.device).view(x.shape[:2])
        if self.extra:
            made = given.condition(call.frames) if given.condition else None
            channels = x.new_zeros(len(call.frames), self.extra, *self.shape[1:]) if made is None else made.to(x)
            channels = channels.view(call.rows or 1, x.shape[1], self.extra, *self.shape[1:])
            x = torch.cat([x, torch.cat([channels[: len(x) - len(channels)], channels])], 2)
        copies = self.memory.memory.rows if self.memory is not None and call.commit else 1
        if copies == 1:
            return self.network(x, t, text, attend)
        if not call.rows:  # frames that all copies keep alike
            return self.network(x.expand(copies, *x.shape[1:]), t.expand(copies, -1), text, attend)[:1]
        at = list(call.before[:: x.shape[1]])
        every, when = x.new_zeros(copies, *x.shape[1:]), t.new_zeros(copies, x.shape[1])
        every[at], when[at] = x, t
        return self.network(every, when, text, attend)[at]

    def _step(self, call: Call, x: Tensor, given: Given) -> AbstractContextManager[Any]:
        frames = x.shape[1]
        if self.memory is None:
            return nullcontext(self._alone(frames))
        copies, m, tags = self.memory.memory.rows, frames * self.tokens[0] * self.tokens[1], self.tags(frames, given)
        there = None
        if call.rows:
            there = torch.zeros(copies, m, dtype=torch.bool)
            there[list(call.before[::frames])] = True
        row = 0 if copies > 1 and not call.commit else None
        return _attending(self.memory, self.memory.step(m, tags, call.commit, there, row))

    def _alone(self, frames: int) -> Any:
        """Attention of frames among themselves, at their places in the call."""
        if not hasattr(self.network, "rope"):
            return None
        if frames not in self._dense:
            head_dim, dtype = self.network.config.head_dim, next(self.network.parameters()).dtype  # type: ignore[attr-defined]
            times = torch.arange(frames, device=self.device)
            self._dense[frames] = Dense(self.network.rope, head_dim, times, *self.tokens, dtype=dtype)
        return self._dense[frames]

    def tags(self, frames: int, given: Given) -> dict[str, Tensor]:
        """What a memory is told of the tokens of so many frames."""
        if frames not in self._places:
            self._places[frames] = places(frames, *self.tokens, self.device)
        where = self._places[frames]
        told = {"segment": self.segment if self.segments else None, "route": given.route}
        every = {name: where[:, 0] * 0 + tag for name, tag in told.items() if isinstance(tag, int)}
        return {"coordinates": where} | every

    # -- clean frames --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def know(self, frames: Sequence[int], latents: Tensor, given: Given, again: bool = False) -> None:
        """A clean pass of latents [F, C, H, W] that the memory keeps; again: in place of its last F frames (recache)."""
        if self.memory is None:
            self.flight |= dict(zip(frames, latents, strict=True))
            return
        level = (self.sampler.levels,) * len(frames)
        call = Call(tuple(frames), level, level, commit=True, clean=True)
        if not again:
            with self._step(call, latents[None], given) as attend:
                self._network(call, latents[None], self.sampler.t(level), given.text, given, attend)
            return
        if not isinstance(self.memory, ArenaState) or self.memory.memory.rows > 1:
            raise ValueError(f"{self.memory.memory.name} cannot compute frames anew; ask with how='keep' or 'clear'")
        m = len(frames) * self.tokens[0] * self.tokens[1]
        with _attending(self.memory, self.memory.recache(m, self.tags(len(frames), given))) as attend:
            self._network(call, latents[None], self.sampler.t(level), given.text, given, attend)

    def fork(self) -> Engine:
        """An independent copy over the same network."""
        twin = copy.copy(self)
        twin.flight, twin.anchors, twin.entered = dict(self.flight), dict(self.anchors), dict(self.entered)
        twin.memory = None if self.memory is None else self.memory.fork()
        return twin


@contextmanager
def _attending(memory: MemoryState, step: AbstractContextManager[Any]) -> Iterator[Any]:
    with step:
        yield memory.attend


def texts(first: Any, n: int, second: Any, m: int) -> Any:
    """n rows of one text and m of another, each a `Text` or a tensor of one row."""
    if isinstance(first, Tensor):
        return torch.cat([first.expand(n, *first.shape[1:]), second.expand(m, *second.shape[1:])])
    pairs = [
        [texts(a, n, b, m) for a, b in zip(getattr(first, part), getattr(second, part), strict=True)]
        for part in ("keys", "values")
    ]
    return Text(*map(tuple, pairs))
