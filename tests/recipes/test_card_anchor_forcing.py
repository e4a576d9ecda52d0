"""What must hold for Anchor Forcing (arXiv 2603.13405): sink, junction and window, each at its own positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import evenflow as ef
from evenflow.recipes.reference import anchor_forcing, longlive, rotated, self_forcing
from evenflow.recipes.reference.longlive import Recache

from .drive import random_calls, worst
from .switching import Network, content, joined, play, random_recache

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def build(*, layers=2, kv_heads=2, **params):
    memory = ef.recipe("anchor-forcing", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=torch.float64)


def tags(segment, frames=CHUNK):
    return {"coordinates": GRID.repeat(frames, 1), "segment": torch.full((frames * FRAME,), segment)}


def chunks(count, segment=0, *, frames=CHUNK, **changes):
    return random_calls([frames * FRAME] * count, tags=[tags(segment, frames)] * count, **changes)


def again(frames, segment=0, **changes):
    return random_recache(frames, FRAME, tags=[tags(segment, frames)], **changes)


def switching(total, switches, *, recache=True, tentative=1, frames=CHUNK, **changes):
    """`total` chunks; a switch asked for at a frame takes effect with the next chunk, window anew before it."""
    parts, segment = [], 0
    for t in range(total):
        f = t * frames
        if any(f - frames < switch <= f for switch in switches):
            segment += 1
            if recache:
                parts.append(again(min(12, f), segment, seed=1000 + t, **changes))
        parts.append(chunks(1, segment, frames=frames, tentative=tentative, seed=t, **changes))
    return joined(*parts)


def attended(script, **params):
    """For each call the frames that its queries attend, each as often as its keys are there: by values that say which.

    Keys are zero, so that every one gets the same attention.
    """
    frames = sum(call.q.shape[1] for call in script[0] if call.commit and not isinstance(call, Recache)) // FRAME
    memory = ef.recipe("anchor-forcing", **{"frame": FRAME, **params})
    state = memory.build(layers=1, heads=1, head_dim=12, value_dim=frames, rope=ROPE, dtype=torch.float64)
    said, done = [], 0
    for call in script[0]:
        m = call.q.shape[1]
        start = done - m // FRAME if isinstance(call, Recache) else done
        v = torch.eye(frames, dtype=torch.float64)[start : start + m // FRAME].repeat_interleave(FRAME, 0)
        zero = torch.zeros(1, 1, m, 12, dtype=torch.float64)
        recache = isinstance(call, Recache)
        step = state.recache(m, tags=call.tags) if recache else state.step(m, tags=call.tags, commit=call.commit)
        with step:
            out = state.attend(0, zero, zero, v[None, None])[0, 0, -1]
        share = out / out[out > 0].min()
        assert torch.allclose(share, share.round())
        said.append([t for t, times in enumerate(share.round().int().tolist()) for _ in range(times)])
        if call.commit and not isinstance(call, Recache):
            done += m // FRAME
    return said


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("params", [{}, {"rope_enhance": False}, {"junction": 0}, {"junction": 2, "trained": 30}])
@pytest.mark.parametrize("switches", [(), (12, 40), (4, 8, 12, 25, 26, 48)])
def test_any_calls_with_switches_equal_the_reference(switches, params, kv_heads):
    calls = switching(20, switches, kv_heads=kv_heads)
    theirs = anchor_forcing.reference(calls, ROPE, frame=FRAME, **params)
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_chunks_of_other_lengths_equal_the_reference(frames):
    """A chunk shorter than a junction makes a short junction, a longer one gives its first frames."""
    calls = switching(30, (7, 12, 24, 28), frames=frames, recache=False)
    theirs = anchor_forcing.reference(calls, ROPE, frame=FRAME)
    assert worst(play(build(), calls), theirs) < 1e-10


def test_frames_of_one_token_equal_the_reference():
    script = random_calls([3] * 24, tags=[{"segment": torch.full((3,), int(t >= 5) + int(t >= 14))} for t in range(24)])
    theirs = anchor_forcing.reference(script, ef.Rope(), frame=1, window=13, sink=3, trained=21)
    memory = ef.recipe("anchor-forcing", window=13, frame=1)
    state = memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, dtype=torch.float64)
    assert worst(play(state, script), theirs) < 1e-10


def test_the_first_prompt_may_have_any_number():
    """Its first chunk is in the sinks, and no junction."""
    outputs = [play(build(), joined(chunks(6, segment), chunks(6, 9, seed=1))) for segment in (0, 5)]
    assert worst(*outputs) == 0


@settings(max_examples=40)
@given(
    some.lists(some.tuples(some.sampled_from(["chunk", "noise", "switch", "anew"]), some.integers(1, 4)), max_size=14),
    some.sampled_from([(12, 3, 3), (5, 1, 2), (4, 0, 1), (6, 2, 3)]),
    some.booleans(),
)
def test_any_order_of_chunks_and_switches_equals_the_reference(events, sizes, rope_enhance):
    window, sink, junction = sizes
    parts, segment, done = [chunks(1, frames=1)], 0, 1
    for n, (what, frames) in enumerate(events):
        frames = min(frames, window - sink)
        if what == "anew":
            parts.append(again(min(window, done), segment, seed=n))
            continue
        segment += what == "switch"
        parts.append(chunks(1, segment, frames=frames, tentative=int(what == "noise"), seed=n))
        done += frames
    calls = joined(*parts)
    params = {"window": window, "sink": sink, "junction": junction, "rope_enhance": rope_enhance}
    theirs = anchor_forcing.reference(calls, ROPE, frame=FRAME, **params)
    assert worst(play(build(**params), calls), theirs) < 1e-10


def test_point_1_without_a_junction_it_starts_as_the_base():
    calls = chunks(4, tentative=1)
    base = self_forcing.reference(calls, ROPE, frame=FRAME, window=None)
    assert worst(play(build(), calls), base) < 1e-10
    assert worst(longlive.reference(calls, ROPE, frame=FRAME), base) < 1e-10


def test_point_2_positions_stay_within_the_trained_range():
    for total in range(3, 300, 3):
        sink, local = [(t, None) for t in range(min(total, 3))], [(t, None) for t in range(max(total - 9, 3), total)]
        placed = anchor_forcing.regions(sink, [(t, None) for t in range(3)], local, total, 21 - 12 - 3, 21)
        positions = [p for p, _ in placed]
        assert positions[: len(sink)] == list(range(len(sink)))
        assert positions[len(sink) : len(sink) + 3] == [6, 7, 8]
        if total >= 21:
            assert positions[6:] == list(range(12, 21))
        assert all(0 <= p <= 20 for p in positions)


def test_point_2_the_origin_does_not_matter():
    calls = switching(20, (12, 40))
    near = build()
    play(near, calls)
    rest = chunks(3, 2, seed=50, tentative=1)
    expected = play(near.fork(), rest)
    far = near.fork()
    far.seek(far.position + 10**9 * FRAME)
    assert worst(play(far, rest), expected) == 0


def test_point_3_the_frames_attended_at_each_chunk():
    """Switches at 40 and 80 take effect at 42 and 81; a junction shows when the window has lost its chunk, at 51 and 90."""
    script = switching(36, (40, 80), layers=1, heads=1, kv_heads=1)
    said = attended(script)
    done = 0
    for call, frames in zip(script[0], said, strict=True):
        f = done if not isinstance(call, Recache) else done - 3  # ends where the chunk before it ended
        local = list(range(max(f - 6, 3), f + 3))
        junction = [] if f < 51 else [42, 43, 44] if f < 90 else [81, 82, 83]
        assert frames == sorted([0, 1, 2][: f + 3] + junction + local), f
        done += 3 if call.commit and not isinstance(call, Recache) else 0


def test_point_3_nothing_is_attended_twice():
    """Three switches within a window: the newest junction that has left it is in use, never one that is still inside."""
    for switches in [(12, 18, 24, 27, 30), (3, 6, 9), (21, 24, 36)]:
        for frames in attended(switching(24, switches, layers=1, heads=1, kv_heads=1)):
            assert len(frames) == len(set(frames))


def test_point_4_a_junction_is_what_the_clean_pass_of_its_chunk_was():
    state, calls = build(), switching(14, (40,))
    play(state, calls)
    assert state.position == 42 * FRAME
    clean = chunks(1, 1, seed=99, tentative=3)
    play(state, clean)
    slots = slice(3 * FRAME, 6 * FRAME)
    for layer, script in enumerate(clean):
        assert torch.equal(content(state)[f"layers.{layer}.keys"][0, :, slots], script[-1].k)
        assert torch.equal(content(state)[f"layers.{layer}.values"][0, :, slots], script[-1].v)
    kept = content(state)
    play(state, chunks(30, 1, seed=5, tentative=1))
    assert all(torch.equal(content(state)[name][:, :, slots], tensor[:, :, slots]) for name, tensor in kept.items())
    assert state.held(0)[: 6 * FRAME] == [*range(3 * FRAME), *range(42 * FRAME, 45 * FRAME)]


def test_point_5_a_recache_leaves_sink_and_junctions_as_they_are():
    state = build()
    play(state, switching(19, (30, 51)))
    assert state.position == 57 * FRAME
    before = content(state)
    play(state, again(12, 3, seed=7))
    for name, tensor in content(state).items():
        assert torch.equal(tensor[:, :, : 9 * FRAME], before[name][:, :, : 9 * FRAME])
        assert not torch.equal(tensor[:, :, 9 * FRAME :], before[name][:, :, 9 * FRAME :])


def test_point_5_the_window_is_one_clean_pass_that_reads_the_anchors():
    """Deeper keys tell whether the pass has seen the junction; a small network, as only there keys depend on it."""
    net, latents = Network(), Network().latents(60 * FRAME)

    def stream(prompt):
        """A switch at 30 (the prompt in question), another one at 60, where the window is computed anew."""
        state = build(junction=3)
        for f in range(0, 60, CHUNK):
            x, segment = latents[f * FRAME : (f + CHUNK) * FRAME], int(f >= 30)
            net(state, x, net.prompt(prompt if f == 30 else 0), tags=tags(segment))
        net(state, latents[48 * FRAME :], net.prompt(9), recache=True, tags=tags(2, 12))
        return content(state)

    a, b = stream(1), stream(2)
    window = slice(9 * FRAME, 18 * FRAME)
    for kind in ("keys", "values"):
        assert torch.equal(a[f"layers.0.{kind}"][:, :, window], b[f"layers.0.{kind}"][:, :, window])
        assert not torch.equal(a[f"layers.1.{kind}"][:, :, window], b[f"layers.1.{kind}"][:, :, window])


def test_point_6_without_junctions_at_absolute_positions_it_is_longlive():
    calls = switching(20, (12, 40))
    ours = play(build(junction=0, rope_enhance=False), calls)
    assert worst(ours, longlive.reference(calls, ROPE, frame=FRAME)) < 1e-10
    bounded = play(build(junction=0), calls)
    assert worst([layer[:8] for layer in bounded], [layer[:8] for layer in ours]) < 1e-10  # while positions agree
    assert worst(bounded, ours) > 1e-3


def test_point_7_memory_is_flat_and_no_more_than_15_frames_are_attended():
    state, sizes = build(), []
    script = switching(60, range(20, 170, 20))
    for t, call in enumerate(script[0]):
        play(state, [layer[t : t + 1] for layer in script])
        if call.commit:
            sizes.append(state.nbytes)
    assert len(set(sizes[5:])) == 1
    assert len(state.held(0)) == (12 + 6) * FRAME
    said = attended(switching(60, range(20, 170, 20), layers=1, heads=1, kv_heads=1))
    assert max(map(len, said)) == 15


def test_point_8_only_distances_between_regions_matter():
    calls = switching(24, (12,))
    outputs = {}
    for trained, junction in ((21, 3), (25, 3), (30, 3)):  # a wider range moves window and junction away from the sinks
        outputs[trained] = play(build(trained=trained, junction=junction), calls)[0][-1]
    assert (outputs[21] - outputs[25]).abs().max() > 1e-4
    q, k = torch.randn(2, 1, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = torch.tensor([[0, 0, 0], [6, 0, 0], [7, 1, 0], [12, 0, 1], [20, 1, 1]])
    moved = places + torch.tensor([37, 0, 0])
    scores = [rotated(q, where, ROPE) @ rotated(k, where, ROPE).transpose(-1, -2) for where in (places, moved)]
    assert (scores[0] - scores[1]).abs().max() < 1e-12


def test_a_switch_in_one_row_of_a_batch_is_not_one_in_the_other():
    memory = ef.recipe("anchor-forcing", frame=FRAME)
    both = memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64, batch=2)
    first, second = (switching(20, at, recache=False, tentative=0) for at in ((12, 36), (24,)))
    theirs = [anchor_forcing.reference(script, ROPE, frame=FRAME) for script in (first, second)]
    for t in range(20):
        pair = {name: torch.stack([s[0][t].tags[name] for s in (first, second)]) for name in first[0][t].tags}
        with both.step(CHUNK * FRAME, tags=pair):
            for layer in range(2):
                q, k, v = (torch.stack([getattr(s[layer][t], x) for s in (first, second)]) for x in "qkv")
                out = both.attend(layer, q, k, v)
                assert max(float((out[row] - theirs[row][layer][t]).abs().max()) for row in range(2)) < 1e-10


def test_a_row_that_brings_nothing_keeps_its_junctions():
    """One row waits while the other one begins a prompt; then it goes on where it was."""
    memory = ef.recipe("anchor-forcing", frame=FRAME)
    both = memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64, batch=2)
    script = switching(20, (12, 36), recache=False, tentative=0)
    theirs = anchor_forcing.reference(script, ROPE, frame=FRAME)
    at = [0, 0]
    for t in range(30):
        goes = [at[0] < 20, at[1] < 20 and t % 3 != 1]
        rows = [min(n, 19) for n in at]
        pair = {name: torch.stack([script[0][n].tags[name] for n in rows]) for name in script[0][0].tags}
        mask = torch.tensor(goes)[:, None].expand(2, CHUNK * FRAME)
        with both.step(CHUNK * FRAME, tags=pair, mask=mask):
            for layer in range(2):
                q, k, v = (torch.stack([getattr(script[layer][n], x) for n in rows]) for x in "qkv")
                out = both.attend(layer, q, k, v)
                for row, real in enumerate(goes):
                    assert not real or (out[row] - theirs[layer][at[row]]).abs().max() < 1e-10
        at = [n + real for n, real in zip(at, goes, strict=True)]
    assert at == [20, 20]


def test_a_fork_and_a_saved_state_go_on_the_same():
    state = build()
    play(state, switching(20, (12, 40)))
    loaded = build()
    loaded.load_state_dict(state.state_dict())
    rest = joined(again(12, 3, seed=3), chunks(8, 3, seed=4, tentative=1))
    expected = play(state.fork(), rest)
    assert worst(play(loaded, rest), expected) == worst(play(state, rest), expected) == 0


def test_regions_that_do_not_fit_are_refused():
    for wrong in ({"window": 3}, {"window": 30}, {"junction": -1}, {"junction": 9}):
        with pytest.raises(ValueError, match=r"larger|junction is"):
            ef.recipe("anchor-forcing", **wrong)
