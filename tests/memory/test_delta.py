"""The gated delta rule and its convolution: two forms, any cut, and what they do with bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evenflow.memory.delta import DeltaState, chunked_delta, gated_delta, recurrent_delta, short_convolution, unit
from evenflow.recipes.reference import infinite_vl


def tokens(
    count: int, *, batch: int = 2, heads: int = 3, key: int = 6, value: int = 5, seed: int = 0, dtype=torch.float64
) -> tuple[Tensor, ...]:
    """q, k, v, beta, g of a stream, and a state to begin with."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, heads, *shape, generator=made, dtype=torch.float64)

    g = -torch.exp(2 * draw(count)) * torch.rand(batch, heads, 1, generator=made).double()  # slow heads and fast ones
    out = unit(draw(count, key)), unit(draw(count, key)), draw(count, value), draw(count).sigmoid(), g, draw(key, value)
    return tuple(x.to(dtype) for x in out)


def by_oracle(q, k, v, beta, g, state):
    pairs = [
        [infinite_vl.delta(*(x[b, h] for x in (q, k, v, beta, g)), state[b, h]) for h in range(q.shape[1])]
        for b in range(q.shape[0])
    ]
    return tuple(torch.stack([torch.stack([pair[n] for pair in row]) for row in pairs]) for n in (0, 1))


def cut(form, given, sizes):
    *stream, state = given
    out = []
    for piece in zip(*(x.split(sizes, 2) for x in stream), strict=True):
        y, state = form(*piece, state)
        out.append(y)
    return torch.cat(out, 2), state


def near(ours, theirs, limit):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=limit)


@given(count=st.integers(1, 90), chunk=st.sampled_from([1, 3, 16, 32, 64]), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=20, deadline=None)
def test_both_forms_and_any_cut_equal_the_definition(count, chunk, seed, data):
    stream = tokens(count, batch=1, heads=2, seed=seed)
    expected = by_oracle(*stream)
    near(recurrent_delta(*stream), expected, 1e-10)
    near(chunked_delta(*stream, chunk=chunk), expected, 1e-10)
    sizes, left = [], count
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    near(cut(gated_delta, stream, sizes), expected, 1e-10)


def test_the_form_is_chosen_by_the_number_of_tokens():
    for count, form in ((64, recurrent_delta), (65, chunked_delta)):
        stream = tokens(count)
        assert all(torch.equal(a, b) for a, b in zip(gated_delta(*stream), form(*stream), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_have_a_wide_state(dtype):
    stream = tokens(130, dtype=dtype)
    for form in (recurrent_delta, chunked_delta, gated_delta):
        out, state = form(*stream)
        assert (out.dtype, state.dtype) == (dtype, torch.float32)
        near((out.double(), state), by_oracle(*(x.double() for x in stream)), 1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_of_chunks_are_those_of_single_tokens():
    stream = [x.requires_grad_() for x in tokens(7, batch=1, heads=2, key=3, value=2)]
    assert torch.autograd.gradcheck(lambda *x: chunked_delta(*x, chunk=3), stream)
    long = [x.requires_grad_() for x in tokens(70, batch=1, heads=2)]
    weights = tokens(70, batch=1, heads=2, seed=1)
    both = []
    for form in (recurrent_delta, chunked_delta):
        out, state = form(*long)
        both.append(torch.autograd.grad((out * weights[2]).sum() + (state * weights[5]).sum(), long))
    near(*both, 1e-9)


def test_the_state_that_is_given_is_not_written_to():
    for form in (recurrent_delta, chunked_delta):
        *stream, state = tokens(9)
        before = state.clone()
        form(*stream, state)
        assert torch.equal(state, before)


def test_decays_that_overflow_when_taken_alone_do_no_harm():
    """e^-γ of 64 such tokens is beyond any float; that of differences never exceeds 1."""
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        q, k, v, beta, g, state = tokens(200, dtype=dtype)
        g = torch.where(torch.arange(200) % 7 == 3, -300.0, -1e-3).to(dtype).expand_as(g)
        exact = by_oracle(*(x.double() for x in (q, k, v, beta, g, state)))
        near(chunked_delta(q, k, v, beta, g, state), exact, limit)
        near(recurrent_delta(q, k, v, beta, g, state), exact, limit)


def test_padding_is_neutral():
    *stream, state = tokens(100)
    real = torch.arange(100) % 3 != 1
    spoilt = [x.clone() for x in stream]
    for x in spoilt[3:]:
        x[:, :, ~real] = 0
    short = [x[:, :, real] for x in stream]
    for form in (recurrent_delta, chunked_delta):
        out, after = form(*spoilt, state)
        near((out[:, :, real], after), form(*short, state), 1e-12)


@given(count=st.integers(1, 20), kernel=st.integers(1, 5), seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_convolution_is_the_same_however_it_is_cut_and_padded(count, kernel, seed, data):
    made = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, count, 3, generator=made).double(), torch.randn(3, kernel, generator=made).double()
    expected = torch.stack([infinite_vl.convolved(row, weight) for row in x])
    tail, left, out = torch.zeros(2, kernel - 1, 3).double(), x, []
    while left.shape[1]:
        size = data.draw(st.integers(1, left.shape[1]))
        y, tail = short_convolution(left[:, :size], weight, tail)
        out.append(y)
        left = left[:, size:]
    torch.testing.assert_close(torch.cat(out, 1), expected, rtol=0, atol=1e-12)
    mask = torch.rand(2, count, generator=made) < 0.6
    y, after = short_convolution(x.masked_fill(~mask[..., None], torch.nan), weight, torch.zeros_like(tail), mask)
    for row in range(2):
        alone = infinite_vl.convolved(x[row, mask[row]], weight)
        torch.testing.assert_close(y[row, mask[row]], alone, rtol=0, atol=1e-12)
        known = torch.cat([torch.zeros(kernel - 1, 3).double(), x[row, mask[row]]])
        assert torch.equal(after[row], known[len(known) - kernel + 1 :])
    assert not y[~mask].any()


def test_an_empty_state_has_the_size_of_a_full_one():
    state = DeltaState.empty(2, 3, 4, 5, 7, 4, torch.bfloat16)
    assert (state.matrix.dtype, state.tail.dtype) == (torch.float32, torch.bfloat16)
    assert state.nbytes == 2 * 3 * 4 * 5 * 4 + 2 * 3 * 7 * 2


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({0: (2, 3, 9, 4)}, "q, k and v"), ({2: (2, 3, 8, 5)}, "q, k and v"), ({3: (2, 3, 8)}, "beta and g"),
        ({5: (2, 3, 5, 6)}, "the state"), ({0: (2, 3, 0, 6), 1: (2, 3, 0, 6), 2: (2, 3, 0, 5)}, "at least one token"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(wrong, what):
    stream = list(tokens(9))
    for at, shape in wrong.items():
        stream[at] = torch.zeros(shape).double()
    for form in (gated_delta, recurrent_delta, chunked_delta):
        with pytest.raises(ValueError, match=what):
            form(*stream)
    with pytest.raises(ValueError, match="the tail"):
        short_convolution(torch.zeros(1, 4, 3), torch.zeros(3, 4), torch.zeros(1, 2, 3))
