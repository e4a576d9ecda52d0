"""Several candidates for every chunk, of which the ones that promise most go on: more computing, better video.

Source: Stream-T1, arXiv 2605.04461, sections on noise propagation, reward pruning and memory sinking.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..memory import Memory, Routed, StateError, read_state, write_state
from ..memory.routing import route
from .saving import resume_stream
from .schedule import Chunks
from .stream import Chunk, VideoStream

if TYPE_CHECKING:
    from ..models.video.model import VideoModel

FORMAT = 1
OWN = "search"  # the file beside those of the beams

Reward = Callable[[np.ndarray, str], float]  # pixel frames, uint8 [n, H, W, 3], and the prompt


@dataclass(frozen=True)
class Beam:
    """One video of those that are still possible.

    seeds, short, long, recent: seed, rewards and pixel frames of its last chunks, as many as the next one is judged by.
    open: chunks that have not been shown yet. score: of the last. route: where its last chunk was sent; None: its memory
    has no routes.
    """

    stream: VideoStream
    seeds: tuple[int, ...] = ()
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    recent: tuple[np.ndarray, ...] = ()
    open: tuple[Chunk, ...] = ()
    score: float = 0.0
    route: int | None = None


@dataclass(frozen=True)
class Search:
    """How to search. keep: k, beams that go on. tries: b, candidates of each; a chunk costs k·b as much as without.

    sigma: how much of a candidate's first noise is its parent's. reuse: the first candidate of a parent draws the parent's
    own noise again ("official": the first noise of its chunk then deviates by less than 1 where sigma < 0), or every one
    draws another ("fresh"). The score is α·short + (1 − α)·long, with α from 0 at the first chunk up to `cap`, which it
    would pass after cap·ramp latent frames. span: chunks that the long reward sees; a short one is compared with the mean
    of those before it among them. short_above, long_below: see `route`. lag: chunks that may be open; then the best beam
    decides. seed: of all candidates. Raises ValueError for numbers that make no sense.
    """

    keep: int = 2
    tries: int = 2
    sigma: float = -0.1
    reuse: Literal["official", "fresh"] = "official"
    cap: float = 0.4
    ramp: int = 18
    span: int = 10
    short_above: float = 0.0
    long_below: float = 0.2
    lag: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        least = {"keep": 1, "tries": 1, "ramp": 1, "span": 2, "lag": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name} is {value}; it must be {bound} or more")
        if not -1 <= self.sigma <= 1 or not 0 <= self.cap <= 1:
            raise ValueError(f"sigma is {self.sigma}, cap {self.cap}; they lie in −1 … 1 and 0 … 1")
        if self.reuse not in ("official", "fresh"):
            raise ValueError(f"reuse is {self.reuse!r}; it must be 'official' or 'fresh'")

    def alpha(self, frames: int) -> float:
        """The weight of the short reward of a chunk that begins so many latent frames after the ramp's start."""
        return min(frames / self.ramp, self.cap)

    def seed_of(self, chunk: int, parent: int, candidate: int, last: int | None) -> int:
        """The seed of a candidate; last: the parent's own, None at the first chunk."""
        if last is not None and candidate == 0 and self.reuse == "official":
            return last
        return self.seed + 1000 * chunk + 100 * parent + candidate


class SearchedStream:
    """A video stream, each chunk of which is chosen from candidates: call `step`, or iterate, for ever.

    stream: where to begin; it is forked and stays as it is. short: the reward of a chunk's pixel frames by themselves;
    long: of the frames of the last `span` chunks. Both are given the prompt in force; the scale of both counts, as they
    are added. A memory with `Routed` sinks is told what becomes of each chunk, by its own beam's rewards.

    A chunk is shown when all beams agree on it, or when `lag` later ones have been made: at once with keep=1. At most
    2·keep + 1 streams live at a time. Rewards are taken of frames as they will be shown, each decoded once. Raises
    ValueError for a stream that does not go by chunks, and for rewards that are no numbers.
    """

    def __init__(self, stream: VideoStream, short: Reward, long: Reward, search: Search | None = None) -> None:
        if not isinstance(stream.schedule, Chunks):
            raise ValueError(f"candidates are chunks; open the stream with schedule='chunks', not {stream.schedule}")
        self.short, self.long, self.search = short, long, search or Search()
        self.beams: tuple[Beam, ...] = (Beam(stream.fork()),)
        self._chunk = 0
        self._start = stream.position  # where the ramp begins
        self._ready: tuple[Chunk, ...] = ()

    @property
    def best(self) -> Beam:
        """The beam with the highest score; its `stream` can go on alone."""
        return self.beams[0]

    @property
    def position(self) -> int:
        """Latent frames made so far, in every beam; some may not be shown yet."""
        return self.best.stream.position

    @property
    def nbytes(self) -> int:
        """Bytes of all beams, with the pixels they keep."""
        pixels = {id(x): x.nbytes for beam in self.beams for x in (*beam.recent, *(c.frames for c in beam.open))}
        return sum(beam.stream.nbytes for beam in self.beams) + sum(pixels.values())

    def ask(self, prompt: str | Mapping[str, float], how: str | None = None, **options: Any) -> None:
        """Another prompt for every beam, see `VideoStream.ask`; the score's ramp begins anew."""
        for beam in self.beams:
            beam.stream.ask(prompt, how, **options)
        self._start = self.position

    def fork(self) -> SearchedStream:
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.beams = tuple(replace(beam, stream=beam.stream.fork()) for beam in self.beams)
        return twin

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the search to a folder, a file a beam and one of its own, all with checksums; `resumed` goes on bit for bit.

        The folder appears whole or not at all, in place of what `save` wrote there before, which is not touched until all
        of the new one is written. Raises StateError for a folder that holds something else.
        """
        folder = Path(folder)
        pictures: dict[int, Any] = {}  # by identity: beams share what they have in common
        chunks: dict[int, Chunk] = {}

        def named(frames: np.ndarray) -> int:
            pictures.setdefault(id(frames), frames)
            return [*pictures].index(id(frames))

        beams = []
        for beam in self.beams:
            for chunk in beam.open:
                chunks.setdefault(id(chunk), chunk)
            plain = {name: list(getattr(beam, name)) for name in ("seeds", "short", "long")}
            shown = {"recent": [named(x) for x in beam.recent], "open": [[*chunks].index(id(c)) for c in beam.open]}
            beams.append({**plain, **shown, "score": beam.score, "route": beam.route})
        for chunk in self._ready:
            chunks.setdefault(id(chunk), chunk)
        told = [
            {"first": c.first, "prompt": c.prompt, "calls": c.calls, "seconds": c.seconds, "frames": named(c.frames)}
            for c in chunks.values()
        ]
        meta = {
            "format": FORMAT, "search": asdict(self.search), "beams": beams, "chunks": told, "chunk": self._chunk,
            "start": self._start, "ready": [[*chunks].index(id(c)) for c in self._ready],
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            new, old = Path(made) / "new", Path(made) / "old"
            new.mkdir()
            for number, beam in enumerate(self.beams):
                beam.stream.save(new / f"beam{number}")
            tensors = {
                f"frames.{n}": torch.from_numpy(np.ascontiguousarray(x)) for n, x in enumerate(pictures.values())
            }
            write_state(new / OWN, tensors, meta)
            if folder.exists():
                if not (folder / OWN).is_file():
                    raise StateError(f"{folder} is there and holds no search; save to another place")
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise

    @classmethod
    def resumed(
        cls,
        model: VideoModel,
        folder: str | os.PathLike[str],
        short: Reward,
        long: Reward,
        *,
        memory: Memory | None = None,
    ) -> SearchedStream:
        """Go on, bit for bit, with what `save` wrote; the rewards are yours to give again. memory: as for `ef.resume_video`.

        Raises StateError (a ValueError) when files are missing, damaged, or of another model or memory.
        """
        folder = Path(folder)
        tensors, meta = read_state(folder / OWN)
        if meta.get("format") != FORMAT or "search" not in meta:
            raise StateError(f"{folder} holds no search of format {FORMAT}")
        pictures = [tensors[f"frames.{n}"].numpy() for n in range(len(tensors))]
        chunks = [Chunk(**{**told, "frames": pictures[told["frames"]]}) for told in meta["chunks"]]
        beams = []
        for number, told in enumerate(meta["beams"]):
            stream = resume_stream(model, folder / f"beam{number}", memory)
            seeds, short_, long_ = (tuple(told[name]) for name in ("seeds", "short", "long"))
            recent, opened = tuple(pictures[n] for n in told["recent"]), tuple(chunks[n] for n in told["open"])
            beams.append(Beam(stream, seeds, short_, long_, recent, opened, told["score"], told["route"]))
        search = cls(beams[0].stream, short, long, Search(**meta["search"]))
        search.beams, search._chunk, search._start = tuple(beams), meta["chunk"], meta["start"]
        search._ready = tuple(chunks[n] for n in meta["ready"])
        return search

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            yield self.step()

    def step(self) -> Chunk:
        """The next chunk that is settled. After an error everything is as it was."""
        while not self._ready:
            kept = self._round()
            ready, self.beams = settled(kept, self.search.lag)
            self._ready, self._chunk = ready, self._chunk + 1
        chunk, *rest = self._ready
        self._ready = tuple(rest)
        return chunk

    def finish(self) -> tuple[Chunk, ...]:
        """The chunks of the best beam that are not shown yet, best by the long reward; it alone goes on from there."""
        best = max(self.beams, key=lambda beam: beam.long[-1] if beam.long else 0.0)
        chunks, self._ready = (*self._ready, *best.open), ()
        self.beams = (replace(best, open=()),)
        return chunks

    def _round(self) -> tuple[Beam, ...]:
        """One chunk further: the best candidates of all beams, the better first, earlier ones before their equals."""
        kept: tuple[Beam, ...] = ()
        tries = self.search.tries * (self.search.keep if self._chunk == 0 else 1)
        for number, parent in enumerate(self.beams):
            for candidate in range(tries):
                last = parent.seeds[-1] if parent.seeds else None
                seed = self.search.seed_of(self._chunk, number, candidate, last)
                kept = tuple(sorted((*kept, self._made(parent, seed)), key=lambda beam: -beam.score))[
                    : self.search.keep
                ]
        return kept

    def _made(self, parent: Beam, seed: int) -> Beam:
        """A candidate, in a fork of its parent."""
        search, stream, last = self.search, parent.stream.fork(), slice(1 - self.search.span, None)
        alpha = search.alpha(stream.position - self._start)
        marks: list[tuple[float, float, int]] = []

        def judged(frames: np.ndarray) -> int:
            recent = np.concatenate([*parent.recent, frames])
            short, long = float(self.short(frames, stream.prompt)), float(self.long(recent, stream.prompt))
            if not np.isfinite([short, long]).all():
                raise ValueError(f"the rewards of a chunk are {short} and {long}; they must be numbers")
            where = route(
                (*parent.short, short), (*parent.long, long), last=search.span,
                short_above=search.short_above, long_below=search.long_below,
            )  # fmt: skip
            marks.append((short, long, where))
            return where

        routed = stream.memory is not None and isinstance(stream.memory.fold, Routed)
        chunk = stream.step(seed=seed, follow=search.sigma if parent.seeds else 0.0, route=judged if routed else None)
        if not routed:
            judged(chunk.frames)
        short, long, where = marks[0]
        return Beam(
            stream, (*parent.seeds, seed)[last], (*parent.short, short)[last], (*parent.long, long)[last],
            (*parent.recent, chunk.frames)[last], (*parent.open, chunk), alpha * short + (1 - alpha) * long,
            where if routed else None,
        )  # fmt: skip


def settled(beams: tuple[Beam, ...], lag: int) -> tuple[tuple[Chunk, ...], tuple[Beam, ...]]:
    """Chunks that can be shown, and the beams that go on, the best first.

    What is open in all beams alike is settled; and where the best has more than `lag` open chunks, its own first ones,
    and beams that have others end.
    """
    ready: list[Chunk] = []
    while beams[0].open:
        first = beams[0].open[0]
        same = tuple(beam for beam in beams if beam.open[0] is first)
        if len(same) < len(beams) and len(beams[0].open) <= lag:
            break
        ready.append(first)
        beams = tuple(replace(beam, open=beam.open[1:]) for beam in same)
    return tuple(ready), beams
