"""Memories that are no single list of keys, at the sizes of their papers: on a GPU, or reduced as a trial of the program.

Each row is one ratio, measured in turns, beside what a paper says of it. Networks have random weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evenflow.memory import Lanes, Linked, linked_blocks, linked_mask
from evenflow.memory.admission import Door, OneToken, TokenDrop
from evenflow.memory.fast_weights import FastState, FastWeights, feed
from evenflow.memory.linked_step import Read
from evenflow.models import open_stream
from evenflow.recipes import recipe
from evenflow.watch import Watching

from .timing import interleaved, machine, ratio


class Bench:
    """Where things are, how large they are, and the rows so far."""

    def __init__(self, device: str, say: Callable[[str], None]) -> None:
        self.device, self.say = device, say
        self.real = device == "cuda"
        self.dtype = torch.bfloat16 if self.real else torch.float32
        self.rows: list[dict[str, Any]] = []

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def race(self, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Seconds of every call in turns, each waited for."""

        def waited(call: Callable[[], object]) -> None:
            call()
            if self.real:
                torch.cuda.synchronize()

        return interleaved({name: partial(waited, call) for name, call in calls.items()}, rounds if self.real else 2, 2)

    def row(self, what: str, took: dict[str, list[float]], one: str, other: str, paper: str) -> None:
        """How many times as long `one` took as `other`."""
        times = ratio(took, one, other)
        milliseconds = {name: 1e3 * median(seconds) for name, seconds in took.items()}
        self.rows.append({"what": what, "paper": paper, "ratio": times, "milliseconds": milliseconds})
        self.say(f"{what}: ×{times:.2f}  ({', '.join(f'{name} {ms:.2f} ms' for name, ms in milliseconds.items())})")


@torch.no_grad()
def measure(*, device: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """All rows; device None: the GPU if there is one."""
    bench = Bench(device or ("cuda" if torch.cuda.is_available() else "cpu"), say)
    for part in (chunks, linked, at_once, dropped):
        part(bench)
    name = torch.cuda.get_device_name() if bench.real else f"reduced sizes on {machine()['processor']}"
    return {
        "title": "Beyond one list of keys",
        "device": name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "rows": bench.rows,
    }


def chunks(bench: Bench) -> None:
    """Fast weights of Spatial-TTT learned in large chunks and in small ones; and of twice as many tokens."""
    heads, dim, large = (4, 512, 2648) if bench.real else (2, 32, 64)
    tokens = 4 * large
    w0, w1, w2 = torch.randn(3, heads, dim, dim, device=bench.device) / dim**0.5

    def given(count: int) -> tuple[Tensor, ...]:
        q, k, v = (bench.random(1, heads, count, dim) for _ in range(3))
        rates = 1e-3 * torch.rand(1, heads, count, 3, device=bench.device)
        return q, k, v, rates, torch.rand(1, heads, count, device=bench.device)

    once, twice = given(tokens), given(2 * tokens)
    begun = FastState.begin((w0, w1, w2), 1)
    calls = {
        "small": partial(feed, FastWeights(large // 41), begun, *once), "large": partial(feed, FastWeights(large), begun, *once),
        "twice": partial(feed, FastWeights(large), begun, *twice),
    }  # fmt: skip
    took = bench.race(calls, 5)
    bench.row(f"fast weights, chunks of {large // 41} over {large} tokens", took, "small", "large", "several times")
    bench.row("fast weights, twice as many tokens", took, "twice", "large", "2, linear")


def linked(bench: Bench) -> None:
    """A second of video and audio over its window, beside 16 latents at once without a cache."""
    layers, heads, grid, rounds = (2, 32, (16, 24), 15) if bench.real else (1, 2, (2, 3), 2)
    memory = Linked(grid=grid)
    state = memory.build(
        layers=layers, heads=heads, head_dim=64, video={"head_dim": 128}, dtype=bench.dtype, device=bench.device
    )
    asks: dict[Read, tuple[str, str, int]] = {
        "video": ("video", "video", 128),
        "audio": ("audio", "audio", 64),
        "a2v": ("video", "audio", 64),
        "v2a": ("audio", "video", 64),
    }

    def drawn(video: int, audio: int) -> dict[Read, list[Tensor]]:
        count = {"video": video, "audio": audio}
        return {
            read: [bench.random(1, heads, count[side], dim) for side in (asked, gives, gives)]
            for read, (asked, gives, dim) in asks.items()
        }

    def second(commit: bool = False) -> None:
        block = 1 if state.blocks else 0
        fresh = prepared[block]
        with state.step(commit=commit) as step:
            for layer in range(layers):
                for read, qkv in fresh.items():
                    step.attend(layer, read, *qkv)

    prepared = [drawn(*memory.tokens(block, memory.latents(block))) for block in (0, 1)]
    for _ in range(8):
        second(commit=True)
    blocks = {side: linked_blocks(memory, side, 16) for side in ("video", "audio")}
    clip = drawn(len(blocks["video"]), len(blocks["audio"]))
    masks = {read: linked_mask(memory, read, 16).to(bench.device) for read in asks}

    def without() -> None:
        for _ in range(layers):
            for read, qkv in clip.items():
                scaled_dot_product_attention(*qkv, attn_mask=masks[read])

    took = bench.race({"second": second, "clip": without}, rounds)
    tokens = grid[0] * grid[1]
    bench.row(f"linked memories, a clip of 16 latents of {tokens} tokens over a second", took, "clip", "second", "≥ 3")


def at_once(bench: Bench) -> None:
    """Watching and speaking in two threads, each with a queue of the device of its own, over one after the other."""
    layers, hidden, units, words = (28, 2048, 6, 12) if bench.real else (2, 32, 2, 2)
    heads, kv, dim, seen = (16, 2, 128, 512) if bench.real else (2, 1, 16, 8)
    weights = [bench.random(hidden, 4 * hidden) / hidden**0.5 for _ in range(2)]
    state = Lanes().build(layers=layers, heads=heads, kv_heads=kv, head_dim=dim, dtype=bench.dtype, device=bench.device)
    frame, word = bench.random(seen, hidden), bench.random(1, hidden)
    q, k, v = (bench.random(1, count, seen, dim) for count in (heads, kv, kv))

    def layer_by_layer(step: Any, x: Tensor) -> None:
        n = len(x)
        for layer in range(layers):
            step.attend(layer, q[:, :, :n], k[:, :, :n], v[:, :, :n])
            for _ in range(2):
                x = (x @ weights[0]) @ weights[1].T / hidden

    def watch(unit: int) -> None:
        with state.read(seen, unit) as step:
            layer_by_layer(step, frame)
        state.close("source", unit)

    def speak(unit: int) -> None:
        for _ in range(words):
            with state.write(1, unit) as step:
                layer_by_layer(step, word)
        state.close("target", unit)

    def queue() -> Any:
        return torch.cuda.stream(torch.cuda.Stream()) if bench.real else nullcontext()

    def serial() -> None:
        state.reset()
        for unit in range(units):
            watch(unit)
            speak(unit)

    def together() -> None:
        state.reset()

        def watching() -> None:
            with torch.no_grad(), queue():
                for unit in range(units):
                    watch(unit)

        watcher = threading.Thread(target=watching)
        watcher.start()
        with queue():
            for unit in range(units):
                state.wait("target", unit)
                speak(unit)
        watcher.join()

    took = bench.race({"in turn": serial, "at once": together}, 5)
    bench.row(
        f"lanes, {seen} tokens seen and {words} words said of each of {units} units, in turn over at once",
        took,
        "in turn",
        "at once",
        "≤ 2",
    )


def dropped(bench: Bench) -> None:
    """A stream of slices through a 7B model's shape, whole and behind doors that drop."""
    tokens, slices, hidden = (256, 40, 3584) if bench.real else (8, 6, 64)
    size: dict[str, Any] = {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    }
    if not bench.real:
        size = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.Qwen2Config(vocab_size=1024, hidden_size=hidden, **size)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            model = transformers.Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)

    def film(share: float) -> Tensor:
        frames = [bench.random(tokens, hidden)]
        for _ in range(slices):
            new = torch.rand(tokens, device=bench.device).argsort()[: round(share * tokens)]
            frames.append(frames[-1].index_copy(0, new, bench.random(len(new), hidden)))
        return torch.stack(frames)

    gate = OneToken(silent=7)
    drop = Door(lets=TokenDrop(0.9, reference="last_kept"), speaks=gate)
    films = {"whole": (film(1.0), Door(speaks=gate))} | {
        f"{share:.0%} dropped": (film(1 - share), drop) for share in (0.45, 0.81, 0.85)
    }

    def through(frames: Tensor, door: Door) -> None:
        [*Watching(open_stream(model, recipe("full"), batch=1, length=tokens * (slices + 1)), door).see(frames)]

    took = bench.race({name: partial(through, *given) for name, given in films.items()}, 3)
    for name in [*films][1:]:
        paper = {"81% dropped": "1.76"}.get(name, "–")
        bench.row(f"{slices} slices of {tokens} tokens, whole over {name}", took, "whole", name, paper)
