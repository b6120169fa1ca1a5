"""Stable-Baselines3's PPO and sb3-contrib's TRPO on the same work as ours: the baselines of the README's tables.

Run it in the virtual environment that benchmark/speed.py makes for it (.venv-sb3; the pins stand there):

    python benchmark/sb3.py ppo --env-id Hopper-v4 --seed 1 --csv progress.csv
    python benchmark/sb3.py trpo --env-id Hopper-v4 --seed 1 --csv progress.csv

It writes `global_step,wall_time,episodic_return` once per iteration: the columns of our progress.csv that studies and
measurements of speed read, with the same meaning (mean raw return of the last 100 finished episodes). With --fresh K it
prints one line of JSON at the end: the mean raw return of K fresh episodes with the mean action, and of K with sampled
ones.
"""

import argparse
import csv
import json
import time

import torch

torch.set_num_threads(1)

import gymnasium as gym  # noqa: E402
from sb3_contrib import TRPO  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402


class Progress(BaseCallback):
    """One row per rollout. SB3's ep_info_buffer has the last 100 episodes' raw returns (Monitor sits innermost)."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def _on_training_start(self):
        self.start, self.writer = time.time(), csv.writer(open(self.path, "w", newline="", buffering=1))
        self.writer.writerow(["global_step", "wall_time", "episodic_return"])

    def _on_step(self):
        return True

    def _row(self):
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        mean = sum(returns) / len(returns) if returns else float("nan")
        self.writer.writerow([self.num_timesteps, round(time.time() - self.start, 3), mean])

    def _on_rollout_start(self):  # the update of the rollout before has just ended
        if self.num_timesteps:
            self._row()

    def _on_training_end(self):
        self._row()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=("ppo", "trpo"))
    parser.add_argument("--env-id", default="Hopper-v4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=256)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--cg-iters", type=int, default=15, help="TRPO's conjugate-gradient iterations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", required=True)
    parser.add_argument("--fresh", type=int, default=0, help="episodes to evaluate at the end")
    args = parser.parse_args()
    envs = DummyVecEnv([lambda: Monitor(gym.make(args.env_id)) for _ in range(args.num_envs)])
    envs = VecNormalize(envs, gamma=args.gamma)
    same = {"n_steps": args.num_steps, "gamma": args.gamma, "gae_lambda": 0.95, "seed": args.seed}
    same |= {"device": args.device}
    if args.algorithm == "ppo":
        model = PPO(
            "MlpPolicy", envs, batch_size=64, n_epochs=10, clip_range=0.2, ent_coef=0.0, vf_coef=0.5, max_grad_norm=0.5,
            learning_rate=lambda remaining: 3e-4 * remaining, **same,
        )  # fmt: skip
    else:
        model = TRPO(
            "MlpPolicy", envs, batch_size=128, n_critic_updates=20, learning_rate=1e-3, target_kl=0.01, cg_damping=0.1,
            cg_max_steps=args.cg_iters, **same,
        )  # fmt: skip
    model.learn(args.total_timesteps, callback=Progress(args.csv))
    if args.fresh:
        envs.training = envs.norm_reward = False
        kinds = {"mean_action": True, "sampled": False}
        print(json.dumps({kind: float(evaluate_policy(model, envs, args.fresh, x)[0]) for kind, x in kinds.items()}))


if __name__ == "__main__":
    main()
