"""What a door before a memory promises: dropped tokens are never paid for, silence is free, and it goes with any memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..memory.admission import Door, Novelty, OneToken, TokenDrop
from ..models import open_stream, unfit
from ..recipes import recipe, recipes
from ..watch import Watching
from .choosing import in_turns, off, random, ratio
from .registry import Bench, claim

TOKENS, HIDDEN, VOCABULARY, SILENT = 64, 384, 512, 7
BOUNDED = "streaming-llm(sink=64, window=1984)"


@claim("watching")
def watching(bench: Bench) -> None:
    """Frames that repeat cost nothing, a gate decides after each, and both work before any memory that reads features."""
    model = network()
    before_any(bench, model)
    spoken(bench, model)
    speed(bench, model)
    flat(bench, model, 3000 if bench.full else 600)


def network(layers: int = 6) -> PreTrainedModel:
    """A random Llama: with six layers, a frame of 64 tokens takes it milliseconds, as one of 3,584 wide takes a GPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1 << 17, initializer_range=0.1,
    )  # fmt: skip
    model: PreTrainedModel = transformers.LlamaForCausalLM(config).eval()
    return model


def film(count: int, change: float, cut: int | None = None, seed: int = 0) -> Iterator[Tensor]:
    """Frames [TOKENS, HIDDEN]: a scene of which `change` of the tokens are new in every frame, another one every `cut`."""
    made = random(seed, "film")
    scene = torch.randn(TOKENS, HIDDEN, generator=made)
    for n in range(count):
        if n and cut and n % cut == 0:
            scene = torch.randn(TOKENS, HIDDEN, generator=made)
        elif n:
            scene = scene.clone()
            new = torch.rand(TOKENS, generator=made).argsort()[: round(change * TOKENS)]
            scene[new] = torch.randn(len(new), HIDDEN, generator=made)
        yield scene


def door(**how: Any) -> Door:
    """Drops what repeats what was last let in at its place."""
    return Door(lets=TokenDrop(0.9, reference="last_kept"), **how)


def before_any(bench: Bench, model: PreTrainedModel) -> None:
    """Every recipe that reads a text, behind a door, beside the same memory fed by hand with what gets in."""
    frames, worst, names, refused = torch.stack([*film(12, 0.2)]), 0.0, [], []
    keeps = door().lets.step(frames, None)[0].keep
    for info in recipes("memory"):
        memory = recipe(info.name)
        if unfit(memory) is not None or memory.null == "learned":
            continue
        needs = {tag for verb in memory.verbs() for tag in getattr(memory, verb).needs}
        try:
            seen = Watching(open_stream(model, memory, batch=1), door())
            [*seen.see(frames)]
        except ValueError:
            refused.append(info.name)
            continue
        plain = open_stream(model, memory, batch=1)
        for frame, keep in zip(frames, keeps, strict=True):
            tags = {tag: torch.ones(int(keep.sum()), dtype=torch.int64) for tag in needs}
            if keep.any():
                plain.feed(embeds=frame[keep], tags=tags or None)
        worst = max(worst, off(seen.stream.last_logits, plain.last_logits))
        names.append(info.name)
    bench.row(
        f"recipes that read a text, with a door before: error over the same fed by hand, {len(names)} of them", "0",
        f"{worst:.0e}", worst == 0, f"not {', '.join(refused)}, which read ids again and take no features",
    )  # fmt: skip


def spoken(bench: Bench, model: PreTrainedModel, count: int = 120, cut: int = 20) -> None:
    """A gate on novelty, and one on the model's next token."""
    frames = torch.stack([*film(count, 0.05, cut)])
    seen = [*Watching(open_stream(model, recipe("full"), batch=1), door(speaks=Novelty(0.4))).see(frames)]
    cuts, told = {*range(0, count, cut)}, {one.number for one in seen if one.speak}
    bench.row(
        f"cuts that novelty speaks at, of {len(cuts)}; other frames, of {count - len(cuts)}", "all; none",
        f"{len(told & cuts)}; {len(told - cuts)}", told == cuts, "5 % of tokens change in every other frame",
    )  # fmt: skip
    still = frames[:1].expand(30, -1, -1)
    stream = open_stream(model, recipe("full"), batch=1)
    quiet = [*Watching(stream, door(speaks=OneToken(SILENT, threshold=0.0))).see(still)]
    bench.row(
        "tokens in the memory after 30 equal frames of 64, a gate that asks the model", "64: silence is never written",
        f"{stream.position}", stream.position == TOKENS, f"spoke after {sum(one.speak for one in quiet)}",
    )  # fmt: skip


def speed(bench: Bench, model: PreTrainedModel, count: int = 40) -> None:
    """A recording read behind a door that drops 81 %, and whole; then what a frame costs that does not get in."""
    frames = torch.stack([*film(count + 1, 0.19)])
    memory, gate = recipe("full"), OneToken(SILENT)

    def through(one: Door) -> float:
        seen = [*Watching(open_stream(model, memory, batch=1), one).see(frames)]
        return 1 - sum(s.kept for s in seen[1:]) / (count * TOKENS)

    dropped = through(door(speaks=gate))
    calls = {"whole": partial(through, Door(speaks=gate)), "dropped": partial(through, door(speaks=gate))}
    times = ratio(took := in_turns(calls, 7), "whole", "dropped")
    bench.row(
        f"a film read whole over one of which {100 * dropped:.0f} % is dropped", "1.76 at 81 %", f"×{times:.2f}", times > 1.5,
        f"{1e3 * median(took['whole']) / count:.1f} and {1e3 * median(took['dropped']) / count:.1f} ms a frame of {TOKENS} tokens; "
        "as many fewer tokens would be ×5.3",
    )  # fmt: skip
    seen, still = Watching(open_stream(model, memory, batch=1), door(speaks=gate)), frames[:1]
    whole = open_stream(model, memory, batch=1)
    [*seen.see(still)]
    took = in_turns(
        {"door": lambda: [*seen.see(still)], "feed": lambda: whole.feed(embeds=frames[0], commit=False)}, 51
    )
    share = ratio(took, "door", "feed")
    bench.row(
        "a frame that does not get in over one that is read", "–", f"{100 * share:.1f} %", share < 0.1,
        f"{1e6 * median(took['door']):.0f} µs, {1e6 * median(took['door']) / TOKENS:.1f} a token",
    )  # fmt: skip


def flat(bench: Bench, model: PreTrainedModel, count: int) -> None:
    """Bytes and time of a frame, late and early, of streams played in turn."""
    seen = Watching(
        open_stream(model, recipe("streaming-llm", sink=64, window=1984), batch=1), door(speaks=OneToken(SILENT))
    )
    young, sizes = seen, []
    for frame in film(count, 0.19, cut=50):
        [*seen.see(frame[None])]
        sizes.append(seen.nbytes)
        if len(sizes) == 200:
            young = seen.fork()
    made = torch.stack([*film(61, 0.19, seed=1)])
    late, early = iter(seen.see(made)), iter(young.see(made))
    took = in_turns({"late": lambda: next(late), "early": lambda: next(early)}, 60)
    times = ratio(took, "late", "early")
    bench.row(
        f"bytes of memory and door after {count} frames over after 200", "1", f"×{sizes[-1] / sizes[199]:.3f}",
        sizes[-1] == sizes[199], f"{BOUNDED}, {sizes[-1] / 1e6:.1f} MB",
    )  # fmt: skip
    bench.row(
        f"time of a frame after {count} over a copy's that stayed at 200, in turns", "flat", f"×{times:.2f}", times < 1.1,
        f"{1e3 * median(took['late']):.1f} ms",
    )  # fmt: skip
