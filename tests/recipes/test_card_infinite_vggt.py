"""What must hold for the rolling memory of InfiniteVGGT (arXiv 2601.02281): first frame and most unusual keys."""

from itertools import pairwise

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import dvgt2, infinite_vggt

from .drive import play, random_calls, worst

FRAME = 4
# Rows turn the first half of the head, columns the second; nothing turns with time.
ROPE = ef.Rope(inv_freq=tuple(100 ** (-j / 3) for j in range(3)) * 2, axes=(1, 1, 1, 2, 2, 2))
PLACES = {"coordinates": torch.tensor([[0, 0], [1, 1], [1, 2], [2, 1]])}
HEADS = range(2)


def build(total_budget, *, layers=2, rope=ROPE, tau=0.5, anchor=1, **geometry):
    memory = ef.recipe("infinite-vggt", total_budget=total_budget, frame=FRAME, tau=tau, anchor=anchor)
    geometry = {"heads": 4, "kv_heads": 2, "head_dim": 12, "dtype": torch.float64, **geometry}
    return memory.build(layers=layers, rope=rope, **geometry)


def frames(count, **changes):
    return random_calls([FRAME] * count, tags=[PLACES] * count, **changes)


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize("total", [10, 33, 60, 1000])
def test_any_calls_equal_the_reference(total, tentative, kv_heads):
    calls = frames(14, kv_heads=kv_heads, tentative=tentative)
    theirs = infinite_vggt.reference(calls, ROPE, frame=FRAME, total_budget=total)
    assert worst(play(build(total, kv_heads=kv_heads), calls), theirs) < 1e-10


@pytest.mark.parametrize("first", [1, 2, 6])
def test_several_frames_a_step_equal_the_reference(first):
    sizes = [first * FRAME, FRAME, 3 * FRAME, FRAME, 2 * FRAME]
    tags = [{"coordinates": PLACES["coordinates"].repeat(size // FRAME, 1)} for size in sizes]
    calls = random_calls(sizes, tags=tags)
    theirs = infinite_vggt.reference(calls, ROPE, frame=FRAME, total_budget=30)
    assert worst(play(build(30), calls), theirs) < 1e-10


def test_nothing_turns_with_time():
    calls = frames(8)
    theirs = infinite_vggt.reference(calls, None, frame=FRAME, total_budget=30)
    assert worst(play(build(30, rope=ef.Rope()), calls), theirs) < 1e-10


@pytest.mark.parametrize("anchor", [0, 2])
def test_another_number_of_anchors_equals_the_reference(anchor):
    calls = frames(10)
    theirs = infinite_vggt.reference(calls, ROPE, frame=FRAME, total_budget=24, anchor=anchor, tau=0.1)
    assert worst(play(build(24, anchor=anchor, tau=0.1), calls), theirs) < 1e-10


def test_a_layer_that_is_not_pruned_keeps_its_score():
    """When one layer begins to see the same again and again, the other's budget jumps: it has room, and no new score."""
    calls = frames(20, seed=4)
    for call in calls[1][10:]:
        call.k[:] = calls[1][10].k[:, :1] + 0.01 * call.k
    theirs, _, history = infinite_vggt.run(calls, ROPE, frame=FRAME, total_budget=50, tau=0.1)
    assert any(a[0] == b[0] != 0 for a, b in pairwise(history))
    assert worst(play(build(50, tau=0.1), calls), theirs) < 1e-10


def test_point_1_below_the_budget_it_is_the_causal_forward():
    calls = frames(9)
    assert worst(play(build(1000), calls), dvgt2.banded(calls, ROPE, frame=FRAME, window=9)) < 1e-10


def test_point_2_until_the_first_pruning_it_is_the_unbounded_stream():
    calls = frames(9)
    ours, full = play(build(2 * 5 * FRAME), calls), play(build(1000), calls)
    for mine, whole in zip(ours, full, strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(mine[:5], whole[:5], strict=True))
        assert not torch.allclose(mine[5], whole[5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("total", [10, 33, 60])
def test_point_3_no_layer_holds_more_than_its_budget(total):
    calls, state = frames(40), build(total)
    *_, history = infinite_vggt.run(calls, ROPE, frame=FRAME, total_budget=total)
    budgets = infinite_vggt.budgets([0.0, 0.0], total, 0.5)
    sizes, counts = [], [0, 0]
    for t in range(40):
        play(state, one(calls, t))
        assert sum(budgets) <= total
        for layer, budget in enumerate(budgets):
            # What has left does not come back, so a budget that rises is filled by later frames.
            counts[layer] = min(counts[layer] + FRAME, max(budget, FRAME))
            assert {len(state.held(layer, head=head)) for head in HEADS} == {counts[layer]}
        budgets = infinite_vggt.budgets(history[t], total, 0.5)
        sizes.append(state.nbytes)
    assert sizes[-1] == sizes[20]


def test_point_4_the_first_frame_never_changes():
    calls, state = frames(20), build(14)
    for t in range(20):
        play(state, one(calls, t))
        for layer in range(2):
            assert all(set(range(FRAME)) <= set(state.held(layer, head=head)) for head in HEADS)
    # A query that only the anchor answers reads its values as they came.
    anchored = build(2 * FRAME)
    play(anchored, frames(20))
    asked = one(frames(1, seed=7), 0)
    alone = build(2 * FRAME)
    play(alone, one(frames(20), 0))
    assert worst(play(anchored, asked), play(alone, asked)) < 1e-12


def test_point_5_each_head_keeps_what_a_sort_by_cosine_keeps():
    calls, state = frames(8), build(36)
    for t in range(8):
        before = [[state.held(layer, head=head) for head in HEADS] for layer in range(2)]
        play(state, one(calls, t))
        for layer, head in [(layer, head) for layer in range(2) for head in HEADS]:
            keys = torch.cat([call.k[head] for call in calls[layer][: t + 1]])
            keys = dvgt2.rotated(keys, torch.nn.functional.pad(PLACES["coordinates"], (1, 0)).repeat(t + 1, 1), ROPE)
            candidates = sorted({*before[layer][head], *range(t * FRAME, (t + 1) * FRAME)} - set(range(FRAME)))
            kept = set(state.held(layer, head=head)) - set(range(FRAME))
            if not candidates:
                continue
            units = torch.nn.functional.normalize(keys[candidates], dim=1)
            cosine = torch.nn.functional.cosine_similarity(units, units.mean(0, keepdim=True))
            least = cosine.argsort()[: len(kept)]
            assert kept == {candidates[n] for n in least.tolist()}


def test_point_5_the_score_of_a_layer_is_the_squared_length_of_the_mean_of_unit_keys():
    keys = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    mean = torch.nn.functional.normalize(keys, dim=1).mean(0)
    assert abs(infinite_vggt.similarity(keys).mean() - mean.square().sum()) < 1e-12


def planted(count, *, outliers, seed=0):
    """Frames whose keys are one direction and a little noise, but `outliers` of all tokens point anywhere: and which."""
    calls = frames(count, layers=1, seed=seed)
    made = torch.Generator().manual_seed(seed)
    strange = (torch.randperm((count - 1) * FRAME, generator=made)[:outliers] + FRAME).tolist()
    direction = torch.zeros(12, dtype=torch.float64)
    direction[2] = direction[5] = 10.0  # the slowest pair of rows: hardly turned by a place
    for t, call in enumerate(calls[0]):
        for n in range(FRAME):
            if t * FRAME + n not in strange:
                call.k[:, n] = direction + 0.1 * call.k[:, n]
    return calls, set(strange)


def test_point_6_all_outliers_are_kept_where_a_recency_window_keeps_a_twentieth():
    calls, strange = planted(100, outliers=20)
    state = build(FRAME + 20, layers=1)
    play(state, calls)
    for head in HEADS:
        assert strange <= set(state.held(0, head=head))
    recent = set(range(100 * FRAME - 20, 100 * FRAME))
    assert len(strange & recent) / len(strange) < 0.15


def test_point_6_a_layer_that_sees_the_same_frame_again_gets_less():
    calls = frames(20)
    calls[0] = [calls[0][0]] * 20
    state = build(60)
    play(state, calls)
    repeated, random = (len(state.held(layer)) for layer in range(2))
    assert repeated < random and repeated + random <= 60


def test_point_7_later_frames_change_nothing_before():
    calls, other = frames(12), frames(12, seed=1)
    mixed = [mine[:8] + theirs[8:] for mine, theirs in zip(calls, other, strict=True)]
    for mine, changed in zip(play(build(24), calls), play(build(24), mixed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:8], changed[:8], strict=True))
        assert not torch.equal(mine[8], changed[8])


def test_point_8_sessions_do_not_leak_into_each_other_or_into_the_next():
    first, second = frames(12), frames(12, seed=1)
    alone = [play(build(24), calls) for calls in (first, second)]
    states, mixed = (build(24), build(24)), ([[], []], [[], []])
    for t in range(12):
        for state, calls, outputs in zip(states, (first, second), mixed, strict=True):
            for layer, out in zip(outputs, play(state, one(calls, t)), strict=True):
                layer += out
    assert worst(mixed[0], alone[0]) == worst(mixed[1], alone[1]) == 0
    states[0].reset()
    assert worst(play(states[0], second), alone[1]) == 0


def test_pitfall_a_budget_below_the_anchor_keeps_the_anchor():
    calls, state = frames(6), build(3)
    assert worst(play(state, calls), infinite_vggt.reference(calls, ROPE, frame=FRAME, total_budget=3)) < 1e-10
    assert all(sorted(state.held(layer)) == list(range(FRAME)) for layer in range(2))


def test_rows_of_a_batch_have_scores_of_their_own():
    usual, strange = frames(12), planted(12, outliers=5)[0] * 2
    together, alone = build(40, batch=2), [play(build(40), script) for script in (usual, strange)]
    for t in range(12):
        with together.step(FRAME, tags=PLACES):
            for layer in range(2):
                calls = usual[layer][t], strange[layer][t]
                out = together.attend(layer, *(torch.stack([getattr(c, name) for c in calls]) for name in "qkv"))
                for row in range(2):
                    assert (out[row] - alone[row][layer][t]).abs().max() < 1e-12
    counts = [[len(together.held(layer, row=row)) for layer in range(2)] for row in range(2)]
    assert counts[1][0] == counts[1][1] and counts[0] != counts[1]
