"""A memory method of one's own, named in a spec string: python examples/own_recipe.py

Top-k attention: of the tokens that are held, each query attends only the k whose keys score highest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import evenflow as ef
from evenflow.memory import Memory, Recall
from evenflow.recipes import register

TEXT = "".join(f"Day {day}: the tide came in at {day % 12 + 1}, and the tide went out again.\n" for day in range(1, 60))


@dataclass(frozen=True)
class Strongest(Recall):
    """A query sees the `k` keys with the highest scores."""

    k: int

    def visible(self, query: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor:
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)  # grouped heads share a key head
        scores = query @ keys.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        best = scores.topk(min(self.k, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


@register("top-k", paper="Gupta et al., Memory-efficient Transformers via Top-k Attention, arXiv 2106.06899")
def top_k(*, sink: int = 4, window: int = 1020, k: int = 64) -> Memory:
    """Sinks and window as in StreamingLLM; of what is held, a query attends the `k` keys that score highest."""
    return Memory(sink=sink, window=window, recall=Strongest(k))


def main() -> None:
    """Read one text through fewer and fewer visible keys."""
    tiny = ef.open("tiny")
    ids = tiny.tokenizer.encode(TEXT)
    for memory in ("streaming-llm(window=124)", "top-k(window=124, k=32)", "top-k(window=124, k=2)"):
        stream = ef.open(tiny.model, memory, tokenizer=tiny.tokenizer)
        nats = stream.surprisal(ids).nanmean()
        print(f"{memory:28} {len(ids)} tokens, perplexity {nats.exp():.1f}, {stream.nbytes:,} bytes held")


if __name__ == "__main__":
    main()
