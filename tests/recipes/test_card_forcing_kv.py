"""What must hold for the two head groups of Forcing-KV (arXiv 2605.09681)."""

import pytest
import torch

import evenflow as ef
from evenflow.recipes.forcing_kv import static_heads
from evenflow.recipes.reference import Call, forcing_kv

from .drive import play, random_calls, worst

FRAME, CHUNK, SEGMENTS = 6, 3, 3
M = FRAME * CHUNK
ROPE = ef.Rope.axial((4, 4, 4))
PLACES = {"coordinates": torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]).repeat(CHUNK, 1)}
STATIC = ((), (0,))


def build(*, layers=2, heads=4, kv_heads=2, batch=1, rope=ROPE, **params):
    memory = ef.recipe("forcing-kv", **{"static": STATIC, "segments": SEGMENTS, "frame": FRAME, **params})
    geometry = {"heads": heads, "kv_heads": kv_heads, "head_dim": 12, "rope": rope, "batch": batch}
    return memory.build(layers=layers, **geometry, dtype=torch.float64)


def chunks(count, **changes):
    return random_calls([M] * count, tags=[PLACES] * count, **changes)


def told(calls, **params):
    given = {
        "static": STATIC, "sink": 1, "recent": 1, "static_recent": 1, "memory": 1, "segments": SEGMENTS, "start": 1,
    }  # fmt: skip
    return forcing_kv.run(calls, ROPE, frame=FRAME, **{**given, **params})


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


def full(**geometry):
    base = ef.Memory(frame=FRAME, inside="both", place=ef.memory.Absolute(), evict=ef.memory.Never())
    return base.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64, **geometry)


@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(
    "params",
    [
        {}, {"static": ()}, {"static": ((), (0, 1), (1,))}, {"recent": 2, "static_recent": 1, "memory": 2},
        {"recent": 1, "static_recent": 3, "start": 2}, {"sink": 0, "start": 0, "recent": 3},
    ],
)  # fmt: skip
def test_any_calls_equal_the_reference(params, tentative):
    calls = chunks(8, layers=3, tentative=tentative)
    assert worst(play(build(layers=3, **params), calls), told(calls, **params)[0]) < 1e-10


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_the_reference(kv_heads):
    calls = chunks(7, kv_heads=kv_heads)
    assert worst(play(build(kv_heads=kv_heads), calls), told(calls)[0]) < 1e-10


@pytest.mark.parametrize("static", [(), ((), (0,)), ((), (0, 1))])
def test_point_1_long_contexts_are_the_unsplit_cache_however_heads_are_split(static):
    calls = chunks(6)
    assert worst(play(build(static=static, recent=99, static_recent=99), calls), play(full(), calls)) < 1e-10


def test_point_2_calls_that_are_not_committed_change_nothing():
    calls, tried, state = chunks(6), chunks(6, seed=1), build()
    play(state, [layer[:5] for layer in calls])
    held = [[state.held(layer, head=head) for head in range(2)] for layer in range(2)]
    again = state.fork()
    for call in range(3):
        with state.step(M, tags=PLACES, commit=False):
            for layer in range(2):
                q, k, v = (getattr(tried[layer][call], name)[None] for name in "qkv")
                state.attend(layer, q, k, v)
    assert held == [[state.held(layer, head=head) for head in range(2)] for layer in range(2)]
    assert worst(play(state, one(calls, 5)), play(again, one(calls, 5))) == 0


def test_point_3_static_heads_attend_five_frames_and_dynamic_ones_six():
    calls, state = chunks(40), build()
    sizes, counts = [], []
    for t in range(40):
        play(state, one(calls, t))
        sizes.append(state.nbytes)
        counts.append([len(state.held(layer, head=head)) // FRAME for layer in range(2) for head in range(2)])
    # In layer 0 all heads, in layer 1 head 0 is static; the memory fills with chunk start + 2.
    assert counts[:3] == [[3] * 4, [5] * 4, [5] * 4]
    assert all(count == [5, 5, 5, 6] for count in counts[3:])
    assert len(set(sizes[3:])) == 1


def test_what_is_held_is_what_the_reference_holds():
    calls, state = chunks(9), build(static=())
    _, history = told(calls, static=())
    for t in range(9):
        play(state, one(calls, t))
        if t:
            fresh = set(range(M * t, M * (t + 1)))
            for layer in range(2):
                for head in range(2):
                    assert set(state.held(layer, head=head)) - fresh == set(history[t - 1][layer][head])


def planted(count, changing, *, seed=0):
    """A still picture in which segment p changes strongly after frame t, for (t, p) in `changing`."""
    calls = chunks(count, seed=seed)
    still = [(layer[0].k[:, :FRAME], layer[0].v[:, :FRAME]) for layer in calls]
    part, other = FRAME // SEGMENTS, chunks(count, seed=seed + 1)
    for layer, script in enumerate(calls):
        now = still[layer][0].clone()
        for t in range(count * CHUNK):
            call, at = script[t // CHUNK], slice(t % CHUNK * FRAME, (t % CHUNK + 1) * FRAME)
            call.k[:, at] = now
            for p in range(SEGMENTS):
                if (t, p) in changing:
                    now[:, p * part : (p + 1) * part] = other[layer][t // CHUNK].k[:, :part]
    return calls


def held_segments(state, layer, head, frames):
    part = FRAME // SEGMENTS
    held = set(state.held(layer, head=head))
    return {
        (t, p)
        for t in frames
        for p in range(SEGMENTS)
        if set(range(t * FRAME + p * part, t * FRAME + (p + 1) * part)) <= held
    }


def test_point_4_segments_that_change_are_kept():
    changing = {(8, 1), (9, 0), (10, 2)}  # candidates of chunk 3: frames 8, 9 and 10
    calls, state = planted(5, changing), build(static=(), rope=None)
    play(state, calls)
    for head in range(2):
        assert held_segments(state, 1, head, range(1, 11)) == changing
        held = [t for t in state.held(1, head=head) if t < 12 * FRAME]
        assert len(held) == 3 * FRAME and held == sorted(held)


def test_point_4_exactly_the_lowest_scores_are_kept_in_every_layer_alike():
    calls, state = chunks(6, layers=3), build(layers=3, static=())
    _, history = told(calls, static=())
    play(state, calls)
    kept = [history[4][layer][head] for layer in (1, 2) for head in range(2)]
    assert all(indices == kept[0] for indices in kept) and len(kept[0]) == 3 * FRAME
    assert set(state.held(2)) - set(range(5 * M, 6 * M)) == set(kept[0])


def test_point_5_a_still_video_is_read_the_same_whatever_is_chosen():
    """All frames equal, and all segments in them: any other choice holds the same keys and values."""
    calls = chunks(6)
    for layer, script in enumerate(calls):
        for t, call in enumerate(script):
            k, v = (getattr(calls[layer][0], name)[:, :1].expand(-1, M, -1) for name in "kv")
            script[t] = Call(call.q, k, v, call.commit, call.tags)
    first, second = build(rope=None, static=()), build(rope=None, static=())
    outputs = play(first, calls)
    assert worst(play(second, calls), outputs) == 0
    assert [first.held(1, head=h) for h in range(2)] == [second.held(1, head=h) for h in range(2)]
    values = calls[1][0].v[:, :1].repeat_interleave(2, 0)
    assert (outputs[1][-1] - values).abs().max() < 1e-12


def test_point_6_a_head_that_looks_at_the_last_four_frames_is_static():
    mass = torch.rand(2, 4, 3, 20, generator=torch.Generator().manual_seed(0))
    mass[..., -4:] *= torch.tensor([0.0, 4.0, 8.0, 1000.0])[:, None, None]
    mass[..., 0] = 1e6  # sinks are left out
    share = mass[..., -4:].sum((-2, -1)) / mass[..., 1:].sum((-2, -1))
    for threshold in (0.3, 0.6, 0.8):
        found = static_heads(mass, threshold=threshold)
        assert found == static_heads(mass, threshold=threshold)
        assert found == tuple(tuple(h for h in range(4) if share[layer, h] >= threshold) for layer in range(2))
        assert 3 in found[0] and 0 not in found[0]
    assert static_heads(mass, skip=0) == ((), ())


def test_point_8_frames_that_cannot_be_cut_are_refused_and_the_stream_lives():
    with pytest.raises(ValueError, match="7 tokens cannot be cut into 3"):
        ef.recipe("forcing-kv", frame=7, segments=3)
    state = build(frame=None)
    q, k = torch.zeros(1, 4, 21, 12).double(), torch.zeros(1, 2, 21, 12).double()
    with pytest.raises(ValueError, match="7 tokens cannot be cut into 3"), state.step(21):
        state.attend(0, q, k, k)
    assert state.position == 0
    calls = chunks(5)
    assert worst(play(state, calls), play(build(), calls)) < 1e-12


def test_a_prompt_switch_starts_memory_and_recent_frames_anew():
    calls, state = chunks(6), build(static=())
    play(state, calls)
    with state.recache(FRAME):
        for layer in range(2):
            call = calls[layer][0]
            state.attend(layer, *(getattr(call, name)[None, :, :FRAME] for name in "qkv"))
    last = set(range(6 * M - FRAME, 6 * M))
    assert all(set(state.held(layer)) == set(range(FRAME)) | last for layer in range(2))
    more = chunks(2, seed=1)
    play(state, one(more, 0))
    assert len(state.held(1)) == 5 * FRAME
    play(state, one(more, 1))
    assert len(state.held(1)) == 6 * FRAME


def test_pitfall_two_sessions_and_two_rows_choose_for_themselves():
    scripts = planted(6, {(11, 0), (12, 1), (13, 2)}), chunks(6, seed=4)
    alone = [play(build(static=(), rope=None), calls) for calls in scripts]
    together = build(static=(), rope=None, batch=2)
    for t in range(6):
        with together.step(M, tags=PLACES):
            for layer in range(2):
                calls = [script[layer][t] for script in scripts]
                out = together.attend(layer, *(torch.stack([getattr(call, name) for call in calls]) for name in "qkv"))
                for row in range(2):
                    assert (out[row] - alone[row][layer][t]).abs().max() < 1e-12
    assert together.held(1, row=0) != together.held(1, row=1)


def test_later_chunks_change_nothing_before():
    calls, other = chunks(8), chunks(8, seed=1)
    mixed = [mine[:5] + theirs[5:] for mine, theirs in zip(calls, other, strict=True)]
    for ours, changed in zip(play(build(), calls), play(build(), mixed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:5], changed[:5], strict=True))
        assert not torch.equal(ours[5], changed[5])


def test_rows_of_different_age_are_the_streams_that_they_are():
    first, second = chunks(8), chunks(6, seed=1)
    alone = [play(build(), calls) for calls in (first, second)]
    together, behind = build(batch=2), 0
    for c in range(8):
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
