"""What must hold for LongLive (arXiv 2509.22622): frame sinks, a short window, the window anew at a prompt switch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

import evenflow as ef
from evenflow.recipes.reference import longlive, self_forcing

from .drive import random_calls, slower, worst
from .switching import Network, content, joined, play, random_recache

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
BOTH = pytest.mark.parametrize("infinity", [False, True])


def build(*, layers=2, kv_heads=2, **params):
    memory = ef.recipe("longlive", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=torch.float64)


def chunks(count, *, frames=CHUNK, **changes):
    return random_calls([frames * FRAME] * count, tags=places(frames, count), **changes)


def places(frames, count=1):
    return [{"coordinates": GRID.repeat(frames, 1)}] * count


def again(frames, **changes):
    return random_recache(frames, FRAME, tags=places(frames), **changes)


def one(calls, t):
    return [layer[t : t + 1] for layer in calls]


def frames_held(state, layer=0):
    held = state.held(layer)
    assert held == [t * FRAME + n for t in (i // FRAME for i in held[::FRAME]) for n in range(FRAME)]
    return [i // FRAME for i in held[::FRAME]]


@BOTH
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize(("window", "sink"), [(12, 3), (6, 2), (9, 0), (100, 3)])
def test_any_calls_equal_the_reference(window, sink, tentative, kv_heads, infinity):
    calls = chunks(7, tentative=tentative, kv_heads=kv_heads)
    theirs = longlive.reference(calls, ROPE, frame=FRAME, window=window, sink=sink, infinity=infinity)
    ours = play(build(window=window, sink=sink, infinity=infinity, kv_heads=kv_heads), calls)
    assert worst(ours, theirs) < 1e-10


@BOTH
@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("before", [1, 3, 4, 5, 9])
def test_any_calls_with_switches_equal_the_reference(before, global_sink, infinity):
    anew = min(12, 3 * before)
    calls = joined(chunks(before, tentative=1), again(anew, seed=1), chunks(6, seed=2), again(12, seed=3), chunks(3))
    params = {"global_sink": global_sink, "infinity": infinity}
    theirs = longlive.reference(calls, ROPE, frame=FRAME, **params)
    assert worst(play(build(**params), calls), theirs) < 1e-10


EVENTS = some.lists(
    some.tuples(some.integers(1, 12), some.sampled_from(["chunk", "noise", "anew", "anew, other sinks"])),
    min_size=1,
    max_size=7,
)


@BOTH
@settings(max_examples=60)
@given(EVENTS, some.integers(0, 3), some.integers(4, 8))
def test_any_order_of_chunks_and_switches_equals_the_reference(infinity, events, sink, window):
    """Also a recache of less than the window, or of some of the sinks, which then are computed anew.

    What numbers in the buffer are then is not said, so there the window is computed anew as a whole.
    """
    parts, done, first = [], 0, 0
    for n, (frames, what) in enumerate(events):
        if what.startswith("anew"):
            frames, keep_sink = min(window if infinity else frames, done, window), False if "other" in what else None
            start = done - frames
            if not frames or (infinity and keep_sink is None and first < start < first + sink):
                continue
            first = start if keep_sink is False else min(first, start)
            parts.append(again(frames, seed=n, keep_sink=keep_sink))
        else:
            frames = min(frames, window - sink)
            made = chunks(1, frames=frames, seed=n)
            parts.append([[replace(c, commit=what == "chunk") for c in layer] for layer in made])
            done += frames if what == "chunk" else 0
    calls = joined(*parts) if parts else chunks(1)
    params = {"sink": sink, "window": window, "infinity": infinity}
    assert worst(play(build(**params), calls), longlive.reference(calls, ROPE, frame=FRAME, **params)) < 1e-10


@BOTH
def test_point_1_a_stream_within_the_window_is_full_attention(infinity):
    calls = chunks(4, tentative=1)
    theirs = self_forcing.reference(calls, ROPE, frame=FRAME, window=None)
    assert worst(play(build(infinity=infinity), calls), theirs) < 1e-10


@BOTH
def test_point_2_it_attends_three_first_frames_and_nine_last(infinity):
    calls, state = chunks(100, layers=1), build(layers=1, infinity=infinity)
    sizes = []
    for t in range(100):
        play(state, one(calls, t))
        if t == 4:
            young = state.fork()
        f = t * CHUNK
        assert frames_held(state) == sorted({0, 1, 2} | set(range(max(f - 6, 0), f + 3)))
        sizes.append(state.nbytes)
    assert len(set(sizes[4:])) == 1
    play(state, again(12, layers=1))
    assert state.nbytes == sizes[-1]
    assert slower(state, young, one(calls, 0)) < 1.2


@BOTH
def test_point_3_sinks_never_change_after_the_first_chunk(infinity):
    state, first = build(infinity=infinity), {}
    script = [chunks(1, seed=t) for t in range(20)]
    script[10:10] = [again(12, seed=77)]  # computed anew under another prompt: the sinks stay
    for t, calls in enumerate(script):
        play(state, calls)
        sinks = {name: tensor[:, :, : CHUNK * FRAME] for name, tensor in content(state).items()}
        first = first or sinks
        assert all(torch.equal(sinks[name], first[name]) for name in first), t


@pytest.mark.parametrize(("frames", "params"), [(12, {"global_sink": False}), (9, {})])
def test_point_3_a_recache_from_the_start_or_without_global_sink_changes_them(frames, params):
    state = build(**params)
    play(state, chunks(3 if frames == 9 else 8))
    before = content(state)
    play(state, again(frames, seed=1))
    after = content(state)
    assert all(not torch.equal(before[n][:, :, : 3 * FRAME], after[n][:, :, : 3 * FRAME]) for n in before)
    end = state.position // FRAME
    assert frames_held(state) == list(range(end - frames, end))


def test_point_4_the_same_prompt_chunk_by_chunk_reproduces_the_cache():
    """While nothing has left, undoing the stream and feeding it again is the causal way to compute it anew."""
    net, state = Network(), build()
    text, x = net.prompt(0), net.latents(4 * CHUNK * FRAME).split(CHUNK * FRAME)
    tags = places(CHUNK)[0]
    for part in x:
        net(state, part, text, tags=tags)
    joint, before = state.fork(), content(state)
    state.truncate(state.position)
    for part in x:
        net(state, part, text, tags=tags)
    assert all(torch.equal(before[name], tensor) for name, tensor in content(state).items())
    net(joint, torch.cat(x), text, recache=True, tags=places(12)[0])
    differs = {name: float((before[name] - tensor).abs().max()) for name, tensor in content(joint).items()}
    assert differs["layers.0.keys"] == differs["layers.0.values"] == 0  # what no attention has reached yet
    assert min(differs["layers.1.keys"], differs["layers.1.values"]) > 1e-3


def switched(net, old, new, *, first=None, chunks_before=8, **params):
    """A stream under `old` (its first chunk under `first`), then computed anew under `new`: the state."""
    state, x = build(**params), net.latents(chunks_before * CHUNK * FRAME).split(CHUNK * FRAME)
    for t, part in enumerate(x):
        net(state, part, first if t == 0 and first is not None else old, tags=places(CHUNK)[0])
    frames = min(12, chunks_before * CHUNK)
    net(state, torch.cat(x)[-frames * FRAME :], new, recache=True, tags=places(frames)[0])
    return state


@BOTH
@pytest.mark.parametrize("chunks_before", [3, 4, 8])
def test_point_5_without_global_sink_the_old_prompt_is_gone(chunks_before, infinity):
    net = Network()
    a, b = (
        switched(net, net.prompt(old), net.prompt(9), chunks_before=chunks_before, global_sink=False, infinity=infinity)
        for old in (1, 2)
    )
    assert all(torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items())


@BOTH
def test_point_5_with_global_sink_it_acts_through_the_sinks_only(infinity):
    net = Network()
    a, b = (content(switched(net, net.prompt(old), net.prompt(9), infinity=infinity)) for old in (1, 2))
    for name in a:
        assert not torch.equal(a[name][:, :, : 3 * FRAME], b[name][:, :, : 3 * FRAME])
        rest = torch.equal(a[name][:, :, 3 * FRAME :], b[name][:, :, 3 * FRAME :])
        assert rest == name.startswith("layers.0.")  # deeper layers have read the sinks
    a, b = (content(switched(net, net.prompt(old), net.prompt(9), first=net.prompt(0))) for old in (1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_point_5_the_window_is_one_clean_pass_under_the_new_prompt():
    net = Network()
    state = switched(net, net.prompt(1), net.prompt(9), global_sink=False, infinity=True)
    fresh, x = build(infinity=True), net.latents(8 * CHUNK * FRAME)
    net(fresh, x[-12 * FRAME :], net.prompt(9), tags=places(12)[0])
    ours, theirs = content(state), content(fresh)
    assert all((ours[name] - theirs[name][:, :, : 12 * FRAME]).abs().max() < 1e-12 for name in ours)


def test_point_7_nothing_is_stored_before_the_last_layer_has_run():
    state = build()
    play(state, chunks(5))
    before = state.state_dict()
    with pytest.raises(RuntimeError, match="the network failed"), state.step(CHUNK * FRAME, tags=places(CHUNK)[0]):
        call = chunks(1, seed=1)[0][0]
        state.attend(0, call.q[None], call.k[None], call.v[None])
        raise RuntimeError("the network failed")
    after = state.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_point_9_infinity_the_origin_does_not_matter():
    near = build(infinity=True)
    play(near, chunks(5))
    rest = chunks(4, seed=1, tentative=1)
    expected = play(near.fork(), rest)
    for shift in (1, 1024, 10**9):
        far = near.fork()
        far.seek(far.position + shift * FRAME)
        assert worst(play(far, rest), expected) == 0
    absolute = build()
    play(absolute, chunks(5))
    far = absolute.fork()
    far.seek(far.position + 1000 * FRAME)
    assert worst(play(far, rest), play(absolute, rest)) > 1e-3  # sinks further away


def test_point_9_infinity_goes_on_past_1024_frames():
    calls, state = chunks(345, layers=1), build(layers=1, infinity=True)
    ours = play(state, calls)
    assert state.position == 1035 * FRAME
    recent = [[calls[0][0], *calls[0][-4:]]]
    theirs = longlive.reference(recent, ROPE, frame=FRAME, infinity=True)
    assert worst([ours[0][-1:]], [theirs[0][-1:]]) < 1e-10


@BOTH
def test_pitfall_a_second_switch_right_after_the_first(infinity):
    calls = joined(chunks(6), again(12, seed=1), again(12, seed=2), chunks(2, seed=3))
    once = joined(chunks(6), again(12, seed=2), chunks(2, seed=3))
    ours = play(build(infinity=infinity), calls)
    assert worst([layer[-2:] for layer in ours], [layer[-2:] for layer in play(build(infinity=infinity), once)]) == 0


def test_a_recache_of_more_than_there_is_is_refused_and_harms_nothing():
    state, calls = build(), chunks(4)
    play(state, one(calls, 0))
    with pytest.raises(ValueError, match="cannot compute the last"), state.recache(12 * FRAME):
        pass
    assert worst(play(state, one(calls, 1)), [x[1:2] for x in play(build(), calls)]) == 0
    with pytest.raises(ValueError, match="larger"):
        ef.recipe("longlive", window=3)
