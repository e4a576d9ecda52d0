"""Rotary positions whose angles stay exact at any distance from the start of a stream.

A rotary embedding turns channel pair `c` of a key or query at position `p` by the angle `p · inv_freq[c]`
(RoFormer, arXiv 2104.09864). Computed naively the product loses one digit for every factor of ten in `p`. Here a
position is split into a block of 1024 and a rest: the block's angle is reduced modulo 2π in integer arithmetic, once
per block, and the rest is small, so position 10^18 is as exact as position 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Style = Literal["half", "interleaved"]

BLOCK = 1024
KEPT_BLOCKS = 4
MANY = 1 << 14  # elements from which it pays to rotate with fewer passes and more calls
# 1 / (2π) as a fraction of 2**256: enough for 62-bit positions times 53-bit frequencies with 140 bits to spare.
_PI_DIGITS = 314159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798
_PI_SCALE = 10**101
_TURN_BITS = 256
_INVERSE_TURN = (_PI_SCALE << _TURN_BITS) // (2 * _PI_DIGITS)


@dataclass(frozen=True)
class Rope:
    """How a model rotates its queries and keys.

    theta: base of the geometric series of frequencies; ignored when `inv_freq` is given.
    dim: number of leading channels that are rotated (partial rotary); None rotates the whole head.
    style: "half" pairs channel c with c + dim/2 (Llama, NeoX); "interleaved" pairs 2c with 2c + 1 (GPT-J, GLM).
    inv_freq: explicit frequencies, dim/2 of them, as a scaled model has them (linear, llama3, yarn, longrope, dynamic).
    scale: factor on cosine and sine (the attention factor of yarn and longrope).
    axes: for positions with several coordinates, which of them turns each channel pair: 0 is time, the others are a
    token's `coordinates` in their order (rows, columns). None: every pair turns with time.
    """

    theta: float = 10_000.0
    dim: int | None = None
    style: Style = "half"
    inv_freq: tuple[float, ...] | None = None
    scale: float = 1.0
    axes: tuple[int, ...] | None = None

    @classmethod
    def axial(cls, dims: Sequence[int], theta: float = 10_000.0, style: Style = "interleaved") -> Rope:
        """One block of channels an axis, each with its own series θ^(−2i/d): (44, 42, 42) is Wan's time, row, column.

        dims: channels of each axis, even. Source: Wan 2.1's rotary embedding, as in diffusers.
        """
        series = tuple(theta ** (-2 * c / dim) for dim in dims for c in range(dim // 2))
        return cls(inv_freq=series, style=style, axes=tuple(a for a, dim in enumerate(dims) for _ in range(dim // 2)))

    @property
    def coordinates(self) -> int:
        """Number of position axes besides time."""
        return max(self.axes, default=0) if self.axes else 0

    def __post_init__(self) -> None:
        if self.style not in ("half", "interleaved"):
            raise ValueError(f"Rope.style is {self.style!r}; it must be 'half' or 'interleaved'")
        if self.inv_freq is None and not self.theta > 0:
            raise ValueError(f"Rope.theta is {self.theta}; it must be positive")
        if self.dim is not None and (self.dim < 2 or self.dim % 2):
            raise ValueError(f"Rope.dim is {self.dim}; it must be an even number of channels, at least 2")
        if self.inv_freq is not None:
            object.__setattr__(self, "inv_freq", tuple(float(f) for f in self.inv_freq))
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(int(axis) for axis in self.axes))
            if self.inv_freq is None or len(self.axes) != len(self.inv_freq) or min(self.axes) < 0:
                raise ValueError(
                    "Rope.axes names an axis (0 is time) for every entry of inv_freq; give both, equally long"
                )

    def rotated(self, head_dim: int) -> int:
        """Number of channels that are rotated in a head of `head_dim` channels."""
        dim = 2 * len(self.inv_freq) if self.inv_freq is not None and self.dim is None else self.dim or head_dim
        if dim > head_dim or dim % 2:
            raise ValueError(f"Rope rotates {dim} channels, but the head has {head_dim}; it must be even and no more")
        if self.inv_freq is not None and 2 * len(self.inv_freq) != dim:
            raise ValueError(f"Rope.inv_freq has {len(self.inv_freq)} frequencies; {dim} channels need {dim // 2}")
        return dim

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        """The frequencies in radians per position, one for each rotated pair of channels."""
        dim = self.rotated(head_dim)
        if self.inv_freq is not None:
            return self.inv_freq
        return tuple(self.theta ** (-2 * c / dim) for c in range(dim // 2))


def reduced_angle(position: int, frequency: float) -> float:
    """`position · frequency` modulo 2π, between −π and π, to within 6e−16 for any integer position."""
    numerator, denominator = frequency.as_integer_ratio()
    whole, half = 1 << _TURN_BITS, 1 << (_TURN_BITS - 1)
    # Half a turn either way: the nearer an angle is to zero, the finer are the numbers that it is rounded to.
    turns = (position * numerator * _INVERSE_TURN // denominator + half) % whole - half
    return math.tau * (turns / whole)


@lru_cache(maxsize=64)
def _table(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """Phases of the positions 0..BLOCK-1, complex128 [BLOCK, pairs]."""
    angle = torch.outer(torch.arange(BLOCK, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64))
    return torch.polar(torch.ones_like(angle), angle).to(device)


@lru_cache(maxsize=64)
def _block_phase(frequencies: tuple[float, ...], block: int, device: torch.device) -> Tensor:
    """Phase of position `block · BLOCK`, complex128 [pairs]."""
    angle = torch.tensor([reduced_angle(block * BLOCK, f) for f in frequencies], dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(device)


class Rotary:
    """A `Rope` bound to a head size, a dtype and a device: gives cosines and sines and applies them.

    Cosine and sine come out over all `head_dim` channels (1 and 0 where nothing rotates), the sine with the sign that
    lets `rotate` add the swapped channels. Half-precision models rotate in float32, as rounding twice would show.
    """

    def __init__(self, rope: Rope, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = rope.frequencies(head_dim)
        self.scale = rope.scale
        self.device = device
        self.dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        dim, pairs = rope.rotated(head_dim), len(self.frequencies)
        channel = torch.arange(dim)
        if rope.style == "half":
            pair, partner, first = channel % pairs, (channel + pairs) % dim, channel < pairs
        else:
            pair, partner, first = channel // 2, channel ^ 1, channel % 2 == 0
        rest = torch.arange(dim, head_dim)
        self.swap = torch.cat([partner, rest]).to(device)
        self.roll = pairs if rope.style == "half" and dim == head_dim else 0
        self.pairs_adjacent = rope.style == "interleaved" and dim == head_dim
        self._pair = pair.to(device)
        self._sign = (torch.where(first, -1.0, 1.0).double() * self.scale).to(device)
        self._rest = head_dim - dim
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._stretches: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.coordinates = rope.coordinates
        axes = None if rope.axes is None else torch.tensor(rope.axes)[pair]
        self._axes = None if axes is None else torch.cat([axes, axes.new_zeros(self._rest)]).to(device)

    def span(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions start..start+length-1, each [length, head_dim]; do not write to them."""
        block, offset = divmod(start, BLOCK)
        pieces = []
        while length > 0:
            take = min(length, BLOCK - offset)
            cos, sin = self._block(block)
            pieces.append((cos[offset : offset + take], sin[offset : offset + take]))
            block, offset, length = block + 1, 0, length - take
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([cos for cos, _ in pieces]), torch.cat([sin for _, sin in pieces])

    def _block(self, block: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of one block of positions; the last few blocks are kept, as streams move on slowly."""
        if block not in self._blocks:
            while len(self._blocks) >= KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            phase = _block_phase(self.frequencies, block, self.device)
            self._blocks[block] = self._expand(_table(self.frequencies, self.device) * phase)
        return self._blocks[block]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of integer positions of any shape [...], each [..., head_dim].

        A rope with several axes takes [..., axes] and gives [..., head_dim].
        """
        if self._axes is None:
            return self._on_axis(positions)
        cos, sin = self._on_axis(positions[..., 0])
        for axis in range(1, self.coordinates + 1):
            own_cos, own_sin = self._on_axis(positions[..., axis])
            cos, sin = torch.where(self._axes == axis, own_cos, cos), torch.where(self._axes == axis, own_sin, sin)
        return cos, sin

    def _on_axis(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one axis: looked up where positions are near each other, as those of a memory mostly are."""
        low, high = torch.stack(positions.aminmax()).tolist() if positions.numel() else (0, 0)
        first, last = low // BLOCK, high // BLOCK
        if (last - first) * BLOCK > positions.numel():
            different, which = positions.unique(return_inverse=True)
            cos, sin = self._expand(self._phase(different))
            return cos[which], sin[which]
        cos, sin = self._blocks_of(first, last)
        places = (positions - first * BLOCK).to(self.device)
        return cos[places], sin[places]

    def _blocks_of(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of several blocks of positions; the last few stretches are kept."""
        if first == last:
            return self._block(first)
        if (first, last) not in self._stretches:
            while len(self._stretches) >= KEPT_BLOCKS:
                del self._stretches[next(iter(self._stretches))]
            table, blocks = _table(self.frequencies, self.device), range(first, last + 1)
            pieces = [self._expand(table * _block_phase(self.frequencies, b, self.device)) for b in blocks]
            cos, sin = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            self._stretches[first, last] = cos, sin
        return self._stretches[first, last]

    def _phase(self, positions: Tensor) -> Tensor:
        block, offset = positions // BLOCK, positions % BLOCK
        which, inverse = block.unique(return_inverse=True)
        phases = torch.stack([_block_phase(self.frequencies, int(b), self.device) for b in which.tolist()])
        return _table(self.frequencies, self.device)[offset] * phases[inverse]

    def _expand(self, phase: Tensor) -> tuple[Tensor, Tensor]:
        cos = phase.real[..., self._pair] * self.scale
        sin = phase.imag[..., self._pair] * self._sign
        if self._rest:
            cos = torch.cat([cos, cos.new_ones(*cos.shape[:-1], self._rest)], -1)
            sin = torch.cat([sin, sin.new_zeros(*sin.shape[:-1], self._rest)], -1)
        return cos.to(self.dtype), sin.to(self.dtype)

    def swapped(self, x: Tensor) -> Tensor:
        """`x` [..., head_dim] with the two channels of every rotated pair exchanged."""
        return x.roll(self.roll, -1) if self.roll else x.index_select(-1, self.swap)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [..., head_dim] turned by the angles whose cosine and sine, broadcast to it, are given; same dtype as `x`."""
        if x.numel() >= MANY and x.stride(-1) == 1:
            if self.pairs_adjacent and all(step % 2 == 0 for step in (*x.stride()[:-1], x.storage_offset())):
                # Adjacent channels are complex numbers, and one product turns them in one pass, however tokens and heads lie.
                phase = torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())
                turned = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2))) * phase
                return torch.view_as_real(turned).flatten(-2).to(x.dtype)
            if self.roll and x.dtype == cos.dtype:
                half, turned, cos, sin = self.roll, x.new_empty(x.shape), cos.expand_as(x), sin.expand_as(x)
                for own, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
                    torch.mul(x[..., own], cos[..., own], out=turned[..., own]).addcmul_(x[..., other], sin[..., own])
                return turned
        turned = torch.addcmul(x * cos, self.swapped(x), sin)
        return turned if turned.dtype == x.dtype else turned.to(x.dtype)
