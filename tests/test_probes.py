"""Whole training runs on environments where the right value and the right action are known."""

import pytest
import torch

import ppo_clip

GAMMA = 0.9
FLAGS = {"num_envs": 4, "num_steps": 64, "num_minibatches": 4, "learning_rate": 1e-3, "gamma": GAMMA, "compile": False}


def trained(tmp_path, name, steps, **flags):
    """Train; returns the value, in units of raw reward, and the actor, both as functions of an observation."""
    args = ppo_clip.Args(
        env_id=f"toy_envs:{name}-v0", total_timesteps=steps, run_dir=str(tmp_path / "run"), **(FLAGS | flags)
    )
    summary = ppo_clip.train(args)
    env = ppo_clip.make_env(args.env_id)
    agent = ppo_clip.Agent(env.observation_space.shape[0], env.action_space, torch.Generator())
    agent.load_state_dict(ppo_clip.load_checkpoint(summary["checkpoint"])["agent"])
    normalize, scale = agent.obs_rms.normalizer(), agent.return_rms.inv_std()
    with torch.no_grad():
        value = {x: (agent.value(normalize(torch.tensor([x]))) / scale).item() for x in (-1.0, 0.0, 1.0)}
        policy = {x: agent.policy(normalize(torch.tensor([x]))) for x in (-1.0, 0.0, 1.0)}
    return value, policy


def test_constant_reward(tmp_path):
    value, _ = trained(tmp_path, "ConstantReward", 4096)
    assert value[0.0] == pytest.approx(1, abs=0.1)


def test_reward_from_observation(tmp_path):
    value, _ = trained(tmp_path, "RewardFromObs", 8192)
    assert value[-1.0] == pytest.approx(-1, abs=0.1) and value[1.0] == pytest.approx(1, abs=0.1)


def test_delayed_reward(tmp_path):
    value, _ = trained(tmp_path, "DelayedReward", 8192)
    assert value[0.0] == pytest.approx(GAMMA, abs=0.1) and value[1.0] == pytest.approx(1, abs=0.1)


def test_reward_from_action(tmp_path):
    value, policy = trained(tmp_path, "RewardFromAction", 8192)
    assert policy[0.0].exp()[1] > 0.95
    assert value[0.0] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "flags", [{}, {"clip": False}, {"clip_vloss": True}, {"lr_schedule": "kl-adaptive"}, {"target_kl": 0.01}]
)
def test_reward_from_observation_and_action(tmp_path, flags):
    value, policy = trained(tmp_path, "RewardFromBoth", 12288, **flags)
    assert policy[-1.0].exp()[0] > 0.9 and policy[1.0].exp()[1] > 0.9
    assert value[-1.0] == pytest.approx(1, abs=0.25) and value[1.0] == pytest.approx(1, abs=0.25)


def test_continuous_action_from_observation(tmp_path):
    _, policy = trained(tmp_path, "BoxTarget", 16384, lr_schedule="constant")
    for obs, target in ((-1.0, -0.5), (1.0, 0.5)):
        assert policy[obs][0].item() == pytest.approx(target, abs=0.15)


def test_a_time_limit_is_not_the_end(tmp_path):
    """Reward 1 for ever, cut every 10 steps: V = 1 / (1 - gamma) = 10. Taken as terminal, V would be about 4."""
    value, _ = trained(tmp_path, "Endless", 32768, gae_lambda=0.95)
    assert value[0.0] == pytest.approx(1 / (1 - GAMMA), abs=0.5)


def test_the_entropy_bonus_keeps_the_policy_open(tmp_path):
    _, policy = trained(tmp_path, "RewardFromAction", 8192, ent_coef=10.0)
    assert 0.4 < policy[0.0].exp()[1] < 0.75
