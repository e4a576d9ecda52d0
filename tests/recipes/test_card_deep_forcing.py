"""What must hold for Deep Forcing (arXiv 2512.05081): a deep sink that moves along, and participative compression."""

from dataclasses import replace

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import deep_forcing

from .drive import play, random_calls, worst

FRAME, CHUNK = 2, 3
ROPE = ef.Rope.axial((4, 4, 4))
GRID = torch.tensor([[0, 0], [0, 1]])


def build(memory=None, *, layers=2, kv_heads=2, dtype=torch.float64, batch=1, **params):
    memory = memory or ef.recipe("deep-forcing", **{"frame": FRAME, **params})
    return memory.build(layers=layers, heads=4, kv_heads=kv_heads, head_dim=12, rope=ROPE, dtype=dtype, batch=batch)


def chunks(count, chunk=CHUNK, **changes):
    grid = {"coordinates": GRID.repeat(chunk, 1)}
    return random_calls([chunk * FRAME] * count, tags=[grid] * count, **changes)


def part(calls, first, last=None):
    return [layer[first:last] for layer in calls]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("tentative", "fusion"), [(0, "sum"), (2, "sum"), (1, "max")])
def test_any_calls_equal_the_reference(tentative, fusion, kv_heads):
    calls = chunks(14, tentative=tentative, kv_heads=kv_heads)
    theirs = deep_forcing.reference(calls, ROPE, frame=FRAME, fusion=fusion)
    assert worst(play(build(fusion=fusion, kv_heads=kv_heads), calls), theirs) < 1e-10


@pytest.mark.parametrize(
    ("params", "chunk"),
    [
        ({"window": 9, "capacity": 7, "sink": 3, "recent": 2}, 1),
        ({"window": 9, "capacity": 7, "sink": 3, "recent": 2, "reuse": 2}, 1),
        ({"window": 9, "capacity": 9, "sink": 2, "recent": 3, "reuse": 0}, 2),
        ({"window": 12, "capacity": 10, "sink": 0, "recent": 4}, 3),
        ({"window": 10, "capacity": 8, "sink": 5, "recent": 2}, 3),
        ({"window": 10, "capacity": 6, "sink": 4, "recent": 2}, 2),
        ({"window": 12, "capacity": 12, "sink": 1, "recent": 8}, 2),
    ],
)
def test_other_sizes_equal_the_reference(params, chunk):
    calls = chunks(16, chunk, tentative=1)
    theirs = deep_forcing.reference(calls, ROPE, frame=FRAME, **params)
    assert worst(play(build(**params, chunk=chunk), calls), theirs) < 1e-10


def frames_held(state, layer=0):
    return len(state.held(layer)) / FRAME


def test_point_1_up_to_21_frames_it_is_the_base():
    calls = chunks(7, tentative=1)
    base = build(ef.recipe("self-forcing", window=None, frame=FRAME))
    assert worst(play(build(), calls), play(base, calls)) < 1e-12


def test_point_2_lengths_go_16_19_16_19_and_what_is_attended_with_them():
    calls, state, lengths, sizes = chunks(24, tentative=1), build(), [], []
    for n in range(48):
        play(state, part(calls, n, n + 1))
        if n % 2:
            lengths.append(frames_held(state))
            sizes.append(state.nbytes)
    assert lengths == [3, 6, 9, 12, 15, 18, 21, *[16, 19] * 8, 16]
    assert len(set(sizes[8:])) == 1


def test_point_3_the_sink_keeps_its_content_and_moves_with_time(monkeypatch):
    calls, state, starts, gaps = chunks(100, layers=1), build(layers=1), [], []
    place = type(state.memory.place)
    inner = place.positions

    def noted(self, view):
        places = inner(self, view)
        keys = places.keys[0, 0][: view.sink]
        assert torch.equal(keys - keys[0], torch.arange(view.sink) // FRAME)
        starts.append(int(keys[0]))
        gaps.append(int(places.queries[0, 0] - keys[0]))
        return places

    monkeypatch.setattr(place, "positions", noted)
    play(state, part(calls, 0, 4))
    first = {n: x[:, :, : 10 * FRAME].clone() for n, x in state.state_dict().items() if n.endswith(("keys", "values"))}
    play(state, part(calls, 4))
    for name, x in first.items():  # un-rotated keys: what a read makes of them is exact after any number of moves
        assert torch.equal(state.state_dict()[name][:, :, : 10 * FRAME], x)
    assert starts[:7] == [0] * 7
    assert starts[7:] == [5 + 6 * (n // 2) for n in range(93)]
    assert gaps[7:] == [16 + 3 * (n % 2) for n in range(93)]


def test_point_4_sinks_and_recent_frames_stay_and_the_best_of_the_rest():
    calls, state = chunks(8), build()
    play(state, part(calls, 0, 7))
    play(state, part(calls, 7))
    for layer in range(2):
        held = state.held(layer)
        assert held == sorted(held) and held[: 10 * FRAME] == list(range(10 * FRAME))
        assert held[-4 * FRAME :] == list(range(20 * FRAME, 24 * FRAME))
        q, k = (torch.cat([getattr(call, name) for call in calls[layer]], 1) for name in "qk")
        where = torch.cat([torch.arange(24).repeat_interleave(FRAME)[:, None], GRID.repeat(24, 1)], 1)
        q, k = (deep_forcing.rotated(x, where, ROPE) for x in (q, k))
        phi = torch.zeros(24 * FRAME, dtype=torch.float64)
        for j in range(len(phi)):
            for r in range(20 * FRAME, 24 * FRAME):
                for head in range(4):
                    phi[j] += q[head, r] @ k[head // 2, j]
        middle = range(10 * FRAME, 20 * FRAME)
        best = sorted(sorted(middle, key=lambda j: -float(phi[j]))[: 2 * FRAME])
        assert held[10 * FRAME : -4 * FRAME] == best


@pytest.mark.parametrize("reuse", [0, 2, 7])
def test_point_4_nothing_is_chosen_more_often_than_the_bound(reuse):
    """One old token that all queries want: it stays for `reuse` compressions, each of them every second chunk."""
    calls = random_calls([CHUNK * FRAME] * 40, layers=1, seed=1)
    planted = 12 * FRAME
    direction = torch.ones(12, dtype=torch.float64)
    for call in calls[0]:
        call.q.add_(direction)
    calls[0][4].k[:, 0] = 30 * direction
    memory = ef.recipe("deep-forcing", frame=FRAME, reuse=reuse)
    state = memory.build(layers=1, heads=4, kv_heads=2, head_dim=12, rope=None, dtype=torch.float64)
    held = []
    for n in range(40):
        play(state, part(calls, n, n + 1))
        held.append(planted in state.held(0))
    last = 39 if not reuse else 7 + 2 * reuse - 1
    assert held == [4 <= n <= last for n in range(40)]


def test_point_5_with_room_for_everything_it_is_full_attention():
    calls = chunks(12, tentative=1)
    full = build(ef.recipe("self-forcing", window=None, frame=FRAME))
    assert worst(play(build(window=40, capacity=36), calls), play(full, calls)) < 1e-12


@pytest.mark.parametrize("fusion", ["sum", "max"])
def test_point_6_exactly_the_planted_keys_are_kept(fusion):
    made = torch.Generator().manual_seed(3)
    calls = random_calls([CHUNK * FRAME] * 8, layers=1, seed=2)
    direction = torch.randn(12, generator=made, dtype=torch.float64)
    direction = direction / direction.norm()
    middle = torch.arange(10 * FRAME, 20 * FRAME)
    planted = sorted(middle[torch.randperm(len(middle), generator=made)[: 2 * FRAME]].tolist())
    for n, call in enumerate(calls[0]):
        call.q.add_(3 * direction)
        for j in range(CHUNK * FRAME):
            if n * CHUNK * FRAME + j in planted:
                call.k[:, j] = 20 * direction
    memory = ef.recipe("deep-forcing", frame=FRAME, fusion=fusion)
    state = memory.build(layers=1, heads=4, kv_heads=2, head_dim=12, rope=None, dtype=torch.float64)
    play(state, calls)
    assert state.held(0)[10 * FRAME : -4 * FRAME] == planted


def test_point_7_layers_and_rows_choose_for_themselves():
    scripts = [chunks(10, seed=n) for n in range(3)]
    alone = [build() for _ in scripts]
    outputs = [play(state, calls) for state, calls in zip(alone, scripts, strict=True)]
    assert alone[0].held(0) != alone[0].held(1)
    for order in ((0, 1, 2), (2, 0, 1)):
        state = build(batch=3)
        for n in range(10):
            with state.step(CHUNK * FRAME, tags=scripts[0][0][n].tags):
                for layer in range(2):
                    given = [torch.stack([getattr(scripts[b][layer][n], x) for b in order]) for x in "qkv"]
                    out = state.attend(layer, *given)
                    for row, b in enumerate(order):
                        assert float((out[row] - outputs[b][layer][n]).abs().max()) < 1e-10
        for row, b in enumerate(order):
            assert [state.held(n, row) for n in (0, 1)] == [alone[b].held(n) for n in (0, 1)]


def test_point_7_a_row_that_starts_later_is_as_if_alone():
    calls, state = chunks(14), build(batch=2)
    alone = play(build(), part(calls, 4))
    for n in range(14):
        mask = torch.ones(2, CHUNK * FRAME, dtype=torch.bool)
        mask[1] = n >= 4
        with state.step(CHUNK * FRAME, mask=mask, tags=calls[0][n].tags):
            for layer in range(2):
                call = calls[layer][n]
                out = state.attend(layer, *(x[None].repeat(2, 1, 1, 1) for x in (call.q, call.k, call.v)))
                if n >= 4:
                    assert float((out[1] - alone[layer][n - 4]).abs().max()) < 1e-10


def test_point_8_the_first_pass_of_a_chunk_decides_for_all_of_them():
    calls, before = chunks(8), build()
    play(before, part(calls, 0, 7))
    first = [[replace(call, commit=False) for call in layer] for layer in chunks(1, seed=5)]
    held = []
    for seed in (None, 6, 7):
        state = before.fork()
        play(state, first)
        for passes in () if seed is None else (chunks(1, seed=seed), chunks(1, seed=seed + 10)):
            play(state, [[replace(call, commit=False) for call in layer] for layer in passes])
        play(state, part(calls, 7))
        held.append([state.held(layer) for layer in range(2)])
    assert held[0] == held[1] == held[2]
    once = before.fork()
    play(once, part(calls, 7))
    assert [once.held(layer) for layer in range(2)] != held[0]  # the first pass' queries were others


def test_later_in_the_stream_the_same_content_gives_the_same():
    calls, near = chunks(16, tentative=1), build()
    play(near, part(calls, 0, 18))
    expected = play(near.fork(), part(calls, 18))
    for shift in (3, 3000, 3 * 10**9):
        far = near.fork()
        far.seek(far.position + shift * FRAME)
        assert worst(play(far, part(calls, 18)), expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_runs_in_lower_precision(dtype):
    calls = chunks(9)
    theirs = deep_forcing.reference(calls, ROPE, frame=FRAME)
    ours = play(build(dtype=dtype), calls)
    if dtype == torch.float32:
        assert worst(ours, theirs) < 1e-5
    else:  # rounding may turn a choice round, and outputs with it
        assert worst([layer[:7] for layer in ours], [layer[:7] for layer in theirs]) < 0.05
        assert all(bool(out.isfinite().all()) for layer in ours for out in layer)


def test_saved_between_two_passes_of_a_chunk_it_goes_on():
    calls, state = chunks(14, tentative=1), build()
    play(state, part(calls, 0, 21))
    other = build()
    other.load_state_dict(state.state_dict())
    assert worst(play(state, part(calls, 21)), play(other, part(calls, 21))) == 0


def test_wrong_parameters_are_refused():
    for wrong, word in (
        ({"capacity": 22}, "capacity"), ({"sink": 14}, "sink"), ({"recent": 0}, "recent"), ({"fusion": "mean"}, "fusion"),
        ({"reuse": -1}, "reuse"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            ef.recipe("deep-forcing", **wrong)
