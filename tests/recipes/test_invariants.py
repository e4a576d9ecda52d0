"""What holds for every recipe, whatever its paper: one suite over the whole table."""

import pytest
import torch

import evenflow as ef
from evenflow.memory import MemoryState

from ..memory.drive import random_inputs, run

SMALL = {
    "full": {},
    "learned-sink": {"window": 13},
    "recompute": {"window": 13},
    "streaming-llm": {"sink": 4, "window": 13},
    "window": {"window": 13},
    "zero-sink": {"sink": 1, "window": 13},
}
LARGE = {name: {**params, **({"window": 500} if "window" in params else {})} for name, params in SMALL.items()}
GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
every_recipe = pytest.mark.parametrize("name", SMALL)


def test_the_suite_covers_every_recipe():
    assert {info.name for info in ef.recipes()} == set(SMALL)


def build(name: str, params: dict[str, int] | None = None, **changes: object) -> MemoryState:
    memory = ef.recipe(name, **(SMALL[name] if params is None else params))
    geometry = {**GEOMETRY, **changes}
    if memory.null == "learned":
        logits = torch.linspace(-1, 1, geometry["layers"] * geometry["heads"], dtype=torch.float64)
        geometry["sink_logits"] = logits.reshape(geometry["layers"], geometry["heads"])
    return memory.build(**geometry)


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@every_recipe
@pytest.mark.parametrize("cut", [1, 7, 13, 40])
def test_feeding_in_pieces_equals_feeding_at_once(name, cut):
    inputs = random_inputs(build(name), 60)
    close(run(build(name), inputs, [cut]), run(build(name), inputs, [60]))


@every_recipe
def test_a_budget_as_long_as_the_stream_equals_full_attention(name):
    inputs = random_inputs(build(name), 60)
    big, full = build(name, LARGE[name]), build("full")
    if name in ("zero-sink", "learned-sink"):
        # Their softmax has one more term; without a bound it is the same.
        big_again = build(name, {**LARGE[name], "window": 5000})
        close(run(big, inputs, [7]), run(big_again, inputs, [1]))
    else:
        close(run(big, inputs, [7]), run(full, inputs, [1]))


@every_recipe
def test_bytes_are_bounded(name):
    state = build(name)
    before = state.nbytes
    run(state, random_inputs(state, 700), [50])
    assert (state.nbytes == before) == (name != "full")


@every_recipe
def test_what_comes_later_changes_nothing_before(name):
    inputs = random_inputs(build(name), 40)
    other = [tuple(t.clone() for t in layer) for layer in inputs]
    for layer in other:
        for t in layer:
            t[:, :, 25:] += 1
    for cut in (1, 40):
        for a, b in zip(run(build(name), inputs, [cut]), run(build(name), other, [cut]), strict=True):
            assert torch.equal(a[:, :, :25], b[:, :, :25])


@every_recipe
def test_saved_and_forked_go_on_bit_for_bit(name):
    state = build(name)
    run(state, random_inputs(state, 30), [4])
    twin, loaded = state.fork(), build(name)
    loaded.load_state_dict(state.state_dict())
    inputs = random_inputs(state, 30, seed=1)
    expected = run(state, inputs, [1, 9])
    for copy in (twin, loaded):
        assert all(torch.equal(a, b) for a, b in zip(run(copy, inputs, [1, 9]), expected, strict=True))


@every_recipe
def test_grouped_heads_are_repeated_heads(name):
    inputs = random_inputs(build(name), 40)
    repeated = [(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)) for q, k, v in inputs]
    for cut in (1, 9):
        close(run(build(name), inputs, [cut]), run(build(name, kv_heads=4), repeated, [cut]))


@every_recipe
def test_batch_rows_do_not_see_each_other(name):
    inputs = random_inputs(build(name, batch=3), 40)
    together = run(build(name, batch=3), inputs, [6])
    for row in range(3):
        alone = run(build(name), [tuple(t[row : row + 1] for t in layer) for layer in inputs], [6])
        close([t[row : row + 1] for t in together], alone)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(name, dtype):
    inputs = random_inputs(build(name, dtype=dtype), 40)
    exact = run(build(name), [tuple(t.double() for t in layer) for layer in inputs], [6])
    for cut in (1, 9):
        for a, b in zip(run(build(name, dtype=dtype), inputs, [cut]), exact, strict=True):
            assert a.dtype is dtype
            assert (a.double() - b).abs().max() < 16 * torch.finfo(dtype).eps
