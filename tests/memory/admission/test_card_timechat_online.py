"""What must hold for TimeChat-Online (arXiv 2504.17343): tokens that repeat their place do not get in."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from evenflow.memory import Rope
from evenflow.memory.admission import FULL, NONE, Novelty, TokenDrop
from evenflow.memory.features.flash import grids
from evenflow.recipes.reference.plain import attention, rotated

ROWS, COLUMNS, DIM = 4, 4, 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scenes(lengths, seed=0, noise=0.0):
    """Slices [n, 16, 32] that stand still, and then are all others."""
    shown = [random(1, ROWS * COLUMNS, DIM, seed=seed + n).expand(length, -1, -1) for n, length in enumerate(lengths)]
    whole = torch.cat(shown)
    return whole + noise * random(*whole.shape, seed=seed + 99)


def kept(items, **params):
    drop = TokenDrop(**params)
    return drop.step(items, drop.start())[0]


@pytest.mark.parametrize("by", ["features", "pixels"])
@pytest.mark.parametrize("reference", ["previous", "last_kept"])
def test_point_1_of_a_scene_at_rest_the_first_slice_gets_in_and_nothing_else(by, reference):
    verdict = kept(scenes([50]), threshold=0.9 if by == "features" else 1e-9, by=by, reference=reference)
    assert verdict.keep.sum(1).tolist() == [16] + [0] * 49
    assert verdict.novelty.tolist() == [1] + [0] * 49
    assert verdict.resolution.tolist() == [FULL] + [NONE] * 49
    black = torch.zeros(5, 16, DIM)  # nothing is as much like nothing as can be
    assert kept(black).keep.sum(1).tolist() == [16, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_point_2_at_one_nothing_is_dropped(dtype):
    items = torch.cat([scenes([8], seed=seed) for seed in range(40)]).to(dtype)
    assert kept(items, threshold=1.0).keep.all()
    assert kept(items, threshold=0.0, by="pixels").keep.all() and kept(items, share=0.0).keep.all()


def test_point_3_the_lower_the_threshold_the_fewer_get_in():
    items = scenes([8], noise=0.1) + torch.linspace(0, 2, 16, dtype=torch.float64)[:, None] * random(8, 16, DIM, seed=8)
    taus = (1.0, 0.8, 0.7, 0.5, 0.25, 0.0)
    sets = [kept(items, threshold=tau).keep for tau in taus]
    assert all((b <= a).all() for a, b in pairwise(sets))
    assert len({int(s.sum()) for s in sets}) == len(taus)
    for share in (0.0, 0.3, 0.5, 0.99, 1.0):
        dropped = 16 - kept(items, share=share).keep.sum(1)
        assert dropped.tolist() == [0] + [int(share * 16)] * 7


def test_point_4_survivors_keep_their_places_and_attention_is_that_with_dropped_keys_masked():
    """Two layers over slices and text: all tokens with a mask, and what got in alone at the positions it had."""
    slices, text, heads = 6, 5, 2
    items = scenes([3, 3], noise=0.2)
    keep = kept(items, threshold=0.9).keep
    assert 0 < keep[1:].sum() < keep[1:].numel()
    positions = grids(torch.arange(slices), ROWS, COLUMNS)
    after = positions.max() + 1 + torch.arange(text)
    positions = torch.cat([positions, after[:, None].expand(-1, 3)])
    alive = torch.cat([keep.flatten(), torch.ones(text, dtype=torch.bool)])
    x = torch.cat([items.flatten(0, 1), random(text, DIM, seed=3)])
    weights = [random(4, DIM, DIM, seed=20 + n) / DIM**0.5 for n in range(2)]
    dim, rope = DIM // heads, Rope.axial((8, 4, 4))

    def network(x, positions, alive):
        n = len(x)
        hidden = torch.ones(n, n).triu(1).bool() | ~alive
        hidden.fill_diagonal_(False)
        for q, k, v, out in weights:
            split = [(x @ w).unflatten(1, (heads, dim)).transpose(0, 1) for w in (q, k, v)]
            turned = [rotated(t, positions, rope) for t in split[:2]]
            bias = torch.zeros(heads, n, n, dtype=x.dtype).masked_fill(hidden, -torch.inf)
            x = x + attention(*turned, split[2], bias).transpose(0, 1).flatten(1) @ out
        return x

    whole = network(x, positions, alive)[alive]
    short = network(x[alive], positions[alive], torch.ones(int(alive.sum()), dtype=torch.bool))
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-10)
    assert torch.equal(positions[alive][-text:], positions[-text:])  # what follows is where it was
    closed_up = torch.arange(int(alive.sum()))[:, None].expand(-1, 3)
    assert (network(x[alive], closed_up, alive[alive]) - whole).abs().max() > 1e-3


def test_point_5_slices_one_by_one_are_one_pass():
    items, drop = scenes([5, 1, 6], noise=0.4), TokenDrop(0.7)
    state, rows = drop.start(), []
    for item in items:
        verdict, state = drop.step(item[None], state)
        rows.append(verdict.keep)
    assert torch.equal(torch.cat(rows), kept(items, threshold=0.7).keep)
    assert torch.equal(state, items[-1])  # one slice is all that it holds


def test_point_6_what_changes_gets_in_and_nothing_else():
    """A scene, another at slice 3 alone, and the first again: to come back is a change too."""
    first, other = scenes([1]), scenes([1], seed=50)
    items = torch.cat([first, first, first, other, first])
    items[:, [2, 11]] = random(5, 2, DIM, seed=9)  # always something else
    verdict = kept(items, threshold=0.5)
    assert verdict.keep.sum(1).tolist() == [16, 2, 2, 16, 16]
    assert verdict.keep[1].nonzero()[:, 0].tolist() == [2, 11]
    assert (1 - verdict.novelty).tolist() == pytest.approx([0, 0.875, 0.875, 0, 0])


def test_point_7_the_trigger_fires_at_cuts():
    """The beginning of a stream is one too: there is nothing yet that it repeats."""
    verdict = kept(scenes([7, 5, 9, 4]), threshold=0.25)
    ratio = 1 - verdict.novelty
    cuts, rest = [7, 12, 21], [t for t in range(1, 25) if t not in (7, 12, 21)]
    assert ratio[cuts].max() < ratio[rest].min()
    speak, _ = Novelty().step(verdict.novelty)
    assert speak.nonzero()[:, 0].tolist() == [0, *cuts]


def turning(slices, angle):
    """Every token turns by a constant angle a slice, in a plane of its own."""
    a, b = torch.linalg.qr(random(16, DIM, 2)).Q.unbind(-1)
    angles = (angle * torch.arange(slices, dtype=torch.float64))[:, None, None]
    return angles.cos() * a + angles.sin() * b


@pytest.mark.parametrize(("by", "threshold"), [("features", 0.9), ("pixels", 0.05)])
def test_point_8_slow_drift_is_lost_to_the_previous_slice_and_not_to_the_last_kept_token(by, threshold):
    items = turning(200, 0.1)  # cos 0.995 from slice to slice, a full turn in 63
    lost = kept(items, threshold=threshold, by=by)
    assert lost.keep.sum(1).tolist() == [16] + [0] * 199 and lost.novelty[1:].max() == 0
    found = kept(items, threshold=threshold, by=by, reference="last_kept")
    if by == "features":
        every = math.floor(math.acos(0.9) / 0.1) + 1  # 0.451 is reached in five steps of 0.1
        assert found.keep.all(1).nonzero()[:, 0].tolist() == list(range(0, 200, every))
    assert (found.keep[1:].sum(0) > 10).all()

    def worst(verdict):
        """What is held of each place against what is there: the largest cosine distance, or difference."""
        held = items[0]
        errors = []
        for item, keep in zip(items, verdict.keep, strict=True):
            held = torch.where(keep[:, None], item, held)
            errors.append((1 - (held * item).sum(-1)).max() if by == "features" else (held - item).abs().mean(-1).max())
        return float(max(errors))

    bound = 0.1 if by == "features" else 0.05
    assert worst(found) <= bound + 1e-9 and worst(lost) > 4 * bound


def test_pitfall_another_video_begins_with_a_start():
    drop = TokenDrop(0.5)
    video = scenes([3])
    _, state = drop.step(video, drop.start())
    assert drop.step(video, state)[0].keep.sum() == 0
    assert drop.step(video, drop.start())[0].keep.sum(1).tolist() == [16, 0, 0]


def test_pitfall_thresholds_run_against_each_other():
    items = scenes([2, 2], noise=0.3)
    counts = {by: [int(kept(items, threshold=t, by=by).keep.sum()) for t in (0.2, 0.95)] for by in ("features", "pixels")}  # fmt: skip
    assert counts["features"][0] < counts["features"][1] and counts["pixels"][0] > counts["pixels"][1]


def test_pitfall_a_moving_camera_defeats_it():
    picture = random(ROWS, 40, DIM)
    moving = torch.stack([picture[:, t : t + COLUMNS].flatten(0, 1) for t in range(10)])
    assert kept(moving).keep.float().mean() > 0.95


def test_pitfall_of_slices_of_two_frames_the_last_is_compared_with_the_first_before():
    slow, still = (
        torch.arange(12).view(6, 2, 1, 1) * step for step in (0.02, 0.0)
    )  # a brightness that rises by frames
    items = (slow + still).expand(-1, -1, 5, 3).double()
    assert kept(items, threshold=0.0601, by="pixels").keep.sum(1).tolist() == [5, 0, 0, 0, 0, 0]
    assert kept(items, threshold=0.0599, by="pixels").keep.sum(1).tolist() == [5] * 6  # three frames lie between
    with pytest.raises(ValueError, match=r"expected float \[n, tokens, d\]"):
        kept(items)


def test_pitfall_samples_of_a_batch_keep_different_numbers():
    """One state a stream; masks are given, so that whoever batches pads or packs as it likes."""
    a, b = scenes([4]), scenes([2, 2], seed=5)
    assert [kept(x, threshold=0.5).keep.sum().item() for x in (a, b)] == [16, 32]


def test_a_share_of_equally_like_tokens_drops_the_first():
    assert kept(scenes([2]), share=0.25).keep[1].tolist() == [False] * 4 + [True] * 12


def test_no_items_are_no_news():
    drop = partial(TokenDrop(0.5).step, torch.zeros(0, 16, DIM).double())
    verdict, state = drop(None)
    assert verdict.keep.shape == (0, 16) and len(verdict.novelty) == 0 and state is None
    held = random(16, DIM)
    assert drop(held)[1] is held
