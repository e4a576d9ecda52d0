"""Layers of window attention between layers whose memory is a matrix: exact near by, compressed for ever, never larger.

Source: InfiniteVL, arXiv 2512.08829, first version: the language model. Its vision encoder is that of Qwen2.5-VL and not
here: pictures come as features. Names of parameters are ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ..memory import Memory, MemoryState, Rope, Timeless
from ..memory.delta import DeltaState, chunked_delta, gated_delta, short_convolution, unit
from ..memory.fast_weights import FastState, FastWeights, feed, flushed, frame_convolution
from ..memory.rope import Rotary

Kind = Literal["window", "delta"]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HybridConfig:
    """What a hybrid network is built of.

    pattern: kinds of layers, repeated until there are `layers`. window: tokens that a query of a window layer sees,
    itself among them; None: all. sections: how many pairs of channels turn with time, row and column. key_dim and
    value_dim are those of a head of a delta layer, kernel the reach of its convolution.
    """

    name: str
    vocabulary: int
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    delta_heads: int
    key_dim: int
    value_dim: int
    sections: tuple[int, int, int]
    pattern: tuple[Kind, ...] = ("window", "delta", "delta", "delta")
    kernel: int = 4
    theta: float = 1e6
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if 2 * sum(self.sections) != self.head_dim:
            raise ValueError(
                f"sections {self.sections} are no {self.head_dim // 2} pairs of channels, half of head_dim"
            )
        if self.window is not None and self.window < 2:
            raise ValueError(f"window is {self.window}; a query sees itself and what was before it, so 2 or more")
        if not self.pattern or set(self.pattern) - {"window", "delta"}:
            raise ValueError(f"pattern is {self.pattern}; give kinds of layers, 'window' or 'delta'")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.layers))

    @property
    def rope(self) -> Rope:
        """How a memory has to turn queries and keys: by three coordinates, time, row and column, and nothing else."""
        series = tuple(self.theta ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2))
        axes = tuple(axis for axis, pairs in enumerate(self.sections, 1) for _ in range(pairs))
        return Rope(inv_freq=series, axes=axes)

    @property
    def memory(self) -> Memory:
        """What window layers keep: each token where its coordinates say, until `window` − 1 have come after it."""
        return Memory(window=None if self.window is None else self.window - 1, place=Timeless(), name="hybrid-window")


PRESETS: dict[str, HybridConfig] = {
    config.name: config
    for config in (
        HybridConfig(
            "infinite-vl", vocabulary=151_936, dim=2048, ffn_dim=11_008, layers=36, heads=16, kv_heads=2, head_dim=128,
            window=8192, delta_heads=16, key_dim=128, value_dim=256, sections=(16, 24, 24),
        ),
        HybridConfig(
            "toy", vocabulary=64, dim=64, ffn_dim=128, layers=4, heads=4, kv_heads=2, head_dim=16, window=12, delta_heads=2,
            key_dim=16, value_dim=32, sections=(2, 3, 3),
        ),
    )
}  # fmt: skip


class WindowLayer(nn.Module):
    """Attention whose keys and positions belong to whoever attends."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim)
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2).split(self.heads, 1)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class DeltaLayer(nn.Module):
    """A gated delta rule behind a short convolution, without positions, its reads normed and gated.

    Begins as the paper's does from scratch: decay rates uniform up to 16, steps log-uniform from 0.001 to 0.1.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.delta_heads
        self.heads, self.key_dim, self.value_dim = heads, config.key_dim, config.value_dim
        self.widths = [heads * config.key_dim, heads * config.key_dim, heads * config.value_dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = nn.Parameter((2 * torch.rand(sum(self.widths), config.kernel) - 1) * config.kernel**-0.5)
        self.beta, self.step = nn.Linear(dim, heads, bias=False), nn.Linear(dim, heads, bias=False)
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
        self.step_bias = nn.Parameter(
            _before_softplus(torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1))))
        )
        self.norm = nn.Parameter(torch.ones(config.value_dim))
        self.gate = nn.Linear(dim, heads * config.value_dim, bias=False)
        self.out = nn.Linear(heads * config.value_dim, dim, bias=False)

    @torch.no_grad()
    def begin_gently(self) -> None:
        """As a layer begins that takes the place of attention: half of every error written, hardly a decay, and a
        convolution that changes nothing."""
        for parameter in (self.a_log, self.step.weight, self.beta.weight, self.conv):
            parameter.zero_()
        self.conv[:, -1] = 1
        self.step_bias.copy_(_before_softplus(torch.full_like(self.step_bias, 1e-3)))

    def empty(self, batch: int) -> DeltaState:
        """The state of streams that have not begun."""
        weight = self.qkv.weight
        return DeltaState.empty(
            batch, self.heads, self.key_dim, self.value_dim, sum(self.widths), self.conv.shape[1], weight.dtype, weight.device
        )  # fmt: skip

    def forward(self, x: Tensor, state: DeltaState, mask: Tensor | None = None) -> tuple[Tensor, DeltaState]:
        """x [B, T, dim], normed; mask: bool [B, T], False for padding, which leaves no trace. Returns the output and
        the state after it."""
        wide = state.matrix.dtype
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        inner, tail = short_convolution(self.qkv(x), self.conv, state.tail, mask)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in fn.silu(inner).split(self.widths, -1)
        )
        beta = self.beta(x).to(wide).sigmoid()
        g = -self.a_log.to(wide).exp() * fn.softplus(self.step(x).to(wide) + self.step_bias.to(wide))
        if mask is not None:
            beta, g = (number.masked_fill(~mask[..., None], 0) for number in (beta, g))
        form = chunked_delta if self.training else gated_delta
        o, matrix = form(unit(q) * self.key_dim**-0.5, unit(k), v, beta.mT, g.mT, state.matrix)
        o = fn.rms_norm(o.to(wide), (self.value_dim,), self.norm.to(wide), 1e-5).to(x.dtype)
        y = self.out(o.transpose(1, 2).flatten(2) * fn.silu(self.gate(x)))
        return y, DeltaState(matrix, tail)


class FastLayer(nn.Module):
    """Window attention with fast weights beside it, which share its queries, keys and values; their outputs are added.

    rate: how much of a step a token's key and value make to begin with. The gate begins at nothing, so that the layer
    begins as window attention alone. Source: Spatial-TTT, arXiv 2603.12255. `Hybrid` and its session do not take it yet.
    """

    def __init__(
        self, config: HybridConfig, fast_heads: int = 4, rule: FastWeights | None = None, rate: float = 1e-3
    ) -> None:
        super().__init__()
        width, own = config.heads * config.head_dim, config.heads * config.head_dim // fast_heads
        if width % fast_heads or own < config.head_dim:
            raise ValueError(
                f"{fast_heads} fast heads do not get equal shares of {width} channels, at least {config.head_dim} each"
            )
        self.heads, self.fast_heads = [config.heads, config.kv_heads, config.kv_heads], fast_heads
        self.rule, self.turned = FastWeights() if rule is None else rule, config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.eps) for _ in "qk")
        self.scale, self.offset = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(2, width))
        self.conv = nn.Parameter(torch.zeros(3, width, 3, 3, 3))
        self.first = nn.ParameterList(torch.randn(fast_heads, own, own) / own**0.5 for _ in range(3))
        self.rates, self.momenta = nn.Linear(config.dim, 3 * fast_heads), nn.Linear(config.dim, fast_heads)
        self.gate, self.norm = nn.Linear(config.dim, fast_heads), nn.RMSNorm(own, config.eps)
        self.out = nn.Linear(width, config.dim, bias=False)
        with torch.no_grad():
            self.conv[..., 1, 1, 1] = 1
            for parameter in (self.gate.weight, self.gate.bias, self.rates.bias):
                parameter.zero_()
        self.bias = float(_before_softplus(torch.tensor(rate, dtype=torch.float64)))

    def forward(
        self, h: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], turn: Callable[[Tensor], Tensor],
        state: FastState | None = None, grid: tuple[int, int, int] | None = None,
    ) -> tuple[Tensor, FastState]:  # fmt: skip
        """h [B, T, dim], normed → the same shape, and the fast weights after it; state None begins a stream.

        attend: window attention over un-rotated q, k, v. turn: rotates [..., T, head_dim] to the tokens' places. grid:
        frames, rows and columns of a video that these tokens are the whole of, convolved before it is remembered.
        """
        q, k, v = self.qkv(h).unflatten(-1, (sum(self.heads), -1)).split(self.heads, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        near = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        if state is None:
            w0, w1, w2 = self.first
            state = FastState.begin((w0, w1, w2), len(h))
        rates = fn.softplus(self.rates(h) + self.bias).unflatten(-1, (self.fast_heads, 3)).transpose(1, 2)
        far, state = feed(self.rule, state, *self._inner(q, k, v, turn, grid), rates, self.momenta(h).sigmoid().mT)
        far = self.norm(far) * fn.silu(self.gate(h)).mT[..., None]
        return self.out(near + far.transpose(1, 2).flatten(2)), state

    def _inner(
        self, q: Tensor, k: Tensor, v: Tensor, turn: Callable[[Tensor], Tensor], grid: tuple[int, int, int] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the fast heads get of q, k, v [B, T, heads, head_dim]: [B, fast heads, T, channels] each."""
        groups, out = self.heads[0] // self.heads[1], []
        for number, x in enumerate((q, k, v)):
            x = (x if number == 0 else x.repeat_interleave(groups, 2)).flatten(2)
            if number < 2:
                x = x * self.scale[number] + self.offset[number]
            if grid is not None:
                shown, tail = frame_convolution(x.unflatten(1, grid), self.conv[number])
                x = torch.cat([shown, flushed(self.conv[number], tail)], 1).flatten(1, 3)
            x = fn.silu(x).unflatten(-1, (self.fast_heads, -1)).transpose(1, 2)
            if number < 2:
                x = x / (x.norm(dim=-1, keepdim=True) + 1e-5)
                x = torch.cat([turn(x[..., : self.turned]), x[..., self.turned :]], -1)
            out.append(x)
        return out[0], out[1], out[2]


class Block(nn.Module):
    """A layer of either kind, then a feed-forward network, each behind a norm."""

    def __init__(self, config: HybridConfig, kind: Kind) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(config.dim, config.eps), nn.RMSNorm(config.dim, config.eps)
        self.mixer: WindowLayer | DeltaLayer = (WindowLayer if kind == "window" else DeltaLayer)(config)
        self.up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def fed(self, x: Tensor) -> Tensor:
        """The feed-forward network, added."""
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(fn.silu(gate) * value)


class Hybrid(nn.Module):
    """Hidden vectors of tokens, given `attend` for the window layers and a state for each delta layer."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.kinds)
        self.norm = nn.RMSNorm(config.dim, config.eps)

    def empty(self, batch: int) -> tuple[DeltaState, ...]:
        """States of the delta layers before a stream begins."""
        mixers = (cast(Block, block).mixer for block in self.blocks)
        return tuple(mixer.empty(batch) for mixer in mixers if isinstance(mixer, DeltaLayer))

    def forward(
        self, x: Tensor, attend: Attend, states: Sequence[DeltaState] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[DeltaState, ...]]:
        """x [B, m, dim], embedded tokens or features; returns the same shape, normed, and the states after them.

        attend(layer, q, k, v) counts window layers alone. states: None at the start of a stream. mask: as in DeltaLayer.
        """
        left, after = iter(self.empty(len(x)) if states is None else states), []
        for number, kind in enumerate(self.config.kinds):
            x, state = self.through(number, x, attend, next(left) if kind == "delta" else None, mask)
            after += [] if state is None else [state]
        return self.norm(x), tuple(after)

    def through(
        self, number: int, x: Tensor, attend: Attend, state: DeltaState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, DeltaState | None]:
        """One block alone, as layer-wise distillation needs it; a delta layer without a state begins a stream."""
        block = cast(Block, self.blocks[number])
        if isinstance(block.mixer, DeltaLayer):
            y, after = block.mixer(block.norm(x), block.mixer.empty(len(x)) if state is None else state, mask)
            return block.fed(x + y), after
        layer = self.config.kinds[:number].count("window")
        return block.fed(x + block.mixer(block.norm(x), lambda q, k, v: attend(layer, q, k, v))), None

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, dim] → […, vocabulary], by the weights that embed."""
        return fn.linear(hidden, self.embedding.weight)


class Windowed:
    """Attention of all tokens of a stream at once, each over its window: what training and oracles use as `attend`."""

    def __init__(self, config: HybridConfig, places: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """places: int64 [T, 3], time, row and column of every token."""
        rotary = Rotary(config.rope, config.head_dim, dtype, places.device)
        self.rotary, self.angles = rotary, rotary.at(torch.cat([torch.zeros_like(places[:, :1]), places], 1))
        age = torch.arange(len(places), device=places.device)
        age = age[:, None] - age
        self.mask = (age >= 0) & (age < (len(places) if config.window is None else config.window))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.turn(q), self.turn(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return fn.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def turn(self, x: Tensor) -> Tensor:
        """`x` [..., T, head_dim], each token turned to its place."""
        cos, sin = self.angles  # not `rotate`, which writes large ones in place: no gradient goes through that
        return torch.addcmul(x * cos, self.rotary.swapped(x), sin)


@dataclass(frozen=True, eq=False)
class Mark:
    """A moment that can be gone back to. The window is a copy that nobody writes to; states are never written to."""

    window: MemoryState
    states: tuple[DeltaState, ...]
    free: Tensor

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + sum(state.nbytes for state in self.states)


@dataclass(frozen=True, eq=False)
class Fed:
    """A step that was read: its input x [B, m, dim], places [B, m, 3], mask, and positions [B] before it."""

    x: Tensor
    places: Tensor
    mask: Tensor | None
    before: Tensor

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.places.nbytes


class HybridSession:
    """One endless stream (or a batch of them) through a hybrid network.

    A window memory and a matrix a delta layer, which are as large after a frame as after a million. undo: how many of
    the last tokens `truncate` can take back for certain. As a matrix forgets nothing on demand, this takes a copy of
    everything every `undo` tokens, two of which are kept, and the inputs since; 0 keeps nothing and refuses.
    """

    states: tuple[DeltaState, ...]
    free: Tensor  # int64 [B], behind the largest place so far
    _marks: list[Mark]
    _log: list[Fed]

    def __init__(self, model: Hybrid, batch: int = 1, undo: int = 0) -> None:
        if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
            raise ValueError(f"undo is {undo!r}; it must be a whole number of tokens, 0 or more")
        config, weight = model.config, model.embedding.weight
        if "window" not in config.kinds:
            raise ValueError(
                f"{config.name} has no window layer, and a session counts by the window's memory; give it one"
            )
        self.model, self.batch, self.undo = model, batch, undo
        self.window = config.memory.build(
            layers=config.kinds.count("window"), heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim,
            rope=config.rope, batch=batch, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.reset()

    # -- where it is -----------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens consumed so far. Raises ValueError when rows are at different positions; then use `positions`."""
        return self.window.position

    @property
    def positions(self) -> Tensor:
        """Tokens consumed by each row, int64 [B]."""
        return self.window.positions

    @property
    def nbytes(self) -> int:
        """Bytes of window, matrices, and what is kept for undoing."""
        return self._now().nbytes + sum(m.nbytes for m in self._marks) + sum(fed.nbytes for fed in self._log)

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def feed(
        self, tokens: Tensor, places: Tensor | None = None, mask: Tensor | None = None, *, commit: bool = True,
        last: bool = False,
    ) -> Tensor:  # fmt: skip
        """Read tokens; their logits [B, m, vocabulary], or with `last` those of each row's last one, [B, 1, vocabulary].

        tokens: ids, whole numbers [m] or [B, m], or features [m, dim] or [B, m, dim] in the model's dtype. places:
        [m, 3] or [B, m, 3], time, row and column; None: text, that goes on behind the largest place so far. mask: bool
        [B, m], False for padding, which is not read. commit: False reads and leaves no trace. Any cut gives the same.
        Raises ValueError for what does not fit, and is then as it was.
        """
        x, mask = self._checked(tokens, mask)
        places = self._placed(places, x, mask)
        hidden = self._read(x, places, mask, commit)
        if last:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            newest = (real * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
            hidden = hidden.take_along_dim(newest[:, None, None], 1)
        return self.model.logits(hidden)

    def ask(self, question: Tensor, count: int) -> Tensor:
        """The most likely `count` tokens after a question, int64 [B, count], of which this stream never learns.

        question: as `tokens` of `feed`, text, at least one token.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count is {count!r}; an answer has a whole number of tokens, 1 or more")
        twin = self.question()
        out = [twin.feed(question, last=True).argmax(-1)]
        while len(out) < count:
            out.append(twin.feed(out[-1], last=True).argmax(-1))
        return torch.cat(out, 1)

    def _read(self, x: Tensor, places: Tensor, mask: Tensor | None, commit: bool) -> Tensor:
        before = self.positions
        with self.window.step(x.shape[1], tags={"coordinates": places}, commit=commit, mask=mask):
            hidden, states = self.model(x, self.window.attend, self.states, mask)
        if not commit:
            return hidden
        self.states = states
        there = places.amax(2) if mask is None else places.amax(2).masked_fill(~mask, -1)
        self.free = torch.maximum(self.free, there.amax(1) + 1)
        if self.undo:
            # Copies, as whoever feeds may go on writing into the same buffer.
            kept = None if mask is None else mask.clone()
            self._log = [*self._log, Fed(x.clone(), places.clone(), kept, before)]
            self._remember()
        return hidden

    def _checked(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embedded tokens [B, m, dim] and a mask, None where all are real."""
        weight = self.model.embedding.weight
        size = (self.model.config.dim,) if tokens.is_floating_point() else ()
        if tokens.ndim == 1 + len(size):
            tokens = tokens[None]
        if tokens.ndim != 2 + len(size) or len(tokens) != self.batch or not tokens.shape[1] or tokens.shape[2:] != size:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}; expected ids [{self.batch}, m] or features "
                f"[{self.batch}, m, {self.model.config.dim}], at least one token"
            )
        if tokens.is_floating_point():
            if tokens.dtype != weight.dtype:
                raise ValueError(f"features are {tokens.dtype}; the model's dtype is {weight.dtype}")
        elif not bool(((tokens >= 0) & (tokens < len(weight))).all()):
            raise ValueError(f"ids must be 0 to {len(weight) - 1}; got {int(tokens.min())} to {int(tokens.max())}")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != tokens.shape[:2] or not bool(mask.any()):
                raise ValueError(
                    f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(tokens.shape[:2])} with a token in it"
                )
            mask = None if bool(mask.all()) else mask
        return (tokens if size else self.model.embedding(tokens)), mask

    def _placed(self, places: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """int64 [B, m, 3] for the tokens x [B, m, dim]."""
        m = x.shape[1]
        if places is None:
            count = torch.arange(m, device=x.device).expand(len(x), m) if mask is None else mask.cumsum(1) - 1
            return (self.free[:, None] + count.clamp_min(0))[..., None].expand(-1, -1, 3)
        if places.is_floating_point() or places.shape[-2:] != (m, 3) or places.shape[:-2] not in ((), (len(x),)):
            raise ValueError(
                f"places are {places.dtype} {tuple(places.shape)}; expected whole numbers [{m}, 3], or a set a row"
            )
        return places.to(x.device, torch.int64).expand(len(x), -1, -1)

    # -- undo, copy, forget ----------------------------------------------------------------------------------------

    def _now(self) -> Mark:
        return Mark(self.window, self.states, self.free)

    def _remember(self, start: bool = False) -> None:
        """Take a mark when the last one is `undo` tokens old, and let go of what no undoing needs."""
        now = self.positions
        if start or bool((now - self._marks[-1].window.positions >= self.undo).all()):
            self._marks = [*self._marks, Mark(self.window.fork(), self.states, self.free)]
        while len(self._marks) > 1 and bool((self._marks[1].window.positions <= now - self.undo).all()):
            self._marks = self._marks[1:]
        self._log = [fed for fed in self._log if bool((fed.before >= self._marks[0].window.positions).all())]

    @torch.no_grad()
    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly: by going back to a mark and reading again what is left.

        What follows is bit for bit what follows where they never came, the rest having come in the same pieces. Raises
        ValueError, with the reason, where no mark is as old.
        """
        target = self.positions - n
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or bool((target < 0).any()):
            raise ValueError(f"cannot undo {n!r} tokens; rows have consumed {self.positions.tolist()}")
        if n == 0:
            return
        old = [number for number, mark in enumerate(self._marks) if bool((mark.window.positions <= target).all())]
        if not old:
            raise ValueError(
                f"cannot undo {n} tokens: a matrix does not tell what went into it, and this session keeps what {self.undo} "
                "tokens need; open it with a larger undo, fork before, or try with commit=False"
            )
        mark, log = self._marks[old[-1]], self._log
        self.window, self.states, self.free = mark.window.fork(), mark.states, mark.free
        self._marks = self._marks[: old[-1] + 1]
        self._log = [fed for fed in log if bool((fed.before < mark.window.positions).any())]
        for fed in log[len(self._log) :]:
            real = torch.ones(fed.x.shape[:2], dtype=torch.bool) if fed.mask is None else fed.mask.cpu()
            kept = real & (fed.before[:, None] + real.cumsum(1) <= target[:, None])
            stop = int((kept.any(0) * torch.arange(1, len(kept[0]) + 1)).max())
            if stop:
                mask = kept[:, :stop].to(fed.x.device)
                self._read(fed.x[:, :stop], fed.places[:, :stop], None if bool(mask.all()) else mask, True)

    def fork(self) -> HybridSession:
        """An independent copy; what happens to one is never seen by the other."""
        twin = copy.copy(self)  # marks, states and what was read are never written to
        twin.window = self.window.fork()
        return twin

    def question(self) -> HybridSession:
        """A copy to ask, which keeps nothing for undoing."""
        twin = self.fork()
        twin.undo, twin._marks, twin._log = 0, [], []
        return twin

    def reset(self) -> None:
        """Forget everything."""
        self.window.reset()
        self.states = self.model.empty(self.batch)
        self.free = torch.zeros(self.batch, dtype=torch.int64, device=self.model.embedding.weight.device)
        self._forget_marks()

    def _forget_marks(self) -> None:
        self._marks, self._log = [], []
        if self.undo:
            self._remember(start=True)

    # -- save and resume -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, except what undoing needs: that begins anew."""
        window = {f"window.{name}": value for name, value in self.window.state_dict().items()}
        return (
            window | {"free": self.free.clone()} | {name: tensor.clone() for name, tensor in self._matrices().items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ValueError, and changes nothing, when it does not fit."""
        window = {name.removeprefix("window."): value for name, value in state.items() if name.startswith("window.")}
        expected = self._matrices() | {"free": self.free}
        rest = {name: value for name, value in state.items() if not name.startswith("window.")}
        if set(rest) != set(expected):
            raise ValueError(f"state holds {sorted(rest)} beside the window; expected {sorted(expected)}")
        for name, tensor in expected.items():
            if rest[name].shape != tensor.shape or rest[name].dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {rest[name].dtype} {tuple(rest[name].shape)}; this session holds {tensor.dtype} {tuple(tensor.shape)}"
                )
        self.window.load_state_dict(window)
        mine = {name: rest[name].to(tensor.device, copy=True) for name, tensor in expected.items()}
        self.states = tuple(
            DeltaState(mine[f"delta.{n}.matrix"], mine[f"delta.{n}.tail"]) for n in range(len(self.states))
        )
        self.free = mine["free"]
        self._forget_marks()

    def _matrices(self) -> dict[str, Tensor]:
        return {
            f"delta.{n}.{name}": getattr(state, name)
            for n, state in enumerate(self.states)
            for name in ("matrix", "tail")
        }


def in_a_row(first: int, count: int) -> Tensor:
    """Places of text, int64 [count, 3]: the same number on all three axes."""
    return torch.arange(first, first + count)[:, None].expand(-1, 3)


def frame_places(
    base: int, seconds: float, rows: int, columns: int, per_second: float = 2.0, per_grid: float = 1.0
) -> Tensor:
    """Places of a frame at `seconds` of a video that begins at place `base`, int64 [rows·columns, 3].

    Frames within one grid of `per_grid` seconds share their time; rows and columns are the same for every frame. That
    all three count from `base` is as Qwen2.5-VL numbers pictures; the released demo says so of time alone.
    """
    time = base + math.floor(seconds / per_grid) * max(round(per_grid * per_second), 1)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack([row, column], -1).reshape(-1, 2) + base
    return torch.cat([torch.full_like(grid[:, :1], time), grid], 1)


def _before_softplus(x: Tensor) -> Tensor:
    """What softplus makes `x` of."""
    return x + (-torch.expm1(-x)).log()
