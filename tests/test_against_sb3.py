"""The same data through Stable-Baselines3's own code: its rollout buffer, its PPO.train(), its VecNormalize, and the
TRPO.train() of sb3-contrib. No formula of theirs is written down here a second time. Where the two differ on purpose,
the test says how, and takes just that difference into account."""

import functools
import importlib
import math

import batches
import gymnasium as gym
import numpy as np
import pytest
import torch
from batches import BOX, DISCRETE, make_agent, make_coef, move
from torch.nn.utils import parameters_to_vector
from toy_envs import Counter

import ppo_clip
import trpo_continuous as trpo

sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
sb3_logger = importlib.import_module("stable_baselines3.common.logger")
sb3_buffers = importlib.import_module("stable_baselines3.common.buffers")
sb3_vec_env = importlib.import_module("stable_baselines3.common.vec_env")
sb3_policies = importlib.import_module("stable_baselines3.common.policies")
sb3_trpo = importlib.import_module("sb3_contrib.trpo.trpo")

M = 64  # samples in a batch


class Spaces(gym.Env):
    """An environment of which only the spaces matter."""

    def __init__(self, action_space):
        self.observation_space, self.action_space = gym.spaces.Box(-np.inf, np.inf, (5,)), action_space


def make_model(algorithm, space, batch_size=M, **flags):
    model = algorithm("MlpPolicy", Spaces(space), n_steps=batch_size, batch_size=batch_size, device="cpu", **flags)
    model.set_logger(sb3_logger.Logger(None, []))
    return model


def pairs(agent, policy):
    """(our parameter, theirs) for all of them; actor and critic are separate 64-64 networks in both."""
    theirs = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    theirs += [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()]
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    if not agent.discrete:
        ours, theirs = [*ours, agent.log_std], [*theirs, policy.log_std]
    assert len(theirs) == len(list(policy.parameters())) and len(ours) == len(list(agent.parameters()))
    return list(zip(ours, theirs, strict=True))


def copy_weights(agent, policy):
    for ours, theirs in pairs(agent, policy):
        theirs.data = ours.detach().clone()


def fill(buffer, batch):
    """Put a batch where collect_rollouts would have put it: M steps of one environment."""

    def column(x):
        return x.detach().numpy().reshape(len(x), 1, *x.shape[1:]).copy()

    buffer.reset()
    buffer.observations, buffer.log_probs = column(batch["obs"]), column(batch["logprob"])
    buffer.actions = column(batch["action"]).reshape(len(batch["obs"]), 1, -1)
    buffer.advantages, buffer.returns = column(batch["advantage"]), column(batch["return"])
    buffer.values, buffer.full = column(batch["value"]), True


# ---- advantages and returns ------------------------------------------------------------------------------------------


def in_their_buffer(reward, value, next_value, terminated, done, gamma, lam):
    """Advantages and returns by RolloutBuffer, all arguments (T, N). What collect_rollouts does at a time limit is done
    here: gamma V(the last observation) is added to the reward, and the episode counts as ended."""
    T, N = reward.shape
    buffer = sb3_buffers.RolloutBuffer(T, Counter.observation_space, Counter.action_space, "cpu", lam, gamma, N)
    truncated, start = (done > 0) & (terminated == 0), torch.ones(N)
    for t in range(T):
        with_value = (reward[t] + gamma * next_value[t] * truncated[t]).numpy()
        buffer.add(np.zeros((N, 2)), np.zeros((N, 1)), with_value, start.numpy(), value[t], torch.zeros(N))
        start = done[t]
    buffer.compute_returns_and_advantage(next_value[-1], done[-1].numpy())
    return torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)


@pytest.mark.parametrize("gamma,lam", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.995, 0.5)])
def test_gae_and_returns_of_their_rollout_buffer(script, gamma, lam):
    """Rollouts full of terminations and time limits; at any other step the next value is the next row's."""
    rng = torch.Generator().manual_seed(0)
    for T, N in ((1, 1), (64, 8), (256, 4)):
        reward, value, last = (torch.randn(T, N, generator=rng) for _ in range(3))
        terminated, truncated = (torch.rand(2, T, N, generator=rng) < 0.05).float()
        done = torch.maximum(terminated, truncated)
        next_value = torch.where(done > 0, last, torch.cat([value[1:], last[-1:]]))
        advantage = script.gae(reward, value, next_value, terminated, done, gamma, lam)
        theirs = in_their_buffer(reward, value, next_value, terminated, done, gamma, lam)
        torch.testing.assert_close((advantage, advantage + value), theirs, rtol=1e-5, atol=1e-5)


def test_advantages_of_a_collected_rollout(script):
    """The same from an environment, through collect() and make_batch()."""
    flags = {"env_id": "toy_envs:Counter-v0", "num_envs": 3, "num_steps": 50, "num_workers": 0}
    agent = make_agent(script, Counter.action_space, obs_dim=2)
    with script.Actors(script.Args(**flags), agent) as actors:
        rollout = actors.collect(agent, seed=(1, 0))
    agent.update_statistics(rollout)
    batch = script.make_batch(agent, rollout, 0.99, 0.95)
    with torch.no_grad():
        value, next_value = (agent.value(agent.obs_rms(rollout[key])) for key in ("obs", "next_obs"))
    reward = (rollout["reward"] * agent.return_rms.inv_std).clip(-10, 10).float()
    ends = rollout["terminated"], rollout["done"]
    theirs = in_their_buffer(reward, value, next_value, *ends, 0.99, 0.95)
    assert 10 < ends[0].sum() < ends[1].sum()
    for key, x in zip(("advantage", "return"), theirs, strict=True):
        torch.testing.assert_close(batch[key].view(50, 3), x, rtol=1e-5, atol=1e-5)


# ---- PPO -------------------------------------------------------------------------------------------------------------


class Recorder:
    """In place of an optimizer: keeps the gradient and moves nothing."""

    def __init__(self, policy):
        self.policy, self.param_groups = policy, []

    def zero_grad(self):
        self.policy.zero_grad()

    def step(self):
        self.gradient = {p: p.grad.clone() for p in self.policy.parameters()}


# ppo_klpen.py without its penalty is PPO without clipping.
SCRIPTS = {"ppo_clip": (0.2, {}), "ppo_klpen": (1e9, {"beta": 0.0})}


@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_loss_and_gradient_of_their_ppo_on_fifty_batches(name, space, norm_adv):
    """PPO.train() for one epoch of one minibatch, with an optimizer that only looks.

    One difference: they divide normalised advantages by the sample's standard deviation (M - 1), we by the population's
    (M). At M = 64 theirs are 0.8 % smaller. So with norm_adv the policy's loss, which is linear in them, is compared
    alone, and with that factor."""
    script, (clip, coef) = importlib.import_module(name), SCRIPTS[name]
    weights = {"vf_coef": 0.0, "ent_coef": 0.0} if norm_adv else {"vf_coef": 0.5, "ent_coef": 0.01}
    factor = math.sqrt((M - 1) / M) if norm_adv else 1.0
    model = make_model(
        sb3.PPO, space, n_epochs=1, clip_range=clip, normalize_advantage=norm_adv, max_grad_norm=math.inf, **weights
    )
    model.policy.optimizer, clipped = Recorder(model.policy), 0.0
    for seed in range(50):
        agent = make_agent(script, space, seed=seed)
        batch = batches.make_batch(script, agent, M, seed)
        move(agent, 0.1, seed)
        copy_weights(agent, model.policy)
        fill(model.rollout_buffer, batch)
        model.train()
        loss, logged = script.ppo_loss(agent, batch, make_coef(**coef, **weights), norm_adv)
        loss.backward()
        theirs = model.logger.name_to_value
        assert loss.item() * factor == pytest.approx(theirs["train/loss"], rel=2e-5, abs=1e-6)
        policy_loss = pytest.approx(theirs["train/policy_gradient_loss"], rel=2e-5, abs=1e-6)
        assert logged["policy_loss"].item() * factor == policy_loss
        assert logged["value_loss"].item() == pytest.approx(theirs["train/value_loss"], rel=1e-5)
        assert logged["entropy"].item() == pytest.approx(-theirs["train/entropy_loss"], rel=1e-5)
        assert logged["approx_kl"].item() == pytest.approx(theirs["train/approx_kl"], rel=1e-4, abs=1e-6)
        if name == "ppo_clip":
            assert logged["clipfrac"].item() == pytest.approx(theirs["train/clip_fraction"])
            clipped += theirs["train/clip_fraction"] / 50
        ours = torch.cat([p.grad.flatten() for p, _ in pairs(agent, model.policy)]) * factor
        gradient = torch.cat([model.policy.optimizer.gradient[p].flatten() for _, p in pairs(agent, model.policy)])
        assert (ours - gradient).norm() < 5e-6 * gradient.norm()
    assert name != "ppo_clip" or 0.1 < clipped < 0.9  # both sides of the clip were seen


@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
@pytest.mark.parametrize("max_grad_norm", [0.1, 10.0])
@pytest.mark.parametrize("name", SCRIPTS)
def test_twenty_updates_of_their_ppo(name, space, max_grad_norm):
    """Gradient clipping and Adam included: PPO.train() for twenty epochs of one minibatch ends at our parameters."""
    script, (clip, coef) = importlib.import_module(name), SCRIPTS[name]
    flags = {"normalize_advantage": False, "ent_coef": 0.01, "learning_rate": 1e-3, "max_grad_norm": max_grad_norm}
    model = make_model(sb3.PPO, space, n_epochs=20, clip_range=clip, **flags)
    agent = make_agent(script, space)
    batch = batches.make_batch(script, agent, M)
    copy_weights(agent, model.policy)
    fill(model.rollout_buffer, batch)
    model.train()
    start = parameters_to_vector(agent.parameters()).detach().clone()
    logged = script.ppo_loss(agent, batch, make_coef(), False)[1]
    state, coef = script.initial_state(agent, len(logged) + 1), make_coef(**coef, learning_rate=1e-3)
    coef["max_grad_norm"].fill_(max_grad_norm)
    for _ in range(20):
        state = script.update(agent, state, batch, coef, False)
    torch.nn.utils.vector_to_parameters(state["parameters"], agent.parameters())
    moved = (state["parameters"] - start).norm()
    error = sum((a - b).square().sum() for a, b in pairs(agent, model.policy)).sqrt()
    assert error < 5e-5 * moved and moved > 0.1


# ---- TRPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_their_trpo(seed, monkeypatch):
    """TRPO.train() in float64, with conjugate gradients that go on until the system is solved.

    One difference: they average the KL over the A dimensions of the action, we sum it, as KL(old||new) of the whole
    action is the sum. So their Fisher matrix is F / A, and F / A + c = (F + A c) / A: their damping c and bound d are
    our A c and A d."""
    A, damping, bound = 3, 0.1, 1e-6
    solver, solve = sb3_trpo.conjugate_gradient_solver, trpo.conjugate_gradient
    monkeypatch.setattr(sb3_trpo, "conjugate_gradient_solver", functools.partial(solver, residual_tol=1e-26))
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda product, b, iters, _: solve(product, b, iters, 1e-26))
    monkeypatch.setattr(sb3_policies, "preprocess_obs", lambda obs, *_, **__: obs)  # which would make it float32
    agent = make_agent(trpo, BOX, seed=seed)
    agent.actor[-1].weight.data *= 30  # actions that depend on the state
    agent.log_std.data = torch.tensor([0.3, -0.5, 0.1])
    batch = {key: x.double() for key, x in batches.make_batch(trpo, agent, 256, seed).items()}
    agent = agent.double()
    with torch.no_grad():
        batch["old_policy"] = agent.policy_parameters(batch["obs"])
        batch["logprob"] = agent.policy(batch["obs"]).log_prob(batch["action"])

    flags = {"cg_max_steps": 300, "cg_damping": damping, "target_kl": bound, "learning_rate": 0.0}
    model = make_model(sb3_contrib.TRPO, BOX, 256, normalize_advantage=False, **flags)
    model.policy = model.policy.double()
    copy_weights(agent, model.policy)
    fill(model.rollout_buffer, batch)
    model.train()
    assert model.logger.name_to_value["train/is_line_search_success"] == 1

    theta = parameters_to_vector(trpo.policy_part(agent).values()).detach().clone()
    args = trpo.Args(max_kl=A * bound, cg_damping=A * damping, cg_iters=300)
    report = trpo.policy_step(*trpo.functions_of_theta(agent, batch, args), args.max_kl, 1.0, args)
    assert report["line_search_step"] == 0
    step = parameters_to_vector(trpo.policy_part(agent).values()).detach() - theta
    theirs = {ours: p for ours, p in pairs(agent, model.policy)}
    their_step = parameters_to_vector([theirs[p].data for p in trpo.policy_part(agent).values()]) - theta
    assert (step - their_step).norm() < 1e-9 * step.norm() and step.norm() > 0
    their_kl = model.logger.name_to_value["train/kl_divergence_loss"]
    assert report["kl"] == pytest.approx(A * their_kl, rel=1e-2)  # they log KL(new||old), equal to second order


# ---- running statistics ----------------------------------------------------------------------------------------------


def test_statistics_of_their_vec_normalize(script):
    """Of observations and of discounted returns, on an environment whose episodes end in every way. VecNormalize begins
    with a count of 1e-4, we with 0; and it sees each step's next observation, we the one acted upon."""
    T, N, gamma = 40, 3, 0.9
    flags = {"env_id": "toy_envs:Counter-v0", "num_envs": N, "num_steps": T, "num_workers": 0, "gamma": gamma}
    agent = make_agent(script, Counter.action_space, obs_dim=2)
    with script.Actors(script.Args(**flags), agent) as actors:
        agent.update_statistics(actors.collect(agent, seed=(1, 0)))
    env = sb3_vec_env.VecNormalize(sb3_vec_env.DummyVecEnv([Counter] * N), gamma=gamma)
    env.obs_rms.count = env.ret_rms.count = 0.0
    env.seed(1)
    env.reset()
    for t in range(T):
        if t == T - 1:  # it has seen T observations, the first one included
            np.testing.assert_allclose(agent.obs_rms.mean, env.obs_rms.mean, rtol=1e-6)
            np.testing.assert_allclose(agent.obs_rms.var, env.obs_rms.var, rtol=1e-6)
        env.step(np.zeros((N, 1)))
    assert agent.return_rms.mean.item() == pytest.approx(env.ret_rms.mean, rel=1e-6)
    assert agent.return_rms.var.item() == pytest.approx(env.ret_rms.var, rel=1e-6)


def test_their_policy_starts_like_ours():
    """Orthogonal layers with the same gains, no bias, standard deviation 1."""
    agent, policy = make_agent(ppo_clip, BOX), make_model(sb3.PPO, BOX).policy
    for ours, theirs in pairs(agent, policy):
        torch.testing.assert_close(torch.linalg.norm(ours), torch.linalg.norm(theirs), rtol=1e-4, atol=1e-6)
