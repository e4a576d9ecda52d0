"""LiveVLM: recent frames whole, older ones thinned by attention and by spread, and a question reads the pages it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..memory import EMPTY, Absolute, Contiguous, Fold, Memory, Never, Place, Recall, View
from ..memory.coverage import buckets, spread_best
from ..memory.layout import Geometry
from .registry import register


@dataclass(frozen=True)
class UntilThinned(Never):
    """Nothing leaves by itself; `room` slots hold what comes between two thinnings."""

    room: int

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        return sink + self.room


@dataclass(frozen=True)
class SinkBucketing(Fold):
    """After a clip, what is older than `recent` tokens is thinned to `keep`, by the attention of the newest queries.

    clip: tokens; thinning happens at the end of a step that reaches a multiple of it. share: how much of `keep` is for
    coverage. capacity: tokens of a bucket. observe: how many queries look, all of them among the recent. by_time: buckets
    are stretches of the stream, not of what is held. packed: positions are places in the cache.
    """

    keep: int
    recent: int
    clip: int
    share: float
    capacity: int
    observe: int
    by_time: bool
    packed: bool
    content: ClassVar[bool] = True

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        g = geometry
        return {"asked": torch.zeros(g.batch, g.heads, self.observe, g.head_dim, dtype=g.dtype, device=g.device)}

    def arrive(self, view: View) -> None:
        assert view.query is not None
        stream, after = view.stream, (view.consumed + view.coming)[:, None]
        runs = torch.nn.functional.pad(stream[:, 1:], (0, 1), value=-1) != stream
        valid = torch.cat([self._column(view) >= self.observe - view.consumed[:, None], runs & (stream < after)], 1)
        newest = valid.to(torch.uint8).argsort(dim=1, stable=True)[:, -self.observe :]
        newest = newest.expand(view.batch, -1)[:, None, :, None]
        queries = torch.cat([view.mine["asked"], view.query], 2)
        view.mine["asked"] = queries.gather(2, newest.expand(-1, queries.shape[1], -1, queries.shape[3]))

        old = (view.index >= view.sink) & (view.index < after[..., None] - self.recent)
        due = (after // self.clip > view.consumed[:, None] // self.clip)[..., None]
        old = old & due & (old.sum(-1, keepdim=True) > self.keep)
        if bool(old.any()):
            gone = old & ~self.chosen(view, old, after[..., None])
            columns = view.column.expand(*gone.shape)
            view.write(columns, index=torch.where(gone, EMPTY, view.index))

    def _column(self, view: View) -> Tensor:
        return torch.arange(self.observe, device=view.index.device)

    def chosen(self, view: View, old: Tensor, after: Tensor) -> Tensor:
        """Bool [B, 1, n]: which of `old` stay."""
        index = view.index
        order = torch.where(old, index, torch.iinfo(torch.int64).max).argsort(-1)
        there = old.gather(-1, order)
        if self.by_time:
            places, length = index.gather(-1, order) - view.sink + 1, after[..., 0] - self.recent - view.sink
        else:
            places, length = there.cumsum(-1), there.sum(-1)
        bucket = buckets(places, length, self.keep // self.capacity) * there
        scores = self.scores(view, after).gather(-1, order.expand(view.batch, -1, -1))
        kept = spread_best(
            scores, bucket, there, keep=self.keep, top=self.keep - math.floor(self.share * self.keep + 1e-9),
            capacity=self.capacity,
        )  # fmt: skip
        return torch.zeros_like(kept).scatter(-1, order.expand_as(kept), kept)

    def scores(self, view: View, after: Tensor) -> Tensor:
        """Mean attention of the last `observe` queries to every column, over queries and heads: [B, 1, n]."""
        g, asked = view.geometry, view.mine["asked"]
        places = view.rank() if self.packed else view.index
        stream = after - self.observe + self._column(view)  # [R, 1, observe]
        at = (view.index[..., None] == stream[:, :, None]).to(torch.uint8).argmax(2).expand(view.batch, g.heads, -1)
        spread = asked.new_zeros(*asked.shape[:2], view.index.shape[2], asked.shape[3])
        spread.scatter_(2, at[..., None].expand_as(asked), asked)
        query = view.turned(spread, places).gather(2, at[..., None].expand_as(asked))
        keys = view.turned(view.keys, places).repeat_interleave(g.heads // g.kv_heads, 1)
        logits = (query @ keys.transpose(-1, -2)).to(torch.promote_types(g.dtype, torch.float32)) * g.scale[view.layer]
        seen = (view.index != EMPTY)[:, :, None] & (view.index[:, :, None] <= stream[..., None])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        there = (stream >= 0).to(weights.dtype)[..., None]
        return ((weights.nan_to_num() * there).sum(2) / there.sum(2)).mean(1, keepdim=True)


@dataclass(frozen=True)
class Pages(Recall):
    """A question sees what is recent, and of what is older the pages whose mean un-rotated key it attends to most.

    page: tokens in one. ratio: share of the older tokens that is read. answer_place: where it all stands then.
    """

    recent: int
    page: int
    ratio: float
    answer_place: Place

    def retrieve(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.query is not None
        g, order = view.geometry, view.order().argsort(-1)
        index = view.index.gather(-1, order)[:, 0].expand(view.batch, -1)  # by stream index, nothing last
        order = order.expand(view.batch, g.kv_heads, -1)[..., None]
        keys, values = (x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (view.keys, view.values))
        old = (index >= view.sink) & (index < view.consumed[:, None] - self.recent)
        pages = -(-int(old.sum(-1).max()) // self.page)
        number = torch.where(old, (old.cumsum(-1) - 1) // self.page, pages)
        size = torch.zeros_like(index[:, :1]).expand(-1, pages + 1).scatter_add(-1, number, torch.ones_like(number))
        total = keys.new_zeros(*keys.shape[:2], pages + 1, keys.shape[3])
        total = total.scatter_add(2, number[:, None, :, None].expand_as(keys), keys)[:, :, :pages]
        size = size[:, :pages]
        means = (total / size.clamp_min(1)[:, None, :, None]).repeat_interleave(g.heads // g.kv_heads, 1)
        logits = (view.query @ means.transpose(-1, -2)).float() * g.scale[view.layer]
        empty = (size == 0)[:, None, None]
        scores = logits.masked_fill(empty, -torch.inf).softmax(-1).nan_to_num().mean((1, 2))

        best = scores.masked_fill(size == 0, -1).argsort(dim=-1, descending=True, stable=True)
        sizes = size.gather(-1, best)
        enough = self.ratio * size.sum(-1, keepdim=True) - 1e-9
        taken = torch.zeros_like(size, dtype=torch.bool).scatter(-1, best, sizes.cumsum(-1) - sizes < enough)
        taken = torch.nn.functional.pad(taken, (0, 1), value=True)
        kept = taken.gather(-1, number) & (index != EMPTY)
        front = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[:, : int(kept.sum(-1).max())]
        index = torch.where(kept, index, EMPTY).gather(-1, front)
        keys, values = (
            x.gather(2, front[:, None, :, None].expand(-1, g.kv_heads, -1, x.shape[3])) for x in (keys, values)
        )
        return keys, values, index


@register(
    "live-vlm",
    paper="LiveVLM: Efficient Online Video Understanding via Streaming-Oriented KV Cache and Retrieval, arXiv 2505.15269",
    claims=("live-vlm",),
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
    counts = (cache_size, recent_frames, clip_frames, capacity, observe, page, frame)
    if min(counts) < 1 or capacity > cache_size:
        raise ValueError("cache_size, recent_frames, clip_frames, capacity, observe, page and frame are 1 or more")
    if not 0 <= scatter_ratio <= 1 or not 0 <= retr_ratio <= 1:
        raise ValueError(f"scatter_ratio is {scatter_ratio}, retr_ratio {retr_ratio}; both are shares from 0 to 1")
    recent, clip, place = (
        recent_frames * frame,
        clip_frames * frame,
        Contiguous() if positions == "packed" else Absolute(),
    )
    return Memory(
        sink=prompt,
        evict=UntilThinned(cache_size + recent + clip),
        fold=SinkBucketing(
            cache_size, recent, clip, scatter_ratio, capacity, min(observe, recent), bucket_by == "time",
            positions == "packed",
        ),
        recall=Pages(recent, page, retr_ratio, place),
        place=place,
    )  # fmt: skip
