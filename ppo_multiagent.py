# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
# ]
# ///
"""MAPPO and IPPO (Yu et al. 2022, arXiv 2103.01955; de Witt et al. 2020, 2011.09533), and self-play, with PPO.

Every agent g acts on its own observation, pi(a^g | o^g), and maximises PPO's clipped surrogate (1707.06347, eq. 7):

    L(theta) = mean over t, g of  min(r_t^g A_t^g, clip(r_t^g, 1-eps, 1+eps) A_t^g)  +  entropy  -  value error
    ippo     A_t^g from a critic on what agent g sees,  V(o^g)           notes §2.4: "independently"
    mappo    A_t^g from a critic on what all agents see, V(s, g)         notes §2.4: "centralized critic"
    selfplay one policy plays both seats of a zero-sum game; the opponent's is frozen: the current one or an earlier one

The critic is for training only, so MAPPO's policies stay decentralised. Its input is all that separates the two:
with one agent that sees everything they are the same numbers, bit for bit. (The notes also offer joint actions as the
critic's input; that is a Q function's, not the V that PPO's advantages need.)

--share-params (the papers' benchmarks): one network for all agents, told by a one-hot agent id which one it is.
--no-share-params (the notes' IPPO): each agent has its own networks and normalisers, and learns from its own samples.
Both are one code path here: networks are stacks of P weight matrices, P = 1 or P = G.

What the MAPPO paper found to matter, and is done: the value target is normalised (and the critic's output taken back),
few epochs, a small clip, masks for what is not there. Left out: recurrence, and the clipped Huber value loss (the
errors of normalised targets seldom reach its knee at 10). Departures: a batch is split into four minibatches, which the
paper advises against (simple_spread at 100k steps: -59; with one, -65 to -69); a time limit is bootstrapped, from the
state before the reset, which takes PopArt to be stable (see Agent.update_normalisers); observations are scaled by
running statistics that are saved with the model, not by a layer.

Commands:
    python ppo_multiagent.py                                      # MAPPO, built-in simple_spread, 1M steps
    python ppo_multiagent.py --algorithm ippo --no-share-params
    python ppo_multiagent.py --algorithm selfplay --total-timesteps 5000000      # built-in connect_four, 4 minutes
    python ppo_multiagent.py --evaluate RUN --opponent mcts-50 --eval-episodes 200     # needs open_spiel; or: random,
    python ppo_multiagent.py --evaluate RUN --opponent pool                            # RUN2, pool (Elo table, elo.png)
    python ppo_multiagent.py --env-id mpe2.simple_speaker_listener_v4 --no-share-params     # any PettingZoo environment
    python ppo_multiagent.py --env-id gymnasium_robotics.mamujoco_v1 --no-share-params --num-envs 8 --num-steps 256
        (with --env-kwargs '{"scenario": "HalfCheetah", "agent_conf": "2x3"}' --num-minibatches 32 --learning-rate 3e-4)

Expect (README: seeds), returns summed over agents: simple_spread -59 at 100k steps and -55 at 550k, the end of a run;
-32 after 10M with --hidden-size 128; random play -80. connect_four after 2M moves (2 minutes): 0.97 against random
play, 0.5-0.66 against MCTS-50.

Shapes: T steps, N envs, B = T*N, M minibatch, G agents, P learners (1 or G), D observation, S state, A actions.
"""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "ppo_multiagent"  # written into checkpoints and folder names; a checkpoint of another script is refused


@dataclass
class Args:
    """MAPPO, IPPO, self-play. Defaults: the MAPPO paper's for MPE (its Table 11); PRESETS below has self-play's."""

    # the run
    algorithm: Literal["mappo", "ippo", "selfplay"] = "mappo"
    """mappo: critic on the joint state; ippo: on the agent's own observation; selfplay: two-player games"""
    env_id: str = "simple_spread"
    """built in: simple_spread, connect_four (selfplay); or a PettingZoo parallel environment: mpe2.simple_tag_v3"""
    env_kwargs: str = "{}"
    """arguments of a PettingZoo environment, as JSON"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, all agents acting in each (selfplay: moves of the learner)"""
    seed: int = 1
    """all randomness of the run follows from it"""
    cuda: bool = False
    """train on the GPU; the built-in environments run there too"""
    compile: bool = True
    """torch.compile the minibatch update: some 15 s of start-up (5 s once cached), then faster updates;
    runs shorter than 200 000 steps default to --no-compile"""
    run_dir: str | None = None
    """this run's folder (default: runs/<env_id>__<script>__<seed>__<time>)"""
    checkpoint_every: int = 100_000
    """write a checkpoint whenever global_step passes a multiple of this; episodes in flight are truncated there"""
    resume: str | None = None
    """a checkpoint or a run folder to go on from; flags that are not given keep the checkpoint's values"""
    stop_at_step: int | None = None
    """end this process, with a checkpoint, at the first iteration end at or past this step"""
    evaluate: str | None = None
    """no training: run the policies of this checkpoint or run folder, likeliest actions, and print one JSON line"""
    eval_episodes: int = 10
    """episodes or games of --evaluate"""
    opponent: str = "random"
    """with --evaluate, selfplay: random, mcts-N (open_spiel's with N simulations a move), another checkpoint or run
    folder, or pool: all snapshots against each other, an Elo table and elo.png"""
    capture_video: bool = False
    """with --evaluate: write a video of every episode beside the checkpoint (PettingZoo environments)"""

    # the actors
    num_envs: int = 128
    """N, parallel environments ("at least over 50", the official code's authors)"""
    num_steps: int = 25
    """T, steps in each environment per iteration"""
    vectorization: Literal["sync", "async"] = "sync"
    """how PettingZoo environments are stepped: in this process, or one process each"""

    # the agents
    share_params: bool = True
    """one network for all agents; --no-share-params: each agent its own actor and critic"""
    team_reward: Literal["sum", "mean", "none"] = "sum"
    """what an agent learns from: the sum or mean of all agents' rewards (cooperative tasks), or its own"""
    hidden_size: int = 64
    """width of the two hidden layers"""
    norm_obs: bool = True
    """scale observations and states by running statistics"""

    # the algorithm
    learning_rate: float = 7e-4
    """Adam step size; its first value where a schedule changes it"""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """linear: to 0 over the run (the official code can, and by default does not)"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    num_minibatches: int = 4
    """minibatches per epoch. The MAPPO paper advises against splitting; simple_spread learns faster with four"""
    update_epochs: int = 10
    """K, passes over each batch; the MAPPO paper advises 5 to 15, fewer for harder tasks"""
    norm_adv: bool = True
    """normalise advantages to mean 0 and standard deviation 1 in each minibatch, over all that a network learns from"""
    clip_coef: float = 0.2
    """eps of the clipped surrogate"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the squared error of the normalised value"""
    max_grad_norm: float = 10.0
    """clip the gradient's global norm to this"""

    # self-play
    latest_prob: float = 0.5
    """probability that an episode's opponent is the current policy; else it comes from the pool"""
    opponent_sampling: Literal["uniform", "window", "pfsp"] = "uniform"
    """from the whole pool, its latest quarter, or in proportion to (1 - score against it)^2 (Vinyals et al. 2019)"""
    snapshot_every: int = 10
    """iterations between snapshots for the pool; doubles whenever the pool is full"""
    pool_size: int = 32
    """snapshots that are kept; from a full pool every second one goes, so that it always spans the run evenly"""


# what --algorithm changes about the defaults
PRESETS = {
    "mappo": {},
    "ippo": {},
    "selfplay": {
        "env_id": "connect_four", "num_envs": 256, "num_steps": 64, "hidden_size": 128, "norm_obs": False, "gamma": 1.0,
        "learning_rate": 1e-3, "num_minibatches": 16, "update_epochs": 2, "ent_coef": 0.05, "max_grad_norm": 0.5,
    },
}  # fmt: skip


# ==== Networks and distributions ======================================================================================


class DiagGaussian:
    """Normal distribution with diagonal covariance (Box actions). A policy is a tensor (..., P = 2A): mean, log std."""

    @staticmethod
    def log_prob(policy, action):  # -> (...), summed over the action's dimensions
        mean, log_std = policy.chunk(2, dim=-1)
        z = (action - mean) * (-log_std).exp()
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    @staticmethod
    def entropy(policy):  # -> (...)
        return (policy.chunk(2, dim=-1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    @staticmethod
    def kl(old, new):
        """KL(old || new) in closed form, nats. (..., 2A), (..., 2A) -> (...)"""
        (m0, s0), (m1, s1) = old.chunk(2, dim=-1), new.chunk(2, dim=-1)
        return (s1 - s0 + 0.5 * ((2 * s0).exp() + (m0 - m1).square()) * (-2 * s1).exp() - 0.5).sum(-1)


class Categorical:
    """Distribution over Discrete actions. A policy is a tensor of log-probabilities (..., P = A)."""

    @staticmethod
    def log_prob(policy, action):
        return policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def entropy(policy):
        return -(policy.exp() * policy).sum(-1)

    @staticmethod
    def kl(old, new):
        """KL(old || new) in closed form, nats. (..., A), (..., A) -> (...)"""
        return (old.exp() * (old - new)).sum(-1)


def gumbel(shape, rng):
    """Noise that makes the argmax of logits + noise a sample of their softmax."""
    return -torch.empty(shape).exponential_(generator=rng).log()


class StackedMLP(nn.Module):
    """P networks of the same shape, side by side, with two hidden ReLU layers. Layer i is P weight matrices.

    (..., G, D) -> (..., G, outputs), with P = 1: the same network for each of the G agents, or P = G: one network each.
    Orthogonal initialisation with zero biases.
    """

    def __init__(self, P, inputs, hidden, outputs, output_gain, rng):
        super().__init__()
        sizes, gains = [inputs, hidden, hidden, outputs], [math.sqrt(2), math.sqrt(2), output_gain]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n_in, n_out, gain in zip(sizes, sizes[1:], gains):
            weight = torch.empty(P, n_in, n_out)
            for p in range(P):
                nn.init.orthogonal_(weight[p], gain, generator=rng)
            self.weights.append(weight)
            self.biases.append(torch.zeros(P, 1, n_out))

    def forward(self, x):
        P, lead = len(self.weights[0]), x.shape[:-1]
        x = x.reshape(-1, lead[-1] if P > 1 else 1, x.shape[-1]).transpose(0, 1)  # (P, rows, inputs)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x.relu() if i else x, weight)
        return x.transpose(0, 1).reshape(*lead, -1)


class Agent(nn.Module):
    """Policies and values of all agents, and the normalisers they see the world through: saved and loaded as one."""

    def __init__(self, world, centralised, share_params, hidden, rng):
        super().__init__()
        self.G, self.P = world.num_agents, 1 if share_params else world.num_agents
        self.centralised = centralised  # the critic sees the joint state (MAPPO), not the agent's observation
        self.discrete = isinstance(world.action_space, gym.spaces.Discrete)
        self.dist = Categorical if self.discrete else DiagGaussian
        self.action_dim = int(world.action_space.n if self.discrete else world.action_space.shape[0])
        self.policy_dim = self.action_dim if self.discrete else 2 * self.action_dim
        self.ids = self.G if self.P < self.G else 0  # width of the one-hot agent id
        critic_dim = world.state_dim if centralised else world.obs_dim
        self.actor = StackedMLP(self.P, world.obs_dim + self.ids, hidden, self.action_dim, 0.01, rng)
        self.critic = StackedMLP(self.P, critic_dim + self.ids, hidden, 1, 1.0, rng)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.P, self.action_dim))  # the same in all states
        self.obs_rms = nn.ModuleList(RunningMeanStd((world.obs_dim,)) for _ in range(self.P))
        self.value_rms = nn.ModuleList(RunningMeanStd(()) for _ in range(self.P))
        self.state_rms = RunningMeanStd((world.state_dim,))

    def with_id(self, x):  # (..., G, D) -> (..., G, D + ids)
        if not self.ids:
            return x
        return torch.cat([x, torch.eye(self.ids, device=x.device).expand(*x.shape[:-1], self.ids)], -1)

    def policy(self, obs, legal):
        """obs (..., G, D) normalised, legal (..., G, A) -> (..., G, policy_dim). Illegal actions have probability 0;
        an action dimension that an agent does not have gets a constant distribution of entropy 0, and no gradient."""
        out = self.actor(self.with_id(obs))
        if self.discrete:
            return out.masked_fill(~legal, -1e8).log_softmax(-1)
        no_entropy = -0.5 * math.log(2 * math.pi * math.e)
        return torch.cat([out.where(legal, 0), self.log_std.expand_as(out).where(legal, no_entropy)], -1)

    def value(self, obs, state):
        """obs (..., G, D), state (..., S), normalised -> (..., G), normalised."""
        x = state.unsqueeze(-2).expand(*obs.shape[:-1], -1) if self.centralised else obs
        return self.critic(self.with_id(x)).squeeze(-1)

    def frozen_policy(self):
        """The policies as they are now, as a function of what a world shows (raw observations) that no later update
        reaches: (view, noise=None) -> actions (N, G) or (N, G, A), sampled, or without noise the likeliest ones."""
        frozen = copy.deepcopy(self).requires_grad_(False)
        normalize = frozen.obs_normalizer()

        @torch.no_grad()
        def act(view, noise=None):
            policy = frozen.policy(normalize(view["obs"]), view["legal"])
            if frozen.discrete:
                return (policy if noise is None else policy + noise).argmax(-1)
            mean, log_std = policy.chunk(2, dim=-1)
            return mean if noise is None else mean + log_std.exp() * noise

        return act

    def noise(self, *lead, rng):
        """For `frozen_policy`: Gumbel or standard normal."""
        shape, device = (*lead, self.G, self.action_dim), self.actor.weights[0].device
        if self.discrete:
            return gumbel(shape, rng).to(device)
        return torch.randn(shape, generator=rng).to(device)

    def obs_normalizer(self):
        """The map of observations (..., G, D) by each learner's own statistics, frozen as they are now."""
        mean, inv_std = (torch.stack(x).float() for x in zip(*((r.mean, r.inv_std()) for r in self.obs_rms)))
        return lambda obs: ((obs - mean) * inv_std).clamp(-10, 10)

    def normalized(self, obs, state=None):  # (..., G, D), (..., S) unless None
        return self.obs_normalizer()(obs), None if state is None else self.state_rms.normalizer()(state)

    def value_scale(self):
        """Mean and standard deviation of the returns, (P,) each: a value is mean + std * the critic's output."""
        mean, inv_std = (torch.stack(x).float() for x in zip(*((r.mean, r.inv_std()) for r in self.value_rms)))
        return mean, 1 / inv_std

    @torch.no_grad()
    def update_normalisers(self, rollout, returns, norm_obs):
        """Fold a rollout's observations, states and returns (T, N, G) into the running statistics, where agents live.

        NOTE: the critic's last layer is rescaled so that no value changes (PopArt, van Hasselt et al. 2016, eq. 9).
        Without that a growing standard deviation would stretch all values, the next targets bootstrap from these, and
        on simple_spread both grow without limit within 100 000 steps."""
        alive, (old_mean, old_std) = rollout["alive"], self.value_scale()
        for p in range(self.P):
            g = slice(None) if self.P < self.G else slice(p, p + 1)
            rows = alive[:, :, g] > 0
            if rows.any():
                self.value_rms[p].update(returns[:, :, g][rows])
                if norm_obs:
                    self.obs_rms[p].update(rollout["obs"][:-1, :, g][rows])
        mean, std = (x.view(-1, 1, 1) for x in self.value_scale())
        weight, bias, old_std = self.critic.weights[-1], self.critic.biases[-1], old_std.view(-1, 1, 1)
        weight *= old_std / std
        bias.copy_((old_std * bias + old_mean.view(-1, 1, 1) - mean) / std)
        if norm_obs and self.centralised:
            self.state_rms.update(rollout["state"][:-1].flatten(0, 1))


# ==== The mathematics: pure functions of tensors ======================================================================


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates, GAE (1506.02438) eq. (16), for episodes that end in two different ways.

    All arguments (T, N). `next_value` is V of the true successor state, also where the episode was cut there by a time
    limit; `done` = terminated or truncated. Returns A (T, N).

    A_t = delta_t + c_t A_{t+1} with c_t = gamma lambda (1-done_t) is summed by doubling: before the pass with a given
    stride, advantage[t] holds the first `stride` terms of the sum from t, and decay[t] = c_t ... c_{t+stride-1}.
    log2(T) vector operations instead of T small ones.
    """
    advantage = reward + gamma * next_value * (1 - terminated) - value  # delta_t
    decay = gamma * gae_lambda * (1 - done)
    stride = 1
    while stride < len(advantage):
        advantage[:-stride] += decay[:-stride] * advantage[stride:]
        decay[:-stride] = decay[:-stride] * decay[stride:]
        stride *= 2
    return advantage


def clipped_surrogate(ratio, advantage, clip_coef):
    """min(r A, clip(r, 1-eps, 1+eps) A) per sample: PPO eq. (7), notes §2.1. eps = inf leaves r A. (M,), (M,) -> (M,)

    Its gradient is 0 where A > 0 and r > 1+eps, and where A < 0 and r < 1-eps; elsewhere it is that of r A. (The notes
    show A = -2, r = 0.6 to motivate the min, but there the clipped term is the smaller one already; the min matters
    for A < 0 and r > 1+eps, and for A > 0 and r < 1-eps, where it lets a policy that has gone too far come back.)
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


COEFFICIENTS = ("learning_rate", "clip_coef", "ent_coef", "vf_coef", "max_grad_norm")
METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def multiagent_loss(agent, batch, coef, norm_adv):
    """The loss to minimise on one minibatch: PPO's, per learner, each over the samples that it learns from.

    batch: obs (M, G, D) · state (M, S) · legal (M, G, A) · action (M, G) or (M, G, A) · logprob, advantage, return,
    alive (M, G) at the old parameters; return in units of the critic's output; alive is 0 where an agent was not there.
    coef: scalars. Returns loss (), summed over learners, and metrics (5,), their means.
    """
    P = agent.P
    weight = batch["alive"].reshape(-1, P)  # (rows, P): shared parameters learn from all agents' rows alike
    weight = weight / weight.sum(0).clamp(min=1)

    def mean(x):  # (M, G) -> (P,)
        return (weight * x.reshape(-1, P)).sum(0)

    advantage = batch["advantage"]
    if norm_adv:
        centred = advantage - mean(advantage)
        advantage = centred / (mean(centred.square()).sqrt() + 1e-8)

    policy, value = agent.policy(batch["obs"], batch["legal"]), agent.value(batch["obs"], batch.get("state"))
    log_ratio = (agent.dist.log_prob(policy, batch["action"]) - batch["logprob"]) * batch["alive"]
    ratio = log_ratio.exp()
    policy_loss = -mean(clipped_surrogate(ratio, advantage, coef["clip_coef"]))
    value_loss = mean((value - batch["return"]).square())
    entropy = mean(agent.dist.entropy(policy))
    loss = (policy_loss + coef["vf_coef"] * value_loss - coef["ent_coef"] * entropy).sum()
    with torch.no_grad():
        approx_kl = mean(ratio - 1 - log_ratio)  # an estimate of KL(old||new) that is never negative
        clipfrac = mean(((ratio - 1).abs() > coef["clip_coef"]).float())
        return loss, torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac]).mean(-1)


def minibatch_update(loss_function, module, adam, data, index, coef, metrics, *options):
    """One gradient step on data[index] (M,): loss, gradient, norm clipping, Adam. Adds what to log to `metrics`.

    In place, with static shapes, no random numbers and no host sync: the same function runs eager, compiled, or
    captured in a CUDA graph. adam["params"] is the vector that the module's parameters are views of.
    """
    batch = {key: x[index] for key, x in data.items()}
    loss, logged = loss_function(module, batch, coef, *options)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
    with torch.no_grad():
        norm = grad.norm()
        adam_step(adam, grad * (coef["max_grad_norm"] / (norm + 1e-6)).clamp(max=1), coef["learning_rate"])
        metrics += torch.cat([logged, norm.unsqueeze(0)])


def adam_step(adam, grad, learning_rate, beta1=0.9, beta2=0.999, eps=1e-5):
    """Adam (1412.6980, Algorithm 1) on one vector, in place; eps is the released code's. The same numbers as
    torch.optim.Adam, without its loop over parameters, which here costs more than the networks themselves."""
    adam["step"] += 1
    adam["m"].lerp_(grad, 1 - beta1)
    adam["v"].lerp_(grad.square(), 1 - beta2)
    m_hat = adam["m"] / (1 - beta1 ** adam["step"])
    v_hat = adam["v"] / (1 - beta2 ** adam["step"])
    adam["params"] -= learning_rate * m_hat / (v_hat.sqrt() + eps)


def flatten_parameters(params):
    """Move parameters into one vector (returned) and make each of them a view of its part."""
    params = list(params)
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.data = part.view_as(p)
    return flat


@torch.no_grad()
def team_kl(agent, data):
    """Exact KL(old||new) averaged over the batch's living agents, as a scalar tensor."""
    kl = agent.dist.kl(data["policy"], agent.policy(data["obs"], data["legal"]))  # (B, G)
    return (kl * data["alive"]).sum() / data["alive"].sum()


def explained_variance(value, target):
    """1 - Var[target - value] / Var[target]: 1 is a perfect critic, 0 one no better than a constant; nan if Var = 0."""
    variance = target.var(correction=0)
    return (1 - (target - value).var(correction=0) / variance).item() if variance > 0 else float("nan")


def empty_batch(agent, world, B):
    """What one iteration learns from, as zeros; see multiagent_loss."""
    G, A, zeros = agent.G, agent.action_dim, torch.zeros
    data = {key: zeros(B, G) for key in ("logprob", "value", "advantage", "return", "alive")}
    data |= {"obs": zeros(B, G, world.obs_dim), "legal": torch.ones(B, G, A, dtype=torch.bool)}
    data |= {"action": zeros(B, G, dtype=torch.long) if agent.discrete else zeros(B, G, A)}
    data |= {"policy": zeros(B, G, agent.policy_dim)}
    return data | ({"state": zeros(B, world.state_dim)} if agent.centralised else {})


@torch.no_grad()
def prepare_batch(data, agent, rollout, gamma, gae_lambda, team_reward):
    """Write a rollout, with its log-probabilities, values and advantages at the present parameters, into `data`.
    Returns the lambda-returns (T, N, G) in the units of the reward."""
    value_mean, value_std = agent.value_scale()
    obs, state = agent.normalized(rollout["obs"], rollout.get("state"))  # (T+1, N, G, D), (T+1, N, S) or None
    value = value_mean + value_std * agent.value(obs, state)  # (T+1, N, G)
    next_value = value[1:].clone()  # (T, N, G)
    if len(rollout["final_index"]):  # the true successors of last steps; obs[t+1] is a new episode's first there
        final = agent.normalized(rollout["final_obs"], rollout.get("final_state"))
        next_value[tuple(rollout["final_index"].T)] = value_mean + value_std * agent.value(*final)
    reward = rollout["reward"]  # (T, N, G)
    if team_reward != "none":
        reward = (reward.sum(-1, True) if team_reward == "sum" else reward.mean(-1, True)).expand_as(reward)
    advantage = gae(reward, value[:-1], next_value, rollout["terminated"], rollout["done"], gamma, gae_lambda)
    returns, policy = advantage + value[:-1], agent.policy(obs[:-1], rollout["legal"])
    batch = {"obs": obs[:-1], "legal": rollout["legal"], "alive": rollout["alive"], "action": rollout["action"]}
    batch |= {"policy": policy, "logprob": agent.dist.log_prob(policy, rollout["action"]), "advantage": advantage}
    batch |= {"value": (value[:-1] - value_mean) / value_std, "return": (returns - value_mean) / value_std}
    batch |= {"state": state[:-1]} if agent.centralised else {}
    for key in data:
        data[key].copy_(batch[key].flatten(0, 1))
    return returns


# ==== Self-play =======================================================================================================


class SelfPlay:
    """A two-player zero-sum game as a world with one agent: the learner, in either seat. The opponent's plies happen
    inside `step`, so whatever is collected and learned from is the learner's, and its last reward may come from the
    opponent's ply. Both look at the board from the side of whoever is to move: one policy plays both seats.

    Seat and opponent are drawn when an episode begins and stay until it ends, though a new iteration may begin
    meanwhile: two hands of frozen opponents are kept, for episodes begun in this iteration and in the one before.
    """

    num_agents, HAND = 1, 4  # of snapshots, beside the current policy

    def __init__(self, game, latest_prob):
        self.game, self.latest_prob, self.num_envs, self.device = game, latest_prob, game.num_envs, game.device
        self.obs_dim = self.state_dim = game.obs_dim
        self.action_space = gym.spaces.Discrete(game.num_actions)
        self.rng, self.policies, self.hand = torch.Generator(), {}, 0

    def deal(self, latest, snapshots):
        """Freeze the opponents of the episodes that begin from now on: the agent as it is, and some of its past."""
        past = copy.deepcopy(latest)
        self.hand = 1 + self.HAND - self.hand  # the first slot of the other hand
        self.snapshots, self.results = snapshots, []
        self.policies[self.hand] = latest.frozen_policy()
        for slot, snapshot in enumerate(snapshots, self.hand + 1):
            past.load_state_dict(snapshot["policy"], strict=False)
            self.policies[slot] = past.frozen_policy()

    def reset(self, seed):
        self.rng.manual_seed(seed[0])
        self.slot = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self.begin(torch.ones_like(self.slot, dtype=torch.bool))
        return self.game.view()

    def step(self, action):  # (N, 1)
        score, over = self.game.play(action[:, 0], torch.ones_like(self.slot, dtype=torch.bool))
        reply, lost = self.reply(~over)
        reward, over = score - reply, over | lost  # (N,), (N,)
        self.results.append((self.slot[over], reward[over]))
        self.begin(over)
        return self.game.view(), reward[:, None], over[:, None], over, None

    def begin(self, where):
        """Start new episodes where `where` (N,): draw opponent and seat; an opponent with the first move makes it."""
        draws = torch.rand(3, self.num_envs, generator=self.rng).to(self.device)
        old = self.hand + 1 + (draws[0] * len(self.snapshots)).long()
        slot = torch.where((draws[1] < self.latest_prob) | (not self.snapshots), self.hand, old)
        self.slot = torch.where(where, slot, self.slot)
        self.game.start(where)
        self.reply(where & (draws[2] < 0.5))

    def reply(self, waiting):
        """Let the opponents move where `waiting` (N,). Returns their score and whether the game is over, (N,) each."""
        view, action = self.game.view(), torch.zeros_like(self.slot)
        noise = gumbel((self.num_envs, 1, self.action_space.n), self.rng).to(self.device)
        for k in self.slot[waiting].unique().tolist():
            rows = (waiting & (self.slot == k)).nonzero()[:, 0]
            action[rows] = self.policies[k]({x: view[x][rows] for x in ("obs", "legal")}, noise[rows])[:, 0]
        return self.game.play(action, waiting)

    def close(self):
        pass


class Pool:
    """Snapshots of the policy with its normaliser, spread evenly over the run so far; part of the checkpoint."""

    def __init__(self, every, size, sampling):
        self.every, self.size, self.sampling = every, size, sampling
        self.snapshots, self.strength = [], dict.fromkeys(("random", "earliest", "middle", "latest"), math.nan)

    def add(self, agent, global_step):
        policy = {key: x.cpu().clone() for key, x in agent.state_dict().items() if not key.startswith("critic")}
        self.snapshots.append({"global_step": global_step, "score": 0.5, "policy": policy})
        if len(self.snapshots) > self.size:
            del self.snapshots[1::2]  # the first stays
            self.every *= 2

    def draw(self, n, rng):
        """n snapshots, with replacement; none from an empty pool."""
        pool = self.snapshots[-(len(self.snapshots) // 4 + 1) :] if self.sampling == "window" else self.snapshots
        if not pool:
            return []
        weights = torch.ones(len(pool))
        if self.sampling == "pfsp":
            weights = torch.tensor([(1 - x["score"]) ** 2 + 1e-3 for x in pool])
        return [pool[i] for i in torch.multinomial(weights, n, replacement=True, generator=rng).tolist()]

    def record(self, world):
        """Note how the learner fared against each snapshot in the last rollout: a running mean, for pfsp."""
        slots, rewards = (torch.cat(x) for x in zip(*world.results))
        for slot, snapshot in enumerate(world.snapshots, world.hand + 1):
            if (slots == slot).any():
                score = 0.5 + 0.5 * rewards[slots == slot].mean().item()
                snapshot["score"] += 0.2 * (score - snapshot["score"])

    def measure(self, agent, game, rng):
        """Score (won 1, drawn 1/2) against random play and the earliest, middle and latest snapshot. Not the score
        against the training mixture: that stays where it is however strong both sides become, or weak."""
        me, other = policy_player(agent, rng), copy.deepcopy(agent)
        self.strength["random"] = match(game, me, random_player(rng)).mean().item()
        for name, at in (("earliest", 0), ("middle", len(self.snapshots) // 2), ("latest", -1)):
            if self.snapshots:
                other.load_state_dict(self.snapshots[at]["policy"], strict=False)
                self.strength[name] = match(game, me, policy_player(other, rng)).mean().item()


def policy_player(agent, rng=None):
    """A player for `match`: a sample of the agent's policy, or without rng its likeliest move."""
    act = agent.frozen_policy()
    return lambda view, moves: act(view, None if rng is None else agent.noise(len(view["obs"]), rng=rng))[:, 0]


def random_player(rng):
    return lambda view, moves: torch.multinomial(view["legal"][:, 0].float().cpu(), 1, generator=rng)[:, 0]


def mcts_player(env_id, simulations, seed):
    """open_spiel's Monte Carlo tree search with one random playout per simulation. Raises UserError."""
    try:
        import pyspiel
    except ImportError:
        raise UserError("--opponent mcts-N needs the package: pip install open_spiel==2.0.2") from None
    game = pyspiel.load_game(env_id)
    bot = pyspiel.MCTSBot(game, pyspiel.RandomRolloutEvaluator(1, seed), 2.0, simulations, 100, False, seed, False)

    def player(view, moves):
        actions = []
        for history in zip(*(m.tolist() for m in moves)) if moves else [()] * len(view["obs"]):
            state = game.new_initial_state()
            for action in history:
                state.apply_action(action)
            actions.append(bot.step(state))
        return torch.tensor(actions)

    return player


def match(game, first, second):
    """Play game.num_envs games, `first` moving first in every other one. Returns its scores (N,): won 1, drawn 1/2."""
    row = torch.arange(game.num_envs, device=game.device)
    playing, score, moves = torch.ones_like(row, dtype=torch.bool), torch.full(row.shape, 0.5, device=game.device), []
    game.start(playing)
    for ply in range(game.max_plies):
        view, action, firsts = game.view(), torch.zeros_like(row), (row + ply) % 2 == 0
        for player, turn in ((first, firsts), (second, ~firsts)):
            rows = (playing & turn).nonzero()[:, 0]
            if len(rows):
                action[rows] = player({x: view[x][rows] for x in view}, [m[rows] for m in moves]).to(row.device)
        won, over = game.play(action, playing)
        score += won * torch.where(firsts, 0.5, -0.5)
        moves.append(action)
        playing &= ~over
        if not playing.any():
            break
    return score


def elo(score, games):
    """Elo ratings (K,) of K players from a matrix of mean scores (K, K), `games` a pair: the Bradley-Terry model,
    P(i beats j) = p_i / (p_i + p_j), fitted by minorisation-maximisation (Hunter 2004, eq. 3). A draw is half a win;
    one more, imagined draw a pair keeps an unbeaten player's rating finite. The first player's rating is 0."""
    wins = (score * games + 0.5).fill_diagonal_(0).sum(1).double()
    n, p = torch.full_like(score, games + 1).fill_diagonal_(0).double(), torch.ones(len(score)).double()
    for _ in range(1000):
        p = wins / (n / (p[:, None] + p)).sum(1)
    return 400 * (p / p[0]).log10()


# ==== Training ========================================================================================================


def train(args: Args) -> dict:
    """Train by MAPPO, IPPO or self-play. Returns a summary: global_step, episodic_return (mean raw return, summed over
    agents, of the last 100 episodes; in self-play their mean reward), episodes, returns (of those that ended in this
    call, the last 100), checkpoint (its path), signal (the one that ended the run, or None).

    Raises UserError before anything is written, RunFailed if a loss, reward or observation is not finite.
    """
    start_time = time.time()
    check_args(args)
    checkpoint = load_checkpoint(args.resume, args.env_id) if args.resume else None
    run_dir = choose_run_dir(args)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(1)  # with networks this small a second thread costs more than it brings
    team = Team(make_world(args, args.num_envs, device))
    rng = torch.Generator().manual_seed(args.seed)
    agent = Agent(team.world, args.algorithm == "mappo", args.share_params, args.hidden_size, rng).to(device)
    pool = Pool(args.snapshot_every, args.pool_size, args.opponent_sampling) if args.algorithm == "selfplay" else None

    # Everything that the update reads has a fixed place in memory and is only ever overwritten there. Hyperparameters
    # are tensors too: no schedule and no population's mutation makes the compiler start again.
    T, N = args.num_steps, args.num_envs
    B, M = T * N, T * N // args.num_minibatches
    flat = flatten_parameters(agent.parameters())
    adam = {"params": flat, "m": torch.zeros_like(flat), "v": torch.zeros_like(flat), "step": flat.new_zeros(())}
    data = {key: x.to(device) for key, x in empty_batch(agent, team.world, B).items()}
    inputs = {key: x for key, x in data.items() if key not in ("policy", "value")}  # of the update
    coef = {key: torch.zeros((), device=device) for key in COEFFICIENTS}
    metrics = torch.zeros(len(METRICS), device=device)
    step = minibatch_update

    order = torch.zeros(args.num_minibatches, M, dtype=torch.long, device=device)  # an epoch's minibatches

    def epoch_of_updates():
        for index in order.unbind():  # (M,)
            step(multiagent_loss, agent, adam, inputs, index, coef, metrics, args.norm_adv)

    run_epoch = graphed(epoch_of_updates, device)

    if args.compile:
        step = compiled(minibatch_update, device)
        try:
            epoch_of_updates()  # compiles; on zeros, with learning rate 0
        except Exception as error:  # no C++ compiler, say: the eager function is the same one
            print(f"{SCRIPT}.py: torch.compile failed, going on without it: {first_line(error)}", file=sys.stderr)
            step = minibatch_update
        for key in ("m", "v", "step"):
            adam[key].zero_()

    global_step, iteration, wall_time = 0, 0, 0.0
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for key in ("m", "v", "step"):
            adam[key].copy_(checkpoint["adam"][key])
        if args.seed == checkpoint["args"]["seed"]:  # else another seed's stream of random numbers begins here
            rng.set_state(checkpoint["rng"])
        team.load_state_dict(checkpoint["actors"])
        global_step, iteration, wall_time = (checkpoint[key] for key in ("global_step", "iteration", "wall_time"))
        if pool:
            every, pool.snapshots, pool.strength = checkpoint["pool"]
            if args.snapshot_every == checkpoint["args"]["snapshot_every"]:  # else the flag beats the doubled interval
                pool.every = every
    episodes_before = team.episodes

    def save():
        state = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step, "wall_time": wall_time}
        state |= {"agent": agent.state_dict(), "adam": {key: adam[key] for key in ("m", "v", "step")}}
        state |= {"iteration": iteration, "rng": rng.get_state(), "actors": team.state_dict()}
        state |= {"pool": (pool.every, pool.snapshots, pool.strength) if pool else None}
        save_checkpoint(state, run_dir / "checkpoint.pt")

    log = RunLog(args, run_dir, global_step, save)
    if args.cuda:
        announce_cuda(sum(p.numel() for p in agent.parameters()), M)
    last_step = min(args.total_timesteps, args.stop_at_step or args.total_timesteps)
    wall_start = start_time - wall_time
    wall_time = time.time() - wall_start
    cut = True  # a clean cut: the episodes in flight are truncated, all environments start afresh
    with contextlib.closing(team.world), log, unguarded(step is not minibatch_update), stop_signals() as signals:
        while global_step < last_step:
            remaining = 1 - global_step / args.total_timesteps  # from 1 to 0
            learning_rate = args.learning_rate * (remaining if args.lr_schedule == "linear" else 1)
            values = (learning_rate, args.clip_coef, args.ent_coef, args.vf_coef, args.max_grad_norm)
            for key, x in zip(COEFFICIENTS, values, strict=True):
                coef[key].fill_(x)

            # ---- opponents: the present policy and some of its past, frozen ------------------------------------------
            if pool:
                if iteration % pool.every == 0:
                    pool.measure(agent, make_game(args.env_id, 100, device), torch.Generator().manual_seed(global_step))
                    pool.add(agent, global_step)
                team.world.deal(agent, pool.draw(SelfPlay.HAND, rng))

            # ---- collect: run the policies for T steps in N environments ---------------------------------------------
            if cut:
                team.reset(seed=(args.seed, global_step))
            rollout = team.collect(agent, T, rng)
            if not all(rollout[key].isfinite().all() for key in ("obs", "reward")):
                raise RunFailed(f"an observation or reward is not finite, within {B} steps of step {global_step}")
            if pool:
                pool.record(team.world)

            # ---- advantages ------------------------------------------------------------------------------------------
            # NOTE: acting and updating must see the same normalisers, or the ratio would not start at 1: so a rollout
            # is folded into them only after it was learned from. The first is the exception: an untrained policy, its
            # last layer small, acts the same on raw and on scaled observations; its log-probabilities are taken after.
            returns = prepare_batch(data, agent, rollout, args.gamma, args.gae_lambda, args.team_reward)
            first_rollout = global_step == 0
            if first_rollout:
                agent.update_normalisers(rollout, returns, args.norm_obs)
                returns = prepare_batch(data, agent, rollout, args.gamma, args.gae_lambda, args.team_reward)

            # ---- update: K epochs of minibatches on L(theta) ---------------------------------------------------------
            metrics.zero_()
            for _ in range(args.update_epochs):
                order.copy_(torch.randperm(B, generator=rng).view(-1, M))
                run_epoch()
            kl = team_kl(agent, data).item()
            if not first_rollout:
                agent.update_normalisers(rollout, returns, args.norm_obs)
            global_step += B
            iteration += 1

            # ---- log, checkpoint -------------------------------------------------------------------------------------
            updates = args.update_epochs * args.num_minibatches
            means = dict(zip(METRICS, (metrics / updates).tolist(), strict=True))
            for key, x in (means | {"kl": kl}).items():
                if not math.isfinite(x):
                    raise RunFailed(f"{key} is {x} at step {global_step}")
            iteration_time, wall_time = time.time() - wall_start - wall_time, time.time() - wall_start
            alive = data["alive"] > 0
            log.row(
                global_step=global_step, wall_time=wall_time, sps=B / iteration_time, **team.statistics(), **means,
                kl=kl, explained_variance=explained_variance(data["value"][alive], data["return"][alive]),
                learning_rate=learning_rate, **team.statistics_by_agent(),
                **({f"selfplay/score_{key}": x for key, x in pool.strength.items()} if pool else {}),
            )  # fmt: skip
            passed = global_step // args.checkpoint_every > (global_step - B) // args.checkpoint_every
            cut = passed or global_step >= last_step or bool(signals)
            if cut:
                save()
            if signals:
                break
    return {
        "global_step": global_step,
        "episodic_return": team.statistics()["episodic_return"],
        "episodes": team.episodes,
        "returns": list(team.returns)[max(0, len(team.returns) - (team.episodes - episodes_before)) :],
        "checkpoint": str(run_dir / "checkpoint.pt"),
        "signal": signals[0] if signals else None,
    }


# ==== Worlds: what the agents live in, batched ========================================================================
#
# A world has num_envs, num_agents, obs_dim, state_dim, action_space (of one agent, the widest), and
#   reset(seed) -> view: obs (N, G, D), state (N, S), legal (N, G, A) and alive (N, G) bool
#   step(action) -> view, reward (N, G), terminated (N, G), over (N,), final
# The view after an episode's end is already the next one's; what was seen last, for bootstrapping, is in `final`: obs
# and state of the rows where `over`, or None if nothing needs it.


class SimpleSpread:
    """Three agents are to cover three landmarks without bumping into each other (Lowe et al. 2017): N worlds at once,
    the same numbers as mpe2's simple_spread_v3 (a test compares them), a hundred times as fast. Episodes of 25 steps.

    NOTE: not the MAPPO paper's numbers. There the reward is shared, positions follow the new velocity, landmarks are
    nearer: their return is about 2 * (sum over agents of this one) - 75.
    """

    num_agents, obs_dim, state_dim, action_space, length = 3, 18, 54, gym.spaces.Discrete(5), 25

    def __init__(self, num_envs, device):
        self.num_envs, self.device, self.rng = num_envs, device, torch.Generator()
        self.force = torch.tensor([[0.0, 0], [-5, 0], [5, 0], [0, -5], [0, 5]], device=device)
        self.others = torch.tensor([[1, 2], [0, 2], [0, 1]], device=device)
        self.always = torch.ones(num_envs, 3, 5, dtype=torch.bool, device=device)

    def reset(self, seed):
        self.rng.manual_seed(seed[0])
        self.begin()
        return self.view()

    def begin(self):  # all worlds start, and end, together
        self.position, self.landmark = 2 * torch.rand(2, self.num_envs, 3, 2, generator=self.rng).to(self.device) - 1
        self.velocity, self.clock = torch.zeros_like(self.position), 0

    def view(self):
        to_landmarks = self.landmark[:, None] - self.position[:, :, None]  # (N, agent, landmark, 2)
        to_others = self.position[:, self.others] - self.position[:, :, None]  # (N, agent, the two others, 2)
        silence = self.position.new_zeros(self.num_envs, 3, 4)  # nobody speaks in this scenario
        obs = torch.cat([self.velocity, self.position, to_landmarks.flatten(2), to_others.flatten(2), silence], -1)
        return {"obs": obs, "state": obs.flatten(1), "legal": self.always, "alive": self.always[..., 0]}

    def step(self, action):  # (N, 3): nothing, left, right, down, up
        apart = self.position[:, :, None] - self.position[:, None]  # (N, 3, 3, 2)
        distance = apart.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        penetration = 1e-3 * torch.logaddexp(distance.new_zeros(()), (0.3 - distance) / 1e-3)  # two radii of 0.15
        push = (100 * apart / distance * penetration).sum(2)
        self.position = self.position + 0.1 * self.velocity  # with the old velocity, as mpe2 does since 2023
        self.velocity = 0.75 * self.velocity + 0.1 * (self.force[action] + push)
        touching = (self.position[:, :, None] - self.position[:, None]).norm(dim=-1) < 0.3
        bumps = touching.sum(-1) - 1  # nobody bumps into itself
        uncovered = (self.landmark[:, :, None] - self.position[:, None]).norm(dim=-1).amin(-1).sum(-1, keepdim=True)
        reward = -0.5 * (uncovered + bumps)
        self.clock += 1
        view, final, over = self.view(), None, self.clock == self.length
        if over:
            final = view
            self.begin()
            view = self.view()
        nobody = torch.zeros_like(reward)
        return view, reward, nobody, torch.full((self.num_envs,), over, device=self.device), final

    def close(self):
        pass


class ConnectFour:
    """N boards of Connect Four, 6 rows of 7 columns. A player's stones are the bits of an int64: bit 7 * column + row,
    the seventh bit of a column staying empty. The view is the mover's: own stones, then the other's, 42 cells each."""

    obs_dim, num_actions, max_plies = 84, 7, 42

    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, device
        self.mine, self.theirs = torch.zeros(2, num_envs, dtype=torch.long, device=device)
        column, row = torch.arange(7, device=device), torch.arange(6, device=device)
        self.cells = (7 * column[:, None] + row).flatten()

    def start(self, where):
        self.mine, self.theirs = self.mine.where(~where, 0), self.theirs.where(~where, 0)

    def view(self):
        boards = torch.stack([self.mine, self.theirs], -1)[..., None] >> self.cells & 1  # (N, 2, 42)
        obs, legal = boards.flatten(1).float(), boards.sum(1).view(-1, 7, 6)[..., 5] == 0
        return {"obs": obs[:, None], "state": obs, "legal": legal[:, None], "alive": torch.ones_like(legal[:, :1])}

    def play(self, action, where):
        """Drop the mover's stone into column `action` (N,) where `where`; then the other player is to move there.
        Returns the mover's score (1: four in a row) and whether the game is over, (N,) each."""
        bottom = torch.ones_like(action) << 7 * action
        stone = ((self.mine | self.theirs) + bottom) & (bottom * 63)  # the carry stops in the lowest free cell
        mine = self.mine | stone
        four = torch.zeros_like(where)
        for shift in (1, 6, 7, 8):  # column, diagonals, row
            pairs = mine & (mine >> shift)
            four |= pairs & (pairs >> 2 * shift) != 0
        full = ((mine | self.theirs)[:, None] >> self.cells & 1).sum(-1) == 42
        self.mine, self.theirs = torch.where(where, self.theirs, self.mine), torch.where(where, mine, self.theirs)
        return (four & where).float(), (four | full) & where


WORLDS, GAMES = {"simple_spread": SimpleSpread}, {"connect_four": ConnectFour}


# ==== Plumbing. A reader who wanted the algorithm can stop here. ======================================================


class UserError(Exception):
    """The user's mistake: one line on standard error, exit status 2."""


class RunFailed(Exception):
    """The run cannot go on: one line on standard error, exit status 1."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- environments and normaliser -------------------------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, in float64 buffers; mean 0 and variance 1 before the first."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x):
        """Merge the rows of x (rows, *shape): Chan et al. 1979, the parallel form of Welford's rule."""
        x = x.to(self.mean)
        total = self.count + len(x)
        delta = x.mean(0) - self.mean
        m2 = self.var * self.count + x.var(0, correction=0) * len(x) + delta.square() * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(m2 / total)
        self.count.copy_(total)

    def inv_std(self):
        """1 / standard deviation; 1 for what has been constant so far, which has no scale."""
        return torch.where(self.var > 1e-8, self.var, 1.0).rsqrt().float()

    def normalizer(self, numpy=False):
        """The map x -> clip((x - mean) / std, -10, 10) of tensors or numpy arrays, frozen as it is now."""
        mean, inv_std = self.mean.float(), self.inv_std()
        if numpy:
            mean, inv_std = mean.cpu().numpy(), inv_std.cpu().numpy()
        return lambda x: ((x - mean) * inv_std).clip(-10, 10)


class Team:
    """A world, and what has to be remembered of it between two rollouts."""

    def __init__(self, world):
        self.world, self.episodes = world, 0  # finished ones, like all that follows
        self.returns, self.lengths, self.returns_by_agent = (deque(maxlen=100) for _ in range(3))

    def reset(self, seed):
        """Start a new episode in every environment; those in flight are dropped. seed: a tuple of integers."""
        seeds = np.random.SeedSequence(seed).generate_state(self.world.num_envs) >> 1
        self.view = self.world.reset([int(s) for s in seeds])
        self.episode_return = torch.zeros_like(self.view["alive"], dtype=torch.float64)  # (N, G)
        self.episode_length = torch.zeros_like(self.episode_return[:, 0])

    def collect(self, agent, num_steps, rng):
        """Run the policies for T steps in each environment. Only the actors are evaluated here; values and
        log-probabilities follow in one batch (prepare_batch), since no parameter moves during a rollout.

        Returns tensors obs (T+1, N, G, D) and, for a centralised critic, state (T+1, N, S), both raw; legal
        (T, N, G, A), action (T, N, G) or (T, N, G, A), alive, reward, terminated, done (T, N, G); final_index (F, 2),
        final_obs, final_state (F, ...): the (t, n) after which an episode was over, and what was seen there at the end.
        """
        act, noise = agent.frozen_policy(), agent.noise(num_steps, self.world.num_envs, rng=rng)
        steps, finals = [], []
        keys = ["obs", "state"] if agent.centralised else ["obs"]
        for t in range(num_steps):
            view, action = self.view, act(self.view, noise[t])
            self.view, reward, terminated, over, final = self.world.step(action)
            done = torch.maximum(terminated.float(), over[:, None].float())
            steps.append({"action": action, "reward": reward, "terminated": terminated.float(), "done": done})
            steps[-1] |= {key: view[key] for key in ("legal", *keys)} | {"alive": view["alive"].float()}
            self.episode_return += reward
            self.episode_length += 1
            ended = over.nonzero()[:, 0]
            if len(ended):
                if final:
                    index = torch.stack([torch.full_like(ended, t), ended], -1)
                    finals.append({"final_index": index} | {f"final_{key}": final[key] for key in keys})
                self.finish_episodes(ended)
        rollout = {key: torch.stack([s[key] for s in steps]) for key in steps[0]}
        rollout |= {key: torch.cat([rollout[key], self.view[key][None]]) for key in keys}
        rollout |= {key: torch.cat([f[key] for f in finals]) for key in (finals[0] if finals else ())}
        return {"final_index": ()} | rollout

    def finish_episodes(self, ended):
        """Record the returns and lengths of the episodes that have just ended, and start counting anew."""
        self.episodes += len(ended)
        self.returns.extend(self.episode_return[ended].sum(-1).tolist())
        self.returns_by_agent.extend(self.episode_return[ended].tolist())
        self.lengths.extend(self.episode_length[ended].tolist())
        self.episode_return[ended] = 0
        self.episode_length[ended] = 0

    def statistics(self):
        """episodes so far; mean raw return, summed over agents, and length of the last 100 (nan before the first)"""
        mean_return, mean_length = (float(np.mean(x)) if x else math.nan for x in (self.returns, self.lengths))
        return {"episodes": self.episodes, "episodic_return": mean_return, "episodic_length": mean_length}

    def statistics_by_agent(self):
        """Mean raw return of each agent over the last 100 episodes, where there is more than one."""
        G = self.world.num_agents
        means = np.mean(self.returns_by_agent, 0) if self.returns_by_agent else np.full(G, math.nan)
        return {f"returns/agent_{g}": float(x) for g, x in enumerate(means)} if G > 1 else {}

    def state_dict(self):
        return {key: list(getattr(self, key)) for key in self.KEPT} | {"episodes": self.episodes}

    def load_state_dict(self, state):
        self.episodes = state["episodes"]
        for key in self.KEPT:
            getattr(self, key).extend(state[key])

    KEPT = ("returns", "lengths", "returns_by_agent")


def parallel_env(env_id):
    """The function that makes a PettingZoo parallel environment, of an id such as mpe2.simple_tag_v3: a module with a
    `parallel_env`. Raises UserError."""
    package, _, name = env_id.rpartition(".")
    pins = {
        "mpe2": "mpe2==1.1.1",
        "gymnasium_robotics": "gymnasium-robotics==1.4.2",
        "pettingzoo": "pettingzoo==1.27.0",
    }
    try:
        try:
            module = importlib.import_module(env_id)
        except ModuleNotFoundError:
            module = getattr(importlib.import_module(package), name)
        return module.parallel_env
    except (ImportError, AttributeError, ValueError) as error:
        root = env_id.partition(".")[0]
        if root in pins and not find_spec(root):
            raise UserError(f"{env_id} needs the package: pip install {pins[root]}") from None
        known = ", ".join([*WORLDS, *GAMES])
        message = f"there is no environment {env_id}: built in are {known}; else name a module with a parallel_env"
        raise UserError(f"{message} ({first_line(error)})") from None


class PettingZooEnv(gym.Env):
    """A PettingZoo parallel environment as one gymnasium environment, whose observation is all that a world's view
    needs. Narrower agents are padded with zeros; an agent that has left is not alive. Box actions are mapped so that
    [-1, 1] is an agent's whole range. Raises UserError."""

    def __init__(self, env_id, env_kwargs, **kwargs):
        quiet_mujoco()
        try:
            self.env = parallel_env(env_id)(**json.loads(env_kwargs), **kwargs)
        except (TypeError, AssertionError, AttributeError, ValueError) as error:
            raise UserError(f"cannot make {env_id} with {env_kwargs}: {first_line(error)}") from error
        self.names, self.render_mode = list(self.env.possible_agents), kwargs.get("render_mode")
        self.metadata, self.spec = {"render_modes": ["rgb_array"]}, gym.envs.registration.EnvSpec(env_id)
        self.spaces = [self.env.action_space(name) for name in self.names]
        self.obs_spaces = [self.env.observation_space(name) for name in self.names]
        self.discrete = all(isinstance(space, gym.spaces.Discrete) for space in self.spaces)
        if not self.discrete and not all(isinstance(s, gym.spaces.Box) and s.is_bounded() for s in self.spaces):
            raise UserError(f"{env_id} has the action spaces {self.spaces}; this script does Discrete or bounded Box")
        widths = np.array([gym.spaces.flatdim(space) for space in self.spaces])
        G, A = len(self.names), int(widths.max())
        self.own_actions = np.arange(A) < widths[:, None]  # (G, A)
        self.D = max(gym.spaces.flatdim(self.seen(space)) for space in self.obs_spaces)
        self.has_state = False
        joint = self.reset(seed=0)[0]["state"]
        with contextlib.suppress(NotImplementedError, AttributeError):  # most states are the observations side by side
            unpadded = sum(gym.spaces.flatdim(self.seen(space)) for space in self.obs_spaces)
            self.has_state = self.env.state().size != unpadded
            joint = self.env.state() if self.has_state else joint
        box, bits = (lambda *n: gym.spaces.Box(-np.inf, np.inf, n, np.float32)), gym.spaces.MultiBinary
        spaces = {"obs": box(G, self.D), "state": box(joint.size), "legal": bits([G, A]), "alive": bits(G)}
        self.observation_space = gym.spaces.Dict(spaces | {"reward": box(G), "terminated": bits(G)})
        self.action_space = gym.spaces.MultiDiscrete([A] * G) if self.discrete else box(G, A)

    @staticmethod
    def seen(space_or_obs):
        """The observation itself where a dictionary brings an action mask along."""
        try:
            return space_or_obs["observation"]
        except (TypeError, KeyError, IndexError):
            return space_or_obs

    def pack(self, obs, infos, rewards=None, terminations=None):
        G, rewards, terminations = len(self.names), rewards or {}, terminations or {}
        packed = {"obs": np.zeros((G, self.D), np.float32), "legal": self.own_actions.copy()}
        for g, name in enumerate(self.names):
            if name in obs:
                flat = gym.spaces.flatten(self.seen(self.obs_spaces[g]), self.seen(obs[name]))
                packed["obs"][g, : flat.size] = flat
                own = obs[name] if isinstance(obs[name], dict) else infos.get(name, {})
                if self.discrete and "action_mask" in own:
                    packed["legal"][g, : len(own["action_mask"])] = own["action_mask"]
        packed["state"] = packed["obs"].flatten() if not self.has_state else self.env.state().astype(np.float32).ravel()
        packed["alive"] = np.array([name in self.env.agents for name in self.names])
        packed["reward"] = np.array([rewards.get(name, 0) for name in self.names], np.float32)
        packed["terminated"] = np.array([bool(terminations.get(name, False)) for name in self.names])
        return packed

    def reset(self, seed=None, options=None):
        return self.pack(*self.env.reset(seed=seed)), {}

    def step(self, action):
        actions = {}
        for name, space, a in zip(self.names, self.spaces, action):
            if name in self.env.agents:
                if self.discrete:
                    actions[name] = int(a) + int(space.start)
                else:
                    unit = (a[: np.prod(space.shape)].reshape(space.shape).clip(-1, 1) + 1) / 2
                    actions[name] = (space.low + unit * (space.high - space.low)).astype(space.dtype)
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        packed, over = self.pack(obs, infos, rewards, terminations), not self.env.agents
        return packed, 0.0, over and not any(truncations.values()), over and any(truncations.values()), {}

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


class PettingZoo:
    """N copies of a PettingZoo environment as a world, through gymnasium's vector environments."""

    def __init__(self, args, num_envs, device):
        def thunk():
            if multiprocessing.parent_process():  # a worker: Ctrl-C and SIGTERM are its parent's business
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return PettingZooEnv(args.env_id, args.env_kwargs)

        with contextlib.closing(PettingZooEnv(args.env_id, args.env_kwargs)) as env:  # mistakes fail in this process
            self.discrete, space = env.discrete, env.observation_space
        vector = SyncVectorEnv if args.vectorization == "sync" else AsyncVectorEnv
        self.envs, self.num_envs = vector([thunk] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP), num_envs
        self.device = device
        (self.num_agents, A), self.obs_dim = space["legal"].shape, space["obs"].shape[1]
        self.state_dim = space["state"].shape[0]
        self.action_space = gym.spaces.Discrete(A) if self.discrete else gym.spaces.Box(-1, 1, (A,))

    def tensors(self, obs):
        view = {key: torch.as_tensor(x).to(self.device) for key, x in obs.items()}
        return view | {key: view[key].bool() for key in ("legal", "alive", "terminated")}

    def reset(self, seed):
        return self.tensors(self.envs.reset(seed=seed)[0])

    def step(self, action):
        obs, _, terminated, truncated, info = self.envs.step(action.cpu().numpy())
        view, over, final = self.tensors(obs), torch.from_numpy(terminated | truncated).to(self.device), None
        reward, gone = view.pop("reward"), view.pop("terminated")
        if over.any():
            last = [x for x in info["final_obs"] if x is not None]
            final = self.tensors({key: np.stack([x[key] for x in last]) for key in last[0]})
            reward[over], gone[over] = final["reward"], final["terminated"]
        return view, reward, gone, over, final

    def close(self):
        self.envs.close()


def quiet_mujoco():
    """Silence two warnings that tell a user of the v4 environments nothing (v4 on purpose: the published numbers are
    v4's; v5 ids work too), one of which would also leave a MUJOCO_LOG.TXT in the working folder."""
    warnings.filterwarnings("ignore", message=".*The environment .* is out of date")
    if find_spec("mujoco"):
        import mujoco

        mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))


def make_game(env_id, num_envs, device):
    return GAMES[env_id](num_envs, device)


def make_world(args, num_envs, device):
    """What the agents live in; see "Worlds". Raises UserError."""
    if args.algorithm == "selfplay":
        return SelfPlay(make_game(args.env_id, num_envs, device), args.latest_prob)
    return WORLDS[args.env_id](num_envs, device) if args.env_id in WORLDS else PettingZoo(args, num_envs, device)


# ---- checkpoint, run folder, signals ---------------------------------------------------------------------------------


def save_checkpoint(state, path):
    """Write torch.save(state) and its SHA-256 to a temporary file, flush, rename: `path` is whole at any moment.
    Raises RunFailed, for a full disk say."""
    payload = io.BytesIO()
    torch.save(state, payload)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload.getvalue() + hashlib.sha256(payload.getvalue()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFailed(f"cannot write {path}: {error.strerror}; the checkpoint before it is as it was") from error


def load_checkpoint(path, env_id=None):
    """The state that save_checkpoint wrote, from a file or a run folder. It runs no code. Raises UserError."""
    path = checkpoint_path(path)
    blob = path.read_bytes()
    payload, digest = blob[:-32], blob[-32:]
    if hashlib.sha256(payload).digest() != digest:
        raise UserError(f"{path} is damaged, or no checkpoint of {SCRIPT}.py: its checksum does not match its content")
    state = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    if state["script"] != SCRIPT:
        raise UserError(f"{path} is a checkpoint of {state['script']}.py, not of {SCRIPT}.py")
    if env_id is not None and state["args"]["env_id"] != env_id:
        raise UserError(f"{path} is a checkpoint of {state['args']['env_id']}, not of {env_id}")
    return state


def checkpoint_path(path):
    """The checkpoint file that PATH, itself or its folder, names. Raises UserError."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    return path


def choose_run_dir(args):
    """This run's folder: new, or that of --resume. Raises UserError if it holds another run."""
    if args.resume:
        resumed = checkpoint_path(args.resume).parent
        if args.run_dir is None or Path(args.run_dir).resolve() == resumed.resolve():
            return resumed
    name = f"{args.env_id.replace('/', '_')}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or Path("runs") / name)
    if (run_dir / "checkpoint.pt").exists():
        raise UserError(f"{run_dir} holds another run: go on with --resume {run_dir}, or choose another --run-dir")
    return run_dir


class RunLog:
    """The run folder but for the checkpoint: args.json, the script, progress.csv, TensorBoard events; and the bar."""

    CHARTS = {"sps": "SPS"} | {key: key for key in ("episodes", "episodic_return", "episodic_length", "learning_rate")}

    def __init__(self, args, run_dir, global_step, save):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "checkpoint.pt").exists():
            save()  # the very first: from here on a crash at any moment leaves a run that can be resumed
        (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        shutil.copy(__file__, run_dir)
        self.path = run_dir / "progress.csv"
        kept = self.path.read_text().splitlines(True) if global_step and self.path.exists() else []
        kept = kept[:1] + [line for line in kept[1:] if line.endswith("\n") and int(line.split(",")[0]) <= global_step]
        Path(f"{self.path}.tmp").write_text("".join(kept))
        os.replace(f"{self.path}.tmp", self.path)  # rows past the checkpoint tell of steps that were lost
        self.file = open(self.path, "a", buffering=1)
        self.header = not kept
        self.board = SummaryWriter(run_dir, purge_step=global_step + 1 if global_step else None)
        self.bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", disable=not sys.stderr.isatty())
        self.next_line = time.time() + 10

    def row(self, **row):
        """Log one iteration. A key "group/name" is TensorBoard's tag; progress.csv has the column "name"."""
        writer = csv.DictWriter(self.file, [key.split("/")[-1] for key in row])
        if self.header:
            writer.writeheader()
            self.header = False
        writer.writerow({k.split("/")[-1]: f"{x:.7g}" if isinstance(x, float) else x for k, x in row.items()})
        for key, x in row.items():
            if key not in ("global_step", "wall_time"):
                tag = f"charts/{self.CHARTS[key]}" if key in self.CHARTS else f"losses/{key}"
                self.board.add_scalar(key if "/" in key else tag, x, row["global_step"])
        text = f"return {row['episodic_return']:.1f}, {row['sps']:.0f} steps/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["global_step"] - self.bar.n)
        if self.bar.disable and time.time() > self.next_line:
            print(f"step {row['global_step']} of {self.bar.total}: {text}", file=sys.stderr)
            self.next_line = time.time() + 10

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()
        self.board.close()


@contextlib.contextmanager
def stop_signals():
    """Yield a list that receives the number of a SIGINT or SIGTERM, for the loop to look at; a second one kills."""
    received, before = [], {}

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def compiled(update, device):
    """torch.compile(update) as one graph, gradient included; in this process, without a pool of compiler processes."""
    import torch._inductor.config  # imported here: not needed, and slow, without --compile

    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad be part of the graph
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.cpp_wrapper = device.type == "cpu"  # C++ calls the kernels: 175, not 215 us a minibatch
    torch._inductor.config.size_asserts = False
    torch._inductor.config.cpp.use_decompose_tanh = True  # another tenth; the error is 2e-7
    return torch.compile(update, fullgraph=True, dynamic=False)


def unguarded(is_compiled):
    """A context in which compiled code does not check before each call that nothing it was compiled for has changed:
    within a run nothing does, and the checks take 7 of a minibatch's 157 us."""
    return torch.compiler.set_stance(skip_guard_eval_unsafe=True) if is_compiled else contextlib.nullcontext()


class CudaGraph:
    """A function without arguments or random numbers, whose tensors never move, as one launch instead of thousands.

    Its first two calls run as they are, on a side stream: real work, and the warm-up that recording asks for. The third
    records the kernels (https://pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs"); from then on they are played
    back, and nothing of the Python runs any more: what changes from call to call must be in tensors."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

    def __call__(self):
        self.calls += 1
        if self.calls <= 2:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self.calls == 3:
            with torch.cuda.graph(self.graph):  # records, does not run
                self.function()
        self.graph.replay()


def announce_cuda(parameters, minibatch):
    """Say in one line what --cuda does with this much work, and when it is not worth it."""
    text = f"{SCRIPT}.py: --cuda: {parameters} parameters, minibatches of {minibatch}: updates run as CUDA graphs"
    if minibatch < 1024:
        text += "; with minibatches this small a CPU core may be as fast, compare steps/s with --no-cuda"
    print(text, file=sys.stderr)


def graphed(function, device):
    """The function, as a CUDA graph where there is a GPU."""
    return CudaGraph(function) if device.type == "cuda" else function


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(args) -> dict:
    """Run the checkpoint's policies, normalisers frozen, on the CPU: for some episodes with their likeliest actions, or
    against --opponent. Returns mean, std and the list of raw returns, summed over agents (games: 1 won, 1/2 drawn), and
    the means by agent, or the Elo table. Raises UserError.
    """
    path = checkpoint_path(args.evaluate)
    torch.set_num_threads(1)
    if args.capture_video and args.env_id in WORLDS | GAMES:
        raise UserError(f"{args.env_id} is built in and draws nothing; --env-id mpe2.simple_spread_v3 does")
    agent, checkpoint = load_agent(path, args.env_id)
    if args.algorithm == "selfplay":
        if args.opponent == "pool":
            return rate_pool(args, agent, checkpoint, path.parent)
        returns, more = play_opponent(args, agent), {}
    else:
        by_agent = run_episodes(args, agent, path.parent / "videos", f"step-{checkpoint['global_step']}")  # (K, G)
        returns, more = by_agent.sum(-1), {"mean_by_agent": by_agent.mean(0).tolist()}
    return {"mean": returns.mean().item(), "std": returns.std(correction=0).item(), "returns": returns.tolist()} | more


def load_agent(path, env_id):
    """The agent of a checkpoint, and the checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path, env_id)
    args = Args(**checkpoint["args"])
    world, cpu = make_world(args, 1, torch.device("cpu")), torch.Generator()
    world.close()
    agent = Agent(world, args.algorithm == "mappo", args.share_params, args.hidden_size, cpu)
    agent.load_state_dict(checkpoint["agent"])
    return agent, checkpoint


def run_episodes(args, agent, folder, name):
    """Returns (K, G) of K episodes: all at once in a built-in world, else one by one."""
    act = agent.frozen_policy()
    if args.env_id in WORLDS:
        world = make_world(args, args.eval_episodes, torch.device("cpu"))
        view, returns, running = world.reset([args.seed]), torch.zeros(args.eval_episodes, world.num_agents), True
        while running:
            view, reward, _, over, _ = world.step(act(view))
            returns, running = returns + reward, not over.any()  # they all end together
        return returns
    env = PettingZooEnv(args.env_id, args.env_kwargs, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    env, returns = recorded(env, folder, name) if args.capture_video else env, []
    with contextlib.closing(env):
        for episode in range(args.eval_episodes):
            obs, done, total = env.reset(seed=args.seed if episode == 0 else None)[0], False, 0.0
            while not done:
                view = {key: torch.from_numpy(obs[key])[None] for key in ("obs", "legal")}
                obs, _, terminated, truncated, _ = env.step(act(view)[0].numpy())
                done, total = terminated or truncated, total + obs["reward"].astype(float)
            returns.append(total)
    return torch.tensor(np.array(returns))


def play_opponent(args, agent):
    """Scores (K,) of K games, in the first seat in every other one. The policy plays its likeliest move, but samples
    where the opponent does not vary (another checkpoint, which samples too). Raises UserError."""
    game = make_game(args.env_id, args.eval_episodes, torch.device("cpu"))
    rng = torch.Generator().manual_seed(args.seed)
    if args.opponent == "random":
        return match(game, policy_player(agent), random_player(rng))
    if re.fullmatch(r"mcts-[1-9]\d*", args.opponent):
        return match(game, policy_player(agent), mcts_player(args.env_id, int(args.opponent[5:]), args.seed))
    other, _ = load_agent(checkpoint_path(args.opponent), args.env_id)
    return match(game, policy_player(agent, rng), policy_player(other, rng))


def rate_pool(args, agent, checkpoint, folder):
    """All snapshots and the policy itself against each other, --eval-episodes games a pair: mean scores of the policy
    against each snapshot, and everyone's Elo rating; elo.png in the run folder."""
    import matplotlib.figure  # slow, and of no use to training

    rng = torch.Generator().manual_seed(args.seed)
    game = make_game(args.env_id, args.eval_episodes, torch.device("cpu"))
    steps, players = [x["global_step"] for x in checkpoint["pool"][1]], []
    for snapshot in [x["policy"] for x in checkpoint["pool"][1]] + [agent.state_dict()]:
        players.append(copy.deepcopy(agent))
        players[-1].load_state_dict(snapshot, strict=False)
    score = torch.full((len(players), len(players)), 0.5)
    for i in range(len(players)):
        for j in range(i):
            score[i, j] = match(game, *(policy_player(players[k], rng) for k in (i, j))).mean()
            score[j, i] = 1 - score[i, j]
    steps, ratings = [*steps, checkpoint["global_step"]], elo(score, args.eval_episodes).tolist()
    figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, ratings, marker="o")
    axes.set(xlabel="learner moves", ylabel="Elo (first snapshot: 0)", title=f"{args.env_id}, {SCRIPT}")
    figure.savefig(folder / "elo.png", dpi=120)
    last = score[-1, :-1]
    result = {"mean": last.mean().item(), "std": last.std(correction=0).item(), "returns": last.tolist()}
    return result | {"global_step": steps, "elo": [round(x, 1) for x in ratings]}


def recorded(env, folder, name):
    """The environment, with a video of every episode written into the folder. Raises UserError if it cannot render."""
    if not find_spec("moviepy"):
        raise UserError("--capture-video needs the package: pip install moviepy==2.2.1")
    try:
        with warnings.catch_warnings(action="ignore"):
            env.reset()
            env.render()
    except Exception as error:
        hint = "for MuJoCo without a display, set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
        raise UserError(f"cannot render {env.spec.id}: {first_line(error)} ({hint})") from error
    return gym.wrappers.RecordVideo(env, str(folder), lambda episode: True, name_prefix=name, disable_logger=True)


# ---- arguments and entry ---------------------------------------------------------------------------------------------

THIS_PROCESS_ONLY = ("resume", "run_dir", "stop_at_step", "evaluate", "eval_episodes", "opponent", "capture_video")


def parse_args(argv=None) -> Args:
    """The command line's Args. Flags that are not given: PRESETS, or with --resume or --evaluate the checkpoint's."""
    args = tyro.cli(Args, args=argv)
    source = args.resume or args.evaluate
    preset = PRESETS[args.algorithm] | {"compile": args.total_timesteps >= 200_000, "algorithm": args.algorithm}
    stored = load_checkpoint(source)["args"] if source else preset
    kept = {f.name for f in dataclasses.fields(Args)} - set(THIS_PROCESS_ONLY)
    default = Args(**{key: value for key, value in stored.items() if key in kept})
    return tyro.cli(Args, args=argv, default=default)


def check_args(args):
    """Raise UserError for what cannot work, before anything is written."""
    batch = args.num_envs * args.num_steps
    positive = ["num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_every", "learning_rate"]
    positive += ["clip_coef", "max_grad_norm", "hidden_size", "snapshot_every", "pool_size", "eval_episodes"]
    rules = [(getattr(args, key) > 0, f"{key} must be positive") for key in positive]
    rules += [(0 <= getattr(args, k) <= 1, f"{k} must lie in [0, 1]") for k in ("gamma", "gae_lambda", "latest_prob")]
    too_short = f"total_timesteps = {args.total_timesteps} is shorter than one iteration of {batch} steps"
    indivisible = f"num_envs * num_steps = {batch} does not divide into {args.num_minibatches} minibatches"
    game, games = args.algorithm == "selfplay", ", ".join(GAMES)
    no_game = f"--algorithm selfplay plays {games}; {args.env_id} is for mappo and ippo"
    plies = GAMES[args.env_id].max_plies if args.env_id in GAMES else 0
    too_few = f"num_steps must be at least {-(-plies // 2)}, or a game could outlive its opponent's copy"
    rules += [
        (args.num_minibatches < 1 or batch % args.num_minibatches == 0, indivisible),
        (not args.norm_adv or batch > args.num_minibatches, "norm_adv needs minibatches of at least 2 samples"),
        (args.total_timesteps >= batch, too_short),
        (not game or args.env_id in GAMES, no_game),
        (game or args.env_id not in GAMES, f"{args.env_id} is a game for --algorithm selfplay"),
        (not game or 2 * args.num_steps >= plies, too_few),
        (not args.capture_video, "capture_video goes with --evaluate"),
        (not args.cuda or torch.cuda.is_available(), "cuda: torch finds no CUDA device here"),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def main(argv=None) -> int:
    try:
        args = parse_args(argv)
        if args.evaluate:
            print(json.dumps(evaluate(args)))
            return 0
        summary = train(args)
    except UserError as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        return 2
    except (RunFailed, OSError) as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps({key: x for key, x in summary.items() if key != "returns"}))
    return 128 + summary["signal"] if summary["signal"] else 0


if __name__ == "__main__":
    sys.exit(main())
