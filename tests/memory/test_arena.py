"""Memories in an arena against their plain definition, and what must hold for any composition of answers."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import evenflow as ef
from evenflow.memory import (
    EMPTY,
    Absolute,
    AllHeld,
    Contiguous,
    Dropped,
    Evict,
    Fold,
    Memory,
    Never,
    Oldest,
    Place,
    Places,
    Recall,
    View,
)  # fmt: skip
from evenflow.recipes.reference import Call, attention, rotated

from ..recipes.drive import play, random_calls, worst

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "dtype": torch.float64}
ROPE = ef.Rope.axial((4, 4, 4))


def defined(
    script: list[list[Call]], *, sink: int, window: int | None, frame: int, with_fresh: bool, contiguous: bool,
    causal: bool = False, rope: ef.Rope | None = ROPE,
) -> list[list[Tensor]]:  # fmt: skip
    """A frame window as its words say: a list of (stream index, key, value) that loses its oldest entries."""
    outputs = []
    for calls in script:
        held: list[tuple[int, Tensor, Tensor, Tensor]] = []
        outputs.append([])
        for call in calls:
            m = call.q.shape[1]
            start = 0 if not held else held[-1][0] + 1
            where = call.tags.get("coordinates", torch.zeros(m, 2, dtype=torch.int64))
            fresh = [(start + i, call.k[:, i], call.v[:, i], where[i]) for i in range(m)]
            there = held + fresh
            if window is not None and not causal:
                first = start + (m if with_fresh else 0) - window * frame
                there = [entry for entry in there if entry[0] < sink * frame or entry[0] >= first]
            rows = []
            for i in range(m):
                seen = there
                if causal:
                    own = start + i
                    back = None if window is None else window - (1 if with_fresh else 0)
                    seen = [e for e in there if e[0] <= own and (e[0] < sink or back is None or own - e[0] <= back)]
                time = [n // frame if contiguous else e[0] // frame for n, e in enumerate(seen)]
                at = next(n for n, e in enumerate(seen) if e[0] == start + i)
                places = [[t, *e[3].tolist()] for t, e in zip(time, seen, strict=True)]
                keys, values = (torch.stack([e[n] for e in seen], 1) for n in (1, 2))
                rows.append(
                    attention(rotated(call.q[:, i : i + 1], [places[at]], rope), rotated(keys, places, rope), values)
                )
            outputs[-1].append(torch.cat(rows, 1))
            if call.commit:
                held = there
        # What is no longer seen by anyone may stay in `held` of a causal stream: it is never counted.
    return outputs


@pytest.mark.parametrize("place", [Absolute(), Contiguous()], ids=["absolute", "contiguous"])
@pytest.mark.parametrize("with_fresh", [True, False])
@pytest.mark.parametrize("sink", [0, 2])
def test_a_frame_window_is_what_its_words_say(place, with_fresh, sink):
    frame, chunk, window = 3, 2, 5
    memory = Memory(
        sink=sink, window=window, frame=frame, chunk=chunk, inside="both", evict=Oldest(with_fresh), place=place
    )
    grid = torch.stack([torch.tensor([0, 0, 1] * chunk), torch.tensor([0, 1, 0] * chunk)], -1)
    script = random_calls([frame * chunk] * 7, tentative=2, tags=[{"coordinates": grid}] * 7)
    state = memory.build(rope=ROPE, **GEOMETRY)
    ours = play(state, script)
    theirs = defined(
        script, sink=sink, window=window, frame=frame, with_fresh=with_fresh, contiguous=isinstance(place, Contiguous)
    )
    assert worst(ours, theirs) < 1e-12
    assert state.position == 7 * frame * chunk


@pytest.mark.parametrize("cut", [1, 4, 20])
@pytest.mark.parametrize("with_fresh", [True, False])
def test_a_causal_window_is_exact_for_every_query_in_any_cut(cut, with_fresh):
    """Fed in one piece or many, on the arena as on the ring."""
    memory = Memory(sink=2, window=5, evict=Oldest(with_fresh), place=Absolute(), recall=Seeing())
    assert not memory.on_ring
    whole = random_calls([20])
    script = [
        [Call(*(t[:, a : a + cut] for t in (c.q, c.k, c.v))) for c in layer for a in range(0, 20, cut)]
        for layer in whole
    ]
    ours = play(memory.build(rope=ef.Rope(), **GEOMETRY), script)
    theirs = defined(
        whole, sink=2, window=5, frame=1, with_fresh=with_fresh, contiguous=False, causal=True, rope=ef.Rope()
    )
    assert worst([[torch.cat(layer, 1)] for layer in ours], theirs) < 1e-12
    if not with_fresh:
        ring = Memory(sink=2, window=5, place=Absolute()).build(rope=ef.Rope(), **GEOMETRY)
        assert worst([[torch.cat(layer, 1)] for layer in play(ring, script)], theirs) < 1e-12


@dataclass(frozen=True)
class Seeing(Recall):
    """Everything, told token by token: runs on the arena."""

    def among(self, view: View) -> Tensor:
        return view.index != EMPTY


@dataclass(frozen=True)
class Loudest(Evict):
    """The keys of largest norm stay, in each head others."""

    content = True

    def keep(self, view: View) -> Tensor:
        loud = view.keys.square().sum(-1)
        loud = torch.where(view.index == EMPTY, -1, torch.where(view.pinned | view.fresh, torch.inf, loud))
        room = min((view.window or 0) + view.m + view.sink, loud.shape[-1])
        return torch.zeros_like(loud, dtype=torch.bool).scatter(-1, loud.topk(room, -1).indices, True)


@dataclass(frozen=True)
class IntoMean(Fold):
    """One memory slot holds the running mean of all that left."""

    def tensors(self, geometry: ef.memory.Geometry, frame: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(geometry.batch, dtype=geometry.dtype)}

    def slots(self, frame: int) -> int:
        return 1

    def leave(self, view: View, leaving: Tensor) -> None:
        leaving = leaving.expand(view.batch, view.geometry.kv_heads, -1)
        count, more = view.mine["count"], leaving[:, 0].sum(-1)
        if not bool(more.any()):
            return
        share = (count / (count + more).clamp_min(1))[:, None, None, None]
        at, weight = (
            view.sink,
            leaving[..., None].to(view.keys.dtype) / (count + more).clamp_min(1)[:, None, None, None],
        )
        new = [x[:, :, at : at + 1] * share + (x * weight).sum(2, keepdim=True) for x in (view.keys, view.values)]
        index = torch.where(count + more > 0, -1, EMPTY)[:, None, None]
        view.write(torch.full((view.batch, 1, 1), at), *new, index=index)
        view.mine["count"] = count + more


@dataclass(frozen=True)
class Linear(Fold):
    """A state memory: the sum of k ⊗ v of all that came, read by the query."""

    def tensors(self, geometry: ef.memory.Geometry, frame: int) -> dict[str, Tensor]:
        return {
            "kv": torch.zeros(
                geometry.batch, geometry.kv_heads, geometry.head_dim, geometry.value_dim, dtype=geometry.dtype
            )
        }

    def arrive(self, view: View) -> None:
        fresh = view.fresh.expand(view.batch, view.geometry.kv_heads, -1)[..., None].to(view.keys.dtype)
        view.mine["kv"] = view.mine["kv"] + (view.keys * fresh).transpose(-1, -2) @ view.values

    def read(self, view: View) -> Tensor:
        assert view.query is not None
        groups = view.geometry.heads // view.geometry.kv_heads
        return 0.01 * view.query @ view.mine["kv"].repeat_interleave(groups, 1)


@dataclass(frozen=True)
class NewestFirst(Place):
    """Positions count back from the newest frame."""

    def positions(self, view: View) -> Places:
        newest = (view.consumed + view.m - 1)[:, None]
        return Places((newest[..., None] - view.index) // view.frame, (newest - view.stream) // view.frame)


@dataclass(frozen=True)
class EvenFrames(Recall):
    """Only what came in even frames, and the fresh tokens."""

    def among(self, view: View) -> Tensor:
        return (view.index // view.frame % 2 == 0) | view.fresh | (view.index == -1)


compositions = st.builds(
    Memory,
    sink=st.sampled_from([0, 1, 2]),
    window=st.sampled_from([2, 4]),
    frame=st.sampled_from([2, None]),
    chunk=st.sampled_from([1, 2]),
    inside=st.sampled_from(["both", "causal"]),
    evict=st.sampled_from([Oldest(), Oldest(True), Loudest()]),
    fold=st.sampled_from([Dropped(), IntoMean(), Linear()]),
    recall=st.sampled_from([AllHeld(), Seeing(), EvenFrames()]),
    place=st.sampled_from([Absolute(), Contiguous(), NewestFirst()]),
)


@settings(max_examples=25, deadline=None)
@given(compositions, st.integers(0, 2**31), st.integers(0, 1))
def test_any_composition_is_bounded_causal_deterministic_and_exact_to_save_and_fork(memory, seed, tentative):
    size = 2 * memory.chunk
    script = random_calls([size] * 10, tentative=tentative, seed=seed)
    calls = len(script[0])

    def part(first: int, last: int, of: list[list[Call]] = script) -> list[list[Call]]:
        return [layer[first:last] for layer in of]

    state = memory.build(rope=ROPE, **GEOMETRY)
    half = calls // 2
    first = play(state, part(0, half))
    twin, loaded = state.fork(), memory.build(rope=ROPE, **GEOMETRY)
    loaded.load_state_dict(state.state_dict())
    second = play(state, part(half, calls))
    for other in (twin, loaded):
        assert worst(play(other, part(half, calls)), second) == 0
    again = memory.build(rope=ROPE, **GEOMETRY)
    assert worst(play(again, script), [a + b for a, b in zip(first, second, strict=True)]) == 0
    # What comes later changes nothing before: other tokens from half way on.
    other = random_calls([size] * 10, tentative=tentative, seed=seed + 1)
    mixed = memory.build(rope=ROPE, **GEOMETRY)
    changed = [a[:half] + b[half:] for a, b in zip(script, other, strict=True)]
    assert worst([layer[:half] for layer in play(mixed, changed)], first) == 0
    full = state.nbytes
    play(state, script)
    assert state.nbytes == full
    assert all(
        0 <= len(set(state.held(layer))) <= (memory.sink + memory.window + memory.chunk + 1) * 2 for layer in (0, 1)
    )
    state.reset()
    assert state.position == 0 and state.held(0) == []
    assert worst([play(state, part(0, half))[0]], [first[0]]) == 0


@settings(max_examples=15, deadline=None)
@given(compositions, st.integers(0, 2**31))
def test_any_composition_keeps_batch_rows_apart(memory, seed):
    size = 2 * memory.chunk
    scripts = [random_calls([size] * 6, seed=seed + row) for row in range(2)]
    alone = []
    for script in scripts:
        state = memory.build(rope=ROPE, **GEOMETRY)
        alone.append((play(state, script), state.held(1, 0, 1)))
    together = memory.build(rope=ROPE, batch=2, **GEOMETRY)
    for step in range(6):
        with together.step(size):
            for layer in range(2):
                q, k, v = (torch.stack([getattr(s[layer][step], n) for s in scripts]) for n in "qkv")
                out = together.attend(layer, q, k, v)
                for row in range(2):
                    assert float((out[row] - alone[row][0][layer][step]).abs().max()) < 1e-12
    assert [together.held(1, row, 1) for row in range(2)] == [held for _, held in alone]


@settings(max_examples=15, deadline=None)
@given(compositions.filter(lambda memory: memory.chunk == 1), st.integers(0, 2**31))
def test_rows_of_different_age_are_streams_of_their_own(memory, seed):
    """A row whose columns are all padding does not take part in the step."""
    generator = torch.Generator().manual_seed(seed)
    together = memory.build(rope=ROPE, batch=2, **GEOMETRY)
    alone = [memory.build(rope=ROPE, **GEOMETRY) for _ in range(2)]
    for step in range(8):
        takes = [True, step % 3 != 1]
        draw = [
            [torch.randn(2, heads, 2, 12, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
            for _ in range(2)
        ]
        with together.step(2, mask=torch.tensor(takes)[:, None].expand(2, 2)):
            out = [together.attend(layer, *draw[layer]) for layer in range(2)]
        for row in (r for r in range(2) if takes[r]):
            with alone[row].step(2):
                for layer in range(2):
                    one = alone[row].attend(layer, *(t[row : row + 1] for t in draw[layer]))
                    assert float((one - out[layer][row : row + 1]).abs().max()) < 1e-12
    assert together.positions.tolist() == [a.position for a in alone] == [16, 10]
    assert [together.held(0, row) for row in range(2)] == [a.held(0) for a in alone]


def video(**changes: object) -> Memory:
    return Memory(
        **{"sink": 1, "window": 4, "frame": 2, "chunk": 2, "inside": "both", "evict": Oldest(True), **changes}
    )


def test_tentative_calls_leave_no_trace():
    for memory in (video(), video(fold=IntoMean()), video(evict=Loudest(), fold=Linear())):
        plain, tried = (memory.build(rope=ROPE, **GEOMETRY) for _ in range(2))
        script = random_calls([4] * 6, tentative=3)
        play(tried, script)
        play(plain, [[call for call in layer if call.commit] for layer in script])
        if memory.evict == Oldest(True):
            for name, tensor in plain.state_dict().items():
                assert torch.equal(tensor, tried.state_dict()[name]), name
        before = tried.state_dict()
        with tried.step(4, commit=False):
            for layer in range(2):
                tried.attend(layer, *(torch.randn(1, h, 4, 12).double() for h in (4, 2, 2)))
        after = tried.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_leaves_is_decided_at_the_first_call_of_a_chunk():
    memory = video(evict=Loudest(), window=2)
    state = memory.build(rope=ROPE, **GEOMETRY)
    play(state, random_calls([4] * 4))
    quiet, loud = (random_calls([4], seed=seed)[0] for seed in (5, 6))
    twin = state.fork()
    for s, order in ((state, (quiet, loud)), (twin, (quiet, quiet))):
        for call, commit in zip(order, (False, True), strict=True):
            with s.step(4, commit=commit):
                for layer in range(2):
                    s.attend(layer, *(t[None] for t in (call[0].q, call[0].k, call[0].v)))
    assert state.held(0) == twin.held(0)


@pytest.mark.parametrize("fold", [Dropped(), IntoMean(), Linear()], ids=lambda f: type(f).__name__)
def test_a_step_that_fails_leaves_no_trace(fold):
    state = video(fold=fold).build(rope=ROPE, **GEOMETRY)
    play(state, random_calls([4] * 5))
    before = state.state_dict()
    good = [torch.randn(1, heads, 4, 12, dtype=torch.float64) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match="NaN"), state.step(4):
        state.attend(0, *good)
        state.attend(1, good[0], good[1], good[2] * torch.nan)
    with pytest.raises(RuntimeError, match=r"layers \[1\]"), state.step(4):
        state.attend(0, *good)
    with pytest.raises(KeyError, match="mine"), state.step(4):
        state.attend(0, *good)
        raise KeyError("mine")
    with pytest.raises(ValueError, match="v has shape"), state.step(4):
        state.attend(0, good[0], good[1], good[2][:, :, :3])
    with pytest.raises(RuntimeError, match="twice"), state.step(4):
        state.attend(0, *good)
        state.attend(0, *good)
    with pytest.raises(ValueError, match="whole frames of 2"):
        state.step(3)
    with pytest.raises(RuntimeError, match="outside a step"):
        state.attend(0, *good)
    after = state.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with state.step(4):
        for layer in range(2):
            assert state.attend(layer, *good).isfinite().all()


def test_the_first_step_tells_how_long_a_frame_is():
    def after(m: int, **tags: Tensor) -> int | None:
        state = video(frame=None).build(rope=None, **GEOMETRY)
        with state.step(m, tags=tags or None):
            for layer in range(2):
                state.attend(layer, *(torch.randn(1, h, m, 12).double() for h in (4, 2, 2)))
        return state.frame

    assert after(10) == 5 and after(3) == 3
    assert after(6, frame=torch.tensor([7, 7, 8, 8, 9, 9])) == 2
    with pytest.raises(ValueError, match="equal length"):
        after(5, frame=torch.tensor([7, 7, 8, 8, 9]))


def test_copies_share_nothing():
    """One copy a denoising step: each is a stream of its own, and all together are one batch."""
    memory = video(rows=2)
    state, alone = memory.build(rope=ROPE, **GEOMETRY), [video().build(rope=ROPE, **GEOMETRY) for _ in range(2)]
    script = random_calls([4] * 12)
    for step in range(8):
        calls = [layer[step : step + 1] for layer in script]
        row = step % 3 % 2
        mine = [[Call(c.q, c.k, c.v, row=row) for c in layer] for layer in calls]
        assert worst(play(state, mine), play(alone[row], calls)) < 1e-12
    both = [torch.cat([torch.stack([script[layer][8 + row].q for row in range(2)])]) for layer in range(2)]
    with state.step(4):
        out = [
            state.attend(
                layer, both[layer], *(torch.stack([getattr(script[layer][8 + r], n) for r in range(2)]) for n in "kv")
            )
            for layer in range(2)
        ]
    for row in range(2):
        expected = play(alone[row], [[layer[8 + row]] for layer in script])
        assert all(float((out[layer][row] - expected[layer][0]).abs().max()) < 1e-12 for layer in range(2))
        assert state.held(0, row) == alone[row].held(0)


def test_undoing_is_exact_while_nothing_has_left_and_refused_with_a_reason_after():
    state = video().build(rope=ROPE, **GEOMETRY)
    script = random_calls([4, 4, 4, 4])
    play(state, [layer[:1] for layer in script])
    before, held = state.fork(), state.held(0)
    play(state, [layer[1:2] for layer in script])
    state.truncate(4)
    assert state.position == 4 and state.held(0) == held
    assert worst(*(play(s, [layer[1:] for layer in script]) for s in (state, before))) == 0
    with pytest.raises(ValueError, match="fork before"):
        state.truncate(4)
    folding = video(fold=Linear()).build(rope=ROPE, **GEOMETRY)
    play(folding, [layer[:1] for layer in script])
    with pytest.raises(ValueError, match="fork before"):
        folding.truncate(4)


@pytest.mark.parametrize("place", [Absolute(), Contiguous(), NewestFirst()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sink", [0, 1])
def test_moving_the_origin_of_a_full_stream_changes_nothing(place, sink):
    state = video(place=place, sink=sink).build(rope=ROPE, **GEOMETRY)
    play(state, random_calls([4] * 5))
    twin = state.fork()
    twin.seek(twin.position + 2 * 10**9)
    script = random_calls([4] * 3, seed=1)
    if sink and not isinstance(place, Contiguous):
        return  # sinks stay at the start, further away now: there the origin matters
    assert worst(play(state, script), play(twin, script)) < 1e-9
    assert twin.position - state.position == 2 * 10**9


def test_computing_the_window_anew_replaces_it():
    state = video(sink=1, window=6).build(rope=ROPE, **GEOMETRY)
    script = random_calls([4] * 7)
    play(state, script)
    assert state.held(0) == [0, 1, *range(16, 28)]
    new = [torch.randn(1, heads, 16, 12, dtype=torch.float64) for heads in (4, 2, 2)]
    for keep_sink, held in ((True, [0, 1, *range(16, 28)]), (False, [12, 13, *range(16, 28)])):
        other = state.fork()
        with other.recache(16, keep_sink=keep_sink):
            for layer in range(2):
                other.attend(layer, *new)
        assert other.held(0) == held and other.position == 28
        keys = other.state_dict()["layers.0.values"]
        index = other.state_dict()["tables.0.index"][0, 0].tolist()
        for column, at in enumerate(index):
            if at >= (0 if not keep_sink else 2) and at != EMPTY:
                assert torch.equal(keys[:, :, column], new[2][:, :, at - 12])
    with pytest.raises(ValueError, match="cannot compute"):
        state.recache(400)


def test_a_damaged_state_is_refused_and_changes_nothing():
    state = video().build(rope=ROPE, **GEOMETRY)
    play(state, random_calls([4] * 4))
    good = state.state_dict()
    for change in (
        {"layers.0.keys": good["layers.0.keys"][:, :, 1:]},
        {"layers.1.values": good["layers.1.values"].float()},
        {"positions": torch.tensor([1, 2])},
        {"surprise": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match=r"state|layers"):
            state.load_state_dict({**good, **change})
    for name in ("positions", "tables.0.index"):
        with pytest.raises(ValueError, match=name):
            state.load_state_dict({key: value for key, value in good.items() if key != name})
    after = state.state_dict()
    assert all(torch.equal(good[name], after[name]) for name in good)


@dataclass(frozen=True)
class Pick(Recall):
    """A question sees the sinks and the `k` held tokens whose keys its queries like best."""

    k: int

    def retrieve(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        assert view.query is not None
        groups = view.geometry.heads // view.geometry.kv_heads
        query = view.query.mean(2).unflatten(1, (-1, groups)).mean(2)
        score = (view.keys @ query[..., None])[..., 0].mean(1)[0].masked_fill(view.index[0, 0] == EMPTY, -torch.inf)
        best = score.masked_fill(view.pinned, torch.inf).topk(view.sink + self.k).indices
        best = best[view.index[0, 0, best].argsort()]
        return view.keys[:, :, best], view.values[:, :, best], view.index[0, 0, best]


def test_a_question_reads_and_leaves_the_stream_as_it_was():
    memory = Memory(sink=2, window=40, recall=Pick(3))
    state = memory.build(rope=ef.Rope(), **GEOMETRY)
    script = random_calls([30, 6, 4, 5])
    play(state, [layer[:1] for layer in script])
    before = state.state_dict()
    question, second = state.question(), state.question()
    play(state, [layer[1:2] for layer in script])  # the writer goes on
    ask, prompt, more = ([layer[n] for layer in script] for n in (1, 2, 3))
    with question.retrieve(6):
        seen = [question.attend(layer, *(t[None] for t in (c.q, c.k, c.v))) for layer, c in enumerate(ask)]
    chosen = [question.held(layer) for layer in range(2)]
    assert all(len(c) == 5 and c[:2] == [0, 1] and c == sorted(c) and max(c) < 30 for c in chosen)
    answers = [play(question, [[c] for c in part]) for part in (prompt, more)]
    whole = [layer[0] for layer in script]
    for layer, call in enumerate(whole):
        keys, values = (t[:, chosen[layer]] for t in (call.k, call.v))
        keys, values = torch.cat([keys, ask[layer].k], 1), torch.cat([values, ask[layer].v], 1)
        assert float((seen[layer][0] - causal(ask[layer].q, keys, values)).abs().max()) < 1e-12
        keys, values = (t[:, chosen[layer]] for t in (call.k, call.v))
        for part, answer in zip((prompt, more), answers, strict=True):
            keys, values = torch.cat([keys, part[layer].k], 1), torch.cat([values, part[layer].v], 1)
            assert float((answer[layer][0] - causal(part[layer].q, keys, values)).abs().max()) < 1e-12
    with pytest.raises(RuntimeError, match="another question"):
        question.retrieve(1)
    # Without `retrieve` the first step selects with its own queries.
    assert worst([[s[0]] for s in seen], play(second, [[c] for c in ask])) == 0
    fresh = memory.build(rope=ef.Rope(), **GEOMETRY)
    fresh.load_state_dict(before)
    assert worst(*(play(s, [layer[2:] for layer in script]) for s in (fork_of(fresh, script), state))) == 0


def fork_of(state: ef.memory.MemoryState, script: list[list[Call]]) -> ef.memory.MemoryState:
    play(state, [layer[1:2] for layer in script])
    return state


def causal(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last tokens of a sequence attend all before them and themselves, at positions 0, 1, …"""
    m, n = q.shape[1], keys.shape[1]
    bias = torch.full((m, n), -torch.inf, dtype=torch.float64).triu(n - m + 1)
    return attention(
        rotated(q, list(range(n - m, n)), ef.Rope()), rotated(keys, list(range(n)), ef.Rope()), values, bias
    )


def test_nothing_leaves_a_memory_that_never_evicts():
    state = Memory(evict=Never(), inside="both", frame=2, place=Absolute()).build(rope=ROPE, **GEOMETRY)
    script = random_calls([4] * 20)
    theirs = defined(script, sink=0, window=None, frame=2, with_fresh=True, contiguous=False)
    assert worst(play(state, script), theirs) < 1e-12
    assert state.held(0) == list(range(80))


@dataclass(frozen=True)
class OneIn(Recall):
    """Of what is held one token in `count`, and the fresh tokens."""

    count: int

    def among(self, view: View) -> Tensor:
        return (view.index % self.count == 0) | view.fresh


@pytest.mark.parametrize("place", [Absolute(), NewestFirst()], ids=["stored rotated", "stored raw"])
@pytest.mark.parametrize("m", [1, 200])
def test_slots_that_are_not_seen_are_left_out(place, m):
    """Masked where they lie, or what is seen copied together, whichever is less work: the same thing."""
    state = Memory(evict=Never(), inside="both", recall=OneIn(16), place=place).build(rope=ef.Rope(), **GEOMETRY)
    script = random_calls([400, m])
    ours = play(state, script)
    index = [n for n in range(400 + m) if n % 16 == 0 or n >= 400]
    where = index if isinstance(place, Absolute) else [399 + m - n for n in index]
    for layer, (first, second) in enumerate(script):
        keys, values = (torch.cat(pair, 1)[:, index] for pair in ((first.k, second.k), (first.v, second.v)))
        query = rotated(second.q, where[-m:], ef.Rope())
        assert worst([[ours[layer][1]]], [[attention(query, rotated(keys, where, ef.Rope()), values)]]) < 1e-12


@pytest.mark.parametrize("reach", [None, 4])
@pytest.mark.parametrize("extra", ["alibi", "softcap", "sink_logits"])
def test_what_models_bring_works_as_on_the_ring(extra, reach):
    more = {
        "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.0]), "rope": None},
        "softcap": {"softcap": 2.0},
        "sink_logits": {"sink_logits": torch.randn(2, 4, dtype=torch.float64)},
    }[extra]
    script = random_calls([3] * 8)
    ring = Memory(sink=2, window=6, place=Absolute()).build(reach=reach, **GEOMETRY, **more)
    arena = Memory(sink=2, window=6, place=Absolute(), recall=Seeing()).build(reach=reach, **GEOMETRY, **more)
    assert worst(play(arena, script), play(ring, script)) < 1e-12
