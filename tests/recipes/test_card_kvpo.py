"""What must hold for KVPO's memory (arXiv 2605.14278): branches that see other parts of one history, and change none of it."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.memory import Averaged, LeastAttended, Memory, Oldest, Rerouted
from evenflow.memory.exploring import drawn_fork, fork_starts
from evenflow.recipes.reference.self_forcing import attend, frames_of

from .drive import play, random_calls, worst

FRAME, CHUNK, FORK = 2, 3, 21
TOKENS = FRAME * CHUNK
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1]]).repeat(CHUNK, 1)
RECALL = ef.recipe("kvpo").recall


def build(*, batch=1, recall=None, **params):
    memory = ef.recipe("kvpo", **{"frame": FRAME, **params})
    if recall is not None:
        memory = Memory(sink=3, window=30, recall=recall, place=memory.place, frame=FRAME, chunk=CHUNK, inside="both")
    return memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64, batch=batch)


def chunks(codes, **changes):
    """A chunk for each code; None is no tag at all."""
    tags = [{"coordinates": GRID} | ({} if code is None else {"route": torch.full((TOKENS,), code)}) for code in codes]
    return random_calls([TOKENS] * len(codes), tags=tags, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


def branch(number, chunks_before=FORK // CHUNK, after=4):
    """Codes of a stream that forks at frame 21; number None: the anchor, which never does."""
    route = [0 if number is None else RECALL.route(number, n) for n in range(RECALL.blocks)]
    return [0] * chunks_before + route + [0] * after


def definition(calls, codes, *, window=12, sink=3, nearest=4, blocks=5, branches=8, seed=0):
    """By lists of frames: every call attends sinks, what a route brings back, and the newest."""
    recall, outputs = Rerouted(window - sink, nearest, blocks, branches, seed), []
    for layer in calls:
        past, out, chunk = [], [], 0
        for call in layer:
            start, code = chunk * CHUNK, codes[chunk] or 0
            numbers = range(start + CHUNK)
            near = [n for n in numbers if n >= start + CHUNK - (nearest if code else window - sink)]
            seen = [n for n in numbers if n < sink] + [n for n in near if n >= sink]
            if code:
                number, fork = (code - 1) % branches, start - (code - 1) // branches * CHUNK
                pool = range(max(sink, fork + (blocks - 1) * CHUNK - 30), fork - nearest)
                seen += recall.plan(number, fork, pool)
            fresh = frames_of(call, FRAME)
            everything = [*past, *fresh]
            rows = [(n, everything[n]) for n in sorted(set(seen))]
            out.append(attend(call, [start + i for i in range(CHUNK)], rows, ROPE, FRAME))
            if call.commit:
                past, chunk = everything, chunk + 1
        outputs.append(out)
    return outputs


@pytest.mark.parametrize(
    ("params", "number"),
    [({}, 0), ({}, 7), ({}, None), ({"nearest": 3, "branches": 8, "seed": 9}, 2), ({"blocks": 2, "branches": 3}, 2)],
)
def test_any_calls_equal_the_definition(params, number):
    recall = ef.recipe("kvpo", **params).recall
    codes = [0] * 7 + [0 if number is None else recall.route(number, n) for n in range(recall.blocks)] + [None, 0, None]
    calls = chunks(codes, tentative=1)
    assert worst(play(build(**params), calls), definition(calls, codes, **params)) < 1e-10


def test_point_1_a_route_that_keeps_all_is_the_anchor_bit_for_bit():
    codes = branch(3)
    theirs = play(build(), chunks([0] * len(codes)))
    assert worst(play(build(nearest=9), chunks(codes)), theirs) == 0

    class Normal(Rerouted):
        """Whatever was drawn, the frames of the plain window."""

        def plan(self, branch, fork, pool):
            return self.now

    normal = Normal(9, 4)
    state, outs = build(recall=normal), [[], []]
    for t, _ in enumerate(codes):
        object.__setattr__(normal, "now", list(range(CHUNK * t - 6, CHUNK * t - 1)))
        for layer, new in zip(outs, play(state, part(chunks(codes), t, t + 1)), strict=True):
            layer += new
    assert worst(outs, theirs) == 0


def test_point_1_branches_of_one_plan_are_identical_and_before_the_fork_all_are():
    outs = [play(build(), chunks(branch(number))) for number in (None, 0, 0, 1)]
    before = FORK // CHUNK
    assert all(worst(part(out, 0, before), part(outs[0], 0, before)) == 0 for out in outs)
    assert worst(outs[1], outs[2]) == 0
    assert all(worst(part(a, t, t + 1), part(b, t, t + 1)) > 1e-3 for a, b in combinations((outs[0], outs[1], outs[3]), 2)
               for t in range(before, before + 5))  # fmt: skip


def test_point_1_branches_as_rows_of_one_memory_are_those_of_forks():
    numbers = [None, *range(8)]
    rows, stream = build(batch=9), build()
    script = [chunks(branch(number)) for number in numbers]
    play(stream, part(script[0], 0, 7))
    forked = [play(stream.fork(), part(calls, 7)) for calls in script]
    for t in range(len(script[0][0])):
        tags = {"coordinates": GRID, "route": torch.stack([calls[0][t].tags["route"] for calls in script])}
        with rows.step(TOKENS, tags=tags):
            for layer in range(2):
                q, k, v = (torch.stack([getattr(calls[layer][t], x) for calls in script]) for x in "qkv")
                out = rows.attend(layer, q, k, v)
                if t >= 7:
                    there = torch.stack([one[layer][t - 7] for one in forked])
                    assert float((out - there).abs().max()) < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 12),
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(2, 10),
    st.integers(0, 2**40),
)
def test_point_2_plans_lie_in_the_pool_and_overlap_as_little_as_it_allows(block, more, nearest, blocks, branches, seed):
    recall = Rerouted(9, nearest, blocks, branches, seed)
    fork = CHUNK * (block + more)
    try:
        pool = recall.pool(fork, CHUNK, 3, 30)
    except ValueError:
        assert len(range(max(3, fork + (blocks - 1) * 3 - 30), fork - nearest)) < 9 - nearest
        return
    plans, wanted, n = [recall.plan(b, fork, pool) for b in range(branches)], 9 - nearest, len(pool)
    for plan in plans:
        assert plan == sorted(set(plan)) and len(plan) == wanted
        assert all(max(3, fork + (blocks - 1) * 3 - 30) <= frame < fork - nearest for frame in plan)
    assert plans == [Rerouted(9, nearest, blocks, branches, seed).plan(b, fork, pool) for b in range(branches)]
    if 0 < 2 * wanted <= n:
        for a, b in combinations(range(branches), 2):
            apart = (b - a) * max(1, n // branches) % n
            distance = min(apart, n - apart)
            assert len({*plans[a]} & {*plans[b]}) == max(0, wanted - distance)


def test_point_2_another_seed_and_another_place_draw_otherwise():
    def drawn(seed, fork):
        recall = Rerouted(9, 4, seed=seed)
        return [[frame - fork for frame in recall.plan(b, fork, recall.pool(fork, CHUNK, 3, 30))] for b in range(8)]

    assert drawn(0, 30) == drawn(0, 30) and drawn(0, 30) != drawn(1, 30) and drawn(0, 30) != drawn(0, 33)


def test_point_2_forks_fit_into_their_segment_and_are_all_drawn():
    memory = ef.recipe("kvpo")
    starts = fork_starts(memory)
    ends = [0, 21, 39, 57, 75, 93, 111, 129]
    assert starts[0] == 21 and all(start >= 12 and start % 3 == 0 for start in starts)
    assert all(any(a <= start and start + 15 <= b for a, b in pairwise(ends)) for start in starts)
    assert starts == [f for a, b in pairwise(ends) for f in range(a, b - 14, 3) if f >= 12]
    drawn = [drawn_fork(memory, 5, rollout) for rollout in range(200)]
    assert set(drawn) == set(starts) and drawn == [drawn_fork(memory, 5, rollout) for rollout in range(200)]
    with pytest.raises(ValueError, match="no route"):
        fork_starts(memory, first=12, then=12)
    with pytest.raises(ValueError, match="no routes"):
        fork_starts(ef.recipe("longlive"))


def test_point_6_the_history_is_unchanged_by_routes_and_a_replay_goes_without():
    calls, stream = chunks(branch(None)), build()
    play(stream, part(calls, 0, 7))
    saved = {name: x.clone() for name, x in stream.state_dict().items()}
    for number in range(8):
        twin = stream.fork()
        play(twin, part(chunks(branch(number)), 7, 12))
        # What the branch holds of before the fork is what the stream holds, bit for bit.
        held = [[t for t in s.held(0) if t < FORK * FRAME] for s in (stream, twin)]
        assert held[1] and set(held[1]) <= set(held[0])
        mine, theirs = ({t: n for n, t in enumerate(s.tables[0].index[0, 0].tolist())} for s in (stream, twin))
        for token in held[1]:
            for kept in ("keys", "values"):
                ours = [getattr(s.slots[1], kept)[:, :, at[token]] for s, at in ((stream, mine), (twin, theirs))]
                assert torch.equal(*ours)
    assert all(torch.equal(x, stream.state_dict()[name]) for name, x in saved.items())
    loaded = build()
    loaded.load_state_dict(saved)
    assert worst(play(loaded, part(calls, 7)), play(stream, part(calls, 7))) == 0


def test_point_6_as_much_is_attended_with_a_route_as_without():
    """Zero queries: every key weighs the same, so values that say 1 for one frame tell how many are seen."""
    for number in (None, 0, 5):
        state = build()
        for t, code in enumerate(branch(number)):
            k = torch.randn(1, 2, TOKENS, 12, dtype=torch.float64)
            v = torch.full_like(k, float(t == 0))  # the sinks
            with state.step(TOKENS, tags={"coordinates": GRID, "route": torch.full((TOKENS,), code)}):
                out = [state.attend(layer, torch.zeros(1, 4, TOKENS, 12, dtype=k.dtype), k, v) for layer in range(2)]
            if t >= 3:
                assert torch.allclose(out[1], torch.full_like(out[1], 3 / 12))
        assert len(state.held(0)) == 33 * FRAME


def test_a_route_that_cannot_be_is_refused_and_leaves_no_trace():
    state = build()
    calls = chunks([0] * 5)
    play(state, part(calls, 0, 3))
    before = state.held(0)
    for code, match in ((RECALL.route(0, 0), "fork later"), (41, "there are 40"), (-1, "there are 40")):
        with pytest.raises(ValueError, match=match):
            play(state, part(chunks([0] * 3 + [code]), 3, 4))
    assert state.held(0) == before
    fresh = build()
    assert worst(part(play(fresh, calls), 3), play(state, part(calls, 3))) == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ef.recipe("kvpo", window=3), "larger"),
        (lambda: ef.recipe("kvpo", physical=11), "physical"),
        (lambda: ef.recipe("kvpo", nearest=10), "nearest"),
        (lambda: ef.recipe("kvpo", blocks=0), "blocks"),
        (lambda: RECALL.route(8, 0), "branch 8"),
        (lambda: RECALL.route(0, 5), "block 5"),
        (lambda: Memory(sink=1, window=9, recall=Rerouted(3, 1)), "inside"),
        (lambda: Memory(sink=1, window=9, evict=Oldest(True), recall=Rerouted(3, 1), inside="both"), "Oldest"),
        (lambda: Memory(sink=1, window=9, evict=LeastAttended(4, 1), recall=Rerouted(3, 1), inside="both"), "Oldest"),
        (lambda: Memory(sink=1, window=2, recall=Rerouted(3, 1), inside="both"), "window"),
    ],
)
def test_what_has_no_sense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_any_fold_goes_with_routes():
    """What leaves the history may be averaged into the sinks, which every branch sees."""
    memory = Memory(
        sink=3, window=12, fold=Averaged(0.9), recall=Rerouted(6, 4, 1, 2), place=ef.recipe("kvpo").place, frame=FRAME,
        chunk=CHUNK, inside="both",
    )  # fmt: skip
    codes = [0] * 6 + [1, 0, 2, 0]
    state = memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)
    outs = play(state, chunks(codes))
    assert all(bool(out.isfinite().all()) for layer in outs for out in layer) and state.held(0).count(-1) == 6
