"""Blocks off the device, questions to them, and a ceiling on distances, as answers in compositions of one's own."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.memory import (
    Absolute,
    Contiguous,
    DistanceCeiling,
    Evict,
    Memory,
    Never,
    Oldest,
    Spilled,
    TopBlocks,
)
from evenflow.memory.spill import best_groups

from ..recipes.drive import asked, play, random_calls, worst
from .drive import random_inputs, run

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
PLENTY = 1 << 24


def groups_of(scores, size, chunk):
    """The same as a plain loop."""
    if len(scores) <= size:
        return [*range(len(scores))]
    groups = [range(i, min(i + chunk, len(scores))) for i in range(0, len(scores), chunk)]
    means = [sum(scores[i] for i in group) / len(group) for group in groups]
    taken = sorted(range(len(groups)), key=lambda g: (-means[g], g))[: size // chunk]
    return sorted(i for g in taken for i in groups[g])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=20), st.integers(1, 8), st.data())
def test_the_best_groups_are_those_of_a_plain_loop(scores, size, data):
    chunk = data.draw(st.integers(1, size))
    got = best_groups(torch.tensor(scores, dtype=torch.float64), size, chunk)
    assert got.tolist() == groups_of(scores, size, chunk)


def spilled(state, layer, row=0, rows=1):
    """Keys, values [H_kv, n, D] and stream indices of all blocks of one row."""
    shelf = layer * rows + row
    return state.store.fetch(shelf, state.store.index(shelf).ids).concatenated()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 7),
    st.integers(0, 3),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.sampled_from([None, 6, 9]),
)
def test_any_cut_gives_the_same_blocks_bit_by_bit(block, sink, cuts, window):
    memory = Memory(sink=sink, window=window, evict=Oldest(), fold=Spilled(block, PLENTY), place=Absolute())
    state = memory.build(**GEOMETRY)
    inputs = random_inputs(state, 40)
    run(state, inputs, cuts)
    for layer, (_, k, v) in enumerate(inputs):
        if block + sink > 40:
            continue
        keys, values, index = spilled(state, layer)
        stop = sink + (40 - sink) // block * block
        assert index.tolist() == [*range(sink, stop)]
        assert torch.equal(keys, k[0, :, sink:stop]) and torch.equal(values, v[0, :, sink:stop])
        means = state.store.index(layer).tensors["mean"]
        torch.testing.assert_close(means, keys.unflatten(1, (-1, block)).mean(2).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("place", [Absolute(), Contiguous(), DistanceCeiling(5)])
@pytest.mark.parametrize("frames", [1, 3])
def test_under_a_window_of_frames_that_see_each_other_both_ways(place, frames):
    """Blocks of two frames, chunks of one or three: what is read is what it is without blocks, and all of it is found."""
    given = {"sink": 1, "window": 4, "frame": 3, "inside": "both", "evict": Oldest(with_fresh=True), "place": place}
    with_blocks = Memory(fold=Spilled(6, PLENTY), recall=TopBlocks(100), **given).build(**GEOMETRY)
    calls = random_calls([3 * frames] * 8, head_dim=8)
    assert worst(play(with_blocks, calls), play(Memory(**given).build(**GEOMETRY), calls)) < 1e-12
    ask = random_calls([4], head_dim=8, seed=3)
    every = Memory(evict=Never(), place=Contiguous()).build(**GEOMETRY)
    play(every, calls)
    ours, seen = asked(with_blocks, [layer[0] for layer in ask])
    assert seen == [[*range(24 * frames)]] * 2
    assert worst(ours, play(every, ask)) < 1e-12


def test_blocks_of_large_keys_are_preferred_by_product_and_not_by_cosine():
    memory = Memory(window=8, evict=Oldest(), fold=Spilled(4, PLENTY), recall=TopBlocks(1))
    cosine = Memory(**{**vars(memory), "recall": TopBlocks(1, by="cosine")})
    calls, ask = random_calls([4] * 5, head_dim=8), [layer[0] for layer in random_calls([3], head_dim=8, seed=3)]
    for layer, question in zip(calls, ask, strict=True):
        mean = question.q.mean(1).unflatten(0, (2, 2)).sum(1)  # of the heads that share a key head
        for n, (size, off) in enumerate([(1, 9), (1, 0), (1, 9), (9, 3), (1, 9)]):
            other = torch.nn.functional.normalize(
                torch.randn(2, 8, generator=torch.Generator().manual_seed(n)).double(), dim=-1
            )
            layer[n].k[:] = size * (mean + off * other)[:, None]
    for made, expected in ((memory, 3), (cosine, 1)):
        state = made.build(**GEOMETRY)
        play(state, calls)
        assert asked(state, ask)[1] == [[*range(4 * expected, 4 * expected + 4)]] * 2


class Choosy(Evict):
    """Tokens leave before others of their block, and in every head of every layer other ones."""

    content = True

    def keep(self, view):
        head = torch.arange(view.geometry.kv_heads)[None, :, None]
        return (view.index * 7 + 3 * head + view.layer) % 5 > 2


def test_blocks_are_complete_whatever_heads_and_layers_hold():
    state = Memory(evict=Choosy(), fold=Spilled(4, PLENTY), recall=TopBlocks(2)).build(**GEOMETRY)
    inputs = random_inputs(state, 60)
    run(state, inputs, [1, 3, 7])
    assert state.held(0, head=0) != state.held(0, head=1) != state.held(1, head=1)
    for layer, (_, k, _) in enumerate(inputs):
        assert torch.equal(spilled(state, layer)[0], k[0])
    seen = asked(state, [layer[0] for layer in random_calls([3], head_dim=8, seed=3)])[1]
    assert all(len(s) == 8 for s in seen)


@pytest.mark.parametrize("place", [Absolute(), Contiguous(), DistanceCeiling(7)])
def test_sinks_that_are_kept_in_a_reset_are_found(place):
    memory = Memory(sink=3, window=6, evict=Oldest(), place=place, fold=Spilled(4, PLENTY), recall=TopBlocks(2))
    state, fresh = memory.build(**GEOMETRY), memory.build(**GEOMETRY)
    calls, ask = random_calls([3, 4, 4, 2], head_dim=8), [layer[0] for layer in random_calls([3], head_dim=8, seed=3)]
    play(state, calls)
    state.reset(keep_sink=True)
    more = random_calls([5, 7], head_dim=8, seed=4)
    play(fresh, [layer[:1] + other for layer, other in zip(calls, more, strict=True)])
    play(state, more)
    (ours, seen), (theirs, same) = asked(state, ask), asked(fresh, ask)
    assert seen == same and worst(ours, theirs) < 1e-12


def test_answers_may_stand_where_they_were_in_the_stream():
    memory = Memory(window=8, fold=Spilled(4, PLENTY), recall=TopBlocks(2, answer_place=Absolute()), evict=Oldest())
    state, packed = memory.build(**GEOMETRY), Memory(**{**vars(memory), "recall": TopBlocks(2)}).build(**GEOMETRY)
    calls, ask = random_calls([4] * 10, head_dim=8), [layer[0] for layer in random_calls([3], head_dim=8, seed=3)]
    play(state, calls)
    play(packed, calls)
    (ours, seen), (other, same) = asked(state, ask), asked(packed, ask)
    assert seen == same and worst(ours, other) > 1e-3
    for layer, question in enumerate(ask):
        k, v = (torch.cat([getattr(c, n) for c in calls[layer]], 1)[:, seen[layer]] for n in "kv")
        turned = ef.recipes.reference.rotated
        index = [*seen[layer], 40, 41, 42]
        keys = turned(torch.cat([k, question.k], 1), index, ef.Rope())
        query = turned(question.q, index[-3:], ef.Rope())
        for n in range(3):
            upto = len(index) - 2 + n
            values = torch.cat([v, question.v], 1)[:, :upto]
            theirs = ef.recipes.reference.attention(query[:, n : n + 1], keys[:, :upto], values)
            assert float((ours[layer][0][:, n : n + 1] - theirs).abs().max()) < 1e-12


@pytest.mark.parametrize("sink", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[1], [5], [3, 30]])
def test_a_ceiling_holds_with_many_sinks_and_few_in_any_dtype(sink, dtype, cuts):
    """Few sinks are met through their scores, many through keys of their own; single queries through moved sinks."""
    memory = Memory(sink=sink, window=23, evict=Oldest(), place=DistanceCeiling(24))
    exact, state = memory.build(**GEOMETRY), memory.build(**{**GEOMETRY, "dtype": dtype})
    inputs = random_inputs(state, 70)
    once = run(exact, [tuple(x.double() for x in layer) for layer in inputs], [1])
    for a, b in zip(run(state, inputs, cuts), once, strict=True):
        assert float((a.double() - b).abs().max()) < 32 * torch.finfo(dtype).eps


def test_a_ceiling_counts_frames_where_a_frame_is_a_position():
    """All sinks are where the oldest of 4 frames would be, from the fifth frame on."""
    given = {"sink": 2, "window": 3, "frame": 2, "inside": "both", "evict": Oldest()}
    state = Memory(place=DistanceCeiling(4), **given).build(**GEOMETRY)
    absolute = Memory(place=Absolute(), **given).build(**GEOMETRY)
    calls = random_calls([2] * 12, head_dim=8)
    ours, theirs = play(state, calls), play(absolute, calls)
    assert worst([o[:4] for o in ours], [t[:4] for t in theirs]) < 1e-12
    turned, attention = ef.recipes.reference.rotated, ef.recipes.reference.attention
    for n in range(4, 12):
        call = calls[0][n]
        held = [*range(4), *range(2 * max(n - 3, 2), 2 * n + 2)]
        k, v = (torch.cat([getattr(c, x) for c in calls[0]], 1)[:, held] for x in "kv")
        keys = turned(k, [j // 2 if j >= 4 else n - 3 for j in held], ef.Rope())
        theirs = attention(turned(call.q, [n] * 2, ef.Rope()), keys, v)
        assert float((ours[0][n] - theirs).abs().max()) < 1e-12


def test_alibi_knows_the_ceiling():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    geometry = {**GEOMETRY, "rope": None, "alibi": slopes}
    state = Memory(sink=2, window=5, evict=Oldest(), place=DistanceCeiling(6)).build(**geometry)
    inputs = random_inputs(state, 30)
    for cuts in ([1], [7], [30]):
        state.reset()
        out = run(state, inputs, cuts)[0][0]
        q, k, v = (x[0] for x in inputs[0])
        for p in range(30):
            held = [j for j in range(p + 1) if j < 2 or p - j < 6]
            distance = torch.tensor([5 if j < 2 and p >= 6 else p - j for j in held])
            bias = -slopes[:, None, None] * distance
            theirs = ef.recipes.reference.attention(q[:, p : p + 1], k[:, held], v[:, held], bias)
            assert float((out[:, p : p + 1] - theirs).abs().max()) < 1e-12


def test_what_makes_no_sense_is_refused():
    for wrong, why in (
        ({"fold": Spilled(4, PLENTY), "window": 8, "rows": 2}, "one copy"),
        ({"recall": TopBlocks(3), "window": 8}, "blocks that `Spilled` made"),
    ):
        with pytest.raises(ValueError, match=why):
            Memory(**{"evict": Oldest(), **wrong})
    for make in (
        lambda: TopBlocks(1, by="norm"),
        lambda: Spilled(0, 1),
        lambda: TopBlocks(0),
        lambda: TopBlocks(2, 3),
        lambda: DistanceCeiling(0),
    ):
        with pytest.raises(ValueError, match=r"1 (token |block )?or more|'cosine'"):
            make()
    with pytest.raises(ValueError, match="no limit is negative"):
        Memory(window=8, evict=Oldest(), fold=Spilled(4, -1)).build(**GEOMETRY)
