"""A two-layer model that learns, in minutes, to go on with what repeats: small enough to see what memories do to it.

Random patterns of 5 to 14 tokens come two to four times in a row, with random noise between them. Within a repetition
the next token can be known by looking one period back; in noise there is nothing to look for, and attention rests
somewhere: on the first token, where samples begin with a token that is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .backcopy import Progress, fit

CONTEXT = 64  # tokens of a training sample


@dataclass(frozen=True)
class Repeat:
    """The task. sink: samples and streams begin with token 0, which comes nowhere else."""

    sink: bool
    vocabulary: int = 32
    shortest: int = 5
    longest: int = 14

    def samples(self, count: int, length: int, seed: int) -> Tensor:
        """`count` independent stretches of text from the middle of the task, int64 [count, length]."""
        random = np.random.default_rng((3, seed))
        rows = []
        for _ in range(count):
            skipped = int(random.integers(0, 30))
            text = self._text(length + skipped, random)[skipped:]
            rows.append([0, *text[: length - 1]] if self.sink else text)
        return torch.tensor(rows)

    def _text(self, length: int, random: np.random.Generator) -> list[int]:
        text: list[int] = []
        while len(text) < length:
            pattern = random.integers(1, self.vocabulary, random.integers(self.shortest, self.longest + 1))
            text += np.tile(pattern, random.integers(2, 5)).tolist()
            text += random.integers(1, self.vocabulary, random.integers(3, 15)).tolist()
        return text[:length]

    def stream(self, length: int, seed: int) -> Tensor:
        """One long sample, int64 [length]."""
        return self.samples(1, length, seed)[0]

    def recall(self, count: int, period: int, seed: int) -> tuple[Tensor, Tensor]:
        """Streams in which one pattern of `period` tokens comes four times after some noise: int64 [count, n].

        Also the places, int64 [2 * period], of its third and fourth coming, where every token could be known.
        """
        random = np.random.default_rng((4, seed))
        noise = random.integers(1, self.vocabulary, (count, 80))
        pattern = random.integers(1, self.vocabulary, (count, period))
        text = np.concatenate([noise, np.tile(pattern, (1, 4))], 1)
        if self.sink:
            text = np.concatenate([np.zeros((count, 1), dtype=np.int64), text], 1)
        return torch.from_numpy(text), torch.arange(text.shape[1] - 2 * period, text.shape[1])


def train_repeat(
    sink: bool, seed: int = 0, steps: int = 2500, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, Repeat]:
    """Train the model on samples of 64 tokens; the same seed gives the same model. Returns it with its task."""
    task = Repeat(sink)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=task.vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, lambda step: task.samples(32, CONTEXT, seed * 1_000_000 + step), steps, 5e-3, progress)
    return model, task
