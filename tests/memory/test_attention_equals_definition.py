"""Sequential = parallel = the definition: any cut, sinks, window, rotation, bias, reach (card points 1 and 2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory import Absolute, Memory, Rope, attention, ring

from .drive import random_inputs, run
from .oracle import streaming_attention

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def check(memory, geometry, length, cuts, **definition):
    state = memory.build(**geometry)
    inputs = random_inputs(state, length)
    outputs = run(state, inputs, cuts)
    for layer, (q, k, v) in enumerate(inputs):
        for row in range(state.geometry.batch):
            expected = streaming_attention(
                q[row], k[row], v[row], sink=memory.sink, window=memory.window, **{
                    name: value[layer] if name in ("logits", "reach") and value is not None else value
                    for name, value in definition.items()
                },
            )  # fmt: skip
            error = (outputs[layer][row].double() - expected).abs().max()
            assert error < TOLERANCE[state.geometry.dtype], f"layer {layer}, row {row}: {error:.2e}"
    return state


GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
FREQUENCIES = [10_000.0 ** (-c / 4) for c in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", [[1], [7], [12], [40], [200], [3, 1, 30, 1, 1, 5]], ids=str)
@pytest.mark.parametrize(("sink", "window"), [(4, 12), (0, 12), (1, 1), (4, 1), (3, 200), (9, 7)])
def test_sinks_and_window(sink, window, cuts, dtype):
    check(Memory(sink=sink, window=window), {**GEOMETRY, "dtype": dtype}, 50, cuts, inv_freq=FREQUENCIES)


@pytest.mark.parametrize("cuts", [[1], [7], [200]], ids=str)
def test_everything_is_kept_without_a_window(cuts):
    check(Memory(), {**GEOMETRY, "dtype": torch.float64}, 300 if cuts == [200] else 40, cuts, inv_freq=FREQUENCIES)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_composition(data):
    sink, window = data.draw(st.integers(0, 6), label="sink"), data.draw(st.integers(1, 20), label="window")
    heads, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]), label="heads")
    rotation = data.draw(st.sampled_from(["half", "interleaved", "partial", "scaled", "alibi", "none"]), label="place")
    dim = 8
    pairs = 2 if rotation == "partial" else 4
    inv_freq = [10_000.0 ** (-c / pairs) for c in range(pairs)]
    rope = {
        "half": Rope(),
        "interleaved": Rope(style="interleaved"),
        "partial": Rope(dim=4),
        "scaled": Rope(inv_freq=tuple(inv_freq), scale=1.3),
    }.get(rotation)
    reach = data.draw(st.sampled_from([None, [3, None], [9, 15], [1, 2]]), label="reach")
    null = data.draw(st.sampled_from([None, "zero", "learned"]), label="null")
    softcap = data.draw(st.sampled_from([None, 2.0]), label="softcap")
    scale = data.draw(st.sampled_from([None, 0.7]), label="scale")
    cuts = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6), label="cuts")
    logits = torch.randn(2, heads, dtype=torch.float64)
    alibi = torch.rand(heads, dtype=torch.float64) if rotation == "alibi" else None
    check(
        Memory(sink=sink, window=window, null=null),
        {
            "layers": 2, "heads": heads, "kv_heads": heads // groups, "head_dim": dim, "rope": rope, "alibi": alibi,
            "reach": reach, "softcap": softcap, "scale": scale, "dtype": torch.float64, "batch": 2,
            "sink_logits": logits if null == "learned" else None,
        },
        data.draw(st.integers(1, 45), label="length"),
        cuts,
        inv_freq=None if rope is None else inv_freq,
        style="interleaved" if rotation == "interleaved" else "half",
        rope_scale=1.3 if rotation == "scaled" else 1.0,
        alibi=alibi,
        reach=reach,
        softcap=softcap,
        scale=scale,
        logits={None: None, "zero": torch.zeros(2, heads), "learned": logits}[null],
    )  # fmt: skip


@pytest.mark.parametrize("cuts", [[1], [9], [60]], ids=str)
def test_many_sinks_take_the_wide_way(cuts):
    """More sinks than half a head's channels: their keys travel whole instead of as scores."""
    check(Memory(sink=20, window=10), {**GEOMETRY, "dtype": torch.float64}, 60, cuts, inv_freq=FREQUENCIES)


@pytest.mark.parametrize("cuts", [[1], [5], [60]], ids=str)
def test_absolute_positions(cuts):
    memory = Memory(sink=4, window=12, place=Absolute())
    check(memory, {**GEOMETRY, "dtype": torch.float64}, 40, cuts, inv_freq=FREQUENCIES, absolute=True)


def test_block_longer_than_several_windows():
    check(
        Memory(sink=2, window=20), {**GEOMETRY, "layers": 1, "dtype": torch.float64}, 400, [400], inv_freq=FREQUENCIES
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_close_as_its_inputs_allow(dtype):
    frequencies = [10_000.0 ** (-c / 16) for c in range(16)]
    for sink in (0, 4, 20):
        states = [Memory(sink=sink, window=30).build(**{**GEOMETRY, "head_dim": 32, "dtype": dtype}) for _ in range(2)]
        inputs = random_inputs(states[0], 80)
        q, k, v = (tensor[0] for tensor in inputs[0])
        expected = streaming_attention(q, k, v, sink=sink, window=30, inv_freq=frequencies)
        for state, cut in zip(states, (1, 40), strict=True):
            out = run(state, inputs, [cut])[0][0].double()
            assert (out - expected).abs().max() < 8 * torch.finfo(dtype).eps


def test_rows_are_independent():
    memory = Memory(sink=3, window=9)
    both = memory.build(**{**GEOMETRY, "batch": 2, "dtype": torch.float64})
    inputs = random_inputs(both, 40)
    together = run(both, inputs, [6])
    for row in range(2):
        alone = memory.build(**{**GEOMETRY, "dtype": torch.float64})
        single = run(alone, [tuple(t[row : row + 1] for t in tensors) for tensors in inputs], [6])
        for a, b in zip(together, single, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_of_different_age_equal_rows_alone(data):
    """Padding anywhere in a row is neither stored nor counted: each row equals itself without padding."""
    sink, window = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    reach = data.draw(st.sampled_from([None, 4, 10]))
    null = data.draw(st.sampled_from([None, "zero"]))
    memory = Memory(sink=sink, window=data.draw(st.sampled_from([window, None])) if not sink else window, null=null)
    geometry = {**GEOMETRY, "reach": reach, "dtype": torch.float64}
    state = memory.build(**geometry, batch=3)
    alone = [memory.build(**geometry) for _ in range(3)]
    for number in range(data.draw(st.integers(1, 5))):
        m = data.draw(st.integers(1, 12))
        mask = torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=3, max_size=3))
        )
        inputs = random_inputs(state, m, seed=number)
        spoilt = [(q, k.masked_fill(~mask[:, None, :, None], torch.nan), v) for q, k, v in inputs]
        with state.step(m, mask=mask):
            outputs = [state.attend(layer, *tensors) for layer, tensors in enumerate(spoilt)]
        assert all(bool(out.isfinite().all()) for out in outputs)
        for row, single in enumerate(alone):
            columns = mask[row].nonzero()[:, 0]
            if not len(columns):
                continue
            with single.step(len(columns)):
                for layer, tensors in enumerate(inputs):
                    expected = single.attend(layer, *(t[row : row + 1, :, columns] for t in tensors))
                    torch.testing.assert_close(
                        outputs[layer][row : row + 1][:, :, columns], expected, rtol=0, atol=1e-10
                    )
        for row, single in enumerate(alone):
            assert state.positions[row] == single.position
            for layer in range(2):
                assert state.held(layer, row) == single.held(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_both_kernels_of_a_decode_step_agree(dtype, masked):
    """One for slots that lie token by token, one for slots that lie channel by channel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator).to(dtype) for h, n in ((4, 1), (2, 50), (2, 50)))
    bias = torch.zeros(2, 1, 1, 50, dtype=dtype).masked_fill_(torch.arange(50) > 30, -torch.inf) if masked else None
    exact = attention.softmax_attention(
        q.double(), k.double(), v.double(), None if bias is None else bias.double(), 0.3, None
    )
    for keys, values in ((k, v), tuple(t.transpose(2, 3).contiguous().transpose(2, 3) for t in (k, v))):
        result = attention.softmax_attention(q, keys, values, bias, 0.3, None).double()
        assert (result - exact).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cuts", [[1], [9], [60, 1, 1, 30, 1]], ids=str)
@pytest.mark.parametrize("memory", [Memory(sink=4, window=12), Memory()], ids=["bounded", "unbounded"])
def test_large_memories_lie_channel_by_channel_and_say_the_same(memory, cuts, monkeypatch):
    monkeypatch.setattr(ring, "LARGE", 0)
    state = check(memory, {**GEOMETRY, "dtype": torch.float64}, 60, cuts, inv_freq=FREQUENCIES)
    assert state.held_layers[0].window.keys.stride(-1) > 1
    twin, more = state.fork(), random_inputs(state, 20, seed=1)
    for a, b in zip(run(twin, more, [1]), run(state, more, [1]), strict=True):
        assert torch.equal(a, b)
