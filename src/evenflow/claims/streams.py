"""Made-up streams of frames in which it is known what there is to remember.

A stream is what a model's attention layers would hand to a memory: per chunk and layer, queries, keys and values, with
tags. It has the structure that arguments for memories rest on, each kind of it with a size that can be set to nothing:

- *near-duplicate frames*: within a scene, token i of one frame is token i of the next but for a slow drift and noise;
- *scene changes*: after so many frames other content comes, and later the first scene again;
- *drifting keys*: all keys share an offset that wanders through the stream, and queries do not follow it;
- *needles*: single tokens with a key and value of their own, one kind a chunk, which a later query can ask about.

Needles live in channels of their own, the last `quiet` ones of keys, queries and values, which hold nothing else and
which the stream's rope does not turn. So the answer to a question, in those channels, is the share of attention that
went to the needle times its value, whatever positions a memory gives to what it holds: recall tells about the memory
and never about the luck of a rotation. All random numbers are keyed by (seed, what, number): chunk 1,000 can be made
without the 999 before it, and is the same every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..memory import Rope

Kind = Literal["detail", "word", "watched"]
KINDS: tuple[Kind, ...] = ("detail", "word", "watched")
WORD, PICTURE = 0, 1  # modality


@dataclass(frozen=True)
class Chunk:
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
    every later frame looks at. chunk, index: the chunk that brings it, and its stream index. value: [layers, D], unit."""

    kind: Kind
    chunk: int
    index: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Frames:
    """A stream of frames of `frame` tokens, `chunk` of them a step.

    scene: frames until the scene changes. scenes: how many there are before the first comes again. drift: radians by
    which content turns per frame. noise: what is new in every token, where content has size 1. wander: size of the
    offset that all keys share. period: frames in which that has turned once. watched: chunks whose detail all later
    frames look at. sharp: by how many nats a question prefers its needle to an unrelated key.
    """

    seed: int = 0
    frame: int = 32
    chunk: int = 3
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    quiet: int = 32
    scene: int = 30
    scenes: int = 3
    drift: float = 0.01
    noise: float = 0.3
    wander: float = 0.5
    period: float = 240.0
    watched: tuple[int, ...] = ()
    focus: float = 2.0
    sharp: float = 14.0
    segment: Literal["chunk", "scene"] = "chunk"
    dtype: torch.dtype = torch.float32

    @property
    def m(self) -> int:
        """Tokens a step."""
        return self.frame * self.chunk

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

    # -- what there is to remember -------------------------------------------------------------------------------

    def needle(self, kind: Kind, chunk: int) -> Needle:
        """The needle of a kind that a chunk brings (every chunk brings each kind; what is watched is a detail)."""
        source = self._random("needle", chunk * len(KINDS) + KINDS.index(kind))
        key, value = (
            torch.nn.functional.normalize(torch.randn(self.layers, self.quiet, generator=source), dim=-1) for _ in "kv"
        )
        # A word stands first in its chunk; details are anywhere in the chunk's middle, each kind in its own part.
        part = (self.m - 1) // 2
        place = int(torch.randint(part, (), generator=source)) + 1 + (part if kind == "watched" else 0)
        index = chunk * self.m + (0 if kind == "word" else place)
        return Needle(kind, chunk, index, key.to(self.dtype), value.to(self.dtype))

    def at(self, number: int, asked: Needle | None = None) -> Chunk:
        """Chunk `number`, from 0; or a question at that time: a chunk without needles, whose tokens all ask for one."""
        frames = torch.arange(self.chunk) + number * self.chunk
        layers = []
        for layer in range(self.layers):
            source = self._random("chunk", number * self.layers + layer)
            q = self._content("keys", layer, frames, self.heads, source) * self.focus
            k = self._content("keys", layer, frames, self.kv_heads, source) + self._offset(layer, frames)
            v = self._content("values", layer, frames, self.kv_heads, source)
            q, k, v = (torch.nn.functional.pad(x, (0, self.quiet)).to(self.dtype) for x in (q, k, v))
            if asked:
                q[:] = self._asking(asked, layer)
                layers.append((q[None], k[None], v[None]))
                continue
            for needle in self._planted(number):
                place = needle.index - number * self.m
                k[:, place], v[:, place] = 0, 0
                k[:, place, self.loud :] = needle.key[layer] * math.sqrt(self.loud)
                v[:, place, self.loud :] = needle.value[layer] * math.sqrt(self.loud)
            for count, chunk in enumerate(self.watched):
                if chunk < number:  # the last tokens of each frame look at what is watched
                    q[:, self.frame - 1 - count :: self.frame] = self._asking(self.needle("watched", chunk), layer)
            layers.append((q[None], k[None], v[None]))
        return Chunk(tuple(layers), self._tags(number, asked is not None))

    def recalled(self, needle: Needle, outputs: list[Tensor]) -> float:
        """How much of a needle is in what a question got: 1 is all, 0 nothing; mean of layers, heads and tokens.

        outputs: per layer [B, H_q, m, D].
        """
        shares = [(out[..., self.loud :] @ needle.value[layer]).mean() for layer, out in enumerate(outputs)]
        return float(torch.stack(shares).mean()) / math.sqrt(self.loud)

    # -- how it is made ------------------------------------------------------------------------------------------

    def _random(self, what: str, number: int) -> torch.Generator:
        kinds = ("scene", "chunk", "needle", "offset")
        return torch.Generator().manual_seed((self.seed * len(kinds) + kinds.index(what)) * 2**32 + number)

    def _content(self, what: str, layer: int, frames: Tensor, heads: int, source: torch.Generator) -> Tensor:
        """[heads, m, loud]: what the scene shows there, a little turned, and something new in every token."""
        made = []
        for t in frames.tolist():
            scene = self._random(
                "scene", ((t // self.scene) % self.scenes * self.layers + layer) * 2 + (what == "keys")
            )
            one, other = torch.randn(2, self.kv_heads, self.frame, self.loud, generator=scene)
            made.append(math.cos(self.drift * t) * one + math.sin(self.drift * t) * other)
        content = torch.cat(made, 1).repeat_interleave(heads // self.kv_heads, 0)
        new = torch.randn(content.shape, generator=source)
        return (content + self.noise * new) / math.sqrt(1 + self.noise**2)

    def _offset(self, layer: int, frames: Tensor) -> Tensor:
        """[kv_heads, m, loud]: what all keys share, wandering round."""
        ends = torch.randn(2, self.kv_heads, self.loud, generator=self._random("offset", layer))
        angle = (math.tau / self.period * frames).repeat_interleave(self.frame)[:, None]
        return self.wander * (angle.cos() * ends[0][:, None] + angle.sin() * ends[1][:, None])

    def _planted(self, chunk: int) -> tuple[Needle, ...]:
        kinds = ("detail", "word", *(("watched",) if chunk in self.watched else ()))
        return tuple(self.needle(kind, chunk) for kind in KINDS if kind in kinds)

    def _asking(self, needle: Needle, layer: int) -> Tensor:
        """A query [D] that finds a needle: its score is `sharp`, that of content is 0."""
        query = torch.zeros(self.head_dim, dtype=self.dtype)
        query[self.loud :] = needle.key[layer] * self.sharp * math.sqrt(self.head_dim / self.loud)
        return query

    def _tags(self, number: int, question: bool) -> dict[str, Tensor]:
        token = torch.arange(self.m)
        frame, inside = number * self.chunk + token // self.frame, token % self.frame
        columns = max(1, round(math.sqrt(self.frame)))
        modality = torch.full((self.m,), PICTURE)
        modality[: 0 if question else 1] = WORD
        return {
            "frame": frame,
            "modality": modality,
            "segment": (frame // self.scene if self.segment == "scene" else frame // self.chunk) + 1,
            "coordinates": torch.stack([inside // columns, inside % columns], 1),
        }
