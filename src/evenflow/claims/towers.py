"""Real classes beyond plain decoders: text towers on three axes, and hybrids with gated delta layers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..models import Stream, open_stream
from ..models.axes import grid_places
from ..recipes import recipe
from .choosing import in_turns, ratio
from .exactness import gap
from .registry import Bench, claim

VOCABULARY, HIDDEN = 128, 64
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1 << 17,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
SEES: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 2},
    "Qwen2_5_VL": {"hidden_size": 16, "out_hidden_size": HIDDEN, "intermediate_size": 32, "fullatt_block_indexes": [0]},
    "Qwen3VL": {
        "hidden_size": 16, "out_hidden_size": HIDDEN, "intermediate_size": 32, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    },
}  # fmt: skip
MATRICES: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
GRID = (1, 16, 16)  # patches of a frame: 64 tokens
FRAME, WINDOW = 64, 1020


def tower(name: str) -> PreTrainedModel:
    """A random `{name}ForConditionalGeneration`."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [4, 2, 2] if name == "Qwen3VL" else [2, 3, 3],
    }
    sees = {"depth": 1, "num_heads": 2, "patch_size": 4} | SEES[name]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | {"rope_parameters": rope}, vision_config=sees)
    model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    return model


def hybrid(name: str) -> PreTrainedModel:
    """A random `{name}ForCausalLM`, every other layer a gated delta layer."""
    torch.manual_seed(0)
    own: dict[str, Any] = {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32
    }  # fmt: skip
    if name == "Qwen3_5":
        rope = {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
        own = {"rope_parameters": rope}
    kind = f"{name}TextConfig" if name == "Qwen3_5" else f"{name}Config"
    config = getattr(transformers, kind)(**TEXT | MATRICES | own)
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model


def ids_of(count: int, seed: int = 0) -> Tensor:
    """Random ids [1, count]."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def scene(count: int) -> Tensor:
    """Coordinates [count, 3] of five words, then pictures of 24 tokens with four words behind each."""
    places = torch.arange(5)[:, None].expand(-1, 3)
    while len(places) < count:
        picture = grid_places(int(places.max()) + 1, (1, 8, 12))
        words = (torch.arange(4) + int(picture.max()) + 1)[:, None].expand(-1, 3)
        places = torch.cat([places, picture, words])
    return places[:count]


def fed(stream: Stream, ids: Tensor, places: Tensor | None, cut: int) -> Tensor:
    """Logits [1, T, V], fed `cut` at a time."""
    parts = []
    for first in range(0, ids.shape[1], cut):
        part = slice(first, first + cut)
        parts.append(stream.feed(ids[:, part], tags=None if places is None else {"coordinates": places[part]}))
    return torch.cat(parts, 1)


@claim("towers")
def towers(bench: Bench) -> None:
    """Qwen-VL's towers and hybrids with matrix layers stream through memories: equal to their own forward, flat, undone exactly."""
    for name in SEES:
        _axes(bench, name)
    _frames(bench)
    for name in ("Qwen3Next", "Qwen3_5"):
        _matrices(bench, name)


def _axes(bench: Bench, name: str) -> None:
    model, ids, places = tower(name), ids_of(120), scene(120)
    with torch.no_grad():
        words = model(input_ids=ids).logits
        seen = model(input_ids=ids, position_ids=places.T[:, None]).logits
    error = max(gap(fed(open_stream(model, recipe("full")), ids, None, cut), words) for cut in (1, 7, 120))
    bench.row(f"{name}: words, fed 1, 7, 120 at a time = its own forward", "equal", f"{error:.1e}", error <= 2e-5)
    error = max(gap(fed(open_stream(model, recipe("full")), ids, places, cut), seen) for cut in (1, 7, 120))
    bench.row(f"{name}: pictures at (t, h, w) = its own forward", "equal", f"{error:.1e}", error <= 2e-5)
    small = recipe("streaming-llm", sink=4, window=28)
    one = fed(open_stream(model, small), ids, places, 1)
    error = max(gap(fed(open_stream(model, small), ids, places, cut), one) for cut in (7, 28, 120))
    apart = gap(one, seen)
    bench.row(
        f"{name}: 4 sinks + 28, pictures leave: any cut = one by one", "equal", f"{error:.1e}",
        error <= 2e-5 < 1e-3 < apart, f"full attention differs by {apart:.1g}",
    )  # fmt: skip


class Growing:
    """A model with its own growing cache, that reads features at their places, a frame at a time or what there is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.free = model, 0
        self.cache = DynamicCache(config=model.config)
        known = inspect.signature(model.forward).parameters
        self.kept = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.name = "cache" if "cache" in known else "past_key_values"

    def watch(self, frame: Tensor) -> None:
        """Features [64, hidden] of a frame, behind what came before."""
        places = grid_places(self.free, GRID)
        self.free = int(places.max()) + 1
        self.read(frame, places)

    @torch.inference_mode()
    def read(self, rows: Tensor, places: Tensor) -> None:
        """Features [n, hidden] at places [n, 3]."""
        inputs = {"inputs_embeds": rows[None], "position_ids": places.T[:, None], self.name: self.cache}
        self.model(**inputs, **self.kept, use_cache=True)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        layers: list[Any] = self.cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _frames(bench: Bench) -> None:
    late = 1200 if bench.full else 300
    model, made = tower("Qwen2_5_VL"), torch.Generator().manual_seed(1)
    frames = torch.randn(16, FRAME, HIDDEN, generator=made)
    memory = recipe("streaming-llm", sink=4, window=WINDOW)

    def watch(stream: Stream, number: int) -> None:
        stream.feed(embeds=frames[number % 16], tags={"coordinates": grid_places(int(stream.next_place), GRID)})

    ours, own = [open_stream(model, memory) for _ in range(2)], [Growing(model) for _ in range(2)]
    for stream, cache, age in zip(ours, own, (20, late), strict=True):
        for number in range(age):
            watch(stream, number)
            cache.watch(frames[number % 16])
    held = ours[1].nbytes / ours[0].nbytes
    bench.row(f"bytes after {late} frames over 20: `streaming-llm`", "1", f"{held:.2f}", held == 1)
    grown = own[1].nbytes / own[0].nbytes
    bench.row("the same, transformers' DynamicCache", "grows", f"{grown:.1f}", grown > 2)
    seconds = in_turns(
        {
            "young": partial(watch, ours[0], 0), "old": partial(watch, ours[1], 0),
            "own young": partial(own[0].watch, frames[0]), "own old": partial(own[1].watch, frames[0]),
        },
        30 if bench.full else 15,
    )  # fmt: skip
    slower, theirs = ratio(seconds, "old", "young"), ratio(seconds, "own old", "own young")
    bench.row(f"time of a frame after {late} over 20: `streaming-llm`", "1", f"{slower:.2f}", slower < 1.15)
    bench.row("the same, transformers' DynamicCache", "grows", f"{theirs:.1f}", theirs > 1.5)
    against = ratio(seconds, "own old", "old")
    bench.row(f"time of frame {late}, DynamicCache's over ours", "–", f"{against:.1f}", against > 1)


def _matrices(bench: Bench, name: str) -> None:
    model, ids = hybrid(name), ids_of(150)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    error = max(gap(fed(open_stream(model, recipe("full")), ids, None, cut), want) for cut in (1, 7, 150))
    note = "the class's chunked and single-token forms, both float32, differ by as much"
    bench.row(f"{name}: fed 1, 7, 150 at a time = its own forward", "equal", f"{error:.1e}", error <= 2e-4, note)

    undo = 16
    kept = recipe("streaming-llm", sink=4, window=WINDOW)
    stream, never = (open_stream(model, kept, undo=undo) for _ in range(2))
    for token in ids[:, :100].split(1, 1):
        stream.feed(token)
    for token in ids[:, : 100 - undo].split(1, 1):
        never.feed(token)
    stream.truncate(undo)
    same = torch.equal(stream.feed(ids[:, 100:]), never.feed(ids[:, 100:]))
    bench.row(f"{name}: {undo} tokens undone = they never came, bit for bit", "exact", str(same), same)
    asked = stream.fork()
    answer = stream.feed(ids[:, :9], commit=False)
    same = torch.equal(answer, asked.feed(ids[:, :9])) and torch.equal(
        stream.feed(ids[:, 9:20]), never.feed(ids[:, 9:20])
    )
    bench.row(f"{name}: a question that is not committed leaves no trace", "exact", str(same), same)

    small = open_stream(model, recipe("streaming-llm", sink=4, window=60), undo=undo)
    held = []
    for token in ids_of(4000 if bench.full else 800, 1).split(1, 1):
        small.feed(token)
        held.append(small.nbytes)
    grown = max(held[-200:]) / max(held[200:400])
    bench.row(f"{name}: bytes after {len(held)} tokens over 400, keys and matrices", "1", f"{grown:.3f}", grown == 1)
