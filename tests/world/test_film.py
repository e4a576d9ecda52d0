"""Films: the same seed gives the same bytes, however a world is cut."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from evenflow.world import Scene, Thing, World, film

TRY = "import hashlib; from evenflow.world import film; print(hashlib.sha256(film(7, 40, changes=1).pixels.tobytes()).hexdigest())"


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_this_process_and_in_another() -> None:
    mine = digest(film(7, 40, changes=1).pixels)
    assert mine == digest(film(7, 40, changes=1).pixels)
    assert mine != digest(film(8, 40, changes=1).pixels)
    other = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=True).stdout.strip()
    assert mine == other


@pytest.mark.parametrize("seed", range(6))
def test_how_a_world_is_cut_changes_nothing(seed: int) -> None:
    whole = World(seed, every=(12, 30)).frames(150)
    world = World(seed, every=(12, 30))
    parts = [world.frames(n) for n in (1, 2, 37, 16, 60, 34)]
    assert np.array_equal(np.concatenate([part.pixels for part in parts]), whole.pixels)
    assert world.position == 150


@pytest.mark.parametrize(
    ("size", "shape"), [(64, (64, 64)), (17, (17, 17)), ((48, 80), (48, 80)), ((96, 40), (96, 40))]
)
def test_any_size(size, shape) -> None:
    pixels = film(3, 9, size=size).pixels
    assert pixels.shape == (9, *shape, 3) and pixels.dtype == np.uint8
    assert pixels.std() > 5


def test_changes_are_smooth() -> None:
    before = Scene((Thing("circle", "red", "large", motion="still"),), "meadow")
    after = Scene(
        (Thing("star", "blue", "large", motion="still"), Thing("ring", "yellow", motion="still")), "city", "night"
    )
    clip = film(1, 40, [before, after], [14])
    assert [frame for frame, _, _ in clip.prompts] == [0, 14]
    steps = np.abs(np.diff(clip.pixels.astype(float), axis=0)).mean((1, 2, 3))
    total = np.abs(clip.pixels[30].astype(float) - clip.pixels[10]).mean()
    assert steps[:13].max() < 0.5 and steps[24:].max() < 0.5
    assert steps.max() < 0.25 * total
