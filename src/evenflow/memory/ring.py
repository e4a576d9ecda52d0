"""A ring of slots: the newest tokens, each written once and never moved.

Softmax does not care in which order keys are summed once they carry their rotation, so a decode step overwrites the slot
of the one token that no later query can see, and copies nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 1 << 21  # elements


def empty_slots(batch: int, heads: int, slots: int, dim: int, like: Tensor) -> Tensor:
    """Room for keys or values, [batch, heads, slots, dim], in the dtype and on the device of `like`.

    In large ones on the CPU each channel's slots lie side by side, so that a single query runs over them at the speed
    of the memory (see `softmax_attention`). Zeros, not garbage: a slot that is not filled yet is masked by adding −∞,
    which would keep a NaN.
    """
    single = like.dtype in (torch.float32, torch.float64)
    if like.device.type == "cpu" and single and batch * heads * slots * dim >= LARGE:
        return like.new_zeros(batch, heads, dim, slots).transpose(2, 3)
    return like.new_zeros(batch, heads, slots, dim)


class Ring:
    """Keys and values of the last `size` tokens before the fresh one, and of the fresh one.

    sink: stream indices below it live in the head slots, not in the ring. head: number of slots in front of the ring
    that belong to the memory (sinks, folded tokens, null key). size: tokens kept (None: all; the ring then never
    wraps, and doubles when full).
    """

    def __init__(
        self, sink: int, head: int, size: int | None, batch: int, heads: int, key_dim: int, value_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.sink, self.head, self.size = sink, head, size
        self.slots = 256 if size is None else size + 1
        like = torch.empty(0, dtype=dtype, device=device)
        self.keys = empty_slots(batch, heads, head + self.slots, key_dim, like)
        self.values = empty_slots(batch, heads, head + self.slots, value_dim, like)
        self._arange = torch.arange(self.slots, device=device)

    def reserve(self, tokens: int) -> None:
        """Grow an unbounded ring so that it holds `tokens` tokens; a bounded one always does."""
        if self.size is not None or tokens <= self.slots:
            return
        slots = max(tokens, 2 * self.slots)
        with torch.inference_mode(False):
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = empty_slots(old.shape[0], old.shape[1], self.head + slots, old.shape[3], old)
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)
            self._arange = torch.arange(slots, device=self._arange.device)
        self.slots = slots

    def index(self, consumed: Tensor) -> Tensor:
        """Stream index in each ring slot, int64 [R, slots], −1 where none, after `consumed` [R] tokens."""
        last = consumed[:, None] - 1
        if self.size is None:
            index = (self.sink + self._arange).expand(len(consumed), -1)
            return torch.where(index <= last, index, -1)
        index = last - (last - self.sink - self._arange) % self.slots
        return torch.where(index >= self.sink, index, -1)

    def slot(self, index: Tensor) -> Tensor:
        """Where the ring tokens with stream indices `index` (int64, any shape, all ≥ sink) are kept."""
        offset = index - self.sink
        return self.head + (offset if self.size is None else offset % self.slots)
