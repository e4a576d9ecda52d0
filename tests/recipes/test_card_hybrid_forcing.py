"""What must hold for the hybrid memory of Hybrid Forcing (arXiv 2604.10103): sparse window and linear state."""

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import hybrid_forcing, plain

from .drive import play, random_calls, worst

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
PLACES = {"coordinates": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(CHUNK, 1)}
P = torch.randn(2, 12, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def build(*, batch=1, kv_heads=2, rope=ROPE, **params):
    memory = ef.recipe("hybrid-forcing", **{"block": 5, "ratio": 0.4, "frame": FRAME, **params})
    return memory.build(layers=2, heads=4, kv_heads=kv_heads, head_dim=12, rope=rope, batch=batch, dtype=torch.float64)


def chunks(count, **changes):
    return random_calls([CHUNK * FRAME] * count, tags=[PLACES] * count, **changes)


def told(calls, **params):
    given = {"sink": 3, "window": 6, "horizon": 21, "block": 5, "ratio": 0.4, "projection": None, "raw_query": False}
    return hybrid_forcing.run(calls, ROPE, frame=FRAME, **{**given, **params})


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


def linear_state(state, layer):
    saved = state.state_dict()
    return {name: saved[f"layers.{layer}.fold.{name}"] for name in ("kmean", "kv", "count")}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(
    "params", [{}, {"projection": P}, {"projection": P, "raw_query": True, "horizon": 12}, {"ratio": 1.0, "sink": 1}]
)
def test_any_calls_equal_the_reference(params, tentative, kv_heads):
    calls = chunks(10, kv_heads=kv_heads, tentative=tentative)
    theirs = told(calls, **params)[0]
    largest = max(
        float(out.abs().max()) for layer in theirs for out in layer
    )  # raw queries are divided by hardly anything
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10 * max(1, largest)


def test_point_1_without_projection_and_with_all_blocks_it_is_windowed_softmax():
    calls = chunks(10)
    ours = play(build(ratio=1.0), calls)
    for layer, script in enumerate(calls):
        for c, call in enumerate(script):
            f = CHUNK * c
            start = min(f, 18)
            seen = sorted({*range(min(c, 1)), *range(max(c - 1, 0), c + 1)})
            times = [
                list(range(CHUNK)) if s == 0 else list(range(start - (c - s) * 3, start - (c - s) * 3 + 3))
                for s in seen
            ]
            k = [
                plain.rotated(script[s].k, _places(time), ROPE) for s, time in zip(seen, times, strict=True)
            ]  # fmt: skip
            q = plain.rotated(call.q, _places(range(start, start + 3)), ROPE)
            expected = plain.attention(q, torch.cat(k, 1), torch.cat([script[s].v for s in seen], 1))
            assert (ours[layer][c] - expected).abs().max() < 1e-10


def _places(times):
    time = torch.tensor([[t] for t in times for _ in range(FRAME)])
    return torch.cat([time, PLACES["coordinates"]], 1)


def test_point_1_streams_of_nine_frames_are_the_base_model():
    calls = chunks(3)
    base = ef.Memory(frame=FRAME, inside="both", place=ef.memory.Absolute(), evict=ef.memory.Never())
    full = base.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)
    assert worst(play(build(ratio=1.0), calls), play(full, calls)) < 1e-10


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 12])
def test_point_2_the_state_is_the_mean_over_all_absorbed_tokens(count):
    calls, state = chunks(count), build()
    play(state, calls)
    absorbed = max(0, count - 2)
    for layer, script in enumerate(calls):
        mine = linear_state(state, layer)
        assert mine["count"].tolist() == [CHUNK * FRAME * absorbed]
        if not absorbed:
            assert not mine["kmean"].any() and not mine["kv"].any()
            continue
        k = torch.cat([c.k for c in script[:absorbed]], 1)
        v = torch.cat([c.v for c in script[:absorbed]], 1)
        at = [min(3 * c + 6, 18) - 6 for c in range(absorbed)]  # when chunk c goes, the queries stand six frames later
        places = torch.cat([_places(range(t, t + 3)) for t in at])
        turned = plain.rotated(k, places, ROPE)
        assert (mine["kmean"][0] - k.relu().mean(1)).abs().max() < 1e-12
        assert (mine["kv"][0] - turned.transpose(1, 2) @ v / k.shape[1]).abs().max() < 1e-12


def test_point_3_each_chunk_is_absorbed_once_whatever_is_tried_before():
    calls, tried = chunks(8), chunks(8, tentative=4)
    straight, wandering = build(), build()
    for c in range(8):
        play(straight, one(calls, c))
        before = wandering.state_dict()
        for attempt in range(4):
            play(wandering, one(tried, 5 * c + attempt))
        for layer in range(2):
            name = f"layers.{layer}.fold.kv"
            if c:
                assert torch.equal(before[name], wandering.state_dict()[name])
        play(wandering, one(calls, c))
        for layer in range(2):
            ours, theirs = linear_state(straight, layer), linear_state(wandering, layer)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_point_3_computing_the_window_anew_absorbs_nothing():
    calls, state = chunks(6), build()
    play(state, calls)
    before = [linear_state(state, layer) for layer in range(2)]
    fresh = chunks(1, seed=3)
    with state.recache(CHUNK * FRAME, tags={"coordinates": PLACES["coordinates"]}):
        for layer in range(2):
            call = fresh[layer][0]
            state.attend(layer, call.q[None], call.k[None], call.v[None])
    for layer in range(2):
        after = linear_state(state, layer)
        assert all(torch.equal(after[name], before[layer][name]) for name in after)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 1.0])
def test_point_4_so_many_blocks_are_attended_and_no_other(ratio):
    calls, state = chunks(6), build(ratio=ratio, block=4)
    play(state, [layer[:5] for layer in calls])
    last, held = one(calls, 5), state.fork()
    out = play(held, last)[0][0]
    q = plain.rotated(last[0][0].q, _places(range(15, 18)), ROPE)
    seen = [*range(3), *range(12, 18)]  # frames, at their own times: the horizon is not reached
    keys = torch.cat([calls[0][f // 3].k[:, (f % 3) * 4 : (f % 3) * 4 + 4] for f in seen], 1)
    places = torch.tensor([[f, *PLACES["coordinates"][n].tolist()] for f in seen for n in range(FRAME)])
    turned = plain.rotated(keys, places, ROPE)
    values = torch.cat([calls[0][f // 3].v[:, (f % 3) * 4 : (f % 3) * 4 + 4] for f in seen], 1)
    for h in range(4):
        kept = hybrid_forcing.kept_blocks(q[h], turned[h // 2], ratio, 4)
        assert {len(blocks) for blocks in kept} == {max(1, int(ratio * 9))}
        for b, blocks in enumerate(kept):
            columns = [i for i in range(36) if i // 4 in blocks]
            part = slice(4 * b, 4 * b + 4)
            expected = plain.attention(q[h : h + 1, part], turned[None, h // 2, columns], values[None, h // 2, columns])
            assert (out[h, part] - expected[0]).abs().max() < 1e-12


def test_points_5_and_6_nothing_grows():
    calls, state = chunks(30), build(projection=0.1)
    sizes = []
    for c in range(30):
        play(state, one(calls, c))
        sizes.append(state.nbytes)
        assert len(state.held(0)) <= (3 + 6) * FRAME
    assert sizes[2:] == sizes[2:3] * 28
    mine = linear_state(state, 0)
    assert mine["kv"].numel() + mine["kmean"].numel() == 2 * (12 * 12 + 12)


def test_point_7_a_projection_of_zero_changes_nothing():
    calls = chunks(8)
    off = play(build(), calls)
    for zero in (0.0, torch.zeros(2, 12, 13)):
        assert worst(play(build(projection=zero), calls), off) == 0
    assert worst(play(build(projection=P), calls), off) > 0.01


def test_point_8_later_chunks_change_nothing_before():
    calls, other = chunks(9), chunks(9, seed=1)
    mixed = [mine[:6] + theirs[6:] for mine, theirs in zip(calls, other, strict=True)]
    ours, changed = play(build(projection=P), calls), play(build(projection=P), mixed)
    for layer in range(2):
        assert all(torch.equal(a, b) for a, b in zip(ours[layer][:6], changed[layer][:6], strict=True))
        assert not torch.equal(ours[layer][6], changed[layer][6])


def test_point_8_beyond_the_horizon_only_what_is_held_matters():
    state = build(projection=P)
    play(state, chunks(9))
    late = state.fork()
    late.seek(10**9 * CHUNK * FRAME)
    more = chunks(4, seed=2)
    assert worst(play(state, more), play(late, more)) < 1e-12


def test_rows_of_a_batch_have_states_of_their_own():
    scripts = chunks(6), chunks(6, seed=1)
    alone = [play(build(projection=P), calls) for calls in scripts]
    together = build(batch=2, projection=P)
    for c in range(6):
        with together.step(CHUNK * FRAME, tags=PLACES):
            for layer in range(2):
                calls = [script[layer][c] for script in scripts]
                out = together.attend(layer, *(torch.stack([getattr(call, name) for call in calls]) for name in "qkv"))
                for row in range(2):
                    assert (out[row] - alone[row][layer][c]).abs().max() < 1e-12


def test_rows_of_different_age_are_the_streams_that_they_are():
    """One row pauses for a chunk: a chunk of which nothing is real."""
    first, second = chunks(7), chunks(5, seed=1)
    alone = [play(build(projection=P), calls) for calls in (first, second)]
    together, behind = build(batch=2, projection=P), 0
    for c in range(7):
        paused = c in (2, 4)
        real = torch.ones(2, CHUNK * FRAME, dtype=torch.bool)
        real[1] = not paused
        with together.step(CHUNK * FRAME, tags=PLACES, mask=real):
            for layer in range(2):
                calls = first[layer][c], second[layer][behind]
                out = together.attend(layer, *(torch.stack([getattr(call, name) for call in calls]) for name in "qkv"))
                assert (out[0] - alone[0][layer][c]).abs().max() < 1e-12
                if not paused:
                    assert (out[1] - alone[1][layer][behind]).abs().max() < 1e-12
        behind += not paused


def test_pitfall_a_softcap_goes_with_dense_attention_only():
    memory = ef.recipe("hybrid-forcing", frame=FRAME)
    state = memory.build(layers=1, heads=2, head_dim=12, rope=None, softcap=5.0)
    q = torch.zeros(1, 2, FRAME, 12)
    with pytest.raises(ValueError, match="ratio=1"), state.step(FRAME):
        state.attend(0, q, q, q)
    assert state.position == 0
