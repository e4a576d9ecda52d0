"""What sinks do in models that were trained here, small enough to train in a minute (arXiv 2309.17453, sections 3.1-3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ..learn import backcopy
from ..memory import Memory
from ..models import open_stream
from ..recipes import parse
from .registry import Bench, claim
from .texts import perplexity

CACHE = 40
ROWS = 16  # independent streams, read side by side


def streaming(sink: int) -> Memory:
    """`sink` sinks and a window, 40 tokens in all."""
    return parse(f"streaming-llm(sink={sink}, window={CACHE - sink})")


def nats(model: LlamaForCausalLM, memory: Memory, ids: Tensor) -> Tensor:
    """Surprisal [B, T] of `ids` through `memory`."""
    return open_stream(model, memory).surprisal(ids)


def share_of_first(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Attention that the first token gets from all after it, in the layer and head that gives it most."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(implementation)
    return max(float(weights[:, :, 8:, 0].mean((0, 2)).max()) for weights in layers)


@claim("streaming-llm-trained")
def trained(bench: Bench) -> None:
    """A model that has grown a sink fails in the moment it loses it, and one kept token brings it back."""
    sinks(bench, *backcopy.train(progress=bench.trained), 4000 if bench.full else 1000)


def sinks(bench: Bench, model: LlamaForCausalLM, task: backcopy.BackCopy, length: int) -> None:
    """What the eviction of the first token does to a model, in streams of `length` tokens of its task."""
    ids = torch.stack([task.stream(length, seed=10_000 + row) for row in range(ROWS)])
    share = share_of_first(model, ids[:, :64])
    bench.row(
        "8. share of attention on the first token, most sunk head", "> 0.5 in most layers", f"{share:.2f}", share > 0.5
    )

    after = slice(CACHE + 2, None)
    found = {sink: nats(model, streaming(sink), ids) for sink in (0, 1, 2, 4)}
    value = {sink: perplexity(read[:, after]) for sink, read in found.items()}
    before = perplexity(found[0][:, 8 : CACHE + 1])
    printed = {0: "1235", 1: "18.01", 2: "18.01", 4: "18.02"}
    for sink, paper in printed.items():
        bench.row(f"8. {sink} + {CACHE - sink}", f"{paper} (160M with sink token)", f"{value[sink]:.2f}")
    bench.row(
        "8. window alone over one sink", "1235 / 18.01", f"×{value[0] / value[1]:.2f}", value[0] > 1.05 * value[1]
    )
    bench.row("8. one sink over before any eviction", "about 1", f"×{value[1] / before:.3f}", value[1] < 1.05 * before)
    places = range(CACHE - 20, CACHE + 40)
    for name, sink in (("window", 0), ("streaming-llm", 1)):
        at = "perplexity around the first eviction over tokens read"
        bench.figures[f"{at}|x|{name}"] = [float(n) for n in places]
        bench.figures[f"{at}|y|{name}"] = [perplexity(found[sink][:, n]) for n in places]
