"""What must hold for StreamDiffusionV2 (arXiv 2511.07399): sinks that are replaced, a ring, a cache a denoising step."""

from dataclasses import replace

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import streamdiffusion_v2 as reference_module
from evenflow.recipes.streamdiffusion_v2 import Refreshed

from .drive import play, random_calls, worst

FRAME = 4
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
reference = reference_module.reference


def build(*, layers=2, kv_heads=2, dtype=torch.float64, batch=1, rope=ROPE, **params):
    memory = ef.recipe("streamdiffusion-v2", **{"frame": FRAME, "steps": 1, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=rope, dtype=dtype, batch=batch)


def latents(sizes, **changes):
    """Calls of so many latents each."""
    tags = [{"coordinates": GRID.repeat(n, 1)} for n in sizes]
    return random_calls([n * FRAME for n in sizes], tags=tags, **changes)


def scenes(sizes, change, *, seed=0, noise=0.3, **more):
    """The same with a scene that all latents share, in keys and values, and another one from latent `change` on."""
    calls = latents(sizes, seed=seed, **more)
    made = torch.Generator().manual_seed(seed + 100)
    for layer in calls:
        heads = layer[0].k.shape[0]
        views = torch.randn(2, 2, heads, FRAME, 12, generator=made, dtype=torch.float64)
        number = 0
        for n, call in enumerate(layer):
            count = call.k.shape[1] // FRAME
            which = [int(number + i >= change) for i in range(count)]
            k, v = (torch.cat([views[part, w] for w in which], 1) for part in (0, 1))
            layer[n] = replace(call, k=k + noise * call.k, v=v + noise * call.v)
            number += count if call.commit else 0
    return calls


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("tentative", "threshold", "t_reset"), [(0, 0.2, 8), (2, 0.2, 50), (1, -1, 8), (0, 0.6, 50), (1, 0.2, None)]
)
def test_any_calls_equal_the_reference(tentative, threshold, t_reset, kv_heads):
    for calls in (
        latents([2, *[1] * 14], tentative=tentative, kv_heads=kv_heads),
        scenes([2, *[1] * 14], 9, tentative=tentative, kv_heads=kv_heads),
    ):
        theirs = reference(calls, ROPE, frame=FRAME, threshold=threshold, t_reset=t_reset)
        state = build(threshold=threshold, t_reset=t_reset, kv_heads=kv_heads)
        assert worst(play(state, calls), theirs) < 1e-10


@pytest.mark.parametrize(
    ("cache", "sink", "threshold", "sizes"),
    [
        (5, 2, -1, [2, 1, 1, 2, 2, 1, 3, 1, 1]),
        (7, 3, 0.2, [2, 2, 2, 1, 1, 3, 4, 1, 1, 2, 1]),
        (4, 0, -1, [3, 1, 2, 1, 4, 1]),
        (9, 1, 0.5, [3] * 3 + [1] * 9),
    ],
)  # fmt: skip
def test_other_sizes_equal_the_reference(cache, sink, threshold, sizes):
    calls = scenes(sizes, 6)
    params = {"num_kv_cache": cache, "sink": sink, "threshold": threshold, "t_reset": 12}
    assert worst(play(build(**params), calls), reference(calls, ROPE, frame=FRAME, **params)) < 1e-10


def stream_batch(state, first, chunks, steps):
    """The n-row batch: the first chunk in all copies, then each call a latent further; outputs by (latent, step)."""
    outputs = {}
    with state.step(2 * FRAME, tags=first[0].tags):
        for layer, call in enumerate(first):
            given = [x[None].repeat(steps, 1, 1, 1) for x in (call.q, call.k, call.v)]
            outputs["first", layer] = state.attend(layer, *given)[0]
    count = len(chunks[0][0])
    for tick in range(count + steps - 1):
        there = [0 <= tick - row < count for row in range(steps)]
        mask = torch.tensor(there)[:, None].expand(-1, FRAME)
        with state.step(FRAME, tags={"coordinates": GRID}, mask=mask):
            for layer in range(2):
                rows = [chunks[row][layer][min(max(tick - row, 0), count - 1)] for row in range(steps)]
                out = state.attend(layer, *(torch.stack([getattr(c, x) for c in rows]) for x in "qkv"))
                for row in range(steps):
                    if there[row]:
                        outputs[tick - row, row, layer] = out[row]
    return outputs


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("threshold", [0.2, -1])
def test_point_1_the_stream_batch_equals_sequential_passes_over_a_cache_a_step(steps, threshold):
    first = [layer[0] for layer in scenes([2], 99)]
    chunks = [scenes([1] * 10, 5, seed=row + 1) for row in range(steps)]  # what pass `row` makes of each latent
    ours = stream_batch(build(steps=steps, threshold=threshold), first, chunks, steps)
    for row in range(steps):
        script = [[first[layer], *chunks[row][layer]] for layer in range(2)]
        theirs = reference(script, ROPE, frame=FRAME, threshold=threshold)
        for layer in range(2):
            assert float((ours["first", layer] - theirs[layer][0]).abs().max()) < 1e-10
            for c in range(10):
                assert float((ours[c, row, layer] - theirs[layer][c + 1]).abs().max()) < 1e-10


def test_point_1_clean_caches_would_give_something_else():
    first = [layer[0] for layer in latents([2])]
    chunks = [latents([1] * 4, seed=row + 1) for row in range(2)]
    ours = stream_batch(build(steps=2), first, chunks, 2)
    mixed = reference([[first[n], *chunks[1][n][:3]] for n in range(2)], ROPE, frame=FRAME)
    noisy = [[replace(chunks[0][n][3])] for n in range(2)]  # pass 0 of latent 3 over what the last pass made of others
    clean = reference([[first[n], *chunks[1][n][:3], *noisy[n]] for n in range(2)], ROPE, frame=FRAME)
    assert float((ours[2, 1, 0] - mixed[0][3]).abs().max()) < 1e-10
    assert float((ours[3, 0, 0] - clean[0][4]).abs().max()) > 1e-2


def slots_over_time(state, calls):
    """Per call: the latent number in each slot, as the arena has them, of layer 0."""
    seen = []
    for n in range(len(calls[0])):
        play(state, part(calls, n, n + 1))
        index = state.state_dict()["tables.0.index"][0, 0, ::FRAME] // FRAME
        seen.append(index.tolist())
    return seen


def test_point_2_the_ring_goes_round_and_sinks_never_change():
    state = build(threshold=-1)
    calls = latents([2, *[1] * 20])
    seen = slots_over_time(state, calls)
    assert seen[4] == [0, 1, 2, 3, 4, 5]
    for number in range(6, 22):
        before, after = seen[number - 2], seen[number - 1]
        changed = [slot for slot in range(6) if before[slot] != after[slot]]
        assert changed == [3 + number % 3] and after[changed[0]] == number  # 6 → 3, 7 → 4, 8 → 5, 9 → 3
        assert after[:3] == [0, 1, 2]


def test_point_2_memory_is_flat_after_six_latents():
    state, sizes = build(), []
    calls = latents([2, *[1] * 40])
    for n in range(41):
        play(state, part(calls, n, n + 1))
        sizes.append(state.nbytes)
        assert len(state.held(0)) == min(n + 2, 6) * FRAME
    assert len(set(sizes[5:])) == 1


def test_point_3_a_sink_is_replaced_when_the_scene_changes_and_the_ring_goes_on_where_it_was():
    calls, change = scenes([2, *[1] * 19], 10), 10
    seen = slots_over_time(build(), calls)
    replaced, due = [], 3
    for number in range(6, 21):
        before, after = seen[number - 2], seen[number - 1]
        (slot,) = [slot for slot in range(6) if before[slot] != after[slot]]
        if slot < 3:
            replaced.append(number)
        else:
            assert slot == due
            due = 3 + (due - 2) % 3
    assert replaced == [change, change + 1, change + 2]
    off = slots_over_time(build(threshold=-1), calls)
    assert all(slots[:3] == [0, 1, 2] for slots in off[2:])


def test_point_3_layers_and_rows_decide_for_themselves():
    """Row 1 sees another scene from latent 8 on, row 0 never; layer 1 never in either."""
    quiet, loud = scenes([2, *[1] * 12], 99), scenes([2, *[1] * 12], 8)
    state = build(batch=2)
    for n in range(13):
        with state.step(quiet[0][n].q.shape[1], tags=quiet[0][n].tags):
            for layer in range(2):
                rows = [quiet[layer][n], (loud if layer == 0 else quiet)[layer][n]]
                state.attend(layer, *(torch.stack([getattr(c, x) for c in rows]) for x in "qkv"))
    first = {(layer, row): state.held(layer, row)[: 3 * FRAME] for layer in range(2) for row in range(2)}
    opening = list(range(3 * FRAME))
    assert first[0, 1] != opening
    assert [first[key] for key in ((0, 0), (1, 0), (1, 1))] == [opening] * 3


def test_point_4_later_latents_change_nothing_before():
    calls = latents([2, *[1] * 10])
    other = [
        [replace(c, k=c.k + 1.0 * (n >= 6), v=c.v - 1.0 * (n >= 6)) for n, c in enumerate(layer)] for layer in calls
    ]
    ours, theirs = play(build(), calls), play(build(), other)
    for a, b in zip(ours, theirs, strict=True):
        assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [n < 6 for n in range(11)]


def test_positions_go_back_at_the_refresh_and_cached_keys_keep_theirs():
    clock = Refreshed(50, 6)
    at = clock.at(torch.arange(200)).tolist()
    assert at[:52] == [*range(50), 5, 6] and max(at) == 49
    assert at[95] == 5 and at == [reference_module.position(n, 50, 6) for n in range(200)]
    calls = latents([2, *[1] * 52])
    theirs = reference(calls, ROPE, frame=FRAME)
    assert worst(play(build(), calls), theirs) < 1e-10
    never = reference(calls, ROPE, frame=FRAME, t_reset=10_000)
    assert worst(part(theirs, 0, 49), part(never, 0, 49)) < 1e-12
    assert worst(part(theirs, 49, 50), part(never, 49, 50)) > 1e-2  # the jump


def test_placed_by_age_there_is_no_jump_and_the_time_does_not_matter():
    calls, near = latents([2, *[1] * 12]), build(t_reset=None, threshold=-1)
    play(near, part(calls, 0, 8))
    expected = play(near.fork(), part(calls, 8))
    far = near.fork()
    far.seek(far.position + 10**9 * FRAME)
    assert worst(play(far, part(calls, 8)), expected) < 1e-10


def test_all_passes_of_a_latent_without_batch_share_a_slot():
    """The mode without batch: also for the latent that fills the cache."""
    one, many = build(threshold=-1), build(threshold=-1)
    calls, noisy = latents([2, *[1] * 9]), latents([2, *[1] * 9], seed=1)
    for n in range(10):
        for _ in range(2):
            play(many, [[replace(layer[n], commit=False)] for layer in noisy])
        play(many, part(calls, n, n + 1))
    play(one, calls)
    assert one.held(0) == many.held(0) and len(one.held(0)) == 6 * FRAME


def test_wrong_parameters_are_refused():
    for wrong, word in (
        ({"sink": 6}, "sink"), ({"threshold": 2}, "threshold"), ({"sink": 0}, "threshold"), ({"t_reset": 4}, "t_reset"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            ef.recipe("streamdiffusion-v2", **wrong)
