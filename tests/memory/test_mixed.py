"""Layers with windows, states, or both: each is what it is alone, and all are undone, copied and saved together."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.memory.delta import Delta, gated_delta, short_convolution
from evenflow.memory.fast_weights import FastState, FastWeights, feed
from evenflow.memory.mixed import Mixed

from ..recipes.cases import CASES

LAYERS, HEADS, KV, DIM, VALUE, CHUNK = 4, 4, 2, 6, 6, 5
GEOMETRY = {"layers": LAYERS, "heads": HEADS, "kv_heads": KV, "head_dim": DIM, "dtype": torch.float64}
WINDOW = ef.recipe("streaming-llm", sink=2, window=7)
PLAIN, FULL = ef.recipe("window", window=4), ef.recipe("full")
INFINITE = Mixed(pattern=((WINDOW,), (Delta(),), (Delta(),), (Delta(),)))
SPATIAL = Mixed(pattern=((WINDOW, FastWeights(CHUNK)), (FULL,)))


def drawn(made, *shape):
    return torch.randn(*shape, generator=made, dtype=torch.float64)


def first(layer):
    made = torch.Generator().manual_seed(layer)
    return tuple(drawn(made, 2, *shape) / 3 for shape in ((8, DIM), (DIM, 8), (8, DIM)))


def tokens(count, seed=0):
    """For every layer: q, k, v of attention; q, k, v of a state; beta, g; rates, momenta; inputs of the convolution."""
    made, out = torch.Generator().manual_seed(seed), []
    for _ in range(LAYERS):
        near = [drawn(made, 1, heads, count, DIM) for heads in (HEADS, KV, KV)]
        far = [drawn(made, 1, HEADS, count, DIM) / 3 for _ in range(3)]
        fast = [drawn(made, 1, 2, count, DIM) for _ in range(3)]
        gates = {"beta": drawn(made, 1, HEADS, count).sigmoid(), "g": -drawn(made, 1, HEADS, count).exp()}
        steps = {"rates": 0.1 * drawn(made, 1, 2, count, 3).exp(), "momenta": drawn(made, 1, 2, count).sigmoid()}
        out.append((near, far, fast, gates, steps, drawn(made, 1, count, HEADS * 3 * DIM)))
    return out


def part(stream, a, b):
    """Tokens a to b − 1."""
    return [
        (
            *([x[:, :, a:b] for x in group] for group in layer[:3]),
            *({k: x[:, :, a:b] for k, x in group.items()} for group in layer[3:5]),
            layer[5][:, a:b],
        )
        for layer in stream
    ]


KERNEL = drawn(torch.Generator().manual_seed(5), HEADS * 3 * DIM, 4)


def take(state, given, commit=True):
    """A step; what every layer reads."""
    out = {}
    with state.step(given[0][0][0].shape[2], commit=commit) as step:
        for layer, (near, far, fast, gates, steps, x) in enumerate(given):
            if layer in state.places:
                out["near", layer] = step.attend(layer, *near)
            if isinstance(state.rules.get(layer), Delta):
                out["x", layer] = step.convolve(layer, x, KERNEL).movedim(1, 2)
                out["far", layer] = step.fold(layer, *far, **gates)
            elif layer in state.rules:
                out["far", layer] = step.fold(layer, *fast, **steps)
    return out


def run(state, stream, sizes):
    at, outs = 0, []
    for size in sizes:
        outs.append(take(state, part(stream, at, at + size)))
        at += size
    return {key: torch.cat([out[key] for out in outs], 2) for key in outs[0]}


def built(mixed, **more):
    weights = {layer: first(layer) for layer in range(LAYERS)}
    return mixed.build(**GEOMETRY, first=weights, **more)


def flat(state):
    return {name: x for name, x in state.state_dict().items() if isinstance(x, torch.Tensor)}


def same(one, other):
    a, b = flat(one), flat(other)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


cuts = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(cuts)
@settings(max_examples=12, deadline=None)
def test_every_part_is_what_it_is_alone_in_any_cut(sizes):
    count = sum(sizes)
    stream = tokens(count)
    out = run(built(INFINITE), stream, sizes)
    near, (_, far, _, gates, _, x) = stream[0][0], stream[2]
    alone = WINDOW.build(**{**GEOMETRY, "layers": 1})
    with alone.step(count):
        close(out["near", 0], alone.attend(0, *near))
    close(out["far", 2], gated_delta(*far, gates["beta"], gates["g"])[0])
    close(out["x", 2].movedim(1, 2), short_convolution(x, KERNEL, x.new_zeros(1, 3, x.shape[2]))[0])
    out = run(built(SPATIAL), stream, sizes)
    _, _, fast, _, steps, _ = stream[2]
    close(out["far", 2], feed(FastWeights(CHUNK), FastState.begin(first(2), 1), *fast, **steps)[0])
    whole = FULL.build(**{**GEOMETRY, "layers": 1})
    with whole.step(count):
        close(out["near", 3], whole.attend(0, *stream[3][0]))


@pytest.mark.parametrize("mixed", [INFINITE, SPATIAL], ids=["delta", "fast"])
@given(sizes=cuts, undo=st.integers(0, 9), data=st.data())
@settings(max_examples=15, deadline=None)
def test_what_is_undone_never_came(mixed, sizes, undo, data):
    count = sum(sizes)
    n = data.draw(st.integers(0, count))
    stream, state, witness = tokens(count), built(mixed, undo=undo), built(mixed)
    run(state, stream, sizes)
    before = state.fork()
    try:
        state.truncate(n)
    except ValueError as error:
        assert "larger undo" in str(error) and n > undo and same(state, before)
        return
    left, kept = count - n, []
    for size in sizes:
        kept += [min(size, left - sum(kept))] if sum(kept) < left else []
    if kept:
        run(witness, stream, kept)
    assert same(state, witness) and state.position == left
    future = tokens(3, seed=9)
    ours, theirs = take(state, future), take(witness, future)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    state.truncate(min(undo, 3))  # and it undoes again after it has undone
    assert state.position == left + 3 - min(undo, 3)


@pytest.mark.parametrize("mixed", [INFINITE, SPATIAL], ids=["delta", "fast"])
def test_saved_forked_questioned_and_forgotten(mixed):
    stream, state = tokens(40), built(mixed, undo=4)
    run(state, stream, [9, 1, 12])
    before = copy.deepcopy(flat(state))
    take(state, part(stream, 22, 30), commit=False)
    twin = state.fork()
    take(twin, part(stream, 30, 35))
    assert all(torch.equal(x, flat(state)[name]) for name, x in before.items()), "neither leaves a trace"
    loaded = built(mixed)
    loaded.load_state_dict(state.state_dict())
    a, b = take(state, part(stream, 22, 40)), take(loaded, part(stream, 22, 40))
    assert all(torch.equal(a[key], b[key]) for key in a) and same(state, loaded)
    state.reset()
    assert state.position == 0 and same(state, built(mixed))


def test_bytes_are_bounded():
    mixed = Mixed(pattern=((WINDOW, FastWeights(CHUNK)), (Delta(),)))
    state, sizes = built(mixed, undo=3), []
    for n in range(60):
        take(state, tokens(1, seed=n))
        sizes.append(state.nbytes)
    assert max(sizes[:30]) == max(sizes[30:])


FIT = [
    "streaming-llm",
    "window",
    "full",
    "learned-sink",
    "infinite-vggt",
    "dvgt2",
    "hybrid-forcing",
    "self-forcing",
    "temp-cache",
]


@pytest.mark.parametrize("name", FIT)
def test_a_state_goes_with_any_recipe(name):
    """The window's answers are those it gives alone, the state's those it gives alone."""
    case = CASES[name]
    window = ef.recipe(name, **case.params)
    like = {
        **GEOMETRY,
        **case.geometry,
        "rope": ef.Rope.axial((2, 2, 2)) if case.rope is not None and case.rope.axes else case.rope,
    }
    if window.null == "learned":
        like["sink_logits"] = torch.zeros(LAYERS, HEADS)
    mixed = Mixed(pattern=((window, Delta()), (window,))).build(**like)
    logits = {"sink_logits": like["sink_logits"][::1]} if "sink_logits" in like else {}
    alone = window.build(**{**like, **logits})
    for n in range(6):
        stream = tokens(case.step, seed=n)
        tags = None if case.tags is None else case.tags(n * case.step, case.step)
        with mixed.step(case.step, tags) as step, alone.step(case.step, tags):
            for layer, (near, far, _, gates, _, _) in enumerate(stream):
                assert torch.equal(step.attend(layer, *near), alone.attend(layer, *near))
                if layer in mixed.rules:
                    step.fold(layer, *far, **gates)
    assert mixed.held(1) == alone.held(1) and mixed.position == alone.position


def test_what_is_refused():
    with pytest.raises(ValueError, match="a memory, a rule, or one of each"):
        Mixed(pattern=((WINDOW, PLAIN),))
    with pytest.raises(TypeError, match="a part is a `Memory`, or a rule"):
        Mixed(pattern=((WINDOW, "delta"),))
    with pytest.raises(ValueError, match="no layer keeps keys"):
        Mixed(pattern=((Delta(),),))
    with pytest.raises(ValueError, match="fewer than a pattern"):
        Mixed(pattern=((Delta(),), (WINDOW,))).build(**{**GEOMETRY, "layers": 1})
    with pytest.raises(ValueError, match="give `first`"):
        SPATIAL.build(**GEOMETRY)
    state, stream = built(INFINITE, undo=2), tokens(3)
    for _ in range(2):
        take(state, stream)
    before = state.fork()
    with pytest.raises(ValueError, match="nothing to attend with"), state.step(3) as step:
        step.attend(1, *stream[1][0])
    with pytest.raises(RuntimeError, match=r"before layers \[0, 1, 2, 3\]"), state.step(3):
        pass
    stream[3][3]["g"][..., 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        take(state, stream)
    with pytest.raises(ValueError, match="larger undo"):
        state.truncate(4)
    broken = state.state_dict()
    broken["states.1.matrix"] = broken["states.1.matrix"][:, :1]
    with pytest.raises(ValueError, match=r"matrix is torch.float64 \(1, 1"):
        state.load_state_dict(broken)
    assert same(state, before)
