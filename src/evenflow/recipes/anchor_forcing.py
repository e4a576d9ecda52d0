"""Anchor Forcing: the first chunk of the video and the first one of each prompt, each region with its own positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import EMPTY, Absolute, AllHeld, Dropped, Fold, Geometry, Memory, Oldest, Recall, Regions, View
from .registry import register

FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Junctions(Fold):
    """The chunk that began a segment is copied when it is kept: its first `frames` frames, of the last two segments.

    The first segment of a stream has none: its first chunk is in the sinks.
    """

    frames: int

    def slots(self, frame: int) -> int:
        return 2 * self.frames * frame

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        return {name: torch.zeros(geometry.batch, dtype=torch.int64) for name in ("segment", "copied")}

    def arrive(self, view: View) -> None:
        tag = view.tags.get("segment")
        if view.recache or tag is None:
            return
        before, copied = view.mine["segment"], view.mine["copied"]
        rows, size = len(before), view.slots // 2
        fresh = torch.where(view.fresh, view.index, FAR)[:, :1].expand(rows, -1, -1)
        order = fresh.argsort(-1)
        now = tag[:, :1].expand(rows, -1, -1).gather(-1, order)[:, 0, 0].to(before)
        now = torch.where(fresh.amin((1, 2)) < FAR, now, before)  # a row that brings nothing stays in its segment
        begins = (now != before) & (view.consumed > 0)
        view.mine |= {"segment": now, "copied": copied + begins}
        if not bool(begins.any()):
            return
        # The older of two blocks is overwritten; in rows where no segment begins, with what it holds.
        begins = begins[:, None, None]
        block = view.sink + (copied % 2)[:, None, None] * size + torch.arange(size, device=copied.device)
        source = torch.where(begins, order[..., :size], block)

        def there(x: Tensor) -> Tensor:
            at = source.reshape(rows, 1, size, *[1] * (x.ndim - 3)).expand(rows, x.shape[1], -1, *x.shape[3:])
            return x.expand(rows, *x.shape[1:]).gather(2, at)

        beyond = begins & (there(fresh) == FAR)  # a chunk shorter than a junction
        index, tags = there(view.index[:, :1]), {name: there(tag[:, :1]) for name, tag in view.tags.items()}
        view.write(block, there(view.keys), there(view.values), index=torch.where(beyond, EMPTY, index), tags=tags)


@dataclass(frozen=True)
class NewestThatLeft(Recall):
    """Sinks, window, and of the junctions the newest whose chunk has left the window."""

    def among(self, view: View) -> Tensor | None:
        first = (view.consumed + view.m - (view.window or 0))[:, None, None]
        last = view.index[..., view.sink : view.sink + view.slots].unflatten(-1, (2, -1)).amax(-1)
        last = torch.where(last < first, last, EMPTY)
        used = (last == last.amax(-1, keepdim=True)) & (last >= 0)
        seen = torch.ones_like(view.index, dtype=torch.bool)
        seen[..., view.sink : view.sink + view.slots] = used.repeat_interleave(view.slots // 2, -1)
        return seen


@register(
    "anchor-forcing",
    paper="Anchor Forcing: Anchor Memory and Tri-Region RoPE for Interactive Streaming Video Diffusion, arXiv 2603.13405",
    claims=("anchor-forcing",),
)
def anchor_forcing(
    *, window: int = 12, sink: int = 3, junction: int = 3, trained: int = 21, rope_enhance: bool = True,
    chunk: int = 3, frame: int | None = None,
) -> Memory:  # fmt: skip
    """LongLive's sink and window, and the chunk that came first after a prompt switch, once the window has lost it.

    Tokens say which prompt they belong to by the tag `segment`; the first chunk of another one is a switch. Before it
    the caller computes the window anew with `state.recache`, which sees the junction in use (the warm start) and copies
    none. The clean pass of the new prompt's first chunk is copied, up to `junction` frames of it, un-rotated. Positions
    (rope_enhance): sinks from 0, the junction from trained − window − junction, the window up to `trained` − 1, the
    range of frames that the backbone was trained on. junction=0 is LongLive at these positions (the paper's
    use_prompt_cache off), and rope_enhance=False then LongLive itself.

    The official code overwrites the earlier junction in every call of the new one's chunk, so that it attends noisy
    copies of itself; here a junction is copied once, and the two last ones are kept. It lets the window lose a chunk 9
    frames after the switch was asked for; here, when no frame of the chunk is in it, the same chunk unless the request
    fell on a chunk's first frame. Where two switches are closer than the window, the newest junction that has left is
    in use; a third one lets the first go, and nothing is attended twice.
    """
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    if junction < 0 or (rope_enhance and trained < window + junction + sink):
        raise ValueError(
            f"junction is {junction} and trained {trained}: junction must be 0 or more, and window {window}, junction "
            f"and {sink} sinks must fit into the trained frames, or pass rope_enhance=False"
        )
    return Memory(
        sink=sink, window=window - sink, evict=Oldest(with_fresh=True), frame=frame, chunk=chunk, inside="both",
        fold=Junctions(junction) if junction else Dropped(),
        recall=NewestThatLeft() if junction else AllHeld(),
        place=Regions(trained, trained - window - junction, blocks=2) if rope_enhance else Absolute(),
    )  # fmt: skip
