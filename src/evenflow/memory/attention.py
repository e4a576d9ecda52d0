"""Scaled dot-product attention over one memory: the library's kernel wherever it is the fastest exact way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def softmax_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    null: Tensor | None = None,
) -> Tensor:
    """Attention of `query` over `keys` and `values`; grouped query heads share their key head without a copy.

    query [B, H_q, m, D]; keys [B, H_kv, n, D]; values [B, H_kv, n, D_v]; bias additive, in query's dtype,
    broadcastable to [B, H_q, m, n]; scale multiplies the scores; softcap c replaces a score s by c·tanh(s/c) before
    the bias (Gemma 2); null: logits of one more key without a value, broadcastable to [B, H_q, m, 1]. Returns
    [B, H_q, m, D_v].
    """
    batch, heads, m, _ = query.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    if m == 1 and groups > 1 and null is None:
        query = query.reshape(batch, kv_heads, groups, -1)
        if bias is not None and bias.shape[1] != 1:
            bias = bias.reshape(bias.shape[0], kv_heads, groups, -1)
    # One query: the CPU's fused kernel reads half-precision caches three times slower than two products do. Large
    # single-precision ones lie channel by channel, for products; in small ones the fused kernel is the faster way.
    half = query.dtype in (torch.bfloat16, torch.float16)
    by_products = m == 1 and query.device.type == "cpu" and (half or keys.stride(-1) != 1)
    if softcap is None and null is None and not by_products:
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, scale=scale, enable_gqa=m > 1 and groups > 1
        )
    else:
        out = _products(query, keys, values, bias, scale, softcap, null)
    return out.reshape(batch, heads, m, -1)


def _products(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    null: Tensor | None,
) -> Tensor:
    batch, heads, m, _ = query.shape
    kv_heads = keys.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Half precision is scaled after the product, where nothing is rounded any more; else before, where it is smaller.
    scaled = query * scale if wide == query.dtype else query
    grouped = scaled.reshape(batch, kv_heads, -1, query.shape[-1])
    scores = (grouped @ keys.transpose(-1, -2)).reshape(batch, heads, m, -1)
    if scores.dtype != wide:
        scores = scores.to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if null is not None:
        scores = torch.cat([scores, null.to(scores.dtype).expand(batch, heads, m, 1)], -1)
    weights = torch.softmax(scores, -1).to(values.dtype)
    if null is not None:
        weights = weights[..., :-1]
    return (weights.reshape(batch, kv_heads, -1, weights.shape[-1]) @ values).reshape(batch, heads, m, -1)
