"""KVPO's likelihood, advantages and objective, against loops and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.learn.video.kvpo import (
    KVPO,
    Advantages,
    advantages,
    against_anchor,
    energy,
    log_policy,
    objective,
    velocity_energy,
)

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.3], dtype=torch.float64)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(groups=st.integers(1, 5), seed=st.integers(0, 99), floor=st.sampled_from([0.2, 1.0]))
@settings(max_examples=20, deadline=None)
def test_point_3_energies_are_those_of_the_definition_in_both_forms(groups, seed, floor):
    x, noise = drawn(groups, 4, 3, 2, seed=seed), drawn(groups, 4, 3, 2, seed=seed + 1)
    stored, replayed = x - noise, x - drawn(groups, 4, 3, 2, seed=seed + 2)
    expected = []
    for g in range(groups):
        total = 0.0
        for t, sigma in enumerate(SIGMAS.tolist()):
            errors = [
                (a - b) ** 2
                for a, b in zip(stored[g, t].flatten().tolist(), replayed[g, t].flatten().tolist(), strict=True)
            ]
            total += sum(errors) / len(errors) / (2 * max(sigma, floor) ** 2)
        expected.append(total)
    got = energy(stored, replayed, SIGMAS, floor)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert bool((got >= 0).all()) and not energy(stored, stored, SIGMAS).any()
    # An x0 is x − σ v at the same x.
    scale = SIGMAS.view(1, 4, 1, 1)
    velocities = [(x - one) / scale for one in (stored, replayed)]
    torch.testing.assert_close(velocity_energy(*velocities, SIGMAS, floor), got, rtol=1e-12, atol=1e-12)
    policy = log_policy(got)
    torch.testing.assert_close(log_policy(got + 3.7), policy, rtol=1e-12, atol=1e-12)
    assert float(policy.exp().sum()) == pytest.approx(1, abs=1e-12)


@given(groups=st.integers(2, 8), seed=st.integers(0, 99), safe=st.booleans())
@settings(max_examples=20, deadline=None)
def test_point_4_the_gradient_where_nothing_has_changed(groups, seed, safe):
    energies, gained = drawn(groups, seed=seed).abs(), drawn(groups, seed=seed + 1)
    given_, config = energies.clone().requires_grad_(), KVPO(kl=0.0)
    loss = objective(given_, energies, energies, Advantages(gained, safe), config)
    assert loss.protection == (1.0 if safe else 0.5) and float(loss.energy) == float(energies.mean())
    (by_logit,) = torch.autograd.grad(-loss.total, given_)  # a logit is the energy's negative
    pi = log_policy(energies).exp()
    expected = -(gained - pi * gained.sum()) / groups * loss.protection
    torch.testing.assert_close(by_logit, expected, rtol=0, atol=1e-12)
    # With all branches alike, what is added to all advantages does not matter.
    alike = torch.ones(groups, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(objective(alike, alike, alike, Advantages(gained + more, True), config).total, alike)[0]
        for more in (0.0, 2.5)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_point_4_the_clipped_objective_and_divergence_are_those_of_the_definition():
    energies, old, first = (drawn(6, seed=n).abs() for n in range(3))
    gained, config = drawn(6, seed=4), KVPO(temperature=0.3)
    loss = objective(energies, old, first, Advantages(gained, True), config)

    def policy(e):
        weights = [math.exp(-x / 0.3) for x in e.tolist()]
        return [w / sum(weights) for w in weights]

    now, then, begun = policy(energies), policy(old), policy(first)
    terms = []
    for p, q, a in zip(now, then, gained.tolist(), strict=True):
        ratio = p / q
        terms.append(min(ratio * a, min(max(ratio, 0.9), 1.2) * a))
    divergence = sum(p * math.log(p / q) for p, q in zip(now, begun, strict=True))
    assert float(loss.policy) == pytest.approx(-sum(terms) / 6, rel=1e-12)
    assert float(loss.divergence) == pytest.approx(divergence, rel=1e-9)
    assert float(loss.total) == pytest.approx(-sum(terms) / 6 + 10 * divergence, rel=1e-9)
    far = objective(1e4 * energies, old, first, Advantages(gained, True), config)
    assert far.total.isfinite(), "log ratios are bounded"


@pytest.mark.parametrize("groups", [1, 2, 8, 100])
def test_point_4_half_of_the_loss_of_a_group_that_beats_nobody(groups):
    energies, worse = 50 * drawn(groups).abs(), Advantages(-torch.ones(groups, dtype=torch.float64), False)
    loss = objective(energies, energies, energies, worse, KVPO())
    assert loss.protection == 0.5 and float(loss.total) == 0.5 * float(loss.policy)
    # One less the share of a slot with logit 0, beside those of the branches.
    slots = torch.cat([log_policy(energies), torch.zeros(1, dtype=torch.float64)]).softmax(0)
    assert 1 - float(slots[-1]) == pytest.approx(0.5, abs=1e-12)
    skipped = objective(energies, energies, energies, worse, KVPO(protect="skip"))
    assert skipped.protection == 0 and not skipped.total


def test_point_5_advantages_are_against_what_the_model_does_anyway():
    rewards, anchor, config = drawn(8), torch.tensor(0.3, dtype=torch.float64), KVPO()
    equal = rewards.clone()
    equal[3] = anchor
    gained = advantages(against_anchor(equal, anchor), None, config)
    assert gained.value[3] == 0 and bool(((gained.value > 0) == (equal > anchor)).all()) and gained.safe
    worse = advantages(against_anchor(-rewards.abs() - 0.1, torch.zeros(())), None, config)
    assert bool((worse.value < 0).all()) and not worse.safe
    for units in (1e-3, 1e3):
        torch.testing.assert_close(
            against_anchor(units * equal, units * anchor), against_anchor(equal, anchor), rtol=1e-4, atol=0
        )
    # By hand: deviations of nine rewards, without bias; then by the deviation over the branches, of the population.
    every = [*equal.tolist(), 0.3]
    mean = sum(every) / 9
    spread = math.sqrt(sum((x - mean) ** 2 for x in every) / 8)
    apart = [(x - 0.3) / spread for x in equal.tolist()]
    middle = sum(apart) / 8
    over = math.sqrt(sum((x - middle) ** 2 for x in apart) / 8)
    expected = torch.tensor([max(-2.5, min(2.5, x / over)) for x in apart], dtype=torch.float64)
    torch.testing.assert_close(gained.value, expected, rtol=1e-6, atol=1e-9)
    both = advantages(against_anchor(equal, anchor), against_anchor(drawn(8, seed=3), anchor), config)
    assert float(both.value.abs().max()) <= 2.5 and not torch.equal(both.value, gained.value)
    two = against_anchor(drawn(8, 2), torch.zeros(2), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(two, against_anchor(drawn(8, 2)[:, 0], torch.zeros(())), rtol=1e-12, atol=0)


def test_what_makes_no_sense_is_refused():
    for wrong in ({"clip": (1.1, 1.2)}, {"temperature": 0.0}, {"protect": "never"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KVPO(**wrong)
    with pytest.raises(ValueError, match=r"expected \[G, steps"):
        energy(drawn(2, 4, 3), drawn(2, 4, 3), SIGMAS[:3])
    with pytest.raises(ValueError, match="expected as many"):
        against_anchor(drawn(4, 2), torch.zeros(()))
