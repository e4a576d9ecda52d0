"""A memory that is a matrix: the gated delta rule, and the short causal convolution that goes before it.

Source: Gated DeltaNet, arXiv 2412.06464; as InfiniteVL uses it, arXiv 2512.08829. Verbs: every token is admitted and
folded on arrival, forgetting is the decay, recall one product, and nothing has a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as fn

from .layout import Geometry

SWITCH = 64  # tokens in a call from which on chunks are faster than one token after the other
CHUNK = 64

Prepared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class DeltaState:
    """What one layer keeps of a stream; a step makes a new one and never writes into an old one.

    matrix: [B, H, D_k, D_v], float32 at least. tail: the last inputs of the convolution, [B, kernel − 1, channels].
    """

    matrix: Tensor
    tail: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both."""
        return self.matrix, self.tail

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.matrix.nbytes + self.tail.nbytes

    @classmethod
    def empty(
        cls, batch: int, heads: int, key_dim: int, value_dim: int, channels: int, kernel: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> DeltaState:  # fmt: skip
        """Of a stream that has not begun."""
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(batch, heads, key_dim, value_dim, dtype=wide, device=device),
            torch.zeros(batch, kernel - 1, channels, dtype=dtype, device=device),
        )


@dataclass(frozen=True)
class Delta:
    """The rule, as a memory of a layer: see `gated_delta`.

    heads, key_dim, value_dim: of its matrices; None: the query heads, head_dim and value_dim of the attention beside it.
    kernel: tokens that the convolution before it sees; 1: there is none.
    """

    heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    kernel: int = 4
    about: ClassVar = "Every token is folded on arrival into one matrix a head, which decays and corrects itself."

    def __post_init__(self) -> None:
        for name in ("heads", "key_dim", "value_dim", "kernel"):
            size = getattr(self, name)
            if (size is None and name != "kernel") or (isinstance(size, int) and size >= 1):
                continue
            raise ValueError(f"{name} is {size!r}; it must be a whole number, 1 or more")

    def begin(self, geometry: Geometry, first: object = None) -> DeltaState:
        """The state of a layer before the first token."""
        heads, key = self.heads or geometry.heads, self.key_dim or geometry.head_dim
        value = self.value_dim or geometry.value_dim
        channels = heads * (2 * key + value)
        return DeltaState.empty(
            geometry.batch, heads, key, value, channels, self.kernel, geometry.dtype, geometry.device
        )

    def fold(
        self, state: DeltaState, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor
    ) -> tuple[Tensor, DeltaState]:
        """See `gated_delta`."""
        out, matrix = gated_delta(q, k, v, beta, g, state.matrix)
        return out, replace(state, matrix=matrix)

    def convolve(self, state: DeltaState, x: Tensor, weight: Tensor) -> tuple[Tensor, DeltaState]:
        """See `short_convolution`: of the channels of all queries, keys and values, [B, m, heads · (2 key_dim + value_dim)]."""
        out, tail = short_convolution(x, weight, state.tail)
        return out, replace(state, tail=tail)

    def packed(self, state: DeltaState) -> dict[str, Tensor]:
        """Everything needed to go on, by name."""
        return {"matrix": state.matrix.clone(), "tail": state.tail.clone()}

    def unpacked(self, begun: DeltaState, packed: Mapping[str, Tensor]) -> DeltaState:
        """What `packed` gave. Raises ValueError where it does not fit."""
        own = {"matrix": begun.matrix, "tail": begun.tail}
        if set(packed) != set(own):
            raise ValueError(f"state holds {sorted(packed)}; expected {sorted(own)}")
        for name, x in own.items():
            if packed[name].shape != x.shape or packed[name].dtype != x.dtype:
                raise ValueError(
                    f"{name} is {packed[name].dtype} {tuple(packed[name].shape)}; this memory holds {x.dtype} {tuple(x.shape)}"
                )
        return DeltaState(packed["matrix"].clone(), packed["tail"].clone())


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decay, correct, read, token by token: S ← e^g S; S ← S + k ⊗ β (v − Sᵀk); o = Sᵀq.

    q, k [B, H, T, D_k], v [B, H, T, D_v]; beta in [0, 1] and g ≤ 0, logarithm of the decay, both [B, H, T]; state
    [B, H, D_k, D_v], None: zeros. Returns o [B, H, T, D_v] in the dtype of v, and the state, float32 at least. Keys are
    to come with length 1 (`unit`). A token with beta = g = 0 leaves the state as it is. Any cut of a stream gives the
    same, and so do the two forms, between which T decides. Raises ValueError for shapes that do not fit.
    """
    form = recurrent_delta if q.ndim == 4 and q.shape[2] <= SWITCH else chunked_delta
    return form(q, k, v, beta, g, state)


def recurrent_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_delta`, one token after the other: for decoding, and what the chunks are measured against.

    The state is read once a token, by key and query together: with e the correction, o = e^g Sᵀq + (k·q) e.
    """
    q, k, v, beta, g, s, dtype = *_prepared(q, k, v, beta, g, state), v.dtype
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, beta, g, s))
    alpha, beta = g.exp()[..., None, None], beta[..., None, None]
    asked, met, columns = torch.stack([k, q], 3), (k * q).sum(-1)[..., None, None], k[..., None]
    out = []
    for t in range(q.shape[2]):
        decay, read = alpha[:, :, t], asked[:, :, t] @ s
        read = read * decay
        error = beta[:, :, t] * (v[:, :, t, None] - read[:, :, :1])
        out.append(torch.addcmul(read[:, :, 1:], met[:, :, t], error))
        if tracked:
            s = torch.addcmul(s * decay, columns[:, :, t], error)
        else:  # the first product makes a matrix of our own, the others write into it
            s = (s.mul_(decay) if t else s * decay).addcmul_(columns[:, :, t], error)
    return torch.cat(out, 2).to(dtype), s


def chunked_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`gated_delta`, `chunk` tokens at once: for training and long calls.

    Within a chunk the corrections solve a triangular system, as each depends on those before it; from chunk to chunk
    the state goes on. Decays are formed as exponentials of differences, none above 1. Source: arXiv 2412.06464, section
    3.3.
    """
    q, k, v, beta, g, s, dtype = *_prepared(q, k, v, beta, g, state), v.dtype
    lead, tokens = q.shape[:2], q.shape[2]
    chunk = min(chunk, tokens)
    short = -tokens % chunk

    def pieces(x: Tensor) -> Tensor:
        """[B, H, T, …] → [chunks, B·H, chunk, …], filled up with nothing."""
        filled = fn.pad(x, (*([0, 0] * (x.ndim - 3)), 0, short))
        return filled.flatten(0, 1).unflatten(1, (-1, chunk)).transpose(0, 1)

    q, k, v, beta, g = (pieces(x) for x in (q, k, v, beta, g))
    # In float64, as a difference of two long sums of float32 would have lost what lies between them.
    log = g.double().cumsum(-1)
    past = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    between = (log[..., :, None] - log[..., None, :]).to(s.dtype).masked_fill(~past, -torch.inf).exp()
    since, until = log.to(s.dtype).exp()[..., None], (log[..., -1:] - log).to(s.dtype).exp()[..., None]
    felt = (beta[..., None] * (k @ k.mT) * between).tril(-1)  # of each earlier token's correction in a later one
    known = torch.cat([beta[..., None] * v, (beta[..., None] * since) * k], -1)
    values, keys = torch.linalg.solve_triangular(felt, known, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    seen, reading, writing, decay = (q @ k.mT) * between, since * q, (until * k).mT, since[..., -1:, :]
    s, out = s.flatten(0, 1), []
    for n in range(len(q)):
        error = torch.baddbmm(values[n], keys[n], s, alpha=-1)
        out.append(torch.baddbmm(reading[n] @ s, seen[n], error))
        s = torch.baddbmm(decay[n] * s, writing[n], error)
    return torch.cat(out, 1).unflatten(0, lead)[:, :, :tokens].to(dtype), s.unflatten(0, lead)


def unit(x: Tensor) -> Tensor:
    """`x` [..., D] divided by the root of its squared length plus 1e-6, in its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def short_convolution(x: Tensor, weight: Tensor, tail: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each channel over its last tokens: y_t = Σ_j w_j x_{t − K + 1 + j}, and the tail for the next call.

    x [B, T, C]; weight [C, K]; tail [B, K − 1, C], what came before, zeros at the start. mask: bool [B, T], False for
    padding, which may stand anywhere: it is passed over, and gives zeros. Returns y [B, T, C] and the new tail.
    """
    kernel, tokens = weight.shape[1], x.shape[1]
    if x.ndim != 3 or tuple(tail.shape) != (x.shape[0], kernel - 1, x.shape[2]):
        raise ValueError(
            f"x is {tuple(x.shape)}, the tail {tuple(tail.shape)}; expected [B, T, C] and [B, {kernel - 1}, C]"
        )
    order = None if mask is None else (~mask).byte().argsort(dim=1, stable=True)  # what is real comes first
    fresh = x if order is None else x.take_along_dim(order[..., None], 1)
    known = torch.cat([tail, fresh.to(tail.dtype)], 1)
    wide = known.to(torch.promote_types(known.dtype, torch.float32))
    y = wide[:, :tokens] * weight[:, 0]
    for tap in range(1, kernel):
        y = torch.addcmul(y, wide[:, tap : tap + tokens], weight[:, tap].to(wide.dtype))
    y = y.to(x.dtype)
    if mask is None or order is None:
        return y, known[:, tokens:].clone()
    last = mask.sum(1, keepdim=True) + torch.arange(kernel - 1, device=x.device)
    y = y.take_along_dim(order.argsort(1)[..., None], 1).masked_fill(~mask[..., None], 0)
    return y, known.take_along_dim(last[..., None], 1)


def _prepared(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None) -> Prepared:
    """All in the dtype of the state, which is float32 at least; a state if there is none."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; expected [B, H, T, D_k] twice and "
            "[B, H, T, D_v], at least one token"
        )
    if beta.shape != q.shape[:3] or g.shape != q.shape[:3]:
        raise ValueError(
            f"beta and g are {tuple(beta.shape)} and {tuple(g.shape)}; expected one number a head and token, {tuple(q.shape[:3])}"
        )
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"the state is {tuple(state.shape)}; these tokens need {shape}")
    wide = torch.promote_types(v.dtype, torch.float32)
    s = torch.zeros(shape, dtype=wide, device=q.device) if state is None else state.to(wide)
    return q.to(wide), k.to(wide), v.to(wide), beta.to(wide), g.to(wide), s
