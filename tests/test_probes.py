"""Whole training runs on environments where the right value and the right action are known."""

import math

import pytest
import torch

import ppo_clip
import ppo_klpen
import trpo_continuous

GAMMA = 0.9
PPO, TRPO = {"learning_rate": 2e-3}, {"vf_epochs": 10, "cg_iters": 5}  # tasks as small as these need no more
FLAGS = {"num_envs": 4, "num_steps": 64, "num_minibatches": 4, "gamma": GAMMA, "compile": False, "num_workers": 0}
both = pytest.mark.parametrize("script", [ppo_clip, ppo_klpen])
every = pytest.mark.parametrize("script", [ppo_clip, ppo_klpen, trpo_continuous])


def trained(script, tmp_path, name, steps, **flags):
    """Train; returns the value, in units of raw reward, and the policy, both by observation."""
    flags = FLAGS | (TRPO if script is trpo_continuous else PPO) | flags
    args = script.Args(env_id=f"toy_envs:{name}-v0", total_timesteps=steps, run_dir=str(tmp_path / "run"), **flags)
    summary = script.train(args)
    env = script.make_env(args.env_id)
    agent = script.Agent(env.observation_space.shape[0], env.action_space)
    agent.load_state_dict(script.load_checkpoint(summary["checkpoint"])["agent"])
    with torch.no_grad():
        seen = {x: agent.obs_rms(torch.tensor([x])) for x in (-1.0, 0.0, 1.0)}
        value = {x: (agent.value(obs) / agent.return_rms.inv_std).item() for x, obs in seen.items()}
        policy = {x: agent.policy(obs) for x, obs in seen.items()}
    return value, policy


@both
def test_constant_reward(script, tmp_path):
    value, _ = trained(script, tmp_path, "ConstantReward", 4096)
    assert value[0.0] == pytest.approx(1, abs=0.1)


@both
def test_reward_from_observation(script, tmp_path):
    value, _ = trained(script, tmp_path, "RewardFromObs", 4096)
    assert value[-1.0] == pytest.approx(-1, abs=0.1) and value[1.0] == pytest.approx(1, abs=0.1)


@both
def test_delayed_reward(script, tmp_path):
    value, _ = trained(script, tmp_path, "DelayedReward", 4096)
    assert value[0.0] == pytest.approx(GAMMA, abs=0.03) and value[1.0] == pytest.approx(1, abs=0.03)


@both
def test_reward_from_action(script, tmp_path):
    value, policy = trained(script, tmp_path, "RewardFromAction", 4096)
    assert policy[0.0].probs[1] > 0.95
    assert value[0.0] == pytest.approx(1, abs=0.15)


VARIANTS = [{}, {"clip_coef": math.inf}, {"lr_schedule": "kl-adaptive"}, {"target_kl": 0.01}, {"num_workers": 2}]
VARIANTS = [(ppo_clip, flags) for flags in VARIANTS]
VARIANTS += [(ppo_klpen, {}), (ppo_klpen, {"beta_schedule": "fixed"}), (ppo_klpen, {"lr_schedule": "kl-adaptive"})]


@pytest.mark.slow
@pytest.mark.parametrize("script,flags", VARIANTS)
def test_reward_from_observation_and_action(script, tmp_path, flags):
    value, policy = trained(script, tmp_path, "RewardFromBoth", 8192, **flags)
    assert policy[-1.0].probs[0] > 0.9 and policy[1.0].probs[1] > 0.9
    assert value[-1.0] == pytest.approx(1, abs=0.25) and value[1.0] == pytest.approx(1, abs=0.25)


FORMS = [{}, {"kl_constraint": "max"}, {"form": "penalized"}, {"form": "penalized", "beta_schedule": "adaptive"}]
FORMS = [(trpo_continuous, flags) for flags in FORMS]
FORMS += [(ppo_clip, {"lr_schedule": "constant"}), (ppo_klpen, {"lr_schedule": "constant"})]


@pytest.mark.slow
@pytest.mark.parametrize("script,flags", FORMS)
def test_continuous_action_from_observation(script, tmp_path, flags):
    _, policy = trained(script, tmp_path, "BoxTarget", 8192, **flags)
    for obs, target in ((-1.0, -0.5), (1.0, 0.5)):
        assert policy[obs].mean.item() == pytest.approx(target, abs=0.15)


@pytest.mark.slow
@every
def test_a_time_limit_is_not_the_end(script, tmp_path):
    """Reward 1 for ever, cut every 10 steps: V = 1 / (1 - gamma) = 10. Taken as terminal, V would be about 4."""
    if script is trpo_continuous:
        value, _ = trained(script, tmp_path, "EndlessBox", 16384, vf_learning_rate=3e-3)
    else:
        value, _ = trained(script, tmp_path, "Endless", 16384, learning_rate=3e-3, update_epochs=5)
    assert value[0.0] == pytest.approx(1 / (1 - GAMMA), abs=0.5)


@both
def test_the_entropy_bonus_keeps_the_policy_open(script, tmp_path):
    _, policy = trained(script, tmp_path, "RewardFromAction", 4096, ent_coef=10.0)
    assert 0.4 < policy[0.0].probs[1] < 0.75
