"""What must hold for Rolling Forcing (arXiv 2509.25161): joint calls of blocks in flight, clean passes, an anchor."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import evenflow as ef
from evenflow.memory import Places
from evenflow.recipes.reference import rolling_forcing
from evenflow.recipes.rolling_forcing import Rejoined

from .drive import play, random_calls, worst
from .switching import content

FRAME, BLOCK, STEPS = 4, 3, 5
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def build(memory=None, *, kv_heads=2, dtype=torch.float64, batch=1, **params):
    memory = memory or ef.recipe("rolling-forcing", **{"frame": FRAME, **params})
    return memory.build(layers=2, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype, batch=batch)


def calls_of(frames, commits, **changes):
    """One call each of so many frames; those with commits[i] are kept."""
    tags = [{"coordinates": GRID.repeat(n, 1)} for n in frames]
    script = random_calls([n * FRAME for n in frames], tags=tags, **changes)
    return [[replace(call, commit=kept) for call, kept in zip(layer, commits, strict=True)] for layer in script]


def stream(blocks, steps=STEPS, *, seed=0, **changes):
    """A whole video: per window a joint call, and the clean pass of the block that is finished, if there is one."""
    frames, commits = [], []
    for w in range(blocks + steps - 1):
        first, last = max(0, w - steps + 1), min(blocks - 1, w)
        frames.append(BLOCK * (last - first + 1))
        commits.append(False)
        if w >= steps - 1:
            frames.append(BLOCK)
            commits.append(True)
    return calls_of(frames, commits, seed=seed, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("blocks", "steps"), [(14, 5), (12, 3), (11, 1), (3, 5)])
def test_any_calls_equal_the_reference(blocks, steps, kv_heads):
    calls = stream(blocks, steps, kv_heads=kv_heads)
    theirs = rolling_forcing.reference(calls, ROPE, frame=FRAME)
    assert worst(play(build(kv_heads=kv_heads), calls), theirs) < 1e-10


@pytest.mark.parametrize(("anchor", "budget"), [(2, 9), (1, 4), (4, 12), (5, 6), (7, 30)])
def test_other_sizes_equal_the_reference(anchor, budget):
    """Windows, blocks and anchors of any length, also a window that leaves no room for the anchor's neighbours."""
    lengths = [2, 2, 4, 1, 5, 3, 8, 2, 1, 12, 3, 3, 20, 2, 4, 3]
    frames = [min(n, budget - 1 + i % 2) for i, n in enumerate(lengths)]
    calls = calls_of(frames, [i % 2 == 1 for i in range(len(frames))])
    theirs = rolling_forcing.reference(calls, ROPE, frame=FRAME, anchor=anchor, budget=budget)
    assert worst(play(build(anchor=anchor, budget=budget), calls), theirs) < 1e-10


def test_point_1_a_window_of_one_block_is_the_base_up_to_21_frames():
    calls = stream(7, 1)
    base = build(ef.recipe("self-forcing", window=None, frame=FRAME))
    assert worst(play(build(), calls), play(base, calls)) < 1e-10


def test_point_1_the_clean_pass_is_the_base_with_a_window_of_21_for_ever():
    calls = [[call for call in layer if call.commit] for layer in stream(15)]
    base = build(ef.recipe("self-forcing", window=21, frame=FRAME))
    assert worst(play(build(), calls), play(base, calls)) < 1e-10


def seen_by(state, calls, call, perturbed):
    """Which of these kept calls a later call feels: states that differ in one block's values each."""
    expected, felt = play(build_like(state), part(calls, 0, call + 1)), []
    for n in perturbed:
        other = [[replace(c, v=c.v + (i == n)) for i, c in enumerate(layer)] for layer in calls]
        ours = play(build_like(state), part(other, 0, call + 1))
        felt.append(float((ours[0][call] - expected[0][call]).abs().max()) > 1e-9)
    return felt


def build_like(state):
    return build(state.memory)


def test_point_4_in_steady_state_a_window_attends_anchor_working_and_itself_21_frames():
    calls = stream(16)
    kept = [n for n, call in enumerate(calls[0]) if call.commit]
    for block in (4, 8, 10):  # the joint call that has this block as its oldest
        call = kept[block] - 1
        felt = seen_by(build(), calls, call, kept[:block])
        assert felt == [b in (0, block - 1) for b in range(block)]
        assert len(rolling_forcing.joint(3 * block, 15, 3, 21)) + 15 == 21
    # At the end of a finite video the window is shorter, and sees more that is finished.
    last = kept[-1] - 1
    assert seen_by(build(), calls, last, kept[:15]) == [b == 0 or b >= 10 for b in range(15)]


def test_point_4_the_clean_pass_loses_the_anchor_once_it_is_out_of_reach():
    calls = stream(10)
    kept = [n for n, call in enumerate(calls[0]) if call.commit]
    assert seen_by(build(), calls, kept[6], kept[:6]) == [True] * 6
    assert seen_by(build(), calls, kept[7], kept[:7]) == [False] + [True] * 6
    assert seen_by(build(), calls, kept[9], kept[:9]) == [b >= 3 for b in range(9)]


def test_point_4_the_anchor_stands_directly_before_what_is_seen():
    class Seen(Rejoined):
        offsets: ClassVar[list[int]] = []

        def positions(self, view):
            places: Places = super().positions(view)
            if not view.commit and int(view.consumed[0]):
                there = torch.where(view.index >= 0, places.keys, 10**9)[0, 0].unique()[:-1]
                assert (there.diff() == 1).all()  # contiguous, whatever the stream's length
                assert len(there) == min(21, int(view.consumed[0] + view.coming[0]) // FRAME)
                self.offsets.append(int(places.queries[0, 0] - places.keys[0, 0, 0]))
            return places

    play(build(replace(ef.recipe("rolling-forcing", frame=FRAME), place=Seen())), part(stream(60), 0, 70))
    assert len(Seen.offsets) > 20 and set(Seen.offsets[1:]) == {6}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_point_4_later_in_the_stream_the_same_content_gives_the_same(dtype, limit):
    calls, near = stream(16), build(dtype=dtype)
    play(near, part(calls, 0, 20))
    expected = [[x.double() for x in layer] for layer in play(near.fork(), part(calls, 20))]
    for shift in (3, 3000, 3 * 10**9):
        far = near.fork()
        far.seek(far.position + shift * FRAME)
        assert worst(play(far, part(calls, 20)), expected) < limit


def test_point_5_the_first_windows_read_no_cache_and_leave_block_0_alone():
    calls = stream(9)
    first = part(calls, 0, 6)  # windows 0 to 4, and the clean pass of block 0
    assert [call.commit for call in first[0]] == [False] * 5 + [True]
    state = build()
    alone = [[play(build(), [[layer[n]] for layer in first])[i][0] for n in range(6)] for i in range(2)]
    assert worst(play(state, first), alone) < 1e-12
    assert state.held(0) == list(range(3 * FRAME))
    only = build()
    play(only, part(first, 5))
    for name, x in content(only).items():
        assert torch.equal(x[:, :, : 3 * FRAME], content(state)[name][:, :, : 3 * FRAME])


def test_point_6_a_window_changes_nothing_that_is_kept():
    """A finished block depends on others through the network alone: joint calls leave no trace in the memory."""
    calls = stream(12)
    with_windows, without = build(), build()
    play(with_windows, calls)
    play(without, [[call for call in layer if call.commit] for layer in calls])
    assert with_windows.held(0) == without.held(0)
    clean = calls_of([3], [True], seed=9)
    assert worst(play(with_windows, clean), play(without, clean)) < 1e-12


def test_point_7_it_holds_24_frames_for_ever():
    calls, state, sizes = stream(30), build(), []
    for n, call in enumerate(calls[0]):
        play(state, part(calls, n, n + 1))
        if call.commit:
            sizes.append(state.nbytes)
            end = state.position // FRAME
            frames = [t for t in range(end) if t < 3 or t >= end - 21]
            assert state.held(0) == [t * FRAME + i for t in frames for i in range(FRAME)]
    assert len(state.held(0)) == 24 * FRAME and len(set(sizes[7:])) == 1


def test_rows_of_a_batch_of_different_age_attend_for_themselves():
    """The second row sits out until the first has finished six blocks."""
    calls = stream(12)
    late = [n for n, call in enumerate(calls[0]) if call.commit][5] + 1
    begin = part(calls, late)
    alone, state = play(build(), begin), build(batch=2)
    for n in range(len(calls[0])):
        call = calls[0][n]
        mask = torch.ones(2, call.q.shape[1], dtype=torch.bool)
        mask[1] = n >= late
        with state.step(call.q.shape[1], mask=mask, tags=call.tags, commit=call.commit):
            for layer in range(2):
                c = calls[layer][n]
                out = state.attend(layer, *(x[None].repeat(2, 1, 1, 1) for x in (c.q, c.k, c.v)))
                if n >= late:
                    assert float((out[1] - alone[layer][n - late]).abs().max()) < 1e-10


def test_wrong_sizes_are_refused():
    for wrong in ({"anchor": 0}, {"budget": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ef.recipe("rolling-forcing", **wrong)
    state = build()
    with pytest.raises(ValueError, match="22 frames"):
        play(state, calls_of([22], [False]))
    assert state.position == 0
