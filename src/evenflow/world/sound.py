"""The sound of a stretch: a hum for each thing whose pitch follows its speed, and a click when things bounce or collide."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .actors import HUM, NOTES
from .stage import PHASE, RADIUS, VX, VY, Stretch, X

RATE = 16_000  # samples a second
CLICK = 0.05  # seconds that one lasts
_TONES = {"bounce": 1800.0, "collide": 1200.0}  # Hz


def samples_before(frame: int, fps: float) -> int:
    """How many samples come before a frame."""
    return round(frame * RATE / fps)


def sound(stretch: Stretch, width: float, fps: float) -> NDArray[np.float32]:
    """Mono, float32 within −1 to 1, from the start of the first frame to the end of the last one. width: of the view."""
    begin = samples_before(stretch.first, fps)
    wave = np.zeros(samples_before(stretch.first + stretch.frames, fps) - begin)
    table = stretch.actors
    speed = np.hypot(table[..., VX], table[..., VY])
    inside = np.clip(np.minimum(table[..., X] + 0.1, width + 0.1 - table[..., X]) / 0.1, 0, 1)
    loud = table[..., RADIUS] * np.minimum(speed * 3, 1) * inside
    notes = np.array(NOTES)[np.array(stretch.numbers, int) % len(NOTES)]
    for frame in range(1, len(table)):
        start = samples_before(stretch.first + frame - 1, fps) - begin
        stop = samples_before(stretch.first + frame, fps) - begin
        share = (np.arange(stop - start) + 0.5) / (stop - start)
        heard = np.flatnonzero(loud[frame] + loud[frame - 1])
        if len(heard):
            turns = table[frame, heard, PHASE, None] + (notes + HUM * speed[frame])[heard, None] / fps * share
            volume = loud[frame - 1, heard, None] * (1 - share) + loud[frame, heard, None] * share
            wave[start:stop] += (np.sin(2 * math.pi * turns) * volume).sum(0)
    for happening in (*stretch.heard, *stretch.happenings):
        tone = _TONES.get(happening.kind)
        if tone is not None:
            _click(wave, happening.time * RATE - begin, tone, 0.25 + 0.3 * min(happening.value, 1.0))
    return np.clip(wave, -1, 1).astype(np.float32)


def _click(wave: NDArray[np.float64], at: float, tone: float, volume: float) -> None:
    """Add a click that begins at a sample (a fraction counts, before the start or not)."""
    start, stop = max(math.ceil(at), 0), min(math.ceil(at + CLICK * RATE), len(wave))
    if stop > start:
        t = (np.arange(start, stop) - at) / RATE
        wave[start:stop] += volume * np.cos(2 * math.pi * tone * t) * np.exp(-t / 0.007)
