"""Ground truth agrees with what is drawn, and its parts with one another."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from evenflow.world import SHAPES, Film, Scene, Thing, Variety, World, film
from evenflow.world.places import SKY_DEPTH
from evenflow.world.sound import RATE
from evenflow.world.truth import project

CAMERAS = ("still", "pan left", "pan right", "zoom in", "zoom out")
FILMS = [film(seed, 96, changes=1) for seed in range(24)]


def centroid(weights: np.ndarray) -> np.ndarray:
    """Slow and obvious: mean pixel centre (x, y)."""
    total, sx, sy = 0.0, 0.0, 0.0
    for y, x in itertools.product(range(weights.shape[0]), range(weights.shape[1])):
        total, sx, sy = total + weights[y, x], sx + weights[y, x] * (x + 0.5), sy + weights[y, x] * (y + 0.5)
    return np.array([sx / total, sy / total])


def whole(clip: Film, margin: float = 1.4) -> np.ndarray:
    """[F, N]: the thing is there and no part of it is outside of the view."""
    reach = clip.radii[..., None] * margin
    size = np.array([clip.width, clip.height])
    with np.errstate(invalid="ignore"):
        return ((clip.tracks > reach) & (clip.tracks < size - reach)).all(-1) & (clip.radii > 3)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("size", [64, (48, 80)])
def test_projected_points_lie_within_half_a_pixel_of_the_centroids_of_masks(camera: str, size) -> None:
    worst, count = 0.0, 0
    for seed in range(4):
        clip = film(
            seed, 24, variety=Variety(cameras=(camera,), motions=("bounce", "spin", "drift left", "collide")), size=size
        )
        seen = project(clip.points, clip.poses, clip.intrinsics)
        assert np.nanmax(np.abs(seen - clip.tracks)) < 1e-6
        for frame, n in np.argwhere(whole(clip))[::11]:
            worst = max(worst, np.linalg.norm(centroid(clip.amodal[frame, n].astype(float)) - seen[frame, n]))
            count += 1
    assert count > 20 and worst < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_projected_points_lie_within_half_a_pixel_of_the_centroids_of_pixels(shape: str) -> None:
    thing = Thing(shape, "red", "large", motion="bounce")
    clip = film(5, 40, Scene((thing,), "sea", camera="pan right"))
    seen = project(clip.points, clip.poses, clip.intrinsics)
    for frame in np.flatnonzero(whole(clip)[:, 0])[::4]:
        r, g, b = clip.pixels[frame].astype(float).transpose(2, 0, 1)
        redness = np.clip((r - np.maximum(g, b) - 60) / 100, 0, 1)
        assert np.linalg.norm(centroid(redness) - seen[frame, 0]) < 0.5


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_land_moves_as_the_camera_says(camera: str) -> None:
    """Landmarks, projected, stay on the edge between sky or land above and land below."""
    clip = film(2, 40, Scene((), "mountains", camera=camera), size=128)
    seen = project(clip.landmarks, clip.poses, clip.intrinsics)
    far = seen[:, :8]  # of the furthest layer, which nothing but nearer land hides
    depth = clip.depth
    checked = 0
    for frame, m in itertools.product(range(0, 40, 5), range(8)):
        x, y = far[frame, m]
        column = int(x)
        if not 0 <= x < clip.width or not 4 <= y < clip.height - 4:
            continue
        above, below = depth[frame, int(y - 3), column], depth[frame, int(y + 3), column]
        assert above == np.float32(SKY_DEPTH) and below < SKY_DEPTH
        checked += 1
    assert checked > 15
    moved = np.linalg.norm(seen[-1] - seen[0], axis=-1)
    assert (moved.max() < 1e-9) == (camera == "still")
    if camera.startswith("pan"):
        assert moved[:8].max() < moved[8:16].min() < moved[16:].min()  # the nearer, the faster
        assert np.sign(seen[-1, 0, 0] - seen[0, 0, 0]) == (1 if camera == "pan left" else -1)


@pytest.mark.parametrize("index", range(0, 24, 3))
def test_masks_agree_with_the_order_of_depth(index: int) -> None:
    clip = FILMS[index]
    assert not (clip.masks & ~clip.amodal).any()
    assert clip.masks.sum(1).max(initial=0) <= 1
    assert np.array_equal(clip.masks.any(1), clip.amodal.any(1))
    depths = clip.stretch.depths
    for a, b in itertools.permutations(range(len(clip.things)), 2):
        if depths[a] < depths[b]:
            both = clip.amodal[:, a] & clip.amodal[:, b]
            assert not (clip.masks[:, b] & both).any()
    for n, depth in enumerate(depths):
        assert np.all(clip.depth[clip.masks[:, n]] == np.float32(depth))
    assert clip.depth[~clip.masks.any(1)].min() > 1.1


def test_a_visible_pixel_shows_the_colour_of_its_thing() -> None:
    clip = film(9, 30, Scene((Thing("circle", "red", "large"), Thing("square", "blue", "large")), "meadow"))
    for n, colour in ((0, (222, 36, 36)), (1, (38, 84, 236))):
        inner = clip.masks[:, n] & np.all([np.roll(clip.masks[:, n], s, a) for s in (-2, 2) for a in (1, 2)], 0)
        assert np.abs(clip.pixels[inner].astype(int) - colour).max() <= 1


@pytest.mark.parametrize("index", range(24))
def test_events_agree_with_tracks(index: int) -> None:
    clip = FILMS[index]
    changes = [frame for frame, _, _ in clip.prompts[1:]]
    times = [event.time for event in clip.events]
    assert times == sorted(times)
    assert [event.frame for event in clip.events if event.what == "prompt changed"] == changes
    for event in clip.events:
        if event.what == "bounce":
            (n,), at = event.things, clip.tracks[event.frame, event.things[0]]
            r, speed = clip.radii[event.frame, n], 64 * 1.0 / 16
            gap = min(*(at - r), *(64 - r - at))
            assert -0.5 < gap < speed
        elif event.what == "collide":
            a, b = event.things
            apart = np.linalg.norm(clip.tracks[event.frame, a] - clip.tracks[event.frame, b])
            assert abs(apart - clip.radii[event.frame, [a, b]].sum()) < 8
        elif event.what in ("enter", "leave") and event.frame >= 1:
            x = clip.tracks[event.frame, event.things[0], 0]
            assert (0 <= x <= 64) == (event.what == "enter") or event.frame == clip.frames - 1
        elif event.what == "occluded":
            n, frame = event.things[0], event.frame
            assert clip.masks[frame, n].sum() < 0.4 * clip.amodal[frame, n].sum()
            assert (clip.masks[frame, event.by] & clip.amodal[frame, n]).any()


def test_every_turn_at_a_border_is_a_bounce() -> None:
    for seed in range(12):
        clip = film(seed, 80, Scene((Thing("circle", "red", "small", motion="bounce"),)))
        velocity = np.diff(clip.tracks[:, 0], axis=0)
        turns = (np.sign(velocity[1:]) != np.sign(velocity[:-1])).sum()
        bounces = [event for event in clip.events if event.what == "bounce"]
        # A bounce between the last two frames shows only afterwards, one between the first two not at all.
        assert abs(len(bounces) - turns) <= 2 and len(bounces) >= 2


def test_what_happens_does_not_depend_on_the_cut() -> None:
    whole_film = World(3, every=(12, 24)).frames(200)
    world = World(3, every=(12, 24))
    parts = [world.frames(n) for n in (1, 30, 9, 100, 60)]
    names = ("depth", "poses", "gaze")
    for name in names:
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole_film, name))
    assert np.allclose(np.concatenate([part.sound for part in parts]), whole_film.sound, atol=1e-7)
    told = [(e.time, e.what, tuple(p.stretch.numbers[n] for n in e.things)) for p in parts for e in p.events]
    assert told == [(e.time, e.what, tuple(whole_film.stretch.numbers[n] for n in e.things)) for e in whole_film.events]


def test_one_hears_clicks_when_things_bounce() -> None:
    clip = film(4, 64, Scene((Thing("circle", "red"), Thing("ring", "blue"))))
    bounces = np.array([event.time for event in clip.events if event.what == "bounce"])
    assert clip.sound.shape == (64 * RATE // 16,) and clip.sound.dtype == np.float32 and np.abs(clip.sound).max() <= 1
    # Clicks are far above the hums: what is left of the sound after a difference over two samples.
    high = np.abs(np.diff(clip.sound, n=2))
    loud = high > 0.05
    onsets = [0.0] + [float(i) / RATE for i in np.flatnonzero(loud)]
    starts = np.array([b for a, b in itertools.pairwise(onsets) if b - a > 0.03 or a == 0.0])
    assert len(bounces) > 3
    assert all(
        np.abs(starts - bounce).min() < 0.002 or np.abs(bounces[bounces < bounce] - bounce).min() < 0.05
        for bounce in bounces
    )
    assert all(np.abs(bounces - start).min() < 0.03 for start in starts)


def test_the_pitch_of_the_hum_follows_the_speed() -> None:
    def pitch(motion: str) -> float:
        clip = film(6, 32, Scene((Thing("circle", "red", motion=motion),)), size=64)
        wave = clip.sound[8000:24000]
        return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))[:700].argmax()) * RATE / len(wave)

    slow, fast = pitch("drift left"), pitch("bounce")
    assert 110 < slow < fast - 20


def test_gaze_rests_on_things() -> None:
    shares = []
    for clip in FILMS:
        if len(clip.things):
            with np.errstate(invalid="ignore"):
                apart = np.linalg.norm(clip.tracks - clip.gaze[:, None], axis=-1) / clip.radii.clip(1)
            shares.append((np.nanmin(np.where(np.isnan(apart), 99, apart), 1) < 1.4).mean())
    assert np.mean(shares) > 0.6


def test_a_thousand_frames_with_all_that_is_known_take_two_seconds_at_most() -> None:
    best = min(timed(lambda: film(1, 1000, changes=12)) for _ in range(3))
    assert best < 2.0
    assert min(timed(lambda: film(1, 1000, truth=False).pixels) for _ in range(3)) < 1.0


def timed(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
