"""What must hold for Flash-VStream (arXiv 2406.08085, 2506.23825): a fixed number of tokens that knows all that was seen."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from evenflow.memory.features import Flash, SemanticAttention, Star, pooled, weighted_kmeans
from evenflow.memory.features.kmeans import cheapest

DIM = 6
SMALL = Star(temporal=5, abstract=4, retrieved=3, fine=4, coarse=2, bank=12, group=3)
UNITS = Flash(synopsis=6, details=3, full=(8, 4), merge=2, bank=10)


def frames(count, seed=0, dim=DIM, side=8):
    return torch.randn(count, side, side, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(count, seed=0, config=UNITS):
    full = torch.randn(count, *config.full, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    half = full.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    return full, half


def star(config=SMALL, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return config.build(DIM, SemanticAttention(DIM).to(dtype), dtype=dtype)


def slow_kmeans(x, weight, start, rounds=10):
    """Item by item, mean by mean; a group without items takes the item furthest from its mean that is not the nearest
    of its group."""
    means = [x[i].clone() for i in start]
    for _ in range(rounds):
        far = [[float((item - mean).norm()) for mean in means] for item in x]
        group = [min(range(len(means)), key=lambda j: row[j]) for row in far]
        own = [far[i][j] for i, j in enumerate(group)]
        stays = {min((i for i in range(len(x)) if group[i] == j), key=lambda i: own[i]) for j in set(group)}
        spare = sorted((i for i in range(len(x)) if i not in stays), key=lambda i: -own[i])
        for j in [j for j in range(len(means)) if j not in group]:
            group[spare.pop(0)] = j
        before = means
        means = []
        for j in range(len(before)):
            inside = [i for i in range(len(x)) if group[i] == j]
            means.append(sum(weight[i] * x[i] for i in inside) / sum(weight[i] for i in inside))
        if sum(float((a - b).norm()) for a, b in zip(means, before, strict=True)) < 1e-4:
            break
    return torch.stack(means), group


@settings(max_examples=40)
@given(some.integers(2, 12), some.integers(1, 6), some.integers(0, 10**6))
def test_kmeans_equals_the_definition(n, k, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=made, dtype=torch.float64)
    weight = torch.randint(1, 9, (n,), generator=made).double()
    start = torch.randperm(n, generator=made)[: min(k, n)]
    share, group = weighted_kmeans(x @ x.mT, weight, start)
    mean = share @ x
    theirs, members = slow_kmeans(x, weight, start.tolist())
    assert group.tolist() == members
    torch.testing.assert_close(mean, theirs, rtol=0, atol=1e-10)


# -- counts and mass ---------------------------------------------------------------------------------------------------


def test_point_1_there_are_681_tokens_and_11520():
    state = Star().build(4)
    state.feed(torch.randn(26, 16, 16, 4))
    sizes = {len(state.read().tokens)}
    for _ in range(3):
        state.feed(torch.randn(7, 16, 16, 4))
        sizes.add(len(state.read().tokens))
    assert sizes == {681}
    other, sizes = Flash(bank=61).build(1), set()
    for count in (60, 1, 2):
        other.feed(torch.randn(count, 32, 32, 1), torch.randn(count, 16, 16, 1))
        sizes.add(len(other.read().coordinates))
    assert sizes == {30 * 256 + 60 * 64} == {11_520}


@pytest.mark.parametrize("still", [False, True])
def test_point_1_a_scene_at_rest_has_as_many_tokens(still):
    state = star()
    state.feed(frames(1).expand(40, -1, -1, -1) if still else frames(40))
    assert len(state.read().tokens) == 4 + 5 * 4 + 3 * 16 + 16


def test_point_2_weights_add_up_to_the_frames_seen_and_means_to_their_mean():
    state, whole = star(), frames(60)
    state.feed(whole)
    summary = state.summary
    assert summary.weight.sum() == 60 and (summary.weight > 0).all()
    seen = pooled(pooled(whole, 4), 2).flatten(1).mean(0)
    torch.testing.assert_close((summary.weight[:, None] * summary.mean).sum(0) / 60, seen, rtol=0, atol=1e-10)
    torch.testing.assert_close((summary.weight * summary.time).sum() / 60, torch.tensor(59 / 2).double())


def test_point_2_a_mean_is_the_mean_of_its_members():
    whole = torch.randn(80, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    members, means = [[t] for t in range(7)], whole[:7]
    for t in range(7, 80):
        x, weight = torch.cat([means, whole[t : t + 1]]), torch.tensor([*map(len, members), 1]).double()
        share, group = weighted_kmeans(x @ x.mT, weight, cheapest(x @ x.mT, weight))
        joined = [[] for _ in range(7)]
        for old, number in zip([*members, [t]], group.tolist(), strict=True):
            joined[number] += old
        members, means = joined, share @ x
        torch.testing.assert_close(means, torch.stack([whole[m].mean(0) for m in members]), rtol=0, atol=1e-10)
    assert sorted(itertools.chain(*members)) == list(range(80))


def test_the_cheapest_to_join_is_found_among_all_pairs():
    made = torch.Generator().manual_seed(2)
    for _ in range(20):
        x, weight = torch.randn(6, 3, generator=made, dtype=torch.float64), torch.rand(6, generator=made).double()
        costs = {}
        for i in range(6):
            for j in range(i):
                middle = (weight[i] * x[i] + weight[j] * x[j]) / (weight[i] + weight[j])
                moved = [float(weight[n] * (x[n] - middle).square().sum()) for n in (i, j)]
                costs[i, j] = sum(moved)
        leaves = min(min(costs, key=costs.get), key=lambda n: float(weight[n]))
        assert cheapest(x @ x.mT, weight).tolist() == [n for n in range(6) if n != leaves]


def test_point_3_at_the_start_it_is_what_came_in_its_order():
    state, whole = star(), frames(5)
    state.feed(whole)
    assert torch.equal(state.summary.mean, pooled(pooled(whole, 4), 2).flatten(1))
    assert torch.equal(state.read().abstract, pooled(whole, 4).mean((1, 2))[:4])
    other, (full, half) = UNITS.build(DIM, dtype=torch.float64), units(3)
    other.feed(full, half)
    assert torch.equal(other.read().synopsis, half) and torch.equal(other.read().details, full)


def test_point_4_old_scenes_are_better_kept_than_by_a_queue_of_the_same_size():
    made = torch.Generator().manual_seed(0)
    scenes = torch.randn(10, 8, 8, DIM, generator=made, dtype=torch.float64)
    order = torch.arange(300) // 6 % 10  # a scene lasts six frames
    whole = scenes[order] + 0.1 * torch.randn(300, 8, 8, DIM, generator=made, dtype=torch.float64)
    coarse = pooled(pooled(whole, 4), 2).flatten(1)
    queue = torch.cdist(coarse, coarse[-12:]).min(1).values.median()
    paper, state = (star(Star(temporal=12, fine=4, coarse=2, bank=20, seed=seed)) for seed in (0, None))
    for one in (paper, state):
        one.feed(whole)
    errors = [torch.cdist(coarse, one.summary.mean).min(1).values for one in (paper, state)]
    assert errors[0].mean() < 0.6 * queue and errors[0].max() > 0.5 * queue  # some scenes have become one
    assert errors[1].max() < 0.2 * queue
    assert len(torch.cdist(pooled(pooled(scenes, 4), 2).flatten(1), state.summary.mean).argmin(1).unique()) == 10


# -- what is brought back ----------------------------------------------------------------------------------------------


def test_point_5_retrieved_frames_are_real_and_nearest_to_the_heaviest_means():
    state, whole = star(), frames(30)
    state.feed(whole)
    read, summary = state.read(), state.summary
    fine = pooled(whole, 4)
    assert torch.equal(read.retrieved.view(3, 4, 4, DIM), fine[read.frames])
    assert torch.equal(read.spatial.view(4, 4, DIM), fine[-1])
    left, expected = list(range(30 - SMALL.bank, 30)), []
    for group in sorted(range(5), key=lambda j: -float(summary.weight[j]))[:3]:
        best = min(left, key=lambda t: float((pooled(fine[t : t + 1], 2).flatten() - summary.mean[group]).norm()))
        left.remove(best)
        expected.append(best)
    assert read.frames.tolist() == sorted(expected)


def test_pitfall_the_bank_is_bounded_and_so_is_everything():
    state, other, sizes = star(), UNITS.build(DIM, dtype=torch.float64), []
    for n in range(40):
        state.feed(frames(1, seed=n))
        other.feed(*units(1, seed=n))
        sizes.append((state.nbytes, other.nbytes))
    # The abstract waits for one or two frames more or less.
    assert {b for _, b in sizes[6:]} == {sizes[-1][1]} and len({a for a, _ in sizes[12:]}) <= SMALL.group


# -- the abstract ------------------------------------------------------------------------------------------------------


def test_point_6_semantic_attention():
    torch.manual_seed(0)
    memory, items = torch.randn(4, DIM, dtype=torch.float64), torch.randn(3, DIM, dtype=torch.float64)
    attention = SemanticAttention(DIM, rank=5).double()
    rows = attention.weights(memory, items)
    torch.testing.assert_close(rows.sum(1), torch.ones(4).double())
    query, key = attention.query.weight, attention.key.weight
    for i in range(4):
        scores = torch.stack([(query @ memory[i]) @ (key @ item) / 5**0.5 for item in items]).exp()
        seen = sum(s / scores.sum() * item for s, item in zip(scores, items, strict=True))
        torch.testing.assert_close(attention(memory, items)[i], 0.8 * memory[i] + 0.2 * seen)
    (attention(memory, items) ** 2).sum().backward()
    assert query.grad.abs().sum() > 0 and key.grad.abs().sum() > 0
    attention.alpha = 0.0
    assert torch.equal(attention(memory, items), memory)
    attention.alpha = 1.0
    torch.testing.assert_close(attention(memory, items[:1]), items[:1].expand(4, -1))


def test_pitfall_slots_of_the_abstract_stay_apart_in_groups_and_not_one_by_one():
    def spread(group):
        torch.manual_seed(0)
        attention = SemanticAttention(DIM).double()
        nn.init.normal_(attention.query.weight)
        nn.init.normal_(attention.key.weight)
        state = Star(temporal=2, abstract=8, fine=4, coarse=2, bank=3, group=group).build(
            DIM, attention, dtype=torch.float64
        )
        state.feed(frames(8 + 50, seed=3))
        return float(state.read().abstract.std(0).mean())

    assert spread(1) < 1e-2 * spread(25)


# -- places ------------------------------------------------------------------------------------------------------------


def test_point_7_places_are_the_times_of_what_was_joined():
    state = UNITS.build(DIM, dtype=torch.float64)
    full, half = units(25)
    state.feed(full, half)
    read = state.read()
    rows, columns = 4, 2
    fine, coarse = read.coordinates[: 3 * 8], read.coordinates[3 * 8 :]
    expected = [[t, y, x] for t in read.numbers.tolist() for y in range(rows) for x in range(columns)]
    assert fine.tolist() == expected
    times = [round(float(t)) for t in read.times]
    assert times == sorted(times)
    expected = [[t + 24, y + 24, x + 24] for t in times for y in range(2) for x in range(1)]
    assert coarse.tolist() == expected
    assert fine[:, 1:].max() < coarse.min()
    torch.testing.assert_close((read.times * state.summary.weight).sum() / 25, torch.tensor(12.0).double())


def test_pitfall_times_are_of_the_stream_and_not_of_the_buffer():
    state = UNITS.build(DIM, dtype=torch.float64)
    state.feed(*units(40))
    assert state.read().times.max() > 30 and state.read().numbers.min() >= 40 - UNITS.bank


# -- a session ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_results_do_not_depend_on_how_frames_come(cut):
    state, whole = star(), frames(40)
    for start in range(0, 40, cut):
        state.feed(whole[start : start + cut])
    other = star()
    other.feed(whole)
    assert torch.equal(state.read().tokens, other.read().tokens)


def test_point_10_and_a_copy_and_a_saved_one_go_on_alike():
    state, rest = star(), frames(9, seed=5)
    state.feed(frames(20))
    twin, again = state.fork(), star()
    again.load_state_dict(state.state_dict())
    for one in (state, twin, again):
        one.feed(rest)
    assert torch.equal(state.read().tokens, twin.read().tokens)
    assert torch.equal(state.read().tokens, again.read().tokens)
    drawn = []
    for seed in (1, 1, 2):
        drawn.append(star(replace(SMALL, seed=seed)))
        drawn[-1].feed(torch.cat([frames(20), rest]))
    one, same, other = (state.read().temporal for state in drawn)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_point_8_a_question_sees_one_moment_while_frames_come():
    state, whole = star(), frames(400)
    moments = {}
    lone = star()
    for t in range(400):
        lone.feed(whole[t : t + 1])
        moments[t + 1] = lone.read().tokens
    state.feed(whole[:1])
    writer = threading.Thread(target=lambda: [state.feed(whole[t : t + 1]) for t in range(1, 400)])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(state.read())
    writer.join()
    assert len({one.version for one in seen}) > 3
    for one in seen:
        assert torch.equal(one.tokens, moments[one.version])


def test_point_9_a_frame_costs_late_what_it_costs_early():
    young, old, took = star(), star(), {}
    young.feed(frames(30)), old.feed(frames(600))
    more = frames(120, seed=9)
    for n in range(120):  # in turns, as others use the machine too
        start = time.perf_counter()
        (young, old)[n % 2].feed(more[n : n + 1])
        took.setdefault(n % 2, []).append(time.perf_counter() - start)
    assert sorted(took[1])[30] < 1.3 * sorted(took[0])[30]


def test_half_precision_is_held_as_it_came_and_summed_up_in_single():
    state = star(dtype=torch.bfloat16)
    state.attention.float()
    state.feed(frames(20).bfloat16())
    assert state.held["detail"].dtype == torch.bfloat16 and state.summary.mean.dtype == torch.float32
    assert state.read().tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda s: s.feed(frames(2, dim=5)), "expected"),
        (lambda s: s.feed(frames(2, side=6)), "cannot be divided"),
        (lambda s: s.feed(frames(2).fill_(float("nan"))), "no numbers"),
        (lambda s: s.truncate(1), "fork before"),
        (lambda s: s.load_state_dict({"mean": torch.zeros(1)}), "expected"),
        (lambda s: s.load_state_dict(s.state_dict() | {"detail": torch.zeros(3, 4, 4, DIM).double()}), "this memory"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(wrong, said):
    state = star()
    state.feed(frames(9))
    before = state.state_dict()
    with pytest.raises(ValueError, match=said):
        wrong(state)
    after = state.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="nothing was fed"):
        star().read()
    with pytest.raises(ValueError, match="divide"):
        Flash(full=(30, 32))
    with pytest.raises(ValueError, match="bank"):
        Flash(details=30, bank=20)
    with pytest.raises(ValueError, match="both"):
        UNITS.build(DIM).feed(units(2)[0].float(), units(3)[1].float())
