"""Each answer in a memory put together by hand, other than its recipe's, against the plainest statement of both."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import evenflow as ef
from evenflow.memory import (
    Absolute,
    AllHeld,
    Averaged,
    BestBlocks,
    ByHeadGroup,
    Clipped,
    Contiguous,
    Convolved,
    Dropped,
    LastByModality,
    LastSeconds,
    LeastAttended,
    LeastDiverse,
    LinearState,
    Memory,
    MemoryState,
    Merged,
    Never,
    Oldest,
    Pages,
    Realigned,
    Regions,
    RoundsByModality,
    SameBucket,
    Spilled,
    TextFirst,
    Thinned,
    Timeless,
    TopBlocks,
)
from evenflow.memory.hashing import bucket_codes, hyperplanes
from evenflow.recipes.reference import attention, rotated

from .drive import Inputs, random_inputs

HEADS, KV_HEADS, DIM = 4, 2, 12
FLAT, VIDEO = ef.Rope(), ef.Rope.axial((4, 4, 4))
GEOMETRY = {"layers": 1, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": torch.float64, "rope": FLAT}


# -- the plainest memory: lists of tokens, one a key head ----------------------------------------------------------


@dataclass(eq=False)
class Token:
    """index: where in the stream it is from, −1 for what was folded."""

    index: int
    key: Tensor
    value: Tensor
    place: tuple[int, ...] = ()  # coordinates
    weight: float = 0.0


Held = list[Token]


@dataclass
class Plain:
    """The answers as functions. evict(held, fresh, head): what stays. fold(held, gone, head): what is held then.

    places(held): position of each in frames; sees(held, query index, rotated keys, rotated query): which are attended.
    read(query index, query): what is added. arrive(held, fresh, head, queries): what is held after the step.
    """

    evict: Callable[[Held, Held, int], Held]
    places: Callable[[Held], list[int]]
    fold: Callable[[Held, Held, int], Held] | None = None
    sees: Callable[[Held, int, Tensor, Tensor], list[bool]] | None = None
    read: Callable[[int, Tensor, tuple[int, ...], int], Tensor] | None = None
    arrive: Callable[[Held, int, Tensor], Held] | None = None
    causal: bool = True
    rope: ef.Rope | None = FLAT

    def run(self, inputs: Inputs, cuts: list[int], grid: Tensor | None = None) -> tuple[Tensor, list[list[int]]]:
        """Outputs [H_q, N, D_v] of one layer; the stream indices held in each key head at the end."""
        q, k, v = (x[0] for x in inputs)
        held: list[Held] = [[] for _ in k]
        out, start = torch.zeros(len(q), q.shape[1], v.shape[-1], dtype=torch.float64), 0
        where = [() if grid is None else tuple(row.tolist()) for row in (q[0] if grid is None else grid)]
        for m in cuts:
            for head in range(len(k)):
                fresh = [Token(i, k[head, i], v[head, i], where[i]) for i in range(start, start + m)]
                stays = self.evict(held[head], fresh, head)
                if self.fold is not None:
                    stays = self.fold(stays, [t for t in held[head] if t not in stays], head)
                held[head] = stays
                self.attend(q, out, stays, head, range(start, start + m), where)
                if self.arrive is not None:
                    group = slice(head * len(q) // len(k), (head + 1) * len(q) // len(k))
                    held[head] = self.arrive(stays, start + m, q[group])
            start += m
        return out, [[token.index for token in tokens] for tokens in held]

    def attend(self, q: Tensor, out: Tensor, held: Held, head: int, fresh: range, where: list[tuple[int, ...]]) -> None:
        places = self.places(held)
        keys = rotated(
            torch.stack([t.key for t in held]), [(p, *t.place) for p, t in zip(places, held, strict=True)], self.rope
        )
        groups = len(q) // KV_HEADS
        for h in range(head * groups, (head + 1) * groups):
            for i in fresh:
                at = (places[[t.index for t in held].index(i)], *where[i])
                query = rotated(q[h, i : i + 1], [at], self.rope)
                seen = [t.index <= i or not self.causal for t in held]
                if self.sees is not None:
                    more = self.sees(held, i, keys, query)
                    seen = [a and b for a, b in zip(seen, more, strict=True)]
                few = [n for n, yes in enumerate(seen) if yes]
                bias = torch.tensor([[[held[n].weight for n in few]]], dtype=torch.float64)
                values = torch.stack([held[n].value for n in few])
                out[h, i] = attention(query[None], keys[None, few], values[None], bias)[0, 0]
                if self.read is not None:
                    out[h, i] += self.read(h, q[h, i], at, i)


def frames(held: Held, frame: int = 1) -> list[int]:
    """Positions in the stream."""
    return [token.index // frame for token in held]


def packed(held: Held) -> list[int]:
    return list(range(len(held)))


def oldest(sink: int, window: int, *, with_fresh: bool = False) -> Callable[[Held, Held, int], Held]:
    """In tokens."""

    def evict(held: Held, fresh: Held, head: int) -> Held:
        first = (fresh[-1].index + 1 if with_fresh else fresh[0].index) - window
        return [t for t in held if t.index < sink or t.index >= first] + fresh

    return evict


def cut(inputs: list[Inputs], cuts: list[int]) -> list[Inputs]:
    return [tuple(x[:, :, : sum(cuts)] for x in layer) for layer in inputs]


def fed(state: MemoryState, inputs: list[Inputs], cuts: list[int], **tags: Tensor) -> list[Tensor]:
    """Outputs [H_q, N, D_v] of each layer; tags [N, …]."""
    pieces, at = [], 0
    for m in cuts:
        given = {name: tag[at : at + m] for name, tag in tags.items()}
        with state.step(m, tags=given or None):
            pieces.append([state.attend(n, *(x[:, :, at : at + m] for x in layer)) for n, layer in enumerate(inputs)])
        at += m
    return [torch.cat(layer, 2)[0] for layer in zip(*pieces, strict=True)]


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def checked(memory: Memory, plain: Plain, cuts: list[int], **tags: Tensor) -> None:
    """One layer of the memory against the plain one: outputs, and what every head holds."""
    state = memory.build(**{**GEOMETRY, "rope": plain.rope})
    inputs = random_inputs(state, sum(cuts))
    expected, held = plain.run(inputs[0], cuts, tags.get("coordinates"))
    same(fed(state, inputs, cuts, **tags)[0], expected)
    if memory.evict.content or memory.fold.content:
        assert [state.held(0, 0, head) for head in range(KV_HEADS)] == held


# -- evict ---------------------------------------------------------------------------------------------------------


def test_the_least_diverse_keys_of_a_text_leave():
    """In causal steps the fresh tokens have no say and stay; every head holds others, and numbers them in the cache."""
    sink, total = 2, 9

    def evict(held: Held, fresh: Held, head: int) -> Held:
        firsts = [t for t in held + fresh if t.index < sink]
        stays, others = firsts + [t for t in fresh if t not in firsts], [t for t in held if t not in firsts]
        if others:
            units = torch.stack([t.key / t.key.norm() for t in others])
            alike = (units @ units.mean(0)).tolist()
            others = [others[n] for n in sorted(range(len(others)), key=alike.__getitem__)][
                : max(0, total - len(stays))
            ]
        return sorted(stays + others, key=lambda t: t.index)

    memory = Memory(sink=sink, evict=LeastDiverse(total), place=Contiguous())
    checked(memory, Plain(evict, packed), [1, 3, 4, 2, 1, 1, 1, 3, 4, 1])


@pytest.mark.parametrize("fusion", ["sum", "max"])
def test_the_least_attended_tokens_of_a_text_leave(fusion):
    """The queries before a step decide: those of the step would tell its first tokens of its last."""
    sink, window, capacity, recent = 1, 7, 5, 2
    memory = Memory(sink=sink, window=window, evict=LeastAttended(capacity, recent, fusion), place=Absolute())
    state = memory.build(**GEOMETRY)
    inputs, cuts = random_inputs(state, 30), [1, 2, 1, 1] * 6
    inputs = cut(inputs, cuts)
    q, k, _ = (x[0] for x in inputs[0])
    groups = HEADS // KV_HEADS

    def evict(held: Held, fresh: Held, head: int) -> Held:
        now = fresh[0].index
        if len(held) + len(fresh) <= sink + window:
            return held + fresh
        last = max(len(fresh), recent)
        fixed = [t for t in held if t.index < sink or t.index >= now + len(fresh) - last]
        free = [t for t in held if t not in fixed]

        def used(t: Token) -> float:  # all heads choose together
            total = torch.zeros(recent, dtype=torch.float64)
            for h in range(HEADS):
                key = rotated(k[h // groups, t.index][None], [t.index], FLAT)
                total += (rotated(q[h, now - recent : now], list(range(now - recent, now)), FLAT) @ key.T)[:, 0]
            return float(total.sum() if fusion == "sum" else total.max())

        best = sorted(free, key=used, reverse=True)[: max(0, capacity - sink - last)]
        return sorted(fixed + best, key=lambda t: t.index) + fresh

    expected, _ = Plain(evict, frames).run(inputs[0], cuts)
    same(fed(state, inputs, cuts)[0], expected)


def test_budgets_by_kind_of_head_go_with_positions_in_the_cache():
    """Heads that hold different numbers of tokens each count their own, and end together."""
    frame, chunk, last = 2, 2, {0: 1, 1: 3}  # frames that a key head keeps
    memory = Memory(
        sink=1, window=3, frame=frame, chunk=chunk, inside="both", place=Contiguous(),
        evict=ByHeadGroup(((), (0,)), recent=3, static_recent=1),
    )  # fmt: skip
    state = memory.build(**{**GEOMETRY, "layers": 2})
    cuts = [frame * chunk] * 6
    inputs = random_inputs(state, sum(cuts))

    def evict(held: Held, fresh: Held, head: int) -> Held:
        now = fresh[0].index
        before = last[head] if now >= 2 * len(fresh) else 3
        return [t for t in held if t.index < frame or t.index >= now - before * frame] + fresh

    plain = Plain(evict, lambda held: [n // frame for n in range(len(held))], causal=False)
    expected, held = plain.run(inputs[1], cuts)
    same(fed(state, inputs, cuts)[1], expected)
    assert [state.held(1, 0, head) for head in range(KV_HEADS)] == held
    assert len(held[0]) < len(held[1])


def test_windows_by_round_go_with_any_positions():
    kinds = torch.tensor([0, 0, *[1, 1, 2, 0, 0] * 6])
    segments = torch.tensor([0, 0, *[n // 5 + 1 for n in range(30)]])

    def evict(held: Held, fresh: Held, head: int) -> Held:
        now = int(segments[fresh[0].index])
        texts = [
            t.index for t in held if kinds[t.index] == 0 and (segments[t.index] == 0 or segments[t.index] <= now - 2)
        ]
        gone = {i for n, i in enumerate(texts) if 1 <= n < len(texts) - 2}
        gone |= {t.index for t in held if kinds[t.index] == 1 and segments[t.index] <= now - 1}
        gone |= {t.index for t in held if kinds[t.index] == 2 and segments[t.index] <= now - 2}
        return [t for t in held if t.index not in gone] + fresh

    memory = Memory(evict=RoundsByModality(pictures=1, text_round=2, text_sink=1, text_window=2), place=Absolute())
    checked(memory, Plain(evict, frames), [2, *[2, 1, 2] * 6], modality=kinds, segment=segments)


OTHERS = {
    "contiguous": {"place": Contiguous(), "inside": "causal", "frame": 1},
    "realigned": {"place": Realigned(), "inside": "causal", "frame": 1},
    "text first": {"place": TextFirst(2), "inside": "causal", "frame": 1},
    "linear": {"fold": LinearState(projection=0.5)},
    "merged": {"fold": Merged(0.2, "key", "mean")},
    "thinned": {"fold": Thinned(3, 3, 6, 0.5, 1, 2, packed=False)},
    "blocks": {"recall": BestBlocks(0.5, 3)},
    "buckets": {"recall": SameBucket(2, 2)},
}


@pytest.mark.parametrize("others", OTHERS.values(), ids=OTHERS.keys())
def test_heads_that_hold_different_tokens_are_memories_of_their_own(others):
    """Whatever else a memory does, and fresh tokens that are turned away in one head change nothing in another."""
    memory = Memory(
        **{"frame": 3, "inside": "both", "sink": 1, "place": Absolute(), "evict": LeastDiverse(14), **others}
    )
    state = memory.build(**GEOMETRY)
    inputs, cuts = random_inputs(state, 48), [6] * 8
    got = fed(state, inputs, cuts)[0]
    held = [state.held(0, 0, head) for head in range(KV_HEADS)]
    assert held[0] != held[1]
    for head in range(KV_HEADS):
        one = memory.build(**{**GEOMETRY, "heads": 2, "kv_heads": 1})
        part = [(q[:, 2 * head : 2 * head + 2], *(x[:, head : head + 1] for x in (k, v))) for q, k, v in inputs]
        # The linear state's guard against 0 / 0 is set against the count of the head that took most in.
        near = 1e-5 if isinstance(memory.fold, LinearState) else 1e-11
        torch.testing.assert_close(fed(one, part, cuts)[0], got[2 * head : 2 * head + 2], rtol=0, atol=near)
        assert one.held(0) == held[head]


# -- fold ----------------------------------------------------------------------------------------------------------


def test_what_leaves_is_averaged_into_sinks_that_keep_their_places_in_the_stream():
    sink, window, frame, alpha = 2, 3, 2, 0.7

    def fold(stays: Held, gone: Held, head: int) -> Held:
        stays = list(stays)
        for t in gone:
            n = t.index % (sink * frame)
            old = stays[n]
            mixed = (alpha * a + (1 - alpha) * b for a, b in ((old.key, t.key), (old.value, t.value)))
            stays[n] = Token(old.index, *mixed)
        return stays

    memory = Memory(sink=sink, window=window, frame=frame, inside="both", fold=Averaged(alpha), place=Absolute())
    plain = Plain(oldest(sink * frame, window * frame), lambda held: frames(held, frame), fold, causal=False)
    checked(memory, plain, [4, 2, 4, 2, 6, 4, 6, 2])


def test_the_convolved_past_goes_with_regions():
    frame, window, second, trained = 2, 2, 4, 9
    seen = {"now": 0}

    def fold(stays: Held, gone: Held, head: int) -> Held:
        seen["now"] = stays[-1].index + 1
        if not gone:
            return stays
        memory, rest = stays[frame : 2 * frame], stays[2 * frame :]
        group = memory + gone  # five frames
        assert len(group) == 5 * frame
        for place in range(frame):
            mean = [torch.stack([getattr(t, x) for t in group[place::frame]]).mean(0) for x in ("key", "value")]
            memory[place] = Token(-1, *mean)
        return stays[:frame] + memory + rest

    def evict(held: Held, fresh: Held, head: int) -> Held:
        first = fresh[0].index - window * frame
        return held[: 2 * frame] + [t for t in held[2 * frame :] if t.index >= first] + fresh

    def places(held: Held) -> list[int]:
        back = max(0, seen["now"] // frame - trained)
        return [0] * frame + [second] * frame + [t.index // frame - back for t in held[2 * frame :]]

    memory = Memory(
        sink=1, window=window, frame=frame, inside="both", fold=Convolved(1), place=Regions(trained, second)
    )
    inputs = random_inputs(memory.build(**GEOMETRY), 8 + 4 * 8)
    state, cuts = memory.build(**GEOMETRY), [8] * 5  # sink, memory and window; then four frames a step
    expected, _ = Plain(evict, places, fold, causal=False).run(inputs[0], cuts)
    got = fed(state, inputs, cuts)[0]
    same(got[:, 8:], expected[:, 8:])  # a query of the first step stands where the stream is, its key in a region
    assert state.held(0)[:5] == [0, 1, -1, -1, 36]


def test_a_linear_state_remembers_what_seconds_let_go_where_it_was():
    """Slots are used again by tokens of other rows and columns; what leaves keeps its own."""
    length, seconds, p = 24, 2.5, 0.4
    time, grid = torch.arange(length) * 0.5, torch.stack([torch.arange(length) % 5, torch.arange(length) % 3], -1)
    taken: list[list[Token]] = [[] for _ in range(KV_HEADS)]

    def evict(held: Held, fresh: Held, head: int) -> Held:
        return [t for t in held if t.index < 2 or time[t.index] >= time[fresh[0].index] - seconds - 1e-6] + fresh

    def fold(stays: Held, gone: Held, head: int) -> Held:
        taken[head] += gone
        return stays

    def read(head: int, query: Tensor, at: tuple[int, ...], i: int) -> Tensor:
        above, below = torch.zeros(DIM, dtype=torch.float64), 0.0
        features = query.relu()
        turned = rotated(features[None], [at], VIDEO)[0]
        for t in taken[head * KV_HEADS // HEADS]:
            key = rotated(t.key[None], [(t.index, *t.place)], VIDEO)[0]
            above, below = above + (turned @ key) * t.value, below + float(features @ t.key.relu())
        count = max(1, len(taken[head * KV_HEADS // HEADS]))
        return p * (above / count) / (below / count + 1e-6)

    memory = Memory(sink=2, evict=LastSeconds(seconds), fold=LinearState(projection=p), place=Absolute())
    plain = Plain(evict, frames, fold, read=read, rope=VIDEO)
    checked(memory, plain, [1] * length, time=time, coordinates=grid)
    assert len(taken[0]) > 12


@pytest.mark.parametrize(
    "evict", [Never(), LastSeconds(1000), LastByModality({0: 1000})], ids=lambda e: type(e).__name__
)
def test_repeats_that_are_merged_attend_as_if_each_were_there(evict):
    """Where place means nothing, m equal keys are one that counts m times; sinks and what is new stay single."""
    merged = Memory(sink=1, evict=evict, fold=Merged(0.999), place=Timeless())
    every = Memory(sink=1, evict=evict, place=Timeless())
    states = [memory.build(**{**GEOMETRY, "rope": None}) for memory in (merged, every)]
    inputs = random_inputs(states[0], 30)
    source = torch.tensor([n // 3 for n in range(30)])  # each token three times
    inputs = [(q, k[:, :, source], v) for q, k, v in inputs]
    got, expected = (fed(s, inputs, [1, 4, 2, 3] * 3, time=torch.arange(30.0))[0] for s in states)
    same(got, expected)
    assert states[0].held(0) == [0, *range(2, 30, 3)] and len(states[1].held(0)) == 30


@pytest.mark.parametrize("by_head", [False, True])
def test_a_window_is_thinned_by_what_its_newest_queries_attend(by_head):
    """Where heads hold different tokens, each chooses for itself."""
    keep, recent, clip, observe, sink, window = 4, 3, 6, 2, 1, 12
    evict = LeastDiverse(14) if by_head else Oldest()
    memory = Memory(
        sink=sink, window=None if by_head else window, evict=evict, fold=Thinned(keep, recent, clip, 0.0, 1, observe),
        place=Timeless(),
    )  # fmt: skip
    state = memory.build(**{**GEOMETRY, "rope": None})
    inputs, cuts = random_inputs(state, 36), [3] * 12
    fed(state, inputs, cuts)
    q, k, _ = (x[0] for x in inputs[0])
    held: list[list[int]] = [[], []]
    for now in range(3, 37, 3):
        fresh = list(range(now - 3, now))
        for head in range(KV_HEADS):
            old = held[head]
            if not by_head:
                old = [i for i in old if i < sink or i >= now - 3 - window]
            elif len([i for i in old if i >= sink]):
                others = [i for i in old if i >= sink]
                units = torch.nn.functional.normalize(k[head, others], dim=1)
                alike = (units @ units.mean(0)).tolist()
                room = max(0, 14 - sink - len([i for i in fresh if i >= sink]))
                others = [others[n] for n in sorted(range(len(others)), key=alike.__getitem__)][:room]
                old = [i for i in old if i < sink] + sorted(others)
            held[head] = old + fresh
        if now % clip == 0:
            marks = []
            for h in range(HEADS):
                at, mass = held[h // 2], torch.zeros(now, dtype=torch.float64)
                for i in range(now - observe, now):
                    seen = [j for j in at if j <= i]
                    mass[seen] += torch.softmax(k[h // 2, seen] @ q[h, i] / DIM**0.5, 0)
                marks.append(mass)
            for head in range(KV_HEADS):
                mass = torch.stack(marks if not by_head else marks[2 * head : 2 * head + 2]).sum(0)
                old = [i for i in held[head] if sink <= i < now - recent]
                if len(old) > keep:
                    best = sorted(old, key=lambda i: -float(mass[i]))[:keep]
                    held[head] = sorted({*held[head]} - {*old} | {*best})
    assert [state.held(0, 0, head) for head in range(KV_HEADS)] == held


# -- recall --------------------------------------------------------------------------------------------------------


def test_the_best_blocks_of_a_plain_window_are_attended():
    """Blocks of 4 of what is held, in its order, half of them, by mean query and mean key; causality is the chunk's."""
    block, sink, window = 4, 2, 9
    cuts = [4] * 8
    memory = Memory(sink=sink, window=window, frame=1, inside="both", recall=BestBlocks(0.5, block), place=Contiguous())
    state = memory.build(**GEOMETRY)
    inputs = random_inputs(state, 32)
    got = fed(state, inputs, cuts)[0]
    q, k, v = (x[0] for x in inputs[0])
    for start in range(0, 32, 4):
        held = [i for i in range(start + 4) if i < sink or i >= start - window]
        own = list(range(len(held) - 4, len(held)))
        for h in range(HEADS):
            keys = rotated(k[h // 2, held], list(range(len(held))), FLAT)
            queries = rotated(q[h, start : start + 4], own, FLAT)
            parts = [list(range(a, min(a + block, len(held)))) for a in range(0, len(held), block)]
            score = [float(queries.mean(0) @ keys[part].mean(0)) for part in parts]
            best = sorted(range(len(parts)), key=lambda n: -score[n])[: max(1, int(0.5 * len(parts)))]
            few = [i for n in best for i in parts[n]]
            expected = attention(queries[None], keys[None, few], v[None, h // 2][:, [held[i] for i in few]])[0]
            same(got[h, start : start + 4], expected)


def test_buckets_go_with_keys_that_are_least_alike():
    """A query sees what shares a bucket with it, and its own frame, of what its key head holds."""
    frame, sink, total = 2, 1, 13
    memory = Memory(
        sink=sink, frame=frame, inside="both", evict=LeastDiverse(total), recall=SameBucket(2, 1), place=Timeless()
    )
    every = replace(memory, recall=AllHeld())
    planes = hyperplanes(DIM, 2, tables=1, like=torch.zeros(0, dtype=torch.float64))
    inputs = random_inputs(memory.build(**GEOMETRY), 40)
    q, k, v = (x[0] for x in inputs[0])
    state, other = (m.build(**{**GEOMETRY, "rope": None}) for m in (memory, every))
    for start in range(0, 40, 4):
        part = [tuple(x[:, :, start : start + 4] for x in layer) for layer in inputs]
        got = fed(state, part, [4])[0]
        fed(other, part, [4])
        for h in range(HEADS):
            held = other.held(0, 0, h // 2)
            assert held == state.held(0, 0, h // 2)
            for i in range(start, start + 4):
                mine = bucket_codes(q[h, i], planes)
                few = [
                    j for j in held
                    if bool((bucket_codes(k[h // 2, j], planes) == mine).any()) or (j >= start and j // frame == i // frame)
                ]  # fmt: skip
                expected = (
                    attention(q[None, h, i : i + 1], k[None, h // 2, few], v[None, h // 2, few])[0, 0] if few else 0
                )
                same(got[h, i - start], expected * torch.ones(DIM, dtype=torch.float64))


def asked(state: MemoryState, query: Inputs) -> tuple[Tensor, list[list[int]]]:
    """What a question of one layer reads, [H_q, m, D_v]; what each key head brought back."""
    question = state.question()
    with question.retrieve(query[0].shape[2]):
        out = question.attend(0, *query)[0]
    return out, [question.held(0, 0, head) for head in range(KV_HEADS)]


def test_pages_bring_back_of_a_window_what_a_question_attends():
    recent, page, sink = 3, 2, 1
    memory = Memory(sink=sink, evict=LastSeconds(11), recall=Pages(recent, page, 0.5, Absolute()), place=Absolute())
    state = memory.build(**{**GEOMETRY, "rope": None})
    inputs = random_inputs(state, 30)
    fed(state, inputs, [1] * 30, time=torch.arange(30.0))
    query = random_inputs(state, 3, seed=1)[0]
    out, found = asked(state, query)
    k, v = (x[0] for x in inputs[0][1:])
    held = [0, *range(18, 30)]
    old = [i for i in held if sink <= i < 30 - recent]
    pages = [old[n : n + page] for n in range(0, len(old), page)]
    scores = torch.zeros(len(pages), dtype=torch.float64)
    for h in range(HEADS):
        means = torch.stack([k[h // 2, part].mean(0) for part in pages])
        scores += torch.softmax(query[0][0, h] @ means.T / DIM**0.5, -1).mean(0)
    taken, read = [], 0
    for n in scores.argsort(descending=True).tolist():
        if read < 0.5 * len(old):
            taken, read = [*taken, *pages[n]], read + len(pages[n])
    expected = sorted({0, *taken, *range(27, 30)})
    assert found == [expected, expected]
    keys, values = (torch.cat([x[:, expected], y[0]], 1) for x, y in ((k, query[1]), (v, query[2])))
    bias = torch.full((3, len(expected) + 3), -math.inf, dtype=torch.float64).triu(len(expected) + 1)
    same(out, attention(query[0][0], keys, values, bias))


def test_a_question_reads_every_head_for_itself_where_heads_hold_different_tokens():
    memory = Memory(sink=1, evict=LeastDiverse(9), recall=Pages(1, 2, 1.0, Timeless()), place=Timeless())
    state = memory.build(**{**GEOMETRY, "rope": None})
    inputs = random_inputs(state, 24)
    fed(state, inputs, [1] * 24)
    held = [state.held(0, 0, head) for head in range(KV_HEADS)]
    query = random_inputs(state, 1, seed=1)[0]
    out, found = asked(state, query)
    assert found == held and held[0] != held[1]
    for h in range(HEADS):
        keys, values = (torch.cat([inputs[0][n][0, h // 2, held[h // 2]], query[n][0, h // 2]]) for n in (1, 2))
        same(out[h], attention(query[0][0, h : h + 1], keys[None], values[None])[0])


def test_a_question_knows_how_much_merged_tokens_count_and_where_they_are():
    """The same question to a memory that holds every token: the same answer, with weights and with coordinates."""
    merged = Memory(evict=Never(), fold=Merged(0.999), recall=Pages(1, 2, 1.0, Timeless()), place=Timeless())
    memories = merged, replace(merged, fold=Dropped())
    states = [memory.build(**{**GEOMETRY, "rope": VIDEO}) for memory in memories]
    inputs, source = random_inputs(states[0], 24), torch.tensor([n // 4 for n in range(24)])
    inputs = [(q, k[:, :, source], v) for q, k, v in inputs]
    grid = torch.stack([source % 3, source % 5], -1)
    query = random_inputs(states[0], 2, seed=1)[0]
    answers = []
    for state in states:
        fed(state, inputs, [1] * 24, coordinates=grid)
        answers.append(asked(state, query)[0])
    same(*answers)
    keys = rotated(inputs[0][1][0], [(0, *row) for row in grid.tolist()], VIDEO)
    held = (torch.cat([a, b[0, :, :1]], 1) for a, b in ((keys, query[1]), (inputs[0][2][0], query[2])))
    expected = attention(query[0][0, :, :1], *held)
    same(answers[0][:, :1], expected)


def test_all_blocks_off_the_device_are_the_whole_stream():
    memory = Memory(
        sink=1,
        evict=LastSeconds(4),
        fold=Spilled(3, 10**6),
        recall=TopBlocks(100, answer_place=Timeless()),
        place=Timeless(),
    )
    state = memory.build(**{**GEOMETRY, "rope": None})
    inputs = random_inputs(state, 24)
    fed(state, inputs, [1, 2, 3, 2] * 3, time=torch.arange(24.0))
    query = random_inputs(state, 1, seed=1)[0]
    out, found = asked(state, query)
    assert found == [list(range(24))] * 2 and len(state.held(0)) < 12
    same(out, attention(query[0][0], *(torch.cat([inputs[0][n], query[n]], 2)[0] for n in (1, 2))))


# -- place ---------------------------------------------------------------------------------------------------------


def positions(place: str, held: Held, now: int, sink: int, behind: int) -> list[int]:
    """In frames of 2, after a step that ends at token `now`."""
    if place == "timeless":
        return [0] * len(held)
    if place == "clipped":
        return [t.index // 2 - (0 if t.index < sink else max(0, now // 2 - 7)) for t in held]
    if place == "regions":
        return [t.index // 2 - (0 if t.index < sink else max(0, now // 2 - 8)) for t in held]
    assert place == "realigned"
    return [t.index // 2 + (behind if t.index < sink else 0) for t in held]


@pytest.mark.parametrize(
    ("place", "answer"),
    [("timeless", Timeless()), ("clipped", Clipped(7)), ("regions", Regions(8, 3)), ("realigned", Realigned())],
    ids=["timeless", "clipped", "regions", "realigned"],
)
def test_positions_go_with_a_plain_window(place, answer):
    frame, sink, window = 2, 4, 8
    moved = {"first": 0, "now": 0}
    evicted = oldest(sink, window, with_fresh=True)

    def evict(held: Held, fresh: Held, head: int) -> Held:
        stays = evicted(held, fresh, head)
        moved["now"] = fresh[-1].index + 1
        if len(stays) < len(held) + len(fresh):  # the sinks end where the others begin
            moved["first"] = fresh[0].index // frame - len(stays[sink:]) // frame - sink // frame
        return stays

    def places(held: Held) -> list[int]:
        return positions(place, held, moved["now"], sink, moved["first"])

    memory = Memory(sink=2, window=4, frame=frame, inside="both", evict=Oldest(True), place=answer)
    checked(memory, Plain(evict, places, causal=False), [4, 2, 2, 4, 4, 2, 6, 4, 2])


@pytest.mark.parametrize("evict", [Oldest(), LastByModality({0: 7})], ids=["oldest", "by modality"])
def test_words_without_rounds_stand_in_the_cache(evict):
    window = 7 if isinstance(evict, Oldest) else None
    memory = Memory(sink=2, window=window, evict=evict, place=TextFirst(3))
    plain = Plain(oldest(2, 7), packed)
    checked(memory, plain, [1] * 25)
