"""The real rollout code, row by row, against an environment whose observations tell where they come from."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from toy_envs import Counter

import ppo_clip

T, N, GAMMA = 23, 3, 0.9


def make_actors(agent, **flags):
    defaults = {"env_id": "toy_envs:Counter-v0", "num_envs": N, "num_steps": T, "num_workers": 0, "gamma": GAMMA}
    return ppo_clip.Actors(ppo_clip.Args(**defaults | flags), agent)


def make_agent(obs_dim=2, space=Counter.action_space):
    torch.manual_seed(0)
    return ppo_clip.Agent(obs_dim, space)


def value(episode, step):
    return 7 * episode + step / 100 + 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_of_the_real_rollout(num_workers):
    agent = make_agent()
    agent.critic = torch.nn.Linear(2, 1)  # V(episode, step) = 7 episode + step / 100 + 3, exactly
    agent.critic.weight.data, agent.critic.bias.data = torch.tensor([[700.0, 1.0]]), torch.tensor([3.0])
    rollouts, rewards = [], []
    with make_actors(agent, num_workers=num_workers) as actors:
        for k in range(4):
            rollout = {key: x.clone() for key, x in actors.collect(agent, seed=None if k else (1, 0)).items()}
            batch = ppo_clip.make_batch(agent, rollout, GAMMA, 0.0)  # lambda = 0: the advantage is one step's TD error
            rollouts.append((rollout, {key: x.unflatten(0, (T, N)) for key, x in batch.items()}))
    episodes_ended = 0
    for n in range(N):
        episode, step, discounted = 0, 0, 0.0
        for rollout, batch in rollouts:
            for t in range(T):
                np.testing.assert_allclose(rollout["obs"][t, n] * 100, [episode, step], rtol=1e-5)
                np.testing.assert_allclose(rollout["next_obs"][t, n] * 100, [episode, step + 1], rtol=1e-5)
                reward = episode + step / 100
                rewards.append(reward)
                assert rollout["reward"][t, n].item() == pytest.approx(reward)
                over = step + 1 == Counter.length(episode)
                terminated, _ = (over and flag for flag in Counter.ending(episode))
                assert (rollout["terminated"][t, n], rollout["done"][t, n]) == (terminated, over)
                next_value = 0 if terminated else value(episode, step + 1)
                td_error = min(reward, 10) + GAMMA * next_value - value(episode, step)
                assert batch["advantage"][t, n].item() == pytest.approx(td_error, rel=1e-4, abs=1e-4)
                assert batch["return"][t, n].item() == pytest.approx(td_error + value(episode, step), rel=1e-4)
                discounted = reward + GAMMA * discounted
                assert rollout["discounted_return"][t, n].item() == pytest.approx(discounted, rel=1e-5)
                episode, step, discounted = (episode + 1, 0, 0.0) if over else (episode, step + 1, discounted)
                episodes_ended += over
    assert actors.episodes == episodes_ended > 40
    lengths = {Counter.length(k) for k in range(60)}
    assert {length for _, length in actors.last} <= lengths and len(actors.last) == min(100, episodes_ended)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_episode_returns_are_raw_whole_and_in_order(num_workers):
    agent = make_agent()
    with make_actors(agent, num_steps=7, num_workers=num_workers) as actors:
        actors.collect(agent, seed=(1, 0))  # lengths 3, 4: two whole episodes in each environment
    first, second = 0 + 0.01 + 0.02, 4 * 1 + 0.01 + 0.02 + 0.03
    assert list(actors.last) == [(pytest.approx(first), 3)] * N + [(pytest.approx(second), 4)] * N
    mean = {"episodic_return": pytest.approx((first + second) / 2), "episodic_length": 3.5}
    assert actors.statistics() == {"episodes": 6} | mean


def test_a_seed_begins_new_episodes_and_none_goes_on():
    agent = make_agent()
    with make_actors(agent, num_steps=2) as actors:
        rows = [actors.collect(agent, seed)["obs"][:, 0, 1].tolist() for seed in ((1, 0), None, (1, 4))]
    assert rows == [pytest.approx(x) for x in ([0, 0.01], [0.02, 0], [0, 0.01])]
    assert actors.episodes == N  # what the third call dropped does not count


def test_rollouts_of_a_single_step():
    """The shortest there are: an episode of three steps takes three of them."""
    agent = make_agent()
    with make_actors(agent, num_steps=1) as actors:
        rows = [actors.collect(agent, seed)["obs"][0].tolist() for seed in ((1, 0), None, None, None)]
    expected = [[0, 0], [0, 0.01], [0, 0.02], [0.01, 0]]  # (episode, step) / 100
    assert rows == [[pytest.approx(x)] * N for x in expected] and list(actors.last) == [(pytest.approx(0.03), 3)] * N


def test_the_statistics_take_all_rows():
    agent = make_agent()
    with make_actors(agent) as actors:
        rollout = actors.collect(agent, seed=(1, 0))
    agent.update_statistics(rollout)
    torch.testing.assert_close(agent.obs_rms.mean, rollout["obs"].flatten(0, 1).double().mean(0))
    torch.testing.assert_close(agent.return_rms.var, rollout["discounted_return"].double().var(correction=0))
    assert agent.obs_rms.count == agent.return_rms.count == T * N


@pytest.mark.parametrize("env_id,D,space", [("CartPole-v1", 4, gym.spaces.Discrete(2)), ("Pendulum-v1", 3, None)])
def test_the_ratio_is_one_before_the_first_update(env_id, D, space):
    """With statistics that have moved: acting, log-probabilities and update see the same normaliser."""
    agent = make_agent(D, space or gym.spaces.Box(-2, 2, (1,)))
    with make_actors(agent, env_id=env_id, num_envs=4, num_steps=64) as actors:
        for k in range(2):
            rollout = actors.collect(agent, seed=(1, k))
            batch = ppo_clip.make_batch(agent, rollout, 0.99, 0.95)
            ratio = (agent.policy(batch["obs"]).log_prob(batch["action"]) - batch["logprob"]).exp()
            assert (ratio - 1).abs().max() < 1e-5 and ppo_clip.mean_kl(agent, batch) < 1e-9
            again = agent.act(rollout["obs"][5], actors.noise[5])  # what was recorded is what the policy does
            torch.testing.assert_close(again, rollout["action"][5])
            agent.update_statistics(rollout)


def test_a_batch_is_a_copy():
    """The rollout's memory is written anew by the next collect; a batch must not change with it."""
    agent = make_agent()
    with make_actors(agent) as actors:
        batch = ppo_clip.make_batch(agent, actors.collect(agent, seed=(1, 0)), 0.99, 0.95)
        before = {key: x.clone() for key, x in batch.items()}
        actors.collect(agent)
    assert all(torch.equal(x, before[key]) for key, x in batch.items())


def test_seeds():
    """Another seed or another step gives other episodes, the same ones the same."""
    agent, observations = make_agent(3, gym.spaces.Box(-2, 2, (1,))), []
    for seed in ((1, 0), (1, 0), (2, 0), (1, 2048)):
        with make_actors(agent, env_id="Pendulum-v1", num_envs=2) as actors:
            observations.append(actors.collect(agent, seed)["obs"][0].clone())
    assert torch.equal(observations[0], observations[1]) and not torch.equal(observations[0][0], observations[0][1])
    assert not torch.equal(observations[0], observations[2]) and not torch.equal(observations[0], observations[3])


def test_actions_reach_the_environment_clipped_and_shifted():
    action = np.array([[0.3, -9.0], [5.0, 0.0]], dtype=np.float32)
    box = gym.spaces.Box(-1, np.inf, (2, 1))
    assert ppo_clip.env_action(action, box).tolist() == [[[pytest.approx(0.3)], [-1]], [[5], [0]]]
    assert ppo_clip.env_action(np.array([0, 1]), gym.spaces.Discrete(2, start=5)).tolist() == [5, 6]


def test_the_first_rollout_sets_the_scale_without_moving_the_policy():
    """Why train() may scale the first rollout by itself: the untrained policy is the same on raw and scaled input."""
    agent = make_agent(3, gym.spaces.Box(-2, 2, (1,)))
    with make_actors(agent, env_id="Pendulum-v1") as actors:
        rollout = actors.collect(agent, seed=(1, 0))
    raw = agent.policy(agent.obs_rms(rollout["obs"]))
    agent.update_statistics(rollout)
    scaled = agent.policy(agent.obs_rms(rollout["obs"]))
    assert torch.distributions.kl_divergence(raw, scaled).max() < 1e-3  # the last layer of a new policy is small


def test_what_a_policy_sees_is_steady(script):
    """Its 0 is the first rollout's mean, and its unit never gets smaller, once there is one: the second observation
    is constant at first. The statistics themselves are exact, and the rewards' unit may shrink."""
    agent, seen, found = script.Agent(2, gym.spaces.Box(-2, 2, (1,))), [], []
    for spread in (1.0, 0.01, 5.0, 0.01):
        obs = torch.randn(T, N, 2) * torch.tensor([spread, 1e-3 * bool(seen)]) + spread
        rollout = {"obs": obs, "discounted_return": spread * torch.randn(T, N)}
        agent.update_statistics(rollout, steady=True)
        seen.append(obs.flatten(0, 1).double())
        torch.testing.assert_close(agent.obs_rms.mean, torch.cat(seen).mean(0))
        torch.testing.assert_close(agent.obs_rms.var, torch.cat(seen).var(0, correction=0))
        found.append(agent.obs_rms(torch.tensor([[1.5, 1.001]]))[0].tolist())
    assert agent.return_rms.inv_std.item() == pytest.approx(agent.return_rms.var.rsqrt().item())
    zero = seen[0].mean(0).tolist()
    std = [torch.cat(seen[: k + 1]).std(0, correction=0).tolist() for k in range(4)]
    unit = (
        [max(x for x, _ in std[: k + 1]) for k in range(4)],
        [1, *(max(y for _, y in std[1 : k + 1]) for k in (1, 2, 3))],
    )
    assert std[1][0] < std[0][0] and std[3][0] < std[2][0] and std[3][1] < std[2][1] and zero[1] == 1
    for (x, y), a, b in zip(found, *unit, strict=True):
        assert (x, y) == (pytest.approx((1.5 - zero[0]) / a, rel=1e-4), pytest.approx(0.001 / b, rel=1e-3))


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v5", "Reacher-v4"])
def test_the_camera_goes_along_with_a_body_that_walks(env_id, script):
    env = script.make_env(env_id, render_mode="rgb_array")
    cameras = [env.unwrapped.model.camera(i).name for i in range(env.unwrapped.model.ncam)]
    assert ("track" in cameras) == (env_id != "Reacher-v4")
    assert env.unwrapped.mujoco_renderer.camera_id == (cameras.index("track") if "track" in cameras else -1)
