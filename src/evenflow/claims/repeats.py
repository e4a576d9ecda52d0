"""Small trained models: what sinks, positions and a cache that is too small do to them (arXiv 2309.17453, section 3)."""

from __future__ import annotations

import math

from transformers import LlamaForCausalLM

from ..api import open as open_stream
from ..learn.toys import Repeat, train_repeat
from ..memory import Absolute, Memory
from .registry import Bench, claim

CACHE = 40
MEMORIES = {
    "0 + 40": Memory(window=CACHE),
    "1 + 39": Memory(sink=1, window=CACHE - 1),
    "4 + 36": Memory(sink=4, window=CACHE - 4),
    "4 + 36 at stream positions": Memory(sink=4, window=CACHE - 4, place=Absolute()),
    "full attention": Memory(),
}


@claim("streaming-llm-repeats")
def repeats(bench: Bench) -> None:
    """In small trained models, losing a dedicated sink costs, and so do stream positions; what left is forgotten."""
    models = {}
    for sink in (True, False):
        kind = "with" if sink else "without"
        bench.say(f"training a model {kind} a dedicated sink token")
        models[sink] = train_repeat(sink, progress=bench.trained)
    after_eviction(bench, models)
    forgetting(bench, *models[True])


def after_eviction(bench: Bench, models: dict[bool, tuple[LlamaForCausalLM, Repeat]], rows: int = 64) -> None:
    """Perplexity of streams of 260 tokens once a cache of 40 is full."""
    found: dict[bool, dict[str, float]] = {}
    for sink, (model, task) in models.items():
        ids = task.samples(rows, 260, seed=77_777)
        kind = "with a dedicated sink" if sink else "vanilla"
        found[sink] = {}
        for name, memory in MEMORIES.items():
            nats = open_stream(model, memory).surprisal(ids)[:, CACHE + 2 :]
            found[sink][name] = math.exp(float(nats.double().mean()))
            bench.row(f"8. {kind}: {name}", "–", f"{found[sink][name]:.2f}")
    own, vanilla = found[True], found[False]
    ratio = own["0 + 40"] / own["1 + 39"]
    bench.row("8. dropping a dedicated sink", "×68 (160M)", f"×{ratio:.3f}", ratio >= 1.05, "two layers of width 64")
    ratio = vanilla["0 + 40"] / vanilla["1 + 39"]
    bench.row(
        "8. dropping the first token of a vanilla model", "×1.5 (160M)", f"×{ratio:.3f}", None, "grows with scale"
    )
    for sink, values in found.items():
        kind = "with a dedicated sink" if sink else "vanilla"
        ratio = values["4 + 36 at stream positions"] / values["4 + 36"]
        bench.row(f"8. {kind}: stream over cache positions", "worse", f"×{ratio:.2f}", ratio >= 1.08)
        ratio = values["full attention"] / values["4 + 36"]
        bench.row(f"8. {kind}: full attention past training over streaming", "worse", f"×{ratio:.2f}", ratio >= 2)


def forgetting(bench: Bench, model: LlamaForCausalLM, task: Repeat, rows: int = 200) -> None:
    """Share of tokens of a repeated pattern that are predicted right, by its distance and the window."""
    period, chance = 12, 1 / (task.vocabulary - 1)
    ids, places = task.recall(rows, period, seed=5)
    right = {}
    for window in (36, 8):
        logits = open_stream(model, Memory(sink=4, window=window)).feed(ids)[:, places - 1]
        right[window] = float((logits.argmax(-1) == ids[:, places]).double().mean())
    error = 3 * (chance * (1 - chance) / (rows * 2 * period)) ** 0.5
    bench.row(f"9. recall over a distance of {period}, window 36", "full", f"{right[36]:.1%}", right[36] >= 0.9)
    bench.row(
        f"9. recall over a distance of {period}, window 8", "0", f"{right[8]:.1%}", right[8] <= 2 * chance + error,
        f"chance is {chance:.1%}",
    )  # fmt: skip
