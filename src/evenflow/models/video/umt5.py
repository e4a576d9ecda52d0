"""The text that Wan reads: umT5 embeddings, zero behind the end of a prompt, kept for the prompts that come again."""

from __future__ import annotations

import html
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from .checkpoints import fill, read_weights

KEPT = 64  # prompts whose embeddings are kept: 4 MB each at full size in half precision
# umT5-xxl, of which Wan reads the encoder. Its shape is not in Wan's own file.
XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
# Modules of one layer by Wan's names and by those of transformers.
OWN = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def clean(prompt: str) -> str:
    """A prompt as umT5 was fed: broken characters mended (ftfy), entities resolved, white space single."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise ImportError("prompts of Wan need ftfy; install it with: pip install 'evenflow[video]'") from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fix_text(prompt)))).strip()


class UMT5:
    """encode(prompts) → embeddings [B, length, text_dim], rows behind each prompt's end zero.

    encoder: umT5's encoder; tokenizer: one that ends a prompt with its end token. length: rows, 512 with Wan; longer
    prompts are cut, with a warning. The embeddings of the last prompts are kept. Source: Wan 2.1.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int = 512) -> None:
        self.encoder, self.tokenizer, self.length = encoder.eval().requires_grad_(False), tokenizer, length
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts) or not prompts:
            raise TypeError(f"prompts are {prompts!r}; expected a list of one string or more")
        texts = [clean(prompt) for prompt in prompts]
        found = {
            text: self._kept.pop(text) if text in self._kept else self._embedded(text) for text in dict.fromkeys(texts)
        }
        self._kept.update(found)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    @torch.no_grad()
    def _embedded(self, text: str) -> Tensor:
        """[length, text_dim]. Alone and without padding, so that a prompt's embedding is the same in any company."""
        ids = self.tokenizer(text, truncation=True, max_length=self.length, return_tensors="pt").input_ids
        if ids.shape[1] == self.length and len(self.tokenizer(text, verbose=False).input_ids) > self.length:
            warnings.warn(f"a prompt is longer than {self.length} tokens and was cut: {text[:60]}…", stacklevel=3)
        rows = self.encoder(ids.to(self.encoder.device)).last_hidden_state[0]
        return torch.cat([rows, rows.new_zeros(self.length - len(rows), rows.shape[1])])


def load_umt5(
    weights: str | Path, tokenizer: str | Path, *, length: int = 512, dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> UMT5:  # fmt: skip
    """The text encoder of a folder of transformers (config.json beside its weights), or of Wan's own file.

    tokenizer: folder. Raises ValueError with what is missing, left over, or of the wrong shape.
    """
    place = Path(weights)
    told = (place if place.is_dir() else place.parent) / "config.json"
    tensors = read_weights(place)
    own = "token_embedding.weight" in tensors
    shape: dict[str, Any] = XXL if own or not told.is_file() else json.loads(told.read_text(encoding="utf-8"))
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**shape))
    tensors = from_wan(tensors) if own else dict(tensors)
    table = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    if table is not None:  # one table under two names, of which files hold one or both
        tensors |= {
            name: table for name in encoder.state_dict() if name in ("shared.weight", "encoder.embed_tokens.weight")
        }
    fill(encoder, tensors, str(place), dtype, device)
    encoder.tie_weights()
    try:
        words = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"no tokenizer at {tokenizer} ({first}); expected the folder of umT5's tokenizer") from error
    return UMT5(encoder, words, length)


def from_wan(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of models_t5_umt5-xxl-enc-bf16.pth under the names of transformers; unknown names stay."""
    top = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    found = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if inside and inside[2] in OWN:
            module = f"encoder.block.{inside[1]}.{OWN[inside[2]]}"
        found[f"{top.get(module, module)}.{kind}"] = tensor
    return found
