"""Reward Forcing: the last frames, and first frames that become the moving average of all that has left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import EMPTY, FOLDED, Contiguous, Fold, Geometry, Memory, Oldest, View
from ..memory.arena import gathered
from .registry import register


@dataclass(frozen=True)
class IntoSink(Fold):
    """The EMA sink: a token that leaves is averaged, un-rotated, into the sink token at its place in the chunk.

    alpha: what the sink keeps of itself each time. Half-precision memories carry what rounding took off the sink in
    float32: a step of 0.001 is below the resolution of bfloat16, and the sink would never move.
    """

    alpha: float

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        if geometry.dtype.itemsize > 2:
            return {}
        shape = geometry.batch, geometry.kv_heads, 0
        return {
            "keys": torch.zeros(*shape, geometry.head_dim, dtype=torch.float32),
            "values": torch.zeros(*shape, geometry.value_dim, dtype=torch.float32),
        }

    def leave(self, view: View, leaving: Tensor) -> None:
        behind = view.consumed + view.coming - view.consumed.clamp_min(view.sink)
        if view.window is not None and bool((behind > view.window).any()):
            raise ValueError(
                f"a step brings {view.m // view.frame} frames, more than the {view.window // view.frame} that the window "
                "has beside the sink, so that some would be folded unseen; feed shorter steps"
            )
        most = int(leaving.sum(-1).max())
        if not most:
            return
        # Oldest first. What leaves is one stretch of the stream, so that any `sink` neighbours have places of their own.
        columns = torch.where(leaving, view.index, torch.iinfo(torch.int64).max).argsort(-1)[..., :most]
        index = gathered(view.index, columns)
        there = gathered(leaving, columns)
        place = (index[..., :1] + torch.arange(most, device=index.device)) % view.sink
        into = torch.arange(view.sink, device=index.device)
        folded = torch.zeros_like(view.index[..., : view.sink], dtype=torch.bool)
        made = {}
        for name, x in (("keys", view.keys), ("values", view.values)):
            sink, gone = x[:, :, : view.sink], gathered(x, columns)
            if name in view.mine:
                lost = view.mine[name]
                sink, gone = sink.float() + (lost if lost.shape[2] else 0), gone.float()
            for start in range(0, most, view.sink):
                part = slice(start, start + view.sink)
                at = place[..., part]
                old = gathered(sink, at)
                new = torch.where(there[..., part, None], self.alpha * old + (1 - self.alpha) * gone[:, :, part], old)
                sink = sink.scatter(2, at[..., None].expand_as(new), new)
                folded = folded.scatter(2, at, gathered(folded, at) | there[..., part])
            made[name] = sink.to(x.dtype)
            if name in view.mine:
                view.mine[name] = sink - made[name].float()
        token = torch.where(
            into < (view.consumed + view.coming)[:, None, None], into, EMPTY
        )  # where nothing was folded
        folded = folded | (view.index[..., : view.sink] == FOLDED)
        view.write(into, made["keys"], made["values"], index=torch.where(folded, FOLDED, token))


@register(
    "reward-forcing",
    paper="Reward Forcing: Efficient Streaming Video Generation with Rewarded Distribution Matching Distillation, "
    "arXiv 2512.04678",
    claims=("reward-forcing",),
)
def reward_forcing(
    *, window: int = 9, sink: int = 3, alpha: float = 0.999, chunk: int = 3, frame: int | None = None
) -> Memory:
    """The last `window` frames, among them the chunk being generated and `sink` frames that average what has left.

    The sink begins as the first frames. When a chunk pushes frames out of the window, at its first pass, each is
    averaged into the sink, keys and values, token by token: S ← alpha · S + (1 − alpha) · what leaves (section on
    EMA-Sink), and the chunk sees the sink that has been updated. So the sink forgets by half in ln ½ / ln alpha chunks,
    693 as released. alpha = 1 is a static sink, alpha = 0 a plain window. Keys are averaged un-rotated and stand at
    their places in the cache, 0 to `window` − 1, however long the stream.

    The released code overwrites the head of the sink when what leaves is not exactly as long as the sink; here frame t
    goes into sink frame t mod `sink`, the same thing where the lengths agree. In its training configuration nothing
    ever leaves, so that the average acts at inference alone. The paper's other half, the rewarded distillation, is
    training and no matter of memory.
    """
    if sink < 1:
        raise ValueError(f"sink is {sink}; what leaves is averaged into it, so it must be 1 frame or more")
    if window <= sink:
        raise ValueError(f"window is {window}; it counts the {sink} sink frames, so it must be larger")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is the share that a sink keeps, from 0 to 1")
    return Memory(
        sink=sink, window=window - sink, evict=Oldest(with_fresh=True), fold=IntoSink(alpha), place=Contiguous(),
        frame=frame, chunk=chunk, inside="both",
    )  # fmt: skip
