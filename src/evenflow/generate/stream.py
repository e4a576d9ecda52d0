"""An endless video that can be asked for something else at any time, and costs the same for every chunk."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import FOLDED, Memory, Rerouted, Routed
from ..memory.chunks import ArenaState
from ..models.video.model import VideoModel
from .asking import Asked
from .engine import Engine, Given
from .flow import Flow
from .guidance import Guidance
from .opening import opened
from .pacing import NoiseControl
from .pixels import to_pixels
from .prompts import Embeddings, Wish, weights_of
from .saving import tensors_of, write
from .schedule import Chunks, Schedule
from .tracks import Track, drawn
from .watching import Watching


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of video. frames: uint8 [n, H, W, 3]. first: number of its first pixel frame. prompt: what it was made
    for, in words. calls: network calls since the chunk before. seconds: how long they and decoding took."""

    frames: np.ndarray
    first: int
    prompt: str
    calls: int
    seconds: float


class VideoStream(Watching):
    """What `ef.video` returns: call `step`, or iterate, for ever.

    model, memory (None: nothing is remembered beyond frames in flight), schedule, seed, size (rows and columns of
    pixels), strength: as opened. history: what was asked and when, JSON-able; see `replay`. Every method that raises
    leaves the stream as it was. A stream belongs to one thread at a time; any number of streams share a model.
    """

    def __init__(
        self, model: VideoModel, prompt: str | Mapping[str, float] = "", memory: str | Memory | None = "default",
        schedule: str | Schedule = "chunks", seed: int = 0, guidance: Guidance | float | None = None,
        size: tuple[int, int] | None = None, strength: float | NoiseControl | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.opened = opened(model, memory, schedule, seed, guidance, size, strength)
        self.memory, self.schedule, self.size = self.opened.memory, self.opened.schedule, self.opened.size
        self.seed, self.strength = seed, self.opened.strength
        self._prompts = Embeddings(partial(_encoded, model), partial(_read, model))
        wish = Wish(weights_of(prompt))
        self._prompts.text(wish, 0.0)
        self._begin(wish)

    def _begin(self, wish: Wish) -> None:
        self._engine: Engine = self.opened.engine(self.model)
        self._plan, self._turn = self.schedule, 0
        self._origin = 0  # given frames before the first that is made
        self._since = 0  # the frame with which the memory begins
        self._position = 0
        self._wish, self._asked, self._tracks, self._next_id = wish, list[Asked](), list[Track](), 0
        self._decoder: Any = None
        self._encoder: Any = None
        self._clean: list[Tensor] = []  # the last frames that the memory knows, [C, H, W] each
        self._sources: dict[int, Tensor] = {}  # watched latents that are still to be restyled, by frame
        self._reference = False  # whether the memory begins with a picture that is no frame
        self._motion: dict[int, float] = {}  # how far they move, by frame
        self._seen: np.ndarray | None = None  # the last pixel frame of them
        self._level: float | None = None  # noise with which the last of them began
        self._watched = 0  # pixel frames that were shown or watched
        self.history: list[dict[str, Any]] = [{"frame": 0, "do": "prompt", "prompt": wish.now}]

    # -- where it is ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Latent frames so far, given ones included."""
        return self._position

    @property
    def frames(self) -> int:
        """Pixel frames so far, given ones included."""
        return self._pixels(self._position)

    @property
    def seconds(self) -> float:
        """Length of the video so far."""
        return self.frames / self.model.config.fps

    @property
    def prompt(self) -> str:
        """What is in force now, in words."""
        return self._wish.said(self.seconds)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the stream keeps: memory, latents in flight and behind, what the codec remembers."""
        engine = self._engine
        kept = [
            *engine.flight.values(),
            *engine.anchors.values(),
            *engine.entered.values(),
            *self._clean,
            *self._sources.values(),
        ]
        memory = 0 if engine.memory is None else engine.memory.nbytes
        return memory + sum(t.nbytes for t in (*kept, *tensors_of((self._decoder, self._encoder))))

    def held(self) -> list[tuple[int, str]]:
        """Latent frames that are held, and where: "sink", "memory", "window" or "flight".

        −1 in "memory" or "sink" stands for what was folded from several; −1 in "sink" under knot-forcing is the
        reference image.
        """
        found: dict[tuple[int, str], None] = {}
        state = self._engine.memory
        if isinstance(state, ArenaState) and state.frame:
            offset = self._since - self._reference
            sinks, seen = state.memory.sink * state.frame, set(state.held(0))
            slots = sinks + state.memory.fold.slots(state.frame)
            for column, index in enumerate(state.tables[0].index[0, 0, :: state.frame].tolist()):
                at = column * state.frame
                region = "sink" if at < sinks else "memory" if at < slots else "window"
                if index in seen:
                    there = index // state.frame + offset
                    found[-1 if self._reference and not index else there, region] = None
                elif index == FOLDED:
                    found[-1, region] = None
        ordered = sorted(found, key=lambda item: (["sink", "memory", "window"].index(item[1]), item[0]))
        return [*ordered, *((frame, "flight") for frame in sorted(self._engine.flight))]

    # -- going on ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self.step()

    def step(
        self, *, seed: int | None = None, follow: float = 0.0, route: int | Callable[[np.ndarray], int] | None = None
    ) -> Chunk:
        """The next chunk. Raises ValueError where a video to be restyled has not come that far.

        What it may be told, with the schedule `Chunks`: seed, of this chunk's noise in place of the stream's, keyed by
        frames of the chunk. follow: σ from −1 to 1, how much of its first noise is that of the chunk before, σ·n + √(1 − σ²)·ε.
        route: what a memory with routes is told of it (`Routed`, `Rerouted`), or a function of its pixel frames, uint8
        [n, H, W, 3], that tells what it is told when it keeps them. What was told is noted in `history`.
        """
        self._may_be_told(seed, follow, route)
        at, sent = self._position, list[int]()

        def decided(made: tuple[Tensor, np.ndarray, Any]) -> int:
            assert callable(route)
            sent.append(index(route(made[1])))
            return sent[-1]

        told = partial(replace, seed=seed, follow=float(follow), route=decided if callable(route) else route)
        began, calls, done = time.perf_counter(), 0, list[tuple[Tensor, np.ndarray, Any]]()
        self._switch()
        wish, first = self._wish, self.frames
        seconds = self._ends()
        while not done:
            turn, following = (self._calls(self._turn + ahead) for ahead in (0, 1))
            self._watched_enough(turn)
            before = self._level
            given = told(self._given(seconds, self._bears(turn)))
            try:
                done = self._engine.turn(turn, following, given, self._decoded)
            except BaseException:
                self._level = before
                raise
            self._turn, calls = self._turn + 1, calls + len(turn)
            for call in turn:
                for frame in call.fresh:
                    self._sources.pop(frame, None)
                    self._motion.pop(frame, None)
        latents, frames, self._decoder = done[0]
        self._position += len(latents)
        self._remember(latents)
        self._prune()
        if given.varied or given.route is not None:
            self._note("step", at, seed=seed, follow=float(follow), route=sent[0] if sent else route)
        return Chunk(frames, first, wish.said(seconds), calls, time.perf_counter() - began)

    def _may_be_told(self, seed: int | None, follow: float, route: Any) -> None:
        if seed is None and not follow and route is None:
            return
        if not isinstance(self.schedule, Chunks):
            raise ValueError(
                f"{type(self.schedule).__name__.lower()} makes several chunks at once; only with chunks can one be told a "
                "seed, a route or what to follow"
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
            raise ValueError(f"seed is {seed!r}; it must be a whole number")
        if isinstance(follow, bool) or not isinstance(follow, (int, float)) or not -1 <= follow <= 1:
            raise ValueError(f"follow is {follow!r}; it must lie between -1 and 1, and 0 follows nothing")
        memory = self.memory
        assert memory is not None  # `Chunks` goes with none but a memory
        if route is not None and not (isinstance(memory.fold, Routed) or isinstance(memory.recall, Rerouted)):
            raise ValueError(f"{memory.name} has no routes; open the stream with memory='stream-t1' or 'kvpo'")
        if route is not None and not callable(route) and (isinstance(route, bool) or not isinstance(route, int)):
            raise ValueError(f"route is {route!r}; it must be a whole number, or a function that tells one")

    def _decoded(self, latents: Tensor) -> tuple[Tensor, np.ndarray, Any]:
        frames, decoder = self._codec().decode(latents[None], self._decoder)
        return latents, to_pixels(frames), decoder

    def _given(self, seconds: float | None = None, sampler: Flow | None = None) -> Given:
        text = self._prompts.text(self._wish, self.seconds if seconds is None else seconds)
        away = self.opened.guidance is not None and self.opened.guidance.mode != "self"
        negative = self._prompts.text(Wish({"": 1.0}), 0.0) if away else None
        return Given(text, negative, self._sources, sampler, self._condition if self._tracks else None)

    def _condition(self, frames: Sequence[int]) -> Tensor | None:
        config = self.model.config
        if min(frames) < 0:
            return None
        grid = config.latent_size(self.size)
        return drawn(self._tracks, frames, grid=grid, stride=config.stride, fps=config.fps, seed=self.seed)

    # -- copy, forget, keep --------------------------------------------------------------------------------------

    def fork(self) -> VideoStream:
        """An independent copy over the same model."""
        twin = copy.copy(self)
        twin._engine, twin.history = self._engine.fork(), list(self.history)
        twin._prompts = Embeddings(self._prompts.encode, self._prompts.read)
        twin._asked, twin._tracks, twin._clean = list(self._asked), list(self._tracks), list(self._clean)
        twin._sources, twin._motion = dict(self._sources), dict(self._motion)
        return twin

    def reset(self) -> None:
        """Begin anew, with the prompt that is in force and the same seed."""
        self._begin(self._wish.settled())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to one file, atomically and with a checksum; `resume_video` goes on bit for bit."""
        write(self, path)


@torch.no_grad()
def _encoded(model: VideoModel, prompts: list[str]) -> Tensor:
    return model.encode_text(prompts)


@torch.no_grad()
def _read(model: VideoModel, embedding: Tensor) -> Any:
    weight = next(model.transformer.parameters())
    return model.transformer.read(embedding.to(weight.device, weight.dtype))
