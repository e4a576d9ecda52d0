"""What streams on one clock and in blocks promise: the same as the whole, so soon, at even cost (Qwen2.5-Omni)."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as fn

from ..memory.blockwise import Operator, Part, S, Stacked, Windowed, block_mask, noise_at
from ..memory.time_aligned import Film, Marks, TimeAligned
from .registry import Bench, claim

DIM, HEADS, BLOCK, LAYERS = 64, 4, 24, 22
BACK, AHEAD = {0: 1, 20: 1}, {10: 1}


class Layer:
    """A transformer layer over a window, for the window's own items; or over a whole stream, under a mask."""

    def __init__(self, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        sizes = (DIM, 3 * DIM), (DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM)
        self.qkv, self.out, self.up, self.down = (torch.randn(*s, generator=made) * 0.7 / s[0] ** 0.5 for s in sizes)

    def __call__(self, window: Tensor, part: Part, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x in (fn.layer_norm(window, (DIM,)) @ self.qkv).chunk(3, -1)
        )
        own = slice(part.start, part.stop)
        seen = fn.scaled_dot_product_attention(q[:, :, own], k, v, mask).transpose(1, 2).flatten(2)
        x = window[:, own] + seen @ self.out
        return x + fn.gelu(fn.layer_norm(x, (DIM,)) @ self.up) @ self.down


def masked(x: Tensor, layers: list[Layer], back: dict[int, int], ahead: dict[int, int]) -> Tensor:
    """All of a stream at once, each layer under its block mask."""
    n = x.shape[1]
    for number, layer in enumerate(layers):
        x = layer(x, Part(0, 0, n), block_mask(n, BLOCK, back.get(number, 0), ahead.get(number, 0)))
    return x


def streamed(operator: Operator[S], x: Tensor, piece: int) -> tuple[Tensor, int]:
    """What an operator gives for x [B, n, D] in such pieces, and how many items had come at its first output."""
    state, outs, first = operator.reset(), list[Tensor](), 0
    for at in range(0, x.shape[1], piece):
        out, state = operator.step(x[:, at : at + piece], state)
        if out is not None:
            first = first or min(at + piece, x.shape[1])
            outs.append(out)
    last, _ = operator.flush(state)
    return torch.cat([*outs, *([] if last is None else [last])], 1), first


def cost(operator: Operator[S], items: Tensor, early: int, late: int, times: int) -> tuple[float, float]:
    """Median seconds of a step after `early` and after `late` steps, measured in turns, as others use the machine too."""
    states, took = list[S](), (list[float](), list[float]())
    for steps in (early, late):
        state = operator.reset()
        for _ in range(steps):
            _, state = operator.step(items, state)
        states.append(state)
    for n in range(2 * times):
        start = time.perf_counter()
        _, states[n % 2] = operator.step(items, states[n % 2])
        took[n % 2].append(time.perf_counter() - start)
    return median(took[0]), median(took[1])


def flow(layers: list[Layer], steps: int, back: dict[int, int], ahead: dict[int, int]) -> Windowed:
    """A decoder of chunks of 3 blocks that sees 2 before and 1 after: so many evaluations from noise, in each window."""

    def decoded(window: Tensor, part: Part) -> Tensor:
        x = noise_at(0, part.first, window.shape[1], (DIM,), BLOCK).expand_as(window)
        for _ in range(steps):
            x = x + (masked(x + window, layers, back, ahead) - x) / steps
        return x[:, part.start : part.stop]

    return Windowed(decoded, 3 * BLOCK, 2 * BLOCK, BLOCK)


@claim("qwen25-omni")
def qwen25_omni(bench: Bench) -> None:
    """Encoders and decoders in blocks give what the whole gives, as soon as their look-ahead allows, at even cost."""
    layers = [Layer(n) for n in range(LAYERS)]
    x = torch.randn(1, 30 * BLOCK + 7, DIM, generator=torch.Generator().manual_seed(1))
    stacks = {
        "an encoder's blocks alone": (Stacked.of(layers[:8], BLOCK), {}, {}, layers[:8]),
        "a decoder's layers, 2 blocks back and 1 ahead": (Stacked.of(layers, BLOCK, BACK, AHEAD), BACK, AHEAD, layers),
    }
    with torch.no_grad():
        for what, (operator, back, ahead, own) in stacks.items():
            whole = masked(x, own, back, ahead)
            worst = max(float((streamed(operator, x, piece)[0] - whole).abs().max()) for piece in (1, 7, BLOCK, 200))
            scale = float(whole.abs().mean())
            bench.row(
                f"{what}: error of any pieces against the masked whole", "0", f"{worst:.1e}", worst < 1e-4 * scale,
                f"float32, numbers of {scale:.1f}; pieces of 1, 7, {BLOCK} and 200",
            )  # fmt: skip
            first = streamed(operator, x, 1)[1]
            bench.row(
                f"{what}: blocks that have come at the first output", f"{1 + sum(ahead.values())}", f"{first / BLOCK:g}",
                first == operator.look_ahead + 1,
            )  # fmt: skip
            piece = torch.randn(1, BLOCK, DIM)
            early, late = cost(operator, piece, 100 // BLOCK, 10_000 // BLOCK, 100 if bench.full else 40)
            bench.row(
                f"{what}: time of a block at item 10,000 over item 100", "1", f"{late / early:.2f}", late < 1.3 * early,
                f"{1e3 * late:.1f} ms a block of {BLOCK}",
            )  # fmt: skip
        windows(bench, layers, x)
    film_places(bench)


def windows(bench: Bench, layers: list[Layer], x: Tensor) -> None:
    """A flow in windows, of one evaluation and of several."""
    for steps, exact in ((1, True), (4, False)):
        operator = flow(layers, steps, BACK, AHEAD)
        ours, first = streamed(operator, x, BLOCK)
        n = x.shape[1]
        theirs = operator.function(x, Part(0, 0, n))
        error = (ours - theirs).abs()
        scale = float(theirs.abs().mean())
        cuts = float(error.unflatten(1, (-1, 1))[:, ::72].mean()) / scale
        bench.row(
            f"windows of 3 blocks, {steps} evaluation{'s' * (steps > 1)} of the flow: error against the whole, relative",
            "0" if exact else "small (4e-3 in a random one)", f"{float(error.max()) / scale:.1e}",
            float(error.max()) < 1e-4 * scale if exact else None,
            f"mean where a chunk begins {cuts:.1e}; first output after {first // BLOCK} blocks",
        )  # fmt: skip


def film_places(bench: Bench) -> None:
    """A film on the clock, second by second: what waits, and what it costs."""
    clock, waits = TimeAligned(), list[int]()
    second = [Film(1, 8, 8, 1.0, heard=25)]
    states, took = [clock.step([Marks()], clock.reset())[1]] * 2, [list[float](), list[float]()]
    for steps, number in ((100, 0), (10_000, 1)):
        for _ in range(steps):
            _, states[number] = clock.step(second, states[number])
            film = states[number].film
            waits.append(0 if film is None else len(film.waiting.key))
    for n in range(1000):
        start = time.perf_counter()
        _, states[n % 2] = clock.step(second, states[n % 2])
        took[n % 2].append(time.perf_counter() - start)
    early, late = median(took[0]), median(took[1])
    bench.row(
        "places of a film: time of its 10,000th second over its 100th", "1", f"{late / early:.2f}", late < 1.3 * early,
        f"{1e3 * late:.2f} ms; 64 tokens of picture and 25 of sound a second",
    )  # fmt: skip
    bench.row("tokens that wait for their turn of 2 s, at most", "50 of sound", f"{max(waits)}", max(waits) <= 64 + 50)
