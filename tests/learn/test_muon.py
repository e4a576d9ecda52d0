"""Muon for stacks of matrices is Muon."""

import pytest
import torch

from evenflow.learn.muon import Muon

SHAPES = [(8, 8)] * 3 + [(16, 8)] * 2 + [(8, 16)]


def matrices():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape) * 0.1) for shape in SHAPES]


def test_it_does_what_the_one_of_torch_does():
    ours, theirs = matrices(), matrices()
    own = Muon(ours, 2e-3)
    other = torch.optim.Muon(theirs, 2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * 10**-step
            b.grad = a.grad.clone()
        ours[1].grad = theirs[1].grad = None  # what has no gradient stays
        own.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_what_was_kept():
    once, twice = matrices(), matrices()
    own, other = Muon(once, 1e-2), Muon(twice, 1e-2)
    grads = [[torch.randn(shape) for shape in SHAPES] for _ in range(4)]
    for step, some in enumerate(grads):
        if step == 2:
            again = Muon(twice, 1e-2)
            again.load_state_dict(other.state_dict())
            other = again
        for parameters, optimizer in ((once, own), (twice, other)):
            for parameter, grad in zip(parameters, some, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a, b)


def test_it_takes_matrices_alone():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.randn(3))], 1e-3)
