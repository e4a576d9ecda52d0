"""What must hold for TempCache, AnnSA and AnnCA (arXiv 2602.01801)."""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize, one_hot

import evenflow as ef
from evenflow.memory.buckets import shared_products
from evenflow.memory.hashing import bucket_codes, hyperplanes
from evenflow.recipes.reference import Call, plain, temp_cache
from evenflow.recipes.temp_cache import prompt_tokens

from .drive import play, random_calls, worst

FRAME, CHUNK = 4, 2
M = FRAME * CHUNK
ROPE = ef.Rope.axial((4, 4, 4))
PLACES = {"coordinates": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(CHUNK, 1)}


def build(*, layers=2, heads=4, kv_heads=2, batch=1, rope=ROPE, head_dim=12, value_dim=None, scale=None, **params):
    memory = ef.recipe("temp-cache", **{"frame": FRAME, "chunk": CHUNK, **params})
    return memory.build(
        layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, rope=rope, batch=batch,
        dtype=torch.float64, scale=scale,
    )  # fmt: skip


def chunks(count, *, alike=0.15, **changes):
    """Chunks whose tokens go on from frame to frame, but for some that are new."""
    calls, made = random_calls([M] * count, tags=[PLACES] * count, **changes), torch.Generator().manual_seed(3)
    for script in calls:
        now = script[0].k[:, :FRAME].clone()
        for call in script:
            for n in range(CHUNK):
                at = slice(n * FRAME, (n + 1) * FRAME)
                fresh = torch.rand(FRAME, generator=made) < 0.3
                now = torch.where(fresh[:, None], call.k[:, at], now)
                call.k[:, at] = now + alike * call.k[:, at]
                if n == 0 and call.commit:
                    call.k[:, 1] = call.k[:, 0] + 0.01 * call.k[:, 1]  # two of one frame that match the same
    return calls


def told(calls, rope=ROPE, **params):
    return temp_cache.run(calls, rope, frame=FRAME, **{"tau": 0.9, **params})


def planes(bits, tables, dim=12):
    return hyperplanes(dim, bits, tables=tables, like=torch.zeros(1).double())


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


def step(state, q, k, v, commit=True):
    """One step of one layer: q, k, v [H, m, D]."""
    with state.step(k.shape[1], commit=commit):
        return state.attend(0, q[None], k[None], v[None])[0]


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "params",
    [
        {}, {"match": "key"}, {"representative": "mean"}, {"match": "key", "representative": "first"}, {"tau": 0.5},
        {"tau": -1.0}, {"window": 3},
    ],
)  # fmt: skip
def test_any_calls_equal_the_reference(params):
    calls = chunks(7, tentative=1)
    outputs, history = told(calls, **params)
    state = build(**params)
    assert worst(play(state, calls), outputs) < 1e-10
    assert any(len(own) < 7 * M and max(g.count for g in own) > 1 for own in history[0][-1])


@pytest.mark.parametrize(("kv_heads", "sparse_layers"), [(1, None), (2, (1,)), (4, None)])
def test_hashed_attention_equals_the_reference(kv_heads, sparse_layers):
    calls = chunks(5, kv_heads=kv_heads, tentative=1)
    outputs, _ = told(calls, planes=planes(3, 2), sparse_layers=sparse_layers)
    state = build(kv_heads=kv_heads, bits=3, tables=2, sparse_layers=sparse_layers)
    assert worst(play(state, calls), outputs) < 1e-10
    assert worst(play(build(kv_heads=kv_heads), calls), outputs) > 1e-3


def test_point_1_merging_equal_keys_is_exact_for_any_values():
    keys, values, asked = drawn(5, 8), drawn(2, 40, 3), drawn(2, 6, 8, seed=2)
    which = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    which[:5] = torch.arange(5)
    dense = plain.attention(asked, keys[which].expand(2, -1, -1), values)
    count = one_hot(which).sum(0).double()
    means = torch.stack([values[:, which == g].mean(1) for g in range(5)], 1)
    merged = plain.attention(asked, keys.expand(2, -1, -1), means, count.log().expand(2, 6, -1))
    assert (dense - merged).abs().max() < 1e-12


def repeated(count, noise, seed=0):
    """One layer of frames that repeat the first but for noise of that norm on each key."""
    calls = random_calls([FRAME] * count, layers=1, heads=2, seed=seed)
    still = 3 * normalize(calls[0][0].k, dim=-1)
    made = [Call(call.q, still + noise * normalize(call.k, dim=-1), call.v) for call in calls[0]]
    return [[Call(call.k.clone() * 4, call.k, call.v) for call in made]]


def test_point_2_the_error_goes_to_zero_linearly_with_the_noise():
    errors = []
    for noise in (0.04, 0.02, 0.01, 0.005):
        calls, asked = repeated(12, noise), random_calls([FRAME], layers=1, heads=2, seed=9)
        merged, whole = build(layers=1, heads=2, rope=None), build(layers=1, heads=2, rope=None, tau=2.0)
        play(merged, calls), play(whole, calls)
        assert len(merged.held(0)) == FRAME
        errors.append(worst(play(merged, asked), play(whole, asked)))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[0] < 0.1 and all(0.8 < slope < 1.2 for slope in slopes)


def test_point_3_above_one_it_is_dense_and_at_minus_one_it_never_grows():
    calls = chunks(8)
    full = ef.Memory(frame=FRAME, inside="both", place=ef.memory.Absolute(), evict=ef.memory.Never())
    dense = full.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)
    assert worst(play(build(tau=1.01), calls), play(dense, calls)) < 1e-12
    small = build(tau=-1.0)
    for t in range(8):
        play(small, one(calls, t))
        assert all(len(small.held(layer, head=head)) <= FRAME for layer in range(2) for head in range(2))


def test_point_4_a_still_video_is_one_frame_that_counts_for_all():
    calls = repeated(20, 0.0)
    still, whole = build(layers=1, heads=2, rope=None), build(layers=1, heads=2, rope=None, tau=2.0)
    sizes = []
    for t in range(20):
        assert worst(play(still, one(calls, t)), play(whole, one(calls, t))) < 1e-12
        assert len(still.held(0)) == FRAME
        sizes.append(still.nbytes)
        weight = still.state_dict().get("tables.0.weight")
        if t:
            assert sorted(weight.exp().round().flatten().tolist())[-FRAME:] == [t + 1.0] * FRAME
    assert sizes[-1] == sizes[2]


def stream(*, n=200, dim=64, frames=20, new=0.1, noise=0.1, drift=0.0):
    """The card's synthetic stream: keys [n, dim] and which thing each of them is, frame by frame."""
    made = torch.Generator().manual_seed(0)

    def units(count):
        return normalize(torch.randn(count, dim, generator=made, dtype=torch.float64), dim=-1)

    things, names = units(n), torch.arange(n)
    for t in range(frames):
        if t:
            gone = torch.randperm(n, generator=made)[: int(new * n)]
            things[gone], names[gone] = units(len(gone)), int(names.max()) + 1 + torch.arange(len(gone))
            things = normalize(things + drift * units(n), dim=-1) if drift else things
        yield things + noise * units(n), names.clone()


def measured(*, tau=0.9, representative="last", **kind):
    """Kept density, overlap of attention over things, relative error of the output, for queries of the last frame."""
    frames = list(stream(**kind))
    n, things = 200, int(frames[-1][1].max()) + 1
    shape = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 64, "value_dim": things, "rope": None, "scale": 1.0}
    states = [build(frame=n, chunk=1, tau=t, representative=representative, **shape) for t in (tau, 2.0)]
    for keys, names in frames:
        for state in states:
            step(state, 8 * keys[None], keys[None], one_hot(names, things).double()[None])
    asked = 8 * frames[-1][0][None]
    shares = [step(s, asked, -asked, torch.zeros(1, n, things).double(), commit=False)[0] for s in states]
    merged, dense = (share / share.sum(-1, keepdim=True) for share in shares)
    values = drawn(things, 64)
    density = len(states[0].held(0)) / len(states[1].held(0))
    error = float(((merged - dense) @ values).norm() / (dense @ values).norm())
    return density, float(torch.minimum(merged, dense).sum(-1).mean()), error


@pytest.mark.parametrize(("new", "expected"), [(0.0, 0.05), (0.05, 0.098), (0.1, 0.145), (0.3, 0.335)])
def test_point_5_only_what_is_new_is_kept(new, expected):
    density, overlap, error = measured(new=new)
    assert abs(density - expected) < 0.01 and overlap >= 0.95 and error <= 0.06


def test_point_5_noise_that_hides_what_goes_on_keeps_everything():
    density, _, error = measured(noise=0.5)
    assert density == 1.0 and error == 0.0


def test_point_6_the_last_key_goes_on_finding_what_drifts():
    drifting = {"new": 0.0, "drift": 0.3, "noise": 0.05, "tau": 0.8}
    last, mean, first = (measured(representative=r, **drifting)[0] for r in ("last", "mean", "first"))
    assert last < 0.06 < mean < 0.13 < first


def test_point_7_prompt_tokens_that_share_a_bucket_with_any_query_are_kept():
    q, keys = drawn(2, 4, 9, 12), drawn(2, 2, 50, 12, seed=1)
    kept = prompt_tokens(q, keys, bits=4, tables=2)
    for b in range(2):
        for h in range(2):
            queries = q[b, 2 * h : 2 * h + 2].flatten(0, 1)
            assert kept[b, h].tolist() == temp_cache.prompt_tokens(queries, keys[b, h], planes(4, 2))
    assert 0 < int(kept.sum()) < kept.numel()
    assert bool(prompt_tokens(q, keys, bits=0).all())


def test_point_8_hashed_attention_comes_near_to_dense_with_more_tables():
    calls = chunks(6)
    dense = play(build(bits=0), calls)
    errors = [worst(play(build(bits=3, tables=tables), calls), dense) for tables in (1, 40)]
    assert errors[1] < errors[0] / 5


def test_point_8_a_query_that_shares_no_bucket_sees_its_own_frame():
    calls = chunks(6)
    state = build(bits=60, tables=1)
    play(state, [layer[:5] for layer in calls])
    out = play(state, one(calls, 5))
    for layer, script in enumerate(calls):
        last = script[5]
        for n in range(CHUNK):
            at = slice(n * FRAME, (n + 1) * FRAME)
            place = torch.cat([torch.full((FRAME, 1), 10 + n), PLACES["coordinates"][at]], 1)
            q, k = (plain.rotated(x[:, at], place, ROPE) for x in (last.q, last.k))
            assert (out[layer][0][:, at] - plain.attention(q, k, last.v[:, at])).abs().max() < 1e-12


def test_point_8_recall_grows_with_tables_and_cost_is_what_shares_a_bucket():
    q, keys = drawn(2000, 16), drawn(2000, 16, seed=1)
    mass = torch.softmax(q @ keys.T, -1)
    recalls, costs = [], []
    for tables in (1, 4, 16):
        made = hyperplanes(16, 5, tables=tables, like=q)
        a, b = bucket_codes(q, made), bucket_codes(keys, made)
        met = (a[:, None] == b[None]).any(-1)
        recalls.append(float((mass * met).sum(-1).mean()))
        costs.append(int(sum(shared_products(a[:, t], b[:, t]) for t in range(tables))))
        assert costs[-1] == int((a[:, None] == b[None]).sum())
    assert recalls[0] < recalls[1] < recalls[2] and costs[0] < costs[1] < costs[2]
    assert recalls[1] > 2 * costs[1] / 4e6  # far better than chance


def test_point_10_the_time_of_a_frame_is_flat_where_content_is_stationary():
    things, made = normalize(drawn(64, 16), dim=-1), torch.Generator().manual_seed(0)
    state = build(layers=1, heads=1, kv_heads=1, head_dim=16, rope=None, frame=64, chunk=1)

    def frame(stream):
        keys = things + 0.05 * normalize(torch.randn(64, 16, generator=made, dtype=torch.float64), dim=-1)
        began = time.perf_counter()
        step(stream, keys[None], keys[None], keys[None])
        return time.perf_counter() - began

    for _ in range(20):
        frame(state)
    young = state.fork()
    for _ in range(280):
        frame(state)
    assert len(state.held(0)) == 64
    took = [(frame(young), frame(state)) for _ in range(60)]  # in turns, as the machine has other things to do
    early, late = (sorted(times)[10] for times in zip(*took, strict=True))
    assert late / early < 1.3


def test_pitfall_calls_that_are_not_committed_merge_nothing():
    calls, tried = chunks(4), chunks(4, seed=1)
    state = build()
    play(state, [layer[:3] for layer in calls])
    twin = state.fork()
    for n in range(3):
        with state.step(M, tags=PLACES, commit=False):
            for layer in range(2):
                state.attend(layer, *(getattr(tried[layer][n], name)[None] for name in "qkv"))
    assert worst(play(state, one(calls, 3)), play(twin, one(calls, 3))) == 0
    assert all(torch.equal(a, b) for a, b in zip(state.state_dict().values(), twin.state_dict().values(), strict=True))


def test_rows_and_heads_merge_for_themselves():
    scripts = chunks(6), chunks(6, seed=1)
    for params in ({}, {"bits": 3, "tables": 2}):
        alone = [play(build(**params), calls) for calls in scripts]
        together = build(batch=2, **params)
        for t in range(6):
            with together.step(M, tags=PLACES):
                for layer in range(2):
                    calls = [script[layer][t] for script in scripts]
                    out = together.attend(layer, *(torch.stack([getattr(c, name) for c in calls]) for name in "qkv"))
                    for row in range(2):
                        assert (out[row] - alone[row][layer][t]).abs().max() < 1e-12


def test_rows_of_different_age_are_the_streams_that_they_are():
    first, second = chunks(7), chunks(5, seed=1)
    alone = [play(build(), calls) for calls in (first, second)]
    together, behind = build(batch=2), 0
    for c in range(7):
        paused = c in (3, 5)
        real = torch.ones(2, M, dtype=torch.bool)
        real[1] = not paused
        with together.step(M, tags=PLACES, mask=real):
            for layer in range(2):
                calls = first[layer][c], second[layer][behind]
                out = together.attend(layer, *(torch.stack([getattr(call, name) for call in calls]) for name in "qkv"))
                assert (out[0] - alone[0][layer][c]).abs().max() < 1e-12
                if not paused:
                    assert (out[1] - alone[1][layer][behind]).abs().max() < 1e-12
        behind += not paused


def test_later_chunks_change_nothing_before():
    calls, other = chunks(8), chunks(8, seed=1)
    mixed = [mine[:5] + theirs[5:] for mine, theirs in zip(calls, other, strict=True)]
    for ours, changed in zip(play(build(), calls), play(build(), mixed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:5], changed[:5], strict=True))
        assert not torch.equal(ours[5], changed[5])


def test_saved_and_forked_streams_go_on():
    calls = chunks(8)
    state, loaded = build(), build()
    play(state, [layer[:5] for layer in calls])
    loaded.load_state_dict(state.state_dict())
    twin, rest = state.fork(), [layer[5:] for layer in calls]
    expected = play(state, rest)
    assert worst(play(twin, rest), expected) == worst(play(loaded, rest), expected) == 0


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="query, key"):
        ef.recipe("temp-cache", match="value")
    with pytest.raises(ValueError, match="last, mean, first"):
        ef.recipe("temp-cache", representative="medoid")
