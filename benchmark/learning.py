"""The README's learning table: ppo_clip.py beside Stable-Baselines3's PPO, seeds 1-5, 1M steps of the v4 environments.

    python benchmark/learning.py run --workers 2     # what is missing in benchmark/results/ is run, one thread a run
    python benchmark/learning.py table               # from the stored curves alone

One csv per run: ppo_clip.py's progress.csv as it is, and the same first columns from benchmark/sb3_ppo.py. SB3 needs
the virtual environment that benchmark/speed.py makes (.venv-sb3).
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
SEEDS = (1, 2, 3, 4, 5)
MUJOCO = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
STUDIES = {  # name: environments, the script's flags (None: SB3)
    "ppo_clip": (MUJOCO, []),
    "sb3_ppo": (MUJOCO, None),
    "ppo_clip_one_env": (("Hopper-v4",), ["--num-envs", 1, "--num-steps", 2048]),
    "ppo_clip_cartpole": (("CartPole-v1",), ["--total-timesteps", 200_000]),
}


def train(study, env_id, seed, flags):
    target = RESULTS / study / f"{env_id}__{seed}.csv"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    where = ROOT / "runs" / "learning" / f"{study}__{env_id}__{seed}"
    if flags is None:
        where.mkdir(parents=True, exist_ok=True)
        command = [ROOT / ".venv-sb3/bin/python", "-W", "ignore", ROOT / "benchmark/sb3_ppo.py", "--env-id", env_id]
        command += ["--seed", seed, "--csv", where / "progress.csv"]
    elif (where / "checkpoint.pt").exists():
        command = [sys.executable, ROOT / "ppo_clip.py", "--resume", where]
    else:
        command = [sys.executable, ROOT / "ppo_clip.py", "--env-id", env_id, "--seed", seed, "--run-dir", where, *flags]
    print(" ".join(map(str, command)), flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(x) for x in command], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.copy(where / "progress.csv", target)


def final_returns(study, env_id):
    """Last episodic_return of every stored run of a study, by seed."""
    finals = {}
    for path in sorted((RESULTS / study).glob(f"{env_id}__*.csv")):
        with open(path) as file:
            finals[int(path.stem.split("__")[1])] = float(list(csv.DictReader(file))[-1]["episodic_return"])
    return finals


def table():
    lines = ["| environment | run | mean ± std | seeds 1-5 |", "| --- | --- | ---: | --- |"]
    for env_id in (*MUJOCO, "CartPole-v1"):
        for study, (env_ids, _) in STUDIES.items():
            finals = final_returns(study, env_id)
            if env_id in env_ids and finals:
                values = list(finals.values())
                spread = statistics.stdev(values) if len(values) > 1 else float("nan")
                seeds = ", ".join(f"{x:.0f}" for x in values)
                lines.append(f"| {env_id} | {study} | {statistics.mean(values):.0f} ± {spread:.0f} | {seeds} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.action == "run":
        jobs = [(s, e, seed, flags) for s, (envs, flags) in STUDIES.items() for e in envs for seed in SEEDS]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: train(*job), jobs))
    print(table())


if __name__ == "__main__":
    main()
