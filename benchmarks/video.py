"""Frames a second of an endless video, network and codec, beside the least that arithmetic and memory traffic allow.

The network has random weights in the shape of Wan 2.1 1.3B at 832×480 and is in its steady state: the window is full,
and every chunk brings as many frames as leave. On a GPU blocks are compiled around the memory. Without a GPU a reduced
network runs, as a trial of the program: its figures say nothing of a GPU, and are not shown as if they did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evenflow.generate import VideoStream
from evenflow.memory import MemoryState
from evenflow.models.video import PRESETS, Text, VideoConfig, VideoModel, VideoTransformer, places, random_model
from evenflow.models.video.transformer import compiled
from evenflow.models.video.wan_fused import fused
from evenflow.models.video.wan_vae import WanCodec
from evenflow.recipes import parse

from .recipes import Counted
from .timing import machine

PROMPT = "a red ball rolls over a meadow"
DENOISING, CLEAN, DECODING = "a denoising pass", "the clean pass", "decoding a chunk"
PARTS, STREAM = "the parts, one after another", "a stream, whole"
MEMORIES = ("longlive(window=12, sink=3)", "self-forcing(window=21)", "forcing-kv(static=STATIC)")
BEGIN = 4  # chunks after which every recipe does what it does for ever, once its window is full
# On the CPU: the same code in a size that a core carries.
REDUCED = {
    "dim": 96, "ffn_dim": 192, "heads": 4, "layers": 2, "text_dim": 64, "text_len": 16, "freq_dim": 32, "size": (64, 48),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Floating point operations, and bytes that have to be read or written once."""

    flops: float
    nbytes: float

    def floor(self, ceilings: Mapping[str, float]) -> float:
        """Seconds that no program can beat where so many operations are done and so many bytes moved a second."""
        return max(self.flops / ceilings["flops"], self.nbytes / ceilings["bytes"])


def network_work(model: VideoTransformer, frames: int, latent: tuple[int, int], keys: float) -> Work:
    """One pass over so many latent frames, each token of which attends `keys` tokens (the mean of layers and heads).

    Bytes: weights, keys and values held, keys and values of the text, latents in and out, each once.
    """
    c, n = model.config, frames * model.config.tokens(latent)
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("text_embedding"))
    patch = c.patch[1] * c.patch[2]
    a_token = c.layers * (12 * c.dim**2 + 4 * c.dim * c.ffn_dim + 4 * c.dim * (keys + c.text_len))
    edges = 2 * c.dim * patch * (c.in_channels + c.out_channels)
    a_frame = 2 * (c.freq_dim * c.dim + c.dim**2 + 6 * c.dim**2)
    held = 2 * c.layers * c.dim * (keys + c.text_len)
    numbers = weights + held + n * patch * (c.in_channels + c.out_channels)
    return Work(n * (a_token + edges) + frames * a_frame, numbers * model.head.head.weight.element_size())


def codec_work(codec: WanCodec, latents: Tensor) -> Work:
    """Decoding latents in the middle of a stream: operations counted in a call; bytes of weights, of what convolutions
    remember (read and written for every latent), and of latents and frames."""
    _, state = codec.decode(latents)
    with FlopCounterMode(display=False) as counter:
        frames, after = codec.decode(latents, state)
    weights = sum(p.nbytes for p in codec.vae.decoder.parameters())
    kept = sum(t.nbytes for t in after.features.values())
    moved = weights + latents.shape[1] * 2 * kept + latents.nbytes + frames.nbytes
    return Work(counter.get_total_flops(), moved)


class Clock:
    """Marks in time, on the device where it has a clock of its own; nothing waits until they are read."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, list[Any]()

    def mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def timed(step: Callable[[], object], device: str, rounds: int) -> float:
    """Median seconds of `rounds` calls, after two that do not count."""
    for _ in range(2):
        step()
    clock = Clock(device)
    clock.mark()
    for _ in range(rounds):
        step()
        clock.mark()
    return median(clock.seconds())


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a large product of matrices, and bytes a second of a large copy (read and written)."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    large = torch.randn((1 << 30 if device == "cuda" else 1 << 22), device=device, dtype=dtype)
    other = torch.empty_like(large)
    return {
        "flops": 2 * size**3 / timed(lambda: a @ b, device, 10),
        "bytes": 2 * large.nbytes / timed(lambda: other.copy_(large), device, 10),
    }


class Loop:
    """The chunks of a stream, part by part: what `VideoStream` calls, without its books."""

    def __init__(self, model: VideoModel, memory: str, text: Text) -> None:
        c = self.config = model.config
        self.model, self.text, self.latent = model, text, c.latent_size()
        weight = model.transformer.head.head.weight
        self.size = self.latent[0] // c.patch[1], self.latent[1] // c.patch[2]
        described = parse(memory)
        self.state = replace(described, frame=c.tokens(self.latent)).build(
            layers=c.layers, heads=c.heads, kv_heads=c.heads, head_dim=c.head_dim, rope=model.transformer.rope,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.tags = {"coordinates": places(c.chunk, *self.size, weight.device)}
        self.m = c.chunk * c.tokens(self.latent)
        shape = (1, c.chunk, c.in_channels, *self.latent)
        self.x = torch.randn(shape, device=weight.device, dtype=weight.dtype)
        self.decoded: Any = None

    def call(self, t: float, commit: bool, state: MemoryState | None = None) -> Tensor:
        """One pass of the network."""
        memory = state or self.state
        times = torch.full(self.x.shape[:2], t, device=self.x.device)
        with memory.step(self.m, tags=self.tags, commit=commit):
            return self.model.transformer(self.x, times, self.text, memory.attend)

    def decode(self) -> Tensor:
        """The next chunk of frames."""
        frames, self.decoded = self.model.codec.decode(self.x[:, :, : self.config.out_channels], self.decoded)
        return frames

    def fill(self) -> None:
        """Chunks until as many frames leave as come: those of the window, and what a recipe needs to begin."""
        frames = self.state.memory.capacity or 0
        for _ in range(-(-frames // self.config.chunk) + BEGIN):
            self.call(0.0, True)
        for _ in range(2):
            self.decode()

    def keys(self) -> float:
        """Tokens that a token attends, the mean of layers and heads."""
        twin, counts = self.state.fork(), list[Tensor]()
        twin.memory = replace(twin.memory, recall=Counted(twin.memory.recall, counts))
        self.call(0.0, False, twin)
        return sum(float(count.float().mean()) for count in counts) / len(counts)

    def chunk(self, clock: Clock) -> None:
        """One chunk as a stream makes it: denoise, show, remember."""
        for t in self.config.steps:
            self.call(float(t), False)
            clock.mark()
        self.decode()
        clock.mark()
        self.call(0.0, True)
        clock.mark()


@torch.no_grad()
def measure(
    *, config: VideoConfig = PRESETS["wan2.1-1.3b"], memories: tuple[str, ...] = MEMORIES, device: str | None = None,
    chunks: int = 8, vae_dim: int = 96, say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Every memory in turn; device None: the GPU if there is one. On a CPU the network is a reduced one, in float32."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    real = device == "cuda"
    dtype = torch.bfloat16 if real else torch.float32
    if not real:
        config, vae_dim = replace(config, name=f"{config.name}, reduced", **REDUCED), 4
    model = random_model(config, dtype=dtype, device=device, vae_dim=vae_dim)
    latents = torch.randn(1, config.chunk, config.out_channels, *config.latent_size(), device=device, dtype=dtype)
    assert isinstance(model.codec, WanCodec)  # what is measured is Wan's shape, with Wan's codec
    shown = codec_work(model.codec, latents)
    del latents
    if real:
        torch.backends.cudnn.benchmark = True
        compiled(model.transformer)
        fused(model.codec)
    text = model.transformer.read(model.encode_text([PROMPT]))
    limits = ceilings(device, dtype)
    rows, processor, size = {}, machine()["processor"], f"{config.size[1]}×{config.size[0]}"
    for memory in memories:
        say(f"video: {memory}")
        spec = memory.replace("STATIC", repr(((*range(config.heads // 2),),) * config.layers))
        rows[memory] = _measured(model, spec, text, shown, limits, device, chunks, say)
    return {
        "title": f"Video, {config.name}, {size}, {len(config.steps)} steps, chunks of {config.chunk}",
        "device": torch.cuda.get_device_name() if real else f"not measured on a GPU here, but on {processor}",
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.transformer.parameters()),
        "teraflops": limits["flops"] / 1e12,
        "gigabytes a second": limits["bytes"] / 1e9,
        "memories": rows,
    }  # fmt: skip


def _measured(
    model: VideoModel, memory: str, text: Text, shown: Work, limits: Mapping[str, float], device: str, chunks: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    config, loop = model.config, Loop(model, memory, text)
    loop.fill()
    loop.chunk(Clock(device))  # compiles, and finds its kernels
    clock = Clock(device)
    clock.mark()
    for _ in range(chunks):
        loop.chunk(clock)
    seconds, steps = clock.seconds(), len(config.steps)
    each = [seconds[start : start + steps + 2] for start in range(0, len(seconds), steps + 2)]
    took = {
        DENOISING: median(one for chunk in each for one in chunk[:steps]),
        CLEAN: median(chunk[-1] for chunk in each),
        DECODING: median(chunk[steps] for chunk in each),
        PARTS: median(map(sum, each)),
    }
    keys = loop.keys()
    a_pass = network_work(model.transformer, config.chunk, loop.latent, keys)
    floor = {DENOISING: a_pass.floor(limits), DECODING: shown.floor(limits)}
    floor |= {CLEAN: floor[DENOISING], PARTS: (steps + 1) * floor[DENOISING] + floor[DECODING]}
    say("  " + ", ".join(f"{what} {1e3 * one:.1f} ms (floor {1e3 * floor[what]:.1f})" for what, one in took.items()))
    stream = VideoStream(model, PROMPT, memory=memory)
    for _ in range(loop.state.position // loop.m + 2):  # as long as it takes to fill the window, and once more
        stream.step()
    start = perf_counter()
    for _ in range(chunks):
        made = stream.step()
    took[STREAM], floor[STREAM] = (perf_counter() - start) / chunks, floor[PARTS]
    frames = len(made.frames)
    say(f"  {frames / took[PARTS]:.1f} frames/s by parts, {frames / took[STREAM]:.1f} in a stream")
    return {
        "milliseconds": {what: 1e3 * one for what, one in took.items()},
        "floor, milliseconds": {what: 1e3 * floor[what] for what in took},
        "frames a chunk": frames,
        "frames a second": {what: frames / took[what] for what in (PARTS, STREAM)},
        "frames a second at the floor": frames / floor[PARTS],
        "keys a token attends": keys,
        "bytes of the memory": loop.state.nbytes,
        "teraflop a chunk": ((steps + 1) * a_pass.flops + shown.flops) / 1e12,
    }
