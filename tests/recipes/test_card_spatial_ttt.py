"""What must hold for Spatial-TTT (arXiv 2603.12255): fast weights beside a window, learned one chunk at a time."""

import time
from dataclasses import replace

import pytest
import torch

from evenflow.memory.fast_weights import (
    STEPS,
    FastSession,
    FastState,
    FastWeights,
    ascent,
    feed,
    flushed,
    frame_convolution,
    read,
)
from evenflow.memory.orthogonal import orthogonal
from evenflow.models.hybrid import PRESETS, FastLayer, Windowed, in_a_row
from evenflow.recipes.reference import infinite_vl, spatial_ttt
from evenflow.recipes.reference.plain import rotated

HEADS, DIM, CHUNK = 2, 32, 8
LENGTH = 5 * CHUNK + 3


def first(seed=0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(HEADS, DIM, DIM, generator=made) / DIM**0.5).to(dtype) for _ in range(3))


def tokens(count=LENGTH, seed=0, dtype=torch.float32, rate=0.05):
    """q and k of length 1, v, rates and momenta, as a layer makes them."""
    made = torch.Generator().manual_seed(seed)
    q, k, v, rates, momenta = (torch.randn(1, HEADS, count, n, generator=made) for n in (DIM, DIM, DIM, 3, 1))
    q, k, v = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k, v))
    return [x.to(dtype) for x in (q, k, v, rate * rates.exp(), momenta[..., 0].sigmoid())]


def streamed(rule, stream, size):
    session, out = FastSession(rule, first(dtype=stream[0].dtype)), []
    for piece in zip(*(x.split(size, 2) for x in stream), strict=True):
        out.append(session.feed(*piece))
    return torch.cat(out, 2), session


def block_causal(rule, stream):
    """All at once, chunk by chunk: apply, then update; the last piece is never learned."""
    state, out = FastState.begin(first(dtype=stream[0].dtype), 1), []
    for start in range(0, stream[0].shape[2], rule.chunk):
        part = [x[:, :, start : start + rule.chunk] for x in stream]
        y, state = feed(rule, state, *part)
        out.append(y)
    return torch.cat(out, 2), state


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("size", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, LENGTH])
def test_point_1_any_split_is_the_block_causal_computation(size, prenorm):
    rule, stream = FastWeights(CHUNK, prenorm=prenorm), tokens()
    out, session = streamed(rule, stream, size)
    expected, state = block_causal(rule, stream)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for name in ("weights", "main", "momentum"):
        for ours, theirs in zip(getattr(session.state, name), getattr(state, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(session.state.joined(), state.joined(), strict=True))
    for head in range(HEADS):
        oracle = spatial_ttt.Memory([w[head].double() for w in first()], CHUNK, prenorm)
        theirs = oracle.feed(*(x[0, head].double() for x in stream))
        torch.testing.assert_close(out[0, head].double(), theirs, rtol=0, atol=1e-5)


def test_point_2_the_step_is_the_gradient_of_the_objective():
    _, k, v, rates, _ = tokens(CHUNK, dtype=torch.float64)
    weights = FastState.begin(first(dtype=torch.float64), 1).weights
    ours = ascent(weights, k, v, rates)
    for number in range(3):
        own = [w.clone().requires_grad_() for w in weights]
        aim = (rates[..., number] * (read(tuple(own), k) * v).sum(-1)).sum()
        theirs = torch.autograd.grad(aim, own[number])[0]
        assert float((ours[number] - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_point_2_steps_are_made_orthogonal(shape):
    """Where no direction is less than a twentieth of the largest: five iterations lift nothing from nothing."""
    made = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, generator=made), full_matrices=False)
    sizes = torch.linspace(0.05, 1, min(shape))
    values = torch.linalg.svdvals(orthogonal((u * sizes) @ v, STEPS).float())
    assert values.min() > 0.9 and values.max() < 1.1
    assert torch.linalg.svdvals(orthogonal(u[..., :1] @ v[:, :1], STEPS).float()).max() < 1.1


def test_point_3_tokens_of_a_chunk_never_read_each_other_nor_what_comes_later():
    rule, stream = FastWeights(CHUNK), tokens(3 * CHUNK + 1)
    expected, _ = streamed(rule, stream, 5)
    for changed in range(3 * CHUNK + 1):
        other = [x.clone() for x in stream]
        for x in other[1:]:
            x[:, :, changed] *= 1.7
        out, _ = streamed(rule, other, 5)
        felt = (out != expected).any(-1)[0].any(0)
        after = (changed // CHUNK + 1) * CHUNK
        assert not felt[:after].any() and felt[after:].all()


def test_point_3_layers_of_convolution_see_as_many_frames_ahead():
    x, layers = torch.randn(1, 8, 2, 2, 3, generator=torch.Generator().manual_seed(0)), 3
    weights = torch.randn(layers, 3, 3, 3, 3, generator=torch.Generator().manual_seed(1))

    def through(x):
        for weight in weights:
            y, tail = frame_convolution(x, weight)
            x = torch.cat([y, flushed(weight, tail)], 1)
        return x

    expected = through(x)
    for changed in range(8):
        other = x.clone()
        other[:, changed] += 1
        felt = (through(other) != expected).flatten(2).any(2)[0].nonzero()[:, 0].tolist()
        assert felt == [t for t in range(8) if abs(t - changed) <= layers]


def test_point_4_the_convolution_begins_as_the_identity_and_without_a_rate_nothing_is_learned():
    x, identity = torch.randn(2, 4, 3, 2, 5), torch.zeros(5, 3, 3, 3)
    identity[:, 1, 1, 1] = 1
    y, tail = frame_convolution(x, identity)
    assert torch.equal(torch.cat([y, flushed(identity, tail)], 1), x)
    stream = tokens(rate=0.0)
    out, session = streamed(FastWeights(CHUNK), stream, 7)
    expected = read(FastState.begin(first(), 1).weights, stream[0])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    for now, then in zip(session.state.weights, first(), strict=True):
        torch.testing.assert_close(now[0], then, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_point_5_rows_keep_their_first_length(prenorm, muon):
    _, session = streamed(FastWeights(CHUNK, muon=muon, prenorm=prenorm), tokens(40 * CHUNK), 50)
    for now, then in zip(session.state.weights, first(), strict=True):
        torch.testing.assert_close(now[0].norm(dim=-1), then.norm(dim=-1), rtol=5e-5, atol=1e-5)
        assert not torch.equal(now[0], then)


def test_point_7_bytes_and_time_of_a_chunk_stay_the_same():
    stream = tokens(CHUNK)
    old, sizes = FastSession(FastWeights(CHUNK), first()), []
    for _ in range(300):
        old.feed(*stream)
        sizes.append(old.nbytes)
    young = FastSession(FastWeights(CHUNK), first())
    for _ in range(3):
        young.feed(*stream)
    assert len(set(sizes[2:])) == 1 and sizes[-1] == young.nbytes
    took = {old: [], young: []}
    for _ in range(60):
        for session in (old, young):
            start = time.perf_counter()
            session.feed(*stream)
            took[session].append(time.perf_counter() - start)
    assert min(took[old]) < 1.1 * min(took[young])


def test_pitfall_what_waits_after_a_long_call_is_the_true_remainder():
    """The released stream hands on the last chunk whole, some of it learned already."""
    for count in (LENGTH, 5 * CHUNK):
        _, session = streamed(FastWeights(CHUNK), tokens(count), count)
        assert session.state.waiting == (count % CHUNK or CHUNK)
        assert torch.equal(session.state.joined()[0], tokens(count)[1][:, :, -session.state.waiting :])


def test_pitfall_a_last_chunk_is_learned_when_a_token_follows():
    session = FastSession(FastWeights(CHUNK), first())
    session.feed(*tokens(CHUNK))
    assert all(torch.equal(now[0], then) for now, then in zip(session.state.weights, first(), strict=True))
    session.feed(*tokens(1, seed=1))
    assert session.state.waiting == 1
    assert not any(torch.equal(now[0], then) for now, then in zip(session.state.weights, first(), strict=True))


def test_pitfall_momentum_is_what_was_before_the_step_was_made_orthogonal():
    stream = tokens(2 * CHUNK + 1)
    _, plain = streamed(FastWeights(CHUNK), [x[:, :, : CHUNK + 1] for x in stream], 100)
    _, muon = streamed(FastWeights(CHUNK, muon=True), [x[:, :, : CHUNK + 1] for x in stream], 100)
    for a, b, c in zip(plain.state.momentum, muon.state.momentum, muon.state.weights, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_pitfall_a_single_image_is_repeated_in_time():
    x, weight = torch.randn(1, 1, 3, 3, 2).double(), torch.randn(2, 3, 3, 3).double()
    y, tail = frame_convolution(x, weight)
    assert y.shape[1] == 0
    expected = spatial_ttt.convolved(x[0].expand(3, -1, -1, -1), weight)[1]
    torch.testing.assert_close(flushed(weight, tail)[0, 0], expected, rtol=0, atol=1e-12)


# -- the layer: window attention, and fast weights beside it ------------------------------------------------------------

SMALL = replace(PRESETS["toy"], window=5)


def layer_of(open_gate=True):
    torch.manual_seed(3)
    layer = FastLayer(SMALL, fast_heads=2, rule=FastWeights(CHUNK), rate=0.05).double()
    if open_gate:
        torch.nn.init.normal_(layer.gate.weight)
    return layer


def hidden(count=LENGTH, seed=0):
    return torch.randn(1, count, SMALL.dim, generator=torch.Generator().manual_seed(seed)).double()


def run(layer, h, config=SMALL, grid=None):
    windowed = Windowed(config, in_a_row(0, h.shape[1]), torch.float64)
    return layer(h, lambda q, k, v: windowed(0, q, k, v), windowed.turn, grid=grid)


@torch.no_grad()
def plain(layer, h, window):
    """The layer without its memory, one query at a time."""
    heads, dim = [SMALL.heads, SMALL.kv_heads, SMALL.kv_heads], SMALL.head_dim
    q, k, v = layer.qkv(h)[0].unflatten(-1, (sum(heads), dim)).transpose(0, 1).split(heads)
    places = torch.arange(h.shape[1])[:, None].expand(-1, 4)
    seen = infinite_vl.window_attention(layer.q_norm(q), layer.k_norm(k), v, places, SMALL.rope, window)
    return layer.out(seen.transpose(0, 1).flatten(1))


@torch.no_grad()
def test_point_4_with_a_gate_of_nothing_a_layer_is_window_attention():
    layer, h = layer_of(open_gate=False), hidden()
    out, _ = run(layer, h)
    torch.testing.assert_close(out[0], plain(layer, h, 5), rtol=0, atol=1e-10)
    torch.nn.init.normal_(layer.gate.weight)
    assert not torch.allclose(run(layer, h)[0], out)


@torch.no_grad()
def test_point_6_a_window_as_long_as_the_stream_is_full_causal_attention():
    layer, h = layer_of(open_gate=False), hidden()
    out, _ = run(layer, h, replace(SMALL, window=LENGTH))
    torch.testing.assert_close(out[0], plain(layer, h, None), rtol=0, atol=1e-10)


@torch.no_grad()
def test_point_3_a_layer_is_causal():
    layer, h = layer_of(), hidden(20)
    out, _ = run(layer, h)
    for changed in (0, 7, 8, 19):
        other = h.clone()
        other[:, changed] += 1
        felt = (run(layer, other)[0] != out).any(-1)[0]
        assert not felt[:changed].any() and felt[changed]


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (3, 2, 4)])
def test_a_layer_equals_the_reference(grid):
    """Branch by branch, channel by channel, from the layer's own weights."""
    layer, h = layer_of(), hidden(24)
    torch.nn.init.normal_(layer.conv, std=0.3)
    torch.nn.init.normal_(layer.offset)
    out, _ = run(layer, h, grid=grid)
    heads, dim, d = [SMALL.heads, SMALL.kv_heads, SMALL.kv_heads], SMALL.head_dim, 32
    q, k, v = layer.qkv(h)[0].unflatten(-1, (sum(heads), dim)).split(heads, 1)
    q, k = layer.q_norm(q), layer.k_norm(k)
    wide = [torch.cat([x[:, head // (SMALL.heads // x.shape[1])] for head in range(SMALL.heads)], 1) for x in (q, k, v)]
    wide = [wide[0] * layer.scale[0] + layer.offset[0], wide[1] * layer.scale[1] + layer.offset[1], wide[2]]
    if grid is not None:
        shaped = [x.reshape(*grid, -1) for x in wide]
        wide = [spatial_ttt.convolved(x, w).reshape(24, -1) for x, w in zip(shaped, layer.conv, strict=True)]
    wide = [x * x.sigmoid() for x in wide]
    rates = (1 + (layer.rates(h)[0] + torch.tensor(0.05, dtype=torch.float64).expm1().log()).exp()).log()
    momenta, gate = layer.momenta(h)[0].sigmoid(), layer.gate(h)[0]
    places, far = torch.arange(24)[:, None].expand(-1, 4), []
    for head in range(2):
        part = [x[:, head * d : (head + 1) * d] for x in wide]
        turned = []
        for x in part[:2]:
            x = torch.stack([row / (row.norm() + 1e-5) for row in x])
            turned.append(torch.cat([rotated(x[:, :dim], places, SMALL.rope), x[:, dim:]], 1))
        memory = spatial_ttt.Memory([w[head].detach() for w in layer.first], CHUNK)
        o = memory.feed(turned[0], turned[1], part[2], rates[:, 3 * head : 3 * head + 3], momenta[:, head])
        o = torch.stack([row / ((row * row).mean() + SMALL.eps).sqrt() for row in o]) * layer.norm.weight
        far.append(o * (gate[:, head] * gate[:, head].sigmoid())[:, None])
    expected = plain(layer, h, 5) + layer.out(torch.cat(far, 1))
    torch.testing.assert_close(out[0], expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK + 1])
def test_point_1_a_layer_streams_through_a_window_memory(size):
    layer, h = layer_of(), hidden()
    expected, _ = run(layer, h)
    window = SMALL.memory.build(
        layers=1, heads=SMALL.heads, kv_heads=SMALL.kv_heads, head_dim=SMALL.head_dim, rope=SMALL.rope, dtype=h.dtype
    )
    state, out = None, []
    for piece, places in zip(h.split(size, 1), in_a_row(0, LENGTH).split(size), strict=True):
        turn = Windowed(SMALL, places, torch.float64).turn
        with window.step(piece.shape[1], tags={"coordinates": places}):
            y, state = layer(piece, lambda q, k, v: window.attend(0, q, k, v), turn, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-9)
