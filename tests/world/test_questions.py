"""Every question can be answered from the frames that are said to hold the evidence, by other means than it was made."""

from __future__ import annotations

from collections import Counter

import numpy as np

from evenflow.world import COLOURS, SHAPES, Film, Question, Scene, Thing, film, judge
from evenflow.world.questions import KINDS

FILMS = [film(seed, 96, changes=2, variety="full") for seed in range(30)] + [
    film(500 + seed, 80, Scene((Thing("circle", "red", motion="collide"), Thing("star", "blue", motion="collide"), Thing("ring", "green", "large"))))
    for seed in range(6)
]  # fmt: skip


def answered(clip: Film, question: Question) -> str | None:
    """The answer from masks, tracks and pixels of the evidence alone; None if this referee cannot tell."""
    part = slice(question.first, question.last + 1)
    masks, tracks, pixels = clip.masks[part], clip.tracks[part], clip.pixels[part]
    names = [f"the {thing.colour} {thing.shape}" for thing in clip.things]
    if question.kind == "count":
        return str(int(masks[0].any((1, 2)).sum()))
    if question.kind in ("colour", "change"):
        (n,) = question.things
        inner = masks[-1, n]
        seen = np.median(pixels[-1][inner][pixels[-1][inner].max(1) > 0.75 * pixels[-1][inner].max()], 0)
        lit = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
        return max(
            lit, key=lambda name: lit[name] @ (seen - 0.5 * seen.min()) / np.linalg.norm(seen - 0.5 * seen.min())
        )
    if question.kind == "shape":
        read = [thing.shape for thing in judge(pixels).things if thing.colour == clip.things[question.things[0]].colour]
        return read[0] if read else None
    if question.kind == "direction":
        step = tracks[-1, question.things[0]] - tracks[0, question.things[0]]
        along = int(np.abs(step).argmax())
        return (("left", "right"), ("up", "down"))[along][int(step[along] > 0)]
    if question.kind == "bounces":
        track, r = tracks[:, question.things[0]], clip.radii[part, question.things[0]]
        turns = 0
        for axis in (0, 1):
            velocity = np.diff(track[:, axis])
            for k in np.flatnonzero(np.sign(velocity[1:]) * np.sign(velocity[:-1]) < 0):
                turns += min(track[k + 1, axis] - r[k + 1], 64 - r[k + 1] - track[k + 1, axis]) < 4
        return str(turns)
    if question.kind == "collision":
        jolts = np.nan_to_num(np.linalg.norm(np.diff(tracks, n=2, axis=0), axis=-1)).max(0)
        jolts[question.things[0]] = 0  # who else is thrown off its way?
        return names[int(jolts.argmax())]
    if question.kind == "hidden":
        over = [(masks[-1, m] & clip.amodal[question.last, question.things[0]]).sum() for m in range(len(names))]
        return names[int(np.argmax(over))]
    if question.kind == "leaving":
        with np.errstate(invalid="ignore"):
            inside = (tracks[..., 0] >= 0) & (tracks[..., 0] <= 64)
        gone = np.flatnonzero(inside[0] & ~inside[-1])
        return names[gone[0]] if len(gone) == 1 else None
    return getattr(judge(pixels[-8:]), question.kind) or None


def test_every_question_is_answerable_from_its_evidence() -> None:
    right, asked = Counter(), Counter()
    for clip in FILMS:
        for question in clip.questions:
            assert 0 <= question.first <= question.last <= question.asked < clip.frames
            answer = answered(clip, question)
            if answer is not None:
                asked[question.kind] += 1
                right[question.kind] += answer == question.answer
    assert set(asked) == set(KINDS)
    for kind in KINDS:
        # What the referee takes from exact truth is always right; what it reads from pixels has the judge's errors.
        least = 1.0 if kind in ("count", "direction", "collision", "hidden", "leaving") else 0.8
        assert right[kind] >= least * asked[kind] > 0, (kind, right[kind], asked[kind])


def test_answers_are_words_or_numbers_that_the_world_knows() -> None:
    words = {*COLOURS, *SHAPES, "left", "right", "up", "down"}
    for clip in FILMS:
        for question in clip.questions:
            assert question.text.endswith("?")
            if question.kind in ("colour", "shape", "direction", "change"):
                assert question.answer in words
