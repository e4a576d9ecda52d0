"""What must hold for CurveStream (arXiv 2603.19571): curvature tells what similarity cannot, at thresholds that follow."""

import math
from itertools import pairwise

import pytest
import torch

from evenflow.memory.admission import FULL, LOW, NONE, Curvature, Fifo, Verdict, curvature

DIM = 384


def directions(count, seed=0, dim=DIM):
    made = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, count, generator=made, dtype=torch.float64)).Q.T


def pan(frames, theta, seed=0, dim=DIM):
    """Unit features on a great circle, one step of angle theta a frame."""
    a, b = directions(2, seed, dim)
    angle = theta * torch.arange(frames, dtype=torch.float64)[:, None]
    return angle.cos() * a + angle.sin() * b


def scores(features, **params):
    """CS of frames 3 on."""
    ours = Curvature(**params)
    verdict, _ = ours.step(features, ours.start())
    return verdict.novelty[3:].double() * (2 + 2 * ours.lam)


def routed(features, asked=None, **params):
    ours = Curvature(**params)
    return ours.step(features, ours.start(), asked=asked)[0].resolution


def pans(count=11, frames=40, theta=0.05, noise=0.0):
    """Great-circle pans, one after the other, each from a direction of its own."""
    made = torch.Generator().manual_seed(3)
    path = torch.cat([pan(frames, theta, seed=10 + n) for n in range(count)])
    return path + noise * torch.randn(path.shape, generator=made, dtype=torch.float64)


CUTS = [40 * n for n in range(1, 11)]
PAPER = {"lam": 0.2, "k1": 0.0, "k2": 1.0, "gamma": 0.95, "warm": "zero"}


@pytest.mark.parametrize(("theta", "expected"), [(0.05, 0.00125), (0.2, 0.01993), (0.5, 0.12242)])
def test_point_1_constant_turning_has_curvature_and_motion_alike(theta, expected):
    features = pan(200, theta)
    motion, bend = curvature(features)
    assert motion[0].item() == pytest.approx(expected, abs=5e-6)
    assert torch.allclose(motion, bend, rtol=1e-9) and torch.allclose(
        motion, torch.tensor(1 - math.cos(theta)).double()
    )
    ours = Curvature(lam=0.4)
    verdict, state = ours.step(features, ours.start())
    assert verdict.novelty[-1].item() * 2.8 == pytest.approx(1.4 * expected, abs=1e-5)
    assert state.variance.sqrt() < 1e-12


def test_point_2_a_turn_is_seen_where_similarity_sees_nothing():
    a, b, c = directions(3)
    step = 1e-3

    def along(path):
        return torch.nn.functional.normalize(torch.stack(path), dim=-1)

    for then, expected in ((c, 1.0), (b, 0.0), (-b, 2.0)):
        path = [a + n * step * b for n in range(5)]
        path += [path[-1] + n * step * then for n in range(1, 4)]
        motion, bend = curvature(along(path))
        assert bend[3].item() == pytest.approx(expected, abs=0.02)  # at the first frame in the new direction
        assert torch.cat([bend[:3], bend[4:]]).max() < 1e-4
        assert torch.allclose(motion, motion[0].expand_as(motion), rtol=0.02)


def test_point_3_scale_does_not_matter():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(scores(features), scores(5 * features), atol=1e-6)
    a, b, c = directions(3)
    small, large = (curvature(torch.stack([a, a + s * b, a + s * b + s * c])) for s in (1e-4, 1e-1))
    assert small[1].item() == pytest.approx(large[1].item(), abs=1e-9) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_point_4_noise_alone_has_curvature_and_a_guard_takes_it_away(noise):
    made = torch.Generator().manual_seed(1)
    still = directions(1) + noise / DIM**0.5 * torch.randn(400, DIM, generator=made, dtype=torch.float64)
    unit = torch.nn.functional.normalize(still, dim=-1)
    assert curvature(unit)[1].mean().item() == pytest.approx(1.5, abs=0.04)
    wander = directions(1) + (noise / DIM**0.5 * torch.randn(400, DIM, generator=made, dtype=torch.float64)).cumsum(0)
    assert curvature(torch.nn.functional.normalize(wander, dim=-1))[1].mean().item() == pytest.approx(1, abs=0.05)
    assert scores(still).mean() > 0.25  # the curvature is nearly all of it
    motion, bend = curvature(unit, eps_noise=2 * noise)
    assert bend.max() == 0 and motion.max() > 0
    assert torch.allclose(scores(still, eps_noise=2 * noise), motion[1:], atol=1e-6)
    assert Curvature().eps_noise == 0
    free, guarded = (routed(still, eps_noise=eps) for eps in (0.0, 2 * noise))
    assert (free > NONE).float().mean() > 0.4 and (guarded[3:] == NONE).all()
    equal = directions(1).expand(20, -1)  # scores of zero are as large as their mean
    assert (routed(equal) == FULL).all() and (routed(equal, eps_noise=noise)[3:] == NONE).all()


def test_point_5_frames_that_do_not_move_have_no_curvature():
    features = directions(1).expand(20, -1)
    motion, bend = curvature(features)
    assert motion.max() == 0 and bend.max() == 0
    assert not scores(features).isnan().any() and scores(features).max() == 0
    again = torch.cat([features, pan(10, 0.3, seed=4), features])
    assert not scores(again).isnan().any()
    nothing = torch.zeros(6, DIM)  # an encoder that gives nothing
    assert not scores(nothing).isnan().any()


def test_point_6_the_memory_is_bounded_in_order_and_has_the_frame_of_the_question():
    ours, queue = Curvature(), Fifo(20)
    state, held, asked_at = ours.start(), queue.start(), 333
    for t, feature in enumerate(pans(noise=0.002)):
        verdict, state = ours.step(feature[None], state, asked=torch.tensor([t == asked_at]))
        held = queue.step(verdict, held)
        assert len(held.number) <= 20
        assert held.number.tolist() == sorted(set(held.number.tolist()))
        if t == asked_at:
            assert held.number[-1] == t and held.resolution[-1] == FULL
    assert state.path.shape == (2, DIM) and state.path.untyped_storage().nbytes() == 2 * DIM * 8
    assert held.seen == 440 and len(held.number) == 20


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_point_7_cuts_are_clear_and_pans_are_not(noise):
    states = routed(pans(noise=noise), **PAPER)
    assert states[CUTS].tolist() == [FULL] * 10
    pan_frames = torch.ones(440, dtype=torch.bool)
    pan_frames[CUTS] = False
    pan_frames[:60] = False
    assert not (states[pan_frames] == FULL).any()
    low = [t for t in range(60, 440) if states[t] == LOW]
    if noise == 0:  # the path turns twice at a cut: towards the new scene, and at the next frame into its own direction
        assert low == [t + 1 for t in CUTS if t >= 60]
    else:
        assert 0.02 < len(low) / 371 < 0.06
    kept = int((states[60:] > NONE).sum())
    every = 380 // kept  # as many frames at even distances
    found = {t for t in range(60, 440, every) if t in CUTS}
    assert len(found) < len([t for t in CUTS if t >= 60]) / 2


def test_point_8_thresholds_follow_the_pace():
    made = torch.Generator().manual_seed(5)
    lengths = 0.002 * (0.5 + torch.rand(1500, 1, generator=made, dtype=torch.float64))
    lengths[700:] *= 5  # the stream goes on five times as fast
    steps = torch.nn.functional.normalize(torch.randn(1500, DIM, generator=made, dtype=torch.float64), dim=-1)
    states = routed(directions(1) + (lengths * steps).cumsum(0), lam=0.0)
    early, turn, late = (float((states[a:b] == FULL).float().mean()) for a, b in ((100, 700), (700, 705), (760, 1500)))
    assert turn >= 0.8 and early < 0.3 and abs(early - late) < 0.04  # 60 frames are three times 1 / (1 − gamma)

    # Scores that are all twice as large: the statistics are theirs too, and no frame is routed otherwise.
    features = pans(noise=0.002)
    score = scores(features, **PAPER)[None]
    mean, variance, said = torch.zeros(2), torch.zeros(2), []
    for now in torch.cat([score, 2 * score]).T:
        mean = mean + 0.05 * (now - mean)
        variance = 0.95 * variance + 0.05 * (now - mean) ** 2
        said.append((now >= mean).int() + (now >= mean + variance.sqrt()).int())
    said = torch.stack(said)
    assert torch.equal(said[:, 0], said[:, 1]) and torch.equal(said[:, 0].long(), routed(features, **PAPER)[3:])


def test_point_9_thresholds_do_what_they_say():
    features, infinite = pans(noise=0.002), math.inf
    assert (routed(features, k1=-infinite) > NONE).all()
    asked = torch.arange(440) == 100
    states = routed(features, asked, k2=infinite)
    assert (states[3:] == FULL).nonzero()[:, 0].tolist() == [97]
    kept, clear = [], []
    for k in (-1.0, -0.3, 0.0, 0.5, 2.0):
        kept.append(routed(features, k1=k, k2=5.0) > NONE)
        clear.append(routed(features, k1=-5.0, k2=k) == FULL)
    for sets in (kept, clear):
        assert all((b <= a).all() for a, b in pairwise(sets))
        assert sets[0].sum() > sets[-1].sum()


def test_pitfall_a_score_is_in_the_mean_that_it_is_compared_with():
    features = torch.cat([pan(50, 0.05), directions(3)[2:]])  # a spike at frame 50
    ours = Curvature()
    _, before = ours.step(features[:50], ours.start())
    _, after = ours.step(features[50:], before)
    score = scores(features)[-1]
    assert after.mean.item() == pytest.approx(0.95 * before.mean.item() + 0.05 * score.item(), rel=1e-6)
    expected = 0.95 * before.variance + 0.05 * (0.95 * (score - before.mean)) ** 2  # the distance to the new mean
    assert after.variance.item() == pytest.approx(expected.item(), rel=1e-6)


def test_pitfall_warm_starts():
    """From zero the early frames of a steady pan are all over the mean; from the first score they are at it."""
    path = pan(30, 0.05) + 0.002 * torch.randn(30, DIM, generator=torch.Generator().manual_seed(2)).double()
    first, zero = routed(path, warm="first"), routed(path, warm="zero")
    assert (first[:3] == FULL).all() and (zero[:3] == FULL).all()
    assert (zero[3:13] == FULL).all() and (first[3:13] == FULL).sum() < 7
    ours = Curvature(warm="first")
    _, state = ours.step(path[:4], ours.start())
    assert state.mean.item() == pytest.approx(scores(path[:4])[0].item(), rel=1e-6) and state.variance == 0


def test_pitfall_curvature_goes_up_to_two():
    a, b = directions(2)
    path = torch.nn.functional.normalize(torch.stack([a, a + 1e-3 * b, a]), dim=-1)
    assert curvature(path)[1].item() == pytest.approx(2, abs=1e-5)


def test_pitfall_half_precision_features_are_scored_in_single():
    path = pan(60, 0.05)
    exact = curvature(path)[1].mean()
    ours = Curvature()
    got = ours.step(path.half(), ours.start())[1]
    assert got.path.dtype == torch.float32
    half = torch.nn.functional.normalize(path.half().float(), dim=-1)
    rounded = curvature(half)[1].mean()
    lossy = torch.nn.functional.normalize(path.half(), dim=-1).diff(dim=0)
    in_half = (1 - torch.cosine_similarity(lossy[1:], lossy[:-1])).float().mean()
    assert abs(rounded - exact) < abs(in_half - exact)


def test_pitfall_a_limit_of_frames_is_no_limit_of_tokens():
    resolution = torch.tensor([LOW, FULL, LOW, NONE, FULL, FULL, LOW, LOW])
    verdict = Verdict(resolution > NONE, resolution, torch.zeros(8))
    frames, tokens = Fifo(4), Fifo(600, (64, 256))
    assert frames.step(verdict, frames.start()).number.tolist() == [4, 5, 6, 7]
    held = tokens.step(verdict, tokens.start())
    assert held.number.tolist() == [5, 6, 7]
    assert sum((64, 256)[r - 1] for r in held.resolution.tolist()) <= 600


def test_pitfall_the_queue_ignores_resolution():
    resolution = torch.tensor([FULL, LOW, LOW, LOW])
    queue = Fifo(3)
    held = queue.step(Verdict(resolution > NONE, resolution, torch.zeros(4)), queue.start())
    assert held.number.tolist() == [1, 2, 3]
