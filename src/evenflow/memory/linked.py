"""Two modalities at two token rates under one clock, held for the same seconds and read by each other.

A block is the video and the audio of the same time: one latent of each at first, then a second (3 and 25 latents). Four
memories hold the keys of four reads: each modality's own, audio read by video, video read by audio. A query sees block 0
(and the sink tokens that stand before its audio), the newest `window` blocks, and its own block both ways; blocks leave
all four memories together, so what one modality remembers the other does too.

    state = Linked(window=5).build(layers=48, heads=32, head_dim=64, video={"head_dim": 128})
    for sigma in schedule:  # the denoising passes of a block, then one on what came out
        with state.step(commit=sigma == 0) as step:
            out = step.attend(layer, "video", q, k, v)  # and "audio", "a2v", "v2a", in every layer

Sink tokens are audio tokens of the model that are no sound: as many as `sinks` come first in block 0's audio, they do not
turn, every audio query and every video query sees them, and the model takes them off its output (`step.sinks`).
Source: OmniForcing, arXiv 2603.11647, section 3; how many seconds are kept it does not say. `first=(4, 26), sinks=0` is
the layout of the released model that came after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .composition import Composition, Kind
from .layout import Geometry
from .linked_clock import Clock, Latents, whole

if TYPE_CHECKING:
    from .linked_state import LinkedState

SHARED = ("layers", "batch", "dtype", "device")


@dataclass(frozen=True, kw_only=True)
class Linked(Composition):
    """The layout of linked memories.

    window: W, the newest blocks that are seen beside block 0. first: latents of video and audio in block 0. seconds: of
    every later block. grid: rows and columns of tokens in a video latent; an audio latent is one token. sinks: S, sink
    tokens. undo: how many blocks can always be taken back. clock: the rates and the rotary embedding.

    horizon: None places block 0 and the sinks where they were, further off with every second (the paper's rule, for its
    5 seconds). Else from block `horizon` on they come along and stay that many blocks behind the newest, as if the stream
    were no older; for streams longer than what the model was trained on (the rule is of this library).
    """

    window: int = 5
    first: tuple[int, int] = (1, 1)
    seconds: int = 1
    grid: tuple[int, int] = (16, 24)
    sinks: int = 16
    undo: int = 0
    horizon: int | None = None
    clock: Clock = field(default_factory=Clock)
    kind: ClassVar[Kind] = "linked"
    answers: ClassVar = {
        "admit": ("Everything", "Every latent of both modalities gets in, in blocks of the same seconds."),
        "evict": ("OldestBlock", "The oldest block but the first leaves, all four memories at once."),
        "fold": ("Dropped", "What leaves is gone."),
        "recall": ("SameSeconds", "A query sees block 0 with the sinks, the newest blocks, and its own both ways, in either modality."),
        "place": ("Ticks", "Whole ticks of the clock, 1/1200 s, for both modalities; sinks do not turn."),
    }  # fmt: skip

    @property
    def outline(self) -> str:
        return f"[ sink {self.sinks} tokens and block 0 | window {self.window} blocks ] + fresh, for each of four reads"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("seconds", 1), ("sinks", 0), ("undo", 0)):
            whole(name, getattr(self, name), least)
        for name in ("first", "grid"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{name} is {pair!r}; it must be two whole numbers")
            for value in pair:
                whole(name, value, 1)
        if self.horizon is not None:
            whole("horizon", self.horizon, self.window + 1)
        self.latents(1)

    def latents(self, block: int, video: int | None = None) -> Latents:
        """Video and audio latents of a block; video: of the stream's last, which may have fewer.

        Such a one has ⌊a · video/v⌋ audio latents, where a whole one has v and a.
        """
        clock = self.clock
        full = (
            Latents(*self.first)
            if block == 0
            else Latents(*(r.latents(self.seconds) for r in (clock.video, clock.audio)))
        )
        if video is None:
            return full
        whole("video", video, 1)
        if video > full.video or (block == 0 and video < full.video):
            raise ValueError(f"block {block} has {full.video} video latents, not {video}" + " or fewer" * (block > 0))
        return Latents(video, full.audio * video // full.video)

    def blocks(self, video: int) -> list[Latents]:
        """The blocks of a stream of so many video latents. Raises ValueError if they do not fill block 0."""
        blocks = [self.latents(0, min(video, self.first[0]))]
        while (left := video - sum(block.video for block in blocks)) > 0:
            blocks.append(self.latents(len(blocks), min(left, self.latents(1).video)))
        return blocks

    def starts(self, block: int) -> Latents:
        """The first latent of a block in each modality."""
        if block == 0:
            return Latents(0, 0)
        return Latents(*(a + (block - 1) * b for a, b in zip(self.first, self.latents(1), strict=True)))

    def tokens(self, block: int, latents: Latents) -> Latents:
        """Tokens of so many latents that a block has, sinks among those of audio."""
        return Latents(latents.video * self.grid[0] * self.grid[1], latents.audio + (0 if block else self.sinks))

    def places(self, modality: str, block: int, shift: int = 0, latents: Latents | None = None) -> Tensor:
        """Time in ticks, row and column of a block's tokens, int64 [m, 3], `shift` blocks later; see `Clock`."""
        start, count = self.starts(block), latents or self.latents(block)
        if modality == "video":
            places = self.clock.video_places(start.video, count.video, self.grid)
        else:
            sinks = torch.zeros(0 if block else self.sinks, 3, dtype=torch.int64)
            places = torch.cat([sinks, self.clock.audio_places(start.audio, count.audio)])
        places[:, 0] += shift * self.seconds * self.clock.ticks
        return places

    def shift(self, block: int) -> int:
        """How many blocks later block 0 and the sinks stand, for the queries of `block`."""
        return 0 if self.horizon is None else max(0, block - self.horizon)

    def build(
        self, *, video: Mapping[str, Any] | None = None, audio: Mapping[str, Any] | None = None,
        a2v: Mapping[str, Any] | None = None, v2a: Mapping[str, Any] | None = None, **geometry: Any,
    ) -> LinkedState:  # fmt: skip
        """Empty memories for one model and one stream (or a batch in step).

        geometry: what all four reads have, see `Geometry.of`; video, audio, a2v, v2a: what one of them has of its own
        (heads, kv_heads, head_dim, value_dim, rope, scale, softcap, sink_logits). rope: by default seconds (and rows and
        columns in video's own read), one table across all heads, or one a head where heads share keys; None turns
        nothing.
        """
        from .linked_state import LinkedState

        own = {"video": video or {}, "audio": audio or {}, "a2v": a2v or {}, "v2a": v2a or {}}
        served = {}
        for read, given in own.items():
            if differs := sorted(set(given) & set(SHARED)):
                raise ValueError(f"{read} has {differs} of its own; these are of all four reads")
            g = Geometry.of(**{"rope": None, **geometry, **given})
            if "rope" not in {**geometry, **given}:
                width = g.head_dim * (g.heads if g.heads == g.kv_heads else 1)
                rope = self.clock.rope(width, spatial=read == "video")
                g = Geometry.of(**{**geometry, **given, "rope": rope})
            if g.alibi is not None or any(reach is not None for reach in g.reach):
                raise ValueError("tokens of two rates have no distance that ALiBi or `reach` could use; leave them out")
            served[read] = g
        return LinkedState(self, served)
