"""What a stream is shown: a picture or a video to go on from, or a video to be made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Memory
from .asking import Asking
from .flow import Flow
from .history import packed, seal
from .pacing import motion
from .pixels import checked_image, checked_video, from_pixels
from .schedule import Call, Schedule


class Watching(Asking):
    """The part of a `VideoStream` that takes pictures."""

    memory: Memory | None
    strength: float | None
    _plan: Schedule
    _turn: int
    _origin: int
    _decoder: Any
    _encoder: Any
    _sources: dict[int, Tensor]
    _motion: dict[int, float]
    _seen: np.ndarray | None
    _level: float | None
    _watched: int

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
            self._moves(pixels)
            self._encoder, self._watched = encoder, self._watched + len(pixels)
        self._note("watch", at, **seal(pixels))

    def _moves(self, pixels: np.ndarray) -> None:
        """How far watched frames move, by the latent that they belong to."""
        stride = self.model.config.stride[0]
        for number, moved in enumerate(motion(pixels, self._seen), self._watched):
            frame = self._origin + -(-number // stride)
            self._motion[frame] = max(self._motion.get(frame, 0.0), float(moved))
        self._seen = pixels[-1].copy()

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

    def _watched_enough(self, turn: list[Call]) -> None:
        if self.strength is None:
            return
        missing = [frame for call in turn for frame in call.fresh if frame not in self._sources]
        if missing:
            raise ValueError(
                f"latent frames {missing} of the video to be restyled have not come: watch {self._pixels(missing[-1] + 1)} "
                f"frames before this chunk; {self._watched} were watched"
            )

    def _bears(self, turn: list[Call]) -> Flow | None:
        """The sampler of a turn whose fresh frames enter with as much noise as their motion bears."""
        control, sampler = self.opened.control, self._engine.sampler
        fresh = [frame for call in turn for frame in call.fresh]
        if control is None or not fresh or not isinstance(sampler, Flow):
            return None
        level = control.level(max(self._motion[frame] for frame in fresh), self._level)
        least = sampler.sigmas[1] + 1e-3 if sampler.levels > 1 else 0.0
        self._level = max(level, least)
        return replace(sampler, sigmas=(self._level, *sampler.sigmas[1:]), times=())

    def _remember(self, latents: Tensor) -> None:
        keeps = self.opened.keeps
        self._clean = [*self._clean, *latents.unbind(0)][-keeps:] if keeps else []

    def _codec(self) -> Any:
        return self.model.codec

    def _calls(self, turn: int) -> list[Call]:
        return [call.shifted(self._origin) for call in self._plan.turn(turn)]

    @property
    def _device(self) -> torch.device:
        return self._engine.device
