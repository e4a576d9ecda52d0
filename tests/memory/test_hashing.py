"""Random hyperplanes: what the bits promise about angles, and that distances and buckets are what they say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.memory.hashing import MOST_BITS, bucket_codes, hamming, hash_bits, hyperplanes, share_bucket


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("angle", [0.1, 0.5, math.pi / 2, 2.5])
def test_bits_collide_with_probability_one_minus_the_angle_over_pi(angle):
    pairs, bits = 2000, 64
    a = torch.nn.functional.normalize(drawn(pairs, 16), dim=-1)
    side = drawn(pairs, 16, seed=1)
    side = torch.nn.functional.normalize(side - (side * a).sum(-1, keepdim=True) * a, dim=-1)
    b = a * math.cos(angle) + side * math.sin(angle)
    planes = hyperplanes(16, bits, like=a)
    same = (hash_bits(a, planes) == hash_bits(b, planes)).double().mean()
    assert abs(float(same) - (1 - angle / math.pi)) < 0.02


@given(m=st.integers(1, 5), n=st.integers(1, 5), bits=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_distance_is_the_popcount_of_the_exclusive_or(m, n, bits, seed):
    a, b = drawn(2, m, bits, seed=seed) > 0, drawn(2, n, bits, seed=seed + 1) > 0
    counted = [[[int((x ^ y).sum()) for y in bs] for x in as_] for as_, bs in zip(a, b, strict=True)]
    assert hamming(a, b).tolist() == counted


def test_the_same_seed_gives_the_same_planes_in_any_dtype():
    exact = hyperplanes(8, 12, seed=3, like=drawn(1))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(hyperplanes(8, 12, seed=3, like=torch.empty(0, dtype=dtype)), exact.float())
    assert torch.equal(hyperplanes(8, 12, seed=3), exact.float())
    assert not torch.equal(hyperplanes(8, 12, seed=4, like=exact), exact)


def test_half_precision_is_hashed_in_full():
    x, planes = drawn(50, 8).to(torch.bfloat16), hyperplanes(8, 12)
    assert torch.equal(hash_bits(x, planes), hash_bits(x.float(), planes))


def test_a_code_is_its_bits_and_tables_have_planes_of_their_own():
    x, planes = drawn(3, 5, 8), hyperplanes(8, 6, tables=4, like=drawn(1))
    bits, codes = hash_bits(x, planes), bucket_codes(x, planes)
    assert bits.shape == (3, 5, 4, 6) and codes.shape == (3, 5, 4)
    for table in range(4):
        assert torch.equal(bits[:, :, table], hash_bits(x, planes[table]))
        assert torch.equal(codes[:, :, table], bucket_codes(x, planes[table]))
    first = sum(2**place for place, bit in enumerate(bits[0, 0, 0].tolist()) if bit)
    assert int(codes[0, 0, 0]) == first
    assert len({tuple(code) for code in codes.reshape(-1, 4).T.tolist()}) == 4


def test_without_bits_everything_shares_one_bucket():
    x = drawn(2, 7, 8)
    codes = bucket_codes(x, hyperplanes(8, 0, tables=2, like=x))
    assert bool((codes == 0).all()) and bool(share_bucket(codes, codes).all())


def test_more_tables_share_more_and_never_less():
    a = drawn(400, 8)
    b = a + 0.3 * drawn(400, 8, seed=1)
    shares = []
    for tables in (1, 4, 16):
        planes = hyperplanes(8, 6, tables=tables, like=a)
        shares.append(float(share_bucket(bucket_codes(a, planes), bucket_codes(b, planes)).diagonal().double().mean()))
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.95


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="planes"):
        hyperplanes(0, 4)
    with pytest.raises(ValueError, match="planes"):
        hyperplanes(4, 4, tables=0)
    with pytest.raises(ValueError, match=f"at most {MOST_BITS}"):
        bucket_codes(drawn(2, 4), hyperplanes(4, MOST_BITS + 1, like=drawn(1)))
