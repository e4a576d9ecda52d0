"""Attention of training clips: chunks that see what came before them, or clips that see themselves whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ...memory import Rope
from ...memory.rope import Rotary
from ...models.video import places
from ...models.video.transformer import seen


class Clip:
    """Attention over a whole clip, frames at `times` [F] on the CPU: of every chunk to itself and to those before it.

    chunk: frames of a chunk; None lets everything see everything. One product a chunk, in the dtype of the keys: with
    bfloat16 several times faster on a CPU than a masked kernel, and nothing that may not be seen is computed.
    """

    def __init__(
        self, rope: Rope, head_dim: int, times: Tensor, height: int, width: int, chunk: int | None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rotary = Rotary(rope, head_dim, torch.float32, torch.device(device))
        size = height * width
        where = torch.cat([times.repeat_interleave(size)[:, None], places(len(times), height, width)], 1)
        self.angles = self.rotary.at(where)
        self.step = size * (len(times) if chunk is None else chunk)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self.rotary.rotate(x.float().contiguous(), *self.angles).to(v.dtype) for x in (q, k))
        ends = range(self.step, q.shape[2] + 1, self.step)
        return torch.cat([seen(q[:, :, end - self.step : end], k[:, :, :end], v[:, :, :end]) for end in ends], 2)


class Rollout:
    """The cache of a training roll-out: the first `sink` and newest frames that make `window`, with no graph to them.

    Equal to `longlive(window=…, sink=…, infinity=True)`: a chunk being denoised is among the window's frames, and
    frames stand at their number in the buffer. Gradients flow through the fresh keys and values alone.
    """

    def __init__(
        self, rope: Rope, head_dim: int, height: int, width: int, sink: int, window: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.rope, self.head_dim, self.height, self.width = rope, head_dim, height, width
        self.sink, self.window = sink, window
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.frames = 0
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}
        self.rotary = Rotary(rope, head_dim, torch.float32, torch.device(device))

    def room(self, fresh: int) -> None:
        """Let the oldest frames behind the sink leave so that `fresh` more fit: once before a chunk's first call."""
        over = self.frames + fresh - self.window
        if over > 0:
            size = self.height * self.width
            head, tail = self.sink * size, (self.sink + over) * size
            for layer, pair in self.kept.items():
                k, v = (torch.cat([x[:, :, :head], x[:, :, tail:]], 2) for x in pair)
                self.kept[layer] = k, v
            self.frames -= over

    def call(self, fresh: int, keep: bool) -> Call:
        """What a network call on `fresh` frames attends with; keep: their keys and values stay."""
        return Call(self, fresh, keep)

    def turned(self, frames: int) -> tuple[Tensor, Tensor]:
        """Angles of that many frames of a buffer."""
        if frames not in self.angles:
            times = torch.arange(frames).repeat_interleave(self.height * self.width)
            where = torch.cat([times[:, None], places(frames, self.height, self.width)], 1)
            self.angles[frames] = self.rotary.at(where)
        return self.angles[frames]


class Call:
    """One network call over a `Rollout`."""

    def __init__(self, cache: Rollout, fresh: int, keep: bool) -> None:
        self.cache, self.keep = cache, keep
        self.before, self.frames = cache.frames, cache.frames + fresh

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, fresh = self.cache, q.shape[2]
        keys, values = k.detach(), v.detach()
        if self.before:
            old_k, old_v = cache.kept[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        if self.keep:
            if self.before:
                keys, values = torch.cat([old_k, keys], 2), torch.cat([old_v, values], 2)
            cache.kept[layer] = keys, values
            cache.frames = self.frames
        cos, sin = cache.turned(self.frames)
        q = cache.rotary.rotate(q.float().contiguous(), cos[-fresh:], sin[-fresh:]).to(v.dtype)
        k = cache.rotary.rotate(k.float().contiguous(), cos, sin).to(v.dtype)
        return seen(q, k, v)
