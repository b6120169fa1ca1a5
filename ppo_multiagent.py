# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
"""PPO for several agents: MAPPO (Yu et al. 2022, arXiv 2103.01955), IPPO (de Witt et al. 2020, 2011.09533), self-play.

Several agents act at the same time, each on its own observation. For any one of them the others are a part of the
world, and this part changes while they learn. PPO copes with that better than one would expect, perhaps because the
clip keeps the others, too, from changing much at once. Each agent maximises what ppo_clip.py explains:

    L(theta) = mean over t, g of  min(r_t^g A_t^g, clip(r_t^g, 1-eps, 1+eps) A_t^g) - vf_coef (V - R)^2 + ent_coef H

What is special to several agents is where the advantages A_t^g come from, and who the others are:

    ippo       Independent learners. Agent g's critic sees what agent g sees: V(o^g).
    mappo      Centralised training, decentralised execution. Critics are needed for training only, so they may see the
               joint state, V(s, g), while a policy pi(a^g|o^g) sees what its agent sees. --critic-input state-actions
               shows them the others' actions, too: V(s, a^-g). Team.actions_of_others says why that is allowed.
    selfplay   One policy plays both sides of a zero-sum game, against itself and against its own past.

mappo and ippo differ only in the critic's input. All agents share an actor and a critic, which see a one-hot agent id.
With --no-share-params each agent has its own networks, normalisers and gradient norm. Only the joint state's normaliser
is common.

Taken from the MAPPO paper: normalised value targets, few epochs, the clip of its particle runs, and masks for illegal
actions. Samples of dead agents do not count. Left out are recurrence, layer norm, the Huber loss and value clipping.
Four things differ on purpose: four minibatches, not one (simple_spread is learned faster); the learning rate falls; V
of the last state stands for what a time limit cuts off; and an agent that leaves first gets no later team rewards.

    python ppo_multiagent.py                                                    # MAPPO on simple_spread: one minute
    python ppo_multiagent.py --algorithm ippo --no-share-params
    python ppo_multiagent.py --algorithm selfplay --total-timesteps 5000000     # Connect Four
    python ppo_multiagent.py --env-id mpe2.simple_tag_v3 --team-reward none     # any PettingZoo parallel environment
    python ppo_multiagent.py --evaluate runs/simple_spread__ppo_multiagent__1__DATE

What to expect on simple_spread with --total-timesteps 550000: a return, summed over agents, of -56 (random play: -80).
Other projects count differently: docs/multiagent.md converts their scores, and says how well self-play plays.

Shapes in comments: T steps, N environments, B = T*N samples, M of them in a minibatch, G agents, P learners (1 or G),
D numbers in an observation, S in a state, A actions (Discrete) or action dimensions (Box).
"""

import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import pkgutil
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
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch._higher_order_ops.scan import scan
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.func import functional_call
from torch.nn.functional import one_hot
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import default_collate
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem  # the file's own name: a copy under another name makes, and accepts, runs of its own
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MISTAKES = gym.error.Error, ImportError  # an id, a version or a package that is not there: the user's, not a bug
Distribution.set_default_validate_args(False)  # checking arguments would wait for the GPU in every minibatch


@dataclass
class Args:
    """MAPPO, IPPO and self-play. Defaults: near the MAPPO paper's for particle environments; self-play's are below."""

    algorithm: Literal["mappo", "ippo", "selfplay"] = "mappo"  # centralised critic; local critics; both sides of a game
    env_id: str = "simple_spread"  # simple_spread, connect_four (selfplay), or PettingZoo's: mpe2.simple_tag_v3
    env_kwargs: str = "{}"  # arguments of a PettingZoo environment, as JSON
    total_timesteps: int = 1_000_000  # steps of the whole run, all agents acting in each; selfplay: the learner's moves
    seed: int = 1  # all randomness of the run follows from it
    cuda: bool = False  # train on the GPU; built-in worlds run there, too, a whole rollout as one CUDA graph
    compile: bool = True  # torch.compile the update; by default only where it pays, from 200 000 steps
    run_dir: str | None = None  # this run's folder (default: runs/<env_id>__<script>__<seed>__<time>)
    checkpoint_every: int = 100_000  # write a checkpoint at multiples of this; it cuts off the episodes in flight
    resume: str | None = None  # a checkpoint or run folder to go on from; flags that are not given keep its values
    stop_at_step: int | None = None  # end this process, with a checkpoint, at the first iteration end past this step
    evaluate: str | None = None  # no training: run this checkpoint without noise and print one line of JSON
    eval_episodes: int = 10  # with --evaluate: the number of episodes or, in self-play, of games against random play
    capture_video: bool = False  # with --evaluate: write a video of every episode (PettingZoo environments)

    num_envs: int = 128  # N, parallel environments (the MAPPO authors advise more than 50)
    num_steps: int = 25  # T, steps in each environment per iteration
    num_workers: int = CORES  # processes that run PettingZoo environments, this one included; 0: only this one

    share_params: bool = True  # one network for all agents; --no-share-params: each agent has its own
    critic_input: Literal["state", "state-actions"] = "state"  # mappo: V(s, g), or V(s, a^-g) with the others' actions
    team_reward: Literal["sum", "mean", "none"] = "sum"  # each gets the sum or mean of all rewards; none: its own
    hidden_size: int = 64  # width of the two hidden layers
    norm_obs: bool = True  # scale observations and states by running statistics

    learning_rate: float = 7e-4  # Adam's step size
    lr_schedule: Literal["linear", "constant"] = "linear"  # linear: to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    num_minibatches: int = 4  # minibatches per epoch (the paper advises 1; simple_spread learns faster with 4)
    update_epochs: int = 10  # K, passes over each batch (the paper advises 5 to 15, fewer for harder tasks)
    norm_adv: bool = True  # normalise advantages in each minibatch, over all samples that a learner learns from
    clip_coef: float = 0.2  # eps of the clip
    ent_coef: float = 0.01  # weight of the entropy bonus
    ent_final: float = 1.0  # the entropy weight falls linearly from ent_coef to ent_coef * ent_final
    vf_coef: float = 0.5  # weight of the squared error of the normalised value
    max_grad_norm: float = 10.0  # clip the norm of each learner's gradient to this

    latest_prob: float = 0.5  # selfplay: share of the 8 opponents that are the present policy; the others: snapshots
    opening_plies: int = 0  # selfplay: half of the boards start after 1 to this many random plies (moves); 0: none
    pool_size: int = 32  # selfplay: the largest number of snapshots, taken at equal intervals over the run


SELFPLAY_DEFAULTS = {  # a game has one noisy result: with a small gamma it counts mostly for the last few moves
    "env_id": "connect_four", "num_envs": 256, "num_steps": 64, "hidden_size": 128, "norm_obs": False,
    "learning_rate": 1e-2, "num_minibatches": 16, "update_epochs": 2, "ent_coef": 0.15, "max_grad_norm": 0.5,
    "gamma": 0.7, "gae_lambda": 0.9, "ent_final": 0.1, "opening_plies": 16,
}  # fmt: skip


# ==== What a world is =================================================================================================
#
# One training loop serves cooperation, games and other people's environments, because each is wrapped as a world: N
# copies of what the agents live in, as tensors. SimpleSpread and SelfPlay (a game, seen by one of its players) are
# built in and step all copies at once; PettingZoo steps others' environments one by one. make_world chooses.
#
# A world has num_agents G, obs_dim D, state_dim S, and action_space: that of the agent with the most actions, to which
# the others are padded. What it shows at one moment is a view, a dict:
#     obs    (N, G, D)  what each agent sees
#     state  (N, S)     for MAPPO's critic: all observations joined, or the environment's own state()
#     legal  (N, G, A)  the actions that an agent has and may take now (a dead one: only the first, or for Box none)
#     alive  (N, G)     1 while an agent takes part: in some worlds agents leave before the others
# Its methods are view(), reset(generator), noise(T), which draws the random numbers of T steps, and
#     step(action, noise) -> view, successor, reward (N, G), terminated (N, G), over (N,)
# `over` is 1 where an episode has ended. There `successor` is its last view, and `view` the first of the next episode.
#
# A step of a built-in world overwrites tensors in place, branches on no value and never waits for the device, so that a
# CUDA graph can hold T of them. PettingZoo's environments draw their own random numbers; reset gives each a seed.


# ==== Policies and critics of a team ==================================================================================
#
# An agent's policy knows its own observation, because that is all that it will have when it acts. Critics only help to
# learn, so they may know more. All agents are evaluated at once: tensors have a dimension G, and the networks of
# several learners are stacked.


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


class StackedMLP(nn.Module):
    """P networks of the same shape, stacked so that one product of matrices evaluates all of them. Each has two hidden
    ReLU layers. (..., G, inputs) -> (..., G, outputs). P = 1: one for all G agents; P = G: one each.

    What is learned at one place of a board should hold at every place. So a world may have windows (W, L): W groups of
    L input indices, such as the lines of a board. The first layer then reads every group with the same weights, as a
    convolution does, and has hidden/8 features for each."""

    def __init__(self, P, inputs, hidden, outputs, output_gain, windows=None):
        super().__init__()
        self.register_buffer("windows", windows, persistent=False)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        layers = [(inputs, hidden), (hidden, hidden), (hidden, outputs)]
        if windows is not None:
            (W, L), features = windows.shape, math.ceil(hidden / 8)
            layers[:2] = (L, features), (W * features, hidden)
        for (n_in, n_out), gain in zip(layers, (math.sqrt(2), math.sqrt(2), output_gain)):
            self.weights.append(torch.empty(P, n_in, n_out))
            self.biases.append(torch.zeros(P, 1, n_out))
            for weight in self.weights[-1]:
                nn.init.orthogonal_(weight, gain)

    def forward(self, x):
        if self.windows is not None and x.dim() == 4:  # a rollout: step by step it stays in cache, 68 ms, not 180
            return torch.stack([self(x_t) for x_t in x])
        P, lead = len(self.weights[0]), x.shape[:-1]
        x = x.flatten(0, -2)[None] if P == 1 else x.flatten(0, -3).transpose(0, 1)  # (P, rows, inputs)
        if self.windows is not None:
            x = x.gather(-1, self.windows.flatten().expand(*x.shape[:2], -1))  # (P, rows, W * L)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = x.relu() if i else x
            x = x.reshape(P, -1, weight.shape[1])  # (P, rows, n_in), in a layer with windows (P, rows * W, n_in)
            x = torch.baddbmm(bias, x, weight)
        return x.transpose(0, 1).reshape(*lead, x.shape[-1])


def gumbel(*shape, generator=None):
    """Noise that makes the argmax of logits + noise a sample of their softmax."""
    return -torch.empty(shape).exponential_(generator=generator).log()


class Team(nn.Module):
    """The policies pi(a^g|o^g) and values of all agents, and the statistics that scale what both see. Acting, learning,
    evaluation and checkpoints all use this class. Each parameter has P, the learners, as its first dimension."""

    def __init__(self, world, args):
        super().__init__()
        self.G, self.P = world.num_agents, 1 if args.share_params else world.num_agents
        self.critic_sees = args.critic_input if args.algorithm == "mappo" else "obs"
        self.discrete = isinstance(world.action_space, gym.spaces.Discrete)
        self.action_dim = A = int(world.action_space.n if self.discrete else world.action_space.shape[0])
        self.register_buffer("identity", torch.eye(self.G), persistent=False)
        ids = self.G if self.P < self.G else 0  # the one-hot agent id, where agents share a network
        sizes = {"obs": world.obs_dim, "state": world.state_dim, "state-actions": world.state_dim + self.G * A}
        windows = getattr(world, "windows", None)
        self.actor = StackedMLP(self.P, world.obs_dim + ids, args.hidden_size, A, 0.01, windows)
        self.critic = StackedMLP(self.P, sizes[self.critic_sees] + ids, args.hidden_size, 1, 1.0, windows)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(self.P, A))  # the same in all states; ppo_clip.py says why
        scaled = args.norm_obs  # else the first two lists are empty
        self.obs_rms = nn.ModuleList(RunningMeanStd(world.obs_dim) for _ in range(self.P * scaled))
        self.state_rms = nn.ModuleList(RunningMeanStd(world.state_dim) for _ in range(scaled))
        self.value_rms = nn.ModuleList(RunningMeanStd() for _ in range(self.P))

    def scaled_obs(self, obs):  # (..., G, D), by each learner's own statistics
        return torch.cat([rms(x) for rms, x in zip(self.obs_rms, obs.chunk(self.P, -2))], -2) if self.obs_rms else obs

    def scaled_state(self, state):  # (..., S)
        return self.state_rms[0](state) if self.state_rms else state

    def with_id(self, x):  # (..., G, inputs)
        return x if self.P == self.G else torch.cat([x, self.identity.expand(*x.shape[:-1], self.G)], -1)

    def policy_parameters(self, obs, legal):
        """At scaled observations (..., G, D): log-probabilities (..., G, A), or mean and log std (..., G, 2A).
        Illegal actions have probability 0. An action dimension that an agent does not have gets mean 0 and the standard
        deviation whose entropy is 0, whatever the network says, so no gradient flows."""
        out = self.actor(self.with_id(obs))
        if self.discrete:
            return out.masked_fill(~legal, -1e8).log_softmax(-1)  # NOTE: not -inf: the entropy's gradient would be nan
        log_std, no_entropy = self.log_std.expand_as(out), -0.5 * math.log(2 * math.pi * math.e)
        return torch.cat([out.where(legal, 0), log_std.where(legal, no_entropy)], -1)

    def distribution(self, parameters):
        if self.discrete:
            return Categorical(logits=parameters)
        mean, log_std = parameters.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)  # log-probabilities are summed over an agent's dimensions

    def policy(self, obs, legal):
        """The distributions pi(.|o^g) at scaled observations (..., G, D)."""
        return self.distribution(self.policy_parameters(obs, legal))

    def value(self, obs, state, action):
        """V at scaled obs (..., G, D) or state (..., S), in units of the normalised return. (..., G)"""
        x = obs
        if self.critic_sees != "obs":
            x = state.unsqueeze(-2).expand(*state.shape[:-1], self.G, -1)  # V(s, g)
        if self.critic_sees == "state-actions":  # V(s, a^-g)
            x = torch.cat([x, self.actions_of_others(action)], -1)
        return self.critic(self.with_id(x)).squeeze(-1)

    def actions_of_others(self, action):
        """What each agent's critic sees of the actions (..., G) or (..., G, A): all, its own as zeros. (..., G, G*A)

        V(s, a^-g) knows what the others did, so their choices are no longer noise in agent g's advantage. And it does
        not bias the policy gradient. Let b be any function of s and a^-g, and let all agents draw independently:

            E[ grad log pi(a^g|o^g) b(s, a^-g) ]
              = E_{s,o} E_{a^-g|o} [ b(s, a^-g)  sum_{a^g} pi(a^g|o^g) grad log pi(a^g|o^g) ]      independence
              = E_{s,o} E_{a^-g|o} [ b(s, a^-g)  grad sum_{a^g} pi(a^g|o^g) ]  =  0                the sum is always 1

        So b may be subtracted, as in COMA's counterfactual baseline (Foerster et al. 2018). NOTE: were agent g's own
        action among its inputs, b could not leave the sum, and the gradient would be biased.
        """
        taken = one_hot(action, self.action_dim).float() if self.discrete else action.clamp(-1, 1)  # (..., G, A)
        others = (1 - self.identity)[..., None]  # (G, G, 1)
        return (taken.unsqueeze(-3) * others).flatten(-2)

    def noise(self, *lead):
        """The random numbers of one action of each agent: Gumbel or, for Box, standard normal. (*lead, G, A)"""
        shape = (*lead, self.G, self.action_dim)
        return gumbel(*shape) if self.discrete else torch.randn(shape)

    def act(self, obs, legal, noise):
        """Sample actions at raw observations (N, G, D) by means of noise (N, G, A), which comes from outside. Noise 0.0
        gives the likeliest actions. Returns (N, G) or, for Box, (N, G, A)."""
        parameters = self.policy_parameters(self.scaled_obs(obs), legal)
        if self.discrete:
            return (parameters + noise).argmax(-1)  # a sample of the softmax: the Gumbel-max trick
        mean, log_std = parameters.chunk(2, -1)
        return (mean + log_std.exp() * noise).where(legal, 0.0)  # 0 where a narrower agent has no such action

    def value_scale(self):
        """Mean and standard deviation of the returns, (P,) each: a value is mean + std * the critic's output."""
        mean, inv_std = [rms.mean for rms in self.value_rms], [rms.inv_std for rms in self.value_rms]
        return torch.stack(mean).float(), 1 / torch.stack(inv_std).float()

    @torch.no_grad()
    def update_statistics(self, rollout, returns):
        """Let a rollout's states, and the observations and returns (T, N, G) of living agents, enter the statistics.

        NOTE: the critic's last layer is rescaled so that new units change no value (PopArt, van Hasselt et al. 2016).
        Without it, a growing standard deviation stretches all values, and so the next targets, which bootstrap from
        them, and it grows even more."""
        old_mean, old_std = (x.view(-1, 1, 1) for x in self.value_scale())
        chunks = (x.chunk(self.P, 2) for x in (rollout["alive"] > 0, returns, rollout["obs"]))
        for p, (alive, returns_p, obs_p) in enumerate(zip(*chunks)):
            if alive.any():
                self.value_rms[p].update(returns_p[alive])
                if self.obs_rms:
                    self.obs_rms[p].update(obs_p[alive])
        if self.state_rms and "state" in rollout:
            self.state_rms[0].update(rollout["state"].flatten(0, 1))
        mean, std = (x.view(-1, 1, 1) for x in self.value_scale())
        weight, bias = self.critic.weights[-1], self.critic.biases[-1]
        weight.mul_(old_std / std)
        bias.copy_((old_std * bias + old_mean - mean) / std)

    def forward(self, function, *args):
        """function(team, *args): so functional_call(team, parameters, (function, *args)) works for any function."""
        return function(self, *args)


# ==== Collecting ======================================================================================================
#
# PPO's Algorithm 1, lines 2 and 3: the old policies act for T steps in N environments. A rollout is a dict of tensors:
# the views before all steps, (T, N, ...) each; their successors, as next_obs and so on; action (T, N, G) or
# (T, N, G, A); reward and terminated (T, N, G); over (T, N). Only policies are evaluated here. Values and
# log-probabilities follow in one large batch (make_team_batch), since no parameter moves during a rollout. Why many
# copies at once? Each step then costs one product of matrices for all of them, and their samples have less in common.


def empty_rollout(team, world, T, N):
    """A rollout of zeros, with as much of the view as the team needs: the state only where its critic sees it."""
    G, A = team.G, team.action_dim
    shapes = {"obs": (G, world.obs_dim), "state": (world.state_dim,), "legal": (G, A), "alive": (G,)}
    if team.critic_sees == "obs":
        del shapes["state"]
    shapes |= {f"next_{key}": shape for key, shape in shapes.items()}
    shapes |= {"reward": (G,), "terminated": (G,), "over": (), "action": (G,) if team.discrete else (G, A)}
    dtypes = {"legal": torch.bool, "next_legal": torch.bool} | ({"action": torch.long} if team.discrete else {})
    return {key: torch.zeros(T, N, *shape, dtype=dtypes.get(key)) for key, shape in shapes.items()}


class TeamEnvironments:
    """The n of the N environments that one process runs, and their state between two rollouts."""

    def __init__(self, args, part, old_team, noise, rollout, world=None):
        self.part = part  # their slice of range(N)
        self.old_team, self.noise, self.rollout = old_team, noise, rollout  # in memory that all processes share
        self.world = world or PettingZoo(args, part.stop - part.start)
        self.envs = getattr(self.world, "envs", ())  # there is nothing to close in a built-in world
        self.all_steps = CudaGraph(self.steps) if args.cuda and world else self.steps

    def run(self, seeds=()):
        """T steps of old_team in each environment, written into their columns of the rollout. With seeds (N,), all
        begin new episodes first."""
        self.t = 0
        named = named_failures(lambda: f"environment {self.part.start + self.world.at}, step {self.t} of the rollout")
        with named if self.envs else contextlib.nullcontext():
            if len(seeds):
                self.world.reset(seeds[self.part] if self.envs else torch.Generator().manual_seed(int(seeds[0])))
            self.all_steps()

    @torch.no_grad()
    def steps(self):
        # NOTE: every process gives the policies all N rows, zeros where the environment is not its own. Matrices of
        # another size may be rounded differently, and the number of processes must not change a run.
        obs, legal = (torch.zeros_like(self.rollout[key][0]) for key in ("obs", "legal"))
        view = self.world.view()
        for t, (noise, world_noise) in enumerate(zip(*self.noise)):
            self.t = t
            obs[self.part], legal[self.part] = view["obs"], view["legal"]
            action = self.old_team.act(obs, legal, noise)[self.part]  # (n, G) or (n, G, A)
            next_view, successor, reward, terminated, over = self.world.step(action, world_noise)
            now = view | {f"next_{key}": x for key, x in successor.items()}
            now |= {"action": action, "reward": reward, "terminated": terminated, "over": over}
            for key, x in self.rollout.items():
                x[t, self.part] = now[key]
            view = next_view


# ==== Advantages, loss, update ========================================================================================
#
# From here on it is PPO, once for each learner: the same advantages, the same clip, the same Adam as in ppo_clip.py. A
# sample counts only where its agent was alive. Each learner averages over its own samples and clips its own gradient,
# so that learners who share nothing do not disturb each other either.


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
def make_team_batch(team, rollout, args):
    """All that the update needs of the rollout, the old policies and the old values: tensors (B, ...). Returns this
    batch, and the lambda-returns (T, N, G) in units of the reward."""
    device = team.identity.device
    rollout = {key: x.to(device) for key, x in rollout.items()}
    action, leaves = rollout["action"], rollout["alive"] - rollout["next_alive"]  # (T, N, G) or (T, N, G, A), (T, N, G)
    # An agent is done when it terminates, when the episode ends for all, or when it leaves before the others.
    done = torch.maximum(rollout["terminated"], rollout["over"][..., None]).maximum(leaves)
    obs, next_obs = (team.scaled_obs(rollout[key]) for key in ("obs", "next_obs"))  # (T, N, G, D)
    state, next_state, next_action = None, None, action
    if team.critic_sees != "obs":
        state, next_state = (team.scaled_state(rollout[key]) for key in ("state", "next_state"))  # (T, N, S)
    if team.critic_sees == "state-actions":
        # The next actions are known, except at the last step and where an episode ended. There the policies are asked.
        next_action = team.act(rollout["next_obs"], rollout["next_legal"], team.noise(*done.shape[:2]).to(device))
        goes_on = rollout["over"][:-1] == 0  # (T-1, N)
        next_action[:-1][goes_on] = action[1:][goes_on]
    mean, std = team.value_scale()
    value, next_value = team.value(obs, state, action), team.value(next_obs, next_state, next_action)  # (T, N, G)
    reward, shared = rollout["reward"], {"sum": torch.sum, "mean": torch.mean}.get(args.team_reward)
    if shared:  # each agent gets the whole team's
        reward = shared(reward, -1, keepdim=True).expand_as(reward)  # (T, N, G)
    raw_value, next_raw_value = mean + std * value, mean + std * next_value  # in units of the reward, (T, N, G)
    advantage = gae(reward, raw_value, next_raw_value, rollout["terminated"], done, args.gamma, args.gae_lambda)
    returns = advantage + raw_value
    batch = {"obs": obs, "legal": rollout["legal"], "alive": rollout["alive"], "action": action}
    batch |= {"logprob": team.policy(obs, rollout["legal"]).log_prob(action)}
    batch |= {"advantage": advantage, "value": value, "return": (returns - mean) / std, "state": state}
    return {key: x.flatten(0, 1) for key, x in batch.items() if x is not None}, returns


def clipped_surrogate(ratio, advantage, clip_coef):
    """min(r A, clip(r, 1-eps, 1+eps) A) per sample: PPO eq. (7). (M, ...), (M, ...) -> (M, ...)"""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def team_loss(team, minibatch, coef, norm_adv):
    """-L(theta) on one minibatch, summed over learners, and a dict of scalars to log, averaged over learners. The
    minibatch has rows of make_team_batch's batch (M, ...). coef: the float flags by name, as tensors."""
    weight = minibatch["alive"].reshape(-1, team.P)  # (rows, P): P = 1 learns from the samples of all agents alike
    weight = weight / weight.sum(0).clamp(min=1)

    def mean(x):  # (M, G) -> (P,)
        return (weight * x.reshape(-1, team.P)).sum(0)

    advantage = minibatch["advantage"]
    if norm_adv:
        centred = advantage - mean(advantage)
        advantage = centred / (mean(centred.square()).sqrt() + 1e-8)  # (M, G)

    policy = team.policy(minibatch["obs"], minibatch["legal"])
    # A dead agent's ratio is set to 1: its weight 0 would not undo an overflow, as 0 * inf is nan.
    log_ratio = (policy.log_prob(minibatch["action"]) - minibatch["logprob"]) * minibatch["alive"]  # (M, G)
    ratio = log_ratio.exp()
    policy_loss = -mean(clipped_surrogate(ratio, advantage, coef["clip_coef"]))
    value = team.value(minibatch["obs"], minibatch.get("state"), minibatch["action"])
    value_loss = mean((value - minibatch["return"]).square())
    entropy = mean(policy.entropy())
    loss = (policy_loss + coef["vf_coef"] * value_loss - coef["ent_coef"] * entropy).sum()

    logged = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    logged["approx_kl"] = mean(ratio - 1 - log_ratio)  # an estimate of KL(old||new) that is never negative
    logged["clipfrac"] = mean(((ratio - 1).abs() > coef["clip_coef"]).float())
    return loss, {key: x.mean() for key, x in logged.items()}


def update_team(team, state, minibatch, coef, norm_adv):
    """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980, Algorithm 1) on a minibatch. state, here the optimiser's:
    all parameters as one vector, Adam's m and v, its step count t, the sums of what is logged. Returns the next state.

    NOTE: each learner's gradient is clipped by its own norm. With one norm over all, an agent with large gradients
    would shorten the steps of agents that it has nothing to do with.
    """

    def loss(vector):
        return functional_call(team, named_parts(team, vector), (team_loss, minibatch, coef, norm_adv))

    grad, logged = gradient(loss, state["parameters"])
    parts = [x.flatten(1) for x in named_parts(team, grad).values()]  # (P, ...) each
    norm = sum(x.square().sum(1) for x in parts).sqrt()  # (P,)
    factor = (coef["max_grad_norm"] / (norm + 1e-6)).clamp(max=1)[:, None]
    grad = torch.cat([(x * factor).flatten() for x in parts])
    t, m, v = state["t"] + 1, state["m"].lerp(grad, 0.1), state["v"].lerp(grad.square(), 0.001)
    direction = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
    sums = state["sums"] + torch.stack([*logged.values(), norm.mean()])
    parameters = state["parameters"] - coef["learning_rate"] * direction
    return {"parameters": parameters, "m": m, "v": v, "t": t, "sums": sums}


# ==== Training ========================================================================================================
#
# PPO's Algorithm 1: collect with the old policies, estimate advantages, update, and again. All agents learn in the same
# update, whether they share a network or not: each sees the others change once an iteration, not in between. Self-play
# first chooses the opponents.


def train(args: Args) -> dict:
    """Train by MAPPO, IPPO or self-play. Returns a summary: global_step, episodes, episodic_return and episodic_length
    (means of the last 100 episodes; returns are raw, and summed over agents), returns (of the episodes of this call, at
    most 100), checkpoint (its path), signal (the one that ended the run, or None). Raises UserError before anything is
    written, RunFailed where a run cannot go on."""
    check_args(args)
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(1)  # with networks this small a second thread costs more than it brings
    torch.manual_seed(args.seed)
    world = make_world(args, args.num_envs, device)  # an id that does not exist ends here
    team = Team(world, args)
    actors = TeamActors(args, world, team)
    team.to(device)

    # What the update reads stays in one place and is overwritten there, as a CUDA graph demands. Hyperparameters are
    # tensors, too: neither a schedule nor a mutation by the PBT launcher makes the compiler start again.
    B = args.num_steps * args.num_envs
    coef = {f.name: torch.tensor(getattr(args, f.name), device=device) for f in fields(Args) if f.type is float}
    data, _ = make_team_batch(team, actors.rollout, args)  # of an empty rollout: this sets the shapes
    data = {key: x.clone() for key, x in data.items()}  # some are the rollout's own memory
    order = torch.zeros(args.num_minibatches, B // args.num_minibatches, dtype=torch.long, device=device)
    names = [*team_loss(team, data, coef, args.norm_adv)[1], "grad_norm"]
    state = initial_state(team, len(names))
    run_epoch = accelerated(args, update_team, team, state, data, order, coef, args.norm_adv)
    run = Run(args, team, state, actors)
    pool = Pool(args, **run.adapted) if args.algorithm == "selfplay" else None
    global_step = run.global_step
    if global_step >= run.last_step:
        say(f"nothing to do: {args.resume} is at step {global_step} already")
        return run.summary(global_step)

    cut, finished = True, False  # cut: all environments begin new episodes, since a checkpoint cannot hold the old ones
    with actors, run:
        run.begin()
        while not finished:
            remaining = 1 - global_step / args.total_timesteps  # from 1 to 0
            coef["learning_rate"].fill_(args.learning_rate * (remaining if args.lr_schedule == "linear" else 1))
            coef["ent_coef"].fill_(args.ent_coef * (args.ent_final + (1 - args.ent_final) * remaining))

            # ---- self-play: who sits on the other side ---------------------------------------------------------------
            if pool:
                if (global_step // B) % pool.every == 0:
                    pool.add(team, world, global_step)
                world.set_opponents(pool.draw(team, world.OPPONENTS))
                if args.opening_plies:
                    world.new_openings(args.opening_plies)

            # ---- collect: run the old policies for T steps in N environments -----------------------------------------
            rollout = actors.collect(team, seed=(args.seed, global_step) if cut or pool else None)

            # ---- estimate advantages ---------------------------------------------------------------------------------
            # NOTE: acting and updating must scale observations alike, or the data would not be pi_old's. So the
            # statistics take in a rollout only after the update has learned from it. The first one is the exception: a
            # new policy's last layer is so small that scaling hardly changes how it acts, and the critic begins scaled.
            batch, returns = make_team_batch(team, rollout, args)
            if global_step == 0:
                team.update_statistics(rollout, returns)
                batch, returns = make_team_batch(team, rollout, args)
            for key, x in batch.items():
                data[key].copy_(x)

            # ---- update: K epochs of minibatches ---------------------------------------------------------------------
            state["sums"].zero_()
            for _ in range(args.update_epochs):
                order.copy_(torch.randperm(B).view_as(order))
                run_epoch()
            if global_step > 0:
                team.update_statistics(rollout, returns)
            global_step += B

            # ---- log, checkpoint -------------------------------------------------------------------------------------
            losses = dict(zip(names, (state["sums"] / (args.update_epochs * args.num_minibatches)).tolist()))
            value, target = (data[key][data["alive"] > 0] for key in ("value", "return"))
            losses |= {"explained_variance": 1 - ((target - value).var() / target.var()).item()}
            charts = {"learning_rate": coef["learning_rate"].item()} | actors.by_agent()
            run.log(global_step, B, charts | (pool.strength if pool else {}), losses)
            finished = global_step >= run.last_step or run.signal is not None
            cut = finished or global_step % args.checkpoint_every < B  # or it has just passed a multiple
            if cut:
                run.save(global_step, **({"snapshots": pool.snapshots, "strength": pool.strength} if pool else {}))
    return run.summary(global_step)


# ==== Self-play =======================================================================================================
#
# Against a fixed opponent a policy learns to exploit it. Against itself it always meets an equal, and both get better.
# But a policy that only knows its present self may run in circles: what beats today's policy may lose to last week's.
# So some boards are played against snapshots of the past (as in Bansal et al. 2018, arXiv 1710.03748), kept in a pool.
# On each board the learner is one player. The other is a part of its world: nothing is learned from the other's moves.
#
# Every iteration draws new opponents and begins all games anew. Where that cuts a game off, the value of its last
# position stands for the rest. All opponents have the same number of boards, so that one product of stacked matrices
# moves them all.


class SelfPlay:
    """A two-player zero-sum game as a world with one agent. A step is the agent's ply (one player's move) and the
    opponent's reply. Each side sees the board from its own point of view. The reward is 1 for a win and -1 for a loss,
    whoever made the last ply. The other player opens the next game. So nobody ever has to pass, and a loser begins."""

    num_agents, OPPONENTS = 1, 8  # OPPONENTS: how many are met in one iteration

    def __init__(self, game, args):
        self.game, self.obs_dim, self.state_dim = game, game.obs_dim, game.obs_dim
        self.windows = getattr(game, "windows", None)
        self.action_space = gym.spaces.Discrete(game.num_actions)
        self.opponents = StackedMLP(self.OPPONENTS, self.obs_dim, args.hidden_size, game.num_actions, 0.0, self.windows)
        self.opponents.to(game.device)  # their last layer is 0, so until set_opponents they play at random

    def set_opponents(self, actors):
        """Play against these from now on: the parameters of OPPONENTS actors, as Pool.draw returns them."""
        self.opponents.load_state_dict({name: torch.cat([x[name].cpu() for x in actors]) for name in actors[0]})

    def new_openings(self, most):
        """Without random openings a policy would know nothing of positions that good play never comes to. From now on,
        half of the boards begin their games after 1 to `most` random plies. One that would end the game is left out."""
        game, N = self.game, self.game.num_envs
        plies = (torch.randint(1, most + 1, (N,)) * (torch.rand(N) < 0.5)).to(game.device)  # (N,)
        opening, noise = type(game)(N, game.device), gumbel(most, N, game.num_actions).to(game.device)
        for ply in range(most):
            before, (_, legal) = opening.boards.clone(), opening.view()
            _, over = opening.play(noise[ply].masked_fill(~legal, -1e8).argmax(-1))  # a random legal one
            stays = over | (plies <= ply)
            opening.boards.copy_(torch.where(stays[:, None], before, opening.boards))
        game.opening.copy_(opening.boards)

    @torch.no_grad()
    def reset(self, generator):
        """All games begin anew, on a random half of the boards with the opponent's move."""
        N, device = self.game.num_envs, self.game.device
        self.game.restart(torch.ones(N, dtype=torch.bool, device=device))
        _, over = self.game.play(self.opponents_move(gumbel(N, self.action_space.n, generator=generator).to(device)))
        self.game.restart(over | (torch.rand(N, generator=generator) < 0.5).to(device))

    def noise(self, T):
        return gumbel(T, self.game.num_envs, self.action_space.n)  # for the opponents' moves

    def view(self):
        obs, legal = self.game.view()
        return {"obs": obs[:, None], "state": obs, "legal": legal[:, None], "alive": torch.ones_like(obs[:, :1])}

    def step(self, action, noise):
        won, over = self.game.play(action[:, 0])  # (N,) each
        self.game.restart(over)  # there the opponent begins the next game; elsewhere it replies
        lost, ended = self.game.play(self.opponents_move(noise))
        lost = lost * ~over  # NOTE: an opening can be so good that the opponent wins the next game with its first ply
        self.game.restart(ended)
        # Every end is terminal, so no value is taken of its successor: the next game's view will do.
        view, over = self.view(), (over | ended).float()
        return view, view, (won - lost)[:, None], over[:, None], over

    def opponents_move(self, noise):
        obs, legal = self.game.view()
        logits = self.opponents(obs.view(-1, self.OPPONENTS, self.obs_dim))  # board n: opponent n % OPPONENTS
        return (logits.flatten(0, 1).masked_fill(~legal, -1e8) + noise).argmax(-1)


class Pool:
    """Snapshots of the actor, taken at equal intervals; a part of the checkpoint."""

    def __init__(self, args, snapshots=(), strength=()):
        self.args, batch = args, args.num_envs * args.num_steps
        self.every = math.ceil(args.total_timesteps / batch / args.pool_size)  # iterations
        self.snapshots, self.strength = list(snapshots), dict(strength)
        if snapshots[1:]:  # resumed with a longer run: thin out the snapshots to the new interval
            self.snapshots = snapshots[:: math.ceil(self.every * batch / snapshots[1]["global_step"])]

    def add(self, team, world, global_step):
        """Measure the team, then add it."""
        self.measure(team, world, global_step)
        actor = {key: x.cpu().clone() for key, x in team.actor.state_dict().items()}
        self.snapshots.append({"global_step": global_step, "actor": actor})

    def draw(self, team, n):
        """The parameters of n opponents: a share latest_prob is the team's; the others are snapshots, drawn at random
        with replacement."""
        present = round(n * self.args.latest_prob)
        past = torch.randint(len(self.snapshots), (n - present,)).tolist()
        return [team.actor.state_dict()] * present + [self.snapshots[i]["actor"] for i in past]

    def measure(self, team, world, seed):
        """Score against random play and against the middle snapshot. A score against training's own opponents would say
        little: it can stay near 1/2 while both sides become stronger, or weaker."""
        middle = self.snapshots[len(self.snapshots) // 2]["actor"] if self.snapshots else team.actor.state_dict()
        with torch.random.fork_rng(devices=()):  # training's random numbers go on as if nothing had been played
            torch.manual_seed(seed)
            arena = SelfPlay(type(world.game)(96, world.game.device), self.args)  # its opponents play at random
            self.strength["selfplay/score_random"] = (first_episodes(team, arena, sampled=True).mean().item() + 1) / 2
            arena.set_opponents([middle] * arena.OPPONENTS)
            self.strength["selfplay/score_middle"] = (first_episodes(team, arena, sampled=True).mean().item() + 1) / 2


@torch.no_grad()
def first_episodes(team, world, sampled=False):
    """Begin an episode in each environment of a built-in world and play it to its end, with the likeliest actions or
    with sampled ones. Returns (N, G), raw."""
    world.reset(torch.default_generator)
    view, returns = world.view(), 0.0
    playing = view["alive"][:, :1] > 0  # (N, 1)
    while playing.any():
        noise = team.noise(len(playing)).to(playing.device) if sampled else 0.0
        action = team.act(view["obs"], view["legal"], noise)
        view, _, reward, _, over = world.step(action, world.noise(1)[0].to(playing.device))
        returns, playing = returns + playing * reward, playing & (over[:, None] == 0)
    return returns


# ==== Worlds that are built in ========================================================================================
#
# Two worlds are small enough to be written here as tensors, all N copies at once: a hundred times as fast as one by
# one in Python, and on a GPU a whole rollout is one launch. Tests compare both with the packages they rebuild.


class SimpleSpread:
    """Three agents are to cover three landmarks without bumping into each other (Lowe et al. 2017). The same numbers as
    mpe2's simple_spread_v3, whose time limit is 25 steps. NOTE: not the MAPPO paper's: docs/multiagent.md converts."""

    num_agents, obs_dim, state_dim = 3, 18, 54
    action_space, length = gym.spaces.Discrete(5), 25

    def __init__(self, num_envs, device):
        self.num_envs = num_envs
        self.position, self.velocity, self.landmark = torch.zeros(3, num_envs, 3, 2, device=device)  # (N, 3, 2) each
        self.clock = torch.zeros(num_envs, device=device)
        self.force = torch.tensor([[0.0, 0], [-5, 0], [5, 0], [0, -5], [0, 5]], device=device)  # by action: see step
        self.others = torch.tensor([[1, 2], [0, 2], [0, 1]], device=device)
        self.always = torch.ones(num_envs, 3, 5, dtype=torch.bool, device=device)

    def noise(self, T, generator=None):  # where agents and landmarks are, should a new episode begin
        return torch.rand(T, self.num_envs, 2, 3, 2, generator=generator)

    def reset(self, generator):
        self.begin(torch.ones_like(self.clock), self.noise(1, generator)[0].to(self.clock.device))

    def begin(self, where, noise):  # new episodes where `where` (N,) is not 0
        where = where.view(-1, 1, 1) > 0
        self.position.copy_(torch.where(where, 2 * noise[:, 0] - 1, self.position))
        self.landmark.copy_(torch.where(where, 2 * noise[:, 1] - 1, self.landmark))
        self.velocity.mul_(~where)
        self.clock.mul_(~where[:, 0, 0])

    def view(self):
        to_landmarks = self.landmark[:, None] - self.position[:, :, None]  # (N, agent, landmark, 2)
        to_others = self.position[:, self.others] - self.position[:, :, None]  # (N, agent, the two others, 2)
        seen = [self.velocity, self.position, to_landmarks.flatten(2), to_others.flatten(2)]
        obs = nn.functional.pad(torch.cat(seen, -1), (0, 4))  # what others say; nobody speaks in this scenario
        return {"obs": obs, "state": obs.flatten(1), "legal": self.always, "alive": self.always[..., 0]}

    def step(self, action, noise):  # (N, 3): nothing, left, right, down, up
        apart = self.position[:, :, None] - self.position[:, None]  # (N, 3, 3, 2)
        distance = apart.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        penetration = 1e-3 * nn.functional.softplus((0.3 - distance) / 1e-3)  # two radii of 0.15
        push = (100 * apart / distance * penetration).sum(2)  # (N, 3, 2), by the other agents
        self.position.add_(0.1 * self.velocity)  # with the old velocity, as mpe2 does since 2023
        self.velocity.mul_(0.75).add_(0.1 * (self.force[action] + push))
        touching = (self.position[:, :, None] - self.position[:, None]).norm(dim=-1) < 0.3  # (N, 3, 3)
        bumps = touching.sum(-1) - 1  # nobody bumps into itself
        uncovered = (self.landmark[:, :, None] - self.position[:, None]).norm(dim=-1).amin(-1).sum(-1, keepdim=True)
        reward = -0.5 * (uncovered + bumps)  # (N, 3): uncovered (N, 1) is common to all, bumps are an agent's own
        self.clock.add_(1)
        successor, over = self.view(), (self.clock == self.length).float()
        self.begin(over, noise)
        return self.view(), successor, reward, torch.zeros_like(reward), over


class ConnectFour:
    """N boards of Connect Four, 6 rows of 7 columns. A player's stones are the bits of an int64: bit 7 * column + row,
    the seventh bit of a column staying empty. The side to move sees three planes of 42 cells: its own stones, the
    other's, and where a stone can fall now.

    A position and its mirror image have the same value, so players are always shown the same one of the two. What they
    learn on one side they know on the other, and half of all positions need not be learned at all.
    The windows (69, 12) are the 69 lines of four cells, in all three planes. Three stones in a line whose last cell can
    be filled now mean the same wherever the line lies, and in whichever direction it runs.
    """

    obs_dim, num_actions, max_plies = 126, 7, 42
    windows = torch.tensor([
        [42 * plane + 6 * (column + right * i) + row + up * i for plane in range(3) for i in range(4)]
        for right, up in ((0, 1), (1, 0), (1, 1), (1, -1))
        for column in range(7 - 3 * right)
        for row in range(6)
        if 0 <= row + 3 * up < 6
    ])  # fmt: skip

    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, device
        self.boards = torch.zeros(num_envs, 2, dtype=torch.long, device=device)  # of the side to move, of the other
        self.opening = self.boards.clone()  # where games begin
        self.flipped = torch.zeros(num_envs, dtype=torch.bool, device=device)  # whether players see the mirror image
        self.columns, row = 7 * torch.arange(7, device=device), torch.arange(6, device=device)
        self.cells = (self.columns[:, None] + row).flatten()
        self.full, self.bottoms = int((1 << self.cells).sum()), int((1 << self.columns).sum())

    def restart(self, where):
        self.boards.copy_(torch.where(where[:, None], self.opening, self.boards))

    def view(self):
        """obs (N, 126), legal (N, 7)"""
        mirrored = ((self.boards[..., None] >> self.columns & 127).flip(-1) << self.columns).sum(-1)
        smaller, same = mirrored < self.boards, mirrored[:, 0] == self.boards[:, 0]  # the smaller pair is shown
        self.flipped.copy_(smaller[:, 0] | same & smaller[:, 1])
        boards = torch.where(self.flipped[:, None], mirrored, self.boards)
        # One more in each column: the carry stops in its lowest free cell, or in the seventh bit if it is full.
        playable = boards.sum(1, keepdim=True) + self.bottoms & self.full
        cells = torch.cat([boards, playable], 1)[..., None] >> self.cells & 1  # (N, 3, 42)
        return cells.flatten(1).float(), (playable >> self.columns & 63) != 0

    def column(self, action):
        """The column (N,) that an action at the last view means, and the other way round."""
        return torch.where(self.flipped, 6 - action, action)

    def play(self, action):
        """Drop the mover's stone at what the last view called column `action` (N,); then the other player is to move.
        Returns the mover's score (1: four in a row) and whether the game is over, (N,) each."""
        mine, theirs = self.boards.unbind(1)
        lowest = self.columns[self.column(action)]  # (N,), the bit of the column's lowest cell
        moved = mine | ((mine | theirs) + (1 << lowest) & (63 << lowest))  # the carry stops in the lowest free cell
        four = torch.zeros_like(moved)
        for shift in (1, 6, 7, 8):  # column, diagonals, row
            pairs = moved & (moved >> shift)
            four |= pairs & (pairs >> 2 * shift)
        over = (four != 0) | ((moved | theirs) == self.full)
        self.boards.copy_(torch.stack([theirs, moved], 1))
        return (four != 0).float(), over


WORLDS, GAMES = {"simple_spread": SimpleSpread}, {"connect_four": ConnectFour}


def make_world(args, num_envs, device):
    """The world that --env-id names; of a PettingZoo environment one copy, to learn its shapes. Raises UserError."""
    if args.algorithm == "selfplay":
        return SelfPlay(GAMES[args.env_id](num_envs, device), args)
    return WORLDS[args.env_id](num_envs, device) if args.env_id in WORLDS else PettingZoo(args)


# ==== Plumbing: PettingZoo, and what every script has. A reader who wanted the algorithm can stop here. ===============


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


class PettingZoo:
    """A PettingZoo parallel environment as a world. Its copies move one after the other, on the CPU. Narrower agents
    are padded with zeros. Box actions are mapped so that [-1, 1] is an agent's whole range. Raises UserError."""

    def __init__(self, args, copies=1):
        film = {"render_mode": "rgb_array"} if args.capture_video else {}
        refused = (TypeError, AssertionError, ValueError) if film or args.env_kwargs != "{}" else ()  # bad arguments
        what = f"cannot make {args.env_id} with {args.env_kwargs}{' and render_mode' if film else ''}"
        with named_failures(lambda: what, (*MISTAKES, *refused)):
            try:
                make = pkgutil.resolve_name(f"{args.env_id}.parallel_env")
            except (ImportError, AttributeError, ValueError) as error:
                name, known = getattr(error, "name", None), ", ".join([*WORLDS, *GAMES])  # name: of what is missing
                missing = name in ("mpe2", "pettingzoo", "gymnasium_robotics")
                hint = f" (pip install {name.replace('_', '-')})" if missing else ""
                raise UserError(f"not one of {known}, nor a module with a parallel_env: {error}{hint}") from error
            if "mujoco" in args.env_id:
                with named_failures(lambda: "cannot import mujoco", (Exception,)):  # MUJOCO_GL may be nonsense
                    import mujoco  # here, so that other environments do not need it
                # Silence an irrelevant warning of the v4 environments that would also leave a MUJOCO_LOG.TXT behind.
                mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(text, file=sys.stderr))
            self.envs = [make(**json.loads(args.env_kwargs), **film) for _ in range(copies)]
            self.views, env = [{}] * copies, self.envs[0]  # views: what each copy shows, numpy arrays without N
            self.names = list(env.possible_agents)
            if not self.names:
                raise UserError("it has no agents")
            self.spaces = [env.action_space(name) for name in self.names]
            self.obs_spaces = [self.seen(env.observation_space(name)) for name in self.names]
        self.discrete = all(isinstance(space, gym.spaces.Discrete) for space in self.spaces)
        boxes = all(isinstance(x, gym.spaces.Box) and x.is_bounded() and x.dtype.kind == "f" for x in self.spaces)
        if not (self.discrete or boxes):
            does = "this script does Discrete or bounded float Box"
            raise UserError(f"{args.env_id} has action spaces {self.spaces}; {does}")
        if any(getattr(space, "shape", None) is None or len(space.shape) > 2 for space in self.obs_spaces):
            raise UserError(f"{args.env_id} has observations {self.obs_spaces}; this script is not for images or Dicts")
        widths = np.array([gym.spaces.flatdim(space) for space in self.spaces])
        self.num_agents, A = len(self.names), int(widths.max())
        self.own_actions = np.arange(A) < widths[:, None]  # (G, A)
        self.action_space = gym.spaces.Discrete(A) if self.discrete else gym.spaces.Box(-1, 1, (A,))
        obs_dims = [gym.spaces.flatdim(space) for space in self.obs_spaces]
        self.obs_dim, self.has_state = max(obs_dims), False
        with named_failures(lambda: f"cannot reset {args.env_id}", MISTAKES):
            self.reset([0] * copies)
            seen = [x[:n] for x, n in zip(self.views[0]["obs"], obs_dims)]
            with contextlib.suppress(NotImplementedError, AttributeError):
                state = np.asarray(env.state(), np.float32).ravel()
                # Most show all observations together, and that we have already. Zeros alone do not tell.
                self.has_state = not (state.any() and np.array_equal(state, np.concatenate(seen)))
            self.reset([0] * copies)
            self.state_dim = self.views[0]["state"].size

    @staticmethod
    def seen(x):
        """The observation, or its space, where a dictionary brings an action mask along."""
        return x["observation"] if isinstance(x, dict | gym.spaces.Dict) and "observation" in list(x) else x

    def set_view(self, i, obs, infos, rewards=None):
        """Make the view of copy i from what it returned."""
        view = {"obs": np.zeros((self.num_agents, self.obs_dim), np.float32), "legal": self.own_actions.copy()}
        for g, (name, space) in enumerate(zip(self.names, self.obs_spaces)):
            if name in obs:
                x = checked(self.seen(obs[name]), space.shape, None if rewards is None else rewards.get(name, 0.0))
                view["obs"][g, : gym.spaces.flatdim(space)] = gym.spaces.flatten(space, x)
                own = infos.get(name, {}) | (obs[name] if isinstance(obs[name], dict) else {})
                if self.discrete and np.any(own.get("action_mask", 0)):  # a mask that allows nothing is ignored
                    view["legal"][g, : len(own["action_mask"])] = own["action_mask"]
        alive = np.array([name in self.envs[i].agents for name in self.names])
        view["legal"][~alive] = np.arange(len(view["legal"][0])) < self.discrete  # no noise for the others' critics
        state = np.asarray(self.envs[i].state(), np.float32).ravel() if self.has_state else view["obs"].ravel()
        if not np.isfinite(state).all():
            with np.printoptions(threshold=8):
                raise RunFailed(f"state() returned {' '.join(str(state).split())}: not finite")
        self.views[i] = view | {"state": state, "alive": alive.astype(np.float32)}

    def begin(self, i, seed=None):
        self.at = i  # to be named if it fails
        self.set_view(i, *self.envs[i].reset(seed=seed))

    def move(self, i, action):
        """Step copy i: (G,) or (G, A) -> its view, reward (G,), terminated (G,), whether the episode is over."""
        self.at, env, actions = i, self.envs[i], {}
        for name, space, a in zip(self.names, self.spaces, action):
            if name in env.agents and self.discrete:
                actions[name] = int(a) + int(space.start)
            elif name in env.agents:
                unit = (a[: np.prod(space.shape, dtype=int)].reshape(space.shape).clip(-1, 1) + 1) / 2
                actions[name] = (space.low + unit * (space.high - space.low)).astype(space.dtype)
        obs, rewards, terminations, truncations, infos = env.step(actions)
        self.set_view(i, obs, infos, rewards)
        by_agent = [[x.get(name, 0) for name in self.names] for x in (rewards, terminations)]
        return self.views[i], *np.array(by_agent, np.float32), not env.agents

    def reset(self, seeds):
        for i, seed in enumerate(seeds):
            seed_globals(seed)
            self.begin(i, int(seed))

    def noise(self, T):
        return torch.zeros(T)  # their random numbers are their own affair

    def view(self):
        return default_collate(self.views)  # stacked, as tensors

    def step(self, action, noise):
        results = [self.move(i, a) for i, a in enumerate(action.numpy())]
        successor, reward, terminated, over = default_collate(results)
        for i in np.flatnonzero(over):
            self.begin(i)
        return self.view(), successor, reward, terminated, over


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


class TeamActors:
    """The N environments. Those of a built-in world are all in this process, on the device of the team. PettingZoo's
    are spread over processes. Each process runs whole rollouts of its part with the frozen policies; they meet once an
    iteration. The first part is this process's own."""

    def __init__(self, args, world, team):
        T, N, built_in = args.num_steps, args.num_envs, not isinstance(world, PettingZoo)
        device = torch.device("cuda" if args.cuda and built_in else "cpu")
        self.world, self.old_team = world, copy.deepcopy(team).to(device)
        self.noise = team.noise(T, N).to(device), world.noise(T).to(device)  # of the policies, of the world
        self.rollout = {key: x.to(device) for key, x in empty_rollout(team, world, T, N).items()}
        self.episodes, self.last = 0, deque(maxlen=100)  # last: (return, length) of the episodes that ended last
        self.running = torch.zeros(N, team.G + 1)  # returns of the episodes in flight, agent by agent, and their length
        k = 1 if built_in else min(max(args.num_workers, 1), N)  # processes
        shared = self.old_team, self.noise, self.rollout, world if built_in else None
        self.parts = [(args, slice(N * i // k, N * (i + 1) // k), *shared) for i in range(k)]
        if not built_in:
            close(*world.envs)
            self.old_team.share_memory()
            for x in (*self.noise, *self.rollout.values()):
                x.share_memory_()

    def __enter__(self):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.own, self.workers = TeamEnvironments(*self.parts[0]), []
        try:
            for part in self.parts[1:]:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, TeamEnvironments, *part), daemon=True)
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

    def collect(self, team, seed=None):
        """A rollout of the team as it is now. seed, a tuple of integers: begin new episodes first. Raises RunFailed."""
        self.old_team.load_state_dict(team.state_dict())
        T, N = self.rollout["over"].shape
        for x, new in zip(self.noise, (team.noise(T, N), self.world.noise(T))):
            x.copy_(new)
        seeds = () if seed is None else np.random.SeedSequence(seed).generate_state(N) >> 1
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
        ended, self.running = [], self.running * (seed is None)
        for reward_t, over_t in zip(self.rollout["reward"].cpu(), self.rollout["over"].cpu() > 0):  # (N, G), (N,)
            self.running += nn.functional.pad(reward_t, (0, 1), value=1.0)
            ended.append(self.running[over_t])
            self.running[over_t] = 0
        self.ended = torch.cat(ended)  # like running, but of the episodes that ended in this rollout
        self.episodes += len(self.ended)
        self.last.extend((sum(returns), int(length)) for *returns, length in self.ended[-100:].tolist())
        return self.rollout

    def statistics(self):
        """Episodes so far, and mean raw return, summed over agents, and length of the last 100."""
        mean_return, mean_length = np.mean(self.last, axis=0).tolist() if self.last else (math.nan, math.nan)
        return {"episodes": self.episodes, "episodic_return": mean_return, "episodic_length": mean_length}

    def by_agent(self):
        """Each agent's mean raw return in the episodes that ended in this iteration; with one agent nothing."""
        means = self.ended.mean(0)[:-1].tolist()
        return {f"returns/agent_{g}": x for g, x in enumerate(means)} if len(means) > 1 else {}


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


@torch.no_grad()
def evaluate(args) -> dict:
    """Run the checkpoint's policies without noise, on the CPU: episodes or, in self-play, games against random play.
    Returns mean, std and raw returns, summed over agents, and the means by agent. Raises UserError."""
    torch.set_num_threads(1)
    N = SelfPlay.OPPONENTS * math.ceil(args.eval_episodes / SelfPlay.OPPONENTS)  # SelfPlay needs a multiple
    world = make_world(args, N, torch.device("cpu"))
    team = Team(world, args)
    checkpoint = load_checkpoint(args.evaluate, args.env_id, team)
    torch.manual_seed(args.seed)
    if isinstance(world, PettingZoo):
        returns = run_episodes(args, team, world, f"step-{checkpoint['global_step']}")  # (K, G)
    else:
        returns = first_episodes(team, world)[: args.eval_episodes]
    total = returns.sum(-1)
    result = {"mean": total.mean().item(), "std": total.std(correction=0).item(), "returns": total.tolist()}
    return result | ({"mean_by_agent": returns.mean(0).tolist()} if team.G > 1 else {})


def run_episodes(args, team, world, name):
    """Returns (K, G) of K episodes of a PettingZoo environment. Raises RunFailed."""
    returns, env = [], world.envs[0]
    hint = " (without a display MuJoCo needs MUJOCO_GL=egl or osmesa)" if args.capture_video else ""
    with named_failures(lambda: f"episode {len(returns)}{hint}", MISTAKES):
        if args.capture_video:
            from gymnasium.utils.save_video import save_video  # here, because it needs moviepy
        seed_globals(args.seed)
        for _ in tqdm(range(args.eval_episodes), unit=" episodes", disable=None):  # shown on a terminal
            world.begin(0, None if returns else args.seed)
            over, total, frames = False, 0.0, []
            while not over:
                frames += [env.render()] if args.capture_video else []
                view = world.view()
                _, reward, _, over = world.move(0, team.act(view["obs"], view["legal"], 0.0)[0].numpy())
                total = total + reward.astype(float)
            if args.capture_video:
                path, more = Path(args.evaluate), {"name_prefix": name, "episode_index": len(returns)}
                more["fps"] = getattr(env, "metadata", {}).get("render_fps", 30)
                folder = (path if path.is_dir() else path.parent) / "videos"
                save_video([*frames, env.render()], folder, lambda n: True, **more)
            returns.append(total)
        env.close()
    return torch.tensor(np.array(returns))


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
    """The command line's Args; flags that are not given: defaults, or with --resume or --evaluate the checkpoint's."""
    process_only = {"resume", "run_dir", "stop_at_step", "num_workers"}  # flags about one process, not about the run
    evaluation = {"evaluate", "eval_episodes", "capture_video"}
    selfplay = {"latest_prob", "opening_plies", "pool_size"}
    teams = {"share_params", "team_reward", "norm_obs"}  # nothing of this is left to choose in self-play
    args = cli(argv)
    given = {x.split("=")[0].strip("-").replace("-", "_").removeprefix("no_") for x in argv if x.startswith("--")}
    default = {"compile": args.total_timesteps >= 200_000 and can_compile()}
    default |= SELFPLAY_DEFAULTS if args.algorithm == "selfplay" else {}
    if source := args.evaluate or args.resume:
        default = load_checkpoint(source, args.env_id if "env_id" in given else None)["args"]
        if "algorithm" in given and args.algorithm != default["algorithm"]:
            raise UserError(f"{source} is of --algorithm {default['algorithm']}, not of {args.algorithm}")
    for key in default.keys() & vars(args).keys() - given - process_only - evaluation:
        setattr(args, key, default[key])
    useless = (  # when, which flags, and what to say of them
        (args.evaluate, given - evaluation - {"env_id", "seed"}, "does nothing with --evaluate"),
        (not args.evaluate, evaluation, "goes with --evaluate"),
        (args.algorithm == "selfplay", teams, "does nothing with --algorithm selfplay"),
        (args.algorithm != "selfplay", selfplay, f"does nothing with --algorithm {args.algorithm}"),
        (args.algorithm != "mappo", {"critic_input"}, "goes with --algorithm mappo"),
        (args.env_id in WORLDS | GAMES, {"env_kwargs", "capture_video"}, f"goes with PettingZoo, not {args.env_id}"),
    )
    for when, flags, what in useless:
        for flag in given & flags if when else ():
            raise UserError(f"--{flag.replace('_', '-')} {what}")
    return args


def check_args(args):
    """Raise UserError for values that cannot work. A number must be positive and finite, unless it is named here."""
    lowest = {"seed": 0, "num_workers": 0, "gamma": 0, "gae_lambda": 0, "ent_coef": 0, "vf_coef": 0}
    lowest |= {"latest_prob": 0, "opening_plies": 0, "ent_final": 0}
    highest = {"gamma": 1, "gae_lambda": 1, "latest_prob": 1, "clip_coef": math.inf}
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
    batch, game, games = args.num_envs * args.num_steps, args.algorithm == "selfplay", ", ".join(GAMES)
    plies, k = GAMES[args.env_id].max_plies if args.env_id in GAMES else 0, SelfPlay.OPPONENTS
    rules = {
        f"{batch} samples do not divide into {args.num_minibatches} minibatches": batch % args.num_minibatches == 0,
        "--norm-adv needs minibatches of at least 2 samples": not args.norm_adv or batch > args.num_minibatches,
        f"--total-timesteps is shorter than one iteration of {batch} steps": args.total_timesteps >= batch,
        f"--algorithm selfplay plays {games}, the others everything else": game == (args.env_id in GAMES),
        f"--num-steps must be at least {(plies + 1) // 2}, or a long game would never end": 2 * args.num_steps >= plies,
        f"--opening-plies must be less than {plies}, or a game would be over": not game or args.opening_plies < plies,
        f"--num-envs must be a multiple of {k} in a game": not game or args.num_envs % k == 0,
    }
    for message, holds in rules.items():
        if not holds:
            raise UserError(message)
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
