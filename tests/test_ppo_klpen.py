"""The KL penalty and its weight's feedback rule."""

import csv
import functools
import math

import batches
import numpy as np
import pytest
import torch
from batches import BOX, DISCRETE, make_coef, move
from conftest import needs_compiler
from gymnasium.spaces import Box
from test_ppo_clip import epochs
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import ppo_klpen

make_agent = functools.partial(batches.make_agent, ppo_klpen)
make_batch = functools.partial(batches.make_batch, ppo_klpen)

SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2", "--no-compile"]
SMALL += ["--env-id", "Pendulum-v1", "--total-timesteps", "2048", "--checkpoint-every", "512"]


def flat_gradient(y, params, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, params, **options)])


def column(path, key):
    with open(path / "progress.csv") as file:
        return [float(row[key]) for row in csv.DictReader(file)]


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_beta_at_every_border():
    def beta(kl, before=1.0):
        return ppo_klpen.adapted_beta(before, kl, 0.01)

    low, high = 0.01 / 1.5, 0.01 * 1.5
    assert [beta(kl) for kl in (0.0, low - 1e-9, low, low + 1e-9, 0.01)] == [0.5, 0.5, 1, 1, 1]
    assert [beta(kl) for kl in (high - 1e-9, high, high + 1e-9, 1.0)] == [1, 1, 2, 2]
    assert beta(0.0, before=1.5e-4) == 1e-4 and beta(0.0, before=1e-4) == 1e-4
    assert beta(1.0, before=9e3) == 1e4 and beta(1.0, before=1e4) == 1e4


def test_beta_changes_once_per_iteration_and_only_then(tmp_path, monkeypatch):
    """Whatever a minibatch update sees during an iteration is the logged beta, and the next one follows by the rule.
    Over all epochs the old policy that it is compared with stays the one that collected the batch."""
    seen, accelerated = [], ppo_klpen.accelerated

    def spied(args, update, agent, state, data, order, coef, norm_adv):
        epoch = accelerated(args, update, agent, state, data, order, coef, norm_adv)

        def spied_epoch():
            with torch.no_grad():
                unmoved = torch.equal(agent.policy_parameters(data["obs"]), data["old_policy"])
            seen.append((coef["beta"].item(), data["old_policy"].clone(), unmoved))
            epoch()

        return spied_epoch

    monkeypatch.setattr(ppo_klpen, "accelerated", spied)
    flags = ["--run-dir", str(tmp_path / "a"), "--learning-rate", "0.003", "--lr-schedule", "constant"]
    assert ppo_klpen.main([*SMALL, *flags]) == 0
    beta, kl = column(tmp_path / "a", "beta"), column(tmp_path / "a", "kl")
    assert len(seen) == 16 * 2 and len(set(beta)) > 2
    for i in range(16):
        (beta_1, policy_1, unmoved_1), (beta_2, policy_2, unmoved_2) = seen[2 * i : 2 * i + 2]
        assert beta_1 == beta_2 == beta[i] and torch.equal(policy_1, policy_2)
        assert unmoved_1 and not unmoved_2
        if i:
            assert beta[i] == ppo_klpen.adapted_beta(beta[i - 1], kl[i - 1], 0.01)


def test_beta_survives_a_resume_and_a_flag_overrides_it(tmp_path):
    flags = ["--run-dir", str(tmp_path / "a"), "--kl-target", "1e-6"]  # far too low: beta doubles at every iteration
    assert ppo_klpen.main([*SMALL, *flags, "--stop-at-step", "512"]) == 0
    assert column(tmp_path / "a", "beta") == [1, 2, 4, 8]
    resume = ["--resume", str(tmp_path / "a"), "--stop-at-step", "1024", "--run-dir"]
    ppo_klpen.main([*resume, str(tmp_path / "b")])
    assert column(tmp_path / "b", "beta") == [16, 32, 64, 128]
    ppo_klpen.main([*resume, str(tmp_path / "c"), "--beta-init", "3"])
    assert column(tmp_path / "c", "beta") == [3, 6, 12, 24]
    ppo_klpen.main([*resume, str(tmp_path / "d"), "--beta-schedule", "fixed"])
    assert column(tmp_path / "d", "beta") == [1] * 4


def test_beta_out_of_bounds_is_refused(tmp_path, capsys):
    for beta in ("0", "-1", "1e5", "nan"):
        assert ppo_klpen.main([*SMALL, "--run-dir", str(tmp_path / "a"), "--beta-init", beta]) == 2
        assert f"--beta-init {float(beta)} must be 0.0001 or more, and at most 10000.0" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-8])
@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_loss_against_torch_distributions(space, size):
    """The whole loss, written a second time, at parameters that have moved. Advantages as small as rounding errors are
    not blown up to the size of a signal: the 1e-8 halves those of size 1e-8."""
    agent, coef = make_agent(space), make_coef(beta=3.0)
    batch = make_batch(agent)
    batch["advantage"] *= size

    def distribution():
        if agent.discrete:
            return Categorical(logits=agent.actor(batch["obs"]))
        return Independent(Normal(agent.actor(batch["obs"]), agent.log_std.exp()), 1)

    with torch.no_grad():
        old = distribution()
        old = Categorical(logits=old.logits) if agent.discrete else Independent(Normal(old.mean, old.stddev.clone()), 1)
    move(agent)
    loss, logged = ppo_klpen.ppo_loss(agent, batch, coef, True)
    new = distribution()
    A = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std(correction=0) + 1e-8)
    ratio = (new.log_prob(batch["action"]) - old.log_prob(batch["action"])).exp()
    policy_loss, entropy = -(ratio * A).mean(), new.entropy().mean()
    penalty = kl_divergence(old, new).mean()
    value_loss = ((agent.critic(batch["obs"])[:, 0] - batch["return"]) ** 2).mean()
    torch.testing.assert_close(loss, policy_loss + 3 * penalty + 0.5 * value_loss - 0.01 * entropy)
    expected = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    expected["approx_kl"] = (ratio - 1 - ratio.log()).mean()
    torch.testing.assert_close(logged, expected, rtol=1e-4, atol=1e-6)
    assert penalty > 0.001


def test_advantages_are_normalised_only_if_asked():
    agent, coef = make_agent(), make_coef()
    batch = make_batch(agent)
    batch["advantage"].mul_(10).add_(3)
    policy_loss = [ppo_klpen.ppo_loss(agent, batch, coef, asked)[1]["policy_loss"].item() for asked in (True, False)]
    assert policy_loss == [pytest.approx(0, abs=1e-5), pytest.approx(-batch["advantage"].mean().item(), rel=1e-4)]


@pytest.mark.parametrize("space", [Box(-1, 1, (1,)), DISCRETE])
def test_at_the_old_parameters_the_penalty_has_gradient_zero_and_the_fisher_matrix_as_hessian(space):
    """F = E[score score'], the expectation taken over actions exactly: a sum, or Gauss-Hermite nodes (the integrand is
    a polynomial of degree 4 in the action)."""
    agent = make_agent(space).double()
    move(agent, 0.3)
    params = [*agent.actor.parameters()] + ([] if agent.discrete else [agent.log_std])
    obs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = agent.policy_parameters(obs)
    kl = kl_divergence(agent.distribution(parameters.detach()), agent.distribution(parameters)).mean()
    gradient = flat_gradient(kl, params, create_graph=True)
    assert gradient.abs().max() < 1e-12
    check = torch.randperm(len(gradient), generator=torch.Generator().manual_seed(0))[:40]  # rows of the Hessian
    check = torch.cat([check, torch.arange(len(gradient) - 2, len(gradient))])
    hessian = torch.stack([flat_gradient(gradient[i], params, retain_graph=True) for i in check])
    fisher = torch.zeros_like(hessian)
    if agent.discrete:
        probabilities = parameters.detach().softmax(-1)
        actions = [(torch.full((4,), a), probabilities[:, a]) for a in range(4)]
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(7)
        mean, std = parameters.detach()[:, :1], agent.log_std.detach().exp()
        actions = [(mean + std * z, w / math.sqrt(2 * math.pi)) for z, w in zip(nodes, weights, strict=True)]
    for action, probability in actions:
        log_prob = agent.policy(obs).log_prob(action)
        for s in range(4):
            score = flat_gradient(log_prob[s], params, retain_graph=True)
            p = probability[s] if agent.discrete else probability
            fisher += p * score[check].unsqueeze(1) * score / 4
    torch.testing.assert_close(hessian, fisher, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_a_ratio_that_would_overflow_gives_a_finite_loss_that_pulls_back(space):
    agent = make_agent(space)
    batch = make_batch(agent)
    batch["logprob"][:] = -2000.0  # ratio e^2000
    move(agent, 0.3)
    for sign in (1, -1):
        pushed = batch | {"advantage": sign * batch["advantage"].abs()}
        loss, logged = ppo_klpen.ppo_loss(agent, pushed, make_coef(), False)
        assert loss.isfinite() and all(x.isfinite() for x in logged.values())
    actor = list(agent.actor.parameters())
    losses = [ppo_klpen.ppo_loss(agent, batch, make_coef(beta=b, ent_coef=0.0), False)[0] for b in (1e-4, 1.0)]
    gradients = [flat_gradient(loss, actor) for loss in losses]
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(gradients[0] * 1e4, gradients[1], rtol=1e-3, atol=1e-6)  # nothing but the penalty's


def test_beta_turns_the_gradient_and_the_learning_rate_only_scales_the_step():
    """What the docstring says, on a batch from an environment, at parameters that an update has moved."""
    args = ppo_klpen.Args(env_id="Pendulum-v1", num_envs=4, num_steps=128, num_workers=0)
    agent = make_agent(Box(-2, 2, (1,)), obs_dim=3)
    with ppo_klpen.Actors(args, agent) as actors:
        rollout = actors.collect(agent, seed=(1, 0))
    agent.update_statistics(rollout)
    data = ppo_klpen.make_batch(agent, rollout, 0.9, 0.95)
    state = epochs(ppo_klpen, agent, data, [make_coef(learning_rate=3e-3)])

    actor = [*agent.actor.parameters(), agent.log_std]
    by_beta = [flat_gradient(ppo_klpen.ppo_loss(agent, data, make_coef(beta=b), True)[0], actor) for b in (0.5, 2.0)]
    assert torch.cosine_similarity(*by_beta, dim=0) < 0.99

    steps = []
    for rate in (1e-3, 2e-3):
        after = ppo_klpen.update(agent, state, data, make_coef(learning_rate=rate), True)
        steps.append(after["parameters"] - state["parameters"])
    torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(*steps, dim=0) > 0.99999


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_compiled_equals_eager_and_reads_beta(space):
    """Compiled once, the update follows beta: 1e-5 relative; a beta that stayed 1 would show."""
    coefs = [make_coef(beta=beta) for beta in (1.0, 2.0, 100.0) for _ in range(5)]
    runs = [(coefs, False), (coefs, True), (coefs[:1] * 15, False)]
    eager, compiled, constant = (
        epochs(ppo_klpen, agent, make_batch(agent, B=1024), schedule, compiled=compiled)["parameters"]
        for schedule, compiled in runs
        for agent in [make_agent(space)]
    )
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5
    assert ((eager - constant).norm() / eager.norm()).item() > 1e-3
