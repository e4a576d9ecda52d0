"""What must hold for Reward Forcing (arXiv 2512.04678): a sink that averages what leaves the window."""

from dataclasses import replace

import pytest
import torch

import evenflow as ef
from evenflow.memory import Contiguous, Memory, Oldest
from evenflow.recipes.reference import reward_forcing
from evenflow.recipes.reference.self_forcing import Frame

from .drive import play, random_calls, worst
from .switching import content

FRAME, CHUNK = 4, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(CHUNK, 1)


def build(memory=None, *, layers=2, kv_heads=2, dtype=torch.float64, batch=1, **params):
    memory = memory or ef.recipe("reward-forcing", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype, batch=batch)


def chunks(count, chunk=CHUNK, **changes):
    grid = {"coordinates": GRID[:FRAME].repeat(chunk, 1)}
    return random_calls([chunk * FRAME] * count, tags=[grid] * count, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tentative", [0, 2])
@pytest.mark.parametrize("alpha", [0.999, 0.5])
def test_any_calls_equal_the_reference(alpha, tentative, kv_heads):
    calls = chunks(9, tentative=tentative, kv_heads=kv_heads)
    theirs = reward_forcing.reference(calls, ROPE, frame=FRAME, alpha=alpha)
    assert worst(play(build(alpha=alpha, kv_heads=kv_heads), calls), theirs) < 1e-10


@pytest.mark.parametrize(
    ("window", "sink", "chunk"), [(9, 3, 2), (9, 2, 3), (7, 3, 4), (9, 1, 1), (9, 5, 4), (8, 2, 5)]
)
def test_sinks_and_chunks_of_unequal_length_equal_the_reference(window, sink, chunk):
    calls = chunks(8, chunk, tentative=1)
    theirs = reward_forcing.reference(calls, ROPE, frame=FRAME, window=window, sink=sink, alpha=0.7)
    assert worst(play(build(window=window, sink=sink, chunk=chunk, alpha=0.7), calls), theirs) < 1e-10


def test_point_1_alpha_0_is_the_plain_window():
    calls = chunks(10, tentative=1)
    plain = build(ef.recipe("self-forcing", window=9, frame=FRAME))
    assert worst(play(build(alpha=0.0), calls), play(plain, calls)) < 1e-10


def test_point_1_alpha_1_is_a_static_sink_before_a_window_of_six():
    calls = chunks(10, tentative=1)
    static = Memory(
        sink=3, window=6, evict=Oldest(with_fresh=True), place=Contiguous(), frame=FRAME, chunk=3, inside="both"
    )
    assert worst(play(build(alpha=1.0), calls), play(build(static), calls)) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_point_2_the_sink_is_the_closed_form(dtype, limit):
    alpha, count = 0.99, 40
    calls, state = chunks(count), build(alpha=alpha, dtype=dtype)
    play(state, calls)
    folded = count - 3  # the first chunk became the sink, the last two are in the window
    for layer, script in enumerate(calls):
        for name, source in (("keys", "k"), ("values", "v")):
            x = [getattr(call, source).to(dtype).double() for call in script]
            expected = alpha**folded * x[0]
            for i in range(folded):
                expected = expected + (1 - alpha) * alpha ** (folded - 1 - i) * x[1 + i]
            ours = state.state_dict()[f"layers.{layer}.{name}"][0, :, : 3 * FRAME].double()
            error = (ours - expected).abs()
            assert float((error / expected.abs().clamp_min(1)).max()) < limit


def test_point_2_the_average_in_half_precision_moves_although_a_step_is_below_its_resolution():
    state = build(dtype=torch.bfloat16, alpha=0.999, layers=1)
    calls = [[replace(c, k=torch.ones_like(c.k) * (t > 0), v=torch.ones_like(c.v) * (t > 0)) for t, c in
              enumerate(chunks(103, layers=1)[0])]]  # fmt: skip
    play(state, calls)
    sink = state.state_dict()["layers.0.values"][0, :, : 3 * FRAME].double()
    assert float((sink - (1 - 0.999**100)).abs().max()) < 2**-10


def test_point_3_one_average_a_chunk_of_what_the_clean_pass_gave():
    calls, one = chunks(8), build(alpha=0.9)
    play(one, calls)
    for passes in (1, 4):
        many = build(alpha=0.9)
        for t in range(8):
            for attempt in range(passes):
                noisy = chunks(1, seed=100 * t + attempt + 1)
                play(many, [[replace(c, commit=False) for c in layer] for layer in noisy])
            play(many, part(calls, t, t + 1))
        assert all(torch.equal(one.state_dict()[name], x) for name, x in many.state_dict().items())


def test_point_3_queries_see_the_sink_that_has_been_updated():
    """The chunk that pushes out the second one feels a change of it, in its noisy pass already."""
    calls = chunks(4)
    states = [build(alpha=0.5), build(alpha=0.5)]
    moved = [[replace(c, v=c.v + (t == 1)) for t, c in enumerate(layer)] for layer in calls]
    outputs = []
    for state, script in zip(states, (calls, moved), strict=True):
        play(state, part(script, 0, 3))
        outputs.append(play(state, [[replace(c, commit=False) for c in layer] for layer in part(calls, 3)]))
    assert worst(*outputs) > 1e-3


def test_point_4_up_to_nine_frames_it_is_full_attention():
    calls = chunks(3, tentative=1)
    full = build(ef.recipe("self-forcing", window=None, frame=FRAME))
    assert worst(play(build(), calls), play(full, calls)) < 1e-10


def test_point_5_it_holds_nine_frames_for_ever():
    calls, state, sizes = chunks(40), build(), []
    for t in range(40):
        play(state, part(calls, t, t + 1))
        sizes.append(state.nbytes)
        first = max(9, 3 * t + 3) - 6
        window = list(range(first * FRAME, (3 * t + 3) * FRAME))
        sink = list(range(3 * FRAME)) if t < 3 else [-1] * 3 * FRAME
        assert state.held(0) == (sink + window)[: (3 * t + 3) * FRAME]
    assert len(set(sizes[3:])) == 1


def test_point_6_only_what_is_held_matters_not_the_time():
    calls, near = chunks(9, tentative=1), build()
    play(near, part(calls, 0, 10))
    expected = play(near.fork(), part(calls, 10))
    for shift in (3, 3000, 3 * 10**9):
        far = near.fork()
        far.seek(far.position + shift * FRAME)
        assert worst(play(far, part(calls, 10)), expected) < 1e-10


def test_point_9_the_half_life_of_the_sink_is_693_chunks():
    first = Frame(torch.ones(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 0))
    nothing = replace(first, k=0 * first.k, v=0 * first.v)
    sink, chunks = [first], 0
    while float(sink[0].v) > 0.5:
        sink, chunks = reward_forcing.averaged(sink, [(chunks, nothing)], 0.999), chunks + 1
    assert chunks == 693


def test_rows_of_a_batch_of_different_age_average_for_themselves():
    """The second row sits out the first three chunks."""
    calls, state = chunks(9), build(batch=2, alpha=0.8)
    alone = play(build(alpha=0.8), part(calls, 3))
    for t in range(9):
        mask = torch.ones(2, CHUNK * FRAME, dtype=torch.bool)
        mask[1] = t >= 3
        with state.step(CHUNK * FRAME, mask=mask, tags=calls[0][t].tags):
            for layer in range(2):
                call = calls[layer][t]
                out = state.attend(layer, *(x[None].repeat(2, 1, 1, 1) for x in (call.q, call.k, call.v)))
                if t >= 3:
                    assert float((out[1] - alone[layer][t - 3]).abs().max()) < 1e-10
        assert [state.held(0, row)[:1] for row in (0, 1)] == [
            [0 if t < 3 else -1],
            [0] * (3 <= t < 6) or [-1] * (t >= 6),
        ]
    whole = build(alpha=0.8)
    play(whole, calls)
    for name, x in content(whole).items():
        assert torch.allclose(content(state)[name][0], x[0], atol=1e-12)


def test_wrong_parameters_and_steps_are_refused():
    for wrong in ({"sink": 0}, {"window": 3}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ef.recipe("reward-forcing", **wrong)
    state = build()
    with pytest.raises(ValueError, match="shorter steps"):
        play(state, chunks(1, 10))
    assert state.position == 0
