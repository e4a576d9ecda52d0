"""The five questions every memory answers, as five small classes to derive from.

A memory method is five answers: which fresh items get in (`Admit`), which held tokens leave (`Evict`), what becomes of
what leaves (`Fold`), what a query may see (`Recall`), and which positions held tokens get (`Place`). An answer is a
frozen dataclass that overrides what it needs; its parameters are its fields. It keeps nothing itself: what must be
remembered between steps are tensors that the memory owns (`tensors`, and `view.mine` while it works), so that saving,
forking, resetting and undoing need no help from the answer.

Memories whose rule is simply "the oldest token leaves" run on a ring (`state.py`); all others on an arena
(`chunks.py`), where an answer sees one layer of one step through a `View`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

from .attention import softmax_attention

if TYPE_CHECKING:
    from .layout import Geometry, Memory
    from .view import View


@dataclass(frozen=True)
class Fresh:
    """What a step brings: `count` columns, their tags, and which of them are real (None: all of them)."""

    count: int
    batch: int
    tags: Mapping[str, Tensor]
    real: Tensor | None  # bool [B, m]


class Answer:
    """What all answers share.

    needs: tags without which it cannot work; a step that lacks one is refused.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def suits(self, memory: Memory) -> None:
        """Raises ValueError where the sizes or other answers of `memory` leave this one without a sense."""

    def serves(self, geometry: Geometry) -> None:
        """Raises ValueError for a model that it cannot serve."""

    def tensors(self, geometry: Geometry, frame: int) -> dict[str, Tensor]:
        """What this answer remembers between steps, as it is at the start of a stream; every tensor [B, …].

        Evict and Place have one set for all layers (one a layer, if `Evict.content`), Fold and Recall one a layer.
        """
        return {}

    def kept(self, mine: Mapping[str, Tensor], sink: int) -> dict[str, Tensor]:
        """What stays of these when all but the first `sink` tokens is forgotten; the others begin anew."""
        return {}


class Admit(Answer):
    """Which fresh items get in?"""

    def admitted(self, fresh: Fresh) -> Tensor | None:
        """Bool [B, m], False for a token that is neither kept nor counted; None admits every token."""
        return None


class Evict(Answer):
    """Which held tokens leave?

    content: whether keys, values or queries decide. If not, all layers lose the same tokens, decided once a step.
    in_order: whether tokens leave in the order in which they came, whatever they are. cut_free: whether a causal stream
    loses the same in whatever steps it comes, each query seeing what `reach` says. by_head: whether heads come to hold
    different tokens.
    """

    content: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    in_order: ClassVar[bool] = False
    cut_free: ClassVar[bool] = False

    def keep(self, view: View) -> Tensor | None:
        """Bool [R, G, n], True for what stays; None keeps everything.

        Asked before attention, once a chunk: what leaves is not attended any more. Columns are those of `view.index`:
        the arena's slots, then the fresh tokens, which may be turned away too. G is 1 or the number of key heads.
        """
        return None

    def arrive(self, view: View) -> None:
        """At the end of a committed step, once a table: what is to be remembered of it goes into `view.mine`."""

    def reach(self, view: View) -> int | Tensor | None:
        """In causal steps: what each query still sees of the window (sinks and memory always), as if fed one by one.

        So many tokens back; or bool [R, G, m, n], where that depends on more than how far back; None: everything.
        """
        return None

    def columns(self, sink: int, slots: int, window: int | None, m: int) -> int | None:
        """Slots that hold everything at chunks of m tokens, all counted in tokens; None: grow when more are needed."""
        return None


class Store(Protocol):
    """What a fold keeps outside of the arena, for all layers: one to a state, `view.store` in fold and recall."""

    @property
    def nbytes(self) -> int:
        """Bytes on the memory's device."""

    @property
    def mark(self) -> int:
        """What `rewind` goes back to."""

    def rewind(self, mark: int) -> None:
        """Take back what was put since: the step that brought it failed."""

    def fork(self) -> Store:
        """An independent copy."""

    def snapshot(self) -> Store:
        """What it holds now, to be read only, while the original goes on."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""


class Fold(Answer):
    """What becomes of what leaves?

    from_start: whether the memory slots begin as the tokens that follow the sinks. content: whether it fills or frees
    slots by what is in them (merging, say), so that layers come to hold different tokens. rotated: whether it takes keys
    as they lie in the slots (`view.stored`), rotated once and for all, which goes with places that do not move. cut_free:
    whether queries read the same in whatever steps a causal stream comes. by_head: whether heads come to hold different
    tokens.
    """

    from_start: ClassVar[bool] = False
    content: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    rotated: ClassVar[bool] = False
    cut_free: ClassVar[bool] = False

    def slots(self, frame: int) -> int:
        """Number of memory slots (tokens) between sinks and window."""
        return 0

    def store(self, geometry: Geometry, frame: int) -> Store | None:
        """Opens what is kept outside of the arena, if anything is. Written to in `arrive` only."""
        return None

    def leave(self, view: View, leaving: Tensor) -> None:
        """Before attention, in every call of a chunk: `leaving` bool [R, G, n] marks what `view` still holds.

        Write into sink or memory slots with `view.write`, into own tensors by replacing entries of `view.mine`. What
        a call that is not committed writes is undone by the memory.
        """

    def arrive(self, view: View) -> None:
        """At the end of a committed step: fresh tokens are in their slots (`view.fresh`). May write as `leave`."""

    def read(self, view: View) -> Tensor | None:
        """What the queries read from own tensors, added to the attention's output: [B, H_q, m, D_v]."""
        return None


class Recall(Answer):
    """What may a query see?

    answer_place: which positions a question's answer gives to what was retrieved; None: contiguous ones.
    """

    answer_place: Place | None = None

    @property
    def cut_free(self) -> bool:
        """Whether each query of a causal stream sees the same in whatever steps it comes; what picks for a step does not."""
        return all(getattr(type(self), name) is getattr(Recall, name) for name in ("among", "attend"))

    def among(self, view: View) -> Tensor | None:
        """Bool [R, G, n]: which held and fresh tokens this step may attend at all, told by what is known of them."""
        return None

    def visible(self, query: Tensor, keys: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Bool mask over held and fresh tokens, or None to see everything that is allowed.

        query: rotated, [B, H_q, m, D]; keys: rotated, [B, H_kv, n, D]; allowed: bool, broadcastable to [B, H_q, m, n]
        (None: all). The answer has that shape, and may only take away.
        """
        return None

    def attend(
        self, view: View, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        """The attention itself, for answers that need not look at every key. Shapes as in `softmax_attention`."""
        return softmax_attention(query, keys, values, bias, scale, view.geometry.softcap, view.null)

    def wanted(self, view: View) -> Tensor | None:
        """Bool [R, G, n]: which held tokens `retrieve` may look at; None: any. Asked between steps, when a question comes."""
        return None

    def retrieve(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """For a question: keys (un-rotated) [B, H_kv, n, D], values [B, H_kv, n, D_v] and stream index [n] to answer from.

        `view` shows what the stream holds in this layer, with the question's queries as `view.query` and the own
        tensors of fold and recall in `view.mine`. The answer: sinks, what was selected and what else should be seen,
        by ascending stream index (int64 [n], or with EMPTY where a row or head has less, [B, n] or [B, H_kv, n]).
        """
        raise NotImplementedError(f"{type(self).__name__} does not answer questions; ask with step(commit=False)")


class Place(Answer):
    """Which positions do held tokens get?

    moves: whether a held token's position may change. If not, keys are stored rotated and never touched again. packed:
    whether positions are places in the cache, whatever was there between in the stream.
    """

    moves: ClassVar[bool] = True
    packed: bool = False

    def lag(self, position: Tensor, capacity: int | None) -> Tensor:
        """On the ring: how far sinks are moved up for a query at stream index `position` (int64, any shape).

        The window stays at its stream positions, which no score can tell from any other contiguous numbering; only
        what lies before the gap has to move. `capacity` counts sink + window; None has no bound.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run on the ring")

    def positions(self, view: View) -> Places:
        """On the arena: positions of all columns and of the queries."""
        raise NotImplementedError(f"{type(self).__name__} does not run on the arena")


@dataclass(frozen=True, eq=False)
class Places:
    """Positions on the time axis (frames, or tokens where a frame is one token).

    keys: int64 [R, G, n] for the columns of `view.index` (what stands where nothing is held does not matter).
    queries: int64 [R, m]. head_queries: int64 [R, m], where the queries stand as sinks and memory see them, −1 for a query
    that stands where it stands; None: all do. head_keys: int64 [R, G, sinks + memory], where these are then; None: where
    they are. laid: int64 [R, m], where places that do not move lay the keys of the fresh tokens; None: where their queries
    stand. What lies elsewhere than at `keys` must be sinks that lie at 0, un-rotated, and `head_queries` be given.
    reach: in causal steps, how far back in positions a query sees in the window; None: any.
    coordinates: False when the positions are complete in themselves, [R, G, n, axes] and [R, m, axes].
    """

    keys: Tensor
    queries: Tensor
    head_queries: Tensor | None = None
    head_keys: Tensor | None = None
    laid: Tensor | None = None
    reach: int | None = None
    coordinates: bool = True
