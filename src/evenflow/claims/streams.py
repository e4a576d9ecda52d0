"""Made-up streams of frames in which it is known what there is to remember.

A stream is what a model's attention layers would hand to a memory: per step and layer, queries, keys and values, with
tags. It has the structure that arguments for memories rest on, each kind of it with a size that can be set to nothing:

- *near-duplicate frames*: within a scene, token i of one frame is token i of the next but for a slow drift and noise;
- *scene changes*: after so many frames other content comes, and later the first scene again;
- *drifting keys*: all keys share an offset that wanders through the stream, and queries do not follow it;
- *needles*: single tokens with a key and value of their own, which a later query can ask about.

Needles live in channels of their own, the last `quiet` ones of keys, queries and values, which hold nothing else and
which the stream's rope does not turn. So the answer to a question, in those channels, is the share of attention that
went to the needle times its value, whatever positions a memory gives to what it holds: recall tells about the memory
and never about the luck of a rotation. All random numbers are keyed by (seed, what, number): frame 1,000 can be made
without the 999 before it, and is the same every time, however the stream is cut into steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

from ..memory import Rope

Kind = Literal["detail", "word", "watched"]
KINDS: tuple[Kind, ...] = ("detail", "word", "watched")
WORD, PICTURE = 0, 1  # modality


@dataclass(frozen=True)
class Step:
    """One step of a stream. layers: q [B, H_q, m, D], k and v [B, H_kv, m, D] of each. tags: [m, …], see `ef.Memory`."""

    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tags: dict[str, Tensor]

    @property
    def m(self) -> int:
        """Number of tokens."""
        return int(self.layers[0][0].shape[2])


@dataclass(frozen=True)
class Needle:
    """Something to remember. kind: "detail" is part of a picture, "word" a word beside it, and "watched" a detail that
    every later frame looks at. frame, place: where it stands. key, value: [layers, quiet], of length 1."""

    kind: Kind
    frame: int
    place: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A stream of frames of `frame` tokens.

    needle_every: frames from one detail, and one word, to the next. watched: frames that bring a detail at which all
    later frames look. scene: frames until the scene changes; the first one ends after `first`. scenes: how many there
    are before the first comes again. drift: radians by which content turns per frame. noise: what is new in every
    token, where content has size 1. wander: size of the offset that all keys share. period: frames in which that has
    turned once. focus: factor on queries: how sharply content looks for its like. sharp: by how many nats a question
    prefers its needle to an unrelated key. segment: what that tag counts from 1, needles (as rounds of a talk) or scenes
    (as prompts of a video).
    """

    seed: int = 0
    frame: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    quiet: int = 32
    needle_every: int = 3
    watched: tuple[int, ...] = ()
    scene: int = 30
    first: int = 12
    scenes: int = 3
    drift: float = 0.01
    noise: float = 0.3
    wander: float = 0.5
    period: float = 240.0
    focus: float = 2.0
    sharp: float = 14.0
    segment: Literal["round", "scene"] = "round"
    dtype: torch.dtype = torch.float32

    @property
    def loud(self) -> int:
        """Channels that carry content, and turn."""
        return self.head_dim - self.quiet

    def rope(self, unit: int = 1) -> Rope:
        """Time turns content, and leaves needles alone. unit: positions a frame (1, or `frame` where tokens count)."""
        return Rope(inv_freq=tuple(10_000 ** (-2 * c / self.loud) / unit for c in range(self.loud // 2)), dim=self.loud)

    def geometry(self, unit: int = 1) -> dict[str, object]:
        """What `Memory.build` wants to know."""
        return {
            "layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "rope": self.rope(unit), "dtype": self.dtype,
        }  # fmt: skip

    def scene_at(self, t: int) -> int:
        """Number of the scene that frame `t` belongs to, from 0."""
        return 0 if t < self.first else 1 + (t - self.first) // self.scene

    # -- what there is to remember -------------------------------------------------------------------------------

    def needle(self, kind: Kind, frame: int) -> Needle:
        """The needle of a kind that a frame brings."""
        if kind not in self._brought(frame):
            raise ValueError(f"frame {frame} has no {kind}; there is one every {self.needle_every} frames")
        source = self._random("needle", frame * len(KINDS) + KINDS.index(kind))
        key, value = (
            torch.nn.functional.normalize(torch.randn(self.layers, self.quiet, generator=source), dim=-1) for _ in "kv"
        )
        # A word stands first in its frame, a detail anywhere in the first half of the rest, one that is watched behind.
        half = (self.frame - 1) // 2
        place = int(torch.randint(half, (), generator=source)) + 1 + (half if kind == "watched" else 0)
        return Needle(kind, frame, 0 if kind == "word" else place, key.to(self.dtype), value.to(self.dtype))

    def step(self, start: int, frames: int) -> Step:
        """Frames `start` to `start + frames − 1`."""
        layers = []
        for layer in range(self.layers):
            parts = zip(*(_drawn(self, layer, t) for t in range(start, start + frames)), strict=True)
            q, k, v = (torch.cat(part, 1)[None] for part in parts)
            layers.append((q, k, v))
        return Step(tuple(layers), self._tags(start, frames))

    def question(self, start: int, frames: int, asked: Needle) -> Step:
        """A step at that time, without needles, whose tokens all ask for one."""
        step = self.step(start, frames)
        layers = []
        for layer, (q, k, v) in enumerate(step.layers):
            k, v = k.clone(), v.clone()
            k[..., self.loud :], v[..., self.loud :] = 0, 0
            layers.append((self._asking(asked, layer).expand_as(q), k, v))
        return Step(tuple(layers), {**step.tags, "modality": torch.full((step.m,), PICTURE)})

    def recalled(self, needle: Needle, outputs: list[Tensor]) -> float:
        """How much of a needle is in what a question got: 1 is all, 0 nothing; mean of layers, heads and tokens.

        outputs: per layer [B, H_q, m, D].
        """
        shares = [(out[..., self.loud :] @ needle.value[layer]).mean() for layer, out in enumerate(outputs)]
        return float(torch.stack(shares).mean()) / math.sqrt(self.loud)

    # -- how it is made ------------------------------------------------------------------------------------------

    def _random(self, what: str, number: int) -> torch.Generator:
        # A generator takes no more than 32 bits.
        return torch.Generator().manual_seed(crc32(f"{self.seed} {what} {number}".encode()))

    def _brought(self, frame: int) -> tuple[Kind, ...]:
        usual: tuple[Kind, ...] = ("detail", "word") if frame % self.needle_every == 0 else ()
        return (*usual, "watched") if frame in self.watched else usual

    def _content(self, what: str, layer: int, t: int, heads: int, source: torch.Generator) -> Tensor:
        """[heads, frame, loud]: what the scene shows there, a little turned, and something new in every token."""
        shown = self.scene_at(t) % self.scenes
        scene = self._random("scene", (shown * self.layers + layer) * 2 + (what == "keys"))
        one, other = torch.randn(2, self.kv_heads, self.frame, self.loud, generator=scene)
        content = math.cos(self.drift * t) * one + math.sin(self.drift * t) * other
        content = content.repeat_interleave(heads // self.kv_heads, 0)
        return (content + self.noise * torch.randn(content.shape, generator=source)) / math.sqrt(1 + self.noise**2)

    def _offset(self, layer: int, t: int) -> Tensor:
        """[kv_heads, 1, loud]: what all keys share, wandering round."""
        ends = torch.randn(2, self.kv_heads, 1, self.loud, generator=self._random("offset", layer))
        angle = math.tau / self.period * t
        return self.wander * (math.cos(angle) * ends[0] + math.sin(angle) * ends[1])

    def _asking(self, needle: Needle, layer: int) -> Tensor:
        """A query [D] that finds a needle: its score is `sharp`, that of content is 0."""
        query = torch.zeros(self.head_dim, dtype=self.dtype)
        query[self.loud :] = needle.key[layer] * self.sharp * math.sqrt(self.head_dim / self.loud)
        return query

    def _tags(self, start: int, frames: int) -> dict[str, Tensor]:
        inside = torch.arange(self.frame).repeat(frames)
        columns = max(1, round(math.sqrt(self.frame)))
        times = range(start, start + frames)
        segment = [1 + (self.scene_at(t) if self.segment == "scene" else t // self.needle_every) for t in times]
        words = torch.tensor(["word" in self._brought(t) for t in times]).repeat_interleave(self.frame)
        return {
            "frame": torch.tensor(times).repeat_interleave(self.frame),
            "modality": torch.where(words & (inside == 0), WORD, PICTURE),
            "segment": torch.tensor(segment).repeat_interleave(self.frame),
            "coordinates": torch.stack([inside // columns, inside % columns], 1),
        }


@lru_cache(maxsize=1024)
def _drawn(stream: Frames, layer: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [heads, frame, head_dim] of one frame; nobody writes into them."""
    source = stream._random("frame", t * stream.layers + layer)
    q = stream._content("keys", layer, t, stream.heads, source) * stream.focus
    k = stream._content("keys", layer, t, stream.kv_heads, source) + stream._offset(layer, t)
    v = stream._content("values", layer, t, stream.kv_heads, source)
    q, k, v = (torch.nn.functional.pad(x, (0, stream.quiet)).to(stream.dtype) for x in (q, k, v))
    for kind in stream._brought(t):
        needle = stream.needle(kind, t)
        k[:, needle.place], v[:, needle.place] = 0, 0
        k[:, needle.place, stream.loud :] = needle.key[layer] * math.sqrt(stream.loud)
        v[:, needle.place, stream.loud :] = needle.value[layer] * math.sqrt(stream.loud)
    for count, frame in enumerate(stream.watched):
        if frame < t:  # the last tokens of every frame look at what is watched
            q[:, -1 - count] = stream._asking(stream.needle("watched", frame), layer)
    return q, k, v
