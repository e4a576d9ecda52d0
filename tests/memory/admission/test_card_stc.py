"""What must hold for STC (arXiv 2512.00891) of what it lets in: salient tokens, and tokens that an encoder does anew."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn.functional import gelu, layer_norm

from evenflow.memory.admission import FULL, Recomputed, Salient

from . import oracle

TOKENS, DIM, HEADS, LAYERS = 49, 32, 4, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def salient(frames, **params):
    ours = Salient(**params)
    return ours.step(frames, ours.start())[0]


def slow_salient(frames, dropped, alpha, window):
    """Token by token: indices that stay, frame by frame."""
    history, out = [], []
    for frame in frames.tolist():
        mean = [sum(column) / len(frame) for column in zip(*frame, strict=True)]
        scores = []
        for token in frame:
            score = 1 - oracle.cosine(token, mean)
            if history:
                recent = history[-window:]
                past = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
                score = alpha * (1 - oracle.cosine(token, past)) + (1 - alpha) * score
            scores.append(score)
        count = len([n for n in range(len(frame)) if n + 1 <= len(frame) * (1 - dropped) + 1e-9])
        order = sorted(range(len(frame)), key=lambda i: -scores[i])
        out.append(sorted(order[:count]))
        history.append(mean)
    return out


@settings(max_examples=30, deadline=None)
@given(
    some.integers(1, 9), some.integers(1, 8), some.sampled_from([0.0, 0.25, 0.7, 1.0]), some.sampled_from([0.0, 0.5, 1.0]),
    some.integers(1, 4), some.integers(1, 4), some.integers(0, 10**6),
)  # fmt: skip
def test_salient_equals_the_definition_in_any_cut(n, tokens, dropped, alpha, window, size, seed):
    frames, ours = random(n, tokens, 5, seed=seed), Salient(dropped, alpha, window)
    expected, state, rows = slow_salient(frames, dropped, alpha, window), ours.start(), []
    for at in range(0, n, size):
        verdict, state = ours.step(frames[at : at + size], state)
        rows += [row.nonzero()[:, 0].tolist() for row in verdict.keep]
        assert len(state) <= window
    assert rows == expected


def test_point_6_a_fixed_number_in_order_and_what_is_far_always():
    common, frames = random(DIM), 20
    items = common + 0.3 * random(frames, TOKENS, DIM)
    items[:, 7] = common  # equal to both anchors, nearly
    items[:, 30] = -common
    verdict = salient(items)
    assert verdict.keep.sum(1).tolist() == [TOKENS // 4] * frames
    assert verdict.keep[:, 30].all() and not verdict.keep[:, 7].any()
    one = salient(items, dropped=1 / TOKENS)
    assert (~one.keep).nonzero()[:, 1].tolist() == [7] * frames
    assert torch.equal(verdict.keep, salient(3 * items).keep)


def test_point_6_alpha_chooses_the_anchor():
    past = random(DIM)
    first = past.expand(4, TOKENS, DIM)
    other = past + 2 * random(DIM, seed=1) + 0.1 * random(TOKENS, DIM, seed=2)
    other[3], other[9] = past, -past - 4 * random(DIM, seed=1)
    items = torch.cat([first, other[None]])
    temporal, spatial = (salient(items, alpha=a, dropped=1 - 1.01 / TOKENS).keep[-1] for a in (1.0, 0.0))
    against = 1 - torch.cosine_similarity(other, past[None])
    own = 1 - torch.cosine_similarity(other, other.mean(0, keepdim=True))
    assert temporal.nonzero().item() == against.argmax() and spatial.nonzero().item() == own.argmax()
    fewest = salient(items, alpha=1.0, dropped=1 / TOKENS).keep[-1]
    assert (~fewest).nonzero().item() == 3  # what was there before is the first to go


def test_point_5_the_history_is_bounded():
    ours = Salient(window=5)
    state = ours.start()
    for t in range(30):
        _, state = ours.step(random(1, 6, 4, seed=t), state)
    assert state.shape == (5, 4) and state.untyped_storage().nbytes() == 5 * 4 * 8


# -- what an encoder does anew ---------------------------------------------------------------------------------------


def weights(seed=0):
    shapes = [(DIM, DIM)] * 4 + [(DIM, 4 * DIM), (4 * DIM, DIM)]
    return [[random(*s, seed=100 * layer + n + seed) * 0.6 / s[0] ** 0.5 for n, s in enumerate(shapes)] for layer in range(LAYERS)]  # fmt: skip


def normed(x):
    return layer_norm(x, (DIM,))


class Encoder:
    """A transformer that computes anew what `Recomputed` says, layer by layer; for the rest it adds what it had."""

    def __init__(self, share, interval, layers=None):
        self.rule, self.layers = Recomputed(share, interval), layers or weights()
        self.states, self.held = [self.rule.start() for _ in self.layers], [{} for _ in self.layers]
        self.chosen = []

    def __call__(self, x):
        self.chosen = []
        for n, (wq, wk, wv, wo, up, down) in enumerate(self.layers):
            y, held = normed(x), self.held[n]
            k = y @ wk
            verdict, self.states[n] = self.rule.step(k[None], self.states[n])
            do = verdict.keep[0].nonzero()[:, 0]
            self.chosen.append(do)
            v, a, m = (held[name].clone() if held else torch.zeros_like(x) for name in "vam")
            v[do] = y[do] @ wv
            q = (y[do] @ wq).unflatten(1, (HEADS, -1)).transpose(0, 1)
            keys, values = (t.unflatten(1, (HEADS, -1)).transpose(0, 1) for t in (k, v))
            mixed = (q @ keys.mT * (DIM // HEADS) ** -0.5).softmax(-1) @ values
            a[do] = mixed.transpose(0, 1).flatten(1) @ wo
            x = x + a
            m[do] = gelu(normed(x[do]) @ up) @ down
            if len(do) == len(x):
                self.held[n] = {"v": v, "a": a, "m": m}
            x = x + m
        return x


def off(ours, full):
    return float((ours - full).norm() / full.norm())


@pytest.mark.parametrize("share", [0.05, 0.25, 1.0])
def test_point_1_the_same_frame_twice_and_all_tokens_are_exact(share):
    frame, other = random(TOKENS, DIM), random(TOKENS, DIM, seed=1)
    full = Encoder(1.0, 1)
    encoder = Encoder(share, 4)
    encoder(frame)
    assert off(encoder(frame), full(frame)) < 1e-12
    if share == 1:
        assert off(encoder(other), full(other)) == 0
    always = Encoder(share, 1)
    assert all(off(always(x), full(x)) == 0 for x in (frame, other, frame))


def test_point_2_what_changed_is_done_anew_and_errors_fall_with_the_share():
    frame = random(TOKENS, DIM)
    changed = torch.arange(3, 11)
    after = frame.clone()
    after[changed] = random(len(changed), DIM, seed=7)
    full, errors = Encoder(1.0, 1)(after), []
    for share in (0.25, 0.5, 0.75, 1.0):
        encoder = Encoder(share, 100)
        copied = encoder(frame)
        ours = encoder(after)
        assert set(changed.tolist()) <= set(encoder.chosen[0].tolist())
        assert len(encoder.chosen[0]) == int(TOKENS * share)
        errors.append(off(ours, full))
        assert off(ours[changed], full[changed]) < 0.25 * off(copied[changed], full[changed])
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 < errors[0] < 0.1


def test_point_4_errors_of_a_drift_grow_until_the_next_whole_frame():
    frame, step = random(TOKENS, DIM), 0.1 * random(TOKENS, DIM, seed=5)
    frames = [frame + t * step for t in range(12)]
    full = Encoder(1.0, 1)
    worst = []
    for interval in (4, 12):
        encoder = Encoder(0.25, interval)
        errors = [off(encoder(x), full(x)) for x in frames]
        for first in range(0, 12, interval):
            part = errors[first : first + interval]
            assert part[0] < 1e-12 and part == sorted(part)
        worst.append(max(errors))
    assert worst[0] < worst[1]  # without a whole frame in between it is off by more


def test_point_5_and_7_one_frame_is_held_and_any_cut_is_the_same():
    keys = random(13, 10, 6)
    for interval in (1, 3, 5, 100):
        ours = Recomputed(0.3, interval)
        whole, end = ours.step(keys, ours.start())
        for size in (1, 2, 4, 7):
            state, rows = ours.start(), []
            for at in range(0, 13, size):
                verdict, state = ours.step(keys[at : at + size], state)
                rows.append(verdict.keep)
            assert torch.equal(torch.cat(rows), whole.keep)
            assert torch.equal(state.reference, end.reference) and state.number == 13
        reference = keys[(12 // interval) * interval]
        assert torch.equal(end.reference, reference) and end.reference.untyped_storage().nbytes() == 10 * 6 * 8
        last = whole.keep[-1]
        if 12 % interval:
            like = torch.cosine_similarity(keys[-1], reference)
            assert last.sum() == 3 and like[last].max() <= like[~last].min()
        else:
            assert last.all()
        assert (whole.resolution == FULL).all()


def test_edge_cases_of_salience_are_refused_or_exact():
    for wrong in (lambda: Salient(dropped=1.1), lambda: Salient(alpha=-1), lambda: Salient(window=0),
                  lambda: Recomputed(share=2), lambda: Recomputed(interval=0)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            wrong()
    for ours in (Salient(), Recomputed()):
        _, state = ours.step(random(3, 8, 4), ours.start())
        again, same = ours.step(random(0, 8, 4), state)
        assert again.keep.shape == (0, 8) and same is state
        with pytest.raises(ValueError, match="begin a stream"):
            ours.step(random(2, 8, 5), state)
        with pytest.raises(ValueError, match="NaN"):
            ours.step(random(2, 8, 4) * torch.nan, state)
        assert ours.step(random(2, 8, 4, seed=3), state)[0].keep.shape == (2, 8)
    assert Recomputed(share=0.0).step(random(2, 8, 4), Recomputed().start())[0].keep.sum(1).tolist() == [8, 1]
