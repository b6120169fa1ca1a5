"""The README's learning tables: our scripts beside Stable-Baselines3 and sb3-contrib, 1M steps of the v4 environments.

    python benchmark/learning.py run --workers 2     # what is missing in benchmark/results/ is run, one thread a run
    python benchmark/learning.py table               # from the stored curves alone
    python benchmark/learning.py details             # how each stored run ended; runs that chose a default, too

One csv per run: our progress.csv as it is, and the same first columns from benchmark/sb3.py. The baselines need the
virtual environment that benchmark/speed.py makes (.venv-sb3).
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
MUJOCO = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
FIVE, THREE = range(1, 6), range(1, 4)
OTHERS = range(11, 14)  # to choose defaults by
ALL = dict.fromkeys(MUJOCO, FIVE)
BESIDE_SB3 = ALL | {"Hopper-v4": range(1, 11), "Walker2d-v4": range(1, 11)}  # five leave it open which is better
CHOICE = dict.fromkeys(MUJOCO[:2], OTHERS[:2])
HOPPER = {"Hopper-v4": FIVE}
HOPPER_3 = {"Hopper-v4": THREE}
HOPPER_OTHERS = {"Hopper-v4": OTHERS}
STUDIES = {  # name: command, seeds of each environment, flags
    "ppo_clip": ("ppo_clip.py", BESIDE_SB3, []),
    "sb3_ppo": ("sb3.py ppo", BESIDE_SB3, []),
    "ppo_clip_one_env": ("ppo_clip.py", HOPPER, ["--num-envs", 1, "--num-steps", 2048]),
    "ppo_clip_gamma_0.995": ("ppo_clip.py", ALL, ["--gamma", 0.995]),
    "ppo_clip_cartpole": ("ppo_clip.py", {"CartPole-v1": FIVE}, ["--total-timesteps", 200_000]),
    "ppo_klpen": ("ppo_klpen.py", ALL, []),
    "ppo_klpen_fixed_beta": ("ppo_klpen.py", HOPPER_3, ["--beta-schedule", "fixed"]),
    "ppo_klpen_gamma_0.995": ("ppo_klpen.py", ALL, ["--gamma", 0.995]),
    "ppo_klpen_constant_lr": ("ppo_klpen.py", HOPPER_OTHERS, ["--lr-schedule", "constant"]),
    "trpo": ("trpo_continuous.py", ALL, []),
    "trpo_gamma_0.99": ("trpo_continuous.py", ALL, ["--gamma", 0.99]),
    "sb3_trpo": ("sb3.py trpo", HOPPER, []),
    "sb3_trpo_gamma_0.995": ("sb3.py trpo", HOPPER_3, ["--gamma", 0.995]),
    "trpo_max": ("trpo_continuous.py", HOPPER_3, ["--kl-constraint", "max", "--max-kl", 0.2]),
    "trpo_penalized": ("trpo_continuous.py", HOPPER_3, ["--form", "penalized", "--beta-schedule", "adaptive"]),
    "trpo_seeds_11_12": ("trpo_continuous.py", CHOICE, []),
    "trpo_lambda_0.97": ("trpo_continuous.py", CHOICE, ["--gae-lambda", 0.97]),
    "trpo_max_kl_0.01": ("trpo_continuous.py", HOPPER_OTHERS, ["--gamma", 0.99, "--max-kl", 0.01]),
    "trpo_max_kl_0.02": ("trpo_continuous.py", HOPPER_OTHERS, ["--gamma", 0.99, "--max-kl", 0.02]),
    "trpo_max_kl_0.04": ("trpo_continuous.py", HOPPER_OTHERS, ["--gamma", 0.99, "--max-kl", 0.04]),
}
ENDED = ("episodic_return", "episodic_length", "entropy")


def train(study, env_id, seed):
    script, _, flags = STUDIES[study]
    target = RESULTS / study / f"{env_id}__{seed}.csv"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    where = ROOT / "runs" / "learning" / f"{study}__{env_id}__{seed}"
    new = ["--env-id", env_id, "--seed", seed, *flags]
    if script.startswith("sb3"):
        where.mkdir(parents=True, exist_ok=True)
        program, algorithm = script.split()
        command = [ROOT / ".venv-sb3/bin/python", "-W", "ignore", ROOT / "benchmark" / program, algorithm, *new]
        command += ["--csv", where / "progress.csv"]
    elif (where / "checkpoint.pt").exists():
        command = [sys.executable, ROOT / script, "--num-workers", 0, "--resume", where]
    else:
        command = [sys.executable, ROOT / script, "--num-workers", 0, *new, "--run-dir", where]
    print(" ".join(map(str, command)), flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(x) for x in command], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.copy(where / "progress.csv", target)


def final_returns(study, env_id):
    """Last episodic_return of every stored run of a study, by seed."""
    finals = {}
    for path in (RESULTS / study).glob(f"{env_id}__*.csv"):
        with open(path) as file:
            finals[int(path.stem.split("__")[1])] = float(list(csv.DictReader(file))[-1]["episodic_return"])
    return dict(sorted(finals.items()))


def cell(values):
    """mean ± standard deviation over seeds, and the seeds one by one"""
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.0f} ± {spread:.0f} ({', '.join(f'{x:.0f}' for x in values)})"


def table():
    lines = ["| run | " + " | ".join(MUJOCO) + " |", "| --- |" + " --- |" * len(MUJOCO)]
    for study, (_, seeds, _) in STUDIES.items():
        cells = [cell(list(final_returns(study, x).values())) if x in seeds else "" for x in MUJOCO]
        if any(cells) and OTHERS[0] not in next(iter(seeds.values())):
            lines.append(f"| {study} | {' | '.join(cells)} |")
    return "\n".join(lines)


def details():
    """One line per stored run: last return, episode length and entropy (not of the baselines); TRPO: share of steps
    that the line search shortened, and number that it rejected."""
    lines = []
    for study in STUDIES:
        for path in sorted((RESULTS / study).glob("*.csv")):
            with open(path) as file:
                rows = list(csv.DictReader(file))
            ended = [f"{key} {float(rows[-1][key]):.2f}" for key in ENDED if key in rows[-1]]
            if steps := [float(row["line_search_step"]) for row in rows if "line_search_step" in row]:
                ended += [
                    f"shortened {sum(x > 0 for x in steps) / len(steps):.3f}, rejected {sum(x < 0 for x in steps)}"
                ]
            lines.append(f"{study} {path.stem}: {', '.join(ended)}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "details"))
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    if args.action == "run":
        jobs = [(s, e, k) for s, (_, seeds, _) in STUDIES.items() for e in seeds for k in seeds[e]]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: train(*job), jobs))
    print(details() if args.action == "details" else table())


if __name__ == "__main__":
    main()
