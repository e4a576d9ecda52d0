"""What memories make of a trained model: a pattern comes again, further back than the device remembers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ..learn.toys import Repeat, train_repeat
from ..models import open_stream
from ..recipes import parse
from .registry import Bench, claim

PERIOD = 12  # tokens of the pattern
NEAR = 8  # tokens that the memories attend in any case where the pattern comes again at once
GAP = 8 * PERIOD  # tokens between the pattern and a question about it: more than the model was trained to look back
LOST, FOUND = 0.1, 0.4  # at most, at least: shares of tokens predicted right; chance is 1/31
AT_ONCE = {
    "full": True,
    "window(window=36)": True,
    f"window(window={NEAR})": False,
    f"streaming-llm(sink=1, window={NEAR - 1})": False,
    f"v-rex(window={NEAR})": True,
    f"v-rex(window={NEAR}, th_hd=0, th_r=0.6)": True,
    f"live-vlm(prompt=1, cache_size=12, recent_frames={NEAR}, clip_frames=4, observe=4, page=4, retr_ratio=1.0, frame=1)":
        True,
}  # fmt: skip
LATER = {
    "full": False,
    "window(window=48)": False,
    "live-vlm(prompt=1, cache_size=48, recent_frames=8, clip_frames=4, observe=4, page=4, frame=1)": None,
    f"rekv(n_init=1, n_local=48, retrieve_size=2, frame={PERIOD})": True,
}  # fmt: skip


@claim("recall-trained")
def recall_trained(bench: Bench) -> None:
    """A trained model goes on with a pattern that its window has lost, where a memory keeps it or brings it back."""
    bench.say("training a model that goes on with what repeats")
    model, task = train_repeat(True, progress=bench.trained)
    rows = 200 if bench.full else 100
    at_once(bench, model, task, rows)
    later(bench, model, task, rows)


def right(logits: Tensor, ids: Tensor) -> float:
    """Share of tokens of ids [B, T], but the first, that the logits before them predict."""
    return float((logits[:, :-1].argmax(-1) == ids[:, 1:]).double().mean())


def told(bench: Bench, what: str, share: float, kept: bool | None, note: str = "") -> None:
    """A row: whether the pattern is known, as it should be."""
    paper = {True: "known", False: "lost", None: "–"}[kept]
    holds = {True: share >= FOUND, False: share <= LOST, None: None}[kept]
    bench.row(what, paper, f"{share:.1%}", holds, note)


def at_once(bench: Bench, model: LlamaForCausalLM, task: Repeat, rows: int) -> None:
    """The third and fourth coming of a pattern, right after the others, through memories that see the last 8 tokens."""
    ids, places = task.recall(rows, PERIOD, seed=5)
    before, again = ids[:, : int(places[0])], ids[:, int(places[0]) :]
    for spec, kept in AT_ONCE.items():
        stream = open_stream(model, parse(spec), batch=rows)
        stream.consume(before)
        told(bench, f"pattern of {PERIOD} tokens, read on: {spec}", right(stream.fork().feed(again), again), kept)
        if stream.memory.retrieves:
            told(bench, f"the same, asked: {spec}", right(stream.question(again).feed(again), again), kept)


def later(bench: Bench, model: LlamaForCausalLM, task: Repeat, rows: int) -> None:
    """A pattern that came twice, then other tokens, then the pattern as a question."""
    random = np.random.default_rng((4, 7))

    def noise(count: int) -> np.ndarray:
        return random.integers(1, task.vocabulary, (rows, count))

    pattern = noise(PERIOD)
    first = np.zeros((rows, 1), dtype=np.int64)  # the sink token
    ids = torch.from_numpy(np.concatenate([first, noise(7 * PERIOD), pattern, pattern, noise(GAP)], 1))
    question = torch.from_numpy(pattern)
    for spec, kept in LATER.items():
        stream = open_stream(model, parse(spec), batch=rows)
        stream.consume(ids)
        asked = stream.question(question) if stream.memory.retrieves else stream
        note = {
            "full": f"nothing is lost, but {GAP} tokens are further than the model was trained to look back",
            "rekv": "brought back, what is far stands next to the question",
            "live-vlm": "thinned again and again by an attention that does not know the question",
        }.get(stream.memory.name, "")
        told(
            bench, f"pattern of {PERIOD} tokens, asked {GAP} tokens later: {spec}", right(asked.feed(question), question),
            kept, note,
        )  # fmt: skip
