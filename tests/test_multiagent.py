"""ppo_multiagent.py: its worlds against the packages they rebuild, its masks and critics, self-play and its pool."""

import collections
import csv
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import needs_compiler
from gymnasium.spaces import Box, Discrete

import ppo_clip
import ppo_multiagent as ma

CPU = torch.device("cpu")
COEF = {"learning_rate": 1e-3, "clip_coef": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 10.0}
COEF = {key: torch.tensor(x) for key, x in COEF.items()}


class Space:
    """As much of a world as a team is made from."""

    def __init__(self, num_agents=3, obs_dim=4, state_dim=6, action_space=None):
        self.num_agents, self.obs_dim, self.state_dim = num_agents, obs_dim, state_dim
        self.action_space = action_space or Discrete(5)


def make_team(world, algorithm="mappo", share=True, **more):
    return ma.Team(world, ma.Args(algorithm=algorithm, share_params=share, hidden_size=16, **more))


def make_batch(team, world, B=32, last_layer=100):
    """A batch at the team's own (far from uniform) policy, with everyone alive and all actions legal."""
    team.actor.weights[-1].data *= last_layer
    data = {key: torch.randn(B, team.G) for key in ("advantage", "return")}
    data |= {"obs": torch.randn(B, team.G, world.obs_dim), "state": torch.randn(B, world.state_dim)}
    data |= {"legal": torch.ones(B, team.G, team.action_dim, dtype=torch.bool), "alive": torch.ones(B, team.G)}
    shape = (B, team.G) if team.discrete else (B, team.G, team.action_dim)
    data["action"] = torch.randint(team.action_dim, shape) if team.discrete else torch.randn(shape)
    with torch.no_grad():
        data["old_policy"] = team.policy_parameters(data["obs"], data["legal"])
        logprob = team.distribution(data["old_policy"]).log_prob(data["action"])
    data["logprob"] = logprob + 0.3 * torch.randn(B, team.G)
    return data


def collected(args, T, team=None):
    """A first rollout of T steps in args' environments, its actors and its team."""
    args.num_steps = T
    world = ma.make_world(args, args.num_envs, CPU)
    team = team or ma.Team(world, args)
    actors = ma.TeamActors(args, world, team)
    with actors:
        return actors.collect(team, seed=(1, 0)), actors, team


def train(tmp_path, *flags):
    return ma.train(ma.parse_args(["--no-compile", "--run-dir", str(tmp_path), *map(str, flags)]))


# ---- worlds ----------------------------------------------------------------------------------------------------------


def test_simple_spread_equals_mpe2():
    """Rewards and observations over 24 x 25 steps from copied states, agents close together: they push and bump."""
    import mpe2.simple_spread_v3

    rng, world = np.random.default_rng(0), ma.SimpleSpread(24, CPU)
    bumps = 0
    for n in range(24):
        env = mpe2.simple_spread_v3.parallel_env()
        env.reset(seed=n)
        inner = env.unwrapped.world
        for entity, x in zip([*inner.agents, *inner.landmarks], rng.uniform(-0.3, 0.3, (6, 2))):
            entity.state.p_pos = x
        world.reset(torch.Generator().manual_seed(n))
        assert world.view()["obs"].isfinite().all()
        world.position[n] = torch.tensor(np.array([a.state.p_pos for a in inner.agents]))
        world.landmark[n] = torch.tensor(np.array([e.state.p_pos for e in inner.landmarks]))
        for t in range(25):
            action = rng.integers(5, size=3)
            obs, reward, _, truncated, _ = env.step(dict(zip(env.possible_agents, map(int, action))))
            view, seen, ours, terminated, over = world.step(torch.tensor(action).expand(24, 3), world.noise(1)[0])
            np.testing.assert_allclose(seen["obs"][n], np.stack(list(obs.values())), atol=1e-5)
            np.testing.assert_allclose(ours[n], list(reward.values()), atol=1e-5)
            np.testing.assert_allclose(seen["state"][n], np.concatenate(list(obs.values())), atol=1e-5)
            positions = np.array([a.state.p_pos for a in inner.agents])
            bumps += min(np.linalg.norm(positions[i] - positions[j]) for i, j in ((0, 1), (0, 2), (1, 2))) < 0.3
            assert over.all() == all(truncated.values()) == (t == 24) and not terminated.any()
    assert bumps > 20
    assert not torch.allclose(view["obs"][n], seen["obs"][n])  # a new episode has begun


@pytest.mark.slow
def test_connect_four_equals_open_spiel():
    """Legal moves, stones, results over more than 100 000 random plies."""
    import pyspiel

    N, plies, rng, game = 256, 0, torch.Generator().manual_seed(0), ma.ConnectFour(256, CPU)
    spiel, flipped = pyspiel.load_game("connect_four"), 0
    states, results = [spiel.new_initial_state() for _ in range(N)], {1: 0, 0: 0}
    while plies < 100_000:
        obs, legal = game.view()
        action = torch.multinomial(legal.float(), 1, generator=rng)[:, 0]
        column, legal = game.column(action).tolist(), legal.where(~game.flipped[:, None], legal.flip(1)).tolist()
        flipped += int(game.flipped.sum())
        for n in range(0, N, 8):
            stones = {str(x) for x in np.array(states[n].observation_tensor()).reshape(3, 6, 7)}  # two players', none
            seen = obs[n].reshape(3, 7, 6)
            own, other, free = (seen.flip(1) if game.flipped[n] else seen).transpose(1, 2).numpy().astype(float)
            height = (own + other).sum(0).astype(int)
            assert (free.sum(0) == (height < 6)).all() and all(free[h, i] for i, h in enumerate(height) if h < 6)
            assert {str(own), str(other)} <= stones
        for n, state in enumerate(states):
            assert [i for i, x in enumerate(legal[n]) if x] == state.legal_actions()
            state.apply_action(column[n])
        score, over = game.play(action)
        plies += N
        for n in range(N):
            assert over[n] == states[n].is_terminal()
            if over[n]:
                mover = (len(states[n].history()) - 1) % 2
                assert score[n] == states[n].returns()[mover]
                results[int(score[n])] += 1
                states[n] = spiel.new_initial_state()
        game.restart(over)
    assert 0.4 < flipped / plies < 0.6
    assert results[1] > 4000 and results[0] > 5


def test_a_mirrored_position_looks_the_same_and_gets_the_mirrored_move():
    left, right, rng = ma.ConnectFour(64, CPU), ma.ConnectFour(64, CPU), torch.Generator().manual_seed(0)
    for _ in range(30):
        (obs, legal), (obs2, legal2) = left.view(), right.view()
        assert torch.equal(obs, obs2) and torch.equal(legal, legal2)
        action = torch.multinomial(legal.float(), 1, generator=rng)[:, 0]
        lopsided = (obs.view(64, 3, 7, 6).flip(2) != obs.view(64, 3, 7, 6)).flatten(1).any(1)
        a, b = left.column(action), right.column(action)
        b[~lopsided] = 6 - a[~lopsided]  # a symmetric board is its own mirror image: mirror the move by hand
        assert torch.equal(a, 6 - b) and (lopsided.any() or _ == 0)
        (score, over), (score2, over2) = left.play(left.column(a)), right.play(right.column(b))
        assert torch.equal(score, score2) and torch.equal(over, over2)
        left.restart(over), right.restart(over)


def test_every_line_is_a_window():
    """Of the mover's stones, the other's and the playable cells, in the same order."""
    windows, cell, lines = ma.ConnectFour.windows, torch.arange(42).view(7, 6), set()
    for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
        for x, y in itertools.product(range(7), range(6)):
            if x + 3 * dx < 7 and 0 <= y + 3 * dy < 6:
                lines.add(frozenset(int(cell[x + i * dx, y + i * dy]) for i in range(4)))
    assert len(lines) == 69 and windows.shape == (69, 12)
    assert {frozenset(window[:4].tolist()) for window in windows} == lines
    assert all(torch.equal(windows[:, :4] + 42 * k, windows[:, 4 * k : 4 * k + 4]) for k in (1, 2))
    steps = windows[:, :4].diff()  # from cell to cell of a line
    assert (steps == steps[:, :1]).all() and set(steps[:, 0].tolist()) == {1, 5, 6, 7}


@pytest.mark.parametrize("P", [1, 2])
def test_windows_are_seen_through_the_same_weights(P):
    """The network against the sum written out; none of its rows are mixed up, nor those of two learners."""
    windows = torch.tensor([[0, 1, 3], [2, 1, 4]])
    net, x = ma.StackedMLP(P, 5, 16, 3, 1.0, windows), torch.randn(6, 2, 5)
    for bias in net.biases:
        torch.nn.init.normal_(bias)
    assert [tuple(x.shape) for x in net.weights] == [(P, 3, 2), (P, 4, 16), (P, 16, 3)] and len(net.state_dict()) == 6
    with torch.no_grad():
        out = net(x)
    for n, g in itertools.product(range(6), range(2)):
        (first, second, last), (a, b, c) = ([w[g % P] for w in ws] for ws in (net.weights, net.biases))
        seen = torch.cat([(x[n, g, window] @ first + a[0]).relu() for window in windows])
        torch.testing.assert_close(out[n, g], (seen @ second + b[0]).relu() @ last + c[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pettingzoo_world_row_by_row(num_workers):
    """Who is alive, padding, masks, rewards, and what is seen last, of agents that die before the others."""
    args = ma.Args(env_id="toy_parallel.mortals", num_envs=2, num_workers=num_workers)
    r, actors, team = collected(args, 12)
    assert (team.G, r["obs"].shape[-1], r["state"].shape[-1]) == (3, 4, 3)
    step = np.tile(np.arange(5), 3)[:12]
    episode = np.repeat(np.arange(3), 5)[:12]
    for n in range(2):
        np.testing.assert_allclose(r["state"][:, n], np.stack([np.full(12, 7), episode, step], 1))
        np.testing.assert_allclose(r["next_state"][:, n], np.stack([np.full(12, 7), episode, step + 1], 1))
        assert r["alive"][:, n, 1].tolist() == (step < 3).tolist() and r["alive"][:, n, [0, 2]].all()
        np.testing.assert_allclose(r["obs"][:, n, 2, :2], np.stack([episode, step], 1) / 100, rtol=1e-6)
        np.testing.assert_allclose(r["next_obs"][:, n, 2, :2], np.stack([episode, step + 1], 1) / 100, rtol=1e-6)
        assert not r["obs"][:, n, 0, 2:].any() and not r["legal"][:, n, 0, 3].any()
        assert not r["legal"][:, n, 1, 2:].any() and r["legal"][:, n, 1, 1].tolist() == (step < 3).tolist()
        assert r["legal"][:, n, 1, 0].tolist() == (step > 0).tolist()  # all that is left to the dead
        assert not r["action"][step >= 3, n, 1].any()
        np.testing.assert_allclose(r["reward"][:, n], np.stack([np.ones(12), 10 * (step < 3), np.full(12, 100)], 1))
        assert r["terminated"][:, n, 0].tolist() == ((step == 4) & (episode % 2 == 1)).astype(float).tolist()
        assert r["terminated"][:, n, 1].tolist() == ((step == 2) * 1.0).tolist()
        assert r["over"][:, n].tolist() == ((step == 4) * 1.0).tolist()
    assert actors.statistics() == {"episodes": 4, "episodic_return": 5 + 30 + 500, "episodic_length": 5}
    assert actors.running.tolist() == [[2, 20, 200, 2]] * 2  # the third episode is in flight
    assert list(actors.by_agent().values()) == [5, 30, 500]


def test_an_agent_that_is_truncated_alone_is_done():
    """It leaves at step 3 of 5 without having terminated: its last value is bootstrapped, and the rows in which it is
    no longer there are no part of its advantages."""
    args = ma.Args(env_id="toy_parallel.leavers", num_envs=2, num_workers=0, gamma=0.9, gae_lambda=0.8)
    r, _, team = collected(args, 10)
    step = np.tile(np.arange(5), 2)
    for n in range(2):
        assert r["alive"][:, n, 1].tolist() == (step < 3).tolist() and not r["terminated"][:, n].any()
        leaves = r["alive"][:, n] > r["next_alive"][:, n]
        assert leaves[:, 1].tolist() == (step == 2).tolist() and leaves[:, 0].tolist() == (step == 4).tolist()
    team.update_statistics(r, r["reward"])  # values that are not all but 0
    check_advantages(args, r, team)


def check_advantages(args, r, team):
    """Against the double sum over k of (gamma lambda)^k delta_{t+k}, agent by agent, while the agent is there."""
    batch, returns = ma.make_team_batch(team, r, args)
    (T, N, G), (mean, std) = r["reward"].shape, team.value_scale()
    shared = {"sum": lambda x: x.sum(-1, True), "mean": lambda x: x.mean(-1, True), "none": lambda x: x}
    reward = shared[args.team_reward](r["reward"]).expand(T, N, G)

    def value(prefix):
        obs, state = team.scaled_obs(r[f"{prefix}obs"]), team.scaled_state(r[f"{prefix}state"])
        return mean + std * team.value(obs, state, r["action"]).detach()

    v, following, advantage = value(""), value("next_"), batch["advantage"].view(T, N, G)
    for n, g, t in itertools.product(range(N), range(G), range(T)):
        expected, k, there = 0.0, t, True
        while there and k < T:
            successor = following[k, n, g] * (1 - r["terminated"][k, n, g])
            delta = reward[k, n, g] + args.gamma * successor - v[k, n, g]
            expected += (args.gamma * args.gae_lambda) ** (k - t) * delta
            there = not (r["terminated"][k, n, g] or r["over"][k, n] or not r["next_alive"][k, n, g])
            k += 1
        if r["alive"][t, n, g]:
            assert advantage[t, n, g].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(returns, advantage + v)
    torch.testing.assert_close(batch["return"].view(T, N, G), (returns - mean) / std)


@pytest.mark.parametrize("team_reward", ["sum", "mean", "none"])
def test_advantages_bootstrap_from_what_was_seen_before_the_reset(team_reward):
    more = {"share_params": False, "gamma": 0.9, "gae_lambda": 0.8, "team_reward": team_reward, "num_workers": 0}
    args = ma.Args(env_id="toy_parallel.mortals", num_envs=2, **more)
    r, _, team = collected(args, 12)
    team.update_statistics(r, r["reward"])
    check_advantages(args, r, team)


TAG = ["--env-kwargs", '{"continuous_actions": true}', "--team-reward", "none", "--num-workers", "2"]
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
    world = ma.PettingZoo(ma.Args(env_id="toy_parallel.thrusters"))
    world.reset([0])
    for action, reward in ((0.0, 0), (1.0, -2), (-0.5, -1), (9.0, -2)):
        assert world.step(torch.tensor([[[action]]]), None)[2].tolist() == [pytest.approx([reward])]


# ---- critics, masks, learners ----------------------------------------------------------------------------------------


def test_one_agent_that_sees_everything_makes_mappo_ippo(tmp_path):
    flags = ["--env-id", "toy_parallel.alone", "--num-envs", 8, "--num-steps", 32, "--total-timesteps", 1024]
    parameters = {}
    for algorithm in ("mappo", "ippo"):
        train(tmp_path / algorithm, "--algorithm", algorithm, *flags)
        agent = ma.load_checkpoint(tmp_path / algorithm)["agent"]
        parameters[algorithm] = {key: x for key, x in agent.items() if "_rms" not in key}
    assert all(torch.equal(x, parameters["ippo"][key]) for key, x in parameters["mappo"].items())


@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("space", [Discrete(5), Box(-1, 1, (2,))])
def test_one_agents_loss_is_ppo_clips(space, norm_adv):
    """The same loss, metrics and gradient as ppo_clip.ppo_loss on the same networks and batch."""
    world = Space(1, 4, 4, space)
    team = make_team(world, "ippo")
    data = make_batch(team, world)

    class Single:
        def policy(self, obs):
            legal = torch.ones(len(obs), 1, team.action_dim, dtype=torch.bool)
            return team.distribution(team.policy_parameters(obs[:, None], legal)[:, 0])

        def value(self, obs):
            return team.value(obs[:, None], None, None)[:, 0]

    single = {key: x[:, 0] for key, x in data.items()}
    ours, our_metrics = ma.team_loss(team, data, COEF, norm_adv)
    theirs, their_metrics = ppo_clip.ppo_loss(Single(), single, COEF, norm_adv)
    torch.testing.assert_close(ours, theirs)
    assert list(our_metrics) == list(their_metrics)
    torch.testing.assert_close(torch.stack([*our_metrics.values()]), torch.stack([*their_metrics.values()]))
    assert our_metrics["clipfrac"] > 0
    for a, b in zip(*(torch.autograd.grad(x, list(team.parameters())) for x in (ours, theirs))):
        torch.testing.assert_close(a, b)


def test_one_agents_update_is_ppo_clips():
    """Gradient clipping and Adam, too."""
    world = Space(1)
    team = make_team(world, "ippo")
    data, coef = make_batch(team, world), COEF | {"max_grad_norm": torch.tensor(0.01)}
    state = ma.initial_state(team, 6)
    new = ma.update_team(team, state, data, coef, True)
    team.policy = lambda obs, f=team.policy: f(obs, data["legal"])
    team.value = lambda obs, f=team.value: f(obs, None, None)
    theirs = ppo_clip.update(team, state, data, coef, True)
    for key in ("parameters", "m", "v", "t", "sums"):
        torch.testing.assert_close(new[key], theirs[key], rtol=1e-4, atol=1e-7)


def test_separate_learners_are_three_single_ones():
    """Without shared parameters the gradient for agent g is that of an agent alone with g's rows."""
    world, one = Space(), Space(1)
    team = make_team(world, "ippo", share=False)
    data = make_batch(team, world)
    data["alive"][:7, 1] = 0
    gradient = torch.autograd.grad(ma.team_loss(team, data, COEF, True)[0], list(team.parameters()))
    for g in range(3):
        alone = make_team(one, "ippo")
        for p, q in zip(alone.parameters(), team.parameters(), strict=True):
            p.data.copy_(q[g : g + 1])
        rows = {key: x[:, g : g + 1] for key, x in data.items()}
        loss = ma.team_loss(alone, rows, COEF, True)[0]
        for a, b in zip(torch.autograd.grad(loss, list(alone.parameters())), gradient, strict=True):
            torch.testing.assert_close(a, b[g : g + 1], rtol=1e-4, atol=1e-6)


def test_a_learners_step_does_not_depend_on_anothers_gradient():
    """Agent 1's returns times 100: agent 0's clipped gradient is the same."""
    world, moments = Space(), []
    coef = COEF | {"max_grad_norm": torch.tensor(0.5)}
    for scale in (1, 100):
        torch.manual_seed(0)
        team = make_team(world, "ippo", share=False)
        data = make_batch(team, world)
        data["return"][:, 1] *= scale
        m = ma.update_team(team, ma.initial_state(team, 6), data, coef, True)["m"]
        moments.append([x.flatten(1) for x in ma.named_parts(team, m).values()])
    for a, b in zip(*moments):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])
    first, scaled = (10 * torch.stack([x.square().sum(1) for x in parts]).sum(0).sqrt() for parts in moments)
    assert scaled[1].item() == pytest.approx(0.5, rel=1e-4)  # of the gradient: m is a tenth of it
    assert scaled[0].item() == pytest.approx(first[0].item(), rel=1e-4)


# ---- a critic that sees the others' actions --------------------------------------------------------------------------


def gradients_of_a_matrix_game(team, payoff, args):
    """The gradient of each agent's expected payoff, by differentiation, and the expectation of the policy gradient with
    make_team_batch's advantages over all joint actions, weighted by their probabilities."""
    joint = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9, 2)
    world = Space(2, 1, 2, Discrete(3))
    r = ma.empty_rollout(team, world, 1, 9)
    for key in r:
        r[key] += key.split("_")[-1] in ("obs", "state", "legal", "alive", "terminated", "over")
    r["action"][0], r["reward"][0] = joint, payoff[joint[:, 0], joint[:, 1], None].expand(9, 2)
    advantage = ma.make_team_batch(team, r, args)[0]["advantage"]  # (9, 2)
    legal = torch.ones(9, 2, 3, dtype=torch.bool)
    logprob = team.policy(torch.ones(9, 2, 1), legal).log_prob(joint)  # (9, 2)
    probability = logprob.sum(-1).exp()
    parameters = list(team.actor.parameters())
    exact, estimated = [], []
    for g in range(2):  # with separate networks each agent's parameters are a slice
        expected = (probability * payoff[joint[:, 0], joint[:, 1]]).sum()
        surrogate = (probability.detach() * advantage[:, g]) @ logprob[:, g]
        for gradients, term in ((exact, expected), (estimated, surrogate)):
            parts = torch.autograd.grad(term, parameters, retain_graph=True)
            gradients.append(torch.cat([x[g].flatten() for x in parts]))
    return torch.stack(exact), torch.stack(estimated)


def test_a_critic_of_the_others_actions_does_not_bias_the_gradient(monkeypatch):
    """By brute force over all joint actions. With its own action among its inputs, the same critic does."""
    more = {"critic_input": "state-actions", "norm_obs": False}
    team = make_team(Space(2, 1, 2, Discrete(3)), share=False, **more)
    team.actor.weights[-1].data *= 200  # far from uniform
    team.critic.weights[-1].data *= 10
    args, payoff = ma.Args(team_reward="none", gae_lambda=1.0, **more), torch.randn(3, 3)
    exact, estimated = gradients_of_a_matrix_game(team, payoff, args)
    torch.testing.assert_close(estimated, exact, rtol=1e-4, atol=1e-6)
    others = ma.Team.actions_of_others
    values = team.value(torch.ones(9, 2, 1), torch.ones(9, 2), torch.arange(18).view(9, 2) % 3)
    assert len(values.unique(dim=0)) > 1, "a constant baseline shows nothing"

    def all_actions(self, action):
        return (others(self, action) + torch.nn.functional.one_hot(action, 3).flatten(-2).unsqueeze(-2)).clamp(max=1)

    monkeypatch.setattr(ma.Team, "actions_of_others", all_actions)
    _, biased = gradients_of_a_matrix_game(team, payoff, args)
    assert (biased - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("space", [Discrete(5), Box(-1, 1, (2,))])
def test_nobodys_own_action_reaches_its_critic(space):
    world = Space(action_space=space)
    team = make_team(world, critic_input="state-actions")
    obs, state, shape = torch.randn(8, 3, 4), torch.randn(8, 6), (8, 3) if team.discrete else (8, 3, 2)
    action = torch.randint(4, shape) if team.discrete else torch.rand(shape) - 0.5
    before = team.value(obs, state, action)
    for g in range(3):
        other = action.clone()
        other[:, g] += 1 if team.discrete else 0.3
        changed = team.value(obs, state, other) != before
        assert not changed[:, g].any() and changed[:, [h for h in range(3) if h != g]].all()
    if not team.discrete:  # what is outside of the box is no other action
        assert torch.equal(team.value(obs, state, 5 * action.sign()), team.value(obs, state, action.sign()))


def test_what_the_others_do_next_is_what_they_did():
    """V(s', a'^-g) is of the actions that came next, and of a fresh sample where an episode or the rollout ended."""
    args = ma.Args(env_id="toy_parallel.mortals", num_envs=4, num_workers=0, critic_input="state-actions")
    r, _, team = collected(args, 12)
    seen = []
    team.value = lambda obs, state, action: seen.append(action) or torch.zeros(action.shape)
    ma.make_team_batch(team, r, args)
    torch.testing.assert_close(seen[0], r["action"])
    inside = r["over"][:-1] == 0
    assert torch.equal(seen[1][:-1][inside], r["action"][1:][inside])
    fresh = torch.arange(12 * 4 * 3).view(12, 4, 3)
    team.act = lambda obs, legal, noise: fresh.clone()
    ma.make_team_batch(team, r, args)
    assert torch.equal(seen[3][:-1][~inside], fresh[:-1][~inside]) and torch.equal(seen[3][-1], fresh[-1])
    legal = r["next_legal"].gather(-1, seen[1].unsqueeze(-1))[..., 0]
    assert legal[r["next_alive"] > 0].all()


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
@pytest.mark.parametrize("share", ["--share-params", "--no-share-params"])
def test_the_best_joint_action_is_found(algorithm, share, tmp_path):
    flags = ["--env-id", "toy_parallel.matrix", "--num-envs", 32, "--num-steps", 4, "--total-timesteps", 6400]
    flags += ["--no-norm-obs", "--ent-coef", 0, "--learning-rate", 3e-3, "--num-minibatches", 1, "--update-epochs", 5]
    assert train(tmp_path, "--algorithm", algorithm, share, *flags)["episodic_return"] > 9.5  # of 2 * 5


def test_permuted_agents_permute_outputs():
    world, order = Space(), [2, 0, 1]
    team, obs = make_team(world), torch.randn(10, 3, 4)
    legal = torch.ones(10, 3, 5, dtype=torch.bool)
    policy = lambda obs: team.policy_parameters(obs, legal)  # noqa: E731
    assert not torch.allclose(policy(obs[:, order]), policy(obs)[:, order])  # ids tell
    for net in (team.actor, team.critic):
        net.weights[0].data[:, -3:] = net.weights[0].data[:, -3:-2]  # one identity for all
    torch.testing.assert_close(policy(obs[:, order]), policy(obs)[:, order])
    decentral = make_team(world, "ippo")
    decentral.critic.weights[0].data[:, -3:] = 0
    torch.testing.assert_close(decentral.value(obs[:, order], None, None), decentral.value(obs, None, None)[:, order])


def test_padded_actions_have_no_probability_and_no_gradient():
    world = Space()
    team = make_team(world, share=False)
    data = make_batch(team, world)
    data["legal"][:, 0, 3:] = False
    data["action"].clamp_(max=2)
    policy = team.policy(data["obs"], data["legal"])
    assert (policy.probs[:, 0, 3:] == 0).all() and policy.entropy().isfinite().all()
    torch.testing.assert_close(policy.probs.sum(-1), torch.ones(32, 3))
    loss = ma.team_loss(team, data, COEF, True)[0]
    weight, bias = torch.autograd.grad(loss, [team.actor.weights[-1], team.actor.biases[-1]])
    assert not weight[0, :, 3:].any() and not bias[0, :, 3:].any()
    assert weight[0, :, :3].any() and weight[1, :, 3:].any()
    action = team.act(data["obs"], data["legal"], team.noise(32))
    assert (action[:, 0] < 3).all() and (action[:, 1:] >= 3).any()


def test_padded_action_dimensions_have_no_entropy_and_no_gradient():
    world = Space(action_space=Box(-1, 1, (3,)))
    team = make_team(world, share=False)
    data = make_batch(team, world)
    data["legal"][:, 0, 2] = False
    entropy = team.policy(data["obs"], data["legal"]).entropy()
    assert entropy[0].tolist() == pytest.approx([2 * 1.4189385, 3 * 1.4189385, 3 * 1.4189385])
    loss = ma.team_loss(team, data, COEF, True)[0]
    log_std, weight = torch.autograd.grad(loss, [team.log_std, team.actor.weights[-1]])
    assert log_std[0, 2] == 0 and not weight[0, :, 2].any() and log_std[0, :2].all() and log_std[1].all()


@pytest.mark.parametrize("share", [True, False])
def test_the_dead_do_not_count(share):
    world = Space()
    team = make_team(world, share=share)
    data = make_batch(team, world)
    data["alive"][10:20, 1] = 0
    before, logged = ma.team_loss(team, data, COEF, True)
    for key in ("obs", "logprob", "advantage", "return"):
        data[key][10:20, 1] = 1e3 * torch.randn_like(data[key][10:20, 1])
    after, logged2 = ma.team_loss(team, data, COEF, True)
    assert torch.equal(before, after) and all(torch.equal(x, logged2[key]) for key, x in logged.items())
    data["alive"][:, 1] = 0  # nobody there at all: still a number
    assert ma.team_loss(team, data, COEF, True)[0].isfinite()


@pytest.mark.parametrize("share", [True, False])
def test_rescaled_returns_leave_every_value_as_it_was(share):
    world = Space()
    team = make_team(world, share=share, norm_obs=False)
    obs, state = torch.randn(20, 3, 4), torch.randn(20, 6)
    values = lambda: (lambda mean, std: mean + std * team.value(obs, state, None))(*team.value_scale())  # noqa: E731
    rollout = {"alive": torch.ones(20, 5, 3), "obs": torch.randn(20, 5, 3, 4), "state": torch.randn(20, 5, 6)}
    for scale in (1, 100, 0.1):
        before = values()
        team.update_statistics(rollout, scale * torch.randn(20, 5, 3) - 30 * scale)
        torch.testing.assert_close(values(), before, rtol=1e-4, atol=1e-3)
    assert team.value_scale()[1].min() > 10 and not team.obs_rms and not team.state_rms


# ---- self-play -------------------------------------------------------------------------------------------------------


class Referee(ma.ConnectFour):
    """Connect Four that counts plies and lets no illegal one pass."""

    plies = 0

    def play(self, action):
        assert self.view()[1].gather(1, action[:, None]).all()
        Referee.plies += len(action)
        return super().play(action)


def self_play(game, latest_prob=0.5, **more):
    args = ma.Args(algorithm="selfplay", latest_prob=latest_prob, hidden_size=16, norm_obs=False, **more)
    world = ma.SelfPlay(game, args)
    team = ma.Team(world, args)
    return world, team, ma.Pool(args)


def test_no_illegal_move_and_the_opponents_that_were_set():
    """100 000 plies between a sharp policy and its pool: all legal; half of the opponents are the present policy."""
    world, team, pool = self_play(Referee(128, CPU))
    pool.measure = lambda *_: None
    team.actor.weights[-1].data *= 50
    iteration, opponents, seats, old = 0, [], [], 0

    def checked_move(noise, original=world.opponents_move):
        nonlocal old
        (obs, legal), action = world.game.view(), original(noise)
        for n in range(0, 128, 7):
            net = team.actor if n % 8 < 4 else opponents[n % 8 - 4]
            logits = net(obs[n].expand(1, 1, -1))[0, 0].masked_fill(~legal[n], -1e8)
            assert action[n] == (logits + noise[n]).argmax(), "another opponent than the one that was set"
            old += n % 8 >= 4 and not torch.equal(net.weights[0], team.actor.weights[0])
        return action

    world.opponents_move = checked_move
    while Referee.plies < 100_000:
        pool.add(team, None, iteration)
        drawn = pool.draw(team, world.OPPONENTS)
        world.set_opponents(drawn)
        opponents = [ma.copy.deepcopy(team.actor) for _ in range(4)]
        for net, actor in zip(opponents, drawn[4:], strict=True):
            net.load_state_dict(actor)
        world.reset(torch.Generator())
        for _ in range(24):
            view = world.view()
            action = team.act(view["obs"], view["legal"], team.noise(128))
            view, _, _, _, over = world.step(action, world.noise(1)[0])
            seats.append(view["obs"][over > 0][:, 0, :84].sum(1))
        for p in team.parameters():  # training goes on: what was frozen must not move
            p.data += 0.01 * torch.randn_like(p)
        iteration += 1
    first = torch.cat(seats) == 0  # an empty board: the learner has the first move
    assert 0.4 < first.float().mean() < 0.6 and old > 100


def test_the_learners_reward_may_come_from_the_opponents_ply():
    """An opponent that always drops into the same column wins; the learner is told -1, and begins the next game."""
    world, team, _ = self_play(ma.ConnectFour(64, CPU), 1.0)
    world.opponents_move = lambda noise: world.game.column(torch.full((64,), 3))
    world.game.restart(torch.ones(64, dtype=torch.bool))
    for t in range(4):
        world.view()
        action = world.game.column(torch.full((64,), t % 2))
        view, successor, reward, terminated, over = world.step(action[:, None], world.noise(1)[0])
        assert torch.equal(over, terminated[:, 0]) and over.all() == (t == 3)
    assert (reward == -1).all() and not view["obs"][..., :84].any()


def test_who_lost_begins():
    """The learner builds a column of four and wins: the next board that it sees has the opponent's first stone."""
    world, team, _ = self_play(ma.ConnectFour(64, CPU), 1.0)
    world.game.restart(torch.ones(64, dtype=torch.bool))
    for t in range(4):
        world.opponents_move = lambda noise, t=t: world.game.column(torch.full((64,), t % 2))
        world.view()
        view, _, reward, _, over = world.step(world.game.column(torch.full((64,), 3))[:, None], None)
    assert (reward == 1).all() and over.all() and (view["obs"][..., :84].sum((1, 2)) == 1).all()
    assert (view["obs"][:, 0, 42:84].sum(1) == 1).all()


def test_a_win_counts_also_where_the_opponent_wins_the_next_game_at_once():
    world, column = self_play(ma.ConnectFour(8, CPU))[0], torch.zeros(8, dtype=torch.long)
    world.game.opening.copy_(torch.tensor([0b111, 0b111 << 42]))  # the side to move has three in column 0
    world.game.restart(torch.ones(8, dtype=torch.bool))
    world.opponents_move = lambda noise: world.game.column(column)
    world.view()
    _, _, reward, _, over = world.step(world.game.column(column)[:, None], None)
    assert (reward == 1).all() and over.all()


@pytest.mark.parametrize("opening_plies", [0, 16])
def test_half_of_the_first_games_are_begun_by_the_opponent(opening_plies):
    world, _, _ = self_play(ma.ConnectFour(2000, CPU), opening_plies=opening_plies)
    if opening_plies:
        world.new_openings(opening_plies)
    world.reset(torch.Generator().manual_seed(0))
    moved = (world.game.boards != world.game.opening).any(1)
    assert 0.45 < moved.float().mean() < 0.55
    stones = (world.game.boards[..., None] >> world.game.cells & 1).sum((1, 2))
    before = (world.game.opening[..., None] >> world.game.cells & 1).sum((1, 2))
    assert torch.equal(stones - before, moved.long())


def test_opponents_that_were_not_set_play_at_random():
    world = self_play(ma.ConnectFour(7000, CPU))[0]
    world.game.restart(torch.ones(7000, dtype=torch.bool))
    counts = world.game.column(world.opponents_move(world.noise(1)[0])).bincount(minlength=7)
    assert ((counts - 1000).abs() < 150).all()


def test_first_episodes_count_up_to_their_ends():
    class Counts:
        num_envs, G = 3, 1

        def reset(self, generator):
            self.t = 0

        def view(self):
            x = torch.zeros(3, 1, 1)
            return {"obs": x, "legal": x, "alive": x[..., 0] + 1}

        def noise(self, T):
            return torch.zeros(T, 3)

        def step(self, action, noise):
            self.t += 1
            return self.view(), None, torch.full((3, 1), 1.0), None, (torch.arange(3) == self.t - 1).float()

    class Idle:
        def act(self, obs, legal, noise):
            return torch.zeros(3, 1)

    assert ma.first_episodes(Idle(), Counts()).tolist() == [[1.0], [2.0], [3.0]]


def test_measuring_a_pool_leaves_trainings_random_numbers_alone():
    world, team, pool = self_play(ma.ConnectFour(8, CPU))
    before = torch.get_rng_state()
    pool.add(team, world, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(0 <= pool.strength[f"selfplay/score_{key}"] <= 1 for key in ("random", "middle"))


def test_games_and_opponents_are_new_in_every_iteration(tmp_path, monkeypatch):
    calls, choose, reset = [], ma.SelfPlay.set_opponents, ma.SelfPlay.reset
    monkeypatch.setattr(ma.Pool, "measure", lambda *_: None)  # which plays games of its own
    monkeypatch.setattr(ma.SelfPlay, "set_opponents", lambda *x: calls.append("opponents") or choose(*x))
    monkeypatch.setattr(ma.SelfPlay, "reset", lambda *x: calls.append("reset") or reset(*x))
    flags = ["--algorithm", "selfplay", "--num-envs", 8, "--num-steps", 32, "--num-minibatches", 4, "--hidden-size", 16]
    train(tmp_path, *flags, "--total-timesteps", 256 * 3, "--checkpoint-every", 10_000)
    assert calls == ["opponents", "reset"] * 3


class RockPaperScissors:
    """The second player does not see what the first has played."""

    obs_dim, num_actions, max_plies = 1, 3, 2

    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, device
        self.first = torch.full((num_envs,), -1)

    def restart(self, where):
        self.first = self.first.where(~where, -1)

    def view(self):
        return torch.ones(self.num_envs, 1), torch.ones(self.num_envs, 3, dtype=torch.bool)

    def play(self, action):
        second = self.first >= 0
        score = torch.tensor([0.0, 1.0, -1.0])[(action - self.first) % 3]  # paper (1) beats rock (0)
        self.first = torch.where(second, self.first, action)
        return score * second, second


@pytest.mark.slow
def test_rock_paper_scissors_averages_to_a_third_each(tmp_path, monkeypatch):
    """The latest policy may cycle; the average over the run's snapshots is near the equilibrium."""
    monkeypatch.setitem(ma.GAMES, "rps", RockPaperScissors)
    flags = ["--algorithm", "selfplay", "--env-id", "rps", "--num-steps", 8, "--num-envs", 64, "--num-minibatches", 4]
    flags += ["--pool-size", 150, "--ent-coef", 0.2, "--latest-prob", 0.25, "--lr-schedule", "constant"]
    flags += ["--gamma", 1.0, "--opening-plies", 0]  # it has no boards to play random plies on
    train(tmp_path, *flags, "--total-timesteps", 512 * 150, "--learning-rate", 3e-3, "--hidden-size", 16)
    args = ma.parse_args(["--evaluate", str(tmp_path)])
    team = ma.Team(ma.make_world(args, 64, CPU), args)
    obs, legal, policies = torch.ones(1, 1, 1), torch.ones(1, 1, 3, dtype=torch.bool), []
    for snapshot in ma.load_checkpoint(tmp_path)["adapted"]["snapshots"]:
        team.actor.load_state_dict(snapshot["actor"])
        policies.append(team.policy(obs, legal).probs.detach().flatten())
    policies = torch.stack(policies)  # (150, 3)
    assert len(policies) == 150 and (policies.mean(0) - 1 / 3).abs().max() < 0.1
    assert policies.max() > 0.5, "no policy ever left the middle: the test shows nothing"


@pytest.mark.parametrize("latest_prob", [0, 0.5, 1])
def test_self_play_resumes_bit_for_bit(latest_prob, tmp_path):
    flags = ["--algorithm", "selfplay", "--num-envs", 16, "--num-steps", 32, "--num-minibatches", 4]
    flags += ["--hidden-size", 16, "--pool-size", 3, "--checkpoint-every", 1024]
    flags += ["--total-timesteps", 4096, "--latest-prob", latest_prob]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--stop-at-step", 2048)
    ma.train(ma.parse_args(["--resume", str(tmp_path / "parts")]))
    whole, parts = (ma.load_checkpoint(tmp_path / x) for x in ("whole", "parts"))
    assert all(torch.equal(x, parts["agent"][key]) for key, x in whole["agent"].items())
    pools = [[x["global_step"] for x in state["adapted"]["snapshots"]] for state in (whole, parts)]
    assert pools[0] == pools[1] == [0, 1536, 3072]
    curves = [list(csv.DictReader(open(tmp_path / x / "progress.csv"))) for x in ("whole", "parts")]
    for a, b in zip(*curves, strict=True):
        drop = ("wall_time", "sps")
        assert {k: x for k, x in a.items() if k not in drop} == {k: x for k, x in b.items() if k not in drop}


def test_a_pool_is_spread_over_the_run():
    """32 snapshots of a run, at equal distances, and drawn alike; a share of the opponents is the present policy."""
    _, team, pool = self_play(ma.ConnectFour(8, CPU), total_timesteps=128 * 25 * 1000)
    pool.measure = lambda *_: None
    for iteration in range(0, 1000, pool.every):
        for p in team.parameters():
            p.data += 1
        pool.add(team, None, iteration)
    assert pool.every == 32 and len(pool.snapshots) == 32
    for p in team.parameters():
        p.data += 1
    total = lambda actor: float(actor["weights.0"].sum())  # noqa: E731
    now, snapshots = total(team.actor.state_dict()), [total(x["actor"]) for x in pool.snapshots]
    drawn = [total(actor) for actor in pool.draw(team, 800)]
    assert drawn[:400] == [now] * 400 and set(drawn[400:]) == set(snapshots) and len(set(snapshots)) == 32


@pytest.mark.parametrize("share,present", [(0, 0), (0.1, 1), (0.5, 4), (0.95, 8), (1, 8)])
def test_the_share_of_opponents_that_are_the_present_policy(share, present):
    _, team, pool = self_play(ma.ConnectFour(8, CPU), share)
    pool.measure = lambda *_: None
    pool.add(team, None, 0)
    for p in team.parameters():
        p.data += 1
    drawn = pool.draw(team, 8)
    assert sum(torch.equal(x["weights.0"], team.actor.weights[0]) for x in drawn) == present


def test_a_run_that_becomes_longer_has_its_snapshots_further_apart(tmp_path):
    flags = ["--algorithm", "selfplay", "--num-envs", 8, "--num-steps", 32, "--num-minibatches", 4, "--hidden-size", 16]
    flags += ["--pool-size", 4]
    train(tmp_path, *flags, "--total-timesteps", 256 * 8)
    ma.train(ma.parse_args(["--resume", str(tmp_path), "--total-timesteps", str(256 * 16)]))
    steps = [x["global_step"] for x in ma.load_checkpoint(tmp_path)["adapted"]["snapshots"]]
    assert steps == [0, 256 * 4, 256 * 8, 256 * 12]
    ma.train(ma.parse_args(["--resume", str(tmp_path), "--total-timesteps", str(256 * 22)]))
    assert len(ma.load_checkpoint(tmp_path)["adapted"]["snapshots"]) <= 4


def test_openings_are_games_in_progress():
    """Half of the boards begin from random, unfinished positions of up to 16 plies, anew in each iteration."""
    world, seen = self_play(ma.ConnectFour(512, CPU))[0], []
    for _ in range(2):
        world.new_openings(16)
        opening = world.game.opening
        stones = (opening[..., None] >> world.game.cells & 1).sum(-1)  # (512, 2)
        assert stones.sum(1).max() == 16 and 0.4 < (stones.sum(1) == 0).float().mean() < 0.6
        assert ((stones[:, 1] - stones[:, 0]).abs() <= 1).all()
        for board in (opening, opening.flip(1)):  # nobody has four in a row, whoever is to move
            for shift in (1, 6, 7, 8):
                pairs = board & (board >> shift)
                assert not (pairs & (pairs >> 2 * shift)).any()
        seen.append(opening.clone())
    assert (seen[0] != seen[1]).any()
    world.game.restart(torch.ones(512, dtype=torch.bool))
    assert torch.equal(world.game.boards, opening)


def test_the_entropy_weight_falls_on_a_straight_line(tmp_path, monkeypatch):
    accelerated, seen = ma.accelerated, []

    def spied(*operands):
        epoch, coef = accelerated(*operands), operands[-2]
        return lambda: seen.append(coef["ent_coef"].item()) or epoch()

    monkeypatch.setattr(ma, "accelerated", spied)
    flags = ["--num-envs", 4, "--num-steps", 25, "--total-timesteps", 300, "--update-epochs", 1, "--ent-coef", 0.2]
    train(tmp_path, *flags, "--ent-final", 0.1)
    assert seen == pytest.approx([0.2, 0.14, 0.08])  # at the end of the run it would be 0.02


@pytest.mark.slow
def test_self_play_gets_stronger_and_is_evaluated(tmp_path, capsys):
    flags = ["--algorithm", "selfplay", "--total-timesteps", 16384 * 8]
    train(tmp_path, *flags)
    assert ma.main(["--evaluate", str(tmp_path), "--eval-episodes", "100"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["mean"] > 0.4 and set(result["returns"]) <= {-1, 0, 1} and len(result["returns"]) == 100
    with open(tmp_path / "progress.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["score_random"]) > 0.6 and 0.4 < float(last["score_middle"]) < 0.95
    assert ma.main(["--evaluate", str(tmp_path), "--capture-video"]) == 2
    assert "--capture-video goes with PettingZoo, not connect_four" in capsys.readouterr().err


def test_a_mask_that_allows_nothing_leaves_an_agent_its_own_actions(tmp_path):
    """Those of the widest agent would make the environment fail."""
    train(tmp_path, "--env-id", "toy_parallel.waiting", "--num-envs", 8, "--total-timesteps", 200)


def test_statistics_move_only_after_the_update(tmp_path, monkeypatch):
    """But the first rollout's, before it. Else acting and updating would scale observations differently."""
    calls = []

    def spied(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, **more: calls.append(name) or original(*x, **more))

    for owner, name in ((ma.TeamActors, "collect"), (ma.Team, "update_statistics")):
        spied(owner, name)
    spied(ma, "make_team_batch")
    monkeypatch.setattr(ma, "accelerated", lambda *operands: lambda: calls.append("epoch"))
    train(tmp_path, "--num-envs", 4, "--total-timesteps", 200, "--update-epochs", 1)
    first = ["collect", "make_team_batch", "update_statistics", "make_team_batch", "epoch"]
    assert calls == ["make_team_batch", *first, "collect", "make_team_batch", "epoch", "update_statistics"]


def test_windows_step_by_step_give_the_same():
    """A rollout (T, N, G, D) goes through a layer with windows one step at a time, a minibatch (M, G, D) as a whole."""
    torch.manual_seed(0)
    windows = torch.tensor([[0, 1], [2, 3], [1, 2]])
    for P in (1, 2):
        net, x = ma.StackedMLP(P, 4, 16, 3, 1.0, windows), torch.randn(5, 64, 2, 4)
        torch.testing.assert_close(net(x), net(x.flatten(0, 1)).unflatten(0, (5, 64)))
    net, x = ma.StackedMLP(1, 4, 16, 3, 1.0, windows), torch.randn(64, 1, 4)
    by_hand = torch.cat([x[..., w] @ net.weights[0][0] for w in windows], -1).relu()  # (64, 1, W * features)
    torch.testing.assert_close(net(x), (by_hand @ net.weights[1][0]).relu() @ net.weights[2][0])


def test_a_mask_beside_a_dict_of_observations_counts():
    """PettingZoo's masks are in the observation or in the infos."""
    world = ma.PettingZoo(ma.Args(env_id="toy_parallel.mortals"))
    name, (obs, infos) = world.names[0], world.envs[0].reset()
    mask = np.arange(world.spaces[0].n) == 1
    world.set_view(0, obs | {name: {"observation": obs[name]}}, infos | {name: {"action_mask": mask}})
    assert world.views[0]["legal"][0].nonzero()[0].tolist() == [1]


def test_the_dead_always_act_alike():
    """Whatever their last mask allows."""
    world = ma.PettingZoo(ma.Args(env_id="toy_parallel.mortals"))
    env, name = world.envs[0], world.names[1]
    obs, infos = env.reset()
    env.agents = [x for x in env.agents if x != name]
    world.set_view(0, obs | {name: {"observation": world.seen(obs[name]), "action_mask": np.array([0, 1])}}, infos)
    assert world.views[0]["legal"][1].nonzero()[0].tolist() == [0] and world.views[0]["alive"][1] == 0


def test_a_state_of_zeros_at_first_is_a_state(monkeypatch):
    """As many zeros as there are observations, which are 0, too: nothing tells whether it is the same."""
    import toy_parallel

    monkeypatch.setattr(toy_parallel.Mortals, "state", lambda self: np.full(8, self.clock))
    assert ma.PettingZoo(ma.Args(env_id="toy_parallel.mortals")).has_state


def test_an_environment_that_cannot_be_filmed_says_so(tmp_path, monkeypatch, capsys):
    import toy_parallel

    train(tmp_path, "--env-id", "toy_parallel.waiting", "--num-envs", 8, "--total-timesteps", 200)
    module = type("module", (), {"parallel_env": lambda: toy_parallel.Waiting()})
    monkeypatch.setattr(toy_parallel, "waiting", module, raising=False)
    assert ma.main(["--evaluate", str(tmp_path), "--capture-video"]) == 2
    assert "cannot make toy_parallel.waiting with {} and render_mode: " in capsys.readouterr().err


def test_a_world_without_agents_is_refused(monkeypatch, capsys):
    import toy_parallel

    class Nobody:
        possible_agents = []

    monkeypatch.setattr(toy_parallel, "nobody", type("module", (), {"parallel_env": Nobody}), raising=False)
    assert ma.main(["--env-id", "toy_parallel.nobody"]) == 2
    assert "cannot make toy_parallel.nobody with {}: it has no agents" in capsys.readouterr().err


def test_a_state_of_the_size_of_all_observations_is_seen_all_the_same(monkeypatch):
    import toy_parallel

    monkeypatch.setattr(toy_parallel.Mortals, "state", lambda self: np.full(8, 9.0))
    world = ma.PettingZoo(ma.Args(env_id="toy_parallel.mortals"))
    world.reset([0])
    assert world.has_state and (world.view()["state"] == 9).all()


def test_all_copies_of_a_world_are_probed_alike(monkeypatch):
    """One may count its resets, and how many copies a process has must not change what they do."""
    import toy_parallel

    counts, reset = collections.Counter(), toy_parallel.Alone.reset
    monkeypatch.setattr(toy_parallel.Alone, "reset", lambda self, seed: counts.update([id(self)]) or reset(self, seed))
    world = ma.PettingZoo(ma.Args(env_id="toy_parallel.alone"), 3)
    assert len(set(counts.values())) == 1 and len(counts) == len(world.envs) == 3


def test_critics_are_shown_no_actions_that_an_agent_does_not_have():
    legal = torch.tensor([[[True, False], [True, True]]])
    world = Space(1)
    team = make_team(world, "mappo")
    team.discrete = False
    team.policy_parameters = lambda obs, legal: torch.zeros(1, 2, 4)
    team.scaled_obs = lambda obs: obs
    action = team.act(torch.zeros(1, 2, 1), legal, torch.ones(1, 2, 2))
    assert action.tolist() == [[[1, 0], [1, 1]]]


def test_a_pettingzoo_episode_is_filmed(tmp_path, capsys):
    pytest.importorskip("moviepy", reason="optional package moviepy is not installed")
    flags = ["--env-id", "toy_parallel.filmed", "--num-envs", 4, "--num-workers", 0, "--total-timesteps", 400]
    train(tmp_path, *flags)
    assert ma.main(["--evaluate", str(tmp_path), "--capture-video", "--eval-episodes", "2"]) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--algorithm", "selfplay", "--env-id", "simple_spread"], "plays connect_four"),
        (["--env-id", "connect_four"], "--algorithm selfplay plays connect_four, the others everything else"),
        (["--algorithm", "selfplay", "--num-envs", "12"], "--num-envs must be a multiple of 8"),
        (["--algorithm", "selfplay", "--num-steps", "16"], "--num-steps must be at least 21"),
        (["--algorithm", "selfplay", "--opening-plies", "42"], "--opening-plies must be less than 42"),
        (["--env-id", "toy_parallel.whole_numbers"], "this script does Discrete or bounded float Box"),
        (["--env-id", "toy_parallel.pictures"], "this script is not for images"),
        (["--env-id", "toy_parallel.nested"], "this script is not for images or Dicts"),
        (
            ["--env-id", "no_such_env"],
            "cannot make no_such_env with {}: not one of simple_spread, connect_four, nor a module",
        ),
        (["--env-id", "toy_parallel.nothing"], "has no attribute 'nothing'"),
        (["--env-id", "toy_parallel.matrix", "--env-kwargs", "{"], "cannot make toy_parallel.matrix with {:"),
        (["--env-id", "bad_import"], "cannot make bad_import with {}: __init__() raised NameError"),
        (["--env-id", "toy_parallel.matrix", "--env-kwargs", "[]"], "cannot make toy_parallel.matrix with []"),
        (["--env-kwargs", "{}"], "--env-kwargs goes with PettingZoo, not simple_spread"),
        (["--pool-size", "5"], "--pool-size does nothing with --algorithm mappo"),
        (["--algorithm", "selfplay", "--no-share-params"], "--share-params does nothing with --algorithm selfplay"),
        (["--algorithm", "ippo", "--critic-input", "state-actions"], "--critic-input goes with --algorithm mappo"),
        (["--opponent", "random"], "--opponent"),
        (["--env-id", "toy_parallel.matrix", "--env-kwargs", '{"size": 3}'], "cannot make toy_parallel.matrix"),
        (["--env-id", "gymnasium_robotics.mamujoco_v1"], "pip install gymnasium-robotics"),
    ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    status = 1 if "bad_import" in flags else 2  # that is not the user's mistake
    assert ma.main([*flags, "--run-dir", str(tmp_path / "run")]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_compiler
def test_compiled_equals_eager(tmp_path):
    flags = ["--num-envs", "16", "--total-timesteps", "1200", "--num-minibatches", "2"]
    agents = []
    for mode in ("--no-compile", "--compile"):
        ma.train(ma.parse_args([mode, "--run-dir", str(tmp_path / mode), *flags]))
        agents.append(ma.load_checkpoint(tmp_path / mode)["agent"])
    for key, x in agents[0].items():
        torch.testing.assert_close(x, agents[1][key], rtol=1e-4, atol=1e-5)


FAILURES = [
    ("raise", "step() raised ZeroDivisionError: a bug (toy_parallel.py, line "),
    ("nan", "step() returned [nan] and 0.0: not finite, or not of shape (1,)"),
    ("reward", "and nan: not finite"),
    ("shape", "step() returned [0. 0. 0.] and"),
    ("state", "state() returned [inf inf inf]: not finite"),
]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("trouble,message", FAILURES)
def test_an_environment_that_fails_ends_the_run_with_one_line(trouble, message, num_workers, tmp_path, capsys):
    flags = ["--env-id", f"toy_parallel.broken_{trouble}", "--num-envs", 4, "--num-workers", num_workers]
    flags += ["--run-dir", tmp_path / "a", "--no-compile"]
    assert ma.main(list(map(str, flags))) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ppo_multiagent.py: environment 0, step 3 of the rollout: ") and message in line
    assert ma.load_checkpoint(tmp_path / "a")["global_step"] == 0


def test_an_environment_that_fails_in_evaluation(tmp_path, capsys, monkeypatch):
    import toy_parallel

    flags = ["--env-id", "toy_parallel.alone", "--num-envs", 4, "--num-workers", 0, "--total-timesteps", 200]
    train(tmp_path, *flags)
    capsys.readouterr()
    monkeypatch.setattr(toy_parallel.alone, "parallel_env", toy_parallel.broken_raise.parallel_env)
    assert ma.main(["--evaluate", str(tmp_path)]) == 1
    assert "episode 0: step() raised ZeroDivisionError: a bug (toy_parallel.py, line " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--hidden-size", "32"], "does not fit this agent: size mismatch for"),
        (["--no-share-params"], "does not fit this agent"),
        (["--no-norm-obs"], "does not fit this agent"),
        (["--critic-input", "state-actions"], "does not fit this agent: size mismatch for critic.weights.0"),
        (["--algorithm", "ippo"], "is of --algorithm mappo, not of ippo"),
        (["--algorithm", "selfplay"], "is of --algorithm mappo, not of selfplay"),
        (["--env-id", "toy_parallel.alone"], "on simple_spread, not of ppo_multiagent.py on toy_parallel.alone"),
    ],
)
def test_resuming_as_something_else_is_one_line(flags, message, tmp_path, capsys):
    train(tmp_path / "a", "--num-envs", 4, "--total-timesteps", 200)
    capsys.readouterr()
    assert ma.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "b").exists()


def test_defaults_are_those_that_the_stored_results_were_made_with():
    """Another default is another algorithm, and has to be one on purpose."""
    papers = {"num_envs": 128, "num_steps": 25, "hidden_size": 64, "learning_rate": 7e-4, "update_epochs": 10}
    papers |= {"gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2, "ent_coef": 0.01, "max_grad_norm": 10.0}
    ours = {"num_minibatches": 4, "vf_coef": 0.5, "norm_adv": True, "norm_obs": True, "share_params": True}
    ours |= {"algorithm": "mappo", "critic_input": "state", "team_reward": "sum", "lr_schedule": "linear"}
    ours |= {"env_id": "simple_spread", "env_kwargs": "{}", "num_workers": ma.CORES, "ent_final": 1.0}
    selfplay = {"latest_prob": 0.5, "opening_plies": 0, "pool_size": 32}
    contract = {"total_timesteps": 1_000_000, "seed": 1, "cuda": False, "compile": True, "run_dir": None}
    contract |= {"checkpoint_every": 100_000, "resume": None, "stop_at_step": None, "evaluate": None}
    contract |= {"eval_episodes": 10, "capture_video": False}
    assert vars(ma.Args()) == papers | ours | selfplay | contract


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_learning_rate_falls_to_zero_over_the_run(schedule, tmp_path):
    train(tmp_path, "--num-envs", 4, "--total-timesteps", 400, "--lr-schedule", schedule)
    rows = list(csv.DictReader(open(tmp_path / "progress.csv")))
    expected = [1, 0.75, 0.5, 0.25] if schedule == "linear" else [1] * 4
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([7e-4 * x for x in expected], rel=1e-5)
    assert float(rows[0]["entropy"]) == pytest.approx(np.log(5), rel=0.02)  # what is logged are means over minibatches


@pytest.mark.parametrize("share", [True, False])
def test_statistics_are_those_of_every_learners_own_living_samples(share):
    team, rng = make_team(Space(), share=share), torch.Generator().manual_seed(0)
    r = {"obs": torch.randn(20, 5, 3, 4, generator=rng), "state": torch.randn(20, 5, 6, generator=rng)}
    r["alive"], returns = (torch.rand(20, 5, 3, generator=rng) < 0.7).float(), torch.arange(300.0).view(20, 5, 3)
    team.update_statistics(r, returns)
    for p in range(team.P):
        alive = r["alive"] * (1 if share else torch.eye(3)[p])
        for rms, x in ((team.value_rms[p], returns[alive > 0]), (team.obs_rms[p], r["obs"][alive > 0])):
            torch.testing.assert_close(rms.mean, x.double().mean(0))
            torch.testing.assert_close(rms.var, x.double().var(0, correction=0))
    torch.testing.assert_close(team.state_rms[0].mean, r["state"].flatten(0, 1).double().mean(0))
    for p in range(3 if not share else 0):  # and each learner's observations are scaled by its own
        torch.testing.assert_close(team.scaled_obs(r["obs"])[:, :, p], team.obs_rms[p](r["obs"][:, :, p]))


def test_actions_of_a_box_are_the_mean_and_noise_times_the_standard_deviation():
    team = make_team(Space(action_space=Box(-1, 1, (2,))), norm_obs=False)
    team.log_std.data.copy_(torch.tensor([[-1.0, 0.5]]))
    obs, legal, noise = torch.randn(8, 3, 4), torch.ones(8, 3, 2, dtype=torch.bool), torch.randn(8, 3, 2)
    distribution = team.policy(obs, legal).base_dist
    torch.testing.assert_close(team.act(obs, legal, noise), distribution.loc + distribution.scale * noise)
    torch.testing.assert_close(distribution.scale[0, 0], torch.tensor([-1.0, 0.5]).exp())


def test_the_environment_is_named_whose_reset_fails(tmp_path, capsys, monkeypatch):
    import toy_parallel

    def reset(self, seed=None, options=None, original=toy_parallel.Alone.reset):
        if seed is None:
            raise ZeroDivisionError("a bug")
        return original(self, seed)

    monkeypatch.setattr(toy_parallel.Alone, "reset", reset)
    flags = ["--env-id", "toy_parallel.alone", "--num-envs", 4, "--num-workers", 0, "--run-dir", tmp_path / "a"]
    assert ma.main(list(map(str, [*flags, "--no-compile"]))) == 1
    assert "environment 0, step 9 of the rollout: reset() raised ZeroDivision" in capsys.readouterr().err


@pytest.mark.parametrize("P", [1, 3])
def test_stacked_networks_are_relu_networks_side_by_side(P):
    stack, x = ma.StackedMLP(P, 4, 8, 2, 1.0), torch.randn(10, 3, 4)
    for bias in stack.biases:
        torch.nn.init.normal_(bias)
    for g in range(3):
        layers = [(w[g % P], b[g % P]) for w, b in zip(stack.weights, stack.biases)]
        out = x[:, g]
        for i, (weight, bias) in enumerate(layers):
            out = (out.relu() if i else out) @ weight + bias
        torch.testing.assert_close(stack(x)[:, g], out)


def test_agents_and_landmarks_begin_anywhere_between_minus_one_and_one():
    world = ma.SimpleSpread(500, CPU)
    world.reset(torch.Generator().manual_seed(0))
    for x in (world.position, world.landmark):
        assert -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1 and abs(x.mean()) < 0.05


def test_a_rollout_holds_the_state_only_where_a_critic_sees_it():
    held = {name: "state" in ma.empty_rollout(make_team(Space(), name), Space(), 2, 2) for name in ("mappo", "ippo")}
    assert held == {"mappo": True, "ippo": False}
