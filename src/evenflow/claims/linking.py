"""What linked memories promise: two modalities of one clock stream as they were trained, read each other's seconds, stay flat."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

from ..memory import Linked, LinkedState, linked_blocks, linked_mask, linked_places
from ..memory.linked_step import ASKS, GIVES, Read
from .choosing import in_turns, random, ratio
from .registry import Bench, claim

READS: tuple[Read, ...] = ("video", "audio", "a2v", "v2a")
LAYERS, PASSES = 2, 3  # denoising passes of a block, then one on what came out
Drawn = dict[Read, tuple[Tensor, Tensor, Tensor]]


@claim("omniforcing")
def omniforcing(bench: Bench) -> None:
    """Video and audio, second by second, equal the masked pass they are trained with, in memory and time that stay flat."""
    equal(bench, Linked(grid=(4, 6)), 16, "blocks of 1 + 1, then 3 + 25 latents, 16 sinks")
    equal(bench, Linked(grid=(4, 6), first=(4, 26), sinks=0), 18, "4 + 26, then 3 + 25, the last of 2 + 16, no sinks")
    counted(bench)
    across(bench)
    flat(bench, 1800 if bench.full else 420)
    # The published model has 384 tokens a latent; smaller ones show from which size on a cache pays.
    for grid in ((4, 6), (12, 8), *([(16, 24)] if bench.full else [])):
        beside(bench, grid)


def built(linked: Linked, dtype: torch.dtype = torch.float32, wide: int = 1) -> LinkedState:
    """Video heads twice as wide as those of audio, as the paper's model has them."""
    return linked.build(layers=LAYERS, heads=4, head_dim=16 * wide, video={"head_dim": 32 * wide}, dtype=dtype)


def drawn(state: LinkedState, video: int, audio: int, number: int) -> Drawn:
    """Random queries, keys and values for so many tokens of each modality."""
    made, count, out = random(number, "linked"), {"video": video, "audio": audio}, Drawn()
    for read in READS:
        g, m, n = state.geometry[read], count[ASKS[read]], count[GIVES[read]]
        q, k, v = (torch.randn(1, g.heads, size, g.head_dim, generator=made, dtype=g.dtype) for size in (m, n, n))
        out[read] = (q, k, v)
    return out


def attended(state: LinkedState, fresh: Drawn, video: int | None = None, commit: bool = True) -> dict[Read, Tensor]:
    """A pass over a block; every layer gets the same. What the last one reads."""
    out = {}
    with state.step(video, commit) as step:
        for layer in range(LAYERS):
            for read in READS:
                out[read] = step.attend(layer, read, *fresh[read])
    return out


# -- what is computed ------------------------------------------------------------------------------------------------


def turned(state: LinkedState, whole: Drawn, video: int) -> Drawn:
    """Queries and keys of a whole stream, rotated."""
    places, out = {name: linked_places(state.linked, name, video) for name in ("video", "audio")}, Drawn()
    for read, (q, k, v) in whole.items():
        (spin,) = state.spins[read].values()
        out[read] = (spin.rotate(q, spin.at(places[ASKS[read]])), spin.rotate(k, spin.at(places[GIVES[read]])), v)
    return out


def packed(whole: Drawn, masks: dict[Read, Tensor]) -> dict[Read, Tensor]:
    """A whole stream, rotated, in one masked pass of one layer."""
    return {read: scaled_dot_product_attention(*qkv, attn_mask=masks[read]) for read, qkv in whole.items()}


def equal(bench: Bench, linked: Linked, video: int, what: str) -> None:
    """Block by block, after passes on noise, beside the masked pass."""
    worst = {}
    for dtype in (torch.float64, torch.float32):
        state = built(linked, dtype)
        blocks = {name: linked_blocks(linked, name, video) for name in ("video", "audio")}
        whole = drawn(state, len(blocks["video"]), len(blocks["audio"]), 1)
        masks: dict[Read, Tensor] = {read: linked_mask(linked, read, video) for read in READS}
        expected, worst[dtype] = packed(turned(state, whole, video), masks), 0.0
        for number, latents in enumerate(linked.blocks(video)):
            rows = {name: block == number for name, block in blocks.items()}
            m, n = (int(row.sum()) for row in rows.values())
            attended(state, drawn(state, m, n, 2), latents.video, commit=False)
            fresh: Drawn = {
                read: (q[:, :, rows[ASKS[read]]], k[:, :, rows[GIVES[read]]], v[:, :, rows[GIVES[read]]])
                for read, (q, k, v) in whole.items()
            }
            for read, out in attended(state, fresh, latents.video).items():
                worst[dtype] = max(worst[dtype], float((out - expected[read][:, :, rows[ASKS[read]]]).abs().max()))
    bench.row(
        f"largest difference of four reads, streamed and in one masked pass, {video} video latents", "2e-6",
        f"{worst[torch.float32]:.0e} float32, {worst[torch.float64]:.0e} float64",
        worst[torch.float32] < 2e-5 and worst[torch.float64] < 1e-10, what,
    )  # fmt: skip


def counted(bench: Bench) -> None:
    """Audio keys that each video block sees: e^0 each, so the share of one that alone has a value is one over their number."""
    linked, counts = Linked(grid=(1, 1)), []
    state = built(linked)
    for latents in linked.blocks(16):
        fresh = drawn(state, *linked.tokens(state.blocks, latents), 3)
        q, k, v = fresh["a2v"]
        value = torch.zeros_like(v)
        value[:, :, -1] = 1
        fresh["a2v"] = (torch.zeros_like(q), k, value)
        counts.append(round(1 / float(attended(state, fresh, commit=False)["a2v"][0, 0, 0, 0])))
        attended(state, fresh | {"a2v": (q, k, torch.zeros_like(v))})
    bench.row(
        "audio keys that a video block sees, 5 s", "17, 42, 67, 92, 117, 142", ", ".join(map(str, counts)),
        counts == [17, 42, 67, 92, 117, 142],
    )  # fmt: skip


def across(bench: Bench, seconds: int = 40, window: int = 4) -> None:
    """Each second of one modality says its own value; what a query of the other gets of each, second after second."""
    width, wrong, shares = 64, 0, {"a2v": 0.0, "v2a": 0.0}
    linked = Linked(window=window, grid=(2, 3))
    state = linked.build(layers=1, heads=1, head_dim=width, rope=None)
    keys = torch.nn.functional.normalize(torch.randn(seconds, width, generator=random(0, "keys")), dim=-1)
    for now in range(seconds):
        tokens = linked.tokens(now, linked.latents(now))
        count = {"video": tokens.video, "audio": tokens.audio}
        seen = {now, 0, *range(max(0, now - window), now)}
        asked = max(1, now - 3) if now else 0  # said three seconds ago, by the other modality
        alike, pointed = Drawn(), Drawn()
        for read in READS:
            value = one_hot(torch.tensor(now), width).float().expand(1, 1, count[GIVES[read]], width)
            key = keys[now].expand_as(value)
            ask = (12 * width**0.5 * keys[asked]).expand(1, 1, count[ASKS[read]], width)
            alike[read], pointed[read] = (torch.zeros_like(ask), key, value), (ask, key, value)
        with state.step(commit=False) as step:
            even = {read: step.attend(0, read, *alike[read]) for read in READS}
        with state.step() as step:
            found = {read: step.attend(0, read, *pointed[read]) for read in READS}
        for read in READS:
            wrong += {*even[read].abs().sum((0, 1, 2)).nonzero().flatten().tolist()} != seen
        for name in ("a2v", "v2a"):
            shares[name] += float(found[name][0, 0, :, asked].mean()) / seconds
    bench.row(
        f"reads of {seconds} seconds that see another second than block 0, the last {window} and their own", "0",
        f"{wrong} of {4 * seconds}", wrong == 0, "every second's value is its own channel; both modalities lose the same ones",
    )  # fmt: skip
    bench.row(
        "what video gets of what audio said 3 s ago, where it asks for it; audio of video", "–",
        f"{shares['a2v']:.2f}; {shares['v2a']:.2f}", min(shares.values()) > 0.9, "planted keys, no rotation, mean over the stream",
    )  # fmt: skip


# -- what it costs ---------------------------------------------------------------------------------------------------


def flat(bench: Bench, seconds: int, horizon: int = 18) -> None:
    """Seconds that follow one another, each in three denoising passes and one that is kept."""
    linked = Linked(grid=(4, 6), horizon=horizon)
    state, sizes = built(linked), []
    prepared = [drawn(state, *linked.tokens(block, linked.latents(block)), 4) for block in (0, 1)]

    def second(of: LinkedState, block: int = 1) -> None:
        for left in range(PASSES, -1, -1):
            attended(of, prepared[block > 0], commit=not left)

    for block in range(seconds):
        second(state, block)
        sizes.append(float(state.nbytes))
        if block == 29:
            young = state.fork()
    # Both in turns: two stretches of wall time would tell more of the machine than of the memory.
    took = in_turns({"late": lambda: second(state), "early": lambda: second(young)}, 41)
    bench.row(
        f"bytes after {seconds} s over those after 6 s", "1 after W + 1 blocks", f"{sizes[-1] / sizes[6]:.2f}",
        sizes[-1] == sizes[6], f"{sizes[-1] / 1e6:.1f} MB, a window of 5 s",
    )  # fmt: skip
    times = ratio(took, "late", "early")
    bench.row(
        f"time of a second after {seconds} s over a copy's that stayed at 30 s, in turns", "flat", f"×{times:.2f}",
        times < 1.25, f"{1e3 * median(took['late']):.1f} ms, {LAYERS} layers, {PASSES} + 1 passes; from 18 s on block 0 comes along",
    )  # fmt: skip


class Naive:
    """What one would write: rotated keys and values in lists, put together for every pass; old seconds are masked, or cut
    off (`cut`)."""

    def __init__(self, state: LinkedState, cut: bool) -> None:
        self.like, self.cut, self.blocks = state, cut, 0
        self.cache: dict[tuple[int, Read], tuple[Tensor, Tensor]] = {}
        self.turns: dict[Read, list[tuple[Tensor, Tensor]]] = {}
        self.turned = -1

    def attend(self, fresh: Drawn, commit: bool) -> None:
        """A pass over a block."""
        linked = self.like.linked
        if self.turned != self.blocks:  # cosines and sines once a block, as here
            places = {name: linked.places(name, self.blocks) for name in ("video", "audio")}
            for read in READS:
                (spin,) = self.like.spins[read].values()
                self.turns[read] = [spin.at(places[side[read]]) for side in (ASKS, GIVES)]
            self.turned = self.blocks
        for layer in range(LAYERS):
            for read in READS:
                (spin,) = self.like.spins[read].values()
                q, k, v = fresh[read]
                q, k = spin.rotate(q, self.turns[read][0]), spin.rotate(k, self.turns[read][1])
                mask = None
                if self.blocks:
                    k, v = (torch.cat(pair, 2) for pair in zip(self.cache[layer, read], (k, v), strict=True))
                    ring = self.like.rings[read]
                    if self.cut:
                        kept = ring.head + (linked.window + 1) * ring.size
                        if k.shape[2] > kept:
                            k, v = (
                                torch.cat([x[:, :, : ring.head], x[:, :, ring.head + ring.size :]], 2) for x in (k, v)
                            )
                    else:
                        mask = torch.arange(k.shape[2]) >= k.shape[2] - (linked.window + 1) * ring.size
                        mask[: ring.head] = True
                        mask = mask.expand(q.shape[2], -1)
                scaled_dot_product_attention(q, k, v, attn_mask=mask)
                if commit:
                    self.cache[layer, read] = (k, v)
        self.blocks += commit


def beside(bench: Bench, grid: tuple[int, int], seconds: int = 30) -> None:
    """A second here and in the ways one would write it, and beside a whole clip without a cache."""
    linked = Linked(grid=grid)
    state = built(linked, wide=2)
    masked, cut = Naive(state, False), Naive(state, True)
    prepared = [drawn(state, *linked.tokens(block, linked.latents(block)), 5) for block in (0, 1)]
    for block in range(seconds):
        attended(state, prepared[block > 0])
        for naive in (masked, cut):
            naive.attend(prepared[block > 0], commit=True)
    blocks = {name: linked_blocks(linked, name, 16) for name in ("video", "audio")}
    masks: dict[Read, Tensor] = {read: linked_mask(linked, read, 16) for read in READS}
    clip = turned(state, drawn(state, len(blocks["video"]), len(blocks["audio"]), 6), 16)

    def without() -> None:
        for _ in range(LAYERS):
            packed(clip, masks)

    calls: dict[str, Callable[[], object]] = {
        "linked": lambda: attended(state, prepared[1], commit=False),
        "masked": lambda: masked.attend(prepared[1], commit=False),
        "cut": lambda: cut.attend(prepared[1], commit=False),
        "without": without,
    }
    took = in_turns(calls, 41 if grid[0] * grid[1] < 384 else 9)
    ours = 1e3 * median(took["linked"])
    for name, what, paper, least in (
        ("masked", f"caches put together and masked after {seconds} s, over a pass here", "–", 1.0),
        ("cut", "caches put together and cut to the window, over a pass here", "–", None),
        ("without", "16 latents at once without a cache, over a pass of one second here", "≥ 3", 3.0),
    ):
        times = ratio(took, name, "linked")
        bench.row(
            f"{what}, {grid[0] * grid[1]} tokens a video latent", paper, f"×{times:.2f}", None if least is None else times >= least,
            f"{1e3 * median(took[name]):.1f} and {ours:.1f} ms, {LAYERS} layers, attention only, {3 * grid[0] * grid[1]} video and 25 audio tokens a second",
        )  # fmt: skip
