"""TempCache: what goes on from frame to frame is one key that counts for more; with AnnSA and AnnCA, which hash."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..memory import Absolute, AllHeld, Memory, Merged, Oldest, SameBucket
from ..memory.hashing import bucket_codes, hyperplanes
from .registry import register


def prompt_tokens(query: Tensor, keys: Tensor, *, bits: int = 8, tables: int = 4, seed: int = 0) -> Tensor:
    """AnnCA: which tokens of a prompt a frame's (or chunk's) cross-attention needs, bool [B, H_kv, n] (section 2).

    query [B, H_q, m, D] of the frame, keys [B, H_kv, n, D] of the prompt: those that share a bucket with any query of
    their head in any of the tables. With 0 bits all of them.
    """
    planes = hyperplanes(query.shape[-1], bits, tables=tables, seed=seed, like=query)
    asked = bucket_codes(query, planes).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [B, H_kv, queries, tables]
    asked, there = (codes.transpose(-1, -2).contiguous() for codes in (asked, bucket_codes(keys, planes)))
    asked = asked.sort(-1).values
    at = torch.searchsorted(asked, there).clamp_max(asked.shape[-1] - 1)
    return (asked.gather(-1, at) == there).any(-2)


@register(
    "temp-cache",
    paper="Fast Autoregressive Video Diffusion and World Models with Temporal Cache Compression and Sparse Attention, "
    "ICML 2026, arXiv 2602.01801",
    claims=("temp-cache",),
)
def temp_cache(
    *, tau: float = 0.9, match: Literal["query", "key"] = "query",
    representative: Literal["last", "mean", "first"] = "last", bits: int = 0, tables: int = 4, seed: int = 0,
    sparse_layers: tuple[int, ...] | None = None, window: int | None = None, frame: int | None = None, chunk: int = 3,
) -> Memory:  # fmt: skip
    """Every frame for ever, but keys that go on from one frame to the next are one: the memory grows with new content.

    At the end of a committed chunk each token is compared with its match in the frame before, the key that scores highest
    with its query (or its own key: `match`): above cosine `tau` they become one token that counts for both. Its key is the
    newest (or their mean, or the first: `representative`; the medoid would need all members), its value their mean, and
    log m is added to its scores, which is exact where the keys are equal. tau above 1 keeps everything.

    bits, tables: AnnSA, a query attends what shares one of `tables` codes of `bits` bits with it, and its own frame; 0
    attends everything. The paper leaves the first 30 % of denoising steps dense, and 70 % of layers sparse: give
    `sparse_layers`. AnnCA is `prompt_tokens`. window: a hard bound, frames since a token was last continued (None: the
    paper's, which has none).

    No code is public. Not said in the paper, and chosen here: matching head by head, by un-rotated vectors, where one
    point's keys differ least (query heads that share a key head ask with their mean); a merged token takes the place of
    its newest member; the search in one frame is exact, where the paper's approximates. After `recache` tokens that were
    continued in the frames computed anew begin there.
    """
    return Memory(
        window=window, frame=frame, chunk=chunk, inside="both", evict=Oldest(), place=Absolute(),
        fold=Merged(tau, match, representative),
        recall=SameBucket(bits, tables, seed, sparse_layers) if bits else AllHeld(),
    )  # fmt: skip
