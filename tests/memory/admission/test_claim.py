"""What the claim on admission measures with: cuts, tokens of a picture, what is held, and what is let in without looking."""

import pytest
import torch

from evenflow.claims import admission
from evenflow.claims.admission import SIDE, Case, Film, films, held, in_turn, patches, share, sharp_cuts, spliced
from evenflow.memory.admission import FULL, LOW, NONE, Verdict


def pictures(count, seed=0):
    return torch.rand(count, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_tokens_are_areas_of_a_patch():
    one = pictures(2)
    seen = patches(one)
    assert seen.shape == (2, 196, 48)
    block = one[1, 16:32, 32:48]  # second row of patches, third column
    assert torch.allclose(seen[1, 14 + 2].view(4, 4, 3)[3, 0], block[12:16, :4].mean((0, 1)))


def test_a_cut_is_found_and_a_fade_is_not():
    a, b = (pictures(1, seed).expand(10, -1, -1, -1) for seed in (0, 1))
    assert list(sharp_cuts(torch.cat([a, b]))) == [10]
    part = torch.linspace(0, 1, 20)[:, None, None, None]
    assert list(sharp_cuts((1 - part) * a[:1] + part * b[:1])) == []
    made = spliced([Film("a", a), Film("b", b)])
    assert [one.cuts for one in made] == [(10,), (10,)]
    assert torch.equal(made[0].pixels[9], a[0]) and torch.equal(made[0].pixels[10], b[0])


def test_what_is_held_is_what_got_in_last():
    seen = torch.arange(4.0)[:, None, None].expand(4, 2, 48)
    keep = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1]]).bool()
    assert held(seen, Verdict.of(keep))[:, :, 0].tolist() == [[0, 0], [1, 0], [1, 0], [1, 3]]
    assert held(seen + 1, Verdict.of(keep & torch.tensor([True, False])))[:, 1].unique().tolist() == [0]
    frames = patches(pictures(3))
    resolution = torch.tensor([FULL, LOW, NONE])
    got = held(frames, Verdict(resolution > NONE, resolution, torch.zeros(3)))
    assert torch.equal(got[0], frames[0]) and torch.equal(got[1], got[2])
    assert torch.allclose(
        got[1, 5].view(4, 4, 3)[:2, :2], frames[1, 5].view(4, 4, 3)[:2, :2].mean((0, 1), keepdim=True)
    )


def test_as_many_get_in_without_looking():
    made = torch.Generator().manual_seed(0)
    keep = torch.rand(400, 50, generator=made) < 0.17
    keep[0] = True
    assert share(in_turn(Verdict.of(keep))) == pytest.approx(share(Verdict.of(keep)), abs=0.005)
    frames = keep[:, 0]
    assert share(in_turn(Verdict.of(frames))) == pytest.approx(share(Verdict.of(frames)), abs=0.005)
    resolution = torch.tensor([FULL, LOW, LOW, NONE])
    assert share(Verdict(resolution > NONE, resolution, torch.zeros(4))) == pytest.approx(0.375)


def test_without_clips_the_films_are_of_the_synthetic_world(monkeypatch):
    monkeypatch.delenv("EVENFLOW_DATA", raising=False)
    made = films(2)
    assert [one.pixels.shape for one in made] == [(2, SIDE, SIDE, 3)] * 3
    assert all(-0.5 <= float(one.pixels.min()) < float(one.pixels.max()) <= 0.5 for one in made)


def test_every_case_judges_what_it_is_given():
    for name, case in admission.CASES.items():
        assert isinstance(case, Case), name
        verdict = admission.judged(case, pictures(1).expand(3, -1, -1, -1))
        assert verdict.keep[0].any() and share(verdict) > 0, name
