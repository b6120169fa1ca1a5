# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""Proximal Policy Optimization with the clipped surrogate objective (Schulman et al. 2017, arXiv 1707.06347).

A policy pi(a|s) gives a probability to every action. Let it act for a while, then ask of each action: how much better
did it turn out than the policy's average action in that state? This is the advantage A_t. The policy gradient makes
better actions more likely and worse ones less likely. But it is valid only for the policy that collected the data, and
after one gradient step the policy is another one. Collecting is expensive, so PPO uses each batch for several epochs,
and needs two ideas to do so safely.

    The ratio   r_t = pi(a_t|s_t) / pi_old(a_t|s_t)  reweights data that pi_old collected: importance sampling.
                It is 1 while pi = pi_old, and there the gradient of mean[ r_t A_t ] is exactly the policy gradient.
    The clip    Far from 1 the reweighted estimate is worthless, so the objective must not reward going there: once r_t
                has left [1-eps, 1+eps] in the direction that A_t favours, the objective of that sample is flat.

The objective, maximised by minibatch Adam:

    L(theta) = mean[ min(r_t A_t, clip(r_t, 1-eps, 1+eps) A_t) ]     PPO eq. (7)
             - vf_coef * mean[ (V(s_t) - R_t)^2 ]                    PPO eq. (9), with R_t = A_t + V_old(s_t)
             + ent_coef * mean[ H(pi(.|s_t)) ]                       H, the entropy, rewards exploration

Why the min: updates for other samples can push a ratio the wrong way, say to r_t < 1-eps although A_t > 0. The clipped
term is flat there and would leave it so. The unclipped term is smaller, so the min picks it, and its gradient pushes
r_t back up. Clipping takes away an incentive, but bounds nothing (Engstrom et al. 2020): watch `kl` and `clipfrac`.

Departures from the paper; scaling, first weights and the falling rate matter most (Engstrom 2020, Andrychowicz 2021):
- Observations and rewards are scaled by running statistics, which are saved with the model.
- Layers start orthogonal, advantages are normalised by minibatch, gradients are clipped, the learning rate falls to 0.
- A time limit does not end the task: V of the last state stands for the rewards that would have followed.
- 8 environments x 256 steps replace the paper's 1 x 2048: the same batch, collected in parallel.

    python ppo_clip.py --env-id Hopper-v4                               # 1M steps: one to four minutes
    python ppo_clip.py --resume runs/Hopper-v4__ppo_clip__1__DATE       # goes on from its last checkpoint
    python ppo_clip.py --evaluate runs/Hopper-v4__ppo_clip__1__DATE     # without noise; prints one line of JSON
    python ppo_clip.py --env-id CartPole-v1 --total-timesteps 200000    # Discrete actions work, too

Expect after 1M steps (range of ten seeds): Hopper-v4 1000-3000, Walker2d-v4 1300-4200, HalfCheetah-v4 1500-2700;
CartPole-v1 500 at 200 000 steps.

Shapes in comments: T steps, N environments, B = T*N samples, M of them in a minibatch, D numbers in an observation,
A actions (Discrete) or action dimensions (Box), P = A logits (Discrete) or P = 2A means and log deviations (Box).
"""

import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch._higher_order_ops.scan import scan
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem  # the file's own name: a copy under another name makes, and accepts, runs of its own
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ROLLOUT = ("obs", "next_obs", "action", "reward", "terminated", "done", "discounted_return")
MISTAKES = gym.error.Error, ImportError  # an id, a version or a package that is not there: the user's, not a bug
Distribution.set_default_validate_args(False)  # checking arguments would wait for the GPU in every minibatch


@dataclass
class Args:
    """PPO with the clipped surrogate objective. Defaults: the paper's Table 3 and details of OpenAI Baselines' ppo2."""

    env_id: str = "Hopper-v4"  # gymnasium id, also my_module:MyEnv-v0; Box or Discrete actions
    total_timesteps: int = 1_000_000  # environment steps of the whole run; schedules are functions of it
    seed: int = 1  # all randomness of the run follows from it
    cuda: bool = False  # train on the GPU; with few environments a CPU is faster, so try --num-envs 64 --num-steps 32
    compile: bool = True  # torch.compile the update; by default only where it pays, from 200 000 steps
    run_dir: str | None = None  # this run's folder (default: runs/<env_id>__<script>__<seed>__<time>)
    checkpoint_every: int = 100_000  # write a checkpoint at multiples of this; it cuts off the episodes in flight
    resume: str | None = None  # a checkpoint or run folder to go on from; flags that are not given keep its values
    stop_at_step: int | None = None  # end this process, with a checkpoint, at the first iteration end past this step
    evaluate: str | None = None  # no training: run this checkpoint without noise and print one line of JSON
    eval_episodes: int = 10  # with --evaluate: the number of episodes
    capture_video: bool = False  # with --evaluate: write a video of every episode beside the checkpoint

    num_envs: int = 8  # N, parallel environments (the paper used 1); N * T is the batch
    num_steps: int = 256  # T, steps in each environment per iteration; N * T = 2048 as in Table 3
    num_workers: int = CORES  # processes that run the environments, this one included; 0: only this one

    learning_rate: float = 3e-4  # Adam's step size (Table 3)
    lr_schedule: Literal["linear", "constant", "kl-adaptive"] = "linear"  # linear: to 0; kl-adaptive: steer the KL
    kl_lr_target: float = 0.01  # kl-adaptive: the KL(old||new) of an iteration to steer for
    kl_lr_band: float = 1.5  # kl-adaptive: keep the rate while the KL is within [target / band, target * band]
    gamma: float = 0.99  # discount (Table 3)
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate (Table 3)
    num_minibatches: int = 32  # minibatches per epoch; 2048 / 32 = 64 samples each (Table 3)
    update_epochs: int = 10  # K, passes over each batch (Table 3)
    steady_obs: bool = False  # keep what the policy sees in the same scale (RunningMeanStd.update says why)
    norm_adv: bool = True  # normalise advantages to mean 0 and standard deviation 1 in each minibatch
    clip_coef: float = 0.2  # eps of the clip (best of Table 1); inf: the surrogate without clipping
    ent_coef: float = 0.0  # weight of the entropy bonus (0 for MuJoCo in the paper)
    vf_coef: float = 0.5  # weight of the squared value error
    max_grad_norm: float = 0.5  # clip the norm of the gradient to this
    target_kl: float | None = None  # end an iteration's epochs early once KL(old||new) exceeds this


# ==== Networks ========================================================================================================


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far. Networks learn best from numbers of about size 1, and nobody knows an
    environment's sizes beforehand. The statistics are buffers of the agent, so they are saved with its weights."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.double))
        for name in ("mean", "var", "center"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.double))
        self.register_buffer("inv_std", torch.ones_like(self.var))

    def varies(self):
        return self.var > 1e-12 * self.mean**2 + 1e-20  # less is rounding: a constant is not divided by it

    def update(self, x, steady=False):
        """Merge the rows of x (rows, *shape): Chan et al. 1979, the parallel form of Welford's rule.

        New statistics rescale the inputs, so the policy changes although no update has touched its parameters, and no
        clip or bound on the KL can see that. A policy that balances a pole well sees little variation, so the same tilt
        becomes a larger input. In the end it overreacts and loses the pole (docs/pendulums.md). With steady, the mean
        of the first rows stays the zero point, and an input's unit, once it has one, never gets smaller."""
        first = self.count == 0
        largest = self.inv_std.where(self.varies(), math.inf) if steady else math.inf
        x, n = x.to(self.mean), len(x)
        total, delta = self.count + n, x.mean(0) - self.mean
        m2 = self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total
        self.mean.add_(delta * n / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)
        self.inv_std.copy_(torch.where(self.varies(), self.var, 1.0).rsqrt().clamp(max=largest))
        if not steady or first:
            self.center.copy_(self.mean)

    def forward(self, x):
        return ((x - self.center) * self.inv_std).clamp(-10, 10).float()


def mlp(inputs, outputs, output_gain, hidden=(64, 64), activation=nn.Tanh):
    """Fully connected network (..., inputs) -> (..., outputs), 64-64 with tanh as in PPO's paper. Orthogonal matrices
    keep lengths, so signals neither fade nor explode. The gain sqrt(2) is ReLU's; with tanh it is a convention."""
    layers = []
    for n_in, n_out in pairwise((inputs, *hidden, outputs)):
        layers += [nn.Linear(n_in, n_out), activation()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, output_gain)  # the last layer once more, with a gain of its own
    return nn.Sequential(*layers[:-1])  # all but the activation after it


class Agent(nn.Module):
    """The policy pi(a|s), the value V(s), and the statistics that scale what both see. Acting, learning, evaluation and
    checkpoints all use this class: to change the model, change it here."""

    def __init__(self, obs_dim, action_space):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n if self.discrete else np.prod(action_space.shape))
        self.actor = mlp(obs_dim, self.action_dim, output_gain=0.01)  # so small that it acts alike everywhere at first
        self.critic = mlp(obs_dim, 1, output_gain=1.0)
        if not self.discrete:
            # One free standard deviation per action dimension, the same in all states. One from a network could shrink
            # to 0 wherever the first few actions happened to do well, and the policy would stop exploring there.
            self.log_std = nn.Parameter(torch.zeros(self.action_dim))
        self.obs_rms, self.return_rms = RunningMeanStd(obs_dim), RunningMeanStd()

    def policy_parameters(self, obs):  # (..., D) -> (..., P): logits, or mean and log standard deviation
        out = self.actor(obs)
        return out if self.discrete else torch.cat([out, self.log_std.expand_as(out)], -1)

    def distribution(self, parameters):  # (..., P)
        if self.discrete:
            return Categorical(logits=parameters)
        mean, log_std = parameters.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)  # log-probabilities are summed over the action's dimensions

    def policy(self, obs):
        """The distribution pi(.|s) at normalised observations (..., D)."""
        return self.distribution(self.policy_parameters(obs))

    def value(self, obs):
        """V(s) at normalised observations, in units of the scaled reward. (..., D) -> (...)"""
        return self.critic(obs).squeeze(-1)

    def noise(self, T, N):
        """The random numbers of T x N actions: standard normal or, for Discrete, Gumbel. (T, N, A)"""
        shape = (T, N, self.action_dim)
        return -torch.empty(shape).exponential_().log() if self.discrete else torch.randn(shape)

    def act(self, obs, noise):
        """Sample actions at raw observations (N, D). The caller draws the noise (N, A), so that a run's actions do not
        depend on how many processes share its environments. Returns (N, A) or, for Discrete, (N,)."""
        policy = self.policy(self.obs_rms(obs))
        if self.discrete:
            return (policy.logits + noise).argmax(-1)  # a sample of the softmax: the Gumbel-max trick
        return policy.mean + policy.stddev * noise

    def update_statistics(self, rollout, steady=False):
        """Let a rollout's observations and discounted returns (T, N, ...) enter the running statistics."""
        self.obs_rms.update(rollout["obs"].flatten(0, 1), steady)
        self.return_rms.update(rollout["discounted_return"].flatten())

    def forward(self, function, *args):
        """function(agent, *args): so functional_call(agent, parameters, (function, *args)) works for any function."""
        return function(self, *args)


# ==== PPO, Algorithm 1, in the order in which it happens: collect, estimate advantages, update ========================


class Environments:
    """The n of the N environments that one process runs, and their state between two rollouts."""

    def __init__(self, args, part, old_agent, noise, rollout):
        self.part, self.gamma = part, args.gamma  # part: their slice of range(N)
        self.old_agent, self.noise, self.rollout = old_agent, noise, rollout  # in memory that all processes share
        self.envs = [make_env(args.env_id) for _ in range(part.start, part.stop)]
        self.obs = rollout["obs"][0, part].numpy().copy()  # (n, D), zeros until the first reset
        self.discounted_return = np.zeros(len(self.envs))  # of past rewards; as large as a return, and known at once

    def begin_episode(self, i, t, **seed):
        self.at = self.part.start + i, t  # to be named if the environment fails
        self.obs[i] = checked(self.envs[i].reset(**seed)[0], self.obs[i].shape)
        self.discounted_return[i] = 0

    @torch.inference_mode()
    def run(self, seeds=()):
        """Run pi_old for T steps in each environment (PPO's Algorithm 1, line 3), and record them in the rollout.

        next_obs is the true successor, also where an episode ends: its last observation, not the first of the next one.
        Only the policy is evaluated here. Values and log-probabilities follow in one large batch (make_batch), since no
        parameter moves during a rollout. With seeds (N,), all environments begin new episodes first.
        """
        with named_failures(lambda: "environment {}, step {} of the rollout".format(*self.at)):
            columns = [self.rollout[key].numpy()[:, self.part] for key in ROLLOUT]  # (T, n, ...), parts of its memory
            obs, next_obs, action, reward, terminated, done, discounted_return = columns
            # NOTE: every process gives the policy all N rows, zeros where the environment is not its own. Matrices of
            # another size may be rounded differently, and the number of processes must not change a run.
            all_obs = np.zeros(self.rollout["obs"].shape[1:], np.float32)  # (N, D)
            for i, seed in enumerate(seeds[self.part]):
                seed_globals(seed)
                self.begin_episode(i, 0, seed=int(seed))
            for t in range(len(self.noise)):
                obs[t] = all_obs[self.part] = self.obs
                action[t] = self.old_agent.act(torch.from_numpy(all_obs), self.noise[t]).numpy()[self.part]
                for i, x in enumerate(env_action(action[t], self.envs[0].action_space)):
                    self.at = self.part.start + i, t
                    self.obs[i], reward[t, i], terminated[t, i], truncated = step(self.envs[i], x, self.obs[i].shape)
                    next_obs[t, i], done[t, i] = self.obs[i], terminated[t, i] or truncated
                discounted_return[t] = self.discounted_return = self.discounted_return * self.gamma + reward[t]
                for i in np.flatnonzero(done[t]):
                    self.begin_episode(i, t)


def env_action(action, space):
    """Actions as the environments take them, (n, A) or (n,) -> (n, *space.shape). NOTE: only they see clipped actions;
    log-probabilities belong to the actions that were sampled."""
    if isinstance(space, gym.spaces.Discrete):
        return action + space.start
    return action.reshape(-1, *space.shape).clip(space.low, space.high)


def gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16). All (T, N).

    delta_t = reward_t + gamma V(s_{t+1}) - V(s_t) says how much better than expected one step went. As an estimate of
    A_t it has little noise, but it trusts V, which is wrong at first. In the discounted sum of all deltas to the
    episode's end all later V cancel: it trusts only the rewards, but is as noisy as a whole episode. lambda mixes both:

        A_t = delta_t + gamma lambda A_{t+1}          lambda = 0: one step and V;  lambda = 1: the whole episode

    Episodes end in two ways. Terminated: nothing follows, and V(s_{t+1}) counts as 0. Truncated, by a time limit say:
    the world goes on unseen, and V(s_{t+1}) stands for it. Either way A_{t+1} is another episode's and is dropped.
    """
    delta = reward + gamma * (1 - terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - done)
    advantage, next_advantage = torch.empty_like(delta), torch.zeros_like(delta[0])  # 0: V stands for all that follows
    for t in reversed(range(len(delta))):
        advantage[t] = next_advantage = delta[t] + decay[t] * next_advantage  # (N,)
    return advantage


@torch.no_grad()
def make_batch(agent, rollout, gamma, gae_lambda):
    """Turn a rollout (T, N, ...) into the update's data (B, ...): A_t, R_t, and what pi_old and V_old say."""
    device = agent.return_rms.mean.device
    obs, next_obs = (agent.obs_rms(rollout[key].to(device)) for key in ("obs", "next_obs"))  # (T, N, D)
    value, next_value = agent.value(obs).cpu(), agent.value(next_obs).cpu()  # (T, N)
    reward = (rollout["reward"] * agent.return_rms.inv_std.cpu()).clamp(-10, 10).float()  # (T, N), so that V is about 1
    advantage = gae(reward, value, next_value, rollout["terminated"], rollout["done"], gamma, gae_lambda)
    action, parameters = rollout["action"].to(device, copy=True), agent.policy_parameters(obs)  # (T, N, A), (T, N, P)
    batch = {"obs": obs, "action": action, "old_policy": parameters, "value": value, "advantage": advantage}
    batch |= {"logprob": agent.distribution(parameters).log_prob(action), "return": advantage + value}
    return {key: x.to(device).flatten(0, 1) for key, x in batch.items()}


def clipped_surrogate(ratio, advantage, clip_coef):
    """min(r A, clip(r, 1-eps, 1+eps) A) per sample: PPO eq. (7). (M, ...), (M, ...) -> (M, ...)"""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def ppo_loss(agent, minibatch, coef, norm_adv):
    """-L(theta) on one minibatch (M, ...) and a dict of scalars to log. coef: the float flags by name, as tensors."""
    advantage = minibatch["advantage"]  # (M,)
    if norm_adv:  # else the policy's loss would shrink beside the other terms as the critic gets better
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)

    policy = agent.policy(minibatch["obs"])
    log_ratio = policy.log_prob(minibatch["action"]) - minibatch["logprob"]  # (M,)
    ratio = log_ratio.exp()  # r_t
    policy_loss = -clipped_surrogate(ratio, advantage, coef["clip_coef"]).mean()  # PPO eq. (7)
    value_loss = (agent.value(minibatch["obs"]) - minibatch["return"]).square().mean()  # PPO eq. (9)
    entropy = policy.entropy().mean()
    loss = policy_loss + coef["vf_coef"] * value_loss - coef["ent_coef"] * entropy

    logged = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    logged["approx_kl"] = (ratio - 1 - log_ratio).mean()  # an estimate of KL(old||new) that is never negative
    logged["clipfrac"] = ((ratio - 1).abs() > coef["clip_coef"]).float().mean()  # the share that has left the interval
    return loss, logged


def update(agent, state, minibatch, coef, norm_adv):
    """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980, Algorithm 1) on a minibatch. state: all parameters as one
    vector, Adam's moments m and v, its step count t, and the sums of what is logged. Returns the next state.

    Adam is written out so that this is a pure function with fixed shapes, without random numbers, that never waits for
    the device: it runs as it is, compiled, or recorded in a CUDA graph. m.lerp(g, 0.1) is 0.9 m + 0.1 g.
    """

    def loss(vector):  # ppo_loss with vector as the agent's parameters
        return functional_call(agent, named_parts(agent, vector), (ppo_loss, minibatch, coef, norm_adv))

    grad, logged = gradient(loss, state["parameters"])
    norm = grad.norm()
    grad = grad * (coef["max_grad_norm"] / (norm + 1e-6)).clamp(max=1)
    t, m, v = state["t"] + 1, state["m"].lerp(grad, 0.1), state["v"].lerp(grad.square(), 0.001)
    direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)  # 1e-5: the code released with the paper
    sums = state["sums"] + torch.stack([*logged.values(), norm])
    parameters = state["parameters"] - coef["learning_rate"] * direction
    return {"parameters": parameters, "m": m, "v": v, "t": t, "sums": sums}


@torch.no_grad()
def mean_kl(agent, data):
    """The exact KL(old||new) in nats, averaged over the batch's states, as a scalar tensor."""
    return kl_divergence(agent.distribution(data["old_policy"]), agent.policy(data["obs"])).mean()


def adapted_learning_rate(learning_rate, kl, target, band):
    """The next learning rate after an iteration that moved the policy by kl, within [1e-5, 1e-2]: halved if it moved
    too far, doubled if too little. PPO's beta (section 4) has the same thresholds, but is a price: it goes the other
    way. Without a band to rest in (band = 1) the rate never settles."""
    factor = 0.5 if kl > target * band else 2.0 if kl < target / band else 1.0
    return min(max(learning_rate * factor, 1e-5), 1e-2)


def train(args: Args) -> dict:
    """PPO, Algorithm 1. Returns a summary: global_step, episodes, episodic_return and episodic_length (means of the
    last 100 episodes), returns (of the episodes of this call, at most 100), checkpoint (its path), signal (the one
    that ended the run, or None). Raises UserError before anything is written, RunFailed where a run cannot go on."""
    check_args(args)
    env = make_env(args.env_id)  # an id that does not exist ends here
    close(env)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(1)  # with networks this small a second thread costs more than it brings
    torch.manual_seed(args.seed)
    agent = Agent(env.observation_space.shape[0], env.action_space).to(device)
    actors = Actors(args, agent)

    # What update() reads stays in one place and is overwritten there, as a CUDA graph demands. Hyperparameters are
    # tensors, too, so that torch.compile need not start again when a schedule or the PBT launcher changes one.
    B = args.num_steps * args.num_envs
    coef = {f.name: torch.tensor(getattr(args, f.name), device=device) for f in fields(Args) if f.type is float}
    data = make_batch(agent, actors.rollout, args.gamma, args.gae_lambda)  # of an empty rollout: this sets the shapes
    order = torch.zeros(args.num_minibatches, B // args.num_minibatches, dtype=torch.long, device=device)  # (B/M, M)
    names = [*ppo_loss(agent, data, coef, args.norm_adv)[1], "grad_norm"]  # of state["sums"], in this order
    state = initial_state(agent, len(names))  # the agent's parameters are views of it: writing to it changes the agent
    run_epoch = accelerated(args, update, agent, state, data, order, coef, args.norm_adv)
    run = Run(args, agent, state, actors)
    global_step, learning_rate = run.global_step, run.adapted.get("learning_rate", args.learning_rate)
    if global_step >= run.last_step:
        say(f"nothing to do: {args.resume} is at step {global_step} already")
        return run.summary(global_step)

    cut, finished = True, False  # cut: all environments begin new episodes, since a checkpoint cannot hold the old ones
    with actors, run:
        run.begin()
        while not finished:
            remaining = 1 - global_step / args.total_timesteps  # from 1 to 0
            if args.lr_schedule != "kl-adaptive":
                learning_rate = args.learning_rate * (remaining if args.lr_schedule == "linear" else 1)
            coef["learning_rate"].fill_(learning_rate)

            # ---- collect: run pi_old for T steps in N environments (Algorithm 1, lines 2-3) --------------------------
            rollout = actors.collect(agent, seed=(args.seed, global_step) if cut else None)  # pi_old is the agent now

            # ---- estimate advantages (line 4) ------------------------------------------------------------------------
            # NOTE: acting and updating must scale observations alike, or the data would not be pi_old's. So the
            # statistics take in a rollout only after the update has learned from it. The first one is the exception: a
            # new policy's last layer is so small that scaling hardly changes how it acts, while a critic that starts on
            # raw rewards (Hopper: a value loss of 14 instead of 0.1) needs tens of thousands of steps to recover.
            if global_step == 0:
                agent.update_statistics(rollout, args.steady_obs)
            for key, x in make_batch(agent, rollout, args.gamma, args.gae_lambda).items():
                data[key].copy_(x)

            # ---- update: K epochs of minibatches (line 6) ------------------------------------------------------------
            state["sums"].zero_()
            for epoch in range(1, args.update_epochs + 1):  # noqa: B007 (logged below)
                order.copy_(torch.randperm(B).view_as(order))
                run_epoch()  # for each row of order: state = update(agent, state, data[row], coef, norm_adv)
                if args.target_kl is not None and mean_kl(agent, data) > args.target_kl:
                    break
            kl = mean_kl(agent, data).item()
            if args.lr_schedule == "kl-adaptive":
                learning_rate = adapted_learning_rate(learning_rate, kl, args.kl_lr_target, args.kl_lr_band)
            if global_step > 0:
                agent.update_statistics(rollout, args.steady_obs)
            global_step += B

            # ---- log, checkpoint -------------------------------------------------------------------------------------
            losses = dict(zip(names, (state["sums"] / (epoch * args.num_minibatches)).tolist())) | {"kl": kl}
            unexplained = (data["return"] - data["value"]).var() / data["return"].var()
            losses |= {"explained_variance": 1 - unexplained.item(), "epochs": epoch}
            run.log(global_step, B, {"learning_rate": coef["learning_rate"].item()}, losses)
            finished = global_step >= run.last_step or run.signal is not None
            cut = finished or global_step % args.checkpoint_every < B  # or it has just passed a multiple
            if cut:
                run.save(global_step, learning_rate=learning_rate)
    return run.summary(global_step)


# ==== Plumbing, the same in every script. A reader who wanted the algorithm can stop here. ============================


class UserError(Exception):
    """The user's mistake: one line on standard error, exit status 2."""


class RunFailed(Exception):
    """The run cannot go on: one line on standard error, exit status 1."""


def say(text):
    show(f"{SCRIPT}.py: {text}", sys.stderr)


def show(text, file):
    """Print a line. If nobody reads it any more (`| head -1`), the run still goes on."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# ---- environments and the processes that run them --------------------------------------------------------------------


def checked(obs, shape, reward=None):
    """The observation, if it and the reward can be learned from. Raises RunFailed."""
    fits = np.shape(obs) == shape and (np.abs(obs) < 3e38).all()  # false for nan, and for what a float32 cannot hold
    if not fits or not abs(reward or 0.0) < 3e38:
        with np.printoptions(threshold=8):
            seen = " ".join(str(obs).split())
        what = f"reset() returned the observation {seen}" if reward is None else f"step() returned {seen} and {reward}"
        raise RunFailed(f"{what}: not finite, or not of shape {shape}")
    return obs


def step(env, action, shape):
    """env.step(action): observation, reward, terminated, truncated. Raises RunFailed. An answer of another form fails
    in here, so that the line names step()."""
    obs, reward, terminated, truncated, _ = env.step(action)
    return checked(obs, shape, float(reward)), float(reward), bool(terminated), bool(truncated)


@contextlib.contextmanager
def named_failures(describe, mistakes=()):
    """Turn an error into one line: describe() and the error's message. Errors of the kinds `mistakes` are the user's.
    All others are the environment's; for them the line also names the call and the place in the code."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        kind = UserError if isinstance(error, (UserError, *mistakes)) else RunFailed
        if not isinstance(error, (UserError, RunFailed, *mistakes)):
            frames = traceback.extract_tb(error.__traceback__)
            call = next((f.name for f in reversed(frames) if f.name in ("__init__", "reset", "step")), frames[-1].name)
            place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
            text = f"{call}() raised {type(error).__name__}: {text} ({place})"
        raise kind(f"{describe()}: {text}") from error


def seed_globals(seed):
    """Some environments draw from the global generators. (torch's is the run's own.)"""
    np.random.seed(int(seed) % 2**32)  # noqa: NPY002
    random.seed(int(seed))


def make_env(env_id, **kwargs):
    """One environment, with observations as vectors. Raises UserError for what this script does not do."""
    gym.logger.min_level = gym.logger.ERROR  # v4 on purpose: the published numbers are v4's; v5 works, too
    with named_failures(lambda: f"cannot make {env_id}", MISTAKES):
        if "mujoco" in str(getattr(gym.registry.get(env_id), "entry_point", "")):
            with named_failures(lambda: "cannot import mujoco", (Exception,)):  # MUJOCO_GL may be nonsense
                import mujoco  # here, so that other environments do not need it
            # Silence an irrelevant warning of the v4 environments that would also leave a file MUJOCO_LOG.TXT behind.
            mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))
            if "render_mode" in kwargs:
                kwargs["camera_name"] = "track"  # else a body that walks leaves the picture
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if not isinstance(env.observation_space, gym.spaces.Box) or not env.observation_space.shape:
            env = gym.wrappers.FlattenObservation(env)  # Discrete (one-hot), Dict, Tuple
    shape, space = env.observation_space.shape, env.action_space
    if shape is None or len(shape) > 1:
        raise UserError(f"{env_id} has observations of shape {shape}; this script is for vectors, not for images")
    if not (isinstance(space, gym.spaces.Discrete) or isinstance(space, gym.spaces.Box) and space.dtype.kind == "f"):
        raise UserError(f"{env_id} has the action space {space}; this script does Box (float) and Discrete")
    return env


def close(*envs):
    for env in envs:
        with contextlib.suppress(Exception, SystemExit):  # nothing depends on it any more
            env.close()


def work(pipe, kind, *args):
    """A worker process: run kind(*args), a part of the environments, as often as the parent asks for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets both signals, too, and finishes its iteration first
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # not SIG_IGN: SIGTERM could not end what inherits it
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError), contextlib.ExitStack() as stack:  # the errors: the parent is gone
        try:
            environments = kind(*args)
            stack.callback(close, *environments.envs)
            while (seeds := pipe.recv()) is not None:
                pipe.send(environments.run(seeds))
        except (UserError, RunFailed) as error:
            pipe.send(str(error))
            pipe.recv()  # wait for the parent's next message: it could not be sent to a process that is gone


class Actors:
    """The N environments, spread over processes. Each runs whole rollouts of its part with the frozen policy; they meet
    once an iteration, not once a step. The first part is this process's own."""

    def __init__(self, args, agent):
        T, N, D = args.num_steps, args.num_envs, len(agent.obs_rms.mean)
        self.old_agent, self.noise = copy.deepcopy(agent).cpu().share_memory(), agent.noise(T, N).share_memory_()
        action = self.old_agent.act(torch.zeros(N, D), self.noise[0])  # (N, A) or (N,)
        self.rollout = {key: torch.zeros(T, N) for key in ROLLOUT} | {"action": action.new_zeros(T, *action.shape)}
        self.rollout |= {key: torch.zeros(T, N, D) for key in ("obs", "next_obs")}
        shared = self.old_agent, self.noise, {key: x.share_memory_() for key, x in self.rollout.items()}
        k = min(max(args.num_workers, 1), N)  # processes
        self.parts = [(args, slice(N * i // k, N * (i + 1) // k), *shared) for i in range(k)]
        self.episodes, self.last = 0, deque(maxlen=100)  # last: (return, length) of the episodes that ended last
        self.running = np.zeros((2, N))  # return and length so far of the episodes in flight

    def __enter__(self):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.own, self.workers = Environments(*self.parts[0]), []
        try:
            for part in self.parts[1:]:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, Environments, *part), daemon=True)
                process.start()
                self.workers.append((process, ours))
                theirs.close()
        except BaseException:  # Ctrl-C, say
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for _, pipe in self.workers:
            with contextlib.suppress(OSError):  # that worker is dead
                pipe.send(None)
        deadline = time.monotonic() + 5  # for all of them together
        try:
            for process, _ in self.workers:
                process.join(max(0, deadline - time.monotonic()))
        finally:  # after another Ctrl-C, too: nothing else would end a worker that hangs
            for process, _ in self.workers:
                process.kill()
        close(*self.own.envs)

    def collect(self, agent, seed=None):
        """One rollout of the agent as it is now: a dict of tensors, (T, N, ...) each. See Environments.run. seed: begin
        new episodes first; a tuple of integers. Raises RunFailed."""
        self.old_agent.load_state_dict(agent.state_dict())
        self.noise.copy_(agent.noise(*self.noise.shape[:2]))
        seeds = () if seed is None else np.random.SeedSequence(seed).generate_state(self.noise.shape[1]) >> 1
        try:
            for _, pipe in self.workers:
                pipe.send(seeds)
            self.own.run(seeds)
            failures = [answer for _, pipe in self.workers if (answer := pipe.recv())]
        except (EOFError, OSError) as error:
            codes = [process.exitcode for process, _ in self.workers if process.join(0.1) or not process.is_alive()]
            raise RunFailed(f"a worker process died, exit code {codes} (-9: killed, perhaps out of memory)") from error
        if failures:
            raise RunFailed(failures[0])
        self.running *= seed is None  # 0 if new episodes have begun
        for reward, done in zip(self.rollout["reward"].numpy(), self.rollout["done"].numpy()):  # (N,), (N,)
            self.running[0] += reward
            self.running[1] += 1
            for i in np.flatnonzero(done):
                self.last.append(tuple(self.running[:, i].tolist()))
                self.episodes, self.running[:, i] = self.episodes + 1, 0
        return self.rollout

    def statistics(self):
        """Episodes so far, and mean raw return and length of the last 100: the measure of PPO's Table 1."""
        mean_return, mean_length = np.mean(self.last, axis=0).tolist() if self.last else (math.nan, math.nan)
        return {"episodes": self.episodes, "episodic_return": mean_return, "episodic_length": mean_length}


# ---- speed -----------------------------------------------------------------------------------------------------------


def initial_state(agent, logged):
    """The state of update() at the start. The agent's parameters become views of state["parameters"], one vector.
    Frozen ones (requires_grad_(False)) stay outside."""
    learned = [p for p in agent.parameters() if p.requires_grad]
    vector = parameters_to_vector(learned).detach()
    vector_to_parameters(vector, learned)
    state = {"parameters": vector, "m": torch.zeros_like(vector), "v": torch.zeros_like(vector)}
    return state | {"t": torch.zeros_like(vector[0]), "sums": torch.zeros_like(vector[:logged])}


def named_parts(agent, vector):
    """A vector of all parameters as a dict of tensors, by name."""
    parameters = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    parts = vector.split([p.numel() for p in parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts)}


def gradient(loss, vector):
    """The gradient of loss(vector)[0] at vector, and loss(vector)[1], without a history."""
    if torch.compiler.is_compiling():
        return torch.func.grad(loss, has_aux=True)(vector)
    vector = vector.detach().requires_grad_()  # the same by autograd: little more than half the time if not compiled
    value, logged = loss(vector)
    return torch.autograd.grad(value, vector)[0], {key: x.detach() for key, x in logged.items()}


def accelerated(args, update, agent, state, data, order, *operands):
    """One pass over the batch as a function without arguments, in the fastest form that the run allows. For each row of
    order (B/M, M), the places of a minibatch in data, it overwrites state with update(agent, state, minibatch, ...).
    data: a dict of tensors (B, ...), with "return" among them."""

    def minibatch_update(state, index):
        return update(agent, state, {key: x[index] for key, x in data.items()}, *operands)

    if args.compile and args.cuda:
        samples = order.shape[1] * data["return"][0].numel()  # of a minibatch: its rows, times the agents
        products = samples * sum(p.numel() for p in agent.parameters())
        minibatch_update = compiled(minibatch_update, True, products)

    def epoch():
        if args.compile and not args.cuda:  # the loop, too, is part of the graph: 98 us a minibatch instead of 165
            new, _ = scan(lambda state, index: (minibatch_update(state, index), index[0].clone()), state, order)
        else:
            new = state
            for index in order:
                new = minibatch_update(new, index)
        for key, x in new.items():
            state[key].copy_(x)

    if args.cuda:
        return CudaGraph(epoch)
    return compiled(epoch, False) if args.compile else epoch


def can_compile():
    """Whether there are what torch.compile needs: a C++ compiler and Python's header files."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    return shutil.which(compiler) is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def compiled(function, cuda, products=0):
    """torch.compile(function) as one graph, gradient included. It compiles when it is first called. products: about how
    many multiplications its networks need."""
    import torch._inductor.config as config  # here, because it is slow to import

    # On the CPU a pool of compiler processes would take longer to start than it saves, and C++ calls the kernels.
    config.compile_threads = config.decide_compile_threads() if cuda else 1
    config.cpp_wrapper = not cuda and not torch.__version__.startswith("2.11")  # whose C++ has no loops
    config.cpp.use_decompose_tanh = True  # a tenth faster; the error is 2e-7
    # A GPU's kernel takes a microsecond or two however little it computes, and a library's product of such small
    # matrices takes several. Written as sums, products fuse with the operations around them, and a combo kernel does
    # the work of several independent ones. A minibatch of 64 is then 16 kernels, not 53: 29 us instead of 98 (H200).
    config.combo_kernels = cuda
    sizes = {"min_first_dimension_decomposition": 1, "max_other_dimension_decomposition": 1025}
    config.post_grad_fusion_options = {"decompose_mm_pass": sizes}
    from torch._inductor.fx_passes import decompose_mem_bound_mm  # noqa: F401 (it reads the sizes when it is imported)

    if not cuda or products >= 2**24:
        config.post_grad_fusion_options = {}
    torch._dynamo.config.recompile_limit = 256  # shapes that one process may compile; the ninth would be an error
    warnings.filterwarnings("ignore", "TensorFloat32")  # 10 bits are too few for a ratio that has to begin at 1
    loops = ("torch.ops.higher_order.scan", "torch.ops.higher_order.while_loop")
    config.unsafe_marked_cacheable_functions = dict.fromkeys(loops, torch.__version__)  # else every run compiles anew
    return torch.compile(function, fullgraph=True, dynamic=False)


class CudaGraph:
    """A function without arguments or random numbers, whose tensors never move, as one launch instead of thousands.

    Its first two calls run as they are, on a side stream: real work, and the warm-up that recording asks for. The third
    records the kernels (https://pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs"). From then on a call replays
    them, without any Python. So whatever changes must be in tensors, and every call returns the same tensors."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

    def __call__(self):
        self.calls += 1
        if self.calls <= 2:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.result = self.function()
            torch.cuda.current_stream().wait_stream(stream)
            return self.result
        if self.calls == 3:
            with torch.cuda.graph(self.graph):  # records, does not run
                self.result = self.function()
        self.graph.replay()
        return self.result


# ---- checkpoint, run folder, signals ---------------------------------------------------------------------------------


def load_checkpoint(path, env_id=None, agent=None):
    """What Run.save wrote, from a file or a run folder; its weights go into the agent. It runs no code. Raises
    UserError if it is damaged, or of another script, environment, observation or network."""
    path = Path(path) / "checkpoint.pt" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.save stores checksums, but torch.load ignores them
            raise zipfile.BadZipFile
        saved = torch.load(path, weights_only=True, map_location="cpu")
        script, trained_on = saved["script"], saved["args"]["env_id"]
        if not saved.keys() >= {"agent", "adam", "adapted", "rng", "global_step", "wall_time", "episodes", "last"}:
            raise KeyError
    except Exception as error:
        raise UserError(f"{path} cannot be read, is damaged, or no checkpoint of {SCRIPT}.py") from error
    if script != SCRIPT or env_id not in (None, trained_on):
        raise UserError(f"{path} is of {script}.py on {trained_on}, not of {SCRIPT}.py on {env_id or trained_on}")
    try:
        if agent is not None:
            agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint does not fit this agent: {str(error).splitlines()[-1].strip()}") from error
    return saved


def lock(file):
    """Keep other processes out. Raises BlockingIOError if one of them was first."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError("another process is using it") from None
    except (ImportError, OSError):
        pass  # Windows has no such locks, some file systems have none: we do without


class Run(contextlib.ExitStack):
    """The run's folder: checkpoint.pt, args.json, the script, progress.csv, TensorBoard events. And its progress bar,
    which is a plain line every ten seconds where there is no terminal."""

    def __init__(self, args, agent, state, actors):
        """Choose the folder; with --resume, put the checkpoint's state in place. Writes nothing. Raises UserError."""
        super().__init__()
        self.args, self.agent, self.state, self.actors, self.signal = args, agent, state, actors, None
        self.last_step = min(args.total_timesteps, args.stop_at_step or args.total_timesteps)
        self.global_step, self.wall_time, self.adapted, resumed = 0, 0.0, {}, None
        if args.resume:
            old, source = load_checkpoint(args.resume, args.env_id, agent), Path(args.resume)
            resumed = source if os.path.isdir(source) else source.parent if source.name == "checkpoint.pt" else None
            for key, x in old["adam"].items():
                if x.shape != state[key].shape:
                    raise UserError("the checkpoint does not fit this agent: other parameters were frozen")
                state[key].copy_(x)
            self.global_step, self.wall_time, actors.episodes = old["global_step"], old["wall_time"], old["episodes"]
            actors.last.extend(map(tuple, old["last"]))
            if args.seed == old["args"]["seed"]:  # another seed begins a stream of its own
                torch.set_rng_state(old["rng"])
            # What the run has adapted (a learning rate or beta, say) goes on, unless its flag now has another value.
            self.adapted = {k: x for k, x in old["adapted"].items() if old["args"].get(k) == vars(args).get(k)}
        name = f"{re.sub('[/:]', '_', args.env_id)}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.run_dir or resumed or Path("runs") / name)
        if os.path.exists(self.dir / "checkpoint.pt") and not (resumed and self.dir.resolve() == resumed.resolve()):
            raise UserError(f"{self.dir} holds another run: --resume {self.dir}, or choose another --run-dir")
        self.episodes_before, self.wall_time_before = actors.episodes, self.wall_time
        self.start = time.perf_counter() - self.wall_time

    def save(self, global_step, **adapted):
        """Write to a temporary file, flush, rename: checkpoint.pt is whole at any moment. Raises RunFailed."""
        saved = {"script": SCRIPT, "args": asdict(self.args), "global_step": global_step, "wall_time": self.wall_time}
        saved |= {"agent": self.agent.state_dict(), "adam": {key: self.state[key] for key in ("m", "v", "t")}}
        saved |= {"adapted": adapted, "rng": torch.get_rng_state()}
        saved |= {"episodes": self.actors.episodes, "last": list(self.actors.last)}
        path, temporary, blob = self.dir / "checkpoint.pt", self.dir / "checkpoint.pt.tmp", io.BytesIO()
        torch.save(saved, blob)
        try:
            temporary.write_bytes(blob.getbuffer())
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:  # a full disk, say
            temporary.unlink(missing_ok=True)
            raise RunFailed(f"cannot write {path}: {error.strerror}; the checkpoint before it is as it was") from None

    def begin(self):
        """Lock and write the folder, show the bar, listen to signals. Leaving the `with` ends it. Raises UserError."""
        args, path = self.args, self.dir / "progress.csv"
        with named_failures(lambda: self.dir, (OSError,)):
            self.dir.mkdir(parents=True, exist_ok=True)
            self.csv = self.enter_context(open(path, "a+", buffering=1, newline="\n", errors="replace"))
            lock(self.csv)
            self.csv.seek(0)
            header, *rows = self.csv.readlines() or [""]
            steps = [x.split(",")[0] for x in rows if x.endswith("\n")] if self.global_step else []
            if header and not (header.startswith("global_step,") and all(map(str.isdecimal, steps))):
                raise UserError("progress.csv is not what this script wrote: move it away")
        kept = [x for x, step in zip(rows, steps) if int(step) <= self.global_step]
        self.columns = header if kept else ""
        self.csv.truncate(len(self.columns + "".join(kept)))  # rows past the checkpoint tell of steps that were lost
        say(f"{args.env_id}, seed {args.seed}, run folder {self.dir}")
        limit = getattr(gym.registry.get(args.env_id.split(":")[-1]), "max_episode_steps", None) or 0
        if args.checkpoint_every < 4 * args.num_envs * limit:
            apart = max(args.checkpoint_every // args.num_envs, args.num_steps)
            say(f"checkpoints cut off all episodes every {apart} steps, so few long ones count: see --checkpoint-every")
        if args.compile:
            say("compiling in the first iteration: some 15 s, or 4 s if it was compiled before")
        if not (self.dir / "checkpoint.pt").exists():
            self.save(self.global_step, **self.adapted)  # a crash at any moment can be resumed
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
        with contextlib.suppress(shutil.SameFileError):  # the copy in the folder resumes its own run
            shutil.copyfile(__file__, self.dir / Path(__file__).name)
        self.board = self.enter_context(SummaryWriter(self.dir, purge_step=self.global_step + 1))
        shown = {} if sys.stderr.isatty() else {"file": open(os.devnull, "w"), "mininterval": 10, "miniters": 1}
        self.bar = self.enter_context(tqdm(total=self.last_step, initial=self.global_step, unit=" steps", **shown))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.callback(signal.signal, number, signal.signal(number, self.stop))

    def log(self, global_step, B, charts, losses):
        """Log one iteration. TensorBoard's tags are charts/KEY and losses/KEY, unless a key has a / of its own."""
        before, self.wall_time = self.wall_time, time.perf_counter() - self.start
        for key, x in losses.items():
            if not math.isfinite(x) and key != "explained_variance":  # which is nan if all returns are the same
                raise RunFailed(f"{key} is {x} at step {global_step}")
        charts = {"SPS": B / (self.wall_time - before)} | self.actors.statistics() | charts
        row = {"global_step": global_step, "wall_time": self.wall_time} | charts | losses
        columns = ",".join(key.split("/")[-1].lower() for key in row) + "\n"
        if self.columns and self.columns != columns:
            raise RunFailed(f"{self.csv.name} has other columns: resume into a new --run-dir")
        self.csv.write("" if self.columns else columns)
        self.columns = columns
        print(*(f"{x:.7g}" if isinstance(x, float) else x for x in row.values()), sep=",", file=self.csv)
        for key, x in (charts | losses).items():
            tag = key if "/" in key else f"{'charts' if key in charts else 'losses'}/{key}"
            self.board.add_scalar(tag, x, global_step)
        self.bar.set_postfix_str(f"return {charts['episodic_return']:.1f}", refresh=False)
        self.bar.total = max(self.bar.total, global_step)  # the last iteration may pass the end
        if self.bar.update(global_step - self.bar.n) and not sys.stderr.isatty():
            show(self.bar, sys.stderr)

    def stop(self, number, frame):
        """The first SIGINT or SIGTERM ends the run after the current iteration. If that is this process's first, it
        ends at once, since there is nothing to save yet. The same signal again kills, but not within 0.2 s: timeout(1)
        sends it to the process, and at once again to the process's whole group."""
        self.signal = number
        signal.signal(number, signal.SIG_IGN)
        time.sleep(0.2)
        signal.signal(number, signal.SIG_DFL)
        if self.wall_time == self.wall_time_before:
            raise KeyboardInterrupt(number)

    def summary(self, global_step):
        new = min(self.actors.episodes - self.episodes_before, 100)
        returns = [episode_return for episode_return, _ in self.actors.last][len(self.actors.last) - new :]
        result = {"global_step": global_step, **self.actors.statistics(), "returns": returns}
        path = self.dir / "checkpoint.pt"  # which a run that had nothing left to do has not written
        return result | {"checkpoint": str(path if path.exists() else self.args.resume), "signal": self.signal}


# ---- evaluation, arguments, entry ------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(args) -> dict:
    """Run the checkpoint's policy without noise, on the CPU. Returns mean, std and raw returns. Raises UserError."""
    torch.set_num_threads(1)
    env = make_env(args.env_id, **({"render_mode": "rgb_array"} if args.capture_video else {}))
    shape, noise, returns = env.observation_space.shape, 0.0, []
    agent = Agent(shape[0], env.action_space)
    checkpoint = load_checkpoint(args.evaluate, args.env_id, agent)
    hint = " (without a display MuJoCo needs MUJOCO_GL=egl or osmesa)" if args.capture_video else ""
    with named_failures(lambda: f"episode {len(returns)}{hint}", MISTAKES):
        if args.capture_video:
            path = Path(args.evaluate)
            folder, name = (path if path.is_dir() else path.parent) / "videos", f"step-{checkpoint['global_step']}"
            env = gym.wrappers.RecordVideo(env, str(folder), lambda n: True, name_prefix=name, disable_logger=True)
        seed_globals(args.seed)
        for episode in tqdm(range(args.eval_episodes), unit=" episodes", disable=None):  # shown on a terminal
            (obs, _), done, total = env.reset(seed=None if episode else args.seed), False, 0.0
            checked(obs, shape)
            while not done:
                action = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None], noise).numpy()
                obs, reward, terminated, truncated = step(env, env_action(action, env.action_space)[0], shape)
                done, total = terminated or truncated, total + reward
            returns.append(total)
        env.close()
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


def cli(argv) -> Args:
    """tyro's reading of the command line. Raises UserError: one line in place of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):  # where there is no terminal it is plain
            args = tyro.cli(Args, args=argv)
    except SystemExit as stop:
        if not stop.code:  # --help
            show(box.getvalue(), sys.stdout)
            raise
        message = re.split(r"(?m)^\W*-{9,}\W*$", box.getvalue())[1]  # title, rule, message, rule, help
        raise UserError(" ".join(message.split())) from None
    for key, x in vars(args).items():
        if x == "":  # --resume "$RUN", say, where RUN is not set
            raise UserError(f"--{key.replace('_', '-')} is empty")
    return args


def parse_args(argv) -> Args:
    """The command line's Args; with --resume or --evaluate, flags that are not given keep the checkpoint's values."""
    process_only = {"resume", "run_dir", "stop_at_step", "num_workers"}  # flags about one process, not about the run
    evaluation = {"evaluate", "eval_episodes", "capture_video"}
    args = cli(argv)
    given = {x.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for x in argv if x.startswith("--")}
    default = {"compile": args.total_timesteps >= 200_000 and can_compile()}
    if source := args.evaluate or args.resume:
        default = load_checkpoint(source, args.env_id if "env_id" in given else None)["args"]
    for key in default.keys() & vars(args).keys() - given - process_only - evaluation:
        setattr(args, key, default[key])
    useless = (  # when, which flags, and what to say of them
        (args.evaluate, given - evaluation - {"env_id", "seed"}, "does nothing with --evaluate"),
        (not args.evaluate, evaluation, "goes with --evaluate"),
        (args.lr_schedule != "kl-adaptive", {"kl_lr_target", "kl_lr_band"}, "goes with --lr-schedule kl-adaptive"),
    )
    for when, flags, what in useless:
        for flag in given & flags if when else ():
            raise UserError(f"--{flag.replace('_', '-')} {what}")
    return args


def check_args(args):
    """Raise UserError for values that cannot work. A number must be positive and finite, unless it is named here."""
    lowest = {"seed": 0, "num_workers": 0, "gamma": 0, "gae_lambda": 0, "ent_coef": 0, "vf_coef": 0, "kl_lr_band": 1}
    highest = {"gamma": 1, "gae_lambda": 1, "clip_coef": math.inf}
    for f in fields(args):
        key, x = f.name, getattr(args, f.name)
        kinds = [k for kind in get_args(f.type) or (f.type,) for k in get_args(kind) or (kind,)]  # float | None, say
        simple = isinstance(x, str | int | float | None)  # not a tuple, say, in a flag of a copy's own
        if type(x) is int and float in kinds:
            setattr(args, key, float(x))
        elif type(x).__module__ != "builtins" or simple and {x, type(x)}.isdisjoint(kinds):
            raise UserError(f"{key} is {x!r}, not of {f.type}")  # from Python: np.float64 would spoil checkpoints
        low, high = lowest.get(key, sys.float_info.min), highest.get(key, 2**63 - 1)
        if isinstance(x, int | float) and not isinstance(x, bool) and not low <= x <= high:
            bounds = "positive" if low == sys.float_info.min else f"{low} or more"
            raise UserError(f"--{key.replace('_', '-')} {x} must be {bounds}, and at most {high}")
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches:
        raise UserError(f"{batch} samples do not divide into {args.num_minibatches} minibatches")
    if args.norm_adv and batch == args.num_minibatches:
        raise UserError("--norm-adv needs minibatches of at least 2 samples")
    if args.total_timesteps < batch:
        raise UserError(f"--total-timesteps is shorter than one iteration of {batch} steps")
    if args.cuda and not args.evaluate and not torch.cuda.is_available():
        raise UserError("--cuda: torch finds no CUDA device here")
    if args.compile and not args.evaluate and not can_compile():
        raise UserError("--compile needs a C++ compiler and Python's headers (python3-dev); or give --no-compile")


def main(argv) -> int:
    try:
        args = parse_args(argv)
        check_args(args)
        result = evaluate(args) if args.evaluate else train(args)
        if not args.evaluate:
            path = Path(result["checkpoint"])
            run_dir = shlex.quote(str(path.parent if path.name == "checkpoint.pt" else path))
            script = shlex.quote(os.path.relpath(__file__))
            say(f"to evaluate: python {script} --evaluate {run_dir}")
            done = result["global_step"] >= args.total_timesteps
            longer = f" --total-timesteps {2 * result['global_step']}" if done else ""
            say(f"to go on:    python {script} --resume {run_dir}{longer}")
            say(f"to plot:     tensorboard --logdir {run_dir}")
            result = {key: x if x == x else None for key, x in result.items() if key != "returns"}  # JSON has no nan
        show(json.dumps(result), sys.stdout)
        return 128 + result["signal"] if result.get("signal") else 0
    except (UserError, RunFailed, OSError) as error:
        say(error)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        return 128 + (interrupt.args or [signal.SIGINT])[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
