"""What must hold of StreamingLLM (arXiv 2309.17453) without a trained model."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenflow.memory import Memory, MemoryState, Rope
from evenflow.memory.rope import Rotary

from .drive import random_inputs, run

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
STREAMING = Memory(sink=4, window=12)


def raw_key_cache(inputs, sink, window, dtype=torch.float64):
    """Placement 1 of the paper: raw keys, the whole cache rotated at its indices in every step."""
    rotary = Rotary(Rope(), 16, torch.float64, torch.device("cpu"))
    q, k, v = (t.to(dtype) for t in inputs)
    outputs = []
    for i in range(q.shape[2]):
        kept = [j for j in range(i + 1) if j < sink or i - j <= window]
        cos, sin = (t.to(dtype) for t in rotary.span(0, len(kept)))
        keys = rotary.rotate(k[:, :, kept], cos, sin).repeat_interleave(2, 1)
        query = rotary.rotate(q[:, :, i : i + 1], cos[-1:], sin[-1:])
        weights = torch.softmax(query @ keys.transpose(-1, -2) / 4, -1)
        outputs.append(weights @ v[:, :, kept].repeat_interleave(2, 1))
    return torch.cat(outputs, 2)


def delta_rotated_cache(inputs, sink, window, dtype):
    """Placement 2: rotated keys, every window key turned down by one position whenever a token leaves."""
    rotary = Rotary(Rope(), 16, torch.float64, torch.device("cpu"))
    q, k, v = (t.to(dtype) for t in inputs)
    cos, sin = (t.to(dtype) for t in rotary.span(0, sink + window + 2))
    cache, values, outputs = k[:, :, :0], v[:, :, :0], []
    for i in range(q.shape[2]):
        place = cache.shape[2]
        cache = torch.cat([cache, rotary.rotate(k[:, :, i : i + 1], cos[place], sin[place])], 2)
        values = torch.cat([values, v[:, :, i : i + 1]], 2)
        query = rotary.rotate(q[:, :, i : i + 1], cos[place], sin[place])
        scores = query.double() @ cache.repeat_interleave(2, 1).double().transpose(-1, -2) / 4
        outputs.append(torch.softmax(scores, -1) @ values.repeat_interleave(2, 1).double())
        if cache.shape[2] > sink + window:
            moved = rotary.rotate(cache[:, :, sink + 1 :], cos[1], -sin[1])
            cache = torch.cat([cache[:, :, :sink], moved], 2)
            values = torch.cat([values[:, :, :sink], values[:, :, sink + 1 :]], 2)
    return torch.cat(outputs, 2)


def test_point_3_three_placements_agree():
    """In float32 all three stay within 1e-4 of float64 after 2,000 evictions."""
    state = STREAMING.build(**GEOMETRY)
    inputs = random_inputs(state, 2000)
    expected = raw_key_cache(inputs[0], 4, 12)
    ours = run(state, inputs, [1])[0].double()
    assert (ours - expected).abs().max() < 1e-5
    delta = delta_rotated_cache(inputs[0], 4, 12, torch.float32).double()
    assert (delta - expected).abs().max() < 1e-4


def test_point_3_turning_bfloat16_keys_again_and_again_drifts_and_ours_does_not():
    memory = Memory(sink=4, window=200)
    state = memory.build(**{**GEOMETRY, "dtype": torch.bfloat16})
    inputs = random_inputs(state, 1200)
    expected = raw_key_cache(inputs[0], 4, 200)
    ours = (run(state, inputs, [1])[0].double() - expected)[:, :, 600:].abs().mean()
    delta = (delta_rotated_cache(inputs[0], 4, 200, torch.bfloat16) - expected)[:, :, 600:].abs().mean()
    assert ours < 0.002
    assert delta > 5 * ours


def test_point_4_a_hundred_thousand_tokens_leave_no_trace_in_the_numbers():
    """What a query sees is the same at token 100,000 as at token 1,000, whatever came between."""
    state = STREAMING.build(**{**GEOMETRY, "dtype": torch.float32})
    block = random_inputs(state, 1000)
    first = run(state, block, [1000])
    first = run(state, block, [1000])
    for _ in range(98):
        last = run(state, block, [1000])
    assert state.position == 100_000
    for a, b in zip(first, last, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a[:, :, 20:], b[:, :, 20:], rtol=0, atol=2e-6)


def test_point_5_bytes_and_time_of_a_step_do_not_grow():
    """Processor time of single steps at 50,000 tokens and at 2,000, in turn, so that what disturbs disturbs both."""
    old = Memory(sink=4, window=252).build(**{**GEOMETRY, "dtype": torch.float32})
    block, size = random_inputs(old, 1000), old.nbytes
    few = [tuple(t[:, :, :300] for t in layer) for layer in block]
    run(old, block, [1000])
    run(old, block, [1000])
    young = old.fork()
    while old.position < 50_000:
        run(old, block, [1000])

    def seconds(state: MemoryState) -> float:
        start = time.process_time()
        run(state, few, [1])
        return time.process_time() - start

    pairs = [(seconds(old), seconds(young)) for _ in range(5)]
    assert min(late for late, _ in pairs) < 1.25 * min(early for _, early in pairs)
    assert old.nbytes == size


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40))
def test_point_7_dropping_a_key_scales_all_other_weights_alike(scores):
    """Z / Z' for every surviving weight: the identity behind attention sinks (section 3.1)."""
    row = torch.tensor(scores, dtype=torch.float64)
    kept, dropped = torch.softmax(row, 0)[1:], torch.softmax(row[1:], 0)
    factor = row.exp().sum() / row[1:].exp().sum()
    torch.testing.assert_close(dropped, kept * factor, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("length", "expected"), [(9, [0, 1, 2, 3, 6, 7, 8]), (3, [0, 1, 2])])
def test_the_papers_example_of_what_is_kept(length, expected):
    """Figure 4: four sinks and three window tokens; token 9 is read beside tokens 0, 1, 2, 3, 6, 7, 8."""
    state = Memory(sink=4, window=3).build(**GEOMETRY)
    run(state, random_inputs(state, length), [1])
    assert state.held(0) == expected
