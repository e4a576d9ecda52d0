"""StreamingLLM without a trained model: what its definition promises of any weights (arXiv 2309.17453, section 3.2)."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..api import open as open_stream
from ..memory import MemoryState
from ..models import Stream
from ..recipes import recipe
from .definition import attended, definition, turned
from .registry import Bench, claim

SINK, WINDOW, LAYERS = 4, 28, 2
CUTS = (1, 7, WINDOW, 100)
Inputs = tuple[Tensor, Tensor, Tensor]


def small_llama() -> LlamaForCausalLM:
    """A Llama with random weights: 2 layers of width 64, 4 heads, 2 key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def raw_key_cache(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int) -> Tensor:
    """The definition for one layer, [H, N, D]: every query over the raw keys that are held then, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for i in range(q.shape[1]):
        kept = [j for j in range(i + 1) if j < sink or i - j <= window]
        outputs.append(attended(q[:, i : i + 1], k[:, kept], v[:, kept]))
    return torch.cat(outputs, 1)


def turned_again(q: Tensor, k: Tensor, v: Tensor, sink: int, window: int) -> Tensor:
    """The other placement: keys are kept rotated, and turned down by one position whenever a token leaves.

    The rotations are made and kept in the dtype of `k`; scores are summed in float64, so that only the keys err.
    """
    groups, outputs = q.shape[0] // k.shape[0], []
    cache, values = k[:, :0], v[:, :0]
    for i in range(q.shape[1]):
        place = torch.tensor([cache.shape[1]])
        cache = torch.cat([cache, turned(k[:, i : i + 1], place)], 1)
        values = torch.cat([values, v[:, i : i + 1]], 1)
        query = turned(q[:, i : i + 1].double(), place)
        scores = query @ cache.double().repeat_interleave(groups, 0).transpose(-1, -2) / q.shape[-1] ** 0.5
        outputs.append(torch.softmax(scores, -1) @ values.double().repeat_interleave(groups, 0))
        if cache.shape[1] > sink + window:
            down = torch.full((window,), -1)
            cache = torch.cat([cache[:, :sink], turned(cache[:, sink + 1 :], down)], 1)
            values = torch.cat([values[:, :sink], values[:, sink + 1 :]], 1)
    return torch.cat(outputs, 1)


def drive(state: MemoryState, inputs: Inputs, cut: int) -> Tensor:
    """A memory of one layer reads `inputs` [H, N, D], `cut` at a time; what it gives, [H, N, D]."""
    outputs = []
    for first in range(0, inputs[0].shape[1], cut):
        q, k, v = (t[None, :, first : first + cut] for t in inputs)
        with state.step(q.shape[2]):
            outputs.append(state.attend(0, q, k, v)[0])
    return torch.cat(outputs, 1)


def random_inputs(length: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """q with 4 heads, k and v with 2, of 16 channels."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, length, 16, generator=made, dtype=torch.float64).to(dtype) for h in (4, 2, 2))
    return q, k, v


def built(dtype: torch.dtype, window: int = WINDOW) -> MemoryState:
    """The memory of such inputs."""
    memory = recipe("streaming-llm", sink=SINK, window=window)
    return memory.build(layers=1, heads=4, kv_heads=2, head_dim=16, dtype=dtype)


def pieces(stream: Stream, ids: Tensor, cut: int) -> Tensor:
    """Logits [T, V] of `ids` [T], fed `cut` at a time."""
    return torch.cat([stream.feed(piece)[0] for piece in ids.split(cut)])


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of `other`."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@claim("streaming-llm")
def streaming_llm(bench: Bench) -> None:
    """StreamingLLM is exact: equal to full attention until the cache is full, then to its definition, in any cut."""
    spec = f"streaming-llm(sink={SINK}, window={WINDOW})"
    model = small_llama()
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        dense = model(ids[None, : SINK + WINDOW + 1], use_cache=False).logits[0]
    error = gap(pieces(open_stream(model, spec), ids[: SINK + WINDOW + 1], 7), dense)
    bench.row(
        "1. a model's logits before the first eviction = full attention's", "equal", f"{error:.1e}", error <= 1e-5
    )

    _in_any_cut(bench, model, spec, ids)
    _placements(bench)
    _anywhere(bench, model, spec, ids)
    _bounded(bench, model, spec)

    scores = torch.randn(1000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 4
    kept, dropped = torch.softmax(scores, 1)[:, 1:], torch.softmax(scores[:, 1:], 1)
    factor = scores.exp().sum(1, keepdim=True) / scores[:, 1:].exp().sum(1, keepdim=True)
    error = gap(dropped / (kept * factor), torch.ones_like(dropped))
    bench.row("7. dropping key 0 multiplies every other weight by Z/Z'", "identity", f"{error:.1e}", error < 1e-9)

    _forgets(bench, model, spec, ids)


def _in_any_cut(bench: Bench, model: LlamaForCausalLM, spec: str, ids: Tensor) -> None:
    expected = definition(model, ids, SINK, WINDOW)
    for cut in CUTS:
        error = gap(pieces(open_stream(model, spec), ids, cut), expected)
        bench.row(f"2. a model's logits, fed {cut} at a time = definition", "equal", f"{error:.1e}", error <= 1e-5)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        inputs = random_inputs(200, dtype)
        expected = raw_key_cache(*inputs, SINK, WINDOW)
        error = max(gap(drive(built(dtype), inputs, cut), expected) for cut in CUTS)
        what = f"2. attention in {str(dtype).removeprefix('torch.')}, worst of {', '.join(map(str, CUTS))} at a time"
        bench.row(what, "equal", f"{error:.1e}", error <= limit)


def _placements(bench: Bench) -> None:
    steps = 10_000 if bench.full else 2000
    inputs = random_inputs(steps, torch.float32)
    expected = raw_key_cache(*inputs, SINK, WINDOW)
    error = gap(drive(built(torch.float32), inputs, 1), expected)
    bench.row(f"3. after {steps:,} steps, only sinks turn (ours) = raw keys", "equal", f"{error:.1e}", error <= 1e-4)
    error = gap(turned_again(*inputs, SINK, WINDOW), expected)
    bench.row(f"3. after {steps:,} steps, keys turned at evictions = raw keys", "equal", f"{error:.1e}", error <= 1e-4)

    half, window = random_inputs(1200, torch.bfloat16), 200
    expected = raw_key_cache(*half, SINK, window)[:, 600:]
    ours = (drive(built(torch.bfloat16, window), half, 1).double()[:, 600:] - expected).abs().mean()
    drift = (turned_again(*half, SINK, window)[:, 600:] - expected).abs().mean()
    bench.row(
        "3. bfloat16, window 200: mean error of ours / of keys turned again and again", "–",
        f"{float(ours):.1e} / {float(drift):.1e}", bool(ours < drift), "why no key of ours is rotated twice",
    )  # fmt: skip


def _anywhere(bench: Bench, model: LlamaForCausalLM, spec: str, ids: Tensor) -> None:
    small = open_stream(model, "streaming-llm(sink=4, window=3)")
    small.feed(ids[:9])
    assert small.state is not None
    held = small.state.held(0)
    bench.row(
        "4. held when token 9 is read, 4 sinks + 3", "[0, 1, 2, 3, 6, 7, 8]", str(held), held == [0, 1, 2, 3, 6, 7, 8]
    )

    far, more = open_stream(model, spec), ids[100:]
    far.feed(ids[:100])
    assert far.state is not None
    far.state.seek(10**9)
    error = gap(pieces(far, more, 1), definition(model, ids, SINK, WINDOW)[100:])
    bench.row(
        "4. a model's logits at stream position 1,000,000,000 = definition", "equal", f"{error:.1e}", error <= 1e-5
    )


def _bounded(bench: Bench, model: LlamaForCausalLM, spec: str) -> None:
    made = torch.Generator().manual_seed(2)
    young = open_stream(model, spec)
    young.consume(torch.randint(0, 256, (2000,), generator=made))
    old = young.fork()
    old.consume(torch.randint(0, 256, (48_000,), generator=made))
    bench.row(
        "5. bytes held after 50,000 tokens over those after 2,000", "1", f"{old.nbytes / young.nbytes:.3f}",
        old.nbytes == young.nbytes,
    )  # fmt: skip
    ratios = []
    for token in torch.randint(0, 256, (1000,), generator=made).split(1):
        seconds = []
        for stream in (young, old):  # in turns, so that a machine that slows down slows both
            start = time.perf_counter()
            stream.feed(token)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    ratio = median(ratios)
    bench.row("5. time of tokens 50,000 to 51,000 over 2,000 to 3,000", "1", f"{ratio:.3f}", abs(ratio - 1) < 0.1)


def _forgets(bench: Bench, model: LlamaForCausalLM, spec: str, ids: Tensor) -> None:
    place = 60
    changed = ids.clone()
    changed[place] = (changed[place] + 1) % 256
    one, two = pieces(open_stream(model, spec), ids, 1), pieces(open_stream(model, spec), changed, 1)
    reach = place + LAYERS * WINDOW
    same = (one == two).all(1)
    gone = bool(same[reach + 1 :].all()) and not bool(same[reach])
    bench.row(
        f"9. another token changes no bit {LAYERS} layers × {WINDOW} later (and does until then)",
        "exact",
        str(gone),
        gone,
    )
    bench.row("10. nor of anything before it", "exact", str(bool(same[:place].all())), bool(same[:place].all()))
    alone, copied = open_stream(model, spec), open_stream(model, spec)
    for stream in (alone, copied):
        stream.feed(ids[:100])
    copied.fork().feed(changed[:50])
    kept = torch.equal(pieces(copied, ids[100:], 1), pieces(alone, ids[100:], 1))
    bench.row("10. a copy that goes its own way leaves the stream as it was", "exact", str(kept), kept)
