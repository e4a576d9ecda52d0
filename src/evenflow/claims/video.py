"""What the shipped video model does: obeys, goes on at even cost, keeps its look; told by the judge of the world.

The judge's own errors, on real frames of the world, stand beside what it says.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

from ..api import video
from ..generate import VideoStream
from ..learn.video.clips import VARIETY
from ..models.video import VideoModel, load_video
from ..world import Reading, Scene, describe, draw_scene, drift, judge, judge_errors, next_scene, obeys
from .endless import resident_now
from .registry import Bench, claim

Frames = NDArray[np.uint8]
PLAIN = "self-forcing(window=12)"  # the window that others are held against, at the same budget
BEST = "longlive(window=12, sink=3, infinity=True)"
# Memories of frames that go with chunks, at 12 latent frames where they have a budget.
MEMORIES = (
    PLAIN, "longlive(window=12, sink=3)", BEST, "anchor-forcing", "rolling-forcing(budget=12)",
    "reward-forcing", "deep-forcing", "hybrid-forcing", "forcing-kv(segments=8)", "temp-cache", "motionstream",
)  # fmt: skip


def scenes(count: int, split: str, seed: int = 11) -> list[tuple[Scene, str]]:
    """Scenes of one split of the world that the model was trained on, and their descriptions."""
    random, variety = np.random.default_rng(seed), replace(VARIETY, split=split)
    drawn = [draw_scene(random, variety) for _ in range(count)]
    return [(scene, describe(scene, seed=n)) for n, scene in enumerate(drawn)]


def played(stream: VideoStream, chunks: int) -> Frames:
    """So many chunks, uint8 [n, H, W, 3]."""
    return np.concatenate([stream.step().frames for _ in range(chunks)])


def judged(bench: Bench, clips: int) -> None:
    """The judge's errors, first of all."""
    for worse in ("clear", "blur and noise"):
        errors = judge_errors(clips=clips, variety=VARIETY, worse=worse)
        bench.row(
            f"the judge on real frames, {worse}: right about shape, colour, place; position", "–",
            f"{errors['shape']:.0%}, {errors['colour']:.0%}, {errors['place']:.0%}; {errors['position error']:.2f} px",
        )  # fmt: skip


# -- the model -------------------------------------------------------------------------------------------------------


@claim("tiny-video")
def tiny_video(bench: Bench) -> None:
    """The shipped model shows what it is asked for, new pairs of colour and shape too, obeys a change, and plays live."""
    judged(bench, 48 if bench.full else 24)
    model, count = load_video("tiny"), 100 if bench.full else 24
    for split, least in (("train", None), ("held-out", 0.9)):
        obeyed(bench, model, split, count, least)
    switched(bench, model, count)
    speed(bench, model, 40 if bench.full else 16)


def obeyed(bench: Bench, model: VideoModel, split: str, count: int, least: float | None) -> None:
    """Shares of prompts of a split that 3 seconds of video show, by respect."""
    marks: dict[str, list[float]] = {}
    for n, (scene, text) in enumerate(scenes(count, split)):
        seen = obeys(played(video(model, text, memory=BEST, seed=n), 4), scene)
        for name, score in {**seen.scores, "all pairs": float(seen.obeyed)}.items():
            marks.setdefault(name, []).append(score)
    bench.row(
        f"colours with their shapes, {split} prompts", "≥ 90 %" if least else "–", f"{mean(marks['pairs']):.1%}",
        None if least is None else mean(marks["pairs"]) >= least,
        f"{count} prompts; all pairs and no others in {mean(marks['all pairs']):.0%}",
    )  # fmt: skip
    others = ("colours", "shapes", "sizes", "motion", "place", "light", "camera")
    bench.row(
        f"{', '.join(others)}, {split} prompts", "–", ", ".join(f"{mean(marks[name]):.0%}" for name in others if name in marks)
    )  # fmt: skip


def switched(bench: Bench, model: VideoModel, count: int) -> None:
    """Obedience two chunks after a change of prompt, and the jump at the seam, by what becomes of the memory."""
    firsts, random = scenes(count, "train", seed=12), np.random.default_rng(13)
    laters = [next_scene(random, scene, VARIETY) for scene, _ in firsts]
    seams, steady, pairs = {}, [], {}
    for how in ("keep", "recache", "clear"):
        jumps, scores = [], []
        for n, ((_, text), later) in enumerate(zip(firsts, laters, strict=True)):
            stream = video(model, text, memory=BEST, seed=n)
            before = played(stream, 3)
            stream.ask(describe(later, seed=n), how=how)
            after = played(stream, 4)
            jumps.append(float(np.abs(after[0].astype(float) - before[-1]).mean()) / 255)
            steady.append(float(np.abs(np.diff(before.astype(float), axis=0)).mean()) / 255)
            scores.append(obeys(after[len(after) // 2 :], later).scores.get("pairs", 1.0))
        seams[how], pairs[how] = mean(jumps), mean(scores)
    bench.row(
        "colours with their shapes two chunks after a change, recache", "≥ 85 %", f"{pairs['recache']:.1%}",
        pairs["recache"] >= 0.85, f"{count} changes of one thing; keep {pairs['keep']:.0%}, clear {pairs['clear']:.0%}",
    )  # fmt: skip
    bench.row(
        "difference of frames at the seam: keep, recache, clear", "keep ≈ recache ≪ clear",
        ", ".join(f"{seams[how]:.3f}" for how in ("keep", "recache", "clear")), seams["recache"] < seams["clear"],
        f"of 1; between other frames {mean(steady):.3f} (LongLive, table of switches: direction only)",
    )  # fmt: skip


def speed(bench: Bench, model: VideoModel, chunks: int) -> None:
    """Time to the first frames, frames a second, and the floor that the products of the network set."""
    start = time.perf_counter()
    stream = video(model, scenes(1, "train")[0][1], memory=BEST)
    stream.step()
    first = time.perf_counter() - start
    times = []
    for _ in range(chunks):
        chunk = stream.step()
        times.append(chunk.seconds / len(chunk.frames))
    bench.row("seconds to the first frames, model loaded", "≤ 1", f"{first:.2f}", first <= 1)
    bench.row("frames a second", "≥ 16", f"{1 / median(times):.1f}", 1 / median(times) >= 16, floor(model))


def floor(model: VideoModel) -> str:
    """How fast the products alone would be at the rate that this machine multiplies at, measured now."""
    import torch

    config = model.config
    tokens, calls = config.tokens(config.latent_size()) * config.chunk, len(config.steps) + 1
    weights = sum(p.numel() for p in model.transformer.blocks.parameters() if p.ndim == 2)
    a, b = torch.randn(tokens, config.dim), torch.randn(config.ffn_dim, config.dim)
    rates = []
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        rates.append(2 * tokens * config.dim * config.ffn_dim / (time.perf_counter() - start))
    flops = 2.0 * weights * tokens * calls
    seconds = flops / median(rates)
    return (
        f"{flops / 1e9:.1f} GFLOP of products a chunk at {median(rates) / 1e9:.0f} GFLOP/s: "
        f"at most {config.chunk * config.stride[0] / seconds:.0f} frames/s"
    )


# -- memories over long streams ----------------------------------------------------------------------------------------


@claim("video-memories")
def video_memories(bench: Bench) -> None:
    """Sinks and folded memories keep the look of a long video where a plain window of the same size lets it drift."""
    judged(bench, 24)
    seconds, streams = (600, 1) if bench.full else (40, 2)
    model = load_video("tiny")
    plain = lasting(bench, model, PLAIN, seconds, streams, None)
    for memory in MEMORIES[1:]:
        lasting(bench, model, memory, seconds, streams, plain)


def lasting(
    bench: Bench, model: VideoModel, memory: str, seconds: int, streams: int, plain: dict[str, float] | None
) -> dict[str, float]:
    """What one memory keeps over `seconds` of video: the last tenth beside the first."""
    marks: dict[str, list[float]] = {}
    for n, (scene, text) in enumerate(scenes(streams, "train", seed=14)):
        stream = video(model, text, memory=memory, seed=n)
        readings, times, held = watched(stream, seconds)
        tenth = max(1, len(readings) // 10)
        apart = [drift(a, b) for a, b in zip(readings[:tenth], readings[-tenth:], strict=True)]
        for name in ("identity", "colour", "backdrop", "sharpness", "motion"):
            marks.setdefault(name, []).append(mean(abs(getattr(one, name)) for one in apart))
        marks.setdefault("obeyed", []).append(
            mean(obeys(reading, scene).scores.get("pairs", 1.0) for reading in readings[-tenth:])
        )
        marks.setdefault("fps", []).append(1 / median(times))
        marks.setdefault("MB", []).append(held / 1e6)
        if not n:
            kept = [obeys(reading, scene).overall for reading in readings]
            spread = [seconds * (i + 0.5) / len(kept) for i in range(len(kept))]
            bench.figures[f"obedience over seconds of video|x|{stream_name(memory)}"] = spread
            bench.figures[f"obedience over seconds of video|y|{stream_name(memory)}"] = kept
    found = {name: mean(values) for name, values in marks.items()}
    look = found["identity"] + found["colour"] + found["backdrop"]
    bench.row(
        f"{memory}: drift of pairs, colours, backdrop, sharpness, motion after {seconds} s",
        "less than a plain window" if plain else "–",
        ", ".join(f"{found[name]:.2f}" for name in ("identity", "colour", "backdrop", "sharpness", "motion")),
        None if plain is None else look <= plain["identity"] + plain["colour"] + plain["backdrop"],
        f"pairs obeyed at the end {found['obeyed']:.0%}; {found['fps']:.0f} frames/s; {found['MB']:.1f} MB",
    )  # fmt: skip
    return found


def stream_name(memory: str) -> str:
    """A short name of a memory for a figure."""
    return memory.replace("window=12, sink=3", "").replace("(, ", "(").replace("()", "")


def watched(stream: VideoStream, seconds: float, every: int = 3) -> tuple[list[Reading], list[float], int]:
    """What the judge reads in every `every` chunks, seconds a frame of each chunk, and the bytes held in the end."""
    readings: list[Reading] = []
    times: list[float] = []
    parts: list[Frames] = []
    while stream.seconds < seconds:
        chunk = stream.step()
        times.append(chunk.seconds / len(chunk.frames))
        parts.append(chunk.frames)
        if len(parts) == every:
            readings.append(judge(np.concatenate(parts)))
            parts = []
    return readings, times, stream.nbytes


@claim("video-schedules")
def video_schedules(bench: Bench) -> None:
    """One model plays chunk by chunk, rolling, over a moving buffer and with knots; calls, speed, obedience, flicker."""
    model, count = load_video("tiny"), 24 if bench.full else 8
    for schedule, memory in (
        ("chunks", BEST), ("chunks(chunk=1)", BEST), ("rolling(levels=4)", "rolling-forcing"),
        ("buffer(0, 4, 3, 1)", None), ("rain(0, 4, 3, 1)", None), ("knots", "self-forcing(window=12)"),
    ):  # fmt: skip
        pairs, flicker, calls, rates = [], [], 0, []
        for n, (scene, text) in enumerate(scenes(count, "train", seed=15)):
            stream = video(model, text, memory=memory, schedule=schedule, seed=n)
            parts: list[Frames] = []
            while sum(len(part) for part in parts) < 48:
                chunk = stream.step()
                parts.append(chunk.frames)
                calls = chunk.calls
                rates.append(len(chunk.frames) / chunk.seconds)
            reading = judge(np.concatenate(parts))
            pairs.append(obeys(reading, scene).scores.get("pairs", 1.0))
            flicker.append(reading.quality.flicker)
        bench.row(
            f"{schedule} with {memory or 'no memory'}: pairs obeyed, flicker", "–",
            f"{mean(pairs):.0%}, {mean(flicker):.4f}", None,
            f"{calls} calls for {len(parts[-1])} frames; {median(rates):.0f} frames/s",
        )  # fmt: skip


@claim("video-hour")
def video_hour(bench: Bench) -> None:
    """An hour of video in flat memory at an even rate, its last minute like its first; beside a plain window."""
    seconds = 3600 if bench.full else 60
    model = load_video("tiny")
    for memory in (BEST, PLAIN):
        hour(bench, model, memory, seconds)


def hour(bench: Bench, model: VideoModel, memory: str, seconds: int) -> None:
    """One long stream: the first and the last sixtieth of it, after a warm-up."""
    (scene, text), minute = scenes(1, "train", seed=16)[0], seconds / 60
    stream = video(model, text, memory=memory, seed=3)
    played(stream, 8)
    looks: list[list[Reading]] = [[], []]  # of the first part and of the newest
    rates, resident = [], []
    for part in range(60):
        readings, times, _ = watched(stream, stream.seconds + minute, every=2)
        looks[0 if not part else 1] = readings
        rates.append(1 / mean(times))
        resident.append(resident_now())
        bench.say(f"{memory}: {stream.seconds:,.0f} of {seconds:,} s, {rates[-1]:.0f} frames/s")
        kept = mean(obeys(reading, scene).scores.get("pairs", 1.0) for reading in readings)
        sharp = mean(reading.quality.sharpness for reading in readings)
        for name, value in (
            ("pairs obeyed", kept), ("sharpness", sharp), ("frames a second", rates[-1]), ("resident MB", resident[-1]),
        ):  # fmt: skip
            bench.figures.setdefault(f"{name} over seconds of video|x|{stream_name(memory)}", []).append(stream.seconds)
            bench.figures.setdefault(f"{name} over seconds of video|y|{stream_name(memory)}", []).append(value)
    ours = memory == BEST
    early, late = resident[1:6], resident[-5:]
    grown = mean(late) / mean(early) - 1
    slower = aged(stream, video(model, text, memory=memory, seed=3))
    bench.row(f"frames, {memory}", "≥ 57,600" if bench.full else "–", f"{stream.frames:,}")
    bench.row(f"resident memory, end over start, {memory}", "within 3 %", f"{grown:+.1%}", abs(grown) <= 0.03)
    bench.row(
        f"time of a frame over that of a stream just begun, {memory}", "within 3 %", f"{slower:+.1%}", abs(slower) <= 0.03,
        f"chunk by chunk in turn; frames/s in the first and last tenth {median(rates[:6]):.1f}, {median(rates[-6:]):.1f}",
    )  # fmt: skip
    for name in ("sharpness", "contrast", "saturation", "motion"):
        before, after = (mean(getattr(r.quality, name) for r in look) for look in (looks[0], looks[-1]))
        bench.row(
            f"{name}, last part over first, {memory}", "within 10 %" if ours else "drifts", f"{after / before - 1:+.1%}",
            abs(after / before - 1) <= 0.1 if ours else None,
        )  # fmt: skip
    shown = [mean(obeys(r, scene).scores.get("pairs", 1.0) for r in look) for look in (looks[0], looks[-1])]
    bench.row(
        f"pairs obeyed, first part and last, {memory}", "within 10 %" if ours else "drifts",
        f"{shown[0]:.0%}, {shown[1]:.0%}", shown[1] >= 0.9 * shown[0] if ours else None,
    )  # fmt: skip


def aged(old: VideoStream, fresh: VideoStream, chunks: int = 60) -> float:
    """How much longer a chunk of an old stream takes than one of a fresh one, in turn: what else runs meets both."""
    played(fresh, 8)  # its window is full
    ratios = []
    for n in range(chunks):
        first, second = (old, fresh) if n % 2 else (fresh, old)
        seconds = {id(one): one.step().seconds for one in (first, second)}
        ratios.append(seconds[id(old)] / seconds[id(fresh)])
    return median(ratios) - 1
