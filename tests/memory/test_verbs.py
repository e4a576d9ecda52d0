"""Other answers to the verbs fit without a change to the memory: an admit and a recall written here."""

from dataclasses import dataclass

import pytest
import torch

from evenflow.memory import (
    Absolute,
    Admit,
    AllHeld,
    Contiguous,
    Dropped,
    Everything,
    Evict,
    Fold,
    Memory,
    Oldest,
    Place,
    Recall,
)  # fmt: skip
from evenflow.memory.ring import Ring

from .drive import feed, random_inputs, run

GEOMETRY = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float64}


@pytest.mark.parametrize(
    ("answer", "verb"),
    [(Everything(), Admit), (Oldest(), Evict), (Dropped(), Fold), (AllHeld(), Recall), (Contiguous(), Place), (Absolute(), Place)],
)  # fmt: skip
def test_answers_are_values(answer, verb):
    assert answer == type(answer)() and hash(answer) == hash(type(answer)())
    assert isinstance(answer, verb)


def test_the_ring_is_a_window():
    assert isinstance(Memory(window=3).build(**GEOMETRY).held_layers[0].window, Ring)


@dataclass(frozen=True)
class EveryOther(Admit):
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
class Strongest(Recall):
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
