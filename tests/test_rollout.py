"""The real rollout code, row by row, against an environment whose observations tell where they come from."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from toy_envs import Counter

import ppo_clip

T, N, GAMMA = 23, 3, 0.9


def make_actors(mode):
    return ppo_clip.Actors(SyncVectorEnv([Counter] * N, autoreset_mode=mode, copy=False), GAMMA)


def make_agent(actors):
    agent = ppo_clip.Agent(actors.obs_dim, actors.action_space, torch.Generator().manual_seed(0))
    agent.critic = torch.nn.Linear(2, 1)  # V(episode, step) = 7 episode + step / 100 + 3, exactly
    agent.critic.weight.data, agent.critic.bias.data = torch.tensor([[700.0, 1.0]]), torch.tensor([3.0])
    return agent


def value(episode, step):
    return 7 * episode + step / 100 + 3


def walk(actors, agent, rng, iterations=4):
    """Collect, and yield for every environment the rows of all iterations end to end."""
    rollouts, batches = [], []
    for _ in range(iterations):
        rollout = actors.collect(agent, T, rng)
        data = ppo_clip.empty_batch(agent, 2, T * N)
        ppo_clip.fill_batch(data, agent, rollout, GAMMA, 0.0)  # lambda = 0: the advantage is one step's TD error
        rollouts.append(rollout)
        batches.append({key: x.unflatten(0, (T, N)) for key, x in data.items()})
    return rollouts, batches


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_every_row_of_the_real_rollout(mode):
    actors = make_actors(mode)
    agent = make_agent(actors)
    actors.reset(seed=(1, 0))
    rollouts, batches = walk(actors, agent, torch.Generator().manual_seed(0))
    episodes_ended, valid_rows = 0, 0
    for n in range(N):
        episode, step, starting = 0, 0, False
        returns = []
        for rollout, batch in zip(rollouts, batches, strict=True):
            finals = {tuple(i): x for i, x in zip(rollout["final_index"].tolist(), rollout["final_obs"], strict=True)}
            for t in range(T):
                if starting:  # next-step autoreset: this row only shows how the last episode ended
                    assert rollout["valid"][t, n] == 0 and batch["weight"][t, n] == 0
                    np.testing.assert_allclose(rollout["obs"][t, n] * 100, [episode, step], rtol=1e-5)
                    assert rollout["reward"][t, n] == 0 and rollout["done"][t, n] == 0
                    episode, step, starting = episode + 1, 0, False
                    continue
                valid_rows += 1
                assert rollout["valid"][t, n] == 1
                np.testing.assert_allclose(rollout["obs"][t, n] * 100, [episode, step], rtol=1e-5)
                reward = episode + step / 100
                assert rollout["reward"][t, n].item() == pytest.approx(reward)
                over = step + 1 == Counter.length(episode)
                terminated, truncated = (over and flag for flag in Counter.ending(episode))
                assert (rollout["terminated"][t, n], rollout["done"][t, n]) == (terminated, over)
                next_value = 0 if terminated else value(episode, step + 1)
                td_error = min(reward, 10) + GAMMA * next_value - value(episode, step)
                assert batch["advantage"][t, n].item() == pytest.approx(td_error, rel=1e-4, abs=1e-4)
                returns.append(reward + GAMMA * (returns[-1] if step else 0))
                assert rollout["discounted_return"][t, n].item() == pytest.approx(returns[-1], rel=1e-5)
                if mode == AutoresetMode.SAME_STEP:
                    assert ((t, n) in finals) == (truncated and not terminated)
                    if (t, n) in finals:
                        np.testing.assert_allclose(finals[t, n] * 100, [episode, step + 1], rtol=1e-5)
                step += 1
                if over:
                    episodes_ended += 1
                    starting = mode == AutoresetMode.NEXT_STEP
                    if not starting:
                        episode, step = episode + 1, 0
    assert actors.episodes == episodes_ended > 40
    assert sum(int(r["valid"].sum()) for r in rollouts) == valid_rows
    lengths = [Counter.length(k) for k in range(60)]
    assert set(actors.lengths) <= set(lengths) and len(actors.lengths) == min(100, episodes_ended)


def test_episode_returns_are_raw_and_whole():
    actors = make_actors(AutoresetMode.SAME_STEP)
    actors.reset(seed=(1, 0))
    actors.collect(make_agent(actors), 7, torch.Generator())  # lengths 3, 4: two whole episodes in each environment
    first, second = 0 + 0.01 + 0.02, 4 * 1 + 0.01 + 0.02 + 0.03
    assert list(actors.returns) == pytest.approx([first] * N + [second] * N)
    assert actors.statistics() == {
        "episodes": 6,
        "episodic_return": pytest.approx((first + second) / 2),
        "episodic_length": 3.5,
    }


def test_normaliser_ignores_reset_rows():
    actors = make_actors(AutoresetMode.NEXT_STEP)
    agent = make_agent(actors)
    actors.reset(seed=(1, 0))
    rollout = actors.collect(agent, T, torch.Generator())
    agent.update_normalisers(rollout)
    rows = rollout["obs"][:-1][rollout["valid"] > 0].double()
    torch.testing.assert_close(agent.obs_rms.mean, rows.mean(0))
    assert agent.obs_rms.count == len(rows) < T * N


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_ratio_is_one_before_the_first_update(env_id):
    """With statistics that have moved: acting, log-probabilities and update see the same normaliser."""
    actors = ppo_clip.Actors(ppo_clip.make_envs(ppo_clip.Args(env_id=env_id, num_envs=4)), 0.99)
    agent = ppo_clip.Agent(actors.obs_dim, actors.action_space, torch.Generator().manual_seed(0))
    actors.reset(seed=(1, 0))
    rng, data = torch.Generator().manual_seed(0), ppo_clip.empty_batch(agent, actors.obs_dim, 256)
    for _ in range(2):
        rollout = actors.collect(agent, 64, rng)
        ppo_clip.fill_batch(data, agent, rollout, 0.99, 0.95)
        index = torch.randperm(256, generator=rng)[:64]
        policy = agent.policy(data["obs"][index])
        ratio = (agent.dist.log_prob(policy, data["action"][index]) - data["logprob"][index]).exp()
        assert (ratio - 1).abs().max() < 1e-5
        assert ppo_clip.mean_kl(agent, data) < 1e-9
        agent.update_normalisers(rollout)


def test_sync_async_and_seeds():
    """Async equals sync bit for bit; another seed or another step gives other episodes."""
    observations = []
    for vectorization, seed in (("sync", (1, 0)), ("async", (1, 0)), ("sync", (2, 0)), ("sync", (1, 2048))):
        args = ppo_clip.Args(env_id="Pendulum-v1", num_envs=2, vectorization=vectorization)
        actors = ppo_clip.Actors(ppo_clip.make_envs(args), 0.99)
        agent = ppo_clip.Agent(3, actors.action_space, torch.Generator().manual_seed(0))
        actors.reset(seed=seed)
        observations.append(actors.collect(agent, 300, torch.Generator().manual_seed(0))["obs"])
        actors.envs.close()
    sync, asynchronous, other_seed, other_step = observations
    assert torch.equal(sync, asynchronous)
    assert not torch.equal(sync[0], other_seed[0]) and not torch.equal(sync[0], other_step[0])


def test_envpool_rows_and_seeds():
    pytest.importorskip("envpool", reason="optional package envpool is not installed")
    args = ppo_clip.Args(env_id="CartPole-v1", num_envs=4, vectorization="envpool")
    obs = []
    for seed in (1, 1, 2):
        actors = ppo_clip.Actors(ppo_clip.make_envs(args), 0.99)
        agent = ppo_clip.Agent(4, actors.action_space, torch.Generator().manual_seed(0))
        actors.reset(seed=(seed, 0))
        rollout = actors.collect(agent, 200, torch.Generator().manual_seed(0))
        obs.append(rollout["obs"])
        done, valid, reward = (rollout[key] for key in ("done", "valid", "reward"))
        assert torch.equal(valid[1:], 1 - done[:-1]) and done.sum() > 10  # EnvPool resets on the step after the end
        assert (reward[valid == 0] == 0).all() and (reward[valid == 1] == 1).all()
        assert sum(actors.lengths) <= valid.sum() and list(actors.lengths) == list(actors.returns)
        limits = torch.tensor([2.4, 0.2095]) * 1.2
        assert (rollout["obs"][:-1][valid > 0][:, [0, 2]].abs() < limits).all()
    assert torch.equal(obs[0], obs[1]) and not torch.equal(obs[0][0], obs[2][0])


def test_actions_reach_the_environment_clipped_and_shifted():
    output = np.array([[0.3, -9.0], [5.0, 0.0]], dtype=np.float32)
    box = gym.spaces.Box(-1, np.inf, (2, 1))
    assert ppo_clip.env_action(output, box).tolist() == [[[pytest.approx(0.3)], [-1]], [[5], [0]]]
    assert ppo_clip.env_action(output, gym.spaces.Discrete(2, start=5)).tolist() == [5, 5]
    assert ppo_clip.env_action(output[0], gym.spaces.Discrete(2)) == 0


def test_the_first_rollout_sets_the_scale_without_moving_the_policy():
    """Why train() may scale the first rollout by itself: the untrained policy is the same on raw and scaled input."""
    actors = ppo_clip.Actors(ppo_clip.make_envs(ppo_clip.Args(env_id="Pendulum-v1", num_envs=4)), 0.99)
    agent = ppo_clip.Agent(actors.obs_dim, actors.action_space, torch.Generator().manual_seed(0))
    actors.reset(seed=(1, 0))
    rollout = actors.collect(agent, 64, torch.Generator().manual_seed(0))
    raw = agent.policy(agent.obs_rms.normalizer()(rollout["obs"]))
    agent.update_normalisers(rollout)
    scaled = agent.policy(agent.obs_rms.normalizer()(rollout["obs"]))
    assert agent.dist.kl(raw, scaled).max() < 1e-3  # the head of an untrained policy is small
