"""The tiny model's text encoder: a closed vocabulary, and a small transformer over its words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WORD = re.compile(r"[a-z]+|,")


def split(text: str) -> list[str]:
    """The words of a prompt, in lower case, and its commas."""
    return WORD.findall(text.lower())


class Words(nn.Module):
    """Embeddings of prompts, [B, length, dim], as a video transformer reads them: rows behind the last word are zero.

    vocabulary: the words it knows. It skips all others; `unknown` tells them.
    """

    def __init__(self, vocabulary: Sequence[str], dim: int = 128, length: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.number = {word: n for n, word in enumerate(self.vocabulary, 1)}
        self.length = length
        self.word = nn.Embedding(len(self.vocabulary) + 1, dim, padding_idx=0)
        self.place = nn.Parameter(torch.randn(length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def unknown(self, text: str) -> list[str]:
        """Words of `text` that are not in the vocabulary, each once; commas are none."""
        return list(dict.fromkeys(word for word in split(text) if word != "," and word not in self.number))

    def numbers(self, prompts: Sequence[str]) -> Tensor:
        """Numbers of the words, int64 [B, length], 0 behind the last; what is too long is cut."""
        rows = [[self.number[word] for word in split(text) if word in self.number][: self.length] for text in prompts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows], dtype=torch.int64)

    def forward(self, numbers: Tensor) -> Tensor:
        """Embeddings [B, length, dim] of numbers [B, length]."""
        here = numbers > 0
        # A prompt without words has nothing to attend to; its rows are zeroed below, so it may attend to anything.
        behind = ~here & here.any(1, keepdim=True)
        x = self.body(self.word(numbers) + self.place, src_key_padding_mask=behind)
        return self.norm(x) * here[..., None]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, length, dim] of prompts."""
        return self(self.numbers(prompts).to(self.place.device))
