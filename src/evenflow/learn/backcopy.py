"""A small model that grows a strong attention sink in a minute: bigrams with back-copies (arXiv 2410.13835, section 2).

Tokens follow a fixed random table of bigrams, but after a trigger token comes a copy of the token before the trigger.
A head must look one token back at triggers and nowhere at all other tokens; having to put its attention somewhere, it
puts it on the first token, whose value it makes small. Take that token away, and what the head does elsewhere is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

Progress = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True)
class BackCopy:
    """The task. Token 0 is the sink and begins every sample; tokens 1..triggers trigger a copy."""

    vocabulary: int = 64
    triggers: int = 3
    sharpness: float = 2.0  # of the bigram table: standard deviation of its log-odds
    seed: int = 0

    def table(self) -> np.ndarray:
        """Probability of each next token given each token, float64 [V, V]; the sink is never next."""
        odds = np.random.default_rng((self.seed, 0)).normal(0.0, self.sharpness, (self.vocabulary, self.vocabulary))
        chances = np.exp(odds)
        chances[:, 0] = 0.0
        return chances / chances.sum(1, keepdims=True)

    def samples(self, count: int, length: int, seed: int) -> Tensor:
        """`count` independent samples, int64 [count, length]."""
        random = np.random.default_rng((self.seed, 1, seed))
        upper = self.table().cumsum(1)
        out = np.zeros((count, length), dtype=np.int64)
        draws = random.random((count, length))
        for t in range(1, length):
            now = out[:, t - 1]
            fresh = np.minimum((upper[now] < draws[:, t, None]).sum(1), self.vocabulary - 1)
            copies = (now > 0) & (now <= self.triggers) & (t >= 2)
            out[:, t] = np.where(copies, out[:, max(t - 2, 0)], fresh)
        return torch.from_numpy(out)

    def stream(self, length: int, seed: int) -> Tensor:
        """One long sample, int64 [length]."""
        return self.samples(1, length, seed)[0]


def train(
    seed: int = 0, steps: int = 1500, progress: Progress | None = None, context: int = 64
) -> tuple[LlamaForCausalLM, BackCopy]:
    """Train the model; the same seed gives the same model. Returns it with its task."""
    task = BackCopy(seed=seed)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, lambda step: task.samples(32, context, step), steps, 6e-3, progress)
    return model, task


def fit(
    model: LlamaForCausalLM, batch: Callable[[int], Tensor], steps: int, rate: float, progress: Progress | None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """AdamW with warm-up and linear decay over `batch(step)` int64 [B, T]; weigh: weight of each target, [B, T - 1]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, 1.5 * (steps - step) / steps)
        ids = batch(step)
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if weigh is None:
            loss = losses.mean()
        else:
            weights = weigh(ids).flatten()
            loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
    model.eval()
