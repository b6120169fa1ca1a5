"""Small environments where the right answer is known. `toy_envs:NAME-v0` makes gymnasium import this module first."""

import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Counter(gym.Env):
    """Observation (episode, step) / 100, which tells where a row comes from. Episode k has 3 + k % 4 steps and ends, by
    turns, terminated, truncated, and both at once. A step's reward is episode + step / 100, as seen before it."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1, 1, (1,))
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode + 1
        self.step_in_episode = 0
        return self.obs(), {}

    def obs(self):
        return np.array([self.episode, self.step_in_episode], dtype=np.float32) / 100

    def step(self, action):
        reward = self.episode + self.step_in_episode / 100
        self.step_in_episode += 1
        over = self.step_in_episode == self.length(self.episode)
        terminated, truncated = self.ending(self.episode)
        return self.obs(), reward, over and terminated, over and truncated, {}

    @staticmethod
    def length(episode):
        return 3 + episode % 4

    @staticmethod
    def ending(episode):
        return [(True, False), (False, True), (True, True)][episode % 3]


class Toy(gym.Env):
    """Subclasses define episode_length, sample_obs() and reward(obs, action, step)."""

    observation_space = Box(-1, 1, (1,))
    action_space = Discrete(2)
    episode_length = 1

    def sample_obs(self):
        return 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        self.obs = self.sample_obs()
        return np.array([self.obs], dtype=np.float32)

    def step(self, action):
        reward = self.reward(self.obs, action, self.t)
        self.t += 1
        return self.observe(), reward, self.t == self.episode_length, False, {}


class ConstantReward(Toy):
    def reward(self, obs, action, t):
        return 1.0


class RewardFromObs(Toy):
    def sample_obs(self):
        return self.np_random.choice([-1.0, 1.0])

    def reward(self, obs, action, t):
        return obs


class DelayedReward(Toy):
    episode_length = 2

    def sample_obs(self):
        return float(self.t)

    def reward(self, obs, action, t):
        return float(t == 1)


class RewardFromAction(Toy):
    def reward(self, obs, action, t):
        return 1.0 if action == 1 else -1.0


class RewardFromBoth(RewardFromObs):
    def reward(self, obs, action, t):
        return 1.0 if action == (obs > 0) else -1.0


class BoxTarget(RewardFromObs):
    """The best action is half the observation."""

    action_space = Box(-1, 1, (1,))

    def reward(self, obs, action, t):
        assert self.action_space.contains(np.asarray(action, dtype=np.float32)), action
        return -float(np.square(action[0] - 0.5 * obs))


class Endless(Toy):
    """Reward 1 for ever, seen through a time limit of 10 steps: the value of every state is 1 / (1 - gamma)."""

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 10, {}


class EndlessBox(Endless):
    action_space = Box(-1, 1, (1,))


class OffsetActions(RewardFromAction):
    action_space = Discrete(2, start=5)

    def reward(self, obs, action, t):
        assert action in (5, 6), action
        return float(action == 6)


class DictObs(RewardFromBoth):
    observation_space = Dict(position=Box(-1, 1, (2,)), phase=Discrete(3))

    def observe(self):
        self.obs = self.sample_obs()
        return {"position": np.array([self.obs, 0], dtype=np.float32), "phase": 1}


class TupleActions(ConstantReward):
    action_space = Tuple((Discrete(2), Discrete(2)))


class HugeReward(ConstantReward):
    def reward(self, obs, action, t):
        return float("inf")


class Picture(ConstantReward):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    episode_length = 5

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), 40 * self.t, dtype=np.uint8)


class Unrenderable(Picture):
    def render(self):
        raise RuntimeError("no display\nand a second line")


class Broken(ConstantReward):
    """Fails in the call, in the way, and after the number of steps that its keywords say."""

    episode_length = 5

    def __init__(self, call="step", way="raise", after=30):
        self.call, self.way, self.after, self.steps = call, way, after, 0
        if call == "__init__":
            self.fail()

    def fail(self):
        if self.way == "raise":
            raise ZeroDivisionError("a bug\nin two lines")
        if self.way == "exit":
            sys.exit(0)
        if self.way == "import":
            raise ImportError("no module named physics")
        if self.way == "hang":
            Path(f"hanging-{os.getpid()}").touch()
            time.sleep(3600)
        return {"shape": np.zeros(3, np.float32), "short": np.zeros(()), "nan": np.array([np.nan], np.float32)}[
            self.way
        ]

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return (self.fail() if self.call == "reset" and self.steps >= self.after else obs), info

    def step(self, action):
        self.steps += 1
        obs, *rest = super().step(action)
        return (self.fail() if self.call == "step" and self.steps > self.after else obs), *rest

    def good(self, action):
        return super().step(action)


class NoRenderMode(ConstantReward):
    """An __init__ that takes no render_mode, as many people write it."""

    episode_length = 5

    def __init__(self):
        self.known = True


class Image(ConstantReward):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Slow(ConstantReward):
    """Takes a second to be made."""

    episode_length = 5

    def __init__(self):
        Path("making").touch()
        time.sleep(1)


for cls in list(globals().values()):
    if isinstance(cls, type) and issubclass(cls, gym.Env) and cls not in (gym.Env, Toy):
        gym.register(f"{cls.__name__}-v0", entry_point=cls)

for call, way in [("__init__", "raise"), ("reset", "raise"), ("reset", "nan"), ("reset", "shape")]:
    gym.register(f"Broken-{call}-{way}-v0", entry_point=Broken, kwargs={"call": call, "way": way})
for way in ("raise", "import", "exit", "shape", "short", "nan", "hang"):
    gym.register(f"Broken-step-{way}-v0", entry_point=Broken, kwargs={"way": way})
