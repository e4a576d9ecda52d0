"""Budgets in seconds and in tokens of one modality, against the plainest statement of them: one query at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenflow.memory import (
    Absolute,
    Contiguous,
    DistanceCeiling,
    LastByModality,
    LastSeconds,
    LeastAttended,
    LinearState,
    Memory,
    Never,
    Recall,
    Spilled,
)

from .drive import random_inputs
from .oracle import rotated
from .test_verbs import Strongest

GEOMETRY = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": torch.float64}
FREQUENCIES = [10_000.0 ** (-2 * pair / 8) for pair in range(4)]


def seconds_left(times: list[float], now: float, seconds: float, frame: int = 1) -> list[int]:
    """Which items are young enough, whole frames: those of which any token is."""
    young = {j // frame for j, time in enumerate(times) if now - time <= seconds + 1e-6}
    return [j for j in range(len(times)) if j // frame in young]


def modality_left(kinds: list[int], last: dict[int, int], others: int | None, sink: int) -> list[int]:
    """Which of the items that have come stay: the last ones of each modality, beside the sinks."""
    kept = list(range(min(sink, len(kinds))))
    groups: dict[object, list[int]] = {}
    for j in range(sink, len(kinds)):
        groups.setdefault(kinds[j] if kinds[j] in last else "others", []).append(j)
    for kind, members in groups.items():
        budget = others if kind == "others" else last[kind]
        kept += members if budget is None else members[max(0, len(members) - budget) :]
    return sorted(kept)


def attended(q: Tensor, k: Tensor, v: Tensor, caches: list[list[int]], contiguous: bool, frame: int = 1) -> Tensor:
    """q [H_q, N, D], k and v [H_kv, N, D]: query i over the tokens caches[i], numbered as they lie or as they came."""
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    for i, cache in enumerate(caches):
        places = [p // frame for p in (range(len(cache)) if contiguous else cache)]
        own = places[cache.index(i)]
        for h in range(q.shape[0]):
            keys, values = (t[h // (q.shape[0] // k.shape[0]), cache] for t in (k, v))
            scores = rotated(keys, places, FREQUENCIES) @ rotated(q[h, i : i + 1], [own], FREQUENCIES)[0]
            out[h, i] = torch.softmax(scores / 8**0.5, 0) @ values
    return out


def feed_all(state, inputs, cuts, tags, tentative=False):
    """Steps of the given lengths, in turns; outputs [B, H_q, N, D] of each layer.

    tentative: a look from three seconds later on before each of them, which decides nothing.
    """
    pieces, at, length = [], 0, inputs[0][0].shape[2]
    while at < length:
        stop = min(length, at + cuts[len(pieces) % len(cuts)])
        given = {name: tag[..., at:stop] for name, tag in tags.items()}
        for commit, ahead in ((False, 3.0), (True, 0.0))[not tentative :]:
            moved = {name: tag + ahead if name == "time" else tag for name, tag in given.items()}
            with state.step(stop - at, tags=moved, commit=commit):
                out = [state.attend(n, *(t[:, :, at:stop] for t in layer)) for n, layer in enumerate(inputs)]
        pieces.append(out)
        at = stop
    return [torch.cat(layer, 2) for layer in zip(*pieces, strict=True)]


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


steps_of_time = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 4.0]), min_size=24, max_size=24)
cuts = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(
    steps_of_time, cuts, st.sampled_from([0.0, 0.3, 1.0, 2.5, 100.0]), st.integers(0, 3), st.sampled_from([None, 1, 5]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_seconds_in_any_cut(deltas, cuts, seconds, sink, window, contiguous, tentative):
    times = torch.tensor(deltas, dtype=torch.float64).cumsum(0)
    place = Contiguous() if contiguous else Absolute()
    state = Memory(sink=sink, window=window, evict=LastSeconds(seconds), place=place).build(**GEOMETRY)
    inputs = random_inputs(state, len(deltas))
    got = feed_all(state, inputs, cuts, {"time": times}, tentative=tentative)

    def left(i: int, now: float) -> list[int]:
        young = seconds_left(times[: i + 1].tolist(), now, seconds)
        return [j for j in range(i + 1) if j < sink or (j in young and (window is None or i - j <= window))]

    caches = [left(i, float(times[i])) for i in range(len(deltas))]
    for layer, (q, k, v) in enumerate(inputs):
        same(got[layer][0], attended(q[0], k[0], v[0], caches, contiguous))
    after = [
        j for j in left(len(deltas) - 1, float(times[-1])) if window is None or j < sink or len(deltas) - j <= window
    ]
    assert state.held(0) == after


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=24, max_size=24), cuts, st.integers(0, 4), st.integers(0, 4),
    st.sampled_from([None, 0, 3]), st.integers(0, 3), st.sampled_from([None, 6]), st.booleans(),
)  # fmt: skip
def test_tokens_of_a_modality_in_any_cut(kinds, cuts, words, pictures, others, sink, window, tentative):
    evict = LastByModality({0: words, 1: pictures}, others)
    state = Memory(sink=sink, window=window, evict=evict, place=Absolute()).build(**GEOMETRY)
    inputs = random_inputs(state, len(kinds))
    got = feed_all(state, inputs, cuts, {"modality": torch.tensor(kinds)}, tentative=tentative)

    def left(i: int) -> list[int]:
        kept = modality_left(kinds[:i], {0: words, 1: pictures}, others, sink)
        return [j for j in kept if j < sink or window is None or i - j <= window]

    caches = [[*left(i), i] for i in range(len(kinds))]
    for layer, (q, k, v) in enumerate(inputs):
        same(got[layer][0], attended(q[0], k[0], v[0], caches, False))
    assert state.held(0) == left(len(kinds))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 1.0, 3.0]), min_size=12, max_size=12), st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([0.0, 1.0, 3.5]), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_chunks_that_see_both_ways_lose_whole_frames(deltas, cuts, seconds, sink, tentative):
    """Three tokens a frame, a moment apart; the newest item of a chunk tells what is too old."""
    frame = 3
    start = torch.tensor(deltas, dtype=torch.float64).cumsum(0)
    times = (start[:, None] + torch.linspace(0, 0.08, frame).double()).flatten()
    memory = Memory(sink=sink, evict=LastSeconds(seconds), place=Absolute(), frame=frame, inside="both")
    state = memory.build(**GEOMETRY)
    inputs = random_inputs(state, len(times))
    got = feed_all(state, inputs, [cut * frame for cut in cuts], {"time": times}, tentative=tentative)
    caches: list[list[int]] = []
    for number in range(len(times)):
        stop = min(len(times), len(caches) + frame * cuts[number % len(cuts)])
        young = seconds_left(times[:stop].tolist(), float(times[stop - 1]), seconds, frame)
        first = len(caches)  # what the chunk brings stays, however long it is
        cache = [j for j in range(stop) if j < sink * frame or j in young or j >= first]
        caches += [cache] * (stop - first)
        if stop == len(times):
            break
    for layer, (q, k, v) in enumerate(inputs):
        same(got[layer][0], attended(q[0], k[0], v[0], caches, False, frame))


BUDGETS = {
    "seconds": LastSeconds(2.0),
    "modality": LastByModality({0: 3, 1: 2}, others=2),
}


def both_tags(length: int, seed: int = 0) -> dict[str, Tensor]:
    """Times and modalities of a stream."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(length, generator=generator, dtype=torch.float64).cumsum(0)
    return {"time": times, "modality": torch.randint(0, 4, (length,), generator=generator)}


@pytest.mark.parametrize("evict", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("place", [Absolute(), Contiguous()], ids=["absolute", "contiguous"])
def test_rows_of_different_age_are_streams_of_their_own(evict, place):
    """Padding left, right and of whole rows, at times that mean nothing; a row's clock is its own."""
    memory = Memory(sink=1, evict=evict, place=place)
    together = memory.build(**GEOMETRY, batch=2)
    alone = [memory.build(**GEOMETRY) for _ in range(2)]
    tags = [both_tags(40, seed) for seed in (1, 2)]
    tags[1]["time"] += 1000.0
    masks = [[[1, 1, 1], [1, 1, 0]], [[1, 0, 1], [0, 0, 0]], [[0, 0, 1], [1, 1, 1]], [[1, 1, 1], [0, 1, 1]]] * 3
    ages = [0, 0]
    for number, mask in enumerate(torch.tensor(masks, dtype=torch.bool)):
        inputs = random_inputs(together, 3, seed=number)
        given = {name: torch.full((2, 3), 10**9, dtype=tags[0][name].dtype) for name in tags[0]}
        for row in range(2):
            for name, tag in tags[row].items():
                given[name][row, mask[row]] = tag[ages[row] : ages[row] + int(mask[row].sum())]
        with together.step(3, tags=given, mask=mask):
            out = together.attend(0, *inputs[0])
        for row in range(2):
            for column in mask[row].nonzero()[:, 0].tolist() if isinstance(place, Absolute) else []:
                with alone[row].step(1, tags={name: tag[row : row + 1, column] for name, tag in given.items()}):
                    one = alone[row].attend(0, *(t[row : row + 1, :, column : column + 1] for t in inputs[0]))
                same(out[row, :, column], one[0, :, 0])
            if isinstance(place, Contiguous) and bool(mask[row].any()):  # the same step, without padding
                real = mask[row].nonzero()[:, 0]
                with alone[row].step(len(real), tags={name: tag[row, real] for name, tag in given.items()}):
                    one = alone[row].attend(0, *(t[row : row + 1, :, real] for t in inputs[0]))
                same(out[row][:, real], one[0])
            ages[row] += int(mask[row].sum())
    assert [together.held(0, row) for row in range(2)] == [state.held(0) for state in alone]


@pytest.mark.parametrize("name", BUDGETS)
def test_saved_and_forked_go_on_bit_for_bit(name):
    memory, tags = Memory(sink=1, evict=BUDGETS[name]), both_tags(30)
    state = memory.build(**GEOMETRY)
    inputs = random_inputs(state, 30)
    first = [tuple(t[:, :, :20] for t in layer) for layer in inputs]
    feed_all(state, first, [4], {name: tag[:20] for name, tag in tags.items()})
    twin, loaded = state.fork(), memory.build(**GEOMETRY)
    loaded.load_state_dict(state.state_dict())
    later, rest = [tuple(t[:, :, 20:] for t in layer) for layer in inputs], {n: tag[20:] for n, tag in tags.items()}
    expected = feed_all(state, later, [3], rest)
    for copy in (twin, loaded):
        assert torch.equal(feed_all(copy, later, [3], rest)[0], expected[0])
        assert copy.held(0) == state.held(0)


@pytest.mark.parametrize("name", BUDGETS)
def test_bytes_stay_while_the_rate_is_even(name):
    """Ten items a second, and ten times as long."""
    state = Memory(sink=2, evict={"seconds": LastSeconds(3.0), "modality": LastByModality({0: 20}, 9)}[name]).build(
        **GEOMETRY
    )
    inputs = random_inputs(state, 1000)
    tags = {"time": 1.7e9 + torch.arange(1000, dtype=torch.float64) / 10, "modality": torch.arange(1000) // 7 % 3}
    part = [tuple(t[:, :, :100] for t in layer) for layer in inputs]
    feed_all(state, part, [5], {n: tag[:100] for n, tag in tags.items()})
    before, widths = state.nbytes, set()
    for at in range(100, 1000, 5):
        with state.step(5, tags={n: tag[at : at + 5] for n, tag in tags.items()}):
            state.attend(0, *(t[:, :, at : at + 5] for t in inputs[0]))
        widths.add(len(state.held(0)))
    assert state.nbytes == before
    assert widths == {33 if name == "seconds" else 31}


def test_an_even_rate_holds_evenly_many_though_tenths_are_no_binary_numbers():
    state = Memory(evict=LastSeconds(0.3)).build(**GEOMETRY)
    inputs, counts = random_inputs(state, 60), set()
    for at in range(60):
        with state.step(1, tags={"time": torch.tensor([at * 0.1], dtype=torch.float64)}):
            state.attend(0, *(t[:, :, at : at + 1] for t in inputs[0]))
        counts |= {len(state.held(0))} if at >= 3 else set()
    assert counts == {4}


def test_a_window_bounds_what_comes_in_a_burst():
    state = Memory(sink=1, window=8, evict=LastSeconds(10.0)).build(**GEOMETRY)
    inputs, sizes = random_inputs(state, 90), set()
    for at in range(0, 90, 3):
        with state.step(3, tags={"time": torch.full((3,), at / 1000)}):
            state.attend(0, *(t[:, :, at : at + 3] for t in inputs[0]))
        if at >= 12:
            sizes.add(state.nbytes)
    assert len(sizes) == 1 and state.held(0) == [0, *range(82, 90)]


def test_a_budget_of_frames_of_each_modality():
    """Frames of two tokens: the last frame of words, the last two of pictures."""
    memory = Memory(evict=LastByModality({0: 1, 1: 2}), frame=2, inside="both", place=Absolute())
    state, kinds = memory.build(**GEOMETRY), [0, 0, 1, 1, 1, 0, 1]
    inputs = random_inputs(state, 14)
    feed_all(state, inputs, [2], {"modality": torch.tensor(kinds).repeat_interleave(2)})
    assert state.held(0) == [8, 9, 10, 11, 12, 13]


def test_words_outlive_the_pictures_between_them():
    state = Memory(evict=LastByModality({0: 4, 1: 6})).build(**GEOMETRY)
    kinds = torch.tensor([0, 0, *[1] * 20, 0, *[1] * 20])
    feed_all(state, random_inputs(state, 43), [43], {"modality": kinds})
    assert state.held(0) == [0, 1, 22, *range(37, 43)]


def test_without_a_modality_everything_is_of_modality_0():
    state = Memory(evict=LastByModality({0: 4})).build(**GEOMETRY)
    feed_all(state, random_inputs(state, 10), [3], {})
    assert state.held(0) == [6, 7, 8, 9]


def test_what_nobody_can_count_is_refused():
    state = Memory(evict=LastSeconds(2.0), name="half-a-minute").build(**GEOMETRY)
    inputs = random_inputs(state, 4)
    feed_all(state, inputs, [2], {"time": torch.tensor([5, 5, 6, 6])})
    before = state.state_dict()
    with pytest.raises(ValueError, match=r"half-a-minute counts by the tag 'time'; give it with every step"):
        state.step(2)
    for times, match in [
        ([6.0, 5.9], "runs backwards at row 0, item 1"), ([5.0, 7.0], "runs backwards at row 0, item 0"),
        ([6.0, math.nan], "no number at row 0, item 1"), ([math.inf, 8.0], "no number at row 0, item 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            state.step(2, tags={"time": torch.tensor(times)})
    with pytest.raises(ValueError, match="tag 'time' has shape"):
        state.step(2, tags={"time": torch.zeros(2, 3)})
    after = state.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_seconds_of_any_dtype_and_of_several(dtype):
    """The first step's dtype decides nothing: later fractions count."""
    state = Memory(evict=LastSeconds(1.0)).build(**GEOMETRY)
    inputs = random_inputs(state, 6)
    feed_all(
        state, [tuple(t[:, :, :2] for t in layer) for layer in inputs], [2], {"time": torch.tensor([0, 1], dtype=dtype)}
    )
    rest = [tuple(t[:, :, 2:] for t in layer) for layer in inputs]
    feed_all(state, rest, [1], {"time": torch.tensor([1.25, 1.5, 2.25, 2.375])})
    assert state.held(0) == [3, 4, 5]


def test_what_is_undone_has_not_been_and_what_is_computed_anew_is_at_its_time():
    state = Memory(sink=1, evict=LastSeconds(4.0)).build(**GEOMETRY)
    inputs = random_inputs(state, 8)
    feed_all(state, inputs, [4], {"time": torch.arange(8) / 2})
    state.truncate(3)
    with pytest.raises(ValueError, match="backwards"):
        state.step(1, tags={"time": torch.tensor([1.9])})
    part = [t[:, :, 5:8] for t in inputs[0]]
    with state.step(3, tags={"time": torch.tensor([2.0, 2.1, 2.2])}):
        state.attend(0, *part)
    with state.recache(3, tags={"time": torch.tensor([2.0, 2.1, 5.5])}):
        state.attend(0, *part)
    assert state.held(0) == [0, 3, 4, 5, 6, 7] and state.position == 8


@pytest.mark.parametrize("evict", [LastSeconds(3), LastByModality({0: 3}), LastByModality([(1, 2), (0, 3)], 4)])
def test_answers_are_values(evict):
    assert evict == type(evict)(**vars(evict)) and hash(evict) == hash(type(evict)(**vars(evict)))
    assert LastByModality([(1, 2), (0, 3)]) == LastByModality({0: 3, 1: 2})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LastSeconds(-1.0), "seconds is -1.0"), (lambda: LastSeconds(math.nan), "seconds is nan"),
        (lambda: LastSeconds("3"), "seconds is '3'"), (lambda: LastByModality({0: -1}), "0 or more"),
        (lambda: LastByModality({0: 1.5}), "whole numbers"), (lambda: LastByModality({}, others=-2), "others -2"),
        (lambda: LastByModality([(0, 1), (0, 2)]), "every modality once"),
    ],
)  # fmt: skip
def test_budgets_that_are_none(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_sinks_come_nearer_token_by_token_in_the_arena_too(cut):
    """Contiguous places: what leaves within a step moves the sinks, as on the ring."""
    ring = Memory(sink=2, window=7).build(**GEOMETRY)
    arena = Memory(sink=2, window=7, evict=LastByModality({}, others=7)).build(**GEOMETRY)
    inputs = random_inputs(ring, 30)
    same(feed_all(arena, inputs, [cut], {})[0], feed_all(ring, inputs, [1], {})[0])


class OwnStep(Recall):
    """A query sees what its step brings."""

    def among(self, view):
        return view.fresh


CUT_FREE = [
    Memory(window=9),
    Memory(window=9, sink=2, recall=Strongest(4)),
    Memory(sink=2, window=9, evict=LastSeconds(100.0), recall=Strongest(4)),
    Memory(sink=2, evict=LastSeconds(3.0), place=DistanceCeiling(6)),
    Memory(sink=2, evict=LastByModality({0: 3, 1: 2}, others=2), place=Absolute()),
    Memory(evict=Never()),
    Memory(sink=1, window=9, fold=Spilled(4, 10**6)),
]


@pytest.mark.parametrize("memory", CUT_FREE, ids=lambda memory: type(memory.evict).__name__)
@pytest.mark.parametrize("cut", [[7], [1, 13], [40]])
def test_what_says_it_is_cut_free_gives_the_same_in_any_cut(memory, cut):
    assert memory.cut_free
    tags, inputs = both_tags(40), random_inputs(memory.build(**GEOMETRY), 40)
    one_by_one = feed_all(memory.build(**GEOMETRY), inputs, [1], tags)
    same(feed_all(memory.build(**GEOMETRY), inputs, cut, tags)[0], one_by_one[0])


@pytest.mark.parametrize(
    "memory",
    [
        Memory(sink=2, evict=LastByModality({0: 3, 1: 2}, others=2)),
        Memory(window=9, recall=OwnStep()),
        Memory(window=6, sink=3, evict=LeastAttended(7, 2)),
        Memory(window=9, fold=LinearState(9, 0.5), sink=1, place=Absolute()),
        Memory(window=9, inside="both"),
    ],
    ids=["gaps", "own step", "attended", "state", "both"],
)
def test_what_depends_on_the_cut_says_so(memory):
    assert not memory.cut_free
    tags, inputs = both_tags(40), random_inputs(memory.build(**GEOMETRY), 40)
    one_by_one = feed_all(memory.build(**GEOMETRY), inputs, [1], tags)
    assert (feed_all(memory.build(**GEOMETRY), inputs, [13], tags)[0] - one_by_one[0]).abs().max() > 1e-3
