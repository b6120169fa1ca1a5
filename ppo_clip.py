# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
# ]
# ///
"""Proximal Policy Optimization with the clipped surrogate objective (Schulman et al. 2017, arXiv 1707.06347).

With the probability ratio r_t = pi(a_t|s_t) / pi_old(a_t|s_t) and an advantage estimate A_t, maximise by minibatch Adam

    L(theta) = mean[ min(r_t A_t, clip(r_t, 1-eps, 1+eps) A_t) ]      PPO eq. (7), notes §2.1
             - vf_coef * mean[ (V(s_t) - R_t)^2 ]                     PPO eq. (9), notes §2.3; R_t = A_t + V_old(s_t)
             + ent_coef * mean[ H(pi(.|s_t)) ]

    A_t = delta_t + gamma lambda (1-done_t) A_{t+1}                   GAE (1506.02438) eq. (16)
    delta_t = r_t + gamma (1-terminated_t) V(s_{t+1}) - V(s_t)

The min is a lower bound: it removes the *incentive* to move a ratio past 1 +- eps. It does not bound the ratio, which
can and does leave the interval (Engstrom et al. 2020); watch `kl` and `clipfrac` for how far the policy really moved.

Where this file departs from the paper, and why:
- Observations and rewards are scaled by running statistics, layers are initialised orthogonally, advantages are
  normalised per minibatch, the global gradient norm is clipped, the learning rate falls linearly to 0. The paper does
  not mention these; its results and everyone's since depend on them (Engstrom et al. 2020, Andrychowicz et al. 2021).
- A time limit is not the end of the world: a truncated episode bootstraps from the value of its true last state.
- N = 8 environments x T = 256 steps instead of 1 x 2048: the same batch in fewer, larger calls.

Commands:
    python ppo_clip.py --env-id Hopper-v4                                 # 1M steps, 2-3 minutes on one CPU core
    python ppo_clip.py --resume runs/Hopper-v4__ppo_clip__1__20260101-120000
    python ppo_clip.py --evaluate runs/Hopper-v4__ppo_clip__1__20260101-120000 --eval-episodes 20
    python ppo_clip.py --env-id CartPole-v1 --total-timesteps 200000      # Discrete actions need no other file

Expect, at 1M steps with default flags (README: seeds and spreads): Hopper-v4 1900-3200, Walker2d-v4 1700-4400,
HalfCheetah-v4 900-4200; CartPole-v1 500 at 200k.

Shapes: T steps, N envs, B = T*N, M minibatch, D observation, A action, P numbers that describe pi(.|s).
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
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

SCRIPT = "ppo_clip"  # written into checkpoints and folder names; a checkpoint of another script is refused


@dataclass
class Args:
    """PPO with the clipped surrogate objective. Defaults: PPO paper, Table 3, and the released code's details."""

    # the run
    env_id: str = "Hopper-v4"
    """gymnasium environment id (Box or Discrete actions)"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run; every schedule is a function of global_step / total_timesteps"""
    seed: int = 1
    """all randomness of the run follows from it"""
    cuda: bool = False
    """train on the GPU (with 64-64 networks and few environments a CPU core is faster)"""
    compile: bool = True
    """torch.compile the minibatch update: some 15 s of start-up (5 s once cached), then four times faster updates;
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
    """no training: run the policy of this checkpoint or run folder with its mean action and print one JSON line"""
    eval_episodes: int = 10
    """episodes of --evaluate"""
    capture_video: bool = False
    """with --evaluate: write a video of every episode beside the checkpoint"""

    # the actors
    num_envs: int = 8
    """N, parallel environments (the paper's MuJoCo runs used 1; N * T is what matters)"""
    num_steps: int = 256
    """T, steps in each environment per iteration; N * T = 2048 as in Table 3"""
    vectorization: Literal["sync", "async", "envpool"] = "sync"
    """how the environments are stepped: in this process, one process each, or EnvPool's threads (optional package)"""

    # the algorithm
    learning_rate: float = 3e-4
    """Adam step size (Table 3); its first value where a schedule changes it"""
    lr_schedule: Literal["linear", "constant", "kl-adaptive"] = "linear"
    """linear: to 0 over the run (released code). kl-adaptive: notes §2.2, see --kl-lr-target"""
    kl_lr_target: float = 0.01
    """kl-adaptive: the KL(old||new) per iteration to steer for"""
    kl_lr_band: float = 1.5
    """kl-adaptive: leave the rate alone while KL is within [target / band, target * band]; 1 is the notes' rule"""
    kl_lr_factor: float = 2.0
    """kl-adaptive: divide or multiply the rate by this (notes §2.2)"""
    gamma: float = 0.99
    """discount (Table 3)"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate (Table 3)"""
    num_minibatches: int = 32
    """minibatches per epoch; 2048 / 32 = 64 samples each (Table 3)"""
    update_epochs: int = 10
    """K, passes over each batch (Table 3)"""
    norm_adv: bool = True
    """normalise advantages to mean 0 and standard deviation 1 in each minibatch"""
    clip: bool = True
    """--no-clip gives the unclipped surrogate, Table 1's "no clipping or penalty" """
    clip_coef: float = 0.2
    """eps of the clipped surrogate (best of Table 1)"""
    anneal_clip: bool = False
    """let eps fall linearly to 0 over the run, as the code released with the paper did until 2019"""
    clip_vloss: bool = False
    """clip the change of the value too, by eps (released code; hurts, see Andrychowicz et al. 2021)"""
    ent_coef: float = 0.0
    """c2, weight of the entropy bonus (0 for MuJoCo in the paper)"""
    vf_coef: float = 0.5
    """c1, weight of the squared value error (not halved, as in the paper's eq. 9); policy and value share no
    parameters, only the norm that --max-grad-norm clips"""
    max_grad_norm: float = 0.5
    """clip the gradient's global norm to this"""
    target_kl: float | None = None
    """stop an iteration's epochs early once the exact KL(old||new) of the batch exceeds this"""


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


def mlp(inputs, outputs, output_gain, rng):
    """64-64 tanh network (Table 3's text), orthogonal initialisation with zero biases."""
    sizes, gains = [inputs, 64, 64, outputs], [math.sqrt(2), math.sqrt(2), output_gain]
    layers = []
    for n_in, n_out, gain in zip(sizes, sizes[1:], gains):
        layer = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(layer.weight, gain, generator=rng)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy pi(a|s), value V(s), and the normalisers they see the world through: saved and loaded as one."""

    def __init__(self, obs_dim, action_space, rng):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.dist = Categorical if self.discrete else DiagGaussian
        self.action_dim = int(action_space.n if self.discrete else np.prod(action_space.shape))
        self.policy_dim = self.action_dim if self.discrete else 2 * self.action_dim
        self.actor = mlp(obs_dim, self.action_dim, 0.01, rng)  # a small last layer: all actions about equally likely
        self.critic = mlp(obs_dim, 1, 1.0, rng)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.action_dim))  # the same in all states
        self.obs_rms = RunningMeanStd((obs_dim,))
        self.return_rms = RunningMeanStd(())

    @torch.no_grad()
    def frozen_actor(self):
        """The actor as it is now, as a numpy function of raw observations (N, D) -> (N, A): mean action or logits.
        A rollout needs no gradient, and for a handful of rows numpy answers in a third of PyTorch's time."""
        normalize = self.obs_rms.normalizer(numpy=True)
        (w1, b1, w2, b2, w3, b3) = (p.cpu().numpy().T.copy() for p in self.actor.parameters())
        return lambda obs: np.tanh(np.tanh(normalize(obs) @ w1 + b1) @ w2 + b2) @ w3 + b3

    @torch.no_grad()
    def noise(self, T, N, rng):
        """What turns the actor's output into a sample when added to it (T, N, A): std * N(0, 1), or Gumbel noise, with
        which the argmax of the logits is a sample of their softmax."""
        shape = (T, N, self.action_dim)
        if self.discrete:
            return -torch.empty(shape).exponential_(generator=rng).log().numpy()
        return (self.log_std.exp().cpu() * torch.randn(shape, generator=rng)).numpy()

    def policy(self, obs):  # (..., D) normalised -> (..., P)
        out = self.actor(obs)
        return out.log_softmax(-1) if self.discrete else torch.cat([out, self.log_std.expand_as(out)], -1)

    def value(self, obs):  # (..., D) normalised -> (...)
        return self.critic(obs).squeeze(-1)

    def update_normalisers(self, rollout):
        """Fold a rollout's observations and discounted returns into the running statistics."""
        valid = rollout["valid"] > 0  # (T, N)
        self.obs_rms.update(rollout["obs"][:-1][valid])
        self.return_rms.update(rollout["discounted_return"][valid])


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


def ppo_loss(agent, batch, coef, norm_adv, clip_vloss):
    """The loss to minimise on one minibatch, -L(theta) of the module's docstring, and what to log of it.

    batch: obs (M, D) · action (M, A) or (M,) · logprob, advantage, return, value (M,) at the old parameters ·
    weight (M,), 0 for rows that are no transitions (EnvPool's resets). coef: scalars. Returns loss (), metrics (5,).
    """
    weight = batch["weight"] / batch["weight"].sum().clamp(min=1)

    def mean(x):
        return (weight * x).sum()

    advantage = batch["advantage"]
    if norm_adv:
        centred = advantage - mean(advantage)
        advantage = centred / (mean(centred.square()).sqrt() + 1e-8)

    policy, value = agent.policy(batch["obs"]), agent.value(batch["obs"])  # (M, P), (M,)
    log_ratio = agent.dist.log_prob(policy, batch["action"]) - batch["logprob"]
    ratio = log_ratio.exp()
    policy_loss = -mean(clipped_surrogate(ratio, advantage, coef["clip_coef"]))

    value_error = (value - batch["return"]).square()
    if clip_vloss:
        change = (value - batch["value"]).clamp(-coef["clip_coef"], coef["clip_coef"])
        value_error = torch.maximum(value_error, (batch["value"] + change - batch["return"]).square())
    value_loss = mean(value_error)

    entropy = mean(agent.dist.entropy(policy))
    loss = policy_loss + coef["vf_coef"] * value_loss - coef["ent_coef"] * entropy
    with torch.no_grad():
        approx_kl = mean(ratio - 1 - log_ratio)  # an estimate of KL(old||new) that is never negative
        clipfrac = mean(((ratio - 1).abs() > coef["clip_coef"]).float())
        return loss, torch.stack([policy_loss, value_loss, entropy, approx_kl, clipfrac])


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
def mean_kl(agent, data):
    """Exact KL(old||new) averaged over the batch's states, as a scalar tensor."""
    kl = agent.dist.kl(data["policy"], agent.policy(data["obs"]))  # (B,)
    return (kl * data["weight"]).sum() / data["weight"].sum()


def adapted_learning_rate(learning_rate, kl, target, band, factor):
    """The learning rate after an iteration that moved the policy by `kl`: notes §2.2, kept within [1e-5, 1e-2].

    The notes have no dead zone (band = 1): the rate then changes at every iteration and never settles. Unlike a penalty
    on the KL, the rate changes the length of a step and never the gradient's direction.
    """
    if kl > target * band:
        learning_rate /= factor
    elif kl < target / band:
        learning_rate *= factor
    return min(max(learning_rate, 1e-5), 1e-2)


def explained_variance(value, target):
    """1 - Var[target - value] / Var[target]: 1 is a perfect critic, 0 one no better than a constant; nan if Var = 0."""
    variance = target.var(correction=0)
    return (1 - (target - value).var(correction=0) / variance).item() if variance > 0 else float("nan")


def empty_batch(agent, obs_dim, B):
    """What one iteration learns from, as zeros; see the loss."""
    action = torch.zeros(B, dtype=torch.long) if agent.discrete else torch.zeros(B, agent.action_dim)
    scalars = {key: torch.zeros(B) for key in ("logprob", "value", "advantage", "return", "weight")}
    return {"obs": torch.zeros(B, obs_dim), "action": action, "policy": torch.zeros(B, agent.policy_dim)} | scalars


@torch.no_grad()
def fill_batch(data, agent, rollout, gamma, gae_lambda):
    """Write a rollout, with its log-probabilities, values and advantages at the present parameters, into `data`."""
    rollout = {key: x.to(data["obs"].device) for key, x in rollout.items()}
    normalize = agent.obs_rms.normalizer()
    obs = normalize(rollout["obs"])  # (T+1, N, D)
    value, policy = agent.value(obs), agent.policy(obs[:-1])  # (T+1, N), (T, N, P)
    next_value = value[1:].clone()  # (T, N)
    if len(rollout["final_obs"]):  # the true successors of truncated steps; obs[t+1] is a new episode's first there
        next_value[tuple(rollout["final_index"].T)] = agent.value(normalize(rollout["final_obs"]))
    reward = (rollout["reward"] * agent.return_rms.inv_std()).clamp(-10, 10)
    advantage = gae(reward, value[:-1], next_value, rollout["terminated"], rollout["done"], gamma, gae_lambda)
    batch = {"obs": obs[:-1], "action": rollout["action"], "policy": policy, "weight": rollout["valid"]}
    batch |= {"advantage": advantage, "return": advantage + value[:-1], "value": value[:-1]}
    batch |= {"logprob": agent.dist.log_prob(policy, rollout["action"])}
    for key, x in batch.items():
        data[key].copy_(x.flatten(0, 1))


# ==== PPO Algorithm 1 =================================================================================================


def train(args: Args) -> dict:
    """Train by PPO Algorithm 1. Returns a summary: global_step, episodic_return (mean raw return of the last 100
    episodes), episodes, returns (of those that ended in this call, the last 100), checkpoint (its path), signal (the
    one that ended the run, or None).

    Raises UserError before anything is written, RunFailed if a loss, gradient, reward or observation is not finite.
    """
    start_time = time.time()
    check_args(args)
    checkpoint = load_checkpoint(args.resume, args.env_id) if args.resume else None
    run_dir = choose_run_dir(args)
    actors = Actors(make_envs(args), args.gamma)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(1)  # with networks this small a second thread costs more than it brings
    rng = torch.Generator().manual_seed(args.seed)
    agent = Agent(actors.obs_dim, actors.action_space, rng).to(device)

    # Everything that the update reads has a fixed place in memory and is only ever overwritten there. Hyperparameters
    # are tensors too: no schedule and no population's mutation makes the compiler start again.
    T, N = args.num_steps, args.num_envs
    B, M = T * N, T * N // args.num_minibatches
    flat = flatten_parameters(agent.parameters())
    adam = {"params": flat, "m": torch.zeros_like(flat), "v": torch.zeros_like(flat), "step": flat.new_zeros(())}
    data = {key: x.to(device) for key, x in empty_batch(agent, actors.obs_dim, B).items()}
    inputs = {key: x for key, x in data.items() if key != "policy"}  # of the update; the old policy is for the exact KL
    coef = {key: torch.zeros((), device=device) for key in COEFFICIENTS}
    metrics = torch.zeros(len(METRICS), device=device)
    step = minibatch_update

    order = torch.zeros(args.num_minibatches, M, dtype=torch.long, device=device)  # an epoch's minibatches

    def epoch_of_updates():
        for index in order.unbind():  # (M,)
            step(ppo_loss, agent, adam, inputs, index, coef, metrics, args.norm_adv, args.clip_vloss)

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

    global_step, learning_rate, wall_time = 0, args.learning_rate, 0.0
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        for key in ("m", "v", "step"):
            adam[key].copy_(checkpoint["adam"][key])
        if args.seed == checkpoint["args"]["seed"]:  # else another seed's stream of random numbers begins here
            rng.set_state(checkpoint["rng"])
        actors.load_state_dict(checkpoint["actors"])
        global_step, wall_time = checkpoint["global_step"], checkpoint["wall_time"]
        if args.learning_rate == checkpoint["args"]["learning_rate"]:  # else the flag beats the adapted rate
            learning_rate = checkpoint["learning_rate"]

    episodes_before = actors.episodes

    def save():
        state = {"script": SCRIPT, "args": dataclasses.asdict(args), "global_step": global_step, "wall_time": wall_time}
        state |= {"agent": agent.state_dict(), "adam": {key: adam[key] for key in ("m", "v", "step")}}
        state |= {"learning_rate": learning_rate, "rng": rng.get_state(), "actors": actors.state_dict()}
        save_checkpoint(state, run_dir / "checkpoint.pt")

    log = RunLog(args, run_dir, global_step, save)
    if args.cuda:
        announce_cuda(sum(p.numel() for p in agent.parameters()), M)
    last_step = min(args.total_timesteps, args.stop_at_step or args.total_timesteps)
    wall_start = start_time - wall_time
    wall_time = time.time() - wall_start
    cut = True  # a clean cut: the episodes in flight are truncated, all environments start afresh
    with contextlib.closing(actors.envs), log, unguarded(step is not minibatch_update), stop_signals() as signals:
        while global_step < last_step:
            remaining = 1 - global_step / args.total_timesteps  # from 1 to 0
            if args.lr_schedule != "kl-adaptive":
                learning_rate = args.learning_rate * (remaining if args.lr_schedule == "linear" else 1)
            clip_coef = (args.clip_coef if args.clip else math.inf) * (remaining if args.anneal_clip else 1)
            values = (learning_rate, clip_coef, args.ent_coef, args.vf_coef, args.max_grad_norm)
            for key, x in zip(COEFFICIENTS, values, strict=True):
                coef[key].fill_(x)

            # ---- collect: run pi_old for T steps in N environments (Alg. 1, lines 2-3) -------------------------------
            if cut:
                actors.reset(seed=(args.seed, global_step))
            rollout = actors.collect(agent, T, rng)
            steps = int(rollout["valid"].sum())
            if not all(rollout[key].isfinite().all() for key in ("obs", "reward")):
                raise RunFailed(f"an observation or reward is not finite, within {steps} steps of step {global_step}")

            # ---- advantages (line 4) ---------------------------------------------------------------------------------
            # NOTE: acting and updating must see the same normalisers, or the ratio would not start at 1: so a rollout
            # is folded into them only after it was learned from. The first is the exception: an untrained policy, its
            # last layer small, acts the same on raw and on scaled observations, while a critic that is first fitted to
            # raw returns (Hopper: a value loss of 14 instead of 0.1) is set back for tens of thousands of steps.
            first_rollout = global_step == 0
            if first_rollout:
                agent.update_normalisers(rollout)
            fill_batch(data, agent, rollout, args.gamma, args.gae_lambda)

            # ---- update: K epochs of minibatches on L(theta) (line 6) ------------------------------------------------
            metrics.zero_()
            for epoch in range(1, args.update_epochs + 1):  # noqa: B007 (logged below)
                order.copy_(torch.randperm(B, generator=rng).view(-1, M))
                run_epoch()
                if args.target_kl is not None and mean_kl(agent, data) > args.target_kl:
                    break
            kl = mean_kl(agent, data).item()
            if args.lr_schedule == "kl-adaptive":
                learning_rate = adapted_learning_rate(
                    learning_rate, kl, args.kl_lr_target, args.kl_lr_band, args.kl_lr_factor
                )
            if not first_rollout:
                agent.update_normalisers(rollout)
            global_step += steps

            # ---- log, checkpoint -------------------------------------------------------------------------------------
            means = dict(zip(METRICS, (metrics / (epoch * args.num_minibatches)).tolist(), strict=True))
            for key, x in (means | {"kl": kl}).items():
                if not math.isfinite(x):
                    raise RunFailed(f"{key} is {x} at step {global_step}")
            iteration_time, wall_time = time.time() - wall_start - wall_time, time.time() - wall_start
            valid = data["weight"] > 0
            log.row(
                global_step=global_step, wall_time=wall_time, sps=steps / iteration_time,
                **actors.statistics(), **means, kl=kl,
                explained_variance=explained_variance(data["value"][valid], data["return"][valid]),
                learning_rate=coef["learning_rate"].item(), clip_coef=clip_coef, epochs=epoch,
            )  # fmt: skip
            passed = global_step // args.checkpoint_every > (global_step - steps) // args.checkpoint_every
            cut = passed or global_step >= last_step or bool(signals)
            if cut:
                save()
            if signals:
                break
    return {
        "global_step": global_step,
        "episodic_return": actors.statistics()["episodic_return"],
        "episodes": actors.episodes,
        "returns": list(actors.returns)[max(0, len(actors.returns) - (actors.episodes - episodes_before)) :],
        "checkpoint": str(run_dir / "checkpoint.pt"),
        "signal": signals[0] if signals else None,
    }


# ==== Plumbing, the same in every script. A reader who wanted the algorithm can stop here. ============================


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


def env_action(output, space):
    """The action that an environment takes, of the actor's output (..., A) with or without noise. Only the environment
    sees a clipped action: the log-probability belongs to the one that was sampled."""
    if isinstance(space, gym.spaces.Discrete):
        return output.argmax(-1) + space.start
    return output.reshape(*output.shape[:-1], *space.shape).clip(space.low, space.high)


class Actors:
    """The N environments of PPO Algorithm 1, and what has to be remembered of them between two rollouts."""

    def __init__(self, envs, gamma):
        self.envs, self.gamma, self.num_envs = envs, gamma, envs.num_envs
        self.action_space = envs.single_action_space
        self.obs_dim = envs.single_observation_space.shape[0]
        self.next_step_autoreset = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        self.episodes, self.returns, self.lengths = 0, deque(maxlen=100), deque(maxlen=100)  # of finished episodes

    def reset(self, seed):
        """Start a new episode in every environment; those in flight are dropped. seed: a tuple of integers."""
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1  # EnvPool's seeds have 31 bits
        self.obs, _ = self.envs.reset(seed=[int(s) for s in seeds])
        self.done = np.zeros(self.num_envs, dtype=bool)
        self.discounted_return, self.episode_return = np.zeros(self.num_envs), np.zeros(self.num_envs)
        self.episode_length = np.zeros(self.num_envs)

    def collect(self, agent, num_steps, rng):
        """Run the policy for T steps in each environment. Only the actor is evaluated here; values and
        log-probabilities follow in one batch (fill_batch), since no parameter moves during a rollout.

        Returns tensors obs (T+1, N, D) raw, action (T, N, A) or (T, N), reward, terminated, done, valid,
        discounted_return (T, N), final_index (F, 2) and final_obs (F, D): the (t, n) at which an episode was truncated,
        and the observation that it was cut off at.

        valid is 0 where the environment ignored the action because it was starting a new episode (next-step autoreset:
        obs[t] is then the last observation of the episode before, which is also why no final_obs is needed).
        """
        T, N = num_steps, self.num_envs
        obs, output = np.empty((T + 1, N, self.obs_dim), np.float32), agent.noise(T, N, rng)
        reward, terminated, done, discounted_return, valid = np.ones((5, T, N), np.float32)
        final_index, final_obs = [], []
        actor = agent.frozen_actor()
        for t in range(T):
            obs[t] = self.obs
            output[t] += actor(obs[t])
            if self.next_step_autoreset:
                valid[t] = ~self.done
            action = env_action(output[t], self.action_space)
            self.obs, reward[t], terminated[t], truncated, info = self.envs.step(action)
            self.done = done[t] = np.logical_or(terminated[t], truncated)
            self.discounted_return = self.discounted_return * self.gamma + reward[t]
            discounted_return[t] = self.discounted_return
            self.episode_return += reward[t]
            self.episode_length += valid[t]
            if self.done.any():
                if not self.next_step_autoreset:
                    cut = np.flatnonzero(truncated > terminated[t])
                    final_index += [(t, n) for n in cut]
                    final_obs += [info["final_obs"][n] for n in cut]
                self.finish_episodes()
        obs[T] = self.obs
        rollout = {"obs": obs, "reward": reward, "terminated": terminated, "done": done, "valid": valid}
        rollout |= {"action": output.argmax(-1) if agent.discrete else output, "discounted_return": discounted_return}
        rollout |= {"final_index": np.array(final_index, int).reshape(-1, 2)}
        rollout |= {"final_obs": np.array(final_obs, np.float32).reshape(-1, self.obs_dim)}
        return {key: torch.from_numpy(x) for key, x in rollout.items()}

    def finish_episodes(self):
        """Record the returns and lengths of the episodes that have just ended, and start counting anew."""
        self.episodes += int(self.done.sum())
        self.returns.extend(self.episode_return[self.done].tolist())
        self.lengths.extend(self.episode_length[self.done].tolist())
        for x in (self.discounted_return, self.episode_return, self.episode_length):
            x[self.done] = 0

    def statistics(self):
        """episodes so far, and mean raw return and length of the last 100 (nan before the first): Table 1's measure."""
        mean_return, mean_length = (float(np.mean(x)) if x else math.nan for x in (self.returns, self.lengths))
        return {"episodes": self.episodes, "episodic_return": mean_return, "episodic_length": mean_length}

    def state_dict(self):
        return {"episodes": self.episodes, "returns": list(self.returns), "lengths": list(self.lengths)}

    def load_state_dict(self, state):
        self.episodes = state["episodes"]
        self.returns.extend(state["returns"])
        self.lengths.extend(state["lengths"])


def make_env(env_id, **kwargs):
    """One gymnasium environment with a flat Box observation. Raises UserError."""
    quiet_mujoco()
    try:
        env = gym.make(env_id, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"cannot make {env_id}: {first_line(error)}") from error
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        try:
            env = gym.wrappers.FlattenObservation(env)  # Discrete (one-hot), Dict, Tuple, images
        except NotImplementedError:
            raise UserError(f"{env_id} has observations that cannot be flattened: {env.observation_space}") from None
    return env


def quiet_mujoco():
    """Silence two warnings that tell a user of the v4 environments nothing (v4 on purpose: the published numbers are
    v4's; v5 ids work too), one of which would also leave a MUJOCO_LOG.TXT in the working folder."""
    warnings.filterwarnings("ignore", message=".*The environment .* is out of date")
    if find_spec("mujoco"):
        import mujoco

        mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))


def make_envs(args):
    """N environments behind gymnasium's VectorEnv interface. Raises UserError."""

    def thunk():
        if multiprocessing.parent_process():  # a worker of AsyncVectorEnv: Ctrl-C and SIGTERM are its parent's business
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return make_env(args.env_id)

    if args.vectorization == "envpool":
        envs = EnvPool(args.env_id, args.num_envs)
    else:
        make_env(args.env_id).close()  # an unknown id fails here, in this process
        vector = SyncVectorEnv if args.vectorization == "sync" else AsyncVectorEnv
        envs = vector([thunk] * args.num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    space = envs.single_action_space
    if not (isinstance(space, gym.spaces.Discrete) or isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"):
        envs.close()
        raise UserError(f"{args.env_id} has the action space {space}; this script does Box (float) and Discrete")
    return envs


class EnvPool:
    """EnvPool (an optional package) behind the part of gymnasium's VectorEnv interface that Actors uses."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self, env_id, num_envs):
        try:
            import envpool
        except ImportError:
            raise UserError("--vectorization envpool needs the package: pip install envpool==1.2.5") from None
        if env_id not in envpool.list_all_envs():
            raise UserError(f"EnvPool has no environment {env_id}")
        options = {"num_envs": num_envs, "num_threads": min(num_envs, len(os.sched_getaffinity(0)))}
        self.make = lambda seed: envpool.make(env_id, env_type="gymnasium", seed=seed, **options)
        self.num_envs, self.pool = num_envs, self.make(0)
        self.single_observation_space, self.single_action_space = self.pool.observation_space, self.pool.action_space
        if len(self.single_observation_space.shape or ()) != 1:
            raise UserError(f"EnvPool's {env_id} has observations that are not flat: {self.single_observation_space}")

    def reset(self, seed):  # EnvPool takes its seed only when it is made
        self.pool.close()
        self.pool = self.make(seed[0])
        return self.pool.reset()

    def step(self, action):
        return self.pool.step(action)

    def close(self):
        self.pool.close()


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
    """Run the checkpoint's policy for some episodes with its mean action and frozen normaliser, on the CPU.

    Returns mean, std and the list of raw returns. Raises UserError.
    """
    path = checkpoint_path(args.evaluate)
    checkpoint = load_checkpoint(path, args.env_id)
    torch.set_num_threads(1)
    env = make_env(args.env_id, render_mode="rgb_array" if args.capture_video else None)
    if args.capture_video:
        env = recorded(env, path.parent / "videos", f"step-{checkpoint['global_step']}")
    agent = Agent(env.observation_space.shape[0], env.action_space, torch.Generator())
    agent.load_state_dict(checkpoint["agent"])
    actor, returns = agent.frozen_actor(), []
    with contextlib.closing(env):
        for episode in range(args.eval_episodes):
            obs, _ = env.reset(seed=args.seed if episode == 0 else None)
            done, total = False, 0.0
            while not done:
                action = env_action(actor(obs.astype(np.float32)), env.action_space)
                obs, reward, terminated, truncated, _ = env.step(action)
                done, total = terminated or truncated, total + float(reward)
            returns.append(total)
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


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

THIS_PROCESS_ONLY = ("resume", "run_dir", "stop_at_step", "evaluate", "eval_episodes", "capture_video")


def parse_args(argv=None) -> Args:
    """The command line's Args; with --resume or --evaluate, flags that are not given keep the checkpoint's values."""
    args = tyro.cli(Args, args=argv)
    source = args.resume or args.evaluate
    stored = load_checkpoint(source)["args"] if source else {"compile": args.total_timesteps >= 200_000}
    kept = {f.name for f in dataclasses.fields(Args)} - set(THIS_PROCESS_ONLY)
    default = Args(**{key: value for key, value in stored.items() if key in kept})
    return tyro.cli(Args, args=argv, default=default)


def check_args(args):
    """Raise UserError for what cannot work, before anything is written."""
    batch = args.num_envs * args.num_steps
    positive = ["num_envs", "num_steps", "num_minibatches", "update_epochs", "checkpoint_every", "learning_rate"]
    positive += ["clip_coef", "max_grad_norm", "kl_lr_target", "eval_episodes"]
    rules = [(getattr(args, key) > 0, f"{key} must be positive") for key in positive]
    rules += [(0 <= getattr(args, key) <= 1, f"{key} must lie in [0, 1]") for key in ("gamma", "gae_lambda")]
    too_short = f"total_timesteps = {args.total_timesteps} is shorter than one iteration of {batch} steps"
    indivisible = f"num_envs * num_steps = {batch} does not divide into {args.num_minibatches} minibatches"
    rules += [
        (args.kl_lr_band >= 1 and args.kl_lr_factor >= 1, "kl_lr_band and kl_lr_factor must be at least 1"),
        (args.num_minibatches < 1 or batch % args.num_minibatches == 0, indivisible),
        (not args.norm_adv or batch > args.num_minibatches, "norm_adv needs minibatches of at least 2 samples"),
        (args.total_timesteps >= batch, too_short),
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
