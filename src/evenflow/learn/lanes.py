"""A small decoder that learns, in a minute, to say of each unit what is seen in it: what a placement of two lanes costs.

Each unit holds one symbol among noise. A symbol is a rule by which a word follows the last one (a permutation of the
words), so that no word can be known from what was said alone: the newest symbol must be found for each. Training always
has as many words a unit; what is learned of positions then shows where units are longer and shorter.
Task: robustness to the size of units, as Speak While Watching, arXiv 2601.06843, measures it on films.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, rms_norm, scaled_dot_product_attention

from ..memory import Rope
from ..memory.lane_masks import packed_loss, packed_mask, packed_positions
from ..memory.lane_places import LanePlace
from ..memory.lanes import Lanes, LanesState
from ..memory.rope import Rotary
from .backcopy import Progress

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Telling:
    """The task. Ids: words, then symbols, then noise. size: tokens of a unit of what is seen, of which one is a symbol."""

    words: int = 12
    symbols: int = 8
    noise: int = 8
    size: int = 4
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        return self.words + self.symbols + self.noise

    def rules(self) -> Tensor:
        """The word that follows each, by symbol, int64 [symbols, words]; a row is a permutation."""
        made = torch.Generator().manual_seed(self.seed)
        return torch.stack([torch.randperm(self.words, generator=made) for _ in range(self.symbols)])

    def streams(self, count: int, said: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """What is seen, int64 [count, units, size], and said, int64 [count, 1 + sum of `said`], the words of each unit.

        The first word is random, and said of no symbol; all others follow the last one by their unit's symbol. Raises
        ValueError where a unit has no words: what was held back of the one before would predict words of none.
        """
        if min(said) < 1:
            raise ValueError(f"said is {[*said]}; every unit needs 1 word or more")
        made, rules, units = torch.Generator().manual_seed(seed), self.rules(), len(said)
        symbols = torch.randint(self.symbols, (count, units), generator=made)
        seen = torch.randint(self.noise, (count, units, self.size), generator=made) + self.words + self.symbols
        where = torch.randint(self.size, (count, units, 1), generator=made)
        seen.scatter_(2, where, (self.words + symbols)[..., None])
        words = [torch.randint(self.words, (count,), generator=made)]
        for symbol in symbols.repeat_interleave(torch.tensor(said), 1).unbind(1):
            words.append(rules[symbol, words[-1]])
        return seen, torch.stack(words, 1)


class Layer(nn.Module):
    """One layer of the decoder: attention, then two linear maps."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.dim, self.sizes = width // heads, (heads, kv_heads, kv_heads)
        self.qkv = nn.Linear(width, self.dim * sum(self.sizes), bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """What comes out, [B, m, W], of x [B, m, W]."""
        heads = self.qkv(rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split(self.sizes, 1)
        x = x + self.o(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(relu(self.up(rms_norm(x, x.shape[-1:]))))


class Teller(nn.Module):
    """A decoder of two layers that attends through a function (layer, q, k, v), as a step of lanes is one."""

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.words = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, attend: Attend) -> Tensor:
        """Logits [B, m, V] of ids [B, m]."""
        x = self.words(ids)
        for n, layer in enumerate(self.layers):
            x = layer(x, partial(attend, n))
        return self.head(rms_norm(x, x.shape[-1:]))

    def lanes(self, place: LanePlace, batch: int) -> LanesState:
        """Empty lanes for a batch of streams in step."""
        return Lanes(place).build(
            layers=len(self.layers), heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim, rope=Rope(), batch=batch,
            dtype=self.head.weight.dtype,
        )  # fmt: skip


def packed(model: Teller, place: LanePlace, seen: Tensor, words: Tensor, said: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One pass over all that is seen, then all that is said: logits [B, N, V], and which tokens are said, bool [N].

    seen, words, said: as `Telling.streams` has them. The last word of a unit sees the next one, whose first it predicts.
    """
    _, units, size = seen.shape
    counts = [1 + said[0], *said[1:]]  # the random first word stands in the first unit
    unit = torch.cat([torch.arange(units).repeat_interleave(torch.tensor(n)) for n in ([size] * units, counts)])
    target = torch.arange(len(unit)) >= units * size
    mask = packed_mask(target, unit, shift=True)
    where = torch.cat(packed_positions(place, [[size]] * units, counts))[:, 0]
    rotary = Rotary(Rope(), model.dim, model.head.weight.dtype, torch.device("cpu"))
    cos, sin = rotary.at(where)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (x * cos + rotary.swapped(x) * sin for x in (q, k))  # with gradients, which `rotate` may not have
        return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return model(torch.cat([seen.flatten(1), words], 1), attend), target


@torch.no_grad()
def streamed(model: Teller, place: LanePlace, seen: Tensor, words: Tensor, said: Sequence[int]) -> Tensor:
    """The same through lanes, unit by unit and word by word: logits of what is said, [B, 1 + sum of `said`, V]."""
    state, out, at = model.lanes(place, len(seen)), [], 0
    for number in range(len(said)):
        with state.read(seen.shape[2], number) as step:
            model(seen[:, number], step.attend)
        state.close("source", number)
        # The last word of a unit predicts the next unit's first: it is held back until that was read.
        held = int(number + 1 < len(said))
        until = sum(said[: number + 1]) + 1 - held
        while at < until:
            with state.write(1, number) as step:
                out.append(model(words[:, at : at + 1], step.attend))
            at += 1
        state.close("target", number, held=held)
    return torch.cat(out, 1)


def train_teller(
    task: Telling, place: LanePlace, said: Sequence[int], steps: int = 600, seed: int = 0, batch: int = 16,
    rate: float = 3e-3, progress: Progress | None = None,
) -> Teller:  # fmt: skip
    """Train on packed streams of so many words a unit; the same seed gives the same model."""
    torch.manual_seed(seed)
    model = Teller(task.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, 1.5 * (steps - step) / steps)
        seen, words = task.streams(batch, said, seed * 1_000_000 + step)
        logits, target = packed(model, place, seen, words, said)
        ids, target = torch.cat([seen.flatten(1), words], 1), target.expand(batch, -1)
        loss = packed_loss(logits, ids, target, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
    return model.eval()


def told(logits: Tensor, words: Tensor) -> float:
    """Share of the words, int64 [B, T], that the most likely one of logits [B, T, V] before it equals."""
    return float((logits[:, :-1].argmax(-1) == words[:, 1:]).float().mean())
