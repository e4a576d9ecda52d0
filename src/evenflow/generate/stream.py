"""An endless video that can be asked for something else at any time, and costs the same for every chunk."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import FOLDED, Memory
from ..memory.chunks import ArenaState
from ..models.video.model import VideoModel
from .asking import Asked, Asking
from .engine import Engine, Given
from .guidance import Guidance
from .history import packed, seal
from .opening import opened
from .pixels import checked_image, checked_video, from_pixels, to_pixels
from .prompts import Embeddings, Wish, weights_of
from .saving import tensors_of, write
from .schedule import Call, Schedule
from .tracks import Track, drawn


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of video. frames: uint8 [n, H, W, 3]. first: number of its first pixel frame. prompt: what it was made
    for, in words. calls: network calls since the chunk before. seconds: how long they and decoding took."""

    frames: np.ndarray
    first: int
    prompt: str
    calls: int
    seconds: float


class VideoStream(Asking):
    """What `ef.video` returns: call `step`, or iterate, for ever.

    model, memory (None: nothing is remembered beyond frames in flight), schedule, seed, size (rows and columns of
    pixels), strength: as opened. history: what was asked and when, JSON-able; see `replay`. Every method that raises
    leaves the stream as it was. A stream belongs to one thread at a time; any number of streams share a model.
    """

    def __init__(
        self, model: VideoModel, prompt: str | Mapping[str, float] = "", memory: str | Memory | None = "default",
        schedule: str | Schedule = "chunks", seed: int = 0, guidance: Guidance | float | None = None,
        size: tuple[int, int] | None = None, strength: float | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.opened = opened(model, memory, schedule, seed, guidance, size, strength)
        self.memory, self.schedule, self.size = self.opened.memory, self.opened.schedule, self.opened.size
        self.seed, self.strength = seed, strength
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
        kept = [*engine.flight.values(), *engine.anchors.values(), *self._clean, *self._sources.values()]
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

    # -- what it is shown -------------------------------------------------------------------------------------------

    def show(self, image: Any) -> None:
        """Begin with a picture, uint8 [H, W, 3]: image-to-video. Under knot-forcing it is the reference, not a frame."""
        pixels, at = checked_image(image, self.size), self._position
        self._before_first("show")
        if self.strength is not None or self._watched:
            raise ValueError("an image is the first thing that a stream is shown, and not one that restyles a video")
        if self.memory is not None and self.memory.name == "knot-forcing":
            engine, latents = self._engine.fork(), self._codec().encode(from_pixels(pixels, self._device))[0][0]
            engine.know((-1,), latents, self._given())
            self._engine, self._reference, self._watched = engine, True, 1
        else:
            self._go_on(pixels)
        self._note("show", at, image=packed(pixels[0]))

    def watch(self, frames: Any) -> None:
        """A video, uint8 [n, H, W, 3]: to go on from, before the first chunk, or with `strength` to be restyled.

        To go on from it takes 1 + 4k frames (for a codec of stride 4), and 4k in every further call. What is to be
        restyled may come at any time and in any pieces; a chunk is made when its frames have come.
        """
        pixels, at = checked_video(frames, self.size), self._position
        if self.strength is None:
            self._before_first("watch")
            stride, total = self.model.config.stride[0], self._pixels(self._position) + len(pixels)
            if (total - 1) % stride:
                raise ValueError(
                    f"{len(pixels)} frames are no whole latents: give {len(pixels) - (total - 1) % stride} of them, or "
                    f"{stride - (total - 1) % stride} more"
                )
            self._go_on(pixels)
        else:
            latents, encoder = self._codec().encode(from_pixels(pixels, self._device), self._encoder)
            first = self._origin + self._latents_watched()
            self._sources |= {first + n: latent for n, latent in enumerate(latents[0].float())}
            self._encoder, self._watched = encoder, self._watched + len(pixels)
        self._note("watch", at, **seal(pixels))

    def _latents_watched(self) -> int:
        return 0 if not self._watched else (self._watched - 1) // self.model.config.stride[0] + 1

    def _go_on(self, pixels: np.ndarray) -> None:
        """Clean passes of a given video, chunk by chunk."""
        codec = self._codec()
        latents, encoder = codec.encode(from_pixels(pixels, self._device), self._encoder)
        _, decoder = codec.decode(latents, self._decoder)
        engine, count, first = self._engine.fork(), latents.shape[1], self._position
        for at in range(0, count, self.schedule.emits):
            part = latents[0, at : at + self.schedule.emits].float()
            engine.know(range(first + at, first + at + len(part)), part, self._given())
        self._engine, self._encoder, self._decoder = engine, encoder, decoder
        self._watched += len(pixels)
        self._position = self._origin = first + count
        self._plan = self.schedule.continued(self._origin)
        self._remember(latents[0].float())

    def _before_first(self, what: str) -> None:
        if self._turn:
            raise ValueError(
                f"{what} comes before the first chunk, and {self._position} latent frames are made: reset() first"
            )

    # -- going on ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self.step()

    def step(self) -> Chunk:
        """The next chunk. Raises ValueError where a video to be restyled has not come that far."""
        began, calls, done = time.perf_counter(), 0, list[tuple[Tensor, np.ndarray, Any]]()
        self._switch()
        wish, first = self._wish, self.frames
        seconds = self._ends()
        while not done:
            turn, following = (self._calls(self._turn + ahead) for ahead in (0, 1))
            given = self._given(seconds)
            self._watched_enough(turn)
            done = self._engine.turn(turn, following, given, self._decoded)
            self._turn, calls = self._turn + 1, calls + len(turn)
            for call in turn:
                for frame in call.fresh:
                    self._sources.pop(frame, None)
        latents, frames, self._decoder = done[0]
        self._position += len(latents)
        self._remember(latents)
        self._prune()
        return Chunk(frames, first, wish.said(seconds), calls, time.perf_counter() - began)

    @property
    def wants(self) -> int:
        """Pixel frames that have to be watched before the next chunk can be made; 0 where nothing is restyled."""
        if self.strength is None:
            return 0
        turn, last = self._turn, -1
        while True:
            calls = self._calls(turn)
            last = max([last, *(frame for call in calls for frame in call.fresh)])
            if any(call.emit for call in calls):
                return max(0, self._pixels(last + 1 - self._origin) - self._watched)
            turn += 1

    def _calls(self, turn: int) -> list[Call]:
        return [call.shifted(self._origin) for call in self._plan.turn(turn)]

    def _watched_enough(self, turn: list[Call]) -> None:
        if self.strength is None:
            return
        missing = [frame for call in turn for frame in call.fresh if frame not in self._sources]
        if missing:
            raise ValueError(
                f"latent frames {missing} of the video to be restyled have not come: watch {self._pixels(missing[-1] + 1)} "
                f"frames before this chunk; {self._watched} were watched"
            )

    def _decoded(self, latents: Tensor) -> tuple[Tensor, np.ndarray, Any]:
        frames, decoder = self._codec().decode(latents[None], self._decoder)
        return latents, to_pixels(frames), decoder

    def _given(self, seconds: float | None = None) -> Given:
        text = self._prompts.text(self._wish, self.seconds if seconds is None else seconds)
        away = self.opened.guidance is not None and self.opened.guidance.mode != "self"
        negative = self._prompts.text(Wish({"": 1.0}), 0.0) if away else None
        return Given(text, negative, self._sources, None, self._condition if self._tracks else None)

    def _condition(self, frames: Sequence[int]) -> Tensor | None:
        config = self.model.config
        if min(frames) < 0:
            return None
        grid = config.latent_size(self.size)
        return drawn(self._tracks, frames, grid=grid, stride=config.stride, fps=config.fps, seed=self.seed)

    def _remember(self, latents: Tensor) -> None:
        keeps = self.opened.keeps
        self._clean = [*self._clean, *latents.unbind(0)][-keeps:] if keeps else []

    # -- copy, forget, keep --------------------------------------------------------------------------------------

    def fork(self) -> VideoStream:
        """An independent copy over the same model."""
        twin = copy.copy(self)
        twin._engine, twin.history = self._engine.fork(), copy.deepcopy(self.history)
        twin._prompts = Embeddings(self._prompts.encode, self._prompts.read)
        twin._asked, twin._tracks, twin._clean = list(self._asked), list(self._tracks), list(self._clean)
        twin._sources = dict(self._sources)
        return twin

    def reset(self) -> None:
        """Begin anew, with the prompt that is in force and the same seed."""
        self._begin(self._wish.settled())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to one file, atomically and with a checksum; `resume_video` goes on bit for bit."""
        write(self, path)

    def _codec(self) -> Any:
        return self.model.codec

    @property
    def _device(self) -> torch.device:
        return self._engine.device


@torch.no_grad()
def _encoded(model: VideoModel, prompts: list[str]) -> Tensor:
    return model.encode_text(prompts)


@torch.no_grad()
def _read(model: VideoModel, embedding: Tensor) -> Any:
    weight = next(model.transformer.parameters())
    return model.transformer.read(embedding.to(weight.device, weight.dtype))
