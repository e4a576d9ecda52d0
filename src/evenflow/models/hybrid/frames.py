"""A session of a network with fast weights, whose convolution looks one frame ahead in every such layer.

What a layer says of a frame needs the frame after it, so with n such layers the network's output comes n frames late, and
`flush` brings what is still under way, as a film's last frame is convolved as if it were repeated. Nothing else differs
from reading the whole film at once: the session is exact, not an approximation that sees less. Words end a film.

Source: Spatial-TTT, arXiv 2603.12255; of its ways to stream a film, the one that waits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...memory import Memory, MemoryState, Timeless
from ...memory.fast_weights import FastState, frame_convolution
from ...memory.rope import Rotary
from .fast import FastLayer
from .network import Block, Hybrid, WindowLayer

Kept = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Waiting:
    """The newest frame of a film in one layer: its input x [B, n, dim], its places int64 [n, 3], and the tails of the
    three convolutions, [B, 2, rows, columns, channels] each."""

    x: Tensor
    places: Tensor
    tails: Kept


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer keeps beside its keys: fast weights, if it has them, and the frame that waits, in a film."""

    fast: FastState | None = None
    waiting: Waiting | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """A moment that can be gone back to. Memories are copies that nobody writes to; layers are never written to."""

    memories: tuple[MemoryState, ...]
    layers: tuple[Layer, ...]
    position: int
    free: int
    grid: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Given:
    """What came at a position: x [B, m, dim], places int64 [m, 3], and the rows and columns of frames; None: words."""

    position: int
    x: Tensor
    places: Tensor
    grid: tuple[int, int] | None


class FrameSession:
    """One endless stream (or a batch in step) of frames and words through a `Hybrid` with fast weights.

    undo: how many of the last tokens `truncate` can take back for certain, at the cost of a copy every `undo` tokens and of
    what came since; 0 refuses. anchor: how many tokens layers that attend everything keep, so that all is bounded; None,
    as published: they grow with the stream. Raises ValueError for a network without fast weights, or with delta layers.
    """

    _now: Moment
    _marks: list[Moment]
    _log: list[Given]

    def __init__(self, model: Hybrid, batch: int = 1, undo: int = 0, anchor: int | None = None) -> None:
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of tokens, 0 or more")
        c, weight = model.config, model.embedding.weight
        if "delta" in c.kinds:
            raise ValueError(f"{c.name} has delta layers, which wait for no frame; see HybridSession")
        if "fast" not in c.kinds:
            raise ValueError(f"{c.name} has no layers with fast weights; see HybridSession")
        self.model, self.batch, self.undo, self.anchor = model, batch, undo, anchor
        self._like = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim, "rope": c.rope}
        self._like |= {"batch": batch, "dtype": weight.dtype, "device": weight.device, "layers": 1}
        kept = {"full": Memory(window=anchor, place=Timeless(), name="anchor")}
        self._kept = [kept.get(kind, c.memory) for kind in c.kinds]
        self._rotary = Rotary(c.rope, c.head_dim, weight.dtype, weight.device)
        self.reset()

    @property
    def look_ahead(self) -> int:
        """Frames by which the output of a film is late."""
        return sum(kind == "fast" for kind in self.model.config.kinds)

    @property
    def position(self) -> int:
        """Tokens that have come; of a film, the last frames may still be under way."""
        return self._now.position

    @property
    def nbytes(self) -> int:
        """Bytes of keys, fast weights, frames under way, and what is kept for undoing."""
        tensors = [x for moment in (self._now, *self._marks) for x in _tensors(moment)]
        logged = [x for given in self._log for x in (given.x, given.places)]
        memories = (memory for moment in (self._now, *self._marks) for memory in moment.memories)
        return sum({id(x): x.nbytes for x in (*tensors, *logged)}.values()) + sum(m.nbytes for m in memories)

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see(self, frames: Tensor, places: Tensor | None = None) -> Tensor:
        """The next frames of a film, features [B, n, rows, columns, dim]; hidden vectors [B, k, dim] of as many as are whole.

        places: int64 [n · rows · columns, 3], time, row and column; None: frames stand one behind the other in time, rows
        and columns from where the film begins. Raises ValueError for what does not fit, and is then as it was.
        """
        dim = self.model.config.dim
        if frames.ndim != 5 or len(frames) != self.batch or frames.shape[4] != dim or not frames.shape[1]:
            raise ValueError(f"frames are {tuple(frames.shape)}; expected [{self.batch}, n, rows, columns, {dim}]")
        grid = (frames.shape[2], frames.shape[3])
        if self._now.grid not in (None, grid):
            raise ValueError(f"frames of {grid} in a film of {self._now.grid}; end it with `flush` first")
        x, n = self._checked(frames.flatten(1, 3)), frames.shape[1]
        if places is None:
            places = self._film_places(n, grid)
        return self._take(Given(self.position, x, self._placed(places, x.shape[1]), grid))

    @torch.no_grad()
    def flush(self) -> Tensor:
        """End the film: hidden vectors [B, k, dim] of all that was under way; none where no film goes on."""
        before = self._now
        out, self._now = self._ended(before)
        if self.undo and before.grid is not None:
            nothing = out[:, :0]
            self._remember(Given(before.position, nothing, torch.zeros(0, 3, dtype=torch.int64), None))
        return self.model.norm(out)

    @torch.no_grad()
    def feed(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Read words, int64 [m] or [B, m]: logits [B, m, vocabulary]. A film that goes on ends first, see `flush`, whose
        output is to be had before.

        places: int64 [m, 3]; None: words go on behind the largest place so far.
        """
        ids = ids[None] if ids.ndim == 1 else ids
        table = self.model.embedding
        if ids.ndim != 2 or len(ids) != self.batch or ids.is_floating_point() or not ids.shape[1]:
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}; expected whole numbers [{self.batch}, m]")
        if not bool(((ids >= 0) & (ids < len(table.weight))).all()):
            raise ValueError(f"ids must be 0 to {len(table.weight) - 1}; got {int(ids.min())} to {int(ids.max())}")
        if places is None:
            places = torch.arange(self._now.free, self._now.free + ids.shape[1])[:, None].expand(-1, 3)
        given = Given(self.position, table(ids), self._placed(places, ids.shape[1]), None)
        return self.model.logits(self._take(given))

    def _checked(self, x: Tensor) -> Tensor:
        weight = self.model.embedding.weight
        if x.dtype != weight.dtype:
            raise ValueError(f"features are {x.dtype}; the model's dtype is {weight.dtype}")
        if not bool(x.isfinite().all()):
            raise ValueError("features hold NaN or infinity, expected finite numbers; nothing was read of them")
        return x

    def _placed(self, places: Tensor, m: int) -> Tensor:
        if places.is_floating_point() or tuple(places.shape) != (m, 3):
            raise ValueError(f"places are {places.dtype} {tuple(places.shape)}; expected whole numbers [{m}, 3]")
        return places.to(self.model.embedding.weight.device, torch.int64).clone()

    def _film_places(self, n: int, grid: tuple[int, int]) -> Tensor:
        first = self._now.layers[self._first].waiting if self._now.grid is not None else None
        row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        if first is None:
            base, time = torch.full((2,), self._now.free), self._now.free
        else:  # the frame before stands one earlier, at the same rows and columns
            base, time = first.places[0, 1:].cpu(), int(first.places[0, 0]) + 1
        flat = torch.stack([row.flatten() + base[0], column.flatten() + base[1]], 1).repeat(n, 1)
        times = torch.arange(time, time + n).repeat_interleave(grid[0] * grid[1])
        return torch.cat([times[:, None], flat], 1)

    @property
    def _first(self) -> int:
        return self.model.config.kinds.index("fast")

    def _take(self, given: Given) -> Tensor:
        if given.grid is None:
            _, self._now = self._ended(self._now)
        out, now = self._through(self._now, given.x, given.places, given.grid, end=False)
        free = max(now.free, int(given.places.max()) + 1)
        self._now = replace(now, position=now.position + given.x.shape[1], free=free, grid=given.grid)
        self._remember(given)
        return self.model.norm(out)

    def _ended(self, now: Moment) -> tuple[Tensor, Moment]:
        """What is under way, and the moment after it."""
        weight = self.model.embedding.weight
        nothing = weight.new_zeros(self.batch, 0, self.model.config.dim)
        if now.grid is None:
            return nothing, now
        out, after = self._through(
            now, nothing, torch.zeros(0, 3, dtype=torch.int64, device=weight.device), now.grid, end=True
        )
        return out, replace(after, grid=None)

    def _through(
        self, now: Moment, x: Tensor, places: Tensor, grid: tuple[int, int] | None, end: bool
    ) -> tuple[Tensor, Moment]:
        """All layers, each of which may hold a frame back, or let it go where the film ends. All or nothing."""
        layers = []
        with ExitStack() as steps:
            for number, (memory, layer) in enumerate(zip(now.memories, now.layers, strict=True)):
                block = cast(Block, self.model.blocks[number])
                waits = isinstance(block.mixer, FastLayer) and grid is not None
                whole, wide, waiting = x, None, layer.waiting
                if waits:
                    whole, wide, places, waiting = self._released(block, layer.waiting, x, places, cast(Any, grid), end)
                fast = layer.fast
                if whole.shape[1]:
                    steps.enter_context(memory.step(whole.shape[1], tags={"coordinates": places}))
                    x, fast = self._block(block, memory, whole, wide, places, fast)
                else:
                    x = whole
                layers.append(Layer(fast, waiting))
            if not bool(x.isfinite().all()):
                raise ValueError("what layers say is no number; nothing was stored")
        return x, replace(now, layers=tuple(layers))

    def _released(
        self, block: Block, waiting: Waiting | None, x: Tensor, places: Tensor, grid: tuple[int, int], end: bool
    ) -> tuple[Tensor, list[Tensor], Tensor, Waiting | None]:
        """The frames whose successors have come: inputs, what the convolutions say of them, places; and what waits now."""
        layer, frame = cast(FastLayer, block.mixer), grid[0] * grid[1]
        known = x if waiting is None else torch.cat([waiting.x, x], 1)
        at = places if waiting is None else torch.cat([waiting.places, places])
        if not known.shape[1]:
            return known, [], at, None
        shown, tails = [list[Tensor]() for _ in layer.conv], list(waiting.tails if waiting else ())
        if x.shape[1]:
            fresh = layer.widened(*layer.projected(block.norm(x)))
            for n, (one, weight) in enumerate(zip(fresh, layer.conv, strict=True)):
                some, tail = frame_convolution(one.unflatten(1, (-1, *grid)), weight, tails[n] if waiting else None)
                shown[n].append(some)
                tails[n : n + 1] = [tail]
        if end:
            for n, weight in enumerate(layer.conv):
                again = tails[n][:, -1:]  # the last frame, as if it were repeated
                shown[n].append(frame_convolution(again, weight, tails[n])[0])
        wide = [torch.cat(parts, 1).flatten(1, 3) for parts in shown]
        if end:
            return known, wide, at, None
        return known[:, :-frame], wide, at[:-frame], Waiting(known[:, -frame:], at[-frame:], tuple(tails))

    def _block(
        self,
        block: Block,
        memory: MemoryState,
        x: Tensor,
        wide: Sequence[Tensor] | None,
        places: Tensor,
        fast: FastState | None,
    ) -> tuple[Tensor, FastState | None]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return memory.attend(0, q, k, v)

        if not isinstance(block.mixer, FastLayer):
            return block.fed(x + cast(WindowLayer, block.mixer)(block.norm(x), attend)), None
        angles = self._rotary.at(torch.cat([torch.zeros_like(places[:, :1]), places], 1))
        h = block.norm(x)
        heads = block.mixer.projected(h)
        wide = block.mixer.widened(*heads) if wide is None else wide
        turn = partial(self._turned, angles)
        y, fast = block.mixer.read(h, heads, wide, attend, turn, cast(FastState, fast))
        return block.fed(x + y), fast

    def _turned(self, angles: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return self._rotary.rotate(x, *angles)

    # -- undo, copy, forget, save ------------------------------------------------------------------------------------

    def _remember(self, given: Given) -> None:
        """Take a mark when the last one is `undo` tokens old, and let go of what no undoing needs."""
        if not self.undo:
            return
        self._log = [*self._log, replace(given, x=given.x.clone())]
        if self.position - self._marks[-1].position >= self.undo:
            self._marks = [*self._marks, _copied(self._now)]
        while len(self._marks) > 1 and self._marks[1].position <= self.position - self.undo:
            self._marks = self._marks[1:]
        self._log = [one for one in self._log if one.position >= self._marks[0].position]

    def truncate(self, n: int) -> None:
        """Undo the last n tokens, exactly: by going back to a mark, and reading again what came since.

        A film that was ended behind the last token that stays goes on again. Raises ValueError, with the reason, where no
        mark is as old, or where a frame would be cut.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.position:
            raise ValueError(f"cannot undo {n!r} tokens; {self.position} have come")
        if not n:
            return
        target = self.position - n
        old = [number for number, mark in enumerate(self._marks) if mark.position <= target]
        if not old:
            raise ValueError(
                f"cannot undo {n} tokens: fast weights do not tell what went into them, and this session keeps what "
                f"{self.undo} tokens need; open it with a larger undo, or fork before"
            )
        mark = self._marks[old[-1]]
        since = [one for one in self._log if one.position >= mark.position and one.position < target]
        for one in since:
            frame = one.grid[0] * one.grid[1] if one.grid else 1
            if (target - one.position) % frame and target < one.position + one.x.shape[1]:
                raise ValueError(f"cannot undo {n} tokens: a frame of {frame} would be cut")
        twin = copy.copy(self)
        twin._now, twin._marks, twin._log = _copied(mark), self._marks[: old[-1] + 1], []
        twin._log = [one for one in self._log if one.position < mark.position]
        for one in since:
            stop = min(one.x.shape[1], target - one.position)
            if not one.x.shape[1]:
                if one.grid is None:
                    twin.flush()
            else:
                twin._take(replace(one, x=one.x[:, :stop], places=one.places[:stop]))
        self._now, self._marks, self._log = twin._now, twin._marks, twin._log

    def fork(self) -> FrameSession:
        """An independent copy; what happens to one is never seen by the other."""
        twin = copy.copy(self)
        twin._now = _copied(self._now)
        return twin

    def reset(self) -> None:
        """Forget everything."""
        blocks = (cast(Block, block).mixer for block in self.model.blocks)
        layers = tuple(Layer(one.empty(self.batch) if isinstance(one, FastLayer) else None) for one in blocks)
        with torch.no_grad():
            layers = tuple(replace(one, fast=None if one.fast is None else _detached(one.fast)) for one in layers)
        memories = tuple(memory.build(**self._like) for memory in self._kept)
        self._now = Moment(memories, layers, 0, 0, None)
        self._begin_marks()

    def _begin_marks(self) -> None:
        self._marks, self._log = ([_copied(self._now)] if self.undo else []), []

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, except what undoing needs: that begins anew."""
        now, said = self._now, dict[str, Any]()
        for n, (memory, layer) in enumerate(zip(now.memories, now.layers, strict=True)):
            said |= {f"{n}.memory.{name}": value for name, value in memory.state_dict().items()}
            if layer.fast is not None:
                said |= {f"{n}.fast.{name}": x for name, x in self.model.config.rule.packed(layer.fast).items()}
            if layer.waiting is not None:
                w = layer.waiting
                parts = {"x": w.x, "places": w.places} | {f"tail{m}": tail for m, tail in enumerate(w.tails)}
                said |= {f"{n}.waiting.{name}": x.clone() for name, x in parts.items()}
        numbers = [now.position, now.free, *(now.grid or (0, 0))]
        return said | {"numbers": torch.tensor(numbers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for key, value in state.items():
            number, _, rest = key.partition(".")
            what, _, name = rest.partition(".")
            groups.setdefault((number, what), {})[name] = value
        numbers = groups.pop(("numbers", ""), {}).get("")
        if numbers is None or tuple(numbers.shape) != (4,):
            raise ValueError("state does not fit: `numbers` is missing, or not four of them")
        begun = FrameSession(self.model, self.batch, anchor=self.anchor)
        layers = []
        for n, (memory, layer) in enumerate(zip(begun._now.memories, begun._now.layers, strict=True)):
            memory.load_state_dict(groups.pop((str(n), "memory"), {}))
            fast = layer.fast
            if fast is not None:
                fast = self.model.config.rule.unpacked(fast, groups.pop((str(n), "fast"), {}))
            held = groups.pop((str(n), "waiting"), None)
            waiting = None
            if held is not None:
                if set(held) != {"x", "places", "tail0", "tail1", "tail2"} or fast is None:
                    raise ValueError(f"state does not fit: layer {n} has {sorted(held)} of a frame that waits")
                tails = tuple(held[f"tail{m}"].clone() for m in range(3))
                waiting = Waiting(held["x"].clone(), held["places"].clone(), tails)
            layers.append(Layer(fast, waiting))
        if groups:
            raise ValueError(f"state does not fit: this session knows nothing of {sorted(groups)}")
        position, free, rows, columns = numbers.tolist()
        grid = (rows, columns) if rows else None
        self._now = Moment(begun._now.memories, tuple(layers), position, free, grid)
        self._begin_marks()


def _copied(moment: Moment) -> Moment:
    return replace(moment, memories=tuple(memory.fork() for memory in moment.memories))


def _tensors(moment: Moment) -> list[Tensor]:
    out = list[Tensor]()
    for layer in moment.layers:
        out += [] if layer.fast is None else layer.fast.tensors
        out += [] if layer.waiting is None else [layer.waiting.x, layer.waiting.places, *layer.waiting.tails]
    return out


def _detached(state: FastState) -> FastState:
    """First weights that whoever trains the model does not go on writing into."""
    w0, w1, w2 = state.weights
    return FastState.begin((w0[0].detach().clone(), w1[0].detach().clone(), w2[0].detach().clone()), len(w0))
