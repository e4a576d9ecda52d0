"""Every supported family computes the definition: the dense model until something leaves, the oracle afterwards."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import evenflow as ef
from evenflow.models import Stream

from .. import oracles
from . import zoo

SINK, WINDOW, LENGTH = 3, 8, 40
SPEC = f"streaming-llm(sink={SINK}, window={WINDOW})"
CUTS = {"one by one": 1, "sevens": 7, "windows": WINDOW, "longer than a window": 13, "at once": LENGTH}
every_family = pytest.mark.parametrize("name", zoo.FAMILIES)


def style(name: str) -> str:
    return "interleaved" if name in zoo.INTERLEAVED else "half"


@cache
def expected(name: str) -> Tensor:
    """What two rows of `LENGTH` tokens give, in float64."""
    return oracles.stepwise_logits(zoo.shared(name), zoo.tokens(LENGTH, 2), SINK, WINDOW, style=style(name))


@cache
def doubled(name: str) -> PreTrainedModel:
    return copy.deepcopy(zoo.shared(name)).double()


@cache
def dense(name: str) -> Tensor:
    with torch.no_grad():
        return zoo.shared(name)(input_ids=zoo.tokens(LENGTH, 2)).logits


def fed(stream: Stream, ids: Tensor, size: int) -> Tensor:
    return torch.cat([stream.feed(piece) for piece in ids.split(size, 1)], 1)


@pytest.mark.parametrize("name", [name for name in zoo.FAMILIES if name not in zoo.OWN_ATTENTION])
def test_the_two_oracles_agree(name):
    masked = oracles.masked_logits(zoo.shared(name), zoo.tokens(LENGTH, 2), SINK, WINDOW, style=style(name))
    assert oracles.relative_error(masked, expected(name)) <= 1e-12


@every_family
@pytest.mark.parametrize("spec", ["full", f"streaming-llm(sink={SINK}, window={LENGTH})"])
def test_before_the_first_eviction_it_is_the_dense_model(name, spec):
    ids = zoo.tokens(LENGTH, 2)
    for size in (1, 7, LENGTH):
        got = fed(ef.open(zoo.shared(name), spec, batch=2), ids, size)
        assert oracles.relative_error(got, dense(name)) <= 1e-5


@every_family
@pytest.mark.parametrize("size", CUTS.values(), ids=CUTS)
def test_after_eviction_it_is_the_oracle(name, size):
    got = fed(ef.open(zoo.shared(name), SPEC, batch=2), zoo.tokens(LENGTH, 2), size)
    assert oracles.relative_error(got, expected(name)) <= 1e-5


@every_family
def test_in_float64_it_is_the_oracle_to_ten_digits(name):
    model = doubled(name)
    with oracles.doubles():
        for size in CUTS.values():
            got = fed(ef.open(model, SPEC, batch=2), zoo.tokens(LENGTH, 2), size)
            assert oracles.relative_error(got, expected(name)) <= 1e-10


@every_family
def test_eviction_matters(name):
    """The tests above could not fail if these logits were those of the dense model."""
    seen = {"mistral-sliding", "phi3-sliding"}  # every layer slides by no more than the window: nothing visible leaves
    gap = oracles.relative_error(expected(name), dense(name))
    assert gap <= 1e-5 if name in seen else gap >= 1e-2


@every_family
def test_the_model_itself_stays_as_it_was(name):
    model, ids = zoo.fresh(name), zoo.tokens(20, 2)
    implementation, weights = model.config._attn_implementation, [p.clone() for p in model.parameters()]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        model.train()
        stream = ef.open(model, SPEC, batch=2)
        assert model.training
        stream.feed(ids)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), written)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@given(
    name=st.sampled_from(["llama", "gemma3", "gpt-neox", "mistral-sliding", "falcon-alibi", "mpt", "gpt-oss"]),
    sink=st.integers(0, 6),
    window=st.integers(1, 14),
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    length=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_any_sink_any_window_any_cut(name, sink, window, cuts, length):
    model, ids = doubled(name), zoo.tokens(length, 1, seed=length)
    want = oracles.stepwise_logits(model, ids, sink, window)
    sizes = [cuts[n % len(cuts)] for n in range(length)]
    with oracles.doubles():
        stream, got, column = ef.open(model, f"streaming-llm(sink={sink}, window={window})"), [], 0
        for size in sizes:
            if column < length:
                got.append(stream.feed(ids[:, column : column + size]))
                column += size
    assert oracles.relative_error(torch.cat(got, 1), want) <= 1e-10


def test_a_model_set_to_return_tuples_streams_too():
    model = zoo.fresh("llama")
    model.config.return_dict = False
    assert ef.open(model, SPEC).feed([1, 2, 3]).shape == (1, 3, zoo.VOCABULARY)
    assert model.config.return_dict is False


def stretched(kind: str) -> PreTrainedModel:
    """Models whose rotary frequencies depend on how long the text is: known up to 16, or stretched from there."""
    torch.manual_seed(0)
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
        return zoo.small("Llama", max_position_embeddings=16, rope_parameters=rope)().eval()
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    return zoo.small(
        "Phi3",
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        sliding_window=None,
        rope_parameters=rope,
    )().eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("window", [8, 29])
def test_length_dependent_scaling_is_made_for_what_the_memory_holds(kind, window):
    """For S + W, however long the stream: 11 positions are within what both models know, 32 are not."""
    model, ids = stretched(kind).double(), zoo.tokens(70)
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](model.config, "cpu", seq_len=SINK + window)
    want = oracles.stepwise_logits(model, ids, SINK, window, frequencies=[frequencies.double()] * 2)
    stream = ef.open(model, f"streaming-llm(sink={SINK}, window={window})")
    with oracles.doubles():
        got = fed(stream, ids, 9)
    assert oracles.relative_error(got, want) <= 1e-10
    short, _ = ROPE_INIT_FUNCTIONS[kind](model.config, "cpu", seq_len=SINK + 8)
    assert torch.equal(short, frequencies) == (window == 8)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_scaling_without_a_bound_is_made_for_all_the_model_knows(kind):
    model, ids = stretched(kind).double(), zoo.tokens(40)
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](model.config, "cpu", seq_len=model.config.max_position_embeddings)
    want = oracles.stepwise_logits(model, ids, 0, None, frequencies=[frequencies.double()] * 2)
    stream = ef.open(model, "full")
    with oracles.doubles():
        assert oracles.relative_error(fed(stream, ids, 9), want) <= 1e-10


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "falcon-alibi", "gpt-oss"])
def test_at_position_one_billion_it_is_still_the_oracle(name):
    """Nothing may depend on where in the stream the window is: the same tokens give the same logits out there."""
    model, ids = doubled(name), zoo.tokens(LENGTH, 2)
    with oracles.doubles():
        stream = ef.open(model, SPEC, batch=2)
        stream.feed(ids[:, :20])
        stream.state.seek(10**9)
        got = torch.cat([stream.feed(ids[:, 20:21]), stream.feed(ids[:, 21:])], 1)
    assert stream.position == 10**9 + 20
    assert oracles.relative_error(got, expected(name)[:, 20:]) <= 1e-10


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_half_precision_is_as_near_as_the_format_allows(name, kind):
    model = copy.deepcopy(zoo.shared(name)).to(kind)
    for size in (1, 13):
        got = fed(ef.open(model, SPEC, batch=2), zoo.tokens(LENGTH, 2), size)
        assert got.dtype == kind
        error = (got.double() - expected(name)).square().mean().sqrt() / expected(name).std()
        assert error <= (0.1 if kind == torch.bfloat16 else 0.02)
