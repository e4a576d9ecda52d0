"""A stream: one endless text (or a batch of them) read and written by one model."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from ..memory import Memory, MemoryState, StateError, read_state, write_state
from ..memory.question import Question
from .axes import next_place
from .decoder import decoder_of, twin_of
from .engine import Attending, Engine, Recomputing, unfit
from .families import check_generates, head_of, vocabulary_of, width_of
from .fingerprint import fingerprint
from .loading import load
from .sampling import Chooser

CHUNK = 512  # Tokens a long feed is read at a time: bounds activations and masks, never changes the result.
FORMAT = 2  # Of saved streams.

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


class Stream:
    """What `open_stream` returns.

    model, tokenizer (or None), memory (the `Memory` that was asked for), batch: as opened. state: the `MemoryState`
    behind the stream, None when the memory re-computes. notes: a dict of yours that `save` keeps: what JSON can hold, and
    tensors.

    A stream has consumed exactly what it was fed and what it has yielded; every method leaves it as it was when it
    raises. One stream belongs to one thread at a time; any number of streams, in any threads, share a model.
    """

    def __init__(
        self, model: PreTrainedModel, memory: Memory, make: Callable[[int], Engine], tokenizer: Any, batch: int | None
    ) -> None:
        self.model, self.memory, self.tokenizer = model, memory, tokenizer
        self.batch = 1 if batch is None else batch
        self.notes: dict[str, Any] = {}
        self._engine = make(self.batch)
        self._make = make if batch is None else None  # makes an engine for as many rows as the first feed brings
        self._vocabulary = vocabulary_of(model)
        self._last: Tensor | None = None  # logits [B, V] after the last token of each row

    # -- where it is ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> MemoryState | None:
        return self._engine.state if isinstance(self._engine, Attending) else None

    @property
    def positions(self) -> Tensor:
        """Tokens consumed by each row, int64 [B]."""
        return self._engine.positions

    @property
    def position(self) -> int:
        """Tokens consumed so far. Raises ValueError when rows are at different positions; then use `positions`."""
        rows = self.positions.tolist()
        if len(set(rows)) > 1:
            raise ValueError(f"rows are at different positions {rows}; read `positions`")
        return int(rows[0])

    @property
    def nbytes(self) -> int:
        """Bytes the memory holds now."""
        return self._engine.nbytes

    # -- reading -------------------------------------------------------------------------------------------------

    def feed(
        self, ids: Ids | None = None, mask: Tensor | None = None, *, tags: Mapping[str, Any] | None = None,
        embeds: Tensor | None = None, commit: bool = True,
    ) -> Tensor:  # fmt: skip
        """Read tokens; the logits [B, T, V] after each of them, in the model's dtype.

        ids: integers [T] or [B, T], a list or a tensor, any T from 1 on. Feeding in pieces gives what feeding at once
        gives. mask: [B, T], True (or 1) for tokens, False for padding, anywhere; padding is not read, and its logits
        are zeros. Raises TypeError for what is no integer, ValueError for an empty feed, ids outside of the
        vocabulary, a shape that does not fit the batch, and logits that are NaN.

        tags: what is known of each token, [T] or [B, T]: `modality`, `segment`, `frame`, `time`; and `coordinates`, [T, 3]
        or [B, T, 3] with a model of several rotary axes (Qwen-VL): its numbers (t, h, w), as the model's `get_rope_index`
        gives them, words without them going on at `next_place`. A memory that decides per step takes a feed with tags as
        one step (of up to 512 tokens). embeds: in place of ids, what the model's layers are to read, [T, hidden] or
        [B, T, hidden] in its dtype: pictures as its vision tower gives them. commit: False reads and leaves no trace.
        """
        if (ids is None) == (embeds is None):
            raise ValueError("feed either ids or embeds")
        read, mask = self._checked(ids, mask) if ids is not None else self._features(embeds, mask)
        known = self._tags(tags, read)
        if commit:
            return torch.cat(list(self._chunks(read, mask, known)), 1)
        if read.shape[1] > CHUNK:
            return torch.cat(list(self.fork()._chunks(read, mask, known)), 1)
        before = self._last
        try:
            return self._read(read, mask, tags=known, commit=False)
        finally:
            self._last = before

    @property
    def next_place(self) -> Tensor:
        """The number of the next word on every rotary axis, int64 [B]: with pictures, less than tokens were read."""
        return self.positions if self.state is None else next_place(self.state)

    def surprisal(self, ids: Ids, mask: Tensor | None = None) -> Tensor:
        """Read tokens; how surprising each was given all before it, in nats: −ln p(token), float32 [B, T].

        NaN for padding and for a token with nothing before it (the first of a fresh stream, or after `truncate` or
        `reset`). Logits are not kept, so T may be long.
        """
        ids, mask = self._checked(ids, mask)
        before, pieces, column = self._last, [], 0
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        seen = (self.positions > 0).to(ids.device) & (before is not None)
        # Closed at once when this is interrupted, so that what was read so far is taken back before anybody looks.
        with closing(self._chunks(ids, mask)) as chunks:
            for logits in chunks:
                stop = column + logits.shape[1]
                some, here = ids[:, column:stop], real[:, column:stop]
                scores = logits if before is None else torch.cat([before[:, None].to(logits.dtype), logits], 1)
                # The column that predicts a token is that of the last real token before it, which may be in `before`.
                offset = 0 if before is None else 1
                columns = torch.arange(logits.shape[1], device=ids.device).expand_as(some)
                latest = torch.where(here, columns, -1).cummax(1).values + offset
                predictor = torch.cat([torch.full_like(latest[:, :1], offset - 1), latest[:, :-1]], 1)
                known = (predictor >= offset) | seen[:, None]
                rows = torch.arange(self.batch, device=ids.device)[:, None]
                chosen = scores[rows, predictor.clamp_min(0)].float()
                nats = chosen.logsumexp(-1) - chosen.gather(-1, some[..., None])[..., 0]
                pieces.append(nats.masked_fill_(~(here & known), torch.nan))
                before, seen, column = self._last, seen | here.any(1), stop
        return torch.cat(pieces, 1)

    def _chunks(
        self, ids: Tensor, mask: Tensor | None, tags: Mapping[str, Tensor] | None = None
    ) -> Generator[Tensor, None, None]:
        """Logits of `CHUNK` tokens at a time; all of `ids` is read, or on an error none."""
        whole = ids.shape[1] <= CHUNK
        before = None if whole else (self._engine.fork(), self._last)
        try:
            for first in range(0, ids.shape[1], CHUNK):
                part = slice(first, first + CHUNK)
                known = {name: tag[:, part] for name, tag in (tags or {}).items()}
                yield self._read(ids[:, part], None if mask is None else mask[:, part], tags=known)
        except BaseException:
            if before is not None:
                self._engine, self._last = before
            raise

    def _read(
        self, ids: Tensor, mask: Tensor | None, last: bool = False, tags: Mapping[str, Tensor] | None = None,
        commit: bool = True,
    ) -> Tensor:  # fmt: skip
        """One chunk; `last` computes logits of the last column only, where that is all anybody needs."""
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None and not bool(mask.any()):
            return torch.zeros(
                *ids.shape[:2], head_of(self.model).weight.shape[0], dtype=self.model.dtype, device=ids.device
            )
        last = last and (mask is None or bool(mask[:, -1].all()))
        logits = self._engine.read(ids, mask, last, tags or None, commit)
        if mask is None:
            self._last = logits[:, -1].clone() if logits.shape[1] > 1 else logits[:, -1]
            return logits
        logits = logits if last else logits.masked_fill_(~mask[..., None], 0)
        newest = logits[:, -1]
        if not last:
            columns = torch.arange(mask.shape[1], device=mask.device)
            at = torch.where(mask, columns, 0).amax(1)
            newest = logits[torch.arange(self.batch, device=mask.device), at]
        if self._last is not None:
            newest = torch.where(mask.any(1)[:, None], newest, self._last)
        self._last = newest
        return logits

    def _checked(self, ids: Ids, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids as int64 [B, T] and mask as bool [B, T] on the model's device."""
        if isinstance(ids, str):
            raise TypeError("feed takes token ids, not text; encode it with the tokenizer, or use generate(prompt=...)")
        try:
            tensor = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"ids cannot be read as integers of shape [T] or [B, T]: {error}") from error
        if tensor.numel() == 0:
            raise ValueError("there are no ids; feed at least one token")
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"ids are {tensor.dtype}; expected whole numbers")
        if tensor.ndim == 1:
            tensor = tensor[None]
        if tensor.ndim != 2 or not self._takes(tensor.shape[0]):
            raise ValueError(
                f"ids have shape {tuple(tensor.shape)}; this stream has {self.batch} row(s), so expected "
                + ("[T] or [1, T]" if self.batch == 1 else f"[{self.batch}, T]")
            )
        tensor = tensor.to(self.model.device, torch.int64)
        mask = self._mask(mask, tensor)
        tensor = tensor if mask is None else tensor.masked_fill(~mask, 0)
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= self._vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is out of range; the model has ids 0 to {self._vocabulary - 1}")
        self._widen(tensor.shape[0])
        return tensor, mask

    def _mask(self, mask: Tensor | None, read: Tensor) -> Tensor | None:
        """Bool [B, T] on the model's device."""
        if mask is None:
            return None
        mask = torch.as_tensor(mask)
        if mask.shape != read.shape[:2]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected that of ids, {tuple(read.shape[:2])}")
        mask = mask.to(self.model.device) != 0
        if not bool(mask.any()):
            raise ValueError("the mask leaves no token; feed at least one")
        return mask

    def _features(self, embeds: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features [B, T, hidden] and a mask on the model's device."""
        hidden = width_of(self.model)
        if not isinstance(embeds, Tensor) or embeds.dtype != self.model.dtype or embeds.shape[-1:] != (hidden,):
            kind = (embeds.dtype, tuple(embeds.shape)) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(f"embeds are {kind}; expected {self.model.dtype} [T, {hidden}] or [B, T, {hidden}]")
        tensor = (embeds[None] if embeds.ndim == 2 else embeds).to(self.model.device)
        if tensor.ndim != 3 or not tensor.shape[1] or not self._takes(tensor.shape[0]):
            raise ValueError(
                f"embeds have shape {tuple(embeds.shape)}; expected [{self.batch}, T, {hidden}], T from 1 on"
            )
        if isinstance(self._engine, Attending) and not self._engine.decoder.embeds:
            raise ValueError(f"{type(self.model).__name__} reads ids only")
        if not bool(tensor.isfinite().all()):
            raise ValueError("embeds hold NaN or infinity")
        mask = self._mask(mask, tensor)
        self._widen(tensor.shape[0])
        return tensor.detach(), mask

    def _tags(self, tags: Mapping[str, Any] | None, read: Tensor) -> dict[str, Tensor]:
        """Tags [B, T, …] of what is read."""
        known = {}
        for name, value in (tags or {}).items():
            tag, axes = torch.as_tensor(value), int(name == "coordinates")
            tag = tag.expand(self.batch, *tag.shape) if tag.ndim == 1 + axes else tag
            if tag.ndim != 2 + axes or tag.shape[:2] != read.shape[:2]:
                raise ValueError(
                    f"tag {name!r} has shape {tuple(torch.as_tensor(value).shape)}; expected one for each of "
                    f"{tuple(read.shape[:2])} tokens" + (", with its numbers behind" if axes else "")
                )
            known[name] = tag.to(read.device)
        return known

    def _widen(self, rows: int) -> None:
        """As many rows as the first feed brings."""
        if rows != self.batch and self._make is not None:
            self.batch, self._engine = rows, self._make(rows)

    def _takes(self, rows: int) -> bool:
        """Whether a feed of `rows` rows fits; a stream opened without a batch takes any number at its start."""
        return rows == self.batch or (self._make is not None and not bool(self.positions.any()))

    # -- writing -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | Ids | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        eos: bool | int | Sequence[int] = False,
        logits_processor: LogitsProcessorList | None = None,
    ) -> Iterator[Any]:
        """Write on, token by token: an int each time, or int64 [B] for a batch, −1 in rows that have ended.

        prompt: what to read first: text (needs a tokenizer; special tokens are added at position 0 only), a list of
        texts or ids for a batch, ids, or None to go on from where the stream is (a fresh one starts with the model's
        start-of-text token). max_tokens: None writes for ever. temperature: 0 takes the most likely token; above, sampling, with top_k and top_p as in transformers. seed:
        draws depend on seed, row and position alone, so a fork or a resumed stream writes the same; None follows
        torch.manual_seed. stop: strings that end a row once its text holds one (the token that completes it is still
        yielded). eos: ids that end a row, True for the model's own; False goes on. logits_processor: transformers
        processors, given the ids of this turn (prompt and answer; padding on the left, where prompts differ in length).

        A token is consumed before it is yielded: a generator that is closed, or dropped, leaves a stream that has
        read exactly what it gave, and the next `feed` or turn goes on from there. Arguments are checked at once;
        the prompt is read when the first token is asked for.
        """
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0
        ):
            raise ValueError(f"max_tokens is {max_tokens!r}; expected a whole number, 0 or more, or None for no end")
        chooser = Chooser(temperature, top_p, top_k, seed, logits_processor)
        ends = self._ends(eos)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if stops and (self.tokenizer is None or not all(isinstance(s, str) and s for s in stops)):
            raise ValueError("stop takes non-empty strings, and needs a stream with a tokenizer to see the text")
        fed = None if prompt is None else self._encoded(prompt)
        if fed is None and (self._last is None or not bool((self.positions > 0).all())):
            fed = self._start()
        return self._written(fed, max_tokens, chooser, ends, stops)

    def _written(
        self, fed: tuple[Tensor, Tensor | None] | None, count: int | None, chooser: Chooser, ends: set[int],
        stops: list[str],
    ) -> Iterator[Any]:  # fmt: skip
        if fed is not None:
            self._consume(*fed)
        device = self.model.device
        turn = fed[0] if fed is not None else torch.zeros(self.batch, 0, dtype=torch.long, device=device)
        # Enough tokens of each row to hold the longest stop string: a character is four bytes and tokens at most.
        tails = [deque[int](maxlen=4 * max(map(len, stops), default=0) + 8) for _ in range(self.batch)]
        going = torch.ones(self.batch, dtype=torch.bool, device=device)
        written = 0
        while (count is None or written < count) and bool(going.any()):
            token = chooser.choose(turn, self.last_logits, self.positions.tolist())
            self._consume(token[:, None], None if bool(going.all()) else going[:, None])
            if chooser.sees_ids:
                turn = torch.cat([turn, token[:, None]], 1)
            shown = token.masked_fill(~going, -1)
            if ends or stops:
                for row, value in enumerate(shown.tolist()):
                    if value >= 0 and (value in ends or self._stopped(tails[row], value, stops)):
                        going[row] = False
            written += 1
            yield shown if self.batch > 1 else int(shown)

    def consume(self, ids: Ids, mask: Tensor | None = None) -> None:
        """`feed` for the sake of what comes next: only the logits of the last token are computed, see `last_logits`."""
        self._consume(*self._checked(ids, mask))

    @property
    def last_logits(self) -> Tensor:
        """What the model says comes next, [B, V]. Raises ValueError when nothing was read yet."""
        if self._last is None:
            raise ValueError("there is nothing to go on from: give a prompt, or feed something first")
        return self._last

    def _consume(self, ids: Tensor, mask: Tensor | None = None) -> None:
        if ids.shape[1] <= CHUNK:
            self._read(ids, mask, last=True)
        else:
            deque(self._chunks(ids, mask), maxlen=0)

    def _stopped(self, tail: deque[int], token: int, stops: list[str]) -> bool:
        if not stops:
            return False
        tail.append(token)
        text = self.tokenizer.decode(list(tail), skip_special_tokens=False)
        return any(stop in text for stop in stops)

    def _ends(self, eos: bool | int | Sequence[int]) -> set[int]:
        if eos is False:
            return set()
        if eos is True:
            own = getattr(self.model.generation_config, "eos_token_id", None)
            if own is None:
                own = getattr(self.tokenizer, "eos_token_id", None)
            if own is None:
                raise ValueError("eos=True, but neither model nor tokenizer names an end-of-text token; give its id")
            eos = own
        ends = {eos} if isinstance(eos, int) else set(eos)
        if not all(isinstance(end, int) for end in ends):
            raise ValueError(f"eos is {eos!r}; expected token ids, True for the model's own, or False")
        return ends

    def _start(self) -> tuple[Tensor, None]:
        """The model's start-of-text token, for a stream that has read nothing at all."""
        start = getattr(self.model.generation_config, "bos_token_id", None)
        if start is None:
            start = getattr(self.tokenizer, "bos_token_id", None)
        if start is None or bool(self.positions.any()):
            raise ValueError("there is nothing to go on from: give a prompt, or feed every row something first")
        return torch.full((self.batch, 1), start, device=self.model.device), None

    def _encoded(self, prompt: str | Sequence[str] | Ids) -> tuple[Tensor, Tensor | None]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not (isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts)):
            return self._ragged(prompt)
        if self.tokenizer is None:
            raise ValueError("this stream has no tokenizer, so a prompt has to be token ids")
        if not self._takes(len(texts)):
            raise ValueError(f"{len(texts)} prompt(s) for {self.batch} row(s); give one text per row")
        fresh = not bool(self.positions.any())
        return self._ragged([self.tokenizer.encode(text, add_special_tokens=fresh) for text in texts])

    def _ragged(self, rows: Any) -> tuple[Tensor, Tensor | None]:
        """Rows of different length, padded on the left."""
        nested = (
            isinstance(rows, Sequence)
            and len(rows) > 0
            and self._takes(len(rows))
            and all(isinstance(r, Sequence) for r in rows)
        )
        if not nested or len({len(row) for row in rows}) == 1:
            return self._checked(rows)
        width = max(len(row) for row in rows)
        if min(len(row) for row in rows) == 0:
            raise ValueError("a prompt is empty; every row needs at least one token")
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return self._checked([[0] * (width - len(row)) + list(row) for row in rows], mask)

    # -- copy, undo, forget, keep ----------------------------------------------------------------------------------

    def fork(self) -> Stream:
        """An independent copy of the stream over the same model; memory is copied, weights are shared."""
        twin = copy.copy(self)
        twin._engine, twin.notes = self._engine.fork(), copy.deepcopy(self.notes)
        twin._last = None if self._last is None else self._last.clone()
        return twin

    def question(self, ids: str | Sequence[str] | Ids | None = None) -> Stream:
        """Ask about what was read so far: a stream of its own, of which this one never learns, while it may go on.

        ids: the question alone, text or ids. Memories that bring things back (rekv, live-vlm) look, layer by layer, for
        what it attends to most, and the answer is read from that; the question itself does not stay, so say it again in
        the prompt: `stream.question("What fell?").generate("Question: What fell? Answer:")`. None: the first feed looks,
        and stays. All other memories answer from what they hold, and what is returned is a copy.

        Any number of questions may be asked at once, in any threads. Raises ValueError while a row has read nothing.
        Source: ReKV, arXiv 2503.00540, sections 2.3 and 3.
        """
        if not bool((self.positions > 0).all()):
            raise ValueError("there is nothing to ask about: feed every row something first")
        asked, mask = (None, None) if ids is None else self._encoded(ids)
        twin = copy.copy(self)
        twin._engine, twin._make, twin.notes = self._engine.question(asked, mask), None, {}
        twin._last = None if self._last is None else self._last.clone()
        if isinstance(twin.state, Question):
            twin.memory, twin._last = twin.state.memory, None
        return twin

    def truncate(self, n: int) -> None:
        """Undo the last `n` tokens of every row, exactly. Raises ValueError, with the reason, where that is impossible.

        The logits after the token that is last now are not kept: feed something before generating.
        """
        self._engine.truncate(n)
        if n:
            self._last = None

    def reset(self, keep_sink: bool = False) -> None:
        """Forget everything, or with `keep_sink` everything but the first S tokens of each row."""
        self._engine.reset(keep_sink)
        self._last = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to one file, atomically and with a checksum; `resume_stream` goes on bit for bit.

        `notes`, a dict of what JSON can hold and of tensors, which belongs to whoever uses the stream, is kept with it.
        """
        state = self._engine.state_dict()
        tensors = {f"memory.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        tensors |= {f"notes.{name}": value for name, value in self.notes.items() if isinstance(value, Tensor)}
        if self._last is not None:
            tensors["last"] = self._last
        meta = {
            "format": FORMAT,
            "memory": self.memory.spec,
            "parts": _parts(self.memory),
            "model": fingerprint(self.model),
            "model_type": self.model.config.model_type,
            "batch": self.batch,
            "state": plain,
            "notes": {name: value for name, value in self.notes.items() if not isinstance(value, Tensor)},
        }
        write_state(path, tensors, meta)


def _parts(memory: Memory) -> dict[str, Any]:
    """What makes two memories the same, whatever they are called."""
    answers = {verb: repr(getattr(memory, verb)) for verb in memory.verbs()}
    plain = ("sink", "window", "frame", "chunk", "inside", "rows", "keep_sink", "null", "recompute")
    return {**{name: getattr(memory, name) for name in plain}, **answers}


def open_stream(
    model: PreTrainedModel | str | os.PathLike[str],
    memory: Memory,
    *,
    tokenizer: Any = None,
    batch: int | None = None,
    dtype: torch.dtype | str | None = None,
    length: int | None = None,
    undo: int = 16,
) -> Stream:
    """Open an endless stream (or `batch` of them) through a transformers decoder.

    model: an instance (it is not changed, and goes on working as before), the path of a model folder, a hub name, or
    "tiny", the shipped one. memory: what to keep. batch: number of rows; by default as many as the first
    feed brings. tokenizer: lets prompts be text; found by itself for a path. dtype: of the weights of a model that is
    loaded here. length: how long the stream may become, where memory has no bound and the model's rotary scaling
    depends on it (dynamic, longrope); by default all positions the model knows. undo: how many of the last tokens
    `truncate` can take back from layers that keep a matrix (Qwen3-Next, Qwen3.5), at the price of copies of their states;
    models without such layers do not look at it.

    The first time an instance is opened, a few tokens are read both ways, through a memory and by the model itself;
    raises `Unsupported` (a ValueError) with the reason if they differ, or if the model is of a kind that cannot be
    streamed; ValueError if its weights hold NaN.
    """
    if not isinstance(memory, Memory):
        raise TypeError(f"memory is a {type(memory).__name__}; expected a Memory, as `recipe` makes it")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch is {batch!r}; it must be a whole number of rows, 1 or more")
    if isinstance(undo, bool) or not isinstance(undo, int) or undo < 0:
        raise ValueError(f"undo is {undo!r}; it must be a whole number of tokens, 0 or more")
    if (reason := unfit(memory)) is not None:
        raise ValueError(f"{memory.name} cannot read text: {reason}")
    model, tokenizer = load(model, tokenizer, dtype)
    make: Callable[[int], Engine]
    if memory.recompute:
        check_generates(model)
        make = partial(Recomputing, twin_of(model), memory)
    else:
        decoder = decoder_of(model)

        def make(rows: int) -> Engine:
            return Attending(decoder, decoder.build(memory, rows, length=length), decoder.matrices(rows, undo))

    return Stream(model, memory, make, tokenizer, batch)


def resume_stream(
    model: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    memory: Memory | Callable[[str], Memory],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
) -> Stream:
    """Go on with a stream that `Stream.save` wrote, bit for bit.

    memory: the memory the stream had, or a function that makes it from its spec. Raises `StateError` (a ValueError)
    when the file is missing, damaged, of another model, or does not fit.
    """
    tensors, meta = read_state(path)
    missing = {"format", "memory", "parts", "model", "batch", "state"} - set(meta)
    if missing or meta["format"] != FORMAT:
        raise StateError(f"{path} is not a saved stream of format {FORMAT}")
    model, tokenizer = load(model, tokenizer, dtype)
    if meta["model"] != fingerprint(model):
        raise StateError(
            f"{path} was written by another model ({meta.get('model_type')}): configuration, weights or dtype differ "
            f"from this {type(model).__name__}; resume it with the model that read it"
        )
    memory = memory if isinstance(memory, Memory) else memory(meta["memory"])
    if (memory.spec, _parts(memory)) != (meta["memory"], meta["parts"]):
        raise StateError(f"{path} was written with memory {meta['memory']}, not {memory.spec}")
    stream = open_stream(model, memory, tokenizer=tokenizer, batch=meta["batch"])
    state = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("memory.")}
    try:
        stream._engine.load_state_dict({**state, **meta["state"]})
    except (KeyError, ValueError) as error:
        raise StateError(f"{path} does not fit this model and memory: {error}") from error
    noted = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("notes.")}
    stream.notes = meta.get("notes", {}) | noted
    if "last" in tensors:
        stream._last = tensors["last"].to(model.device)
    return stream
