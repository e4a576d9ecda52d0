"""Other answers to the verbs fit without a change to the memory: an admit, a recall and a fold written here."""

from dataclasses import dataclass

import pytest
import torch

from evenflow.memory import Absolute, AllHeld, Contiguous, Dropped, Everything, Memory, Oldest
from evenflow.memory.verbs import Admit, Evict, Fold, Place, Recall, Window

from .drive import feed, random_inputs, run
from .oracle import rotated

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}
FREQUENCIES = [10_000.0 ** (-c / 4) for c in range(4)]


@pytest.mark.parametrize(
    ("answer", "verb"),
    [(Everything(), Admit), (Oldest(), Evict), (Dropped(), Fold), (AllHeld(), Recall), (Contiguous(), Place), (Absolute(), Place)],
)  # fmt: skip
def test_answers_are_values(answer, verb):
    assert answer == type(answer)() and hash(answer) == hash(type(answer)())
    assert verb.__name__ in ("Admit", "Evict", "Fold", "Recall", "Place")


def test_the_ring_is_a_window():
    assert isinstance(Memory(window=3).build(**GEOMETRY).held_layers[0].window, Window)


@dataclass(frozen=True)
class EveryOther:
    """Admits tokens whose `frame` tag is even."""

    def admitted(self, fresh):
        return fresh.tags["frame"] % 2 == 0


@pytest.mark.parametrize("cut", [1, 7])
def test_what_is_not_admitted_attends_but_is_neither_kept_nor_counted(cut):
    memory = Memory(sink=2, window=5, admit=EveryOther())
    state, plain = memory.build(**GEOMETRY), Memory(sink=2, window=5).build(**GEOMETRY)
    inputs = random_inputs(state, 28)
    frames = torch.arange(28)
    outputs = [
        feed(state, inputs, at, min(at + cut, 28), tags={"frame": frames[at : at + cut]}) for at in range(0, 28, cut)
    ]
    even = [tuple(t[:, :, ::2] for t in layer) for layer in inputs]
    expected = run(plain, even, [3])
    for layer in range(2):
        got = torch.cat([out[layer] for out in outputs], 2)
        torch.testing.assert_close(got[:, :, ::2], expected[layer], rtol=0, atol=1e-12)
        assert got.isfinite().all()
        assert state.held(layer) == plain.held(layer)
    assert state.position == 14


@dataclass(frozen=True)
class Strongest:
    """Each query sees the `k` keys with the highest scores."""

    k: int

    def visible(self, query, keys, allowed):
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        scores = query @ keys.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        best = scores.topk(min(self.k, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def test_recall_takes_away_the_same_in_any_cut():
    memory = Memory(sink=3, window=9, recall=Strongest(4))
    inputs = random_inputs(memory.build(**GEOMETRY), 40)
    one_by_one = run(memory.build(**GEOMETRY), inputs, [1])
    everything = run(Memory(sink=3, window=9).build(**GEOMETRY), inputs, [1])
    for cut in (6, 40):
        for a, b in zip(one_by_one, run(memory.build(**GEOMETRY), inputs, [cut]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not torch.allclose(one_by_one[0], everything[0])


@dataclass(frozen=True)
class Mean:
    """One slot that holds the mean of everything that left, keys un-rotated."""

    slots: int = 1

    def fold(self, keys, values, count, left, left_values):
        total = count + left.shape[1]
        before = count.double() / total
        keys.mul_(before).add_(left.sum(1, keepdim=True) / total)
        values.mul_(before).add_(left_values.sum(1, keepdim=True) / total)


@pytest.mark.parametrize("cuts", [[1], [5], [30]], ids=str)
@pytest.mark.parametrize("sink", [0, 2])
def test_folded_tokens_stand_between_sinks_and_window(sink, cuts):
    """Against the definition: after each step the mean of all that left stands at index S of the cache."""
    window, length = 6, 30
    memory = Memory(sink=sink, window=window, fold=Mean())
    state = memory.build(**GEOMETRY)
    inputs = random_inputs(state, length)
    outputs = run(state, inputs, cuts)
    at = 0
    while at < length:
        stop = min(length, at + cuts[0])
        left = [j for j in range(at) if j >= sink and at - j > window]
        for i in range(at, stop):
            kept = [j for j in range(i + 1) if j < sink or i - j <= window]
            for layer, (q, k, v) in enumerate(inputs):
                for head in range(4):
                    keys, values = k[0, head // 2], v[0, head // 2]
                    entries = [(keys[j], values[j]) for j in kept if j < sink]
                    if left:
                        entries.append((keys[left].mean(0), values[left].mean(0)))
                    entries += [(keys[j], values[j]) for j in kept if j >= sink]
                    # Positions: indices in a cache of sinks, one folded slot, window; the window's as in the stream.
                    lag = max(0, i - (sink + 1 + window))
                    places = list(range(sink))[: len([j for j in kept if j < sink])]
                    places += [sink] if left else []
                    places = [p + lag for p in places] + [j for j in kept if j >= sink]
                    turned = rotated(torch.stack([e[0] for e in entries]), places, FREQUENCIES)
                    scores = turned @ rotated(q[0, head, i : i + 1], [i], FREQUENCIES)[0] * 8**-0.5
                    expected = torch.softmax(scores, 0) @ torch.stack([e[1] for e in entries])
                    torch.testing.assert_close(outputs[layer][0, head, i], expected, rtol=0, atol=1e-10)
        at = stop
    expected_held = [*range(sink), -1, *range(length - window, length)]
    assert state.held(0) == expected_held
    with pytest.raises(ValueError, match="folded tokens"):
        state.truncate(1)
    twin = state.fork()
    more = random_inputs(state, 5, seed=9)
    for a, b in zip(run(state, more, [1]), run(twin, more, [1]), strict=True):
        assert torch.equal(a, b)
