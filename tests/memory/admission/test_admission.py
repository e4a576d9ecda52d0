"""What every admission promises: the definition, whatever the cut; a state that does not grow; errors that help."""

import copy
from dataclasses import fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from evenflow.memory.admission import (
    FULL,
    LOW,
    NONE,
    Curvature,
    Fifo,
    SimilarFrames,
    TokenDrop,
    Verdict,
)

from . import oracle

ADMISSIONS = {
    "drop": TokenDrop(0.5),
    "drop, last kept": TokenDrop(0.5, reference="last_kept"),
    "drop, share": TokenDrop(share=0.4),
    "drop, pixels": TokenDrop(0.2, by="pixels"),
    "curve": Curvature(),
    "curve, from zero": Curvature(warm="zero", eps_noise=0.3),
    "similar": SimilarFrames(0.5, 3),
}
every = pytest.mark.parametrize("name", ADMISSIONS)


def walk(n, *shape, seed=0, step=0.5, dtype=torch.float64):
    """Items that change a little, now and then all at once."""
    made = torch.Generator().manual_seed(seed)
    jump = torch.rand(n, generator=made) < 0.15
    item, out = torch.randn(shape, generator=made, dtype=torch.float64), []
    for t in range(n):
        fresh = torch.randn(shape, generator=made, dtype=torch.float64)
        item = fresh if jump[t] else item + step * torch.rand((), generator=made) * fresh
        out.append(item)
    return torch.stack(out).to(dtype)


def items_for(name, n, **kinds):
    return walk(n, 6, **kinds) if name.startswith("curve") else walk(n, 5, 4, **kinds)


def fed(admission, items, cuts):
    """One verdict and the last state of items in pieces of those sizes."""
    state, said, at = admission.start(), [], 0
    for size in [*cuts, len(items)]:
        verdict, state = admission.step(items[at : at + size], state)
        said.append(verdict)
        at += size
    return Verdict(*(torch.cat([getattr(v, f.name) for v in said]) for f in fields(Verdict))), state


def tensors(state):
    if isinstance(state, Tensor):
        return [state]
    return [getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), Tensor)] if is_dataclass(state) else []  # fmt: skip


def same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Verdict))


@settings(max_examples=40, deadline=None)
@given(
    some.integers(1, 12), some.integers(1, 6), some.sampled_from([-0.2, 0.25, 0.8, 1.0]),
    some.sampled_from([None, 0.0, 0.3, 1.0]), some.sampled_from(["features", "pixels"]),
    some.sampled_from(["previous", "last_kept"]), some.integers(1, 3), some.integers(0, 10**6),
)  # fmt: skip
def test_token_drop_equals_the_definition(n, tokens, threshold, share, by, reference, frames, seed):
    items = walk(n, tokens, 3, seed=seed) if frames == 1 or by == "features" else walk(n, frames, tokens, 3, seed=seed)
    ours = TokenDrop(threshold, share, by, reference)
    verdict, _ = ours.step(items, ours.start())
    keep = torch.tensor(oracle.token_drop(items, threshold, share, by, reference))
    assert torch.equal(verdict.keep, keep)
    assert verdict.novelty.tolist() == pytest.approx(keep.double().mean(1).tolist())
    assert verdict.resolution.tolist() == [FULL if any(row) else NONE for row in keep.tolist()]


@settings(max_examples=40, deadline=None)
@given(
    some.integers(1, 40), some.sampled_from([0.0, 0.2, 1.0]), some.sampled_from([(0.0, 1.0), (-1.0, 0.5), (0.5, 2.0)]),
    some.sampled_from([0.5, 0.9, 0.95]), some.sampled_from(["first", "zero"]), some.sampled_from([0.0, 0.4]),
    some.sets(some.integers(0, 39), max_size=3), some.integers(0, 10**6),
)  # fmt: skip
def test_curvature_equals_the_definition(n, lam, ks, gamma, warm, eps_noise, asked, seed):
    items = walk(n, 6, seed=seed)
    ours = Curvature(lam, *ks, gamma, warm, eps_noise)
    questions = torch.tensor([t in asked for t in range(n)])
    verdict, _ = ours.step(items, ours.start(), asked=questions)
    states, scores = oracle.curve(items, lam, *ks, gamma, warm, eps_noise, asked)
    assert verdict.resolution.tolist() == states
    assert torch.equal(verdict.keep, verdict.resolution > NONE)
    theirs = [s / (2 + 2 * lam) for s in scores[3:]]
    assert verdict.novelty[3:].tolist() == pytest.approx(theirs, abs=1e-6)
    assert verdict.novelty[0] == 1 and verdict.novelty.min() >= 0 and verdict.novelty.max() <= 1


@settings(max_examples=40, deadline=None)
@given(some.integers(1, 40), some.sampled_from([0.2, 0.9, 0.98, 1.0]), some.integers(0, 5), some.integers(0, 10**6))
def test_similar_frames_equal_the_definition(n, threshold, most, seed):
    items = walk(n, 3, 2, seed=seed, step=0.2)
    ours = SimilarFrames(threshold, most, seed % 7)
    verdict, state = ours.step(items, ours.start())
    keep = oracle.similar(items, threshold, most, seed % 7)
    assert verdict.keep.tolist() == keep
    assert torch.equal(state.last, items[max(t for t in range(n) if keep[t])])


@settings(max_examples=40, deadline=None)
@given(some.lists(some.integers(0, 2), min_size=1, max_size=30), some.integers(3, 12), some.integers(1, 3), some.integers(1, 3), some.integers(1, 7))  # fmt: skip
def test_fifo_equals_the_definition_in_any_cut(resolutions, room, low, full, size):
    ours, theirs = Fifo(room, (low, full)), oracle.fifo(resolutions, room, (low, full))
    held = ours.start()
    for at in range(0, len(resolutions), size):
        some_ = torch.tensor(resolutions[at : at + size])
        held = ours.step(Verdict(some_ > NONE, some_, some_.float()), held)
        assert held.number.tolist() == theirs[min(at + size, len(resolutions)) - 1]
        assert held.resolution.tolist() == [resolutions[n] for n in held.number]


@every
@settings(max_examples=12, deadline=None)
@given(cuts=some.lists(some.integers(0, 6), max_size=6), seed=some.integers(0, 10**6))
def test_any_cut_is_the_same(name, cuts, seed):
    items = items_for(name, 20, seed=seed)
    whole, end = fed(ADMISSIONS[name], items, [])
    pieces, same_end = fed(ADMISSIONS[name], items, cuts)
    ones, _ = fed(ADMISSIONS[name], items, [1] * 20)
    assert same(whole, pieces) and same(whole, ones)
    for a, b in zip(tensors(end), tensors(same_end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every
def test_it_does_not_know_what_comes(name):
    items = items_for(name, 20)
    other = torch.cat([items[:12], items_for(name, 8, seed=5)])
    a, b = (fed(ADMISSIONS[name], x, [])[0] for x in (items, other))
    assert torch.equal(a.keep[:12], b.keep[:12]) and torch.equal(a.resolution[:12], b.resolution[:12])


@every
def test_the_state_is_bounded_its_own_and_never_changed(name):
    items = items_for(name, 300)
    sizes, state = set(), ADMISSIONS[name].start()
    for at in range(0, 300, 10):
        chunk = items[at : at + 10].clone()
        before, copied = state, copy.deepcopy(state)
        _, state = ADMISSIONS[name].step(chunk, state)
        chunk.fill_(7)  # the caller's buffer is used again
        assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(copied), strict=True))
        sizes.add(sum(x.untyped_storage().nbytes() for x in tensors(state)))
    assert len(sizes) == 1
    replayed = fed(ADMISSIONS[name], items, [10] * 30)[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(replayed), strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_decides_as_its_own_numbers_in_double_do(name, dtype):
    items = items_for(name, 60, dtype=dtype)
    ours, exact = fed(ADMISSIONS[name], items, [])[0], fed(ADMISSIONS[name], items.double(), [])[0]
    assert ours.novelty.dtype == torch.float32 and ours.resolution.dtype == torch.int64 and ours.keep.dtype == torch.bool  # fmt: skip
    assert torch.equal(ours.keep, exact.keep) and torch.equal(ours.resolution, exact.resolution)


@every
@pytest.mark.parametrize("wrong", ["integers", "axes", "NaN", "size", "dtype"])
def test_bad_items_are_refused_and_change_nothing(name, wrong):
    admission, items = ADMISSIONS[name], items_for(name, 12)
    _, state = admission.step(items[:6], admission.start())
    bad = items[6:].clone()
    if wrong == "integers":
        bad = bad.long()
    elif wrong == "axes":
        bad = bad[..., None, None, None]
    elif wrong == "NaN":
        bad.view(-1)[-1] = torch.nan
    elif wrong == "size":
        bad = bad[..., :-1]
    elif wrong == "dtype":
        bad = bad.float()
    with pytest.raises(ValueError, match=r"expected|begin a stream|repair"):
        admission.step(bad, state)
    after, _ = admission.step(items[6:], state)
    whole, _ = fed(admission, items, [])
    assert torch.equal(after.keep, whole.keep[6:])


def test_configurations_without_a_sense_are_refused():
    for wrong in (
        lambda: TokenDrop(by="tokens"), lambda: TokenDrop(reference="kept"), lambda: TokenDrop(share=1.2),
        lambda: Curvature(k1=1.0, k2=1.0), lambda: Curvature(gamma=1.0), lambda: Curvature(lam=-0.1),
        lambda: Curvature(warm="none"), lambda: Fifo(10, (1, 11)), lambda: Fifo(10, (0, 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            wrong()
    with pytest.raises(ValueError, match="expected bool"):
        Curvature().step(torch.randn(3, 4), Curvature().start(), asked=torch.ones(2, dtype=torch.bool))
    assert (NONE, LOW, FULL) == (0, 1, 2)
