"""Angles are as exact at position 10^15 as at 10, in every style."""

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.rope import BLOCK, Rope, Rotary, reduced_angle

from .oracle import rotated


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**18), st.floats(1e-9, 1.0))
def test_reduced_angles_are_exact(position, frequency):
    with mpmath.workdps(60):
        expected = mpmath.fmod(mpmath.mpf(position) * mpmath.mpf(frequency), 2 * mpmath.pi)
        error = abs(expected - mpmath.mpf(reduced_angle(position, frequency)))
        assert min(error, 2 * mpmath.pi - error) < 6e-16


@pytest.mark.parametrize("start", [0, 5, BLOCK - 3, 10**6, 10**9 + 7, 10**15 - 1])
@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_span_and_at_agree_with_high_precision(start, style):
    rope = Rope(theta=10_000.0, dim=8, style=style, scale=1.25)
    rotary = Rotary(rope, 12, torch.float64, torch.device("cpu"))
    cos, sin = rotary.span(start, 2 * BLOCK)
    places = start + torch.arange(2 * BLOCK)
    other_cos, other_sin = rotary.at(places)
    assert torch.equal(cos, other_cos) and torch.equal(sin, other_sin)
    for offset in (0, 1, BLOCK, 2 * BLOCK - 1):
        for channel in range(8):
            pair = channel % 4 if style == "half" else channel // 2
            with mpmath.workdps(60):
                angle = mpmath.mpf(start + offset) * mpmath.mpf(rope.frequencies(12)[pair])
                assert abs(1.25 * mpmath.cos(angle) - float(cos[offset, channel])) < 1e-14
                assert abs(1.25 * mpmath.sin(angle) - abs(float(sin[offset, channel]))) < 1e-14 or mpmath.sin(angle) < 0
    assert torch.equal(cos[:, 8:], torch.ones(2 * BLOCK, 4).double())
    assert not sin[:, 8:].any()


@pytest.mark.parametrize("axes", [None, (0, 2, 1)])
def test_positions_are_the_same_alone_and_beside_any_others(axes):
    rotary = Rotary(Rope(dim=6, axes=axes, inv_freq=(1.0, 0.3, 0.01)), 8, torch.float64, torch.device("cpu"))
    coordinates = [0] if axes is None else [0, 1, 2]
    for places in ([3, 3, 5, -1], [BLOCK - 1, BLOCK, *range(2 * BLOCK)], [-2 * BLOCK, 7, 10**12, 7]):
        every = torch.tensor(places)
        every = every if axes is None else torch.stack([every + axis for axis in coordinates], -1)
        alone = [torch.cat(parts) for parts in zip(*(rotary.at(one[None]) for one in every), strict=True)]
        for got, expected in zip(rotary.at(every), alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [4, 8, None])
def test_rotation_equals_the_pairwise_definition(style, dim):
    rope = Rope(dim=dim, style=style, scale=1.5)
    rotary = Rotary(rope, 8, torch.float64, torch.device("cpu"))
    x = torch.randn(20, 8, dtype=torch.float64)
    expected = rotated(x, list(range(100, 120)), list(rope.frequencies(8)), style, 1.5)
    torch.testing.assert_close(rotary.rotate(x, *rotary.span(100, 20)), expected, rtol=0, atol=1e-12)


def test_half_precision_rotates_in_single():
    rotary = Rotary(Rope(), 64, torch.bfloat16, torch.device("cpu"))
    exact = Rotary(Rope(), 64, torch.float64, torch.device("cpu"))
    x = torch.randn(1000, 64).bfloat16()
    turned = rotary.rotate(x, *rotary.span(10**7, 1000))
    assert turned.dtype is torch.bfloat16
    expected = exact.rotate(x.double(), *exact.span(10**7, 1000))
    rounded_once = (expected - expected.bfloat16().double()).abs().max()
    assert (turned.double() - expected).abs().max() <= rounded_once * 1.01


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"style": "quarter"}, "'half' or 'interleaved'"), ({"theta": 0.0}, "positive"), ({"dim": 5}, "even number")],
)
def test_ropes_that_cannot_be(arguments, match):
    with pytest.raises(ValueError, match=match):
        Rope(**arguments)
