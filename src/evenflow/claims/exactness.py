"""StreamingLLM without a trained model: what its definition promises of any weights (arXiv 2309.17453, section 3.2)."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..api import open as open_stream
from ..memory import Memory, MemoryState, Rope
from ..memory.rope import Rotary
from ..recipes import recipe
from .registry import Bench, claim

SINK, WINDOW = 4, 28
Inputs = tuple[Tensor, Tensor, Tensor]


def small_llama() -> LlamaForCausalLM:
    """A Llama with random weights: 2 layers of width 64, 4 heads, 2 key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def raw_key_cache(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int) -> Tensor:
    """The definition, step by step in float64: raw keys, the whole cache rotated at its own indices for every token."""
    rotary = Rotary(Rope(), q.shape[-1], torch.float64, q.device)
    q, k, v = q.double(), k.double(), v.double()
    groups, outputs = q.shape[1] // k.shape[1], []
    for i in range(q.shape[2]):
        kept = [j for j in range(i + 1) if j < sink or i - j <= window]
        cos, sin = rotary.span(0, len(kept))
        keys = rotary.rotate(k[:, :, kept], cos, sin).repeat_interleave(groups, 1)
        query = rotary.rotate(q[:, :, i : i + 1], cos[-1:], sin[-1:])
        weights = torch.softmax(query @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        outputs.append(weights @ v[:, :, kept].repeat_interleave(groups, 1))
    return torch.cat(outputs, 2)


def delta_rotated_cache(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int, dtype: torch.dtype) -> Tensor:
    """Placement by turning every window key down one position whenever a token leaves, kept in `dtype`."""
    rotary = Rotary(Rope(), q.shape[-1], torch.float64, q.device)
    cos, sin = (t.to(dtype) for t in rotary.span(0, sink + window + 2))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    groups, cache, values, outputs = q.shape[1] // k.shape[1], k[:, :, :0], v[:, :, :0], []
    for i in range(q.shape[2]):
        place = cache.shape[2]
        cache = torch.cat([cache, rotary.rotate(k[:, :, i : i + 1], cos[place], sin[place])], 2)
        values = torch.cat([values, v[:, :, i : i + 1]], 2)
        query = rotary.rotate(q[:, :, i : i + 1], cos[place], sin[place]).double()
        scores = query @ cache.repeat_interleave(groups, 1).double().transpose(-1, -2) / q.shape[-1] ** 0.5
        outputs.append(torch.softmax(scores, -1) @ values.repeat_interleave(groups, 1).double())
        if cache.shape[2] > sink + window:
            moved = rotary.rotate(cache[:, :, sink + 1 :], cos[1], -sin[1])
            cache = torch.cat([cache[:, :, :sink], moved], 2)
            values = torch.cat([values[:, :, :sink], values[:, :, sink + 1 :]], 2)
    return torch.cat(outputs, 2)


def drive(state: MemoryState, inputs: Inputs, cut: int) -> Tensor:
    """Every layer gets the same inputs [1, H, N, D], `cut` at a time; what the last layer gives."""
    outputs = []
    for first in range(0, inputs[0].shape[2], cut):
        q, k, v = (t[:, :, first : first + cut] for t in inputs)
        with state.step(q.shape[2]):
            outputs.append([state.attend(layer, q, k, v) for layer in range(state.geometry.layers)][-1])
    return torch.cat(outputs, 2)


def random_inputs(length: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """q with 4 heads, k and v with 2, of 16 channels."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, length, 16, generator=made, dtype=torch.float64).to(dtype) for h in (4, 2, 2))
    return q, k, v


def built(dtype: torch.dtype, sink: int = SINK, window: int = WINDOW, layers: int = 1) -> MemoryState:
    """The memory of such inputs."""
    memory = recipe("streaming-llm", sink=sink, window=window)
    return memory.build(layers=layers, heads=4, kv_heads=2, head_dim=16, dtype=dtype)


@claim("streaming-llm")
def streaming_llm(bench: Bench) -> None:
    """StreamingLLM is exact: equal to full attention until the cache is full, then to its definition, in any cut."""
    spec = f"streaming-llm(sink={SINK}, window={WINDOW})"
    model = small_llama()
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        dense = model(ids[:, : SINK + WINDOW + 1], use_cache=False).logits
    ours = open_stream(model, spec).feed(ids[:, : SINK + WINDOW + 1])
    gap = float((ours - dense).abs().max() / dense.abs().max())
    bench.row("1. equal to full attention before the first eviction", "equal", f"{gap:.1e} relative", gap <= 1e-5)

    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        inputs = random_inputs(200, dtype)
        definition = raw_key_cache(*inputs, SINK, WINDOW)
        for cut in (1, 7, WINDOW, 100):
            gap = float((drive(built(dtype), inputs, cut).double() - definition).abs().max())
            what = f"2. {cut} tokens at a time = the step-by-step definition, {str(dtype).removeprefix('torch.')}"
            bench.row(what, "equal", f"{gap:.1e}", gap <= limit)

    steps = 10_000 if bench.full else 2000
    inputs = random_inputs(steps, torch.float32)
    definition = raw_key_cache(*inputs, SINK, WINDOW)
    ours = drive(built(torch.float32), inputs, 1).double()
    gap = float((ours - definition).abs().max())
    bench.row(f"3. after {steps:,} steps: ours (sinks trail the window)", "equal", f"{gap:.1e}", gap <= 1e-4)
    delta = delta_rotated_cache(*inputs, SINK, WINDOW, torch.float32)
    gap = float((delta - definition).abs().max())
    bench.row(f"3. after {steps:,} steps: keys turned at every eviction", "equal", f"{gap:.1e}", gap <= 1e-4)

    half = random_inputs(1200, torch.bfloat16)
    definition = raw_key_cache(*half, SINK, 200)
    ours = (drive(built(torch.bfloat16, window=200), half, 1).double() - definition)[:, :, 600:]
    drift = (delta_rotated_cache(*half, SINK, 200, torch.bfloat16) - definition)[:, :, 600:]
    error, other = float(ours.abs().mean()), float(drift.abs().mean())
    bench.row(
        "3. bfloat16, window 200: mean error of ours, of keys turned again and again", "rounding adds up",
        f"{error:.1e}, {other:.1e}", error < 0.2 * other,
    )  # fmt: skip

    near = built(torch.float32)
    drive(near, random_inputs(100, torch.float32), 100)
    far = near.fork()
    far.seek(10**9)
    more = random_inputs(100, torch.float32, seed=2)
    gap = float((drive(near, more, 1) - drive(far, more, 1)).abs().max())
    bench.row("4. at stream position 1,000,000,000 as at 100", "positions stay in the cache", f"{gap:.1e}", gap <= 1e-5)

    state = Memory(sink=SINK, window=252).build(layers=2, heads=4, kv_heads=2, head_dim=16)
    block, held = random_inputs(1000, torch.float32), state.nbytes
    for _ in range(2):
        drive(state, block, 1000)
    young = state.fork()
    while state.position < 50_000:
        drive(state, block, 1000)
    pairs = [
        (_seconds(state, block), _seconds(young, block)) for _ in range(7)
    ]  # in turn: what disturbs, disturbs both
    late, early = (min(times) for times in zip(*pairs, strict=True))
    bench.row(
        "5. bytes after 50,000 tokens over bytes at first", "1", f"{state.nbytes / held:.3f}", state.nbytes == held
    )
    bench.row("5. time of a token at 50k over at 2k", "1", f"{late / early:.2f}", late < 1.1 * early)

    row = torch.randn(1000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4
    kept, dropped = torch.softmax(row, 1)[:, 1:], torch.softmax(row[:, 1:], 1)
    factor = row.exp().sum(1, keepdim=True) / row[:, 1:].exp().sum(1, keepdim=True)
    gap = float((dropped / (kept * factor) - 1).abs().max())
    bench.row("7. dropping key 0 multiplies every other weight by Z/Z'", "identity", f"{gap:.1e} relative", gap < 1e-9)

    q, k, v = random_inputs(200, torch.float64)
    changed = q.clone(), k.clone(), v.clone()
    for tensor in changed:
        tensor[:, :, 100] += 1
    one, two = drive(built(torch.float64), (q, k, v), 1), drive(built(torch.float64), changed, 1)
    unchanged = torch.equal(one[:, :, 101 + WINDOW :], two[:, :, 101 + WINDOW :])
    bench.row("9. a changed token changes no bit once it has left", "exact", str(unchanged), unchanged)
    before = torch.equal(one[:, :, :100], two[:, :, :100])
    bench.row("10. nor of anything before it", "exact", str(before), before)


def _seconds(state: MemoryState, block: Inputs) -> float:
    q, k, v = (t[:, :, :300] for t in block)
    start = time.perf_counter()
    drive(state, (q, k, v), 1)
    return time.perf_counter() - start
