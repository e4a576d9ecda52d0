"""Block-sparse attention: each block of queries attends, exactly, the few blocks of keys that promise most.

Queries and keys are cut into blocks in the order they come. A block of keys is judged by the product of its mean key
with the mean query (SLA, arXiv 2509.24006, section 4); the best are gathered and attended, the others never read. SLA
takes the mean of all keys away first: that moves all scores of a query block alike and cannot change the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SLAB = {"cpu": 2**18}  # numbers gathered at once: what a core's cache holds
LARGE = 2**26  # on other devices


def block_means(x: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """Mean of each block of x [B, H, n, D] over what is `real` (bool [B, 1 or H, n], default all): [B, H, blocks, D].

    A block that is cut short by the end is averaged over what it has.
    """
    there = torch.ones(1, 1, x.shape[2], dtype=torch.bool, device=x.device) if real is None else real
    count = _blocks(there, block).sum(-1).clamp_min(1)
    return _blocks(x if real is None else torch.where(real[..., None], x, 0), block).sum(3) / count[..., None]


def top_blocks(query: Tensor, keys: Tensor, ratio: float, block: int, real: Tensor | None = None) -> Tensor:
    """Numbers of the key blocks that each block of queries attends, best first: int64 [B, H_q, query blocks, kept].

    query [B, H_q, m, D], keys [B, H_kv, n, D]; real: bool [B, 1 or H_kv, n], keys that are there at all. Of K blocks with
    something in them int(ratio · K) are kept, at least one; −1 where a row or head has fewer blocks than another.
    """
    if not 0 < ratio <= 1 or block < 1:
        raise ValueError(
            f"ratio is {ratio}, block {block}; keep a share from above 0 to 1 of blocks of 1 token or more"
        )
    groups = query.shape[1] // keys.shape[1]
    means = block_means(keys, block, real).repeat_interleave(groups, 1)
    scores = block_means(query, block) @ means.transpose(-1, -2)
    blocks = scores.shape[-1]
    if real is None:
        return scores.argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(ratio * blocks))]
    there = _blocks(real, block).any(-1)
    there = there.repeat_interleave(groups, 1) if there.shape[1] > 1 else there
    kept = (ratio * there.sum(-1).double()).long().clamp_min(1)[..., None, None]  # [B, 1 or H_q, 1, 1]
    best = scores.masked_fill(~there[:, :, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
    best = best[..., : int(kept.max())]
    return torch.where(torch.arange(best.shape[-1], device=best.device) < kept, best, -1)


def block_attention(
    query: Tensor, keys: Tensor, values: Tensor, kept: Tensor, block: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention of each block of queries over its `kept` blocks of keys, as `top_blocks` gives them.

    query [B, H_q, m, D]; keys [B, H_kv, n, D]; values [B, H_kv, n, D_v]; bias: one number a key, broadcastable to
    [B, H_q, 1, n]. Returns [B, H_q, m, D_v]. Query blocks are taken in slabs, so that the copies of keys stay small.
    """
    batch, heads, m, _ = query.shape
    kv_heads, n, dim = keys.shape[1:]
    per_head, count = kept.shape[2], kept.shape[3]
    blocks = -(-n // block)
    pair = torch.arange(batch * heads, device=query.device).reshape(batch, heads, 1, 1)
    own = (pair // heads * kv_heads + pair % heads // (heads // kv_heads)) * blocks + kept.clamp_min(0)
    queries = _blocks(query, block).reshape(-1, 1, block, dim)
    rows = own.reshape(-1, count)
    tiled = tuple(_blocks(x, block).reshape(-1, block * x.shape[-1]) for x in (keys, values))
    cost = None
    if bias is not None or n % block or bool((kept < 0).any()):
        cost = query.new_zeros(1, 1, n) if bias is None else bias[:, :, 0].to(query.dtype)
        cost = _blocks(cost.expand(batch, heads, n), block, -torch.inf)
        cost = cost.gather(2, kept.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, block))
        cost = cost.reshape(batch, heads, per_head, count, block).masked_fill(kept[..., None] < 0, -torch.inf)
        cost = cost.reshape(-1, 1, 1, count * block)
    out = query.new_empty(len(rows), block, values.shape[-1])
    slab = SLAB.get(query.device.type, LARGE)
    step = max(1, slab // (count * block * max(dim, values.shape[-1])))
    for part in (slice(start, start + step) for start in range(0, len(rows), step)):
        k, v = (
            x.index_select(0, rows[part].flatten()).reshape(-1, 1, count * block, x.shape[1] // block) for x in tiled
        )
        mask = None if cost is None else cost[part]
        out[part] = scaled_dot_product_attention(queries[part], k, v, attn_mask=mask, scale=scale)[:, 0]
    return out.reshape(batch, heads, per_head * block, -1)[:, :, :m]


def check_plain(softcap: float | None, null: Tensor | None, instead: str) -> None:
    """Raises ValueError for a model whose softmax has what attention in blocks has not; `instead` says what to do."""
    if softcap is not None or null is not None:
        raise ValueError(f"attention in blocks has neither soft-capped scores nor null keys; {instead}")


def check_bias(bias: Tensor | None) -> None:
    """Raises ValueError for a bias that differs between queries, which blocks of queries cannot have."""
    if bias is not None and bias.shape[2] != 1:
        raise ValueError(f"bias is {tuple(bias.shape)}; blocks of queries attend alike, so give [B, 1 or H_q, 1, n]")


def sparse_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, ratio: float, block: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention over the best share `ratio` of key blocks; shapes as in `block_attention`. All of it when ratio is 1.

    A key whose bias is −∞ is not there: it counts in no mean, and a block of such keys is no block.
    """
    check_bias(bias)
    real = None
    if bias is not None and bool(bias.isinf().any()):
        real = (bias[:, :, 0] > -torch.inf)[:, :: query.shape[1] // keys.shape[1] if bias.shape[1] > 1 else 1]
        real = real.expand(query.shape[0], -1, -1)
    return block_attention(query, keys, values, top_blocks(query, keys, ratio, block, real), block, scale, bias)


def _blocks(x: Tensor, block: int, fill: float = 0) -> Tensor:
    """x [B, H, n, …] cut into blocks, [B, H, blocks, block, …]; `fill` where the last one is not full."""
    short = -x.shape[2] % block
    if short:
        x = pad(x, (*[0, 0] * (x.ndim - 3), 0, short), value=fill)
    return x.unflatten(2, (-1, block))
