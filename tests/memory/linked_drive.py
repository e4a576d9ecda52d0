"""Streams of two linked modalities: the definition with loops, a tiny model of two streams, both ways to run it."""

import math

import torch
from torch import Tensor, nn

from evenflow.memory import Linked, linked_blocks, linked_mask, linked_places
from evenflow.memory.linked_step import ASKS, GIVES

READS = ("video", "audio", "a2v", "v2a")
SMALL = {"grid": (2, 2), "sinks": 3, "window": 2}
F64 = {"dtype": torch.float64}
OWN = {
    "video": {"heads": 4, "head_dim": 24}, "audio": {"heads": 4, "head_dim": 12},
    "a2v": {"heads": 4, "head_dim": 12}, "v2a": {"heads": 4, "head_dim": 12},
}  # fmt: skip


def draw(state, video=None, seed=0, layers=None):
    """q, k, v of every layer and read for the next block."""
    linked, made = state.linked, torch.Generator().manual_seed(1000 * seed + state.blocks)
    tokens = linked.tokens(state.blocks, linked.latents(state.blocks, video))
    count = {"video": tokens.video, "audio": tokens.audio}
    drawn = {}
    for layer in range(state.geometry["video"].layers):
        for read in READS:
            g, m, n = state.geometry[read], count[ASKS[read]], count[GIVES[read]]
            sizes = ((g.heads, m, g.head_dim), (g.kv_heads, n, g.head_dim), (g.kv_heads, n, g.value_dim))
            drawn[layer, read] = [
                torch.randn(g.batch, *size, generator=made, dtype=torch.float64).to(g.dtype) for size in sizes
            ]
    return drawn


def feed(state, drawn, video=None, commit=True):
    with state.step(video, commit) as step:
        return {(layer, read): step.attend(layer, read, *qkv) for (layer, read), qkv in drawn.items()}


# -- the definition --------------------------------------------------------------------------------------------------


def tokens(linked, modality, video):
    """(block, seconds, row, column) of every token, from the card's words; sinks have None for seconds."""
    counts, left = [tuple(linked.first)], video - linked.first[0]
    while left > 0:
        v = min(3, left)
        counts.append((v, 25 * v // 3))
        left -= v
    out, at = [], 0
    if modality == "audio":
        out += [(0, None, 0, 0)] * linked.sinks
    for block, (v, a) in enumerate(counts):
        for _ in range(v if modality == "video" else a):
            if modality == "video":
                middle = (max(0, 8 * at - 7) + max(0, 8 * at + 1)) / 2 / 24
                out += [(block, middle, r, c) for r in range(linked.grid[0]) for c in range(linked.grid[1])]
            else:
                out.append((block, (max(0, 4 * at - 3) + max(0, 4 * at + 1)) / 2 * 160 / 16000, 0, 0))
            at += 1
    return out


def turned(x, token, spatial, shift=0.0):
    """One vector [width] turned as the card says; shift: seconds that its token comes along (block 0 behind a horizon)."""
    width, (_, seconds, row, column) = len(x), token
    axes = 3 if spatial else 1
    n = width // (2 * axes)
    out = x.clone()
    if seconds is None and not shift:
        return out
    where = [0.0 if seconds is None else 2 * seconds / 20 - 1]
    if spatial:
        where += [2 * (32 * i + 16) / 2048 - 1 for i in (row, column)]
    where[0] += 2 * shift / 20
    first = width // 2 - axes * n
    for j in range(n):
        for axis in range(axes):
            pair = 2 * (first + j * axes + axis)
            angle = math.pi / 2 * 10_000 ** (j / max(n - 1, 1)) * where[axis]
            c, s = math.cos(angle), math.sin(angle)
            a, b = x[pair], x[pair + 1]
            out[pair], out[pair + 1] = a * c - b * s, a * s + b * c
    return out


def definition(linked, read, q, k, v, video):
    """One read of a whole stream, [H, m, D] each, query by query."""
    asks, gives = tokens(linked, ASKS[read], video), tokens(linked, GIVES[read], video)
    heads, groups = q.shape[0], q.shape[0] // k.shape[0]
    per_head = groups > 1

    def turn(x, token, shift=0.0):  # [H, D]
        if per_head:
            return torch.stack([turned(one, token, read == "video", shift) for one in x])
        return turned(x.flatten(), token, read == "video", shift).reshape(x.shape)

    queries = [turn(q[:, i], token) for i, token in enumerate(asks)]
    cache: dict[tuple[int, int], Tensor] = {}
    out = torch.zeros(heads, len(asks), v.shape[-1], dtype=q.dtype)
    for i, (block, *_) in enumerate(asks):
        late = 0 if linked.horizon is None else max(0, block - linked.horizon)
        seen = [n for n, (b, *_) in enumerate(gives) if b <= block and (b == 0 or block - b <= linked.window)]
        for n in seen:
            key = n, late if gives[n][0] == 0 else 0
            if key not in cache:
                cache[key] = turn(k[:, n], gives[n], key[1])
        for h in range(heads):
            keys = torch.stack([cache[n, late if gives[n][0] == 0 else 0][h // groups] for n in seen])
            weights = torch.softmax(keys @ queries[i][h] * q.shape[-1] ** -0.5, 0)
            out[h, i] = weights @ v[h // groups][seen]
    return out


# -- a tiny model ----------------------------------------------------------------------------------------------------


class Duet(nn.Module):
    """Two streams of widths 96 and 48, two layers, random weights, that attend through a function (layer, read, q, k, v)."""

    def __init__(self, linked, layers=2, seed=0, gain=1.0):
        super().__init__()
        self.linked, self.layers = linked, layers
        made = torch.Generator().manual_seed(seed)
        self.width = {"video": 96, "audio": 48}

        def weight(a, b):
            return nn.Parameter(gain * torch.randn(a, b, generator=made, dtype=torch.float64) / a**0.5)

        self.sinks = nn.Parameter(0.02 * torch.randn(linked.sinks, 48, generator=made, dtype=torch.float64))
        self.project = nn.ParameterDict()
        for layer in range(layers):
            for read in READS:
                inner, asks, gives = (
                    OWN[read]["heads"] * OWN[read]["head_dim"],
                    *(self.width[x[read]] for x in (ASKS, GIVES)),
                )
                for name, shape in (
                    ("q", (asks, inner)),
                    ("k", (gives, inner)),
                    ("v", (gives, inner)),
                    ("o", (inner, asks)),
                ):
                    self.project[f"{layer}{read}{name}"] = weight(*shape)
            for name, width in self.width.items():
                self.project[f"{layer}{name}f"] = weight(width, width)

    def build(self, **geometry):
        return self.linked.build(layers=self.layers, **OWN, **F64, **geometry)

    def forward(self, video, audio, attend, sinks):
        """video [m, 96], audio [n, 48] → the same; sinks: how many stand before the audio, taken off again."""
        x = {"video": video, "audio": torch.cat([self.sinks[:sinks], audio])}
        for layer in range(self.layers):
            for reads in (("video", "audio"), ("a2v", "v2a")):
                normed = {name: nn.functional.layer_norm(one, one.shape[-1:]) for name, one in x.items()}
                fresh = {}
                for read in reads:
                    heads = OWN[read]["heads"]
                    q, k, v = (
                        (normed[side[read]] @ self.project[f"{layer}{read}{name}"])
                        .unflatten(-1, (heads, -1))
                        .transpose(0, 1)[None]
                        for name, side in (("q", ASKS), ("k", GIVES), ("v", GIVES))
                    )
                    out = attend(layer, read, q, k, v)[0].transpose(0, 1).flatten(1)
                    fresh[ASKS[read]] = x[ASKS[read]] + out @ self.project[f"{layer}{read}o"]
                x = fresh
            x = {name: one + torch.tanh(one @ self.project[f"{layer}{name}f"]) for name, one in x.items()}
        return x["video"], x["audio"][sinks:]

    def packed(self, video, audio):
        """Both streams in one masked pass; gradients flow."""
        latents = len(video) // (self.linked.grid[0] * self.linked.grid[1])
        places = {name: linked_places(self.linked, name, latents).double() for name in self.width}
        masks = {read: linked_mask(self.linked, read, latents) for read in READS}
        ropes = {
            read: self.linked.clock.rope(OWN[read]["heads"] * OWN[read]["head_dim"], spatial=read == "video")
            for read in READS
        }

        def rotate(x, read, side):
            rope, place = ropes[read], places[side[read]]
            axes = torch.tensor(rope.axes or [0] * len(rope.inv_freq))
            angle = place[:, axes] * torch.tensor(rope.inv_freq, dtype=torch.float64)
            flat = x[0].transpose(0, 1).flatten(1)
            a, b = flat[:, 0::2], flat[:, 1::2]
            both = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(1)
            return both.unflatten(1, (x.shape[1], -1)).transpose(0, 1)[None]

        def attend(layer, read, q, k, v):
            q, k = rotate(q, read, ASKS), rotate(k, read, GIVES)
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~masks[read], -torch.inf)
            return scores.softmax(-1) @ v

        return self(video, audio, attend, self.linked.sinks)

    @torch.no_grad()
    def stream(self, state, video, audio, passes=1):
        """Block by block: denoising passes on noise, then one on what is given."""
        made, cells = torch.Generator().manual_seed(9), self.linked.grid[0] * self.linked.grid[1]
        seen, heard, out = 0, 0, ([], [])
        while seen < len(video):
            full = self.linked.latents(state.blocks).video
            latents = self.linked.latents(state.blocks, min(full, (len(video) - seen) // cells))
            m, n = latents.video * cells, latents.audio
            fresh = video[seen : seen + m], audio[heard : heard + n]
            for left in range(passes, -1, -1):
                inputs = [torch.randn(x.shape, generator=made, dtype=x.dtype) if left else x for x in fresh]
                with state.step(latents.video, commit=not left) as step:
                    result = self(*inputs, step.attend, step.sinks)
            for parts, one in zip(out, result, strict=True):
                parts.append(one)
            seen, heard = seen + m, heard + n
        return torch.cat(out[0]), torch.cat(out[1])

    def inputs(self, latents, seed=0):
        """Clean latents of both streams for so many video latents."""
        made, blocks = torch.Generator().manual_seed(seed), self.linked.blocks(latents)
        cells = self.linked.grid[0] * self.linked.grid[1]
        sizes = (latents * cells, 96), (sum(b.audio for b in blocks), 48)
        return [torch.randn(*size, generator=made, dtype=torch.float64) for size in sizes]

    def of_block(self, modality, latents):
        """The block of each token of a stream of so many video latents, without sinks."""
        blocks = linked_blocks(self.linked, modality, latents)
        return blocks[self.linked.sinks :] if modality == "audio" else blocks


def tiny(**layout):
    return Duet(Linked(**{**SMALL, **layout}))
