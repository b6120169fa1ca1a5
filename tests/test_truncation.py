"""A time limit is not the end of the world. This file shows by numbers what it costs to confuse the two.

The task pays 1 at every step and never ends, so its only state is worth 1 + gamma + gamma^2 + ... = 1 / (1 - gamma).
We see it through a time limit: after L steps the episode is truncated and another one begins. That is how gymnasium
presents Pendulum (L = 200) and most MuJoCo tasks (L = 1000). The critic does not see the clock.

What the critic learns at the last step before the limit depends on the library:

    truncated is not terminated       V(s) <- r + gamma V(s')    The world goes on: V stands for what nobody saw.
    done = terminated or truncated    V(s) <- r                  Nothing follows. True of a fall, false of a time limit.

The first rule is the one of this project and of Stable-Baselines3; Pardo et al. (2018, arXiv 1712.00378) explain it. It
finds the true value, whatever L and lambda are. The second is the one of CleanRL's ppo_continuous_action.py and of many
scripts that descend from it. It finds another number, and one that depends on L and lambda:

    python tests/test_truncation.py                    # prints the table
    python -m pytest -n 0 tests/test_truncation.py     # proves it, for the code of each training script
"""

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent.parent)]
SCRIPTS = [importlib.import_module(name) for name in ("ppo_clip", "ppo_klpen", "trpo_continuous")]
RULES = ("truncated is not terminated", "done = terminated or truncated")
L = 10  # the time limit of toy_envs:EndlessBox-v0


def fixed_point(rule, gamma, lam, limit):
    """The value V to which learning converges, exactly: the V that equals the mean of its own targets.

    With n steps left to the limit the target is the lambda-return R(n) = 1 + gamma ((1 - lambda) V + lambda R(n-1)).
    What the rule says about the limit itself is R(0). All of them are a + b V, so the mean can be solved for V."""
    a, b = (0.0, 1.0) if rule == RULES[0] else (0.0, 0.0)  # R(0) = V, or R(0) = 0
    sum_a = sum_b = 0.0
    for n in range(1, limit + 1):
        bootstrap = gamma * (1 - lam) if n > 1 or rule == RULES[0] else 0.0  # at the limit the second rule has no V
        a, b = 1 + gamma * lam * a, bootstrap + gamma * lam * b
        sum_a, sum_b = sum_a + a, sum_b + b
    return sum_a / (limit - sum_b)


class Constant(torch.nn.Module):
    """The critic of a world with one state: a table with one entry."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def forward(self, obs):
        return self.value.expand(*obs.shape[:-1], 1)


def learned(script, rule, gamma, lam):
    """The same value, learned by a training script's own code: its rollout of the task, its make_batch and its gae.
    The table's entry becomes the mean of the returns, again and again, until it no longer changes."""
    args = script.Args(env_id="toy_envs:EndlessBox-v0", num_envs=2, num_steps=2 * L, num_workers=0, gamma=gamma)
    agent = script.Agent(1, script.make_env(args.env_id).action_space)
    agent.critic = Constant()
    with script.Actors(args, agent) as actors:
        rollout = actors.collect(agent, seed=(1, 0))  # two whole episodes in each environment
    assert rollout["done"].sum() == 4 and not rollout["terminated"].any()
    if rule != RULES[0]:
        rollout["terminated"] = rollout["done"]
    for _ in range(150):
        agent.critic.value.data = script.make_batch(agent, rollout, gamma, lam)["return"].mean()
    return agent.critic.value.item()


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_the_rules_and_what_they_converge_to(gamma, lam):
    """Ours finds 1 / (1 - gamma) for any lambda and any limit; the other's value is always too low."""
    true_value = 1 / (1 - gamma)
    for limit in (1, 10, 1000):
        assert fixed_point(RULES[0], gamma, lam, limit) == pytest.approx(true_value, rel=1e-9)
        assert fixed_point(RULES[1], gamma, lam, limit) < 0.995 * true_value


def test_what_can_be_said_without_an_algorithm():
    """lambda = 0: gamma V counts in all but one of L steps. lambda = 1: the mean of the sums of 1, 2, ... L rewards."""
    assert fixed_point(RULES[1], 0.9, 0.0, 10) == pytest.approx(1 / (1 - 0.9 * 9 / 10))  # 5.26, not 10
    sums = [sum(0.9**k for k in range(n)) for n in range(1, 11)]
    assert fixed_point(RULES[1], 0.9, 1.0, 10) == pytest.approx(sum(sums) / 10)  # 4.14, not 10


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_training_scripts_learn_the_true_value(script, rule, lam):
    """With their own rule; and the other value, if `terminated` is overwritten by `done`: so the rule is the cause."""
    value = learned(script, rule, 0.9, lam)
    assert value == pytest.approx(fixed_point(rule, 0.9, lam, L), rel=1e-5)
    assert rule != RULES[0] or value == pytest.approx(10, rel=1e-5)


if __name__ == "__main__":
    print(f"gamma  lambda  limit  true value  {RULES[0]}  {RULES[1]}")
    for gamma, (lam, limit) in itertools.product((0.9, 0.99), itertools.product((0.0, 0.95, 1.0), (10, 200, 1000))):
        values = 1 / (1 - gamma), *(fixed_point(rule, gamma, lam, limit) for rule in RULES)
        print("{:5}  {:6}  {:5}  {:10.2f}  {:27.2f}  {:30.2f}".format(gamma, lam, limit, *values))
