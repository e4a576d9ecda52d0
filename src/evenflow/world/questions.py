"""Questions about a stretch, their answers, and the frames that show the evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .actors import BLEND
from .stage import Stretch
from .truth import Event

CLEAR = 0.6  # of a thing that must be to be seen before one asks about it
OVER = 8  # frames over which a direction is told
FAR = 4.0  # pixels of 64 that it must be, and twice as far as across
KINDS = (
    "count",
    "colour",
    "shape",
    "direction",
    "bounces",
    "collision",
    "change",
    "hidden",
    "leaving",
    "place",
    "light",
)


@dataclass(frozen=True)
class Question:
    """kind: one of KINDS. asked: the frame of the film at which it is asked. first, last: the frames that hold the evidence.

    things: the columns of the things that it is about. All frames from first to last, and no others, answer it.
    """

    kind: str
    text: str
    answer: str
    asked: int
    first: int
    last: int
    things: tuple[int, ...] = ()


def questions(
    stretch: Stretch,
    events: list[Event],
    visibility: NDArray[np.float64],
    tracks: NDArray[np.float64],
    size: int,
) -> list[Question]:
    """All questions of a stretch, by the frame at which they are asked. size: shorter side of the view in pixels."""
    unchanged = set(range(len(stretch.things))) - {
        n for event in events if event.what in ("changed colour", "changed shape") for n in event.things
    }
    found = [
        *_counting(visibility),
        *_looks(stretch, unchanged, visibility),
        *_directions(stretch, unchanged, visibility, tracks, size),
        *_bounces(stretch, unchanged, events, visibility),
        *_meetings(stretch, unchanged, events, visibility),
        *_changes(stretch, events, visibility),
        *_settings(stretch),
    ]
    return sorted(found, key=lambda question: (question.asked, question.text))


def _named(stretch: Stretch, unchanged: set[int]) -> dict[int, str]:
    """Names "red circle" of the things that keep theirs, where nothing else is called so."""
    names = [f"{thing.colour} {thing.shape}" for thing in stretch.things]
    return {n: names[n] for n in sorted(unchanged) if names.count(names[n]) == 1}


def _counting(visibility: NDArray[np.float64]) -> Iterator[Question]:
    plain = ((visibility >= CLEAR) | (visibility <= 0)).all(1)
    if plain.any():
        frame = int(np.flatnonzero(plain)[-1])
        count = int((visibility[frame] > 0).sum())
        yield Question("count", "How many things are to be seen now?", str(count), frame, frame, frame)


def _looks(stretch: Stretch, unchanged: set[int], visibility: NDArray[np.float64]) -> Iterator[Question]:
    shapes = [thing.shape for thing in stretch.things]
    colours = [thing.colour for thing in stretch.things]
    for n in sorted(unchanged):
        seen = np.flatnonzero(visibility[:, n] >= CLEAR)
        if not len(seen) or len(unchanged) < len(shapes):
            continue  # while another thing changes, its shape or colour may be this one's
        first = int(seen[0])
        gaps = np.flatnonzero(np.diff(seen) > 1)
        last = int(seen[gaps[0]] if len(gaps) else seen[-1])
        if shapes.count(shapes[n]) == 1:
            yield Question("colour", f"What colour is the {shapes[n]}?", colours[n], last, first, last, (n,))
        if colours.count(colours[n]) == 1:
            yield Question("shape", f"What shape is the {colours[n]} thing?", shapes[n], last, first, last, (n,))


def _directions(
    stretch: Stretch, unchanged: set[int], visibility: NDArray[np.float64], tracks: NDArray[np.float64], size: int
) -> Iterator[Question]:
    for n, name in _named(stretch, unchanged).items():
        if len(tracks) <= OVER:
            continue
        step = tracks[OVER:, n] - tracks[:-OVER, n]
        clear = (visibility[OVER:, n] >= CLEAR) & (visibility[:-OVER, n] >= CLEAR)
        for along, ways in ((0, ("left", "right")), (1, ("up", "down"))):
            far = np.abs(step[:, along]) >= np.maximum(FAR * size / 64, 2 * np.abs(step[:, 1 - along]))
            frames = np.flatnonzero(clear & far)
            if len(frames):
                first = int(frames[-1])
                way = ways[int(step[first, along] > 0)]
                last = first + OVER
                yield Question("direction", f"Which way does the {name} move now?", way, last, first, last, (n,))


def _bounces(
    stretch: Stretch, unchanged: set[int], events: list[Event], visibility: NDArray[np.float64]
) -> Iterator[Question]:
    end = len(visibility) - 1
    for n, name in _named(stretch, unchanged).items():
        times = [event.frame for event in events if event.what == "bounce" and event.things == (n,)]
        if times and min(times) > 2 and max(times) < end - 2:
            yield Question(
                "bounces", f"How often did the {name} bounce off a border?", str(len(times)), end, 0, end, (n,)
            )


def _meetings(
    stretch: Stretch, unchanged: set[int], events: list[Event], visibility: NDArray[np.float64]
) -> Iterator[Question]:
    names, end = _named(stretch, unchanged), len(visibility) - 1
    for event in events:
        first, last = max(event.frame - 3, 0), min(event.frame + 3, end)
        if event.what == "collide" and all(n in names for n in event.things) and event.frame == last - 3:
            a, b = event.things
            text = f"What did the {names[a]} just collide with?"
            yield Question("collision", text, f"the {names[b]}", last, first, last, (a, b))
        elif event.what == "occluded" and event.by is not None and event.things[0] in names and event.by in names:
            n = event.things[0]
            text = f"What hides the {names[n]}?"
            yield Question("hidden", text, f"the {names[event.by]}", event.frame, first, event.frame, (n, event.by))
        elif event.what == "leave" and event.things[0] in names and event.frame == last - 3:
            n = event.things[0]
            before = max(event.frame - OVER, 0)
            if visibility[before, n] >= CLEAR:
                yield Question("leaving", "What is just leaving?", f"the {names[n]}", last, before, last, (n,))


def _changes(stretch: Stretch, events: list[Event], visibility: NDArray[np.float64]) -> Iterator[Question]:
    reshaped = {n for event in events if event.what == "changed shape" for n in event.things}
    shapes = [thing.shape for thing in stretch.things]
    for event in events:
        if event.what != "changed colour" or event.frame + BLEND >= len(visibility):
            continue
        (n,), last = event.things, event.frame + BLEND
        again = [other for other in events if other.what == "changed colour" and other.things == (n,)]
        if len(again) == 1 and not reshaped and shapes.count(shapes[n]) == 1 and visibility[last, n] >= CLEAR:
            text = f"What colour did the {shapes[n]} become?"
            yield Question("change", text, stretch.things[n].colour, last, event.frame, last, (n,))


def _settings(stretch: Stretch) -> Iterator[Question]:
    first = stretch.first
    starts = [max(frame - first, 0) + (BLEND if frame > first else 0) for frame, _ in stretch.prompts]
    ends = [frame - first - 1 for frame, _ in stretch.prompts[1:]] + [stretch.frames - 1]
    carried = stretch.prompts[0][0] + BLEND - first  # a change that began before the stretch
    if stretch.prompts[0][0] and carried > starts[0]:
        starts[0] = carried
    for start, end, (_, scene) in zip(starts, ends, stretch.prompts, strict=True):
        if start <= end:
            yield Question("place", "What place is this?", scene.place, end, start, end)
            yield Question("light", "Is it day, dusk or night?", scene.light, end, start, end)
