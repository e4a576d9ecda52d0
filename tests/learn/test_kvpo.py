"""KVPO's likelihood, advantages and objective, against loops and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.generate.flow import noise as flow_noise
from evenflow.learn.video.aligning import Alignment, Rates, gains
from evenflow.learn.video.blobs import BLOBS, SIZE, reward, train
from evenflow.learn.video.blobs import drawn as blobs
from evenflow.learn.video.branches import Graded, Roll, copies, explored, memory_of, predicted, replayed, rolled, spread
from evenflow.learn.video.distill import warped
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
from evenflow.models.video import VideoTransformer
from evenflow.recipes import recipe

MEMORY = recipe("kvpo", window=10, sink=0, physical=20, nearest=6, blocks=2, branches=3, chunk=2, frame=1)
LEVELS, LATENT, FORK = warped(BLOBS.steps, BLOBS.shift), (SIZE, SIZE), 16
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


# -- branches over a real memory -------------------------------------------------------------------------------------


def begun(rows=2, seed=0, frames=FORK, memory=MEMORY):
    """A network with random weights in float64, and a memory of it that has seen real frames."""
    torch.manual_seed(seed)
    model = VideoTransformer(BLOBS).double().requires_grad_(False)
    x, text = blobs(rows, frames, torch.Generator().manual_seed(seed))
    state = memory_of(model, memory, rows)
    Roll(model, state, model.read(text.double()), LATENT).know(x.double())
    return model, state, text.double()


def same(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items() if isinstance(x, torch.Tensor))


def test_point_3_the_anchor_has_no_energy_and_branches_have():
    model, state, text = begun()
    read, before = model.read(text), state.state_dict()
    made = explored(model, state, read, LEVELS, 5, LATENT, after=1)
    assert made.frames.shape == (2, 4, 6, 1, SIZE, SIZE) and made.noisy.shape == (6, 2, 4, 2, 1, SIZE, SIZE)
    energies = replayed(model, state, read, LEVELS, made)
    assert energies.shape == (2, 3) and bool((energies > 1e-6).all())
    assert same(before, state.state_dict()), "neither branches nor replays change the history"
    anchor = rolled(model, state.fork(), read, LEVELS, 3, 5, LATENT)
    torch.testing.assert_close(made.frames[:, -1], anchor, rtol=0, atol=1e-12)
    # A route that keeps all recent frames is none: its replay finds what it had itself.
    plain = recipe("kvpo", window=10, sink=0, physical=20, nearest=10, blocks=2, branches=3, chunk=2, frame=1)
    model, state, text = begun(memory=plain)
    made = explored(model, state, model.read(text), LEVELS, 5, LATENT)
    assert float(replayed(model, state, model.read(text), LEVELS, made).max()) < 1e-20


def test_point_3_branches_and_energies_are_those_of_forks_one_by_one():
    """By streams of one row each, forked and told their route, and by steps of the memory itself."""
    model, state, text = begun()
    made = explored(model, state, model.read(text), LEVELS, 5, LATENT)
    energies = replayed(model, state, model.read(text), LEVELS, made)
    for row in range(2):
        single = memory_of(model, MEMORY, 1)
        x, _ = blobs(2, FORK, torch.Generator().manual_seed(0))
        read = model.read(text[row : row + 1])
        Roll(model, single, read, LATENT).know(x[row : row + 1].double())
        for branch in range(3):
            roll, total, x0 = Roll(model, single.fork(), read, LATENT), 0.0, torch.zeros(())
            again = Roll(model, single.fork(), read, LATENT)
            for block in range(2):
                route = torch.tensor([MEMORY.recall.route(branch, block)])
                for step, sigma in enumerate(LEVELS):
                    noise = flow_noise(5, (block, step), (2, 2, 1, SIZE, SIZE))[row : row + 1].double()
                    x = (1 - sigma) * x0 + sigma * noise if step else noise
                    x0, there = roll.call(x, sigma, route), again.call(x, sigma)
                    torch.testing.assert_close(made.noisy[3 * row + branch, block, step], x[0], rtol=0, atol=1e-9)
                    torch.testing.assert_close(made.clean[3 * row + branch, block, step], x0[0], rtol=0, atol=1e-9)
                    total += float((x0 - there).square().mean()) / 2
                roll.know(x0, route)
                again.know(there)
            assert float(energies[row, branch]) == pytest.approx(total, rel=1e-6)


def test_point_3_attention_with_a_gradient_is_that_of_a_step():
    model, state, _ = begun(frames=18)
    q, k, v = torch.randn(3, 2, BLOBS.heads, 2, BLOBS.head_dim, dtype=torch.float64)
    tags = {"coordinates": torch.zeros(2, 2, dtype=torch.int64)}
    attend = Graded(state, 2, (1, 1))
    with state.step(2, tags=tags, commit=False):
        expected = [state.attend(layer, q, k, v) for layer in range(BLOBS.layers)]
    k.requires_grad_()
    for layer, out in enumerate(expected):
        ours = attend(layer, q, k, v)
        torch.testing.assert_close(ours.detach(), out, rtol=0, atol=1e-12)
    assert torch.autograd.grad(ours.sum(), k)[0].abs().sum() > 0
    twin = copies(state, 3)
    with twin.step(2, tags=tags, commit=False):
        wide = twin.attend(0, *(x.detach().repeat_interleave(3, 0) for x in (q, k, v)))
    torch.testing.assert_close(wide, expected[0].repeat_interleave(3, 0), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="recipe 'kvpo'"):
        Graded(memory_of(model, recipe("longlive", frame=1), 1), 2, (1, 1))
    with pytest.raises(ValueError, match="no routes"):
        explored(model, memory_of(model, recipe("longlive", frame=1), 1), None, LEVELS, 0, LATENT)


def test_point_3_gradient_comes_from_the_noisiest_steps_of_the_replay_and_from_no_context():
    model, state, text = begun(rows=1)
    made = explored(model, state, model.read(text), LEVELS, 5, LATENT)
    weight = model.requires_grad_(True).head.head.bias

    def slope(graded):
        return torch.autograd.grad(replayed(model, state, model.read(text), LEVELS, made, graded).sum(), weight)[0]

    got = slope(2)
    assert bool((got != slope(4)).any())
    # By differences, of these steps alone and with contexts as they were.
    roll, terms = Roll(model, copies(state, 3), spread(model.read(text), 3), LATENT), []
    for block in range(2):
        attend = Graded(roll.state, 2, roll.size)
        for step, sigma in enumerate(LEVELS):
            x0 = predicted(model, made.noisy[:, block, step], sigma, roll.text, attend)
            # x0 falls by σ where the head's bias rises, pixel by pixel.
            if step < 2:
                error = (x0 - made.clean[:, block, step]).detach()
                terms.append((-sigma * error).sum((0, 1, 2)) / error[0].numel())
        roll.know(x0.detach())
    torch.testing.assert_close(got, sum(terms).flatten(), rtol=1e-8, atol=1e-12)


def test_point_8_an_update_makes_a_good_branch_likelier_and_leaves_the_rest_of_the_course_alone():
    model, state, text = begun()
    training = Alignment(model, LEVELS, KVPO(kl=0.0), Rates(rate=1e-3, warmup=1))
    made = training.explore(state, text, 5, LATENT)
    gained = [Advantages(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), True)] * 2
    history, before = state.state_dict(), replayed(model, state, model.read(text), LEVELS, made).detach()
    figures = training.learn(state, text, made, gained)
    after = replayed(model, state, model.read(text), LEVELS, made).detach()
    assert bool(((after[:, 0] - after[:, 2]) < (before[:, 0] - before[:, 2])).all())
    assert figures["energy"] == pytest.approx(float(before.mean())) and figures["divergence"] < 1e-12
    assert same(history, state.state_dict()) and figures["safe"] == 1
    # The old policy is taken over every second rollout, the first never.
    assert not torch.equal(training.old.head.head.bias, model.head.head.bias)
    training.explore(state, text, 6, LATENT)
    assert torch.equal(training.old.head.head.bias, training.first.head.head.bias)
    training.explore(state, text, 7, LATENT)
    assert torch.equal(training.old.head.head.bias, model.head.head.bias)
    assert not torch.equal(training.first.head.head.bias, model.head.head.bias)
    with pytest.raises(ValueError, match="sync"):
        Rates(sync=0)


def test_point_5_gains_are_those_of_each_history_by_itself():
    model, state, text = begun()
    made = explored(model, state, model.read(text), LEVELS, 5, LATENT, after=2)
    found = gains(made, reward, KVPO(), 4)
    for row, got in enumerate(found):
        local, whole = (
            against_anchor(torch.stack([reward(one) for one in part[:-1]]), reward(part[-1]))
            for part in (made.frames[row, :, :4], made.frames[row, :, 4:])
        )
        torch.testing.assert_close(got.value, advantages(local, whole, KVPO()).value, rtol=1e-9, atol=1e-12)
    alone = gains(made, reward, KVPO(), 8)
    local = against_anchor(reward(made.frames[0, :-1]), reward(made.frames[0, -1]))
    torch.testing.assert_close(alone[0].value, advantages(local, None, KVPO()).value, rtol=1e-9, atol=1e-12)


def test_blobs_are_as_bright_and_smooth_as_they_say_and_can_be_learned():
    frames, text = blobs(200, 12, torch.Generator().manual_seed(0))
    assert float(frames.amax((2, 3, 4)).mean()) == pytest.approx(0.91, abs=0.1) and text.sum() == 200
    jumps = frames + 0.3 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))
    assert float((reward(frames) - reward(jumps - 0.3)).mean()) > 0
    losses = []
    train(steps=25, batch=16, frames=4, rate=1e-2, progress=lambda step, steps, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
