"""The KL penalty and its weight's feedback rule."""

import csv
import functools
import math

import batches
import gymnasium as gym
import numpy as np
import pytest
import torch
from batches import BOX, DISCRETE

import ppo_klpen

make_agent = functools.partial(batches.make_agent, ppo_klpen)
make_batch = functools.partial(batches.make_batch, ppo_klpen)
make_adam = functools.partial(batches.make_adam, ppo_klpen)

SMALL = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2", "--no-compile"]
SMALL += ["--env-id", "Pendulum-v1", "--total-timesteps", "2048", "--checkpoint-every", "512"]


def make_coef(learning_rate=3e-4, beta=1.0, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5):
    values = (learning_rate, beta, ent_coef, vf_coef, max_grad_norm)
    return {key: torch.tensor(x) for key, x in zip(ppo_klpen.COEFFICIENTS, values, strict=True)}


def move(agent, scale=0.05, seed=1):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p += scale * torch.randn(p.shape, generator=rng)


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
    seen, update = [], ppo_klpen.minibatch_update

    def spy(loss_function, agent, adam, data, index, coef, metrics, *options):
        first = len(seen) % 8 == 0
        with torch.no_grad():
            now = agent.policy(data["obs"])
        seen.append((coef["beta"].item(), data["policy"].clone(), torch.equal(now, data["policy"]) if first else None))
        update(loss_function, agent, adam, data, index, coef, metrics, *options)

    monkeypatch.setattr(ppo_klpen, "minibatch_update", spy)
    flags = ["--run-dir", str(tmp_path / "a"), "--learning-rate", "0.003", "--lr-schedule", "constant"]
    assert ppo_klpen.main([*SMALL, *flags]) == 0
    beta, kl = column(tmp_path / "a", "beta"), column(tmp_path / "a", "kl")
    assert len(seen) == 16 * 2 * 4 and len(set(beta)) > 2
    for i in range(16):
        iteration = seen[8 * i : 8 * i + 8]
        assert {b for b, _, _ in iteration} == {beta[i]}
        assert iteration[0][2] and all(torch.equal(policy, iteration[0][1]) for _, policy, _ in iteration)
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
        assert "beta_init must lie in" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_loss_against_torch_distributions(space):
    """The whole loss, written a second time with torch.distributions, at parameters that have moved."""
    agent, coef = make_agent(space), make_coef(beta=3.0)
    data = make_batch(agent)
    data["weight"][::7] = 0
    with torch.no_grad():
        logits_or_mean, log_std = agent.actor(data["obs"]), None if agent.discrete else agent.log_std.clone()
    move(agent)
    loss, metrics = ppo_klpen.klpen_loss(agent, data, coef, True)
    valid = data["weight"] > 0

    def distribution(out, log_std):
        if agent.discrete:
            return torch.distributions.Categorical(logits=out)
        return torch.distributions.Independent(torch.distributions.Normal(out, log_std.exp()), 1)

    old = distribution(logits_or_mean[valid], log_std)
    new = distribution(agent.actor(data["obs"][valid]), None if agent.discrete else agent.log_std)
    rows = {key: x[valid] for key, x in data.items()}
    A = (rows["advantage"] - rows["advantage"].mean()) / (rows["advantage"].std(correction=0) + 1e-8)
    ratio = (new.log_prob(rows["action"]) - old.log_prob(rows["action"])).exp()
    policy_loss = -(ratio * A).mean()
    penalty = torch.distributions.kl_divergence(old, new).mean()
    value_loss = ((agent.critic(rows["obs"])[:, 0] - rows["return"]) ** 2).mean()
    expected = policy_loss + 3 * penalty + 0.5 * value_loss - 0.01 * new.entropy().mean()
    torch.testing.assert_close(loss, expected)
    approx_kl = (ratio - 1 - ratio.log()).mean()
    torch.testing.assert_close(
        metrics, torch.stack([policy_loss, value_loss, new.entropy().mean(), approx_kl]).detach(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("space", [gym.spaces.Box(-1, 1, (1,)), DISCRETE])
def test_at_the_old_parameters_the_penalty_has_gradient_zero_and_the_fisher_matrix_as_hessian(space):
    """F = E[score score'], the expectation taken over actions exactly: a sum, or Gauss-Hermite nodes (the integrand is
    a polynomial of degree 4 in the action)."""
    agent = make_agent(space).double()
    move(agent, 0.3)
    params = [*agent.actor.parameters()] + ([] if agent.discrete else [agent.log_std])
    obs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = agent.policy(obs)
    kl = agent.dist.kl(policy.detach(), policy).mean()
    gradient = flat_gradient(kl, params, create_graph=True)
    assert gradient.abs().max() < 1e-12
    check = torch.randperm(len(gradient), generator=torch.Generator().manual_seed(0))[:40]  # rows of the Hessian
    check = torch.cat([check, torch.arange(len(gradient) - 2, len(gradient))])
    hessian = torch.stack([flat_gradient(gradient[i], params, retain_graph=True) for i in check])
    fisher = torch.zeros_like(hessian)
    if agent.discrete:
        actions = [(torch.full((4,), a), policy[:, a].exp()) for a in range(4)]
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(7)
        mean, std = policy.detach()[:, :1], agent.log_std.detach().exp()
        actions = [(mean + std * z, w / math.sqrt(2 * math.pi)) for z, w in zip(nodes, weights, strict=True)]
    for action, probability in actions:
        log_prob = agent.dist.log_prob(agent.policy(obs), action)
        for s in range(4):
            score = flat_gradient(log_prob[s], params, retain_graph=True)
            p = probability[s].detach() if agent.discrete else probability
            fisher += p * score[check].unsqueeze(1) * score / 4
    torch.testing.assert_close(hessian, fisher, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_a_ratio_that_would_overflow_gives_a_finite_loss_that_pulls_back(space):
    agent = make_agent(space)
    data = make_batch(agent)
    data["logprob"][:] = -2000.0  # ratio e^2000
    move(agent, 0.3)
    for sign in (1, -1):
        loss, metrics = ppo_klpen.klpen_loss(
            agent, data | {"advantage": sign * data["advantage"].abs()}, make_coef(), False
        )
        assert loss.isfinite() and metrics.isfinite().all()
    actor = list(agent.actor.parameters())
    gradients = [
        flat_gradient(ppo_klpen.klpen_loss(agent, data, make_coef(beta=beta, ent_coef=0.0), False)[0], actor)
        for beta in (1e-4, 1.0)
    ]
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(gradients[0] * 1e4, gradients[1], rtol=1e-3, atol=1e-6)  # nothing but the penalty's


def test_beta_turns_the_gradient_and_the_learning_rate_only_scales_the_step():
    """Notes §2.2, on a batch from an environment, at parameters that an update has moved."""
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.make("Pendulum-v1")] * 4, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    actors, rng = ppo_klpen.Actors(envs, 0.9), torch.Generator().manual_seed(0)
    agent = make_agent(envs.single_action_space, actors.obs_dim)
    actors.reset((1, 0))
    rollout = actors.collect(agent, 128, rng)
    agent.update_normalisers(rollout)
    data = ppo_klpen.empty_batch(agent, actors.obs_dim, 512)
    ppo_klpen.fill_batch(data, agent, rollout, 0.9, 0.95)
    adam, metrics = make_adam(agent), torch.zeros(5)
    for index in torch.randperm(512, generator=rng).view(-1, 64):
        ppo_klpen.minibatch_update(ppo_klpen.klpen_loss, agent, adam, data, index, make_coef(3e-3), metrics, True)

    actor = [*agent.actor.parameters(), agent.log_std]
    by_beta = [flat_gradient(ppo_klpen.klpen_loss(agent, data, make_coef(beta=b), True)[0], actor) for b in (0.5, 2.0)]
    assert torch.cosine_similarity(*by_beta, dim=0) < 0.99

    steps, index = [], torch.arange(512)
    for rate in (1e-3, 2e-3):
        state = {key: x.clone() for key, x in adam.items()}
        ppo_klpen.minibatch_update(ppo_klpen.klpen_loss, agent, adam, data, index, make_coef(rate), metrics, True)
        steps.append(adam["params"] - state["params"])
        for key, x in state.items():
            adam[key].copy_(x)
    torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(*steps, dim=0) > 0.99999


@pytest.mark.parametrize("space", [BOX, DISCRETE])
def test_compiled_equals_eager_and_reads_beta(space):
    """Compiled once, the update follows beta and the learning rate: three iterations, 1e-5 relative."""
    results = []
    for compiled in (False, True):
        agent = make_agent(space)
        step = (
            ppo_klpen.compiled(ppo_klpen.minibatch_update, torch.device("cpu"))
            if compiled
            else ppo_klpen.minibatch_update
        )
        data, adam, metrics = make_batch(agent, B=1024), make_adam(agent), torch.zeros(5)
        rng = torch.Generator().manual_seed(0)
        for beta in (1.0, 2.0, 100.0):
            for _ in range(5):
                for index in torch.randperm(1024, generator=rng).view(-1, 64):
                    step(ppo_klpen.klpen_loss, agent, adam, data, index, make_coef(beta=beta), metrics, True)
        results.append(adam["params"].clone())
    eager, compiled = results
    assert ((eager - compiled).norm() / eager.norm()).item() < 1e-5
    agent = make_agent(space)
    data, adam = make_batch(agent, B=1024), make_adam(agent)
    for _ in range(3 * 5 * 16):
        index = torch.randint(1024, (64,), generator=rng)
        ppo_klpen.minibatch_update(ppo_klpen.klpen_loss, agent, adam, data, index, make_coef(beta=1.0), metrics, True)
    assert ((eager - adam["params"]).norm() / eager.norm()).item() > 1e-3  # a beta that stays 1 would have shown
