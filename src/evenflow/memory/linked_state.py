"""The memories of one stream of two linked modalities: its blocks, and the operations of a session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from .layout import Geometry
from .linked import Linked
from .linked_clock import Latents
from .linked_step import ASKS, GIVES, LinkedStep, Spin, Turn
from .linked_store import BlockRing
from .rope import Rope


class LinkedState:
    """The memories of one stream; `Linked.build` makes them.

    Whatever is refused leaves them as they were, and so does a step that fails or is not committed.
    """

    def __init__(self, linked: Linked, geometry: Mapping[str, Geometry]) -> None:
        self.linked, self.geometry = linked, dict(geometry)
        head, size = (linked.tokens(block, linked.latents(block)) for block in (0, 1))
        at = {"video": 0, "audio": 1}
        self.rings = {
            read: BlockRing(
                g, head[at[GIVES[read]]], size[at[GIVES[read]]], linked.window + linked.undo + 1, linked.horizon is not None
            )
            for read, g in geometry.items()
        }  # fmt: skip
        self.spins = {read: {rope: Spin(rope, g) for rope in set(g.rope) if rope} for read, g in geometry.items()}
        self.turns: dict[tuple[str, Rope], tuple[Turn, Turn]] = {}  # of queries and keys, of the block now at work
        self._turned: tuple[int, Latents] | None = None
        self.shifts: dict[tuple[str, int], int] = {}  # by how much block 0's keys are turned, read and layer
        self.step_open: LinkedStep | None = None
        self._forget()

    def _forget(self) -> None:
        self.blocks = 0  # committed
        self._oldest = 1  # of the later blocks that are still there
        self._partial = 0  # video latents of a last block that was not whole, else 0

    @contextmanager
    def step(self, video: int | None = None, commit: bool = True) -> Iterator[LinkedStep]:
        """A step of the next block. video: its video latents where it is the last and not whole.

        commit: False attends and leaves the memories as they were (a denoising pass). Raises ValueError if there is no
        such block, or the stream has ended, RuntimeError if a step is open.
        """
        self._idle("a second step")
        if self._partial:
            raise ValueError(
                f"the stream has ended: block {self.blocks - 1} has {self._partial} video latents only; undo it "
                "and feed it whole, or reset"
            )
        step = LinkedStep(self, self.linked.latents(self.blocks, video), self.linked.shift(self.blocks))
        self._turn(step)
        self.step_open = step
        try:
            yield step
            if commit:
                step._complete()
                self._partial = step.latents.video if step.final else 0
                self.blocks += 1
                self._oldest = max(self._oldest, self.blocks - self.linked.window - self.linked.undo)
        finally:
            self.step_open = None

    def _turn(self, step: LinkedStep) -> None:
        """Cosines and sines of a block's tokens; all of its passes and layers share them."""
        if self._turned == (step.block, step.latents):
            return
        self._turned = None
        places = {name: self.linked.places(name, step.block, 0, step.latents) for name in ("video", "audio")}
        for read, spins in self.spins.items():
            for rope, spin in spins.items():
                asks = spin.at(places[ASKS[read]])
                gives = asks if ASKS[read] == GIVES[read] else spin.at(places[GIVES[read]])
                self.turns[read, rope] = asks, gives
        self._turned = step.block, step.latents

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def position(self) -> Latents:
        """Latents of each modality that were consumed; sinks are none."""
        start = self.linked.starts(self.blocks)
        if not self._partial:
            return start
        full, last = self.linked.latents(1), self.linked.latents(1, self._partial)
        return Latents(start.video - full.video + last.video, start.audio - full.audio + last.audio)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept; the same from the first block to the last."""
        return sum(ring.nbytes for ring in self.rings.values())

    def held(self, layer: int) -> list[int]:
        """The blocks that the next one will see, oldest first; the same in all layers and all four memories."""
        if not 0 <= layer < self.geometry["video"].layers:
            raise ValueError(f"there is no layer {layer}; this memory has {self.geometry['video'].layers}")
        return [*([0] if self.blocks else []), *range(max(1, self.blocks - self.linked.window), self.blocks)]

    # -- undo, copy, forget, save --------------------------------------------------------------------------------

    def truncate(self, n: int) -> None:
        """Undo the last n blocks of both modalities, exactly. Raises ValueError where what was evicted would be needed."""
        self._idle("truncate")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.blocks:
            raise ValueError(f"cannot undo {n!r} blocks; there are {self.blocks}")
        left = self.blocks - n
        if n and max(1, left - self.linked.window) < min(self._oldest, left):
            raise ValueError(
                f"cannot undo {n} blocks: block {left} needs block {max(1, left - self.linked.window)} on, and block "
                f"{self._oldest} is the oldest left; build with undo={n} or more"
            )
        if left == 0:
            self._forget()
        elif n:
            self.blocks, self._oldest, self._partial = left, min(self._oldest, left), 0

    def fork(self) -> Self:
        """An independent copy; what happens to one is never seen by the other. Raises RuntimeError inside a step."""
        twin = type(self)(self.linked, self.geometry)
        twin.load_state_dict(self.state_dict())
        return twin

    def reset(self) -> None:
        """Forget everything, block 0 and sinks too."""
        self._idle("reset")
        self._forget()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that later memories of the same shape need to go on bit for bit."""
        self._idle("state_dict")
        state = {
            "blocks": torch.tensor([self.blocks, self._oldest, self._partial]),
            "layout": torch.tensor(self._layout(), dtype=torch.float64),
        }
        last = self.blocks - 1
        for read, ring in self.rings.items() if self.blocks else ():
            tokens = self._last_tokens(read, last, self._partial)
            for layer in range(self.geometry[read].layers):
                for part, tensors in (("keys", ring.keys), ("values", ring.values)):
                    state[f"{read}.layers.{layer}.{part}"] = ring.ordered(tensors[layer], self._oldest, last, tokens)
                if ring.raw:
                    state[f"{read}.layers.{layer}.raw"] = ring.raw[layer].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        self._idle("load_state_dict")
        blocks, oldest, partial = self._counts(state)
        expected: dict[str, tuple[int, ...]] = {}
        for read, ring in self.rings.items() if blocks else ():
            g, kept = self.geometry[read], blocks - oldest
            last = self._last_tokens(read, blocks - 1, partial)
            tokens = ring.head + (max(kept - 1, 0) * ring.size + last if kept else 0)
            for layer in range(g.layers):
                for part, n, dim in (
                    ("keys", tokens, g.head_dim),
                    ("values", tokens, g.value_dim),
                    ("raw", ring.head, g.head_dim),
                ):
                    if part != "raw" or ring.raw:
                        expected[f"{read}.layers.{layer}.{part}"] = (g.batch, g.kv_heads, n, dim)
        dtype = self.geometry["video"].dtype
        if (names := set(state) - {"blocks", "layout"}) != set(expected):
            raise ValueError(
                f"state does not fit: missing {sorted(set(expected) - names)[:3]}, unknown {sorted(names - set(expected))[:3]}"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape or state[name].dtype != dtype:
                found = f"{state[name].dtype} {tuple(state[name].shape)}"
                raise ValueError(f"{name} is {found}; these memories hold {dtype} {shape}")
        self._forget()
        self.blocks, self._oldest, self._partial = blocks, oldest, partial
        self.shifts.clear()
        with torch.inference_mode(False), torch.no_grad():
            for read, ring in self.rings.items() if blocks else ():
                for layer in range(self.geometry[read].layers):
                    for part, tensors in (("keys", ring.keys), ("values", ring.values)):
                        ring.restore(tensors[layer], state[f"{read}.layers.{layer}.{part}"], oldest, blocks - 1)
                    if ring.raw:
                        ring.raw[layer].copy_(state[f"{read}.layers.{layer}.raw"])

    def _counts(self, state: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Blocks, the oldest left of the later ones, and video latents of a last one that is not whole."""
        layout = self._layout()
        if "layout" not in state or state["layout"].tolist() != layout:
            found = state["layout"].tolist() if "layout" in state else None
            raise ValueError(f"state is of another layout, {found}; these memories have {layout}")
        if "blocks" not in state or tuple(state["blocks"].shape) != (3,) or state["blocks"].dtype != torch.int64:
            raise ValueError("state does not fit: `blocks` must be three whole numbers")
        blocks, oldest, partial = state["blocks"].tolist()
        least, most = max(1, blocks - self.linked.window - self.linked.undo), max(1, blocks)
        if (
            blocks < 0
            or not least <= oldest <= most
            or not 0 <= partial < (self.linked.latents(1).video if blocks > 1 else 1)
        ):
            raise ValueError(
                f"state has {blocks} blocks, {oldest} the oldest, {partial} latents in the last: impossible"
            )
        return blocks, oldest, partial

    def _layout(self) -> list[float]:
        """What keys that are already turned, and their order, depend on."""
        linked, clock = self.linked, self.linked.clock
        rates = (clock.video.units, clock.video.stride, clock.audio.units, clock.audio.stride)
        turns = (clock.theta, clock.span, clock.patch, clock.pixels)
        horizon = -1 if linked.horizon is None else linked.horizon
        sizes = (linked.window, *linked.first, linked.seconds, *linked.grid, linked.sinks, linked.undo, horizon)
        return [float(number) for number in (*sizes, *rates, *turns)]

    def _last_tokens(self, read: str, block: int, partial: int) -> int:
        """Keys of a last block, `partial` video latents of it, or all."""
        tokens = self.linked.tokens(block, self.linked.latents(block, partial or None))
        return tokens.video if GIVES[read] == "video" else tokens.audio

    def _idle(self, what: str) -> None:
        if self.step_open is not None:
            raise RuntimeError(f"{what} is not possible while a step is open")
