"""The definition of a streaming memory, as slowly and plainly as it can be written: one query at a time, in float64."""

import torch
from torch import Tensor


def rotated(x: Tensor, positions: list[int], inv_freq: list[float], style: str = "half", scale: float = 1.0) -> Tensor:
    """`x` [n, D] with row r turned to position r, pair by pair."""
    out = x.clone()
    pairs = len(inv_freq)
    for c, frequency in enumerate(inv_freq):
        a, b = (c, c + pairs) if style == "half" else (2 * c, 2 * c + 1)
        angle = torch.tensor([position * frequency for position in positions], dtype=torch.float64)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        out[:, a], out[:, b] = x[:, a] * cos - x[:, b] * sin, x[:, b] * cos + x[:, a] * sin
    return out


def kept_by(i: int, sink: int, window: int | None) -> list[int]:
    """What the query at stream index `i` finds in the cache, itself included."""
    return [j for j in range(i + 1) if window is None or j < sink or i - j <= window]


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sink: int,
    window: int | None,
    inv_freq: list[float] | None = None,
    style: str = "half",
    rope_scale: float = 1.0,
    alibi: Tensor | None = None,
    reach: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    logits: Tensor | None = None,
    absolute: bool = False,
) -> Tensor:
    """q [H_q, N, D], k and v [H_kv, N, D] of one row of one layer → [H_q, N, D_v].

    Positions are indices in the cache (or in the stream, if `absolute`), as arXiv 2309.17453 section 3.2 defines them.
    """
    heads, length, dim = q.shape
    groups = heads // k.shape[0]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(heads, length, v.shape[-1], dtype=torch.float64)
    for i in range(length):
        cache = kept_by(i, sink, window)
        places = cache if absolute else list(range(len(cache)))
        own = places[-1]
        seen = [n for n, place in enumerate(places) if reach is None or own - place < reach]
        places = [places[n] for n in seen]
        distance = torch.tensor([own - place for place in places]).double()
        for h in range(heads):
            query = q[h, i : i + 1].double()
            keys, values = (tensor[h // groups, [cache[n] for n in seen]].double() for tensor in (k, v))
            if inv_freq is not None:
                query = rotated(query, [own], inv_freq, style, rope_scale)
                keys = rotated(keys, places, inv_freq, style, rope_scale)
            scores = (keys @ query[0]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi is not None:
                scores = scores - float(alibi[h]) * distance
            if logits is not None:
                scores = torch.cat([scores, logits[h : h + 1].double()])
                values = torch.cat([values, torch.zeros(1, v.shape[-1]).double()])
            out[h, i] = (torch.softmax(scores, 0)[:, None] * values).sum(0)
    return out
