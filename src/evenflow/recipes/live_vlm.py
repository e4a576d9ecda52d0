"""LiveVLM: recent frames whole, older ones thinned by attention and by spread, and a question reads the pages it needs."""

from __future__ import annotations

from typing import Literal

from ..memory import Absolute, Contiguous, Memory, Never, Pages, Thinned
from .registry import register


@register(
    "live-vlm",
    paper="LiveVLM: Efficient Online Video Understanding via Streaming-Oriented KV Cache and Retrieval, arXiv 2505.15269",
    claims=("live-vlm", "recall-trained"),
)
def live_vlm(
    *, cache_size: int = 12_000, recent_frames: int = 2, clip_frames: int = 32, scatter_ratio: float = 0.5,
    capacity: int = 1, observe: int = 64, bucket_by: Literal["index", "time"] = "index", page: int = 16,
    retr_ratio: float = 0.4, positions: Literal["packed", "stream"] = "packed", prompt: int = 14, frame: int = 196,
) -> Memory:  # fmt: skip
    """A prompt, `cache_size` older tokens and the last `recent_frames` frames; a question reads `retr_ratio` of the older.

    A stream of tokens, `frame` to a frame (1 for plain text), read causally. Whenever it has grown by a clip of
    `clip_frames` frames, and more than `cache_size` tokens are neither of the prompt nor recent, each layer thins these
    (Vision Sink Bucketing): it scores them by the attention that the newest `observe` queries pay them, mean over
    queries and heads; keeps the best (1 − scatter_ratio) · cache_size wherever they are; and fills up with the best
    that find room in buckets of `capacity` tokens, equal stretches of what is held (`index`, which thins what is old
    again and again) or of the stream (`time`). The step is the clip: a step is thinned when it is over, so any cut that
    ends where clips end gives the same.

    A question (`state.question()`) reads prompt, recent frames, and pages of `page` older tokens, by its attention to
    the pages' mean keys. Keys are kept un-rotated: the mean of neighbours that were rotated far from each other is
    nobody's (64.8 against 68.1 on MLVU). positions: places in the cache, or in the stream.

    This is version 2 of the paper; version 1 merges within frames. The official code could not be read. Ours, where
    the paper is silent: heads share a selection; observers attend causally and are at most the recent tokens; a page's
    attention is a softmax over pages; observe, and the kept prompt (14 tokens: head of a Qwen2 chat).
    """
    if bucket_by not in ("index", "time") or positions not in ("packed", "stream"):
        raise ValueError(
            f"bucket_by is {bucket_by!r}, positions {positions!r}; use 'index' or 'time', 'packed' or 'stream'"
        )
    recent, clip, packed = recent_frames * frame, clip_frames * frame, positions == "packed"
    place = Contiguous() if packed else Absolute()
    return Memory(
        sink=prompt,
        evict=Never(room=cache_size + recent + clip),
        fold=Thinned(
            cache_size, recent, clip, scatter_ratio, capacity, min(observe, recent), bucket_by == "time", packed
        ),
        recall=Pages(recent, page, retr_ratio, place),
        place=place,
    )
