"""How a `transformers` decoder meets a memory, without a line of its code being patched.

A model is never changed. Evenflow works on a *twin*: the same module tree over the same weight tensors, with its own
configuration that names an attention function of ours. The twin runs with all-zero position ids, so its rotary step
is the identity and queries and keys arrive as they were projected; position belongs to the memory. Which memory is
asked is told through a context variable, so any number of streams and threads share one twin.
"""

from __future__ import annotations

import copy
import inspect
import threading
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..memory import Memory, MemoryState, Rope
from ..memory.question import Question
from ..memory.rope import Style
from .axes import axes_of, numbered, on_axes, single_axis
from .families import OWN_ATTENTION, OwnAttention, Unsupported, check_generates, check_streams, tower_of, vocabulary_of
from .linear_layers import LinearStates, Sheet, States, linear_modules, note_inputs
from .rotary import hold, rope_of, rotary_modules, style_of

ATTENTION = "evenflow"
CHECK_PIECES = (5, 1, 3)  # Tokens of the self-check: in pieces, so that state outside of attention is noticed.
# Largest allowed difference from the model's own logits, in their standard deviation (root mean square over tokens).
# A wrong rotation, mask or scale gives 0.01 and more on random weights, of order 1 on trained ones.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

_ask: ContextVar[Callable[..., Tensor]] = ContextVar("evenflow_ask")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="evenflow"`; [B, H, m, D] in, [B, m, H, D_v] out."""
    ask = _ask.get(None)
    if ask is None:
        raise RuntimeError("this model's attention asks a memory, but no stream is feeding it; use evenflow.open")
    return ask(module, query, key, value, options).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)  # No mask function by that name: models then make no mask at all.


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A module tree of its own over the very weight tensors of `model`, in evaluation mode."""
    own = {id(buffer) for rotary in rotary_modules(model) for buffer in rotary.buffers(recurse=False)}
    shared = {id(t): t for t in chain(model.parameters(), model.buffers()) if id(t) not in own}
    twin: Any = copy.deepcopy(model, cast(dict[int, Any], shared))
    twin.config.return_dict = True
    evaluating: PreTrainedModel = twin.eval()
    return evaluating


@dataclass(frozen=True)
class Asked:
    """What one layer told the attention function: all that is needed to serve it."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    scale: float
    reach: int | None
    softcap: float | None
    sinks: Tensor | None
    kind: str | None  # the layer's type, for models that treat types of layers differently
    causal: bool
    query: Tensor  # as it arrived, [B, H, m, D]

    @classmethod
    def by(
        cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kind: str | None, options: dict[str, Any]
    ) -> Asked:
        scale, is_causal = options.get("scaling"), options.get("is_causal")
        return cls(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            dtype=value.dtype,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            reach=options.get("sliding_window"),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
            kind=kind,
            causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
            query=query,
        )


class Decoder:
    """A model that can be streamed: its twin, what its layers ask for, and the proof that it computes the same.

    Raises `Unsupported` with the reason when the model cannot be streamed, ValueError when its weights are not numbers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_generates(model)
        check_streams(model)
        self.name = type(model).__name__
        self.weights = _identity(model)
        self.twin = twin_of(model)
        self.tower = tower_of(self.twin)
        self.linear = linear_modules(self.tower)
        note_inputs(self.linear)
        self.device = model.device
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        own = OWN_ATTENTION.get(model.config.model_type)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions, self._takes_keep = "position_ids" in accepted, "logits_to_keep" in accepted
        self._cache = "cache" if "cache" in accepted else "past_key_values"
        self.embeds = "inputs_embeds" in accepted  # whether it reads features as well as ids
        turning = [axes_of(rotary) for rotary in rotary_modules(self.tower)]
        self.axes = turning[0] if turning else None
        self._inputs = {k: v.to(self.device) for k, v in own.inputs().items()} if own else {}
        self._zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary_of(model), (1, sum(CHECK_PIECES)), generator=generator).to(self.device)
        # Where tokens have places of three numbers, any will do, as long as no two of them always agree.
        places = torch.stack([ids * 0 + torch.arange(ids.shape[1]).to(ids) * step % 11 for step in (1, 3, 5)], -1)
        with torch.no_grad():
            expected = self.twin(input_ids=ids, use_cache=False).logits
            placed = None
            if self.axes is not None:
                placed = self.twin(input_ids=ids, use_cache=False, position_ids=places.permute(2, 0, 1)).logits
        if not bool(expected.isfinite().all()):
            raise ValueError(f"{self.name} gives logits that are not numbers: {_not_numbers(model)}")
        self.alibi = own.slopes(self.twin) if own else None
        self._rotaries = {} if self.alibi is not None else self._read_rotaries()
        try:
            self._lead(own)
            self.layers = self._probe(ids[:, :2], own)
            allowed = max(TOLERANCE.get(expected.dtype, 0.1), own.rounding if own else 0.0)
            self.like = self._check(ids, expected, allowed)
            if placed is not None:
                self._check(ids, placed, allowed, places)
        except Unsupported:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Unsupported(f"{self.name} cannot be run through a memory: {error}") from error

    # -- preparing the twin --------------------------------------------------------------------------------------

    def _read_rotaries(self) -> dict[str, nn.Module]:
        """Copies of the rotary modules, as they are now, by the path of the module that owns them."""
        rotaries = {}
        within = set(rotary_modules(self.tower))
        for path, module in self.twin.named_modules():
            if module in within:
                rotaries[path.rpartition(".")[0]] = copy.deepcopy(module)
        return rotaries

    def _lead(self, own: OwnAttention | None) -> None:
        """Make every layer of the twin ask `_attention`, with raw queries and keys."""
        for module in self.tower.modules():
            config = getattr(module, "config", None)
            if config is not None and hasattr(config, "_attn_implementation"):
                config._attn_implementation = ATTENTION
            if own is not None and own.module in (base.__name__ for base in type(module).__mro__):
                vars(module)["forward"] = types.MethodType(partial(_with_ask, own.forward), module)

    def _ask_layers(self, ids: Tensor, cosine: float, sine: float) -> dict[nn.Module, Asked]:
        """Run the twin and note what each layer asks for; attention gives zeros, so layers do not see each other."""
        asked: dict[nn.Module, Asked] = {}
        config = self.twin.config.get_text_config()
        kinds = [kind for kind in getattr(config, "layer_types", None) or () if kind != "linear_attention"]

        def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            if module in asked:
                raise Unsupported(f"{self.name} runs one attention module several times per token; once is possible")
            kind = kinds[len(asked)] if kinds and len(asked) < len(kinds) else None
            asked[module] = Asked.by(module, query, key, value, kind, options)
            return value.new_zeros(*query.shape[:3], value.shape[-1])

        for rotary in rotary_modules(self.tower):
            hold(rotary, cosine, sine)
        with torch.inference_mode():
            self._asking(note, ids)
        return asked

    def _probe(self, ids: Tensor, own: OwnAttention | None) -> dict[nn.Module, int]:
        """Find out what layers ask for and how they rotate, and leave the twin asking with raw queries and keys."""
        turned = self._ask_layers(ids, 0, 1)
        asked = self._ask_layers(ids, 1, 0)
        layers, expected = list(asked.values()), self.twin.config.get_text_config().num_hidden_layers
        if len(layers) + len(self.linear) != expected:
            raise Unsupported(
                f"{self.name} has {expected} layers, of which {len(layers)} ask the attention interface: the others "
                "keep a state of another kind (state-space, recurrent, convolution) or compute attention on their own"
            )
        if not all(layer.causal for layer in layers):
            raise Unsupported(f"{self.name} attends in both directions; only causal models stream")
        shapes = {(n.heads, n.kv_heads, n.head_dim, n.value_dim, str(n.dtype)) for n in layers}
        if len(shapes) > 1:
            raise Unsupported(
                f"{self.name} has layers of different shapes {sorted(shapes)} (query heads, key heads, key channels, "
                "value channels, dtype); a memory has one"
            )
        if self.alibi is None and not self._rotaries:
            raise Unsupported(
                f"{self.name} has neither rotary frequencies nor ALiBi slopes: how it places tokens is unknown"
            )
        self.asked = layers
        paths = {module: path for path, module in self.twin.named_modules()}
        self._turns: list[tuple[str, Style] | None] = []  # the rotary module and the pairing of each layer
        for module, layer in asked.items():
            near = [owner for owner in self._rotaries if not owner or f"{paths[module]}.".startswith(f"{owner}.")]
            if not near:
                self._turns.append(None)
                continue
            owner = max(near, key=len)
            # Where our own forward stands in for the class's, it leaves the rotation out; those classes turn halves.
            style = "half" if own else style_of(layer.query, turned[module].query, self._pairs(owner, layer))
            self._turns.append(None if style is None else (owner, style))
        return {module: number for number, module in enumerate(asked)}

    def _pairs(self, owner: str, layer: Asked) -> int:
        return len(rope_of(self._rotaries[owner], layer.kind, 1, "half").inv_freq or ())

    def _ropes(self, length: int, first: int | None = None) -> list[Rope | None]:
        """One `Rope` per layer, None where a layer does not rotate.

        first: which axis of the memory turns what turns with the model's first one; None: all turn with one number.
        """
        axes = None if first is None or self.axes is None else tuple(first + axis for axis in self.axes)
        made: dict[object, Rope] = {}
        ropes: list[Rope | None] = []
        for turn, layer in zip(self._turns, self.asked, strict=True):
            key = turn, layer.kind
            if turn is not None and key not in made:
                made[key] = replace(rope_of(self._rotaries[turn[0]], layer.kind, length, turn[1]), axes=axes)
            ropes.append(made.get(key))
        return ropes

    def _check(self, ids: Tensor, expected: Tensor, allowed: float, places: Tensor | None = None) -> States:
        """Read a few tokens through a memory that keeps all, in pieces, and compare with the model's own logits.

        Returns what layers without keys have kept, by which such states are known.
        """
        state, linear, pieces, column = self.build(Memory(), length=ids.shape[1]), self.matrices(1, 0), [], 0
        for piece in torch.split(ids, list(CHECK_PIECES), dim=1):
            stop = column + piece.shape[1]
            tags = {} if places is None else {"coordinates": places[:, column:stop]}
            pieces.append(self.read(state, piece, tags=tags, linear=linear))
            column = stop
        got = torch.cat(pieces, 1)
        expected = expected.double()
        gap = (got.double() - expected).square().mean().sqrt()
        error = float(gap / (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt().clamp_min(1e-12))
        if not error <= allowed:
            raise Unsupported(
                f"{self.name} read through a memory gives other logits than on its own: they differ by {error:.2g} "
                f"standard deviations ({allowed:.2g} is allowed). It places tokens or keeps state in a way that is "
                "not known here"
            )
        return {} if linear is None else linear.states

    # -- use -----------------------------------------------------------------------------------------------------

    def build(self, memory: Memory, batch: int = 1, *, length: int | None = None) -> MemoryState:
        """An empty memory for `batch` streams through this model.

        length: number of positions that length-dependent rotary scaling (dynamic, longrope) is made for; by default
        the memory's capacity S + W, or all the model knows if the memory has no bound.
        """
        first, layers = self.asked[0], self.asked
        positions = length or memory.capacity or self.longest
        sinks = [layer.sinks for layer in layers if layer.sinks is not None]
        if memory.null == "learned" and not sinks:
            raise Unsupported(
                f"{memory.name} reads with the sink logits that a model brings, as GPT-OSS does, and {self.name} brings "
                "none; `window` keeps the same tokens without them"
            )
        build = partial(
            Memory.build, layers=len(layers), heads=first.heads, kv_heads=first.kv_heads, head_dim=first.head_dim,
            value_dim=first.value_dim, batch=batch, dtype=first.dtype,
            device=self.device, alibi=self.alibi, reach=[layer.reach for layer in layers],
            scale=[layer.scale for layer in layers], softcap=first.softcap,
            sink_logits=torch.stack(sinks) if sinks else None,
        )  # fmt: skip
        lifted = None if self.axes is None else on_axes(memory)
        if lifted is not None:
            try:
                return build(lifted[0], rope=self._ropes(positions, lifted[1]))
            except ValueError:
                pass  # Its answers know one axis (folded, spilled or sliding keys): coordinates are then refused.
        return build(memory, rope=self._ropes(positions))

    def matrices(self, batch: int, undo: int) -> LinearStates | None:
        """What layers without keys keep for `batch` streams, of which `undo` tokens can be taken back; None: no such."""
        return LinearStates(self.linear, batch, undo) if self.linear else None

    def read(
        self, state: MemoryState, ids: Tensor, mask: Tensor | None = None, last: bool = False, *,
        tags: Mapping[str, Tensor] | None = None, commit: bool = True, linear: LinearStates | None = None,
    ) -> Tensor:  # fmt: skip
        """Feed `ids` [B, m] and remember them; logits [B, m, V], or of the last token only, [B, 1, V], if `last`.

        ids: or features [B, m, hidden]. mask: bool [B, m], False for padding. tags: see `MemoryState.step`, [B, m, …].
        commit: False leaves no trace. linear: states of the layers without keys. On any error all is as it was before.
        """
        if linear is not None and mask is not None:
            raise ValueError(
                f"{self.name} has layers whose matrix every column would change, padding too; feed rows of equal length, "
                "or one stream for each"
            )
        sheet = None if linear is None else linear.sheet()
        with torch.inference_mode(), state.step(ids.shape[1], self._tagged(state, ids, mask, tags), commit, mask):
            logits = self._asking(self._through(state), ids, last, sheet)
            if bool(logits.sum(dtype=torch.float32).isnan()):
                raise ValueError(f"{self.name} gives logits that are not numbers (NaN weights?); nothing was stored")
        if linear is not None and sheet is not None and commit:
            linear.take(sheet, ids.shape[1])
        return logits.clone()  # Outside inference mode: an ordinary tensor, free for any use.

    def select(
        self, question: Question, ids: Tensor, mask: Tensor | None = None, linear: LinearStates | None = None
    ) -> None:
        """Let `ids` [B, m] choose, layer by layer, what the question brings back; nothing else of them stays."""
        tags, sheet = self._tagged(question, ids, mask, None), None if linear is None else linear.sheet()
        with torch.inference_mode(), question.retrieve(ids.shape[1], tags, mask=mask):
            self._asking(self._through(question), ids, last=True, sheet=sheet)

    def _tagged(
        self, state: MemoryState, ids: Tensor, mask: Tensor | None, tags: Mapping[str, Tensor] | None
    ) -> Mapping[str, Tensor] | None:
        """Tags of a step, with places on all axes where the model has several."""
        reason = single_axis(state)
        if reason is None:
            return numbered(state, ids.shape[1], mask, tags or {})
        if tags and "coordinates" in tags:
            raise ValueError(reason)
        return tags

    def _through(self, state: MemoryState) -> Callable[..., Tensor]:
        """What a layer of the twin calls instead of its own attention."""
        layers, dtype = self.layers, self.asked[0].dtype

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
            return state.attend(layers[module], query.to(dtype), key.to(dtype), value.to(dtype))

        return attend

    def _asking(
        self, ask: Callable[..., Tensor], ids: Tensor, last: bool = False, sheet: Sheet | None = None
    ) -> Tensor:
        """Run the twin on `ids` [B, m], every layer asking `ask`; logits [B, m, V], or [B, 1, V] if `last`."""
        inputs: dict[str, Any] = dict(self._inputs)
        inputs["inputs_embeds" if ids.is_floating_point() else "input_ids"] = ids
        if sheet is not None:
            inputs[self._cache] = sheet
        if self._takes_positions:
            # One zero for all rows and columns; only the length is looked at.
            inputs["position_ids"] = self._zero.expand(1, ids.shape[1])
        if last and self._takes_keep:
            inputs["logits_to_keep"] = 1
        token = _ask.set(ask)
        try:
            logits: Tensor = self.twin(use_cache=False, **inputs).logits
        finally:
            _ask.reset(token)
        return logits[:, -1:] if last else logits


def _with_ask(forward: Callable[..., tuple[Tensor, None]], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return forward(module, _attention, *args, **kwargs)


def _identity(model: PreTrainedModel) -> tuple[object, ...]:
    """Changes when the twin of `model` no longer is one: weights replaced, moved or converted."""
    return (model.dtype, model.device, *(id(parameter) for parameter in model.parameters()))


def _not_numbers(model: PreTrainedModel) -> str:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"{name} holds NaN or infinity; load the weights again"
    return "its weights are finite, so the computation overflows in this dtype; try float32 or bfloat16"


_decoders: WeakKeyDictionary[PreTrainedModel, Decoder] = WeakKeyDictionary()
_lock = threading.Lock()


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The decoder of `model`, made and checked once for each instance."""
    check_generates(model)
    with _lock:
        decoder = _decoders.get(model)
        if decoder is None or decoder.weights != _identity(model):
            decoder = _decoders[model] = Decoder(model)
        return decoder
