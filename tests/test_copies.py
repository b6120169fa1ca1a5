"""A script is there to be copied and changed. Each of these edits of a copy touches one place; then the copy must still
learn, and its checkpoint must still hold the policy that learned."""

import csv
import json

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MY_MODULE = """
import gymnasium as gym, numpy as np

class MyEnv(gym.Env):
    '''One step an episode; the best action is half the observation.'''
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.choice([-1.0, 1.0])
        return np.array([self.obs], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), -float((action[0] - 0.5 * self.obs) ** 2), True, False, {}

gym.register("MyEnv-v0", MyEnv)
"""
FLAGS = ["--env-id", "my_module:MyEnv-v0", "--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4"]
FLAGS += ["--total-timesteps", "8192", "--learning-rate", "2e-3", "--no-compile", "--run-dir", "run"]

TERM = """    logged["l2"] = sum(p.square().sum() for p in agent.actor.parameters())
    return loss + 1e-4 * logged["l2"], logged
"""
EDITS = {
    "three hidden layers of 256": [("hidden=(64, 64)", "hidden=(256, 256, 256)")],
    "ReLU for tanh": [("activation=nn.Tanh", "activation=nn.ReLU")],
    "a standard deviation for each state": [
        ("nn.Parameter(torch.zeros(self.action_dim))", "mlp(obs_dim, self.action_dim, 0.01)"),
        ("self.log_std.expand_as(out)", "self.log_std(obs)"),
    ],
    "another term in the loss": [("    return loss, logged\n", TERM)],
}  # two more, another file name and an environment of one's own, are in all of them


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_clip", "ppo_klpen"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_learns(name, edit, tmp_path, cli):
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    source = (ROOT / f"{name}.py").read_text()
    for old, new in EDITS[edit]:
        assert source.count(old) == 1, f"{old!r} is not one place"
        source = source.replace(old, new)
    (tmp_path / "my_ppo.py").write_text(source)

    def run(*flags):
        process = cli("my_ppo.py", *flags)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    assert run(*FLAGS, "--num-workers", "2")["global_step"] == 8192
    with open(tmp_path / "run" / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    first, last = float(rows[0]["episodic_return"]), float(rows[-1]["episodic_return"])
    assert first < -0.5 and last > 0.6 * first  # it learns while it acts with noise,
    assert run("--evaluate", "run", "--eval-episodes", "50")["mean"] > -0.02  # and what it has learned is saved
    if edit == "another term in the loss":
        assert float(rows[-1]["l2"]) > 0
        assert EventAccumulator(str(tmp_path / "run")).Reload().Scalars("losses/l2")[-1].value > 0
