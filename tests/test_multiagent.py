"""ppo_multiagent.py: its worlds against the packages they rebuild, its masks and critics, self-play and its pool."""

import csv
import json
import math
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import ppo_clip
import ppo_multiagent as ma

CPU = torch.device("cpu")
COEF = dict(zip(ma.COEFFICIENTS, torch.tensor([1e-3, 0.2, 0.01, 0.5, 10.0])))


class Space:
    """As much of a world as an agent is made from."""

    def __init__(self, num_agents=3, obs_dim=4, state_dim=6, action_space=None):
        self.num_agents, self.obs_dim, self.state_dim = num_agents, obs_dim, state_dim
        self.action_space = action_space or Discrete(5)


def make_agent(world, centralised=True, share=True, seed=0):
    return ma.Agent(world, centralised, share, 16, torch.Generator().manual_seed(seed))


def make_batch(agent, world, B=32, last_layer=100):
    """A batch at the agent's own (far from uniform) policy, with everyone alive and all actions legal."""
    agent.actor.weights[-1].data *= last_layer
    data = ma.empty_batch(agent, world, B)
    for key in set(data) & {"obs", "state", "advantage", "return"}:
        data[key].normal_()
    data["alive"].fill_(1)
    with torch.no_grad():
        data["policy"].copy_(agent.policy(data["obs"], data["legal"]))
        action = torch.randint(5, data["action"].shape) if agent.discrete else torch.randn_like(data["action"])
        data["action"].copy_(action)
        data["logprob"].copy_(agent.dist.log_prob(data["policy"], data["action"]) + 0.3 * torch.randn(B, agent.G))
    return data


def train(tmp_path, *flags):
    return ma.train(ma.parse_args(["--no-compile", "--run-dir", str(tmp_path), *map(str, flags)]))


# ---- worlds ----------------------------------------------------------------------------------------------------------


def test_simple_spread_equals_mpe2():
    """Rewards and observations over 24 x 25 steps from copied states, agents close together: they push and bump."""
    import mpe2.simple_spread_v3

    rng, world = np.random.default_rng(0), ma.SimpleSpread(24, CPU)
    assert not world.reset([0])["obs"].isnan().any()
    bumps = 0
    for n in range(24):
        env = mpe2.simple_spread_v3.parallel_env()
        env.reset(seed=n)
        inner = env.unwrapped.world
        for entity, x in zip([*inner.agents, *inner.landmarks], rng.uniform(-0.3, 0.3, (6, 2))):
            entity.state.p_pos = x
        world.reset([n])
        world.position[n] = torch.tensor(np.array([a.state.p_pos for a in inner.agents]))
        world.landmark[n] = torch.tensor(np.array([e.state.p_pos for e in inner.landmarks]))
        for t in range(25):
            action = rng.integers(5, size=3)
            obs, reward, _, truncated, _ = env.step(dict(zip(env.possible_agents, map(int, action))))
            view, ours, _, over, final = world.step(torch.tensor(action).expand(24, 3))
            seen = final if t == 24 else view
            np.testing.assert_allclose(seen["obs"][n], np.stack(list(obs.values())), atol=1e-5)
            np.testing.assert_allclose(ours[n], list(reward.values()), atol=1e-5)
            np.testing.assert_allclose(seen["state"][n], np.concatenate(list(obs.values())), atol=1e-5)
            positions = np.array([a.state.p_pos for a in inner.agents])
            bumps += min(np.linalg.norm(positions[i] - positions[j]) for i, j in ((0, 1), (0, 2), (1, 2))) < 0.3
            assert over.all() == all(truncated.values()) == (t == 24)
    assert bumps > 20
    assert not torch.allclose(view["obs"][n], seen["obs"][n])  # a new episode has begun


def test_connect_four_equals_open_spiel():
    """Legal moves, stones, results over more than 100 000 random plies."""
    import pyspiel

    N, plies, rng, game = 256, 0, torch.Generator().manual_seed(0), ma.ConnectFour(256, CPU)
    everyone, spiel = torch.ones(N, dtype=torch.bool), pyspiel.load_game("connect_four")
    game.start(everyone)
    states, results = [spiel.new_initial_state() for _ in range(N)], {1: 0, 0: 0}
    while plies < 100_000:
        view = game.view()
        action = torch.multinomial(view["legal"][:, 0].float(), 1, generator=rng)[:, 0]
        for n in range(0, N, 8):
            stones = np.array(states[n].observation_tensor()).reshape(3, 6, 7)  # player 1's, player 0's, none; or so
            mine = {str(stones[0]), str(stones[1])}
            own, other = view["obs"][n, 0].reshape(2, 7, 6).transpose(1, 2).numpy().astype(float)
            assert {str(own), str(other)} <= mine or {str(own), str(other)} <= {str(x) for x in stones}
        legal = view["legal"][:, 0].tolist()
        for n, state in enumerate(states):
            assert [i for i, x in enumerate(legal[n]) if x] == state.legal_actions()
            state.apply_action(int(action[n]))
        score, over = game.play(action, everyone)
        plies += N
        for n in range(N):
            assert over[n] == states[n].is_terminal()
            if over[n]:
                mover = (len(states[n].history()) - 1) % 2
                assert score[n] == states[n].returns()[mover]
                results[int(score[n])] += 1
                states[n] = spiel.new_initial_state()
        game.start(over)
    assert results[1] > 4000 and results[0] > 5


def test_a_pettingzoo_world_row_by_row():
    """Who is alive, padding, masks, rewards, and what is seen last, of agents that die before the others."""
    args = ma.Args(env_id="toy_parallel.mortals", num_envs=2)
    team = ma.Team(ma.make_world(args, 2, CPU))
    agent = ma.Agent(team.world, True, True, 16, torch.Generator().manual_seed(0))
    assert (team.world.num_agents, team.world.obs_dim, team.world.state_dim) == (3, 4, 3)
    team.reset((1, 0))
    r = team.collect(agent, 12, torch.Generator().manual_seed(1))
    step = np.tile(np.arange(5), 3)[:12]
    episode = np.repeat(np.arange(3), 5)[:12]
    for n in range(2):
        np.testing.assert_allclose(r["state"][:12, n], np.stack([np.full(12, 7), episode, step], 1))
        assert r["alive"][:, n, 1].tolist() == (step < 3).tolist() and r["alive"][:, n, [0, 2]].all()
        np.testing.assert_allclose(r["obs"][:12, n, 2, :2], np.stack([episode, step], 1) / 100, rtol=1e-6)
        assert (
            not r["obs"][:12, n, 0, 2:].any() and not r["legal"][:, n, 0, 3].any() and not r["legal"][:, n, 1, 2:].any()
        )
        assert r["legal"][:, n, 1, 0].tolist() == [not (a and t == 0) for a, t in zip(step < 3, step)]
        np.testing.assert_allclose(r["reward"][:, n], np.stack([np.ones(12), 10 * (step < 3), np.full(12, 100)], 1))
        over = (step == 4) & (episode % 2 == 1)
        assert r["terminated"][:, n, 0].tolist() == over.astype(float).tolist()
        assert r["terminated"][:, n, 1].tolist() == ((step == 2) * 1.0).tolist()
        assert r["done"][:, n, 0].tolist() == ((step == 4) * 1.0).tolist()
        assert [t for t, k in r["final_index"].tolist() if k == n] == [4, 9]
    np.testing.assert_allclose(r["final_obs"][:, 0, :2], [[0, 0.05]] * 2 + [[0.01, 0.05]] * 2, rtol=1e-6)
    np.testing.assert_allclose(r["final_state"], [[7, 0, 5]] * 2 + [[7, 1, 5]] * 2)
    assert team.statistics()["episodic_return"] == 5 + 30 + 500 and team.episodes == 4
    assert list(team.statistics_by_agent().values()) == [5, 30, 500]


def test_advantages_bootstrap_from_what_was_seen_before_the_reset():
    """Against the double sum over k of (gamma lambda)^k delta_{t+k}, agent by agent."""
    args = ma.Args(env_id="toy_parallel.mortals")
    team = ma.Team(ma.make_world(args, 2, CPU))
    agent, gamma, lam, T = make_agent(team.world, share=False), 0.9, 0.8, 12
    team.reset((1, 0))
    r = team.collect(agent, T, torch.Generator().manual_seed(1))
    agent.update_normalisers(r, r["reward"], True)
    data = ma.empty_batch(agent, team.world, T * 2)
    returns = ma.prepare_batch(data, agent, r, gamma, lam, "none")
    mean, std = agent.value_scale()
    value = lambda obs, state: mean + std * agent.value(*agent.normalized(obs, state)).detach()  # noqa: E731
    v, final = value(r["obs"], r["state"]), value(r["final_obs"], r["final_state"])
    after = {tuple(i): final[k] for k, i in enumerate(r["final_index"].tolist())}
    advantage = data["advantage"].view(T, 2, 3)
    for n in range(2):
        for g in range(3):
            for t in range(T):
                expected, k = 0.0, t
                while True:
                    following = after.get((k, n), v[k + 1, n])[g] * (1 - r["terminated"][k, n, g])
                    delta = r["reward"][k, n, g] + gamma * following - v[k, n, g]
                    expected += (gamma * lam) ** (k - t) * delta
                    if r["done"][k, n, g] or k == T - 1:
                        break
                    k += 1
                if r["alive"][t, n, g]:
                    assert advantage[t, n, g].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(returns, advantage + v[:-1])
    team_returns = ma.prepare_batch(data, agent, r, 0.0, 0.0, "sum")
    torch.testing.assert_close(team_returns, r["reward"].sum(-1, True).expand_as(team_returns), rtol=1e-4, atol=1e-4)


TAG = ["--env-kwargs", '{"continuous_actions": true}', "--team-reward", "none", "--vectorization", "async"]
REAL = [("mpe2.simple_speaker_listener_v4", ["--no-share-params"]), ("mpe2.simple_tag_v3", TAG)]


@pytest.mark.parametrize("env,flags", REAL)
def test_real_pettingzoo_environments_train_and_resume(env, flags, tmp_path, capsys):
    flags = ["--env-id", env, *flags, "--num-envs", 4, "--checkpoint-every", 100, "--total-timesteps", 200]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--stop-at-step", 100)
    assert ma.main(["--resume", str(tmp_path / "parts")]) == 0
    whole, parts = (ma.load_checkpoint(tmp_path / x)["agent"] for x in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    capsys.readouterr()
    assert ma.main(["--evaluate", str(tmp_path / "whole"), "--eval-episodes", "2"]) == 0
    assert '"mean_by_agent"' in capsys.readouterr().out


def test_minus_one_to_one_is_the_whole_range_of_a_box(tmp_path):
    env = ma.PettingZooEnv("toy_parallel.thrusters", "{}")
    env.reset(seed=0)
    for action, reward in ((0.0, 0), (1.0, -2), (-0.5, -1), (9.0, -2)):
        assert env.step(np.array([[action]]))[0]["reward"] == pytest.approx([reward])


# ---- critics, masks, learners ----------------------------------------------------------------------------------------


def test_one_agent_that_sees_everything_makes_mappo_ippo(tmp_path):
    flags = ["--env-id", "toy_parallel.alone", "--num-envs", 8, "--num-steps", 32, "--total-timesteps", 1024]
    parameters = {}
    for algorithm in ("mappo", "ippo"):
        train(tmp_path / algorithm, "--algorithm", algorithm, *flags)
        agent = ma.load_checkpoint(tmp_path / algorithm)["agent"]
        parameters[algorithm] = {key: x for key, x in agent.items() if "_rms" not in key}
    assert all(torch.equal(x, parameters["ippo"][key]) for key, x in parameters["mappo"].items())


@pytest.mark.parametrize("space", [Discrete(5), Box(-1, 1, (2,))])
def test_one_agents_loss_is_ppo_clips(space):
    """The same loss, metrics and gradient as ppo_clip.ppo_loss on the same networks and batch."""
    world = Space(1, 4, 4, space)
    agent = make_agent(world, centralised=False)
    data = make_batch(agent, world)

    class Row(NamedTuple):  # a row of the tensor that describes a policy, with torch.distributions' methods
        policy: torch.Tensor

        def log_prob(self, action):
            return agent.dist.log_prob(self.policy, action)

        def entropy(self):
            return agent.dist.entropy(self.policy)

    class Single:
        def policy(self, obs):
            return Row(agent.policy(obs[:, None], torch.ones(len(obs), 1, agent.action_dim, dtype=torch.bool))[:, 0])

        def value(self, obs):
            return agent.value(obs[:, None], None)[:, 0]

    single = {key: x[:, 0] for key, x in data.items()}
    ours, our_metrics = ma.multiagent_loss(agent, data, COEF, True)
    theirs, logged = ppo_clip.ppo_loss(Single(), single, COEF, True)
    their_metrics = torch.stack([*logged.values()]).detach()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_metrics, their_metrics)
    assert our_metrics[4] > 0  # some ratios are clipped
    for a, b in zip(*(torch.autograd.grad(x, list(agent.parameters())) for x in (ours, theirs))):
        torch.testing.assert_close(a, b)


def test_separate_learners_are_three_single_ones():
    """Without shared parameters the gradient for agent g is that of an agent alone with g's rows."""
    world, one = Space(), Space(1)
    agent = make_agent(world, centralised=False, share=False)
    data = make_batch(agent, world)
    data["alive"][:7, 1] = 0
    gradient = torch.autograd.grad(ma.multiagent_loss(agent, data, COEF, True)[0], list(agent.parameters()))
    for g in range(3):
        alone = make_agent(one, centralised=False)
        for p, q in zip(alone.parameters(), agent.parameters(), strict=True):
            p.data.copy_(q[g : g + 1])
        rows = {key: x[:, g : g + 1] for key, x in data.items()}
        loss = ma.multiagent_loss(alone, rows, COEF, True)[0]
        for a, b in zip(torch.autograd.grad(loss, list(alone.parameters())), gradient, strict=True):
            torch.testing.assert_close(a, b[g : g + 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
@pytest.mark.parametrize("share", ["--share-params", "--no-share-params"])
def test_the_best_joint_action_is_found(algorithm, share, tmp_path):
    flags = [
        "--env-id",
        "toy_parallel.matrix",
        "--num-envs",
        32,
        "--num-steps",
        4,
        "--total-timesteps",
        12_800,
        "--no-norm-obs",
    ]
    assert (
        train(tmp_path, "--algorithm", algorithm, share, *flags, "--ent-coef", 0)["episodic_return"] > 9.5
    )  # of 2 * 5


def test_permuted_agents_permute_outputs():
    world, order = Space(), [2, 0, 1]
    agent, obs = make_agent(world), torch.randn(10, 3, 4)
    legal = torch.ones(10, 3, 5, dtype=torch.bool)
    assert not torch.allclose(agent.policy(obs[:, order], legal), agent.policy(obs, legal)[:, order])  # ids tell
    for net in (agent.actor, agent.critic):
        net.weights[0].data[:, -3:] = net.weights[0].data[:, -3:-2]  # one identity for all
    torch.testing.assert_close(agent.policy(obs[:, order], legal), agent.policy(obs, legal)[:, order])
    decentral = make_agent(world, centralised=False)
    decentral.critic.weights[0].data[:, -3:] = 0
    torch.testing.assert_close(decentral.value(obs[:, order], None), decentral.value(obs, None)[:, order])


def test_padded_actions_have_no_probability_and_no_gradient():
    world = Space()
    agent = make_agent(world, share=False)
    data = make_batch(agent, world)
    data["legal"][:, 0, 3:] = False
    data["action"].clamp_(max=2)
    policy = agent.policy(data["obs"], data["legal"])
    assert (policy[:, 0, 3:].exp() == 0).all() and agent.dist.entropy(policy).isfinite().all()
    torch.testing.assert_close(policy.exp().sum(-1), torch.ones(32, 3))
    loss = ma.multiagent_loss(agent, data, COEF, True)[0]
    weight, bias = torch.autograd.grad(loss, [agent.actor.weights[-1], agent.actor.biases[-1]])
    assert not weight[0, :, 3:].any() and not bias[0, :, 3:].any()
    assert weight[0, :, :3].any() and weight[1, :, 3:].any()


def test_padded_action_dimensions_have_no_entropy_and_no_gradient():
    world = Space(action_space=Box(-1, 1, (3,)))
    agent = make_agent(world, share=False)
    data = make_batch(agent, world)
    data["legal"][:, 0, 2] = False
    policy = agent.policy(data["obs"], data["legal"])
    assert agent.dist.entropy(policy)[0].tolist() == pytest.approx([2 * 1.4189385, 3 * 1.4189385, 3 * 1.4189385])
    loss = ma.multiagent_loss(agent, data, COEF, True)[0]
    log_std, weight = torch.autograd.grad(loss, [agent.log_std, agent.actor.weights[-1]])
    assert log_std[0, 2] == 0 and not weight[0, :, 2].any() and log_std[0, :2].all() and log_std[1].all()


@pytest.mark.parametrize("share", [True, False])
def test_the_dead_do_not_count(share):
    world = Space()
    agent = make_agent(world, share=share)
    data = make_batch(agent, world)
    data["alive"][10:20, 1] = 0
    before = ma.multiagent_loss(agent, data, COEF, True)
    for key in ("obs", "logprob", "advantage", "return"):
        data[key][10:20, 1] = 1e3 * torch.randn_like(data[key][10:20, 1])
    after = ma.multiagent_loss(agent, data, COEF, True)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    data["alive"][:, 1] = 0  # nobody there at all: still a number
    assert ma.multiagent_loss(agent, data, COEF, True)[0].isfinite()


@pytest.mark.parametrize("share", [True, False])
def test_rescaled_returns_leave_every_value_as_it_was(share):
    world = Space()
    agent = make_agent(world, share=share)
    obs, state = torch.randn(20, 3, 4), torch.randn(20, 6)
    values = lambda: (lambda mean, std: mean + std * agent.value(obs, state))(*agent.value_scale())  # noqa: E731
    rollout = {"alive": torch.ones(20, 5, 3), "obs": torch.randn(21, 5, 3, 4), "state": torch.randn(21, 5, 6)}
    for scale in (1, 100, 0.1):
        before = values()
        agent.update_normalisers(rollout, scale * torch.randn(20, 5, 3) - 30 * scale, False)
        torch.testing.assert_close(values(), before, rtol=1e-4, atol=1e-3)
    assert agent.value_scale()[1].min() > 10 and (agent.obs_rms[0].count, agent.state_rms.count) == (0, 0)


# ---- self-play -------------------------------------------------------------------------------------------------------


class Referee(ma.ConnectFour):
    """Connect Four that counts plies and does not let an illegal one pass."""

    plies = 0

    def play(self, action, where):
        legal = self.view()["legal"][:, 0]
        assert legal[torch.arange(self.num_envs), action][where].all()
        Referee.plies += int(where.sum())
        return super().play(action, where)


def test_no_illegal_move_and_no_opponent_that_changes(monkeypatch):
    """100 000 plies between a sharp policy and its pool: all legal; a game is finished by the policy that began it."""
    world = ma.SelfPlay(Referee(128, CPU), 0.5)
    agent, pool = make_agent(world, centralised=False), ma.Pool(1, 8, "uniform")
    agent.actor.weights[-1].data *= 50
    team, rng, opponent, iteration = ma.Team(world), torch.Generator().manual_seed(0), [None] * 128, 0
    probe = {"obs": torch.randn(64, 1, 84), "legal": torch.ones(64, 1, 7, dtype=torch.bool)}
    seats = []
    while Referee.plies < 100_000:
        pool.add(agent, iteration)
        world.deal(agent, pool.draw(world.HAND, rng))
        if iteration == 0:
            team.reset((1, 0))
        team.view, steps = team.view, []
        for _ in range(21):
            now = [world.policies[int(k)] for k in world.slot]
            before = {id(p): p(probe) for p in set(now)}
            team.view, reward, _, over, _ = world.step(agent.frozen_policy()(team.view, agent.noise(128, rng=rng)))
            assert not agent.state_rms.count and all(torch.equal(before[id(p)], p(probe)) for p in set(now))
            for n in range(128):
                assert opponent[n] in (None, now[n]), "the opponent changed during a game"
                opponent[n] = None if over[n] else now[n]
            seats.append(team.view["obs"][over].sum((1, 2)))
            steps.append(over)
        for p in agent.parameters():  # training goes on: what was frozen must not move
            p.data += 0.01 * torch.randn_like(p)
        iteration += 1
    first = torch.cat(seats) == 0  # an empty board: the learner has the first move
    assert 0.4 < first.float().mean() < 0.6 and len(pool.snapshots) <= 8


def test_the_learners_reward_may_come_from_the_opponents_ply():
    """An opponent that always drops into the column of its longest line wins; the learner is told -1."""
    world = ma.SelfPlay(ma.ConnectFour(64, CPU), 1.0)
    agent = make_agent(world, centralised=False)
    world.deal(agent, [])
    world.policies[world.hand] = lambda view, noise: torch.full((len(view["obs"]), 1), 3)  # column 3, again and again
    view, total = world.reset([0]), torch.zeros(64)
    for t in range(4):
        view, reward, terminated, over, final = world.step(torch.full((64, 1), t % 2))
        total += reward[:, 0]
        assert final is None and torch.equal(over, terminated[:, 0])
    assert (total == -1).all()


class RockPaperScissors:
    """The second player does not see what the first has played."""

    obs_dim, num_actions, max_plies = 1, 3, 2

    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, device
        self.first = torch.full((num_envs,), -1)

    def start(self, where):
        self.first = self.first.where(~where, -1)

    def view(self):
        obs = torch.ones(self.num_envs, 1)
        return {"obs": obs[:, None], "state": obs, "legal": torch.ones(self.num_envs, 1, 3, dtype=torch.bool),
                "alive": torch.ones(self.num_envs, 1, dtype=torch.bool)}  # fmt: skip

    def play(self, action, where):
        second = where & (self.first >= 0)
        score = torch.tensor([0.0, 1.0, -1.0])[(action - self.first) % 3]  # paper (1) beats rock (0)
        self.first = torch.where(where & ~second, action, self.first)
        return score * second, second


def test_rock_paper_scissors_averages_to_a_third_each(tmp_path, monkeypatch):
    """The latest policy may cycle; the average over the run's snapshots is near the equilibrium."""
    monkeypatch.setitem(ma.GAMES, "rps", RockPaperScissors)
    flags = ["--algorithm", "selfplay", "--env-id", "rps", "--num-steps", 8, "--num-envs", 64, "--num-minibatches", 4]
    flags += ["--snapshot-every", 1, "--pool-size", 200, "--ent-coef", 0.1, "--lr-schedule", "constant"]
    train(tmp_path, *flags, "--total-timesteps", 512 * 150, "--learning-rate", 3e-3, "--hidden-size", 16)
    agent = ma.Agent(ma.SelfPlay(RockPaperScissors(1, CPU), 0), False, True, 16, torch.Generator())
    view, policies = {"obs": torch.ones(1, 1, 1), "legal": torch.ones(1, 1, 3, dtype=torch.bool)}, []
    for snapshot in ma.load_checkpoint(tmp_path)["pool"][1]:
        agent.load_state_dict(snapshot["policy"], strict=False)
        policies.append(agent.policy(**view).exp().detach().flatten())
    policies = torch.stack(policies)  # (150, 3)
    assert len(policies) == 150 and (policies.mean(0) - 1 / 3).abs().max() < 0.1
    assert policies.max() > 0.5, "no policy ever left the middle: the test shows nothing"


@pytest.mark.parametrize("sampling", ["uniform", "window", "pfsp"])
def test_self_play_resumes_bit_for_bit(sampling, tmp_path):
    flags = [
        "--algorithm",
        "selfplay",
        "--num-envs",
        16,
        "--num-steps",
        32,
        "--num-minibatches",
        4,
        "--hidden-size",
        16,
    ]
    flags += ["--snapshot-every", 1, "--pool-size", 3, "--opponent-sampling", sampling, "--checkpoint-every", 1024]
    flags += ["--total-timesteps", 4096]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--stop-at-step", 2048)
    train_again = ma.parse_args(["--resume", str(tmp_path / "parts")])
    ma.train(train_again)
    whole, parts = (ma.load_checkpoint(tmp_path / x) for x in ("whole", "parts"))
    assert all(torch.equal(x, parts["agent"][key]) for key, x in whole["agent"].items())
    assert [(x["global_step"], x["score"]) for x in whole["pool"][1]] == [
        (x["global_step"], x["score"]) for x in parts["pool"][1]
    ]
    curves = [list(csv.DictReader(open(tmp_path / x / "progress.csv"))) for x in ("whole", "parts")]
    for a, b in zip(*curves, strict=True):
        assert {k: x for k, x in a.items() if k not in ("wall_time", "sps")} == {
            k: x for k, x in b.items() if k not in ("wall_time", "sps")
        }


def test_a_full_pool_stays_spread_over_the_run():
    agent, pool = make_agent(Space(1, 84, 84, Discrete(7)), centralised=False), ma.Pool(10, 8, "uniform")
    for iteration in range(1000):
        if iteration % pool.every == 0:
            pool.add(agent, iteration)
            gaps = np.diff([x["global_step"] for x in pool.snapshots])
            assert pool.snapshots[0]["global_step"] == 0 and len(pool.snapshots) <= 8 and len(set(gaps)) <= 1
    assert len(pool.snapshots) > 4 and pool.snapshots[-1]["global_step"] > 800


def test_whom_the_pool_sends():
    agent, rng = make_agent(Space(1, 84, 84, Discrete(7)), centralised=False), torch.Generator().manual_seed(0)
    for sampling, expected in (("uniform", set(range(8))), ("window", {5, 6, 7}), ("pfsp", {3})):
        pool = ma.Pool(1, 8, sampling)
        assert pool.draw(4, rng) == []
        for i in range(8):
            pool.add(agent, i)
            pool.snapshots[-1]["score"] = 0.0 if i == 3 else 1.0  # only number 3 is not beaten yet
        assert {x["global_step"] for x in pool.draw(60, rng)} - expected == set() or sampling == "pfsp"
        drawn = [x["global_step"] for x in pool.draw(400, rng)]
        assert set(drawn) == expected or sampling == "pfsp" and drawn.count(3) > 380


def test_elo_of_known_strengths():
    ratings = torch.tensor([0.0, 200.0, 400.0]).double()
    score = 1 / (1 + 10 ** ((ratings - ratings[:, None]) / 400))
    np.testing.assert_allclose(ma.elo(score, 100_000), ratings, atol=1)
    assert all(math.isfinite(x) for x in ma.elo(torch.tensor([[0.5, 0.0], [1.0, 0.5]]), 100))


def test_match_counts_for_the_right_side():
    """A player that builds one column beats one that spreads; in both seats."""
    game = ma.ConnectFour(10, CPU)
    builder = lambda view, moves: torch.full((len(view["obs"]),), 3)  # noqa: E731
    spreader = lambda view, moves: torch.full((len(view["obs"]),), (len(moves) // 2) % 3)  # noqa: E731
    assert ma.match(game, builder, spreader).tolist() == [1] * 10
    assert ma.match(game, spreader, builder).tolist() == [0] * 10


def test_self_play_gets_stronger_and_all_opponents_can_be_played(tmp_path, capsys):
    flags = ["--algorithm", "selfplay", "--total-timesteps", 16384 * 8, "--snapshot-every", 2]
    train(tmp_path, *flags)
    scores = {}
    for opponent in ("random", "mcts-5", str(tmp_path), "pool"):
        capsys.readouterr()
        assert ma.main(["--evaluate", str(tmp_path), "--opponent", opponent, "--eval-episodes", "100"]) == 0
        scores[opponent] = json.loads(capsys.readouterr().out)
    assert scores["random"]["mean"] > 0.7 and 0.3 < scores[str(tmp_path)]["mean"] < 0.7
    assert scores["pool"]["elo"][-1] > 50 and (tmp_path / "elo.png").exists()
    capsys.readouterr()
    for flags, message in ((["--opponent", "nobody"], "no checkpoint nobody"), (["--capture-video"], "draws nothing")):
        assert ma.main(["--evaluate", str(tmp_path), *flags]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--algorithm", "selfplay", "--env-id", "simple_spread"], "plays connect_four"),
        (["--env-id", "connect_four"], "is a game for --algorithm selfplay"),
        (["--algorithm", "selfplay", "--num-steps", "16"], "num_steps must be at least 21"),
        (["--env-id", "no_such_env"], "there is no environment no_such_env"),
        (["--env-id", "toy_parallel.nothing"], "there is no environment toy_parallel.nothing"),
        (["--env-id", "toy_parallel.matrix", "--env-kwargs", "{"], "cannot make toy_parallel.matrix"),
        (["--env-id", "toy_parallel.matrix", "--env-kwargs", '{"size": 3}'], "cannot make toy_parallel.matrix"),
        (["--env-id", "gymnasium_robotics.mamujoco_v1"], "pip install gymnasium-robotics"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    assert ma.main([*flags, "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_compiled_equals_eager(tmp_path):
    flags = ["--num-envs", "16", "--total-timesteps", "1200", "--num-minibatches", "2"]
    agents = []
    for mode in ("--no-compile", "--compile"):
        ma.train(ma.parse_args([mode, "--run-dir", str(tmp_path / mode), *flags]))
        agents.append(ma.load_checkpoint(tmp_path / mode)["agent"])
    for key, x in agents[0].items():
        torch.testing.assert_close(x, agents[1][key], rtol=1e-4, atol=1e-5)
