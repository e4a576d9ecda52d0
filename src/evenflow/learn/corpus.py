"""From a folder of text files to training samples: a byte-level BPE tokenizer, token files, samples behind a sink token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SINK = "<s>"
COPY = "<copy>"

Tokens = NDArray[np.uint16]


def text_files(folder: Path) -> list[Path]:
    """The .txt files below `folder`, sorted. Raises ValueError when there is no such folder, or no text in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with .txt files in it")
    files = sorted(path for path in folder.rglob("*.txt") if path.stat().st_size)
    if not files:
        raise ValueError(f"there are no (non-empty) .txt files in {folder}")
    return files


def train_tokenizer(files: list[Path], vocabulary: int) -> Tokenizer:
    """Byte-level BPE over the files: any bytes that are text come back as they were. `<s>` is 0 and `<copy>` is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SINK, COPY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in files], trainer)
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: list[Path], into: Path) -> Tokens:
    """All tokens of all files one after another, as a memory-mapped uint16 file (made once)."""
    if not into.exists():
        temporary = into.with_suffix(".part")
        with temporary.open("wb") as out:
            for path in files:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                for encoded in tokenizer.encode_batch(lines, add_special_tokens=False):
                    out.write(np.asarray(encoded.ids, dtype=np.uint16).tobytes())
        temporary.replace(into)
    return np.memmap(into, dtype=np.uint16, mode="r")


@dataclass(frozen=True)
class Samples:
    """Batches of `context` tokens, each the sink token and a stretch of text from a random place.

    copies: the share of samples that carry back-copy marks: here and there `<copy>` is written after a token, which
    then comes once more. Heads learn to look back at the mark's order and to rest on the sink otherwise, as the
    active-dormant heads of arXiv 2410.13835 do; text itself never holds the mark.
    """

    tokens: Tokens
    context: int
    batch: int
    copies: float = 0.0
    seed: int = 0
    sink: int = 0
    mark: int = 1

    def __getitem__(self, step: int) -> Tensor:
        """The batch of training step `step`, int64 [batch, context]; the same for the same seed and step."""
        random = np.random.default_rng((self.seed, step))
        length = self.context - 1
        if len(self.tokens) < length:
            raise ValueError(f"the text has {len(self.tokens)} tokens; one sample needs {length}")
        starts = random.integers(0, len(self.tokens) - length + 1, self.batch)
        rows = np.full((self.batch, self.context), self.sink, dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            text = self.tokens[start : start + length].astype(np.int64)
            row[1:] = self._marked(text, random) if random.random() < self.copies else text
        return torch.from_numpy(rows)

    def _marked(self, text: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        places = np.flatnonzero(random.random(len(text)) < 0.1)
        return np.insert(text, np.repeat(places + 1, 2), np.stack([0 * places + self.mark, text[places]], 1).ravel())[
            : len(text)
        ]


def windows(tokens: Tokens, context: int, sink: int = 0) -> Tensor:
    """The text cut into consecutive samples, int64 [n, context], each behind the sink token; the rest is left out."""
    length = context - 1
    count = len(tokens) // length
    body = torch.from_numpy(tokens[: count * length].astype(np.int64)).reshape(count, length)
    return torch.cat([torch.full((count, 1), sink), body], 1)
