"""Frames through a door into a model's stream, one by one, and after each of them the question whether to speak.

    stream = ef.open(model, "streaming-llm(sink=4, window=8192)")
    watching = Watching(stream, "timechat-online(reference='last_kept')")
    for seen in watching.see(features, grid=(16, 16)):
        if seen.speak:
            for token in watching.reply(prefix=assistant, max_tokens=100): ...

An item costs what gets in of it: tokens that are dropped are never read, and an item of which nothing gets in costs no
call of the model. Silence is decided and never written into the stream. Source: the event loop of VideoLLM-online, arXiv
2406.11816; places of what gets in by TimeChat-Online, arXiv 2504.17343.
"""

from __future__ import annotations

import copy
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory.admission import LOW, Door, DoorState
from ..memory.admission.door import flat, unflat
from ..memory.layout import VERBS
from ..models import Stream
from ..models.axes import VISION, single_axis
from ..recipes import composed, recipes

NOTE = "watching."  # how what a saved stream keeps for whoever watches through it is called
PLAIN = ("at", "first", "items", "free", "silent")


@dataclass(frozen=True)
class Seen:
    """What became of an item. number: from 0; kept: how many of its tokens were read; novelty: 0 to 1; speak: whether the
    gate says so; time: its own, in seconds, if it came with one."""

    number: int
    kept: int
    tokens: int
    novelty: float
    speak: bool
    time: float | None = None


@dataclass(frozen=True, eq=False)
class _State:
    """Between two items. at: the stream's position after the last; first, items: the first place of the run of items that
    goes on while nothing else is read, and how many it has; free: the first place behind all items; silent: whether the
    last item that was read was met with silence."""

    door: DoorState
    at: int = -1
    first: int = 0
    items: int = 0
    free: int = 0
    silent: bool = False


class Watching:
    """A door before a model's stream, for items that come one by one.

    door: a `Door`, or the spec of one. between: tokens that are read before an item where the one before was met with
    silence (VideoLLM-online with several tokens a frame reads its silent token there). undo: how many items `truncate` can
    take back. The stream is of one row, as rows would keep different tokens; it may be read and written in between.

    On a model of several rotary axes, items are frames of one picture that goes on until words come: a token stands at its
    row and column and at the time of its item, whether or not others got in, and words stand behind all of them.
    """

    def __init__(self, stream: Stream, door: Door | str, *, between: Sequence[int] = (), undo: int = 0) -> None:
        door = composed(door) if isinstance(door, str) else door
        if not isinstance(door, Door):
            names = ", ".join(info.name for info in recipes("door"))
            raise ValueError(f"{getattr(door, 'name', door)!r} is no door; take one of {names}, or a `Door`")
        if stream.batch != 1:
            raise ValueError(
                f"the stream has {stream.batch} rows, which would keep different tokens; open one for each"
            )
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of items, 0 or more")
        self.stream, self.door, self.between, self.undo = stream, door, list(between), undo
        self._needs = {tag for verb in VERBS for tag in getattr(stream.memory, verb).needs}
        self._state = _State(door.start())
        self._before: deque[tuple[int, _State]] = deque(maxlen=undo)

    @property
    def position(self) -> int:
        """Items so far."""
        return self._state.door.number

    @property
    def nbytes(self) -> int:
        """Bytes that the memory and the door hold."""
        return self.stream.nbytes + sum(tensor.nbytes for tensor in flat(self._state.door).values())

    # -- watching and speaking ---------------------------------------------------------------------------------------

    def see(
        self, items: Tensor, embeds: Tensor | None = None, *, grid: tuple[int, int] | None = None, tick: int = 1,
        low: Tensor | None = None, times: Sequence[float] | None = None,
    ) -> Iterator[Seen]:  # fmt: skip
        """Let items in one by one, and say what became of each; the next is seen when the iterator goes on.

        items: what the door judges, [n, …]: features of tokens [n, tokens, d], patches of pixels, one feature a frame.
        embeds: what the model reads, [n, tokens, hidden]; None: the items themselves. low: the same in low resolution, rows
        and columns divided alike, for doors that let some in so. grid: rows and columns of tokens, for models of
        several axes. tick: places from an item to the next. times: seconds, one an item.

        Raises ValueError, before anything is seen, for what does not fit. What fails later leaves what was seen before.
        """
        read = items if embeds is None else embeds
        for shown in (read, *([] if low is None else [low])):
            if shown.ndim != 3 or len(shown) != len(items):
                raise ValueError(f"what is to be read is {tuple(shown.shape)}; expected [{len(items)}, tokens, hidden]")
        if grid is not None and grid[0] * grid[1] != read.shape[1]:
            raise ValueError(f"grid is {grid}; an item has {read.shape[1]} tokens")
        if times is not None and len(times) != len(items):
            raise ValueError(f"{len(times)} times for {len(items)} items; give one each")
        return (
            self._one(
                items[n], read[n], None if low is None else low[n], grid, tick, None if times is None else times[n]
            )
            for n in range(len(items))
        )

    def tell(self, ids: Sequence[int]) -> Tensor:
        """Read words, which stand behind all items, also those that did not get in: logits [T, V]."""
        tags: dict[str, Any] = (
            {"modality": torch.zeros(len(ids), dtype=torch.int64)} if "modality" in self._needs else {}
        )
        if self._on_axes:
            first = max(int(self.stream.next_place), self._state.free)
            tags["coordinates"] = torch.arange(first, first + len(ids))[:, None].expand(-1, 3)
        return self.stream.feed(list(ids), tags=tags or None)[0]

    def reply(self, prefix: Sequence[int] = (), **how: Any) -> Iterator[Any]:
        """Speak: `Stream.generate`, after reading `prefix` (what opens an answer). how: max_tokens, eos, seed and so on."""
        if prefix:
            self.tell(prefix)
        yield from self.stream.generate(**how)

    @property
    def _on_axes(self) -> bool:
        return self.stream.state is not None and single_axis(self.stream.state) is None

    def _one(
        self,
        item: Tensor,
        embeds: Tensor,
        low: Tensor | None,
        grid: tuple[int, int] | None,
        tick: int,
        time: float | None,
    ) -> Seen:
        began, state = self.stream.position, self._state
        verdict, door = self.door.enter(item[None], state.door)
        keep = verdict.keep[0] if verdict.keep.ndim > 1 else verdict.keep.expand(len(embeds))
        if keep.shape != (len(embeds),):
            raise ValueError(
                f"the door judges {tuple(keep.shape)} parts of an item, of which {len(embeds)} are to be read"
            )
        if low is not None and bool(verdict.resolution == LOW):
            embeds, keep, grid = low, keep.new_ones(len(low)), _smaller(grid, len(keep), len(low))
        chosen, logits = embeds[keep], None
        if not bool(chosen.isfinite().all()):  # before anything else is read for it
            raise ValueError("what is to be read holds NaN or infinity; leave such items out or repair them")
        run = (state.first, state.items) if state.at == began else (max(int(self.stream.next_place), state.free), 0)
        try:
            if len(chosen):
                if self.between and state.silent:
                    self.tell(self.between)
                    run = (int(self.stream.next_place), 0) if self._on_axes else run
                tags = self._tags(keep, grid, tick, time, run)
                logits = self.stream.feed(embeds=chosen, tags=tags or None)[0, -1:]
            speak, door = self._gate(door, logits)
        except BaseException:
            if self.stream.position > began:
                self.stream.truncate(self.stream.position - began)
            raise
        if self.undo:
            self._before.append((began, state))
        high = max(grid) if grid is not None else 1
        self._state = _State(
            door, self.stream.position, run[0], run[1] + 1, max(state.free, run[0] + max(tick * run[1] + 1, high)),
            not speak and (state.silent or logits is not None),
        )  # fmt: skip
        return Seen(self.position - 1, len(chosen), len(keep), float(verdict.novelty), speak, time)

    def _gate(self, door: DoorState, logits: Tensor | None) -> tuple[bool, DoorState]:
        if self.door.speaks is None:
            return False, door
        logits = torch.zeros(0, 1) if logits is None else logits  # of an item of which nothing was read
        said, after = self.door.emit(door, logits=logits, tokens=logits.argmax(-1))
        return bool(said), after

    def _tags(
        self, keep: Tensor, grid: tuple[int, int] | None, tick: int, time: float | None, run: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What is known of the tokens of an item that get in."""
        count, tags = int(keep.sum()), dict[str, Tensor]()
        for name, value in (("modality", VISION), ("frame", self.position), ("time", time)):
            if value is not None and name in self._needs:
                tags[name] = torch.full((count,), value)
        if self._on_axes:
            if grid is None:
                raise ValueError(
                    "this model turns keys on several axes; give `grid`, rows and columns of an item's tokens"
                )
            first, number = run
            row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
            at = torch.stack([torch.full_like(row, tick * number), row, column], -1).flatten(0, 1) + first
            end = torch.full((len(at), 1), first + max(tick * number + 1, *grid))
            tags["coordinates"] = torch.cat([at, end], 1)[keep.cpu()]
        return tags

    # -- undo, copy, save --------------------------------------------------------------------------------------------

    def truncate(self, n: int) -> None:
        """Take back the last n items, and all that was read and said since the first of them came, exactly.

        Raises ValueError, with the reason, where that is more than `undo` items, or than the memory can take back.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= len(self._before):
            raise ValueError(
                f"cannot take back {n!r} items; the last {len(self._before)} of {self.position} can be (undo)"
            )
        if n:
            began, state = self._before[-n]
            self.stream.truncate(self.stream.position - began)
            self._state = state
            self._before = deque([*self._before][:-n], maxlen=self.undo)

    def fork(self) -> Watching:
        """An independent copy over the same model; memory is copied."""
        twin = copy.copy(self)
        twin.stream, twin._before = self.stream.fork(), self._before.copy()
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write stream and door to one file, as `Stream.save` does; `Watching.resumed` goes on bit for bit, except that
        what can be taken back begins anew."""
        plain = {name: getattr(self._state, name) for name in PLAIN}
        own = {NOTE + name: tensor for name, tensor in flat(self._state.door).items()}
        notes = self.stream.notes
        self.stream.notes = {**notes, **own, NOTE: {**plain, "door": repr(self.door), "between": self.between}}
        try:
            self.stream.save(path)
        finally:
            self.stream.notes = notes

    @classmethod
    def resumed(cls, stream: Stream, door: Door | str, *, undo: int = 0) -> Watching:
        """Go on with what `save` wrote; stream: `ef.resume(model, path)`; door: the one it was. Raises ValueError where the
        file is not of one who watched, or of another door."""
        said = stream.notes.get(NOTE)
        if said is None:
            raise ValueError("this stream was not saved by `Watching.save`; begin with Watching(stream, door)")
        watching = cls(stream, door, between=said["between"], undo=undo)
        if repr(watching.door) != said["door"]:
            raise ValueError(f"it was saved behind {said['door']}, not {watching.door!r}")
        own = {name.removeprefix(NOTE): x for name, x in stream.notes.items() if name.startswith(NOTE) and name != NOTE}
        watching._state = _State(unflat(watching.door.start(), own), **{name: said[name] for name in PLAIN})
        stream.notes = {name: value for name, value in stream.notes.items() if not name.startswith(NOTE)}
        return watching


def _smaller(grid: tuple[int, int] | None, tokens: int, fewer: int) -> tuple[int, int] | None:
    """Rows and columns of an item in low resolution."""
    if grid is None:
        return None
    ratio = math.isqrt(tokens // fewer)
    small = (grid[0] // ratio, grid[1] // ratio)
    if small[0] * small[1] != fewer:
        raise ValueError(f"{fewer} tokens in low resolution are no grid of {grid} made smaller alike both ways")
    return small
