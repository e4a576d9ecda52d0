"""LiveVLM (arXiv 2505.15269 v2): recent tokens whole, older ones by attention and spread, a question reads some pages."""

from __future__ import annotations

import math

from torch import Tensor, arange, cat

from ...memory import Rope
from .plain import Call, attention, rotated


def scores(q: Tensor, k: Tensor, asked: list[int], at: list[int]) -> Tensor:
    """Mean attention of rotated queries [H_q, r, D] over heads and rows to rotated keys [H_kv, n, D]: [n].

    asked, at: stream indices of queries and keys; no query sees what comes after it.
    """
    keys = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = q @ keys.transpose(1, 2) * q.shape[2] ** -0.5
    for row, query in enumerate(asked):
        logits[:, row, [j for j, key in enumerate(at) if key > query]] = -math.inf
    return logits.softmax(-1).mean((0, 1))


def bucketed(s: list[float], bucket: list[int], keep: int, top: int, capacity: int = 1) -> list[int]:
    """Vision Sink Bucketing: which tokens stay, ascending, of tokens with scores `s` that lie in these buckets."""
    order = sorted(range(len(s)), key=lambda t: (-s[t], t))
    if len(s) <= keep:
        return sorted(order)
    kept = order[:top]
    for t in order[top:]:
        if len(kept) < keep and sum(bucket[other] == bucket[t] for other in kept) < capacity:
            kept.append(t)
    for t in order:  # where rounding left buckets short
        if len(kept) < keep and t not in kept:
            kept.append(t)
    return sorted(kept)


def buckets(places: list[int], length: int, count: int) -> list[int]:
    """⌈p / (L/N)⌉ of each place p from 1 to L."""
    return [-(-p * count // length) for p in places]


def compressed(
    held: list[int], s: list[float], *, prompt: int, consumed: int, cache_size: int, recent: int, scatter: float,
    capacity: int, bucket_by: str,
) -> list[int]:  # fmt: skip
    """Stream indices that stay of `held`, whose scores are `s`, after a clip that ended at `consumed`."""
    old = [n for n, t in enumerate(held) if prompt <= t < consumed - recent]
    if len(old) <= cache_size:
        return held
    if bucket_by == "time":
        places, length = [held[n] - prompt + 1 for n in old], consumed - recent - prompt
    else:
        places, length = [*range(1, len(old) + 1)], len(old)
    top = cache_size - math.floor(scatter * cache_size + 1e-9)
    where = buckets(places, length, cache_size // capacity)
    stays = {old[n] for n in bucketed([s[n] for n in old], where, cache_size, top, capacity)}
    return [t for n, t in enumerate(held) if n not in old or n in stays]


def reference(
    layers: list[list[Call]], rope: Rope | None, *, frame: int = 1, prompt: int = 0, cache_size: int,
    recent_frames: int = 2, clip_frames: int = 32, scatter_ratio: float = 0.5, capacity: int = 1, observe: int = 64,
    bucket_by: str = "index", positions: str = "packed",
) -> list[list[Tensor]]:  # fmt: skip
    """Per layer and call."""
    return run(
        layers, rope, frame=frame, prompt=prompt, cache_size=cache_size, recent_frames=recent_frames,
        clip_frames=clip_frames, scatter_ratio=scatter_ratio, capacity=capacity, observe=observe, bucket_by=bucket_by,
        positions=positions,
    )[0]  # fmt: skip


def run(
    layers: list[list[Call]], rope: Rope | None, *, frame: int, prompt: int, cache_size: int, recent_frames: int,
    clip_frames: int, scatter_ratio: float, capacity: int, observe: int, bucket_by: str, positions: str,
) -> tuple[list[list[Tensor]], list[list[list[int]]]]:  # fmt: skip
    """Outputs per layer and call; per layer the stream indices held after each committed call."""
    outputs, history = [], []
    observe = min(observe, recent_frames * frame)  # what is recent is held, at places without gaps
    for calls in layers:
        k, v, asked = calls[0].k[:, :0], calls[0].v[:, :0], calls[0].q[:, :0]
        held: list[int] = []
        out, kept, consumed = [], [], 0
        for call in calls:
            m = call.q.shape[1]
            keys, values = cat([k, call.k], 1), cat([v, call.v], 1)
            index = [*held, *range(consumed, consumed + m)]
            places = index if positions == "stream" else [*range(len(index))]
            turned, query = rotated(keys, places, rope), rotated(call.q, places[-m:], rope)
            first = len(held) + 1
            out.append(cat([attention(query[:, i : i + 1], turned[:, : first + i], values[:, : first + i])
                            for i in range(m)], 1))  # fmt: skip
            if not call.commit:
                continue
            k, v, held = keys, values, index
            asked = cat([asked, call.q], 1)[:, -observe:]
            before, consumed = consumed, consumed + m
            clip = clip_frames * frame
            if consumed // clip > before // clip:
                r = asked.shape[1]
                s = scores(rotated(asked, places[-r:], rope), turned, index[-r:], index).tolist()
                stays = compressed(
                    held, s, prompt=prompt, consumed=consumed, cache_size=cache_size, recent=recent_frames * frame,
                    scatter=scatter_ratio, capacity=capacity, bucket_by=bucket_by,
                )  # fmt: skip
                columns = [n for n, t in enumerate(held) if t in set(stays)]
                k, v, held = k[:, columns], v[:, columns], stays
            kept.append(held)
        outputs.append(out)
        history.append(kept)
    return outputs, history


def page_scores(q: Tensor, means: Tensor) -> Tensor:
    """How much a question's un-rotated queries [H_q, m, D] attend to mean keys of pages [H_kv, P, D]: [P]."""
    keys = means.repeat_interleave(q.shape[0] // means.shape[0], 0)
    return (q @ keys.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1).mean((0, 1))


def retrieved(
    q: Tensor, k: Tensor, held: list[int], *, prompt: int, recent: int, consumed: int, page: int, retr_ratio: float
) -> list[int]:
    """Stream indices that a question sees: prompt, the best pages of what is old, and what is recent."""
    old = [n for n, t in enumerate(held) if prompt <= t < consumed - recent]
    pages = [old[i : i + page] for i in range(0, len(old), page)]
    seen = [n for n in range(len(held)) if n not in old]
    if pages:
        means = cat([k[:, part].mean(1, keepdim=True) for part in pages], 1)
        s, count = page_scores(q, means).tolist(), 0
        for number in sorted(range(len(pages)), key=lambda n: (-s[n], n)):
            if count < retr_ratio * len(old) - 1e-9:
                seen += pages[number]
                count += len(pages[number])
    return [held[n] for n in sorted(seen)]


def ask(q: Call, calls: list[Call], k: Tensor, v: Tensor, places: Tensor, rope: Rope | None) -> list[Tensor]:
    """What the question q and the calls after it read, one layer, over the retrieved k, v at these places.

    The question does not stay; the calls do, and stand behind one another.
    """
    out, last = [], int(places[-1]) if len(places) else -1
    for call in (q, *calls):
        m = call.q.shape[1]
        at = cat([places, arange(last + 1, last + 1 + m)])
        keys, values = cat([k, call.k], 1), cat([v, call.v], 1)
        turned, query, first = rotated(keys, at, rope), rotated(call.q, at[-m:], rope), k.shape[1] + 1
        out.append(cat([attention(query[:, i : i + 1], turned[:, : first + i], values[:, : first + i])
                        for i in range(m)], 1))  # fmt: skip
        if call is not q:
            k, v, places, last = keys, values, at, last + m
    return out
