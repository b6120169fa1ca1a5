"""Environments whose time limit is reported as an end, for the study `truncation`. Named in an --env-id as
`terminal_envs:Pendulum-v1-terminal-v0`, with this folder on the PYTHONPATH."""

import gymnasium as gym


class TimeLimitIsTheEnd(gym.Wrapper):
    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


for env_id in ("Pendulum-v1", "Reacher-v4"):
    gym.register(
        f"{env_id}-terminal-v0",
        entry_point=lambda env_id=env_id, **kwargs: TimeLimitIsTheEnd(gym.make(env_id, **kwargs)),
        disable_env_checker=True,
    )
