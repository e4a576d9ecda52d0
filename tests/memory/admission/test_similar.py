"""What must hold for StreamDiffusion's stochastic similarity filter (arXiv 2312.12491)."""

import pytest
import torch

from evenflow.memory.admission import FULL, NONE, SimilarFrames, SimilarState
from evenflow.memory.admission.similar import chance


def kept(frames, **params):
    ours = SimilarFrames(**params)
    return ours.step(frames, ours.start())[0]


def beside(cosine, n=1):
    """A frame and n others of that likeness to it."""
    reference, side = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    reference[0], side[1] = 1.0, 1.0
    return reference, (cosine * reference + (1 - cosine**2) ** 0.5 * side).expand(n, -1)


def test_point_5_equal_frames_get_in_when_they_are_forced():
    verdict = kept(torch.ones(40, 3, 4, 4))
    assert verdict.keep.nonzero()[:, 0].tolist() == [0, 12, 24, 36]
    assert verdict.resolution.tolist() == [FULL if t in (0, 12, 24, 36) else NONE for t in range(40)]
    assert verdict.novelty.tolist() == [1] + [0] * 39
    assert kept(torch.zeros(14, 2)).keep.nonzero()[:, 0].tolist() == [0, 12]  # mid-grey, which has no direction


def test_point_5_the_share_that_gets_in_is_the_formula():
    cosines = torch.tensor([0.999, 0.995, 0.99, 0.985, 0.98, 0.5], dtype=torch.float64)
    shares = (1 - SimilarFrames().probability(cosines)).tolist()
    assert shares == pytest.approx([0.05, 0.25, 0.5, 0.75, 1, 1])
    drawn = torch.tensor([chance(1, n) for n in range(2000)])
    for share in shares[:4]:
        assert (drawn > 1 - share).float().mean().item() == pytest.approx(share, abs=0.03)
    reference, frame = beside(0.99)
    ours, n = SimilarFrames(seed=1), 500
    rate = sum(float(ours.step(frame, SimilarState(reference, 0, k))[0].keep.float()) for k in range(n)) / n
    assert rate == int((drawn[:n] > 0.5).sum()) / n == pytest.approx(0.5, abs=0.06)


def test_point_5_the_reference_stays_where_a_frame_is_skipped():
    reference, frames = beside(0.99, 60)
    ours, both = SimilarFrames(), set()
    for number, frame in enumerate(frames):
        verdict, after = ours.step(frame[None], SimilarState(reference, 0, number))
        keep = bool(verdict.keep)
        both.add(keep)
        assert torch.equal(after.last, frame if keep else reference)
    assert both == {True, False}


def test_pitfall_a_frame_that_got_in_by_chance_does_not_set_the_count_back():
    reference, frames = beside(0.5)
    ours = SimilarFrames(most=10)
    _, after = ours.step(frames, SimilarState(reference, 7, 3))
    assert after.skipped == 7
    _, forced = ours.step(reference[None], SimilarState(reference, 11, 3))
    assert forced.skipped == 0


def test_another_seed_is_another_chance_and_a_replay_the_same():
    frames = torch.nn.functional.normalize(torch.ones(200, 32) + 0.1 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0)), dim=1)  # fmt: skip
    one, again, other = (kept(frames, seed=seed).keep for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_threshold_of_one_skips_none():
    assert kept(torch.ones(30, 4), threshold=1.0).keep.all()
