"""Scripts of calls for a memory, and playing them: what a causal video model (or a language model) would do to it."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from evenflow.memory import MemoryState
from evenflow.memory.chunks import ArenaState
from evenflow.memory.question import Question
from evenflow.recipes.reference import Call


def random_calls(
    sizes: Sequence[int],
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 12,
    tentative: int = 0,
    seed: int = 0,
    tags: Sequence[dict[str, Tensor]] | None = None,
) -> list[list[Call]]:
    """Per layer: for each chunk of sizes[i] tokens, `tentative` calls that are not committed, and one that is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, m: int) -> Tensor:
        return torch.randn(count, m, head_dim, generator=generator, dtype=torch.float64)

    script: list[list[Call]] = [[] for _ in range(layers)]
    for chunk, m in enumerate(sizes):
        for attempt in range(tentative + 1):
            for layer in script:
                given = {} if tags is None else tags[chunk]
                layer.append(Call(draw(heads, m), draw(kv_heads, m), draw(kv_heads, m), attempt == tentative, given))
    return script


def play(state: MemoryState, script: list[list[Call]]) -> list[list[Tensor]]:
    """The same calls on a memory of batch 1: outputs [H_q, m, D_v] per layer and call."""
    outputs: list[list[Tensor]] = [[] for _ in script]
    for calls in zip(*script, strict=True):
        first, dtype = calls[0], state.geometry.dtype
        with state.step(first.q.shape[1], tags=first.tags or None, commit=first.commit, row=first.row):
            for layer, call in enumerate(calls):
                q, k, v = (tensor[None].to(dtype) for tensor in (call.q, call.k, call.v))
                outputs[layer].append(state.attend(layer, q, k, v)[0])
    return outputs


def slower(old: MemoryState, fresh: MemoryState, script: list[list[Call]], times: int = 60) -> float:
    """The quickest of `times` plays on an old memory over that on a fresh one, in turns, as others use the machine too."""
    took: dict[int, list[float]] = {0: [], 1: []}
    for n in range(2 * times):
        start = time.perf_counter()
        play((fresh, old)[n % 2], script)
        took[n % 2].append(time.perf_counter() - start)
    return min(took[1]) / min(took[0])


def asked(
    source: ArenaState | Question, question: Sequence[Call], later: Sequence[Sequence[Call]] = ()
) -> tuple[list[list[Tensor]], list[list[int]]]:
    """What a question (a call for each layer) and the calls after it read; what each layer retrieved.

    source: a memory of batch 1, or a question that was opened to it before.
    """
    opened = source if isinstance(source, Question) else source.question()
    with opened.retrieve(question[0].q.shape[1]):
        outs = [[opened.attend(n, c.q[None], c.k[None], c.v[None])[0]] for n, c in enumerate(question)]
    seen = [opened.held(layer) for layer in range(len(question))]
    for out, more in zip(
        outs, play(opened, [list(layer) for layer in later]) if later else [[]] * len(outs), strict=True
    ):
        out += more
    return outs, seen


def worst(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> float:
    """Largest absolute difference."""
    return max(
        float((a.double() - b).abs().max())
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
