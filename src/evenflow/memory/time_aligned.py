"""Positions on one clock for words, sound and pictures: a time axis of 40 ms, rows and columns.

Every token stands at (t, h, w). Words and sound stand at the same number on all axes, one further each; a picture has
its rows and columns; a video's grids have the time at which they were taken. What follows a piece begins behind its
largest number. Sound and picture of one film are told together (`Film`): they share the clock, and come in turns of two
seconds, first what is seen, then what is heard. `InTurns` brings the tokens themselves along, for a model that is fed.

Source: Qwen2.5-Omni, arXiv 2503.20215, section on TMRoPE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SEEN, HEARD = 0, 1


@dataclass(frozen=True)
class Words:
    """So many tokens of text, or of sound that comes alone: 40 ms each."""

    count: int = 1


@dataclass(frozen=True)
class Marks:
    """So many tokens that share one place: what begins or ends a film."""

    count: int = 2


@dataclass(frozen=True)
class Picture:
    """Rows and columns of tokens, after merging."""

    height: int
    width: int


@dataclass(frozen=True)
class Film:
    """More grids of a film, and more tokens of its sound; whatever follows another `Film` directly goes on with it.

    grids of height · width tokens each, `seconds` apart; heard: tokens of 40 ms, None: the film is silent, and none waits.
    """

    grids: int
    height: int
    width: int
    seconds: float = 1.0
    heard: int | None = None


Piece = Words | Marks | Picture | Film


@dataclass(frozen=True, eq=False)
class Pending:
    """Tokens of a film that wait for their turn. key: int64 [n], twice the turn, and 1 for what is heard."""

    key: Tensor
    position: Tensor
    source: Tensor


NONE = Pending(
    torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
)


@dataclass(frozen=True, eq=False)
class FilmState:
    """A film that goes on. kind: height, width, whether it is silent; seconds: between grids. start: its place. grids,
    tokens: of each track so far. least: min of turn − number so far. last: the turn in which each track is. top: the
    latest key of all, and the number behind which the film ends."""

    kind: tuple[int, int, bool]
    seconds: float
    start: int
    grids: int = 0
    tokens: tuple[int, int] = (0, 0)
    least: tuple[int, int] = (0, 0)
    last: tuple[int, int] = (0, 0)
    top: tuple[int, int] = (-1, -1)
    waiting: Pending = NONE


@dataclass(frozen=True, eq=False)
class ClockState:
    """following: the place of a token of text that came now. arrived: tokens so far. film: the one that goes on."""

    following: int = 0
    arrived: int = 0
    film: FilmState | None = None

    @property
    def position(self) -> int:
        """Tokens that came."""
        return self.arrived

    @property
    def delta(self) -> int:
        """What is added to a token's number to have its place, when text goes on from here."""
        return self.following - self.arrived

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        return 0 if self.film is None else sum(x.nbytes for x in vars(self.film.waiting).values())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        state, film = {"clock": torch.tensor([self.following, self.arrived])}, self.film
        if film is not None:
            numbers = [*film.kind, film.start, film.grids, *film.tokens, *film.least, *film.last, *film.top]
            state |= {"film": torch.tensor(numbers), "seconds": torch.tensor(film.seconds, dtype=torch.float64)}
            state |= {name: x.clone() for name, x in vars(film.waiting).items()}
        return state

    @staticmethod
    def load(state: Mapping[str, Tensor]) -> ClockState:
        """The state that `state_dict` gave. Raises ValueError where it is none."""
        film, waiting = None, {"key", "position", "source"}
        if set(state) not in ({"clock"}, {"clock", "film", "seconds", *waiting}) or state["clock"].shape != (2,):
            raise ValueError(
                f"state holds {sorted(state)}; expected clock, and of a film film, seconds, {sorted(waiting)}"
            )
        if "film" in state:
            n = len(state["key"])
            shapes = [tuple(state[name].shape) for name in ("film", "key", "position", "source")]
            if shapes != [(13,), (n,), (n, 3), (n,)]:
                raise ValueError(f"film, key, position and source are {shapes}; expected [13], [n], [n, 3] and [n]")
            height, width, silent, start, grids, *pairs = state["film"].tolist()
            a, b, c, d, e, f, g, h = pairs
            film = FilmState(
                (height, width, bool(silent)), float(state["seconds"]), start, grids, (a, b), (c, d), (e, f), (g, h),
                Pending(*(state[name].clone() for name in ("key", "position", "source"))),
            )  # fmt: skip
        following, arrived = state["clock"].tolist()
        return ClockState(following, arrived, film)


@dataclass(frozen=True)
class TimeAligned:
    """The clock: `per_second` places a second, turns of `turn` seconds. `step(pieces, state) → placed, state`.

    A film's token comes out when its turn has come: what is heard waits for what is seen of its turn, whatever pieces both
    come in. `look_ahead` counts places. By the released rule, a track that jumps over several turns goes on one turn a
    token until it has caught up, times are computed in float32, and a film's end is that of its last turn; exact: turns
    are those of the clock, times are computed in float64, and nothing that follows a film comes before its largest number.
    """

    per_second: int = 25
    turn: float = 2.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.per_second < 1 or self.places < 1:
            raise ValueError(f"per_second is {self.per_second}, turn {self.turn}; a turn is one place or more")

    @property
    def places(self) -> int:
        """Places of a turn."""
        return int(self.per_second * self.turn)

    @property
    def look_ahead(self) -> int:
        """Places that a token of a film waits for, at most, where both tracks come in time; 0 for all others."""
        return self.places

    @property
    def reach(self) -> int:
        """Tokens back on which a place depends, beyond what the state says: none."""
        return 0

    def reset(self, first: int = 0, arrived: int = 0) -> ClockState:
        """The state at the start of a stream, or behind what has a place already.

        first: the place of what comes next, `int(stream.next_place)` of a model's stream. arrived: tokens before it, from
        which `order` and `delta` count, `stream.position`. Raises ValueError for what is below 0.
        """
        if min(first, arrived) < 0:
            raise ValueError(f"first is {first}, arrived {arrived}; places and tokens count from 0")
        return ClockState(int(first), int(arrived))

    def step(self, pieces: Iterable[Piece], state: ClockState) -> tuple[tuple[Tensor, Tensor], ClockState]:
        """Places of the tokens whose turn has come, int64 [n, 3], and which these are, int64 [n], by order of arrival.

        Of a `Film` the tokens of its grids arrive before those of its sound. Raises ValueError for a piece without a
        sense, and for a film that goes on with other grids.
        """
        placed: list[tuple[Tensor, Tensor]] = []
        for piece in pieces:
            _check(piece)
            if isinstance(piece, Film):
                out, state = self._film(piece, state)
            else:
                ended, state = self._ended(state)
                placed.append(ended)
                own = _own(piece) + state.following
                number = torch.arange(state.arrived, state.arrived + len(own))
                out = own, number
                following = int(own.max()) + 1 if len(own) else state.following
                state = replace(state, following=following, arrived=state.arrived + len(own))
            placed.append(out)
        return _together(placed), state

    def flush(self, state: ClockState) -> tuple[tuple[Tensor, Tensor], ClockState]:
        """The tokens that still wait, at the end of a film; the clock goes on."""
        return self._ended(state)

    def whole(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """All of a stream that has come: places and order, as from `step`."""
        placed, state = self.step(pieces, self.reset())
        last, _ = self.flush(state)
        return _together([placed, last])

    def _film(self, piece: Film, state: ClockState) -> tuple[tuple[Tensor, Tensor], ClockState]:
        kind, count = (piece.height, piece.width, piece.heard is None), piece.heard or 0
        film = state.film or FilmState(kind, float(piece.seconds), state.following)
        if (film.kind, film.seconds) != (kind, piece.seconds):
            raise ValueError(
                f"a film of (height, width, silent) {film.kind}, {film.seconds} s apart, goes on with {kind}, "
                f"{piece.seconds} s; end it with `Marks` or `Words` before"
            )
        size = piece.height * piece.width
        k = torch.arange(film.grids, film.grids + piece.grids)
        dtype = torch.float64 if self.exact else torch.float32
        times = (k * torch.tensor(piece.seconds, dtype=dtype) * self.per_second).long()
        grid = _own(Picture(piece.height, piece.width))
        seen = grid.repeat(piece.grids, 1)
        seen[:, 0] = times.repeat_interleave(size)
        heard = torch.arange(film.tokens[HEARD], film.tokens[HEARD] + count)[:, None].expand(-1, 3)
        keys, least, last = [], list(film.least), list(film.last)
        for track, new in ((SEEN, seen), (HEARD, heard)):
            turns = self._turns(new[:, 0], film.tokens[track], least[track])
            if len(turns):
                least[track] = int(turns[-1]) - (film.tokens[track] + len(turns) - 1)
                last[track] = int(turns[-1])
            keys.append(2 * turns + track)
        key, place = torch.cat(keys), torch.cat([seen, heard]) + film.start
        source = torch.arange(state.arrived, state.arrived + len(key))
        top = film.top
        if len(key):
            latest = max(top[0], int(key.max()))
            there = place[key == latest]
            before = top[1] if top[0] == latest else -1
            top = latest, max(before, int(there.max()) if len(there) else -1)
            if self.exact or piece.heard is None:
                top = latest, max(film.top[1], int(place.max()))
        was = film.waiting
        waiting = Pending(torch.cat([was.key, key]), torch.cat([was.position, place]), torch.cat([was.source, source]))
        film = replace(
            film, grids=film.grids + piece.grids, tokens=(film.tokens[SEEN] + len(seen), film.tokens[HEARD] + len(heard)),
            least=(least[SEEN], least[HEARD]), last=(last[SEEN], last[HEARD]), top=top,
        )  # fmt: skip
        # Whatever comes later has one of these keys or a later one, and comes after what has the same.
        until = None if piece.heard is None else min(2 * last[SEEN] + SEEN, 2 * last[HEARD] + HEARD)
        out, waiting = _parted(waiting, until)
        following = film.start if top[0] < 0 else top[1] + 1
        return out, replace(
            state, film=replace(film, waiting=waiting), following=following, arrived=state.arrived + len(key)
        )

    def _turns(self, times: Tensor, number: int, least: int) -> Tensor:
        """The turn of each token of a track, whose first here is its `number`th, at times since the film's start."""
        own = times // self.places
        if self.exact or not len(own):
            return own
        # turn(i) = min(turn(i − 1) + 1, own(i)): take i away, and it is a running minimum.
        order = torch.arange(number, number + len(own))
        behind = (own - order).cummin(0).values
        return (behind if not number else behind.clamp_max(least)) + order

    def _ended(self, state: ClockState) -> tuple[tuple[Tensor, Tensor], ClockState]:
        if state.film is None:
            return _together([]), state
        out, _ = _parted(state.film.waiting, None)
        return out, replace(state, film=None)


@dataclass(frozen=True, eq=False)
class TurnsState:
    """A clock, and what waits on it: rows [n, …], in order of arrival."""

    clock: ClockState
    rows: Tensor = NONE.source

    @property
    def position(self) -> int:
        """Tokens that came."""
        return self.clock.position

    @property
    def nbytes(self) -> int:
        """Bytes of what waits, and of the clock."""
        return self.clock.nbytes + self.rows.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        return self.clock.state_dict() | {"rows": self.rows.clone()}

    @staticmethod
    def load(state: Mapping[str, Tensor]) -> TurnsState:
        """The state that `state_dict` gave. Raises ValueError where it is none."""
        rows = state.get("rows")
        clock = ClockState.load({name: value for name, value in state.items() if name != "rows"})
        if rows is None or len(rows) != len(_waiting(clock)):
            raise ValueError(
                f"state holds {None if rows is None else len(rows)} rows; expected those of {len(_waiting(clock))} "
                "tokens that wait"
            )
        return TurnsState(clock, rows.clone())


@dataclass(frozen=True)
class InTurns:
    """Tokens in the order of their turns, each with its place: what a model's stream is to be fed next.

    `step(pieces, rows, state) → ((rows, places), state)`, to go on with, where any came out,
    `stream.feed(embeds=rows, tags={"coordinates": places})`. Held is what waits: up to a turn of sound, and what is seen
    of a turn, where both tracks come in time. Words that are fed without places go on behind the largest number, as the
    model's `generate` does; by the released rule words of a prompt may begin earlier, behind a film that is broader than
    it is long: give these their places.
    """

    clock: TimeAligned = TimeAligned()

    def reset(self, first: int = 0, arrived: int = 0) -> TurnsState:
        """The state at the start of a stream, or at the place `first`; see `TimeAligned.reset`."""
        return TurnsState(self.clock.reset(first, arrived))

    def step(
        self, pieces: Iterable[Piece], rows: Tensor, state: TurnsState
    ) -> tuple[tuple[Tensor, Tensor], TurnsState]:
        """Rows whose turn has come, [n, …], and their places, int64 [n, 3].

        rows: one for each token of the pieces, in order of arrival: features [m, hidden], or ids [m]; of a `Film` those
        of its grids before those of its sound. Raises ValueError for what `TimeAligned.step` refuses, and for rows that are
        too many, too few, or of another kind than what waits.
        """
        placed, clock = self.clock.step(pieces, state.clock)
        return self._turned(rows, state, placed, clock)

    def flush(self, state: TurnsState) -> tuple[tuple[Tensor, Tensor], TurnsState]:
        """What still waits, at the end of a film; the clock goes on."""
        placed, clock = self.clock.flush(state.clock)
        return self._turned(state.rows[:0], state, placed, clock)

    @staticmethod
    def _turned(
        rows: Tensor, before: TurnsState, placed: tuple[Tensor, Tensor], clock: ClockState
    ) -> tuple[tuple[Tensor, Tensor], TurnsState]:
        (places, order), held = placed, before.rows
        came = torch.arange(before.clock.arrived, clock.arrived)
        if len(rows) != len(came):
            raise ValueError(f"{len(rows)} rows came for {len(came)} tokens; expected one for each")
        if len(held) and (rows.shape[1:], rows.dtype) != (held.shape[1:], held.dtype):
            raise ValueError(
                f"rows are {rows.dtype} {list(rows.shape[1:])}, those that wait {held.dtype} {list(held.shape[1:])}"
            )
        held = torch.cat([held, rows]) if len(held) else rows
        # Both parts are in order of arrival, so that a token's number says where its row is.
        known = torch.cat([_waiting(before.clock), came])
        out, rest = (held[torch.searchsorted(known, those).to(held.device)] for those in (order, _waiting(clock)))
        return (out, places), TurnsState(clock, rest)


def _waiting(clock: ClockState) -> Tensor:
    """Which tokens wait, int64 [n], rising."""
    return NONE.source if clock.film is None else clock.film.waiting.source


def _parted(waiting: Pending, until: int | None) -> tuple[tuple[Tensor, Tensor], Pending]:
    """What has a key up to `until` (None: all), in order, and what goes on waiting."""
    go = torch.ones_like(waiting.key, dtype=torch.bool) if until is None else waiting.key <= until
    order = waiting.key[go].argsort(stable=True)
    rest = Pending(waiting.key[~go], waiting.position[~go], waiting.source[~go])
    return (waiting.position[go][order], waiting.source[go][order]), rest


def _together(placed: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([NONE.position, *(p for p, _ in placed)]), torch.cat([NONE.source, *(s for _, s in placed)])


def _own(piece: Words | Marks | Picture) -> Tensor:
    """Places within a piece, int64 [n, 3]."""
    if isinstance(piece, Picture):
        rows, columns = torch.meshgrid(torch.arange(piece.height), torch.arange(piece.width), indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    at = torch.arange(piece.count)[:, None].expand(-1, 3)
    return torch.zeros_like(at) if isinstance(piece, Marks) else at


def _check(piece: Piece) -> None:
    if not isinstance(piece, Words | Marks | Picture | Film):
        raise ValueError(f"a piece is {piece!r}; it must be Words, Marks, a Picture or a Film")
    for name, value in vars(piece).items():
        least = 1 if name in ("height", "width") else 0
        if name == "seconds":
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"seconds is {value!r}; grids are a number of seconds apart, above 0")
        elif value is None and name == "heard":
            continue
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, {least} or more")
