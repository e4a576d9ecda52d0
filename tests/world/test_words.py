"""Scenes, and their descriptions in English."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow import world
from evenflow.world import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    Variety,
    describe,
    draw_scene,
    held_out,
    next_scene,
    understand,
)

things = st.builds(
    Thing,
    st.sampled_from(world.SHAPES),
    st.sampled_from(list(COLOURS)),
    st.sampled_from(list(world.SIZES)),
    st.sampled_from(world.TEXTURES),
    st.sampled_from(world.MOTIONS),
)
scenes = st.builds(
    Scene,
    st.lists(things, max_size=5).map(tuple),
    st.sampled_from(world.PLACES),
    st.sampled_from(world.LIGHTS),
    st.sampled_from(world.WEATHERS),
    st.sampled_from(world.CAMERAS),
)


@settings(max_examples=400)
@given(scenes, st.none() | st.integers(0, 10**6))
def test_a_description_is_understood_as_the_scene(scene: Scene, seed: int | None) -> None:
    text = describe(scene, seed)
    assert understand(text, strict=True) == scene
    assert set(re.findall(r"[a-z]+", text)) <= set(world.VOCABULARY)


def test_descriptions_in_the_usual_words() -> None:
    scene = Scene(
        (Thing("circle", "red", "large"), Thing("square", "blue", "small", "striped", "drift left")),
        "meadow",
        "dusk",
        camera="pan left",
    )
    assert describe(scene) == (
        "a large red circle bounces and a small striped blue square drifts left over a meadow at dusk, the camera pans left"
    )


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("Two big red balls bouncing by the ocean!", Scene((Thing("circle", "red", "large"),) * 2, "sea")),
        ("a red circle and a blue square spin", Scene((Thing("circle", "red", motion="spin"), Thing("square", "blue", motion="spin")))),
        ("rainy evening, a still camera, one tiny spotted violet rhombus moving to the right", Scene((Thing("diamond", "purple", "small", "dotted", "drift right"),), light="dusk", weather="rain")),
        ("the view zooms out, a green star hides", Scene((Thing("star", "green", motion="hide"),), camera="zoom out")),
    ],
)  # fmt: skip
def test_other_words_are_read(text: str, scene: Scene) -> None:
    assert understand(text) == scene


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(ValueError, match=r"nothing .* could be read"):
        understand("colourless ideas sleep furiously")
    with pytest.raises(ValueError, match=r"has no shape.*did you mean 'square'"):
        understand("a red sqare bounces")
    with pytest.raises(ValueError, match=r"has no colour.*did you mean 'purple'"):
        understand("a purpel square bounces")
    with pytest.raises(ValueError, match="cannot read 'shiny'"):
        understand("a shiny red square bounces", strict=True)
    assert world.read("a shiny red square bounces")[1] == ["shiny"]


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: Thing("sqare", "red"), "did you mean 'square'"),
        (lambda: Thing("square", "rod"), "did you mean 'red'"),
        (lambda: Scene((), place="meadows"), "did you mean 'meadow'"),
        (lambda: Scene((Thing("ring", "red"),) * 6), "at most 5"),
        (lambda: Variety(places=()), "places is empty"),
        (lambda: Variety(things=(3, 2)), "fewest, most"),
        (lambda: draw_scene(np.random.default_rng(0), "eazy"), "did you mean 'easy'"),
    ],
)
def test_wrong_words_are_refused_with_the_nearest_right_one(make, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        make()


def test_the_split_is_fixed_and_kept() -> None:
    random = np.random.default_rng(0)
    pairs = {
        (c, s)
        for c in COLOURS
        for s in SHAPES
        if held_out(Scene((Thing(s, c),), "meadow")) and held_out(Scene((Thing(s, c),), "sea"))
    }
    assert len(pairs) == 10
    assert {c for c, _ in pairs} == set(COLOURS) and {s for _, s in pairs} == set(SHAPES)
    for _ in range(300):
        scene = draw_scene(random, "full")
        assert not held_out(scene)
        assert not pairs & {(t.colour, t.shape) for t in scene.things}
        assert not held_out(next_scene(random, scene, "full"))
        assert held_out(draw_scene(random, Variety(split="held-out")))
