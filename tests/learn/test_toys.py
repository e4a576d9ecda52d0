"""The small tasks are what they say they are, and the back-copy model cannot do without the sink it has grown."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evenflow as ef
from evenflow.learn import backcopy, toys


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), triggers=st.integers(1, 60))
def test_after_a_trigger_comes_the_token_before_it(seed, triggers):
    task = backcopy.BackCopy(triggers=triggers, seed=seed % 7)
    ids = task.samples(4, 60, seed)
    assert ids.shape == (4, 60) and ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all() and (ids[:, 1:] > 0).all() and (ids < task.vocabulary).all()
    copied = task.triggered(ids)[:, 1:-1]
    assert (ids[:, 2:] == ids[:, :-2])[copied].all()
    assert not (task.triggered(ids)[:, 1:] & task.triggered(ids)[:, :-1]).any()  # so there is always one to copy


def test_other_tokens_follow_the_table():
    task = backcopy.BackCopy(vocabulary=12, triggers=4)
    table = task.table()
    plain = [0, *range(5, 12)]
    assert np.allclose(table[plain].sum(1), 1.0) and (table[plain, 0] == 0).all() and (table[0, :5] == 0).all()
    ids = task.samples(400, 100, 1)
    now, following = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    for token in range(5, 12):
        after = following[now == token]
        seen = np.bincount(after, minlength=12) / len(after)
        # Four standard deviations of a share, counted on so many.
        assert (np.abs(seen - table[token]) <= 4 * np.sqrt(table[token] * (1 - table[token]) / len(after))).all()


def test_patterns_repeat_between_noise():
    """Far more tokens equal the one some period back than chance, 1 in 31, would have; the sink comes first or never."""
    for sink in (True, False):
        task = toys.Repeat(sink)
        ids = task.samples(50, 200, 3)
        assert ids.shape == (50, 200) and ids.dtype == torch.int64 and (ids[:, 1:] > 0).all()
        assert bool((ids[:, 0] == 0).all()) == sink and ids.max() < task.vocabulary
        equal = {lag: float((ids[:, 1 + lag :] == ids[:, 1:-lag]).float().mean()) for lag in (1, 2, 5, 9, 14)}
        assert max(equal[1], equal[2]) < 0.05 < min(equal[5], equal[9], equal[14]) - 0.01


@pytest.mark.parametrize("period", [5, 14])
def test_recall_names_the_places_that_can_be_known(period):
    ids, places = toys.Repeat(sink=True).recall(6, period, 2)
    assert ids.shape == (6, 81 + 4 * period) and len(places) == 2 * period
    assert (ids[:, places] == ids[:, places - period]).all() and (ids[:, places] == ids[:, places - 2 * period]).all()


@pytest.mark.parametrize("task", [backcopy.BackCopy(), toys.Repeat(sink=True), toys.Repeat(sink=False)])
def test_samples_depend_on_the_seed_alone(task):
    assert torch.equal(task.samples(3, 50, 5), task.samples(3, 50, 5))
    assert not torch.equal(task.samples(3, 50, 5), task.samples(3, 50, 6))
    assert task.stream(300, 5).shape == (300,) and torch.equal(task.stream(300, 5), task.stream(300, 5))


@pytest.mark.parametrize("train", [backcopy.train, lambda **more: toys.train_repeat(True, **more)])
def test_the_same_seed_gives_the_same_model(train):
    told = []
    (one, _), (same, _), (other, _) = (
        train(seed=seed, steps=20, progress=lambda *at: told.append(at)) for seed in (3, 3, 4)
    )
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)
    assert not one.training and [at[:2] for at in told] == [(step, 20) for step in range(1, 21)] * 3
    assert told[19][2] < told[0][2]


def test_the_back_copy_model_fails_without_its_sink():
    """Half of the usual training is enough: attention rests on the first token, and reading breaks without it."""
    model, task = backcopy.train(steps=1000)
    ids = task.samples(16, 64, 10**6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first = model(ids, output_attentions=True).attentions[0][:, 0, 8:, 0]
    model.set_attn_implementation("sdpa")
    triggered = task.triggered(ids)[:, 8:]
    assert first[~triggered].mean() > 0.6 > 0.1 > first[triggered].mean()
    stream = torch.stack([task.stream(300, 10**7 + row) for row in range(4)])
    without, kept, again = (
        math.exp(ef.open(model, memory).surprisal(stream)[:, 42:].mean())
        for memory in ("window(window=40)", "streaming-llm(sink=1, window=39)", "recompute(window=39, sink=1)")
    )
    assert without > 2 * kept and abs(kept / again - 1) < 0.01
