"""What holds for every recipe, whatever its paper: one suite over the whole table."""

import pytest
import torch

import evenflow as ef
from evenflow.memory import EMPTY, Absolute, Memory, MemoryState, Never, Oldest, Recall, View

from ..memory.drive import Inputs, random_inputs
from .cases import CASES, Case

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
LENGTH = 60
every_recipe = pytest.mark.parametrize("name", sorted(CASES))


def test_the_suite_covers_every_recipe():
    assert {info.name for info in ef.recipes("memory")} == set(CASES)


def build(name: str, params: dict[str, object] | None = None, **changes: object) -> MemoryState:
    case = CASES[name]
    memory = ef.recipe(name, **(case.params if params is None else params))
    geometry = {**GEOMETRY, "rope": case.rope, **case.geometry, **changes}
    if memory.null == "learned":
        logits = torch.linspace(-1, 1, geometry["layers"] * geometry["heads"], dtype=torch.float64)
        geometry["sink_logits"] = logits.reshape(geometry["layers"], geometry["heads"])
    return memory.build(**geometry)


def run(
    state: MemoryState, case: Case, inputs: list[Inputs], cuts: list[int] | None = None, start: int = 0
) -> list[torch.Tensor]:
    """Feed everything in steps of the given lengths (the last one repeats); outputs [B, H_q, N, D_v] per layer."""
    cuts = cuts or [case.step]
    length, at, number, pieces = inputs[0][0].shape[2], 0, 0, []
    while at < length:
        stop = min(length, at + cuts[min(number, len(cuts) - 1)])
        tags = None if case.tags is None else case.tags(start + at, stop - at)
        with state.step(stop - at, tags=tags):
            pieces.append([state.attend(n, *(t[:, :, at:stop] for t in layer)) for n, layer in enumerate(inputs)])
        at, number = stop, number + 1
    return [torch.cat(layer, 2) for layer in zip(*pieces, strict=True)]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance)


@every_recipe
def test_a_memory_knows_whether_its_rule_is_per_token(name):
    assert ef.recipe(name, **CASES[name].params).cut_free == CASES[name].any_cut


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.any_cut))
@pytest.mark.parametrize("cut", [1, 7, 13, 40])
def test_feeding_in_pieces_equals_feeding_at_once(name, cut):
    inputs = random_inputs(build(name), LENGTH)
    close(run(build(name), CASES[name], inputs, [cut]), run(build(name), CASES[name], inputs, [LENGTH]))


class Everything(Recall):
    """Runs on the arena, sees everything."""

    def among(self, view: View) -> torch.Tensor:
        return view.index != EMPTY


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.large is not None))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_budget_as_long_as_the_stream_equals_full_attention(name, dtype):
    case = CASES[name]
    inputs = random_inputs(build(name, dtype=dtype), LENGTH)
    large = build(name, case.large, dtype=dtype)
    memory = large.memory
    full = Memory(
        evict=Never(),
        recall=Everything(),
        place=Absolute(),
        inside=memory.inside,
        frame=memory.frame,
        chunk=memory.chunk,
    ).build(**{**GEOMETRY, "rope": case.rope, "dtype": dtype, **case.geometry})
    exact = run(full, case, inputs)
    close(run(large, case, inputs), exact, 1e-11 if dtype == torch.float64 else 1e-5)
    if case.any_cut:
        close(
            run(build(name, case.large, dtype=dtype), case, inputs, [7]),
            exact,
            1e-11 if dtype == torch.float64 else 1e-5,
        )


@every_recipe
def test_bytes_are_bounded(name):
    """After twenty windows as many as after two; no window here is longer than 24 tokens."""
    case, state = CASES[name], build(name)
    run(state, case, random_inputs(state, 48))
    before = state.nbytes
    run(state, case, random_inputs(state, 432, seed=1), start=48)
    assert (state.nbytes == before) == case.bounded


@every_recipe
def test_what_comes_later_changes_nothing_before(name):
    case = CASES[name]
    inputs = random_inputs(build(name), 48)
    other = [tuple(t.clone() for t in layer) for layer in inputs]
    for layer in other:
        for t in layer:
            t[:, :, 24:] += 1
    for a, b in zip(run(build(name), case, inputs), run(build(name), case, other), strict=True):
        assert torch.equal(a[:, :, :24], b[:, :, :24])
        assert not torch.equal(a[:, :, 24:], b[:, :, 24:])


@every_recipe
def test_the_same_stream_gives_the_same_twice_and_after_a_reset(name):
    case = CASES[name]
    state = build(name)
    inputs = random_inputs(state, LENGTH)
    first = run(state, case, inputs)
    state.reset()
    assert state.position == 0 and state.held(0) == []
    for again in (state, build(name)):
        assert all(torch.equal(a, b) for a, b in zip(run(again, case, inputs), first, strict=True))


@every_recipe
def test_saved_and_forked_go_on_bit_for_bit(name):
    case, state = CASES[name], build(name)
    run(state, case, random_inputs(state, 48))
    twin, loaded = state.fork(), build(name)
    loaded.load_state_dict(state.state_dict())
    inputs = random_inputs(state, 36, seed=1)
    expected = run(state, case, inputs, start=48)
    for copy in (twin, loaded):
        assert all(torch.equal(a, b) for a, b in zip(run(copy, case, inputs, start=48), expected, strict=True))
        assert [copy.held(layer) for layer in range(2)] == [state.held(layer) for layer in range(2)]


@every_recipe
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_repeated_heads(name, kv_heads):
    """Key heads that are copies of each other hold the same, and give what one key head for all gives."""
    case = CASES[name]
    inputs = random_inputs(build(name, kv_heads=1), 48)
    repeated = [(q, k.repeat_interleave(kv_heads, 1), v.repeat_interleave(kv_heads, 1)) for q, k, v in inputs]
    close(run(build(name, kv_heads=1), case, inputs), run(build(name, kv_heads=kv_heads), case, repeated), 1e-11)


@every_recipe
def test_batch_rows_do_not_see_each_other(name):
    case = CASES[name]
    inputs = random_inputs(build(name, batch=3), 48)
    together = run(build(name, batch=3), case, inputs)
    for row in range(3):
        alone = run(build(name), case, [tuple(t[row : row + 1] for t in layer) for layer in inputs])
        close([t[row : row + 1] for t in together], alone)


@every_recipe
def test_rows_of_different_age_are_streams_of_their_own(name):
    """The second row takes part in every other step only."""
    case = CASES[name]
    together, alone = build(name, batch=2), [build(name) for _ in range(2)]
    inputs = random_inputs(together, 16 * case.step)
    ages = [0, 0]
    for step in range(16):
        part = slice(step * case.step, (step + 1) * case.step)
        takes = [True, step % 2 == 0]
        tags = [None if case.tags is None else case.tags(age, case.step) for age in ages]
        both = None if tags[0] is None else {n: torch.stack([t[n] for t in tags]) for n in tags[0]}
        with together.step(case.step, tags=both, mask=torch.tensor(takes)[:, None].expand(2, case.step)):
            out = [together.attend(n, *(t[:, :, part] for t in layer)) for n, layer in enumerate(inputs)]
        for row in (row for row in range(2) if takes[row]):
            one = alone[row]
            with one.step(case.step, tags=tags[row]):
                own = [one.attend(n, *(t[row : row + 1, :, part] for t in layer)) for n, layer in enumerate(inputs)]
            close([o[row : row + 1] for o in out], own, 1e-11)
            ages[row] += case.step
    assert together.positions.tolist() == [one.position for one in alone]
    assert [together.held(1, row) for row in range(2)] == [one.held(1) for one in alone]


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(name, dtype):
    """Against float64 on the same rounded inputs; where a choice hangs on the last bit, on the first steps only."""
    case = CASES[name]
    inputs = random_inputs(build(name, dtype=dtype), 48)
    exact = run(build(name), case, [tuple(t.double() for t in layer) for layer in inputs])
    for a, b in zip(run(build(name, dtype=dtype), case, inputs), exact, strict=True):
        assert a.dtype is dtype and a.isfinite().all()
        assert (a.double() - b).abs().max() < case.tolerance * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", sorted(name for name in CASES if not ef.recipe(name, **CASES[name].params).on_ring))
def test_calls_that_are_not_kept_leave_the_memory_as_it_was(name):
    case, state = CASES[name], build(name)
    run(state, case, random_inputs(state, 48))
    before = state.state_dict()
    inputs = random_inputs(state, case.step, seed=3)
    with state.step(case.step, tags=None if case.tags is None else case.tags(48, case.step), commit=False):
        for layer, tensors in enumerate(inputs):
            state.attend(layer, *tensors)
    after = state.state_dict()
    # What leaves is decided at the first call of a chunk, and remembered until its last.
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(key.startswith("pending.") for key in after.keys() - before.keys())
    with pytest.raises(ValueError, match="NaN"), state.step(case.step):
        for layer, (q, k, v) in enumerate(inputs):
            state.attend(layer, q, k * torch.nan, v)
    failed = state.state_dict()
    assert before.keys() == failed.keys() and all(torch.equal(before[key], failed[key]) for key in before)


def test_the_oldest_token_is_the_same_on_the_ring_and_in_the_arena():
    ring = Memory(sink=2, window=9, place=Absolute()).build(**GEOMETRY)
    arena = Memory(sink=2, window=9, place=Absolute(), evict=Oldest(), recall=Everything()).build(**GEOMETRY)
    inputs, case = random_inputs(ring, LENGTH), Case({}, {})
    for cut in (1, 7):
        ring.reset()
        arena.reset()
        close(run(ring, case, inputs, [cut]), run(arena, case, inputs, [cut]))
        assert ring.held(0) == arena.held(0)
