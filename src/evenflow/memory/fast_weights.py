"""A memory that is a small network, trained on the stream while it runs; and a convolution over frames before it.

Source: Spatial-TTT, arXiv 2603.12255; the rule is that of LaCT, arXiv 2505.23884. Verbs: every token is admitted; it is
folded once, with its chunk, by a step of ascent; forgetting is what rows of constant length leave no room for; recall is
the network's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as fn

from .layout import Geometry
from .orthogonal import orthogonal

Weights = tuple[Tensor, Tensor, Tensor]
# Of the five steps of Newton and Schulz that bring all singular values near 1: one polynomial each.
STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
PENDING = ("keys", "values", "rates", "momenta")


@dataclass(frozen=True)
class FastWeights:
    """The rule. chunk: tokens learned in one step. muon: whether a step is made orthogonal first. prenorm: whether
    steps add up in weights that are not normalised; the others are rows of those, brought to their first length.

    The paper trained with both on; the released loader runs with both off, as is the default here.
    """

    chunk: int = 2648
    muon: bool = False
    prenorm: bool = False
    about: ClassVar = "Every token is learned once, with its chunk, by a step of ascent on a small network."

    def __post_init__(self) -> None:
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk!r}; it must be a whole number of tokens, 1 or more")

    def begin(self, geometry: Geometry, first: Weights | None = None) -> FastState:
        """The state of a layer before the first token, from its learned first weights."""
        if first is None:
            raise ValueError("fast weights begin from what the model learned; give `first`, (W0, W1, W2) of each layer")
        return FastState.begin(_each(lambda w: w.detach().to(geometry.device), first), geometry.batch)

    def fold(
        self, state: FastState, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momenta: Tensor
    ) -> tuple[Tensor, FastState]:
        """See `feed`."""
        return feed(self, state, q, k, v, rates, momenta)

    def packed(self, state: FastState) -> dict[str, Tensor]:
        """Everything needed to go on, by name."""
        waiting = dict(zip(PENDING, state.joined(), strict=True)) if state.pending else {}
        return {name: x.clone() for name, x in state.fixed.items()} | waiting

    def unpacked(self, begun: FastState, packed: Mapping[str, Tensor]) -> FastState:
        """What `packed` gave, of a stream that began with `begun`. Raises ValueError where it does not fit."""
        names = set(begun.fixed)
        if set(packed) not in (names, names | set(PENDING)):
            raise ValueError(
                f"state holds {sorted(packed)}; expected {sorted(names)}, and {PENDING} of tokens that wait"
            )
        for name, x in begun.fixed.items():
            if packed[name].shape != x.shape or packed[name].dtype != x.dtype:
                raise ValueError(
                    f"{name} is {packed[name].dtype} {tuple(packed[name].shape)}; this memory holds {x.dtype} {tuple(x.shape)}"
                )

        def three(name: str) -> Weights:
            return packed[f"{name}.0"].clone(), packed[f"{name}.1"].clone(), packed[f"{name}.2"].clone()

        pending = (tuple(packed[name].clone() for name in PENDING),) if "keys" in packed else ()
        for keys, values, rates, momenta in pending:
            _check(begun, keys, keys, values, rates, momenta)
        fresh = FastState(three("weights"), three("main"), three("norms"), three("momentum"), pending)
        if fresh.waiting > self.chunk:
            raise ValueError(f"{fresh.waiting} tokens wait; a chunk of this memory is {self.chunk}")
        return fresh


@dataclass(frozen=True, eq=False)
class FastState:
    """Fast weights of one layer and stream; feeding makes a new one and never writes into an old one.

    weights: W0, W2 [B, H, hidden, d] and W1 [B, H, d, hidden], in the order W0, W1, W2, float32 at least. main: what
    steps are added to. norms: first length of each row. momentum: the step before. pending: pieces of keys, values
    [B, H, n, d], rates [B, H, n, 3] and momenta [B, H, n] that were not yet learned.
    """

    weights: Weights
    main: Weights
    norms: Weights
    momentum: Weights
    pending: tuple[tuple[Tensor, ...], ...] = ()

    @classmethod
    def begin(cls, weights: Weights, batch: int) -> FastState:
        """From learned first weights [H, hidden, d], [H, d, hidden] and [H, hidden, d]."""
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        first = _each(lambda w: w.to(wide).expand(batch, *w.shape), weights)
        return cls(first, first, _each(lambda w: w.norm(dim=-1, keepdim=True), first), _each(torch.zeros_like, first))

    @property
    def waiting(self) -> int:
        """Tokens not yet learned."""
        return sum(piece[0].shape[2] for piece in self.pending)

    @property
    def fixed(self) -> dict[str, Tensor]:
        """What is as large at any time, by name."""
        groups = {"weights": self.weights, "main": self.main, "norms": self.norms, "momentum": self.momentum}
        return {f"{name}.{n}": x for name, group in groups.items() for n, x in enumerate(group)}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept; what is shared stands here more than once."""
        return (*self.fixed.values(), *(x for piece in self.pending for x in piece))

    @property
    def nbytes(self) -> int:
        """Bytes of all, what is shared counted once."""
        return _bytes([self])

    def joined(self) -> tuple[Tensor, ...]:
        """Keys, values, rates and momenta of all that waits."""
        return tuple(torch.cat(parts, 2) for parts in zip(*self.pending, strict=True))


def feed(
    rule: FastWeights, state: FastState, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momenta: Tensor
) -> tuple[Tensor, FastState]:
    """Read with the weights that hold at each token, and learn what is a chunk by then.

    q, k, v [B, H, T, d], rates [B, H, T, 3] for W0, W1, W2 in this order, momenta in [0, 1], [B, H, T]. Returns
    [B, H, T, d] in the dtype of q, and the new state. A full chunk is learned when the token behind it comes, so that none
    is ever read by its own tokens, and any cut gives the same. Raises ValueError for shapes that do not fit.
    """
    _check(state, q, k, v, rates, momenta)
    at, out = 0, []
    while at < q.shape[2]:
        if state.waiting == rule.chunk:
            state = learned(rule, state)
        part = slice(at, at + rule.chunk - state.waiting)
        out.append(read(state.weights, q[:, :, part]))
        state = replace(state, pending=(*state.pending, tuple(x[:, :, part].clone() for x in (k, v, rates, momenta))))
        at = part.stop
    return torch.cat(out, 2), state


def read(weights: Weights, x: Tensor) -> Tensor:
    """W1 (silu(W0 x) ⊙ W2 x) for x [B, H, T, d], in its dtype."""
    w0, w1, w2 = weights
    wide = x.to(w0.dtype)
    return ((fn.silu(wide @ w0.mT) * (wide @ w2.mT)) @ w1.mT).to(x.dtype)


def learned(rule: FastWeights, state: FastState) -> FastState:
    """The state after one step on all that waits."""
    k, v, rates, momenta = (x.to(state.weights[0].dtype) for x in state.joined())
    share = momenta.mean(2)[..., None, None]
    momentum = _each(lambda g, m: g + share * m, ascent(state.weights, k, v, rates), state.momentum)
    step = _each(lambda m: orthogonal(m, STEPS).to(m.dtype), momentum) if rule.muon else momentum
    main = _each(torch.add, state.main, step)
    weights = _each(lambda w, n: w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n, main, state.norms)
    main = main if rule.prenorm else weights
    return replace(state, weights=weights, main=main, momentum=momentum, pending=())


def ascent(weights: Weights, k: Tensor, v: Tensor, rates: Tensor) -> Weights:
    """Gradients of Σ rate ⟨f(k), v⟩ with respect to each weight, with its own rate: k, v [B, H, T, d], rates [B, H, T, 3]."""
    w0, w1, w2 = weights
    a, b, g = k @ w0.mT, k @ w2.mT, v @ w1
    gate, on = a.sigmoid(), fn.silu(a)
    rate0, rate1, rate2 = (rates[..., n : n + 1] for n in range(3))
    slope = gate * (1 + a * (1 - gate))
    return (
        (rate0 * g * b * slope).mT @ k,
        (rate1 * v).mT @ (on * b),
        (rate2 * g * on).mT @ k,
    )


def _each(function: Callable[..., Tensor], *weights: Weights) -> Weights:
    """`function` of each of the three."""
    first, second, third = (function(*parts) for parts in zip(*weights, strict=True))
    return first, second, third


def _bytes(states: Iterable[FastState]) -> int:
    return sum({id(x): x.nbytes for state in states for x in state.tensors}.values())


def _check(state: FastState, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momenta: Tensor) -> None:
    batch, heads, _, dim = state.weights[0].shape
    tokens = q.shape[2] if q.ndim == 4 else 0
    for name, x, shape in (
        ("q", q, (batch, heads, tokens, dim)), ("k", k, (batch, heads, tokens, dim)), ("v", v, (batch, heads, tokens, dim)),
        ("rates", rates, (batch, heads, tokens, 3)), ("momenta", momenta, (batch, heads, tokens)),
    ):  # fmt: skip
        if tuple(x.shape) != shape or not tokens:
            raise ValueError(f"{name} is {tuple(x.shape)}; expected {shape}, and at least one token")


class FastSession:
    """One stream's fast weights in one layer, with the operations of every session.

    undo: chunks that `truncate` may go back over; for each, the weights before it was learned and its tokens are kept.
    """

    def __init__(self, rule: FastWeights, weights: Weights, batch: int = 1, undo: int = 0) -> None:
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of chunks, 0 or more")
        self.rule, self.batch, self.undo = rule, batch, undo
        self._first = _each(lambda w: w.detach().clone(), weights)  # whoever trains them goes on writing into them
        self.reset()

    def reset(self) -> None:
        """Forget everything: the weights are the first ones again."""
        self.state, self.position = FastState.begin(self._first, self.batch), 0
        self._full: tuple[FastState, ...] = ()  # as they were when a chunk was complete, before it was learned

    @property
    def nbytes(self) -> int:
        """Bytes of weights, tokens that wait, and what is kept for undoing."""
        return _bytes([self.state, *self._full])

    @torch.no_grad()
    def feed(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momenta: Tensor, *, commit: bool = True) -> Tensor:
        """As the function `feed`; with `commit` False nothing is learned or kept. NaN is refused, and leaves no trace."""
        if not all(bool(x.isfinite().all()) for x in (k, v, rates, momenta)):
            raise ValueError("keys, values, rates or momenta hold NaN or infinity; nothing was learned of them")
        _check(self.state, q, k, v, rates, momenta)
        state, full, out, at = self.state, self._full, [], 0
        while at < q.shape[2]:  # piece by piece, so that every full chunk is seen
            part = slice(at, at + (self.rule.chunk - state.waiting or self.rule.chunk))
            y, state = feed(self.rule, state, *(x[:, :, part] for x in (q, k, v, rates, momenta)))
            if self.undo and state.waiting == self.rule.chunk:
                full = (*full, state)[-self.undo - 1 :]
            out.append(y)
            at = part.stop
        if commit:
            self.state, self._full, self.position = state, full, self.position + q.shape[2]
        return torch.cat(out, 2)

    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens, bit for bit. Raises ValueError, with the reason, where too much was learned since."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or n > self.position:
            raise ValueError(f"cannot undo {n!r} tokens; {self.position} were fed")
        state, full, left = self.state, self._full, n
        if full and full[-1] is state:
            full = full[:-1]
        while left and left >= state.waiting and full:
            left -= state.waiting
            state, full = full[-1], full[:-1]
        if left > state.waiting:
            raise ValueError(
                f"cannot undo {n} tokens: a chunk of them was learned, and {self.undo} are kept as they were before; open "
                "with a larger undo, fork before, or try with commit=False"
            )
        keep = state.waiting - left
        if left:
            parts = tuple(x[:, :, :keep] for x in state.joined())
            state = replace(state, pending=(parts,) if keep else ())
        elif keep == self.rule.chunk and self.undo:
            full = (*full, state)
        self.state, self._full, self.position = state, full, self.position - n

    def fork(self) -> FastSession:
        """An independent copy, which costs nothing: states are never written to."""
        return copy.copy(self)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit, except what undoing needs."""
        return self.rule.packed(self.state) | {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        packed = {name: x for name, x in state.items() if name != "position"}
        fresh = self.rule.unpacked(FastState.begin(self._first, self.batch), packed)
        if "position" not in state:
            raise ValueError("state does not fit: position is missing")
        self.state, self._full, self.position = fresh, (), int(state["position"])


def frame_convolution(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each channel over its neighbours in time, row and column; edges are repeated. Looks one frame ahead.

    x: the next frames of a video, [B, t, h, w, C], one at least; weight [C, 3, 3, 3]; tail: None at its start. Returns
    the frames whose successors have come, [B, t (t − 1 at the start), h, w, C], and the tail, the last two that came,
    [B, 2, h, w, C] (the first twice, as long as there is one); `flushed` gives the last.
    """
    if x.ndim != 5 or not x.shape[1] or tuple(weight.shape) != (x.shape[-1], 3, 3, 3):
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; expected [B, t, h, w, C], [C, 3, 3, 3]")
    if tail is not None and (tail.shape[0] != x.shape[0] or tail.shape[2:] != x.shape[2:]):
        raise ValueError(f"frames are {tuple(x.shape)}; those before were {tuple(tail.shape)}")
    known = torch.cat([x[:, :1], x] if tail is None else [tail, x], 1)
    return _convolved(known, weight), known[:, -2:].clone()


def flushed(weight: Tensor, tail: Tensor) -> Tensor:
    """The newest frame of a video that ends, [B, 1, h, w, C], as if it were repeated."""
    return _convolved(torch.cat([tail, tail[:, -1:]], 1), weight)


def _convolved(known: Tensor, weight: Tensor) -> Tensor:
    """All frames of [B, t, h, w, C] that have one on either side."""
    if known.shape[1] < 3:
        return known[:, :0]
    channels = fn.pad(known.movedim(-1, 1), (1, 1, 1, 1, 0, 0), mode="replicate")
    return fn.conv3d(channels, weight[:, None], groups=len(weight)).movedim(1, -1)
