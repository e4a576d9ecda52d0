"""Locality-sensitive hashing by random hyperplanes: vectors that point alike get alike bits.

Two vectors an angle θ apart lie on the same side of a random hyperplane with probability 1 − θ/π (Charikar,
"Similarity estimation techniques from rounding algorithms", STOC 2002). The planes are drawn from a seed, so that the
same vectors have the same bits in every process, dtype and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BITS = 63  # that fit into a code


def hyperplanes(dim: int, bits: int, *, seed: int = 0, tables: int | None = None, like: Tensor | None = None) -> Tensor:
    """Random planes [dim, bits], or [tables, dim, bits], for vectors of the dtype and on the device of `like`.

    They are float64 for float64, else float32: half precision would put too much on the wrong side. Raises ValueError where a size makes no sense.
    """
    if dim < 1 or bits < 0 or (tables is not None and tables < 1):
        raise ValueError(f"cannot draw {tables or 1} table(s) of {bits} planes in {dim} dimensions")
    shape = (dim, bits) if tables is None else (tables, dim, bits)
    planes = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return planes.float() if like is None else planes.to(like.device, torch.promote_types(like.dtype, torch.float32))


def hash_bits(x: Tensor, planes: Tensor) -> Tensor:
    """On which side of each plane `x` [..., dim] lies: bool [..., bits], or [..., tables, bits] for several tables."""
    x = x.to(planes.dtype)
    if planes.ndim == 3:
        return torch.einsum("...d,tdb->...tb", x, planes) > 0
    return x @ planes > 0


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Number of bits in which each of a [..., m, bits] differs from each of b [..., n, bits]: int64 [..., m, n].

    With bits as ±1 the product of two vectors is bits − 2 · distance: one matrix product instead of XOR and popcount.
    """
    bits = a.shape[-1]
    agree = (2.0 * a.float() - 1) @ (2.0 * b.float() - 1).transpose(-1, -2)
    return ((bits - agree) / 2).round().long()


def bucket_codes(x: Tensor, planes: Tensor) -> Tensor:
    """The bits of x [..., dim] as one number a table: int64 [...], or [..., tables]. Without planes all share bucket 0.

    Raises ValueError for more bits than a code has.
    """
    bits = planes.shape[-1]
    if bits > MOST_BITS:
        raise ValueError(f"{bits} bits do not fit into a bucket code; use at most {MOST_BITS}, or several tables")
    return (hash_bits(x, planes).long() << torch.arange(bits, device=x.device)).sum(-1)


def share_bucket(a: Tensor, b: Tensor) -> Tensor:
    """Whether codes a [..., m, tables] and b [..., n, tables] agree in any table: bool [..., m, n]."""
    return (a[..., :, None, :] == b[..., None, :, :]).any(-1)
