"""What a memory is made of: the composition of five answers, and the shape of the attention it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .admit import Everything
from .composition import Composition, Kind, about
from .evict import Oldest
from .fold import Dropped
from .place import Contiguous
from .recall import AllHeld
from .rope import Rope
from .verbs import Admit, Evict, Fold, Place, Recall

if TYPE_CHECKING:
    from .state import MemoryState

DEFAULT_ROPE = Rope()
VERBS: dict[str, type] = {"admit": Admit, "evict": Evict, "fold": Fold, "recall": Recall, "place": Place}


@dataclass(frozen=True, kw_only=True)
class Memory(Composition):
    """A memory method: `[sink | memory | window] + fresh` and the answers to the five questions.

    sink: S, number of first tokens that are never evicted. window: W, number of most recent tokens kept beside them;
    None keeps every token. After a step a stream holds at most S + W tokens, and a fresh token attends those and
    itself.

    frame: how many tokens arrive and leave together; S and W then count frames. None: found in the first step (its
    `frame` tag, or its length divided into `chunk` frames). chunk: frames that a step usually brings. inside: whether
    the fresh tokens of one step attend each other causally, or both ways (a chunk of video). rows: independent copies,
    one a denoising step. keep_sink: whether computing the window anew (`recache`) leaves the sinks as they are.

    null: an extra key without a value in every softmax: "zero" adds e^0 to the denominator (softmax1),
    "learned" adds e^b with one logit b per head that the model brings. recompute: keys are not carried over; the
    session runs the model afresh on the last `window` tokens for every token (the quality reference).
    """

    sink: int = 0
    window: int | None = None
    admit: Admit = field(default_factory=Everything)
    evict: Evict = field(default_factory=Oldest)
    fold: Fold = field(default_factory=Dropped)
    recall: Recall = field(default_factory=AllHeld)
    place: Place = field(default_factory=Contiguous)
    frame: int | None = 1
    chunk: int = 1
    inside: Literal["causal", "both"] = "causal"
    rows: int = 1
    keep_sink: bool = True
    null: Literal["zero", "learned"] | None = None
    recompute: bool = False
    kind: ClassVar[Kind] = "memory"

    def __post_init__(self) -> None:
        if not isinstance(self.sink, int) or isinstance(self.sink, bool) or self.sink < 0:
            raise ValueError(f"{self.name}: sink is {self.sink!r}; it must be a whole number of tokens, 0 or more")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"{self.name}: window is {self.window!r}; it must be a whole number of tokens, 1 or more")
        if self.window is None and self.sink and self.on_ring:
            raise ValueError(f"{self.name}: nothing ever leaves without a window, so a sink has no meaning")
        for name, value in {"frame": self.frame or 1, "chunk": self.chunk, "rows": self.rows}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: {name} is {value!r}; it must be a whole number, 1 or more")
        if self.inside not in ("causal", "both"):
            raise ValueError(f"{self.name}: inside is {self.inside!r}; it must be 'causal' or 'both'")
        if self.null and not self.on_ring:
            raise ValueError(f"{self.name}: a null key goes with `Oldest` tokens, `Dropped` and a causal step only")
        for verb, base in VERBS.items():
            if not isinstance(getattr(self, verb), base):
                raise TypeError(
                    f"{self.name}: {verb} is {getattr(self, verb)!r}; derive it from evenflow.memory.{base.__name__}"
                )
        if self.null not in (None, "zero", "learned"):
            raise ValueError(f"{self.name}: null is {self.null!r}; it must be None, 'zero' or 'learned'")
        if self.recompute and self.window is None:
            raise ValueError(f"{self.name}: re-computation needs a window")
        for verb in VERBS:
            try:
                getattr(self, verb).suits(self)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None

    @property
    def capacity(self) -> int | None:
        """S + W, the most that is held between steps; None without a bound."""
        return None if self.window is None else self.sink + self.window

    @property
    def on_ring(self) -> bool:
        """Whether the plain rule holds, oldest token out, one at a time, which runs on a ring without any copy."""
        plain = self.frame == 1 and self.inside == "causal" and self.rows == 1
        rule = type(self.evict) is Oldest and not self.evict.with_fresh and type(self.fold) is Dropped
        own_lag = type(self.place).lag is not Place.lag
        sees = all(
            getattr(type(self.recall), n) is getattr(Recall, n) for n in ("among", "attend", "retrieve", "tensors")
        )
        return plain and rule and own_lag and sees

    @property
    def retrieves(self) -> bool:
        """Whether a question brings things back that a step does not attend."""
        return type(self.recall).retrieve is not Recall.retrieve

    @property
    def by_head(self) -> bool:
        """Whether heads come to hold different tokens."""
        return self.evict.by_head or self.fold.by_head

    @property
    def cut_free(self) -> bool:
        """Whether a causal stream gives the same in whatever steps it comes; if not, the rule is per step."""
        places = self.evict.in_order or not self.place.moves  # a gap within a step closes when it ends
        rules = self.evict.cut_free and self.fold.cut_free and self.recall.cut_free and places
        return self.on_ring or (self.inside == "causal" and self.frame == 1 and rules)

    def answered(self, verb: str) -> tuple[str, str]:
        """An answer's name, and what it does in a sentence."""
        answer = getattr(self, verb)
        if isinstance(answer, Oldest) and self.window is None:
            return type(answer).__name__, "Nothing leaves, as there is no window."
        return type(answer).__name__, about(answer)

    def build(self, **geometry: Any) -> MemoryState:
        """An empty memory for one model and one stream (or a batch of them); see `Geometry.of` for the arguments."""
        from .chunks import ArenaState
        from .state import RingState

        served = Geometry.of(**geometry)
        for verb in VERBS:
            getattr(self, verb).serves(served)
        return (RingState if self.on_ring else ArenaState)(self, served)


def per_layer(value: Any, layers: int, name: str) -> tuple[Any, ...]:
    """`value` once for every layer, or the sequence of one value per layer that it already is."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != layers:
            raise ValueError(f"{name} has {len(value)} entries; give one value, or one for each of {layers} layers")
        return tuple(value)
    return (value,) * layers


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The attention a memory serves.

    layers, heads, kv_heads, head_dim, value_dim (default head_dim), batch, dtype, device: sizes and kind of the
    tensors that `attend` gets. rope: one `Rope`, one per layer, or None where nothing rotates. alibi: float [heads],
    slopes; a score gets −slope · in-cache distance. reach: the model's own sliding window, in tokens including the
    query itself, per layer or for all; measured on in-cache positions. scale: factor on the scores, default
    head_dim^−½. softcap: Gemma 2's bound on scores. sink_logits: float [layers, heads], what the model adds to each
    head's denominator as e^logit.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rope: tuple[Rope | None, ...]
    alibi: Tensor | None
    reach: tuple[int | None, ...]
    scale: tuple[float, ...]
    softcap: float | None
    sink_logits: Tensor | None
    batch: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        value_dim: int | None = None,
        rope: Rope | Sequence[Rope | None] | None = DEFAULT_ROPE,
        alibi: Tensor | None = None,
        reach: int | Sequence[int | None] | None = None,
        scale: float | Sequence[float] | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Geometry:
        """A geometry from what is known, the rest by its defaults. Raises ValueError when it makes no sense."""
        sizes = {"layers": layers, "heads": heads, "head_dim": head_dim, "batch": batch}
        sizes |= {"kv_heads": kv_heads or heads, "value_dim": value_dim or head_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be a whole number, 1 or more")
        if heads % sizes["kv_heads"]:
            raise ValueError(f"{heads} query heads cannot share {sizes['kv_heads']} key heads evenly")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; keys and values must be floating point")
        reaches = per_layer(reach, layers, "reach")
        for tokens in reaches:
            if tokens is not None and tokens < 1:
                raise ValueError(f"reach is {tokens}; a query sees at least itself, so it must be 1 or more")
        if alibi is not None and tuple(alibi.shape) != (heads,):
            raise ValueError(f"alibi has shape {tuple(alibi.shape)}; expected one slope per head, ({heads},)")
        if sink_logits is not None and tuple(sink_logits.shape) != (layers, heads):
            raise ValueError(f"sink_logits has shape {tuple(sink_logits.shape)}; expected ({layers}, {heads})")
        return cls(
            **sizes,
            rope=per_layer(rope, layers, "rope"),
            alibi=alibi,
            reach=reaches,
            scale=per_layer(head_dim**-0.5 if scale is None else scale, layers, "scale"),
            softcap=softcap,
            sink_logits=sink_logits,
            dtype=dtype,
            device=torch.device(device),
        )
