"""What schedules promise, on the shipped video model: frames a second, calls, delay, seams, drawn paths.

Figures of papers were taken on GPUs that a single frame does not fill; on a core, work is what counts, and a batch of
rows costs what its rows cost. Ratios stand beside theirs all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median

import numpy as np

from ..api import video
from ..generate import Guidance, VideoStream
from ..learn.video.clips import VARIETY, as_frames
from ..memory.admission import SimilarFrames
from ..models.video import VideoModel, load_video
from ..world import Reading, Scene, Thing, describe, draw_scene, drift, film, judge, obeys
from .registry import Bench, claim
from .video import PLAIN, Frames, scenes


@dataclass(frozen=True)
class Played:
    """Some video and how it came. seconds: of each chunk but the first; first: until the first frames were there."""

    frames: Frames
    seconds: list[float]
    first: float
    size: int  # frames of a chunk
    calls: int  # for a chunk

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.size / median(self.seconds)


def play(stream: VideoStream, count: int = 48) -> Played:
    """`count` frames or a little more, after a chunk that does not count as it warms up."""
    stream.step()
    stream.reset()
    chunks = [stream.step()]
    while sum(len(chunk.frames) for chunk in chunks) < count or len(chunks) < 6:
        chunks.append(stream.step())
    return Played(
        np.concatenate([chunk.frames for chunk in chunks]), [chunk.seconds for chunk in chunks[1:]], chunks[0].seconds,
        len(chunks[-1].frames), chunks[-1].calls,
    )  # fmt: skip


def every(
    model: VideoModel, count: int, schedule: str, memory: str | None, guidance: Guidance | None = None
) -> Iterator[tuple[Scene, Played]]:
    """Videos of some prompts."""
    for n, (scene, text) in enumerate(scenes(count, "train", seed=21)):
        yield scene, play(video(model, text, memory=memory, schedule=schedule, guidance=guidance, seed=n))


def look(bench: Bench, what: str, made: list[tuple[Scene, Played]]) -> None:
    """A row of what the judge reads in videos: whether they obey, how they move and flicker."""
    readings = [(scene, judge(one.frames)) for scene, one in made]
    bench.row(
        f"{what}: pairs obeyed, motion, flicker", "–",
        f"{mean(obeys(r, scene).scores.get('pairs', 1.0) for scene, r in readings):.0%}, "
        f"{mean(r.quality.motion for _, r in readings):.4f}, {mean(r.quality.flicker for _, r in readings):.4f}",
        None, f"{len(made)} prompts; {made[0][1].calls} calls for {made[0][1].size} frames",
    )  # fmt: skip


def rate(made: list[tuple[Scene, Played]]) -> float:
    """Frames a second, the median of several videos."""
    return median(one.rate for _, one in made)


def faster(
    bench: Bench, what: str, paper: str, ours: list[tuple[Scene, Played]], other: list[tuple[Scene, Played]],
    least: float | None = None, note: str = "",
) -> None:  # fmt: skip
    """A row of how many times the frames a second of others some videos come at; `least` is what has to be reached."""
    times, told = rate(ours) / rate(other), f"{rate(ours):.0f} and {rate(other):.0f} frames/s"
    bench.row(f"frames a second, {what}", paper, f"{times:.2f}", None if least is None else times >= least, told + note)


@claim("streamdiffusion")
def streamdiffusion(bench: Bench) -> None:
    """All steps in one batch, guidance without a second evaluation, and no work for frames that do not change."""
    model, count = load_video("tiny"), 12 if bench.full else 4
    batch = list(every(model, count, "batch", None))
    steps = list(every(model, count, "buffer(0, 1, 3, 4)", None))
    faster(
        bench, "steps in one batch over one after another", "≈ 1.5 (GPU)", batch, steps,
        note=" on a core, which a single chunk fills already",
    )  # fmt: skip
    own, once, twice = (
        list(every(model, count, "batch", None, Guidance(mode, 1.2))) for mode in ("self", "onetime", "full")
    )
    faster(
        bench, "guidance by the own input over by a second evaluation", "up to 2.05", own, twice, 1.5,
        f"; a second one for new frames alone {rate(once):.0f}",
    )  # fmt: skip
    still, moving = processed(0, "still"), processed(0, "bounce")
    bench.row(
        "frames processed of a picture at rest and of one that moves", "2 to 2.4 × less energy", f"{still:.0%}, {moving:.0%}",
        still <= 0.5 <= moving, "the share of work that is left; energy cannot be measured here",
    )  # fmt: skip
    look(bench, "a chunk a row, no memory", batch)


def processed(seed: int, motion: str, frames: int = 240) -> float:
    """Share of the frames of a film that the similarity filter lets through."""
    scene = Scene((Thing("circle", "red", "large", "plain", motion),), "meadow", "day", "clear", "still")
    whole = as_frames(film(seed, frames=frames, scenes=scene, variety=VARIETY, truth=False).pixels)
    admission = SimilarFrames(seed=seed)
    verdict, _ = admission.step(whole, admission.start())
    return float(verdict.keep.float().mean())


@claim("streamdit")
def streamdit(bench: Bench) -> None:
    """A buffer that moves by chunks plays as many times faster as a chunk has frames, at the same cost of a call."""
    model, count = load_video("tiny"), 12 if bench.full else 4
    single, double, whole = (
        list(every(model, count, schedule, None))
        for schedule in ("buffer(0, 8, 1, 1)", "buffer(0, 4, 2, 1)", "buffer(0, 1, 8, 4)")
    )
    faster(bench, "chunks of 2 over frame by frame, 8 frames in the buffer", "2 (16 and 8)", double, single, 1.7)
    look(bench, "chunks of 2 in a buffer of 8", double)
    look(bench, "frame by frame (a FIFO queue)", single)
    look(bench, "whole clips of 8, one after another", whole)


@claim("rain")
def rain(bench: Bench) -> None:
    """One call for every group of frames, each at a level of its own, from the first group on."""
    model, count = load_video("tiny"), 12 if bench.full else 4
    groups = list(every(model, count, "rain(0, 4, 3, 1)", None))
    batch = list(every(model, count, "batch", None))
    faster(
        bench, "groups that see each other over rows that do not", "0.49 (18 and 37)", groups, batch,
        note="; one call for a group both",
    )  # fmt: skip
    look(bench, "four groups in flight", groups)


@claim("video-systems")
def video_systems(bench: Bench) -> None:
    """Chunks beside single frames, rolling windows, knots, stream batches and drawn paths: what each was made for."""
    model, count = load_video("tiny"), 12 if bench.full else 4
    chunks, frames = (list(every(model, count, how, PLAIN)) for how in ("chunks", "chunks(chunk=1)"))
    faster(bench, "self-forcing, chunks of 3 over frame by frame", "1.9 (17.0, 8.9)", chunks, frames, 1.0)
    waits = [median(one.first for _, one in made) for made in (chunks, frames)]
    bench.row(
        "self-forcing: seconds to the first frames, the same", "0.69, 0.45", f"{waits[0]:.2f}, {waits[1]:.2f}", waits[1] < waits[0],
    )  # fmt: skip
    look(bench, "self-forcing, frame by frame", frames)
    lasting(bench, model, 120 if bench.full else 30)
    knots = list(every(model, count, "knots", PLAIN))
    jumps = [mean(border(one) for _, one in made) for made in (knots, chunks)]
    bench.row(
        "knot-forcing: change at the border of chunks over change inside, with knots and without", "smoother",
        f"{jumps[0]:.2f}, {jumps[1]:.2f}", jumps[0] <= jumps[1],
    )  # fmt: skip
    look(bench, "knot-forcing", knots)
    followed(bench, model, count)
    paces(bench, model, 60 if bench.full else 30)


def lasting(bench: Bench, model: VideoModel, seconds: int) -> None:
    """Rolling Forcing: how far the end of a video is from its beginning, beside a plain window."""
    found = {}
    for schedule, memory in (("rolling(levels=4)", "rolling-forcing"), ("chunks", PLAIN)):
        scene, text = scenes(1, "train", seed=22)[0]
        made = play(video(model, text, memory=memory, schedule=schedule), 16 * seconds)
        ends: list[Reading] = [judge(part) for part in (made.frames[9:57], made.frames[-48:])]
        apart = drift(*ends)
        found[schedule] = (
            apart.identity + apart.colour + apart.backdrop,
            obeys(ends[1], scene).scores.get("pairs", 1.0),
            made.rate,
        )
    (ours, kept, speed), (plain, held, other) = found.values()
    bench.row(
        f"rolling-forcing: drift of pairs, colours and backdrop after {seconds} s, over a plain window's",
        "0.01 and 1.66 (30 s, of quality)", f"{ours:.2f}, {plain:.2f}", None,
        f"pairs obeyed at the end {kept:.0%}, {held:.0%}; {speed:.0f}, {other:.0f} frames/s; this model hardly drifts in a plain window",
    )  # fmt: skip


def border(made: Played) -> float:
    """Mean change from frame to frame where a chunk begins, over that inside chunks."""
    steps = np.abs(np.diff(made.frames.astype(np.float32), axis=0)).mean((1, 2, 3))
    first = len(made.frames) - made.size * len(made.seconds)  # frames of the first chunk
    at = np.arange(first - 1, len(steps), made.size)
    inside = np.delete(steps, at)
    return float(steps[at].mean() / max(float(inside.mean()), 1e-6))


def followed(bench: Bench, model: VideoModel, count: int) -> None:
    """MotionStream: how far a thing is from the path that was drawn for it, and from the same path where nothing was drawn."""
    random = np.random.default_rng(23)
    apart: dict[bool, list[float]] = {True: [], False: []}
    for n in range(count):
        colour = ("red", "green", "purple", "orange")[n % 4]
        scene = Scene((Thing("circle", colour, "large", "plain", "still"),), "meadow", "day", "clear", "still")
        ends = random.uniform(16, 48, (2, 2))
        path = [(s / 4, *(ends[0] + (ends[1] - ends[0]) * s / 12).tolist()) for s in range(13)]
        for drawn in (True, False):
            stream = video(model, describe(scene, seed=n), memory=PLAIN, seed=n)
            if drawn:
                stream.draw(path)
            made = np.concatenate([stream.step().frames for _ in range(4)])[:48]
            times = np.arange(len(made)) / 16
            asked = np.stack([np.interp(times, [p[0] for p in path], [p[axis] for p in path]) for axis in (1, 2)])
            things = [thing for thing in judge(made).things if thing.colour == colour]
            if things:
                far = np.hypot(things[0].x - asked[0], things[0].y - asked[1])
                apart[drawn].append(float(np.nanmean(far)))
    with_path, without = (mean(apart[drawn]) if apart[drawn] else float("nan") for drawn in (True, False))
    bench.row(
        "motionstream: pixels from a drawn path, and where none was drawn", "follows (EPE 7.8 of 480p)",
        f"{with_path:.1f}, {without:.1f}", with_path < 0.5 * without, f"{len(apart[True])} paths, of 64 pixels; the judge's own error is 0.3",
    )  # fmt: skip


def paces(bench: Bench, model: VideoModel, chunks: int) -> None:
    """StreamDiffusionV2: time to the first frames, and how even chunks come."""
    scene = draw_scene(np.random.default_rng(24), VARIETY)
    made = play(
        video(model, describe(scene, seed=0), memory="streamdiffusion-v2", schedule="batch(first=3)"), 12 * chunks
    )
    late = np.quantile(made.seconds, (0.5, 0.9, 0.99))
    budget = made.size / 16
    bench.row(
        "streamdiffusion-v2: seconds to the first frames", "0.37 to 0.5", f"{made.first:.2f}", made.first <= 0.5,
    )  # fmt: skip
    bench.row(
        "streamdiffusion-v2: milliseconds of a chunk, half, 90 % and 99 % within", "361, 484, 585 of 1,000",
        f"{1e3 * late[0]:.0f}, {1e3 * late[1]:.0f}, {1e3 * late[2]:.0f} of {1e3 * budget:.0f}", bool(late[2] <= budget),
        f"later than the budget: {np.mean(np.array(made.seconds) > budget):.1%} (paper 0.2 %); {made.rate:.0f} frames/s",
    )  # fmt: skip
