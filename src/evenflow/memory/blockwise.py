"""Networks that see a block of a stream and a few around it: the same whatever pieces the stream comes in.

A block-wise encoder sees each block alone; a layer with a block mask sees `back` blocks before and `ahead` after its own;
a decoder runs over a window and keeps its middle. All are one operator, `Windowed`: `step(chunk, state) → output,
state`, `flush(state)` at the end, `reset()` for the start. States are never written to: keep one to come back to it.

Source: Qwen2.5-Omni, arXiv 2503.20215, sections on audio and video encoding and on streaming codec generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .keyed import keyed


@dataclass(frozen=True)
class Part:
    """Which items of a window are its own: start … stop − 1; the window's first one is item `first` of the stream."""

    first: int
    start: int
    stop: int


Function = Callable[[Tensor, Part], Tensor]
S = TypeVar("S")


class Operator(Protocol[S]):
    """What all of these share, whatever their state is."""

    @property
    def look_ahead(self) -> int:
        """How many later items an item waits for, at most."""

    @property
    def reach(self) -> int:
        """How many items back its output depends on, at most."""

    def reset(self) -> S:
        """The state at the start of a stream."""

    def step(self, items: Tensor, state: S) -> tuple[Tensor | None, S]:
        """What can be told after more items; None: nothing yet."""

    def flush(self, state: S) -> tuple[Tensor | None, S]:
        """What is still open, at the end of a stream; then it begins anew."""


@dataclass(frozen=True, eq=False)
class WindowState:
    """held: the last items, [B, n, …], of which the last is item `seen` − 1. done: items whose output is out."""

    held: Tensor | None = None
    seen: int = 0
    done: int = 0

    @property
    def position(self) -> int:
        """Items that came."""
        return self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return 0 if self.held is None else self.held.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        held = {} if self.held is None else {"held": self.held.clone()}
        return {"seen": torch.tensor(self.seen), "done": torch.tensor(self.done)} | held


@dataclass(frozen=True)
class Windowed:
    """`function` over each chunk of a stream, with some items before and after it.

    function(window, part) → the output of the window's own items alone, [B, (stop − start)·rate, …], from window
    [B, n, …]. chunk: items that come out together; the last chunk of a stream may be shorter. past, future: items that
    are seen around it, as far as there are any. rate: outputs an item.

    An output depends on nothing beyond its window, and is out as soon as that is there.
    """

    function: Function
    chunk: int
    past: int = 0
    future: int = 0
    rate: int = 1

    def __post_init__(self) -> None:
        for name, least in {"chunk": 1, "past": 0, "future": 0, "rate": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")

    @property
    def look_ahead(self) -> int:
        """How many later items an item waits for, at most."""
        return self.chunk - 1 + self.future

    @property
    def reach(self) -> int:
        """How many items back its output depends on, at most."""
        return self.chunk - 1 + self.past

    def reset(self) -> WindowState:
        """The state at the start of a stream."""
        return WindowState()

    def step(self, items: Tensor, state: WindowState) -> tuple[Tensor | None, WindowState]:
        """What can be told after more items [B, t, …], [B, n·rate, …]; None: nothing yet.

        Raises ValueError for items of another shape, dtype or device than before, or that are no numbers.
        """
        held = self._joined(items, state)
        seen = state.seen + items.shape[1]
        ready = max(0, (seen - self.future) // self.chunk) * self.chunk
        return self._out(held, seen, state.done, max(ready, state.done))

    def flush(self, state: WindowState) -> tuple[Tensor | None, WindowState]:
        """The outputs of all items that are still open, at the end of a stream; then it begins anew."""
        if state.held is None:
            return None, self.reset()
        out, _ = self._out(state.held, state.seen, state.done, state.seen)
        return out, self.reset()

    def whole(self, items: Tensor) -> Tensor:
        """The output of a stream [B, n, …] that is all there, n > 0."""
        return torch.cat(list(self._windows(items, items.shape[1], 0, items.shape[1])), 1)

    def truncate(self, state: WindowState, n: int) -> WindowState:
        """The state without the last `n` items. Raises ValueError where an output that is out has seen them."""
        used = min(state.seen, state.done + self.future) if state.done else 0
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= state.seen - used:
            raise ValueError(
                f"cannot undo {n!r} of {state.seen} items: what is out has seen the first {used}; keep an earlier state"
            )
        if not n or state.held is None:
            return state
        return replace(state, held=state.held[:, : state.held.shape[1] - n], seen=state.seen - n)

    def load(self, state: Mapping[str, Tensor]) -> WindowState:
        """The state that `WindowState.state_dict` gave. Raises ValueError where it is none of this operator."""
        if set(state) not in ({"seen", "done"}, {"seen", "done", "held"}):
            raise ValueError(f"state holds {sorted(state)}; expected seen, done and, once there are items, held")
        held, seen, done = state.get("held"), int(state["seen"]), int(state["done"])
        if not 0 <= done <= seen or (seen > 0) != (held is not None):
            raise ValueError(f"state tells of {seen} items, {done} done; that is no state of a stream")
        wanted = seen - max(0, done - self.past)
        if held is not None and (held.ndim < 2 or held.shape[1] != wanted):
            raise ValueError(f"held is {tuple(held.shape)}; after {seen} items, {done} done, it is [B, {wanted}, …]")
        return WindowState(None if held is None else held.clone(), seen, done)

    def _joined(self, items: Tensor, state: WindowState) -> Tensor:
        if items.ndim < 2:
            raise ValueError(f"items are {tuple(items.shape)}; expected [B, t, …]")
        if not bool(items.isfinite().all()):
            raise ValueError("items hold NaN or infinity; nothing was taken")
        held = state.held
        if held is None:
            return items
        shapes = (held.shape[0], *held.shape[2:]), (items.shape[0], *items.shape[2:])
        if shapes[0] != shapes[1] or held.dtype != items.dtype or held.device != items.device:
            raise ValueError(
                f"items are {items.dtype} {tuple(items.shape)} on {items.device}; those before were {held.dtype} "
                f"{tuple(held.shape)} on {held.device}"
            )
        return torch.cat([held, items], 1)

    def _out(self, held: Tensor, seen: int, done: int, stop: int) -> tuple[Tensor | None, WindowState]:
        outs = list(self._windows(held, seen, done, stop))
        keep = seen - max(0, stop - self.past)
        kept = held if keep == held.shape[1] else held[:, held.shape[1] - keep :].clone()
        return (torch.cat(outs, 1) if outs else None), WindowState(kept, seen, stop)

    def _windows(self, held: Tensor, seen: int, done: int, stop: int) -> Iterator[Tensor]:
        first = seen - held.shape[1]  # the stream's number of what is held first
        for start in range(done, stop, self.chunk):
            end = min(start + self.chunk, stop)
            left, right = max(0, start - self.past), min(seen, end + self.future)
            part = Part(left, start - left, end - left)
            out = self.function(held[:, left - first : right - first], part)
            if out.shape[1] != (end - start) * self.rate:
                raise ValueError(
                    f"a window gave {out.shape[1]} outputs; expected {self.rate} for each of its own {end - start} items"
                )
            yield out


@dataclass(frozen=True)
class Stacked:
    """Layers one upon another, each a `Windowed` of the same chunk that sees whole chunks around: a network in blocks.

    Its look-ahead and reach are what the layers' add up to; each block of each layer is computed once.
    """

    layers: tuple[Windowed, ...] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        chunks = {layer.chunk for layer in self.layers}
        if len(chunks) != 1 or any(x.rate != 1 or x.past % x.chunk or x.future % x.chunk for x in self.layers):
            raise ValueError(
                f"layers have chunks of {sorted(chunks)}; they must share one, see whole chunks, and give an output an item"
            )

    @classmethod
    def of(
        cls, functions: Sequence[Function], block: int, back: Mapping[int, int] | None = None,
        ahead: Mapping[int, int] | None = None,
    ) -> Stacked:  # fmt: skip
        """Layers over blocks of `block` items, which see so many blocks back and ahead, by number of the layer; else none."""
        back, ahead = back or {}, ahead or {}
        return cls(
            tuple(
                Windowed(function, block, back.get(n, 0) * block, ahead.get(n, 0) * block)
                for n, function in enumerate(functions)
            )
        )

    @property
    def look_ahead(self) -> int:
        """How many later items an item waits for, at most."""
        return self.layers[0].chunk - 1 + sum(layer.future for layer in self.layers)

    @property
    def reach(self) -> int:
        """How many items back its output depends on, at most."""
        return self.layers[0].chunk - 1 + sum(layer.past for layer in self.layers)

    def reset(self) -> tuple[WindowState, ...]:
        """The state at the start of a stream: one for each layer."""
        return tuple(layer.reset() for layer in self.layers)

    def step(self, items: Tensor, state: tuple[WindowState, ...]) -> tuple[Tensor | None, tuple[WindowState, ...]]:
        """What can be told after more items [B, t, D]; None: nothing yet."""
        out: Tensor | None = items
        after = list(state)
        for n, layer in enumerate(self.layers):
            if out is None:
                break
            out, after[n] = layer.step(out, after[n])
        return out, tuple(after)

    def flush(self, state: tuple[WindowState, ...]) -> tuple[Tensor | None, tuple[WindowState, ...]]:
        """The outputs of all items that are still open, at the end of a stream; then it begins anew."""
        coming: Tensor | None = None
        for layer, own in zip(self.layers, state, strict=True):
            before = None
            if coming is not None:
                before, own = layer.step(coming, own)
            last, _ = layer.flush(own)
            some = [out for out in (before, last) if out is not None]
            coming = torch.cat(some, 1) if some else None
        return coming, self.reset()

    def whole(self, items: Tensor) -> Tensor:
        """The output of a stream [B, n, D] that is all there."""
        for layer in self.layers:
            items = layer.whole(items)
        return items


def block_mask(n: int, block: int, back: int = 0, ahead: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Bool [n, n]: whether a query (row) sees a key: one of its own block, `back` blocks before or `ahead` after it."""
    number = torch.arange(n, device=device) // block
    apart = number[None, :] - number[:, None]
    return (apart >= -back) & (apart <= ahead)


def noise_at(seed: int, first: int, count: int, shape: Sequence[int] = (), block: int = 24) -> Tensor:
    """Gaussian noise of items first … first + count − 1 of one endless field, float32 [count, *shape] on the CPU.

    It is drawn by blocks of `block` items, keyed by (seed, block): windows that overlap have the same noise there.
    """
    if first < 0 or count < 0 or block < 1:
        raise ValueError(f"first is {first}, count {count}, block {block}; take 0, 0 and 1, or more")
    start, stop = first // block, -(-(first + count) // block)
    drawn = [torch.randn(block, *shape, generator=keyed(seed, number)) for number in range(start, stop)]
    return torch.cat(drawn)[first - start * block :][:count] if drawn else torch.empty(0, *shape)
