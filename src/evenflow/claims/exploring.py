"""What exploring promises: branches that remember other parts of a history (KVPO), and chunks chosen from several (Stream-T1)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from statistics import mean, median, pstdev

import numpy as np
import torch

from ..api import video
from ..generate import Search, SearchedStream, VideoStream
from ..learn.video.aligning import Alignment, Rates, gains
from ..learn.video.blobs import BLOBS, SIZE, drawn, reward, train
from ..learn.video.branches import Roll, memory_of, rolled
from ..learn.video.distill import warped
from ..learn.video.kvpo import Advantages
from ..memory import MemoryState, Rerouted
from ..memory.chunks import ArenaState
from ..memory.exploring import fork_starts
from ..models.video import VideoTransformer, load_video
from ..recipes import recipe
from ..world import judge, obeys
from .registry import Bench, claim
from .video import Frames, played, scenes

HEADS, DIM, FRAME, CHUNK = 4, 64, 16, 3
M = CHUNK * FRAME


def marks(frames: Frames, prompt: str) -> float:
    """How far frames show what was asked for: the mean of the judge's scores, of 1."""
    return mean(obeys(frames, prompt).scores.values())


def steady(frames: Frames, prompt: str) -> float:
    """The same, less ten times the flicker, of 1."""
    reading = judge(frames)
    return mean(obeys(reading, prompt).scores.values()) - 10 * reading.quality.flicker


# -- branches ----------------------------------------------------------------------------------------------------------


def fed(state: MemoryState, tensors: torch.Tensor, code: int, commit: bool = True) -> torch.Tensor:
    """A step of queries, keys and values [3, 1, HEADS, M, DIM] on a route."""
    with state.step(M, tags={"route": torch.full((M,), code)}, commit=commit):
        return state.attend(0, *tensors)


def history(chunks: int) -> tuple[MemoryState, Callable[[], torch.Tensor]]:
    """A memory of random keys after so many chunks, and what draws another."""
    made = torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return torch.randn(3, 1, HEADS, M, DIM, generator=made)

    state = recipe("kvpo", frame=FRAME).build(layers=1, heads=HEADS, head_dim=DIM, rope=None)
    for _ in range(chunks):
        fed(state, drawn(), 0)
    return state, drawn


@claim("kvpo")
def kvpo(bench: Bench) -> None:
    """Branches with one noise differ by what they attend alone; what is held, attended and paid is the same on all."""
    memory = recipe("kvpo")
    recall = memory.recall
    assert isinstance(recall, Rerouted) and memory.window is not None
    fork = fork_starts(memory)[0]
    pool = recall.pool(fork, CHUNK, memory.sink, memory.window)
    plans = [recall.plan(branch, fork, pool) for branch in range(recall.branches)]
    shared = [len({*a} & {*b}) for a, b in combinations(plans, 2)]
    bench.row(
        "older frames that two of 8 branches share, of 5: least, mean, most", "as few as the pool allows",
        f"{min(shared)}, {mean(shared):.1f}, {max(shared)}", max(shared) < 5,
        f"{len(pool)} frames to draw from at frame {fork}",
    )  # fmt: skip
    state, fresh = history(fork // CHUNK)
    before = {name: x.clone() for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}
    tensors = fresh()
    plain, again = (fed(state.fork(), tensors, 0) for _ in range(2))
    outs = [fed(state.fork(), tensors, recall.route(branch, 0)) for branch in range(recall.branches)]
    same = all(torch.equal(x, state.state_dict()[name]) for name, x in before.items()) and torch.equal(plain, again)
    bench.row("bits of the history that 8 branches changed", "0", "0" if same else "some", same)
    apart = min(float((a - b).abs().max()) for a, b in combinations([plain, *outs], 2))
    bench.row("least difference between two of them and the anchor, in one step", "above 0", f"{apart:.3f}", apart > 0)
    took: dict[int, list[float]] = {0: [], recall.route(3, 0): []}
    for _ in range(200 if bench.full else 60):
        for code, times in took.items():
            start = time.perf_counter()
            fed(state, tensors, code, commit=False)
            times.append(time.perf_counter() - start)
    ratio = median(took[recall.route(3, 0)]) / median(took[0])
    bench.row(
        "time of a step on a route over one without", "–", f"{ratio:.2f}", ratio < 1.5, "12 frames are attended on both"
    )
    diversity(bench, 6 if bench.full else 2)
    if bench.full:
        aligned(bench)


def aligned(bench: Bench, steps: int = 1000, updates: int = 15) -> None:
    """A small network of moving blobs, aligned by its branches; rewards are of what it makes without routes."""
    levels, latent = warped(BLOBS.steps, BLOBS.shift), (SIZE, SIZE)
    base = train(steps, progress=lambda step, of, loss: bench.trained(step, of, loss))

    def begun(model: VideoTransformer, number: int, rows: int) -> tuple[ArenaState, torch.Tensor]:
        """Memories that have seen real frames, and their texts."""
        memory = recipe(
            "kvpo", window=10, sink=0, physical=20, nearest=6, blocks=3, branches=8, seed=number, chunk=2, frame=1
        )
        clips, text = drawn(rows, 16, torch.Generator().manual_seed(number))
        state = memory_of(model, memory, rows)
        with torch.no_grad():
            Roll(model, state, model.read(text), latent).know(clips)
        return state, text

    @torch.no_grad()
    def rewarded(model: VideoTransformer) -> float:
        state, text = begun(model, 10**6, 128)
        return float(reward(rolled(model, state, model.read(text), levels, 3, 77, latent)).mean())

    found = {"before": rewarded(base)}
    for name in ("aligned", "advantages shuffled"):
        training = Alignment(copy.deepcopy(base), levels, rates=Rates(rate=3e-4))
        shuffle = torch.Generator().manual_seed(0)
        for number in range(updates):
            state, text = begun(training.model, number, 24)
            branches = training.explore(state, text, number, latent)
            gained = gains(branches, reward, training.config, 6)
            if name != "aligned":
                gained = [Advantages(one.value[torch.randperm(8, generator=shuffle)], one.safe) for one in gained]
            told = training.learn(state, text, branches, gained)
            bench.say(f"{name}: update {number + 1} of {updates}, energy {told['energy']:.3f}")
        found[name] = rewarded(training.model)
    rise, idle = found["aligned"] - found["before"], found["advantages shuffled"] - found["before"]
    bench.row(
        f"8. reward without routes after {updates} updates over before, of blobs", "rises", f"{rise:+.2f}", rise > 0.3,
        f"{found['before']:.2f} to {found['aligned']:.2f}; 24 groups of 8 an update, judged on 128 other streams; brightness counts "
        "twice, as pixels do here",
    )  # fmt: skip
    bench.row(
        "8. the same with advantages shuffled over the branches, less than half of that",
        "no gain",
        f"{idle:+.2f}",
        idle < 0.5 * rise,
        "",
    )


def diversity(bench: Bench, count: int) -> None:
    """How branches of the shipped model's own videos differ, by routes and by noise."""
    model, blocks = load_video("tiny"), 2
    found: dict[str, list[tuple[float, float, float]]] = {"routes": [], "noise": []}
    for n, (_, text) in enumerate(scenes(count, "train", seed=21)):
        stream = video(model, text, memory=f"kvpo(blocks={blocks})", seed=n)
        played(stream, 7)
        anchor = steady(played(stream.fork(), blocks), text)
        for name, values in found.items():
            branches = [branch(stream, number, blocks, name == "routes") for number in range(8)]
            rewards = [steady(frames, text) for frames in branches]
            pixels = float(np.stack(branches).astype(float).std(0).mean()) / 255
            values.append((pixels, pstdev([*rewards, anchor]), mean(reward > anchor for reward in rewards)))
    rates = {}
    for name, values in found.items():
        pixels, rewards, better = (mean(column) for column in zip(*values, strict=True))
        rates[name] = rewards / pixels
        bench.row(
            f"8 branches by {name}: deviation of pixels, of rewards; share that beat the anchor", "–",
            f"{pixels:.4f}, {rewards:.3f}; {better:.0%}", None,
            f"{count} prompts, {blocks} chunks; reward: the judge's marks less flicker",
        )  # fmt: skip
    bench.row(
        "deviation of rewards for that of pixels: by routes, by noise", "more by routes",
        f"{rates['routes']:.1f}, {rates['noise']:.1f}", rates["routes"] > rates["noise"],
    )  # fmt: skip


def branch(stream: VideoStream, number: int, blocks: int, routed: bool) -> Frames:
    """What a fork makes on a route, or from another noise."""
    twin = stream.fork()
    assert twin.memory is not None
    recall, frames = twin.memory.recall, list[Frames]()
    for block in range(blocks):
        if routed and isinstance(recall, Rerouted):
            frames.append(twin.step(route=recall.route(number, block)).frames)
        else:
            frames.append(twin.step(seed=1000 * block + number).frames)
    return np.concatenate(frames)


# -- candidates --------------------------------------------------------------------------------------------------------


def versions(text: str, seed: int, chunks: int, full: bool) -> Iterator[tuple[str, Frames]]:
    """A prompt's video without a search, and by searches of four candidates a chunk."""
    model = load_video("tiny")

    def opened(number: int = seed) -> VideoStream:
        return video(model, text, memory="stream-t1", seed=number)

    yield "one sample", played(opened(), chunks)
    searches = {"2 × 2": Search(seed=100_000 * seed)}
    if full:
        whole = [played(opened(1000 * seed + n + 1), chunks) for n in range(4)]
        yield "the best of four whole videos", max(whole, key=lambda frames: steady(frames, text))
        searches |= {
            "1 × 4": Search(keep=1, tries=4, seed=100_000 * seed), "2 × 2, long only": Search(cap=0, seed=100_000 * seed),
            "2 × 2, σ 0.7": Search(sigma=0.7, seed=100_000 * seed),
        }  # fmt: skip
    for name, search in searches.items():
        searched = SearchedStream(opened(), marks, steady, search)
        shown = list[Frames]()
        while searched.position < searched.best.stream.schedule.emits * chunks:
            shown.append(searched.step().frames)
        shown += [chunk.frames for chunk in searched.finish()]
        yield name, np.concatenate(shown)


@claim("stream-t1-search")
def stream_t1_search(bench: Bench) -> None:
    """A search chunk by chunk makes better videos, by its own rewards, for as many calls as its candidates."""
    count, chunks = 24, 6 if bench.full else 3
    scores: dict[str, list[float]] = {}
    obeyed: dict[str, list[float]] = {}
    for n, (_, text) in enumerate(scenes(count, "held-out", seed=77)):
        for name, frames in versions(text, n, chunks, bench.full):
            scores.setdefault(name, []).append(0.4 * marks(frames, text) + 0.6 * steady(frames, text))
            obeyed.setdefault(name, []).append(obeys(frames, text).scores.get("pairs", 1.0))
    single = scores["one sample"]
    for name, values in scores.items():
        gains = [value - alone for value, alone in zip(values, single, strict=True)]
        error = pstdev(gains) / max(1, len(gains) - 1) ** 0.5
        bench.row(
            f"score, {name}", "better than one sample" if "×" in name else "–", f"{mean(values):.3f}",
            mean(gains) > 2 * error if "×" in name else None,
            f"{count} new prompts, {chunks} chunks; over one sample {mean(gains):+.3f} ± {error:.3f}; colours with shapes "
            f"{mean(obeyed[name]):.0%}",
        )  # fmt: skip
