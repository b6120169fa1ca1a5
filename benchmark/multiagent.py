"""The README's multi-agent tables: ppo_multiagent.py on cooperative worlds and in self-play, three seeds each.

    python benchmark/multiagent.py run --workers 2 [--only mappo_spread selfplay]   # what is missing; resumable
    python benchmark/multiagent.py table                                            # from the stored data alone
    python benchmark/multiagent.py speed                                            # one core, interleaved, medians

One csv of about 200 rows per run in benchmark/results/, and for self-play a json with scores against random play,
open_spiel's MCTS with 50 simulations a move (200 games), the run's own earliest snapshots, and at the end Elo ratings.
Needs the optional packages of tests/requirements.txt and, for HalfCheetah, gymnasium-robotics==1.4.2.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
LISTENER = ["--env-id", "mpe2.simple_speaker_listener_v4", "--no-share-params", "--update-epochs", 15]
CHEETAH = ["--env-id", "gymnasium_robotics.mamujoco_v1", "--no-share-params", "--num-envs", 8, "--num-steps", 256]
CHEETAH += ["--env-kwargs", '{"scenario": "HalfCheetah", "agent_conf": "2x3"}', "--num-minibatches", 32]
CHEETAH += ["--learning-rate", 3e-4, "--ent-coef", 0, "--max-grad-norm", 0.5]
SPREAD = ["--total-timesteps", 10_000_000, "--hidden-size", 128]
ONE = ["--total-timesteps", 550_000, "--num-minibatches", 1]
SELFPLAY = ["--algorithm", "selfplay", "--total-timesteps", 5_000_000]
SEEDS = range(1, 4)
STUDIES = {  # name: flags, the steps at which the table reads the return
    "selfplay": (SELFPLAY, ()),
    "selfplay_latest_only": ([*SELFPLAY, "--latest-prob", 1], ()),
    "mappo_spread_550k": (["--total-timesteps", 550_000], (100_000, 550_000)),
    "ippo_spread_550k": (["--algorithm", "ippo", "--total-timesteps", 550_000], (100_000, 550_000)),
    "mappo_spread_one_minibatch": (ONE, (100_000, 550_000)),
    "ippo_spread_one_minibatch": (["--algorithm", "ippo", *ONE], (100_000, 550_000)),
    "mappo_listener": ([*LISTENER, "--total-timesteps", 220_000], (220_000,)),
    "mappo_reference": (["--env-id", "mpe2.simple_reference_v3", "--total-timesteps", 190_000], (190_000,)),
    "mappo_cheetah": (CHEETAH, (1_000_000,)),
    "mappo_spread": (SPREAD, (100_000, 550_000, 10_000_000)),
    "ippo_spread": (["--algorithm", "ippo", *SPREAD], (100_000, 550_000, 10_000_000)),
    "mappo_spread_20M": ([*SPREAD, "--total-timesteps", 20_000_000], (100_000, 550_000, 20_000_000)),
}


def script(*command, name="ppo_multiagent.py"):
    """Run the script on one thread; its JSON line."""
    command = [sys.executable, ROOT / name, *map(str, command)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def rated(*command):
    """What benchmark/tournament.py says of a run."""
    return script(*command, name="benchmark/tournament.py")


def train(study, seed):
    where, target = ROOT / "runs/multiagent" / f"{study}__{seed}", RESULTS / study / f"{seed}.csv"
    flags, _ = STUDIES[study]
    if target.exists():
        return
    print(study, seed, flush=True)

    def go_on(*stop):
        script(*(["--resume", where] if (where / "checkpoint.pt").exists() else [*new, "--run-dir", where]), *stop)

    new = [*flags, "--seed", seed]
    scores = {}
    for stop in (2_000_000, None) if "selfplay" in study else (None,):
        go_on(*(["--stop-at-step", stop] if stop else []))
        if "selfplay" in study:
            rate = lambda opponent, games: rated(where, opponent, "--games", games, "--seed", 100 + seed)  # noqa: E731
            pool = rate("pool", 100)
            last = pool["global_step"][-1]
            early = [x for x, at in zip(pool["returns"], pool["global_step"]) if at <= 0.1 * last]
            scores[last] = {
                "random": rate("random", 1000)["mean"],
                "mcts-50": rate("mcts-50", 200)["mean"],
                "first tenth": statistics.mean(early),
                "elo": pool["elo"],
                "elo_steps": pool["global_step"],
            }
    target.parent.mkdir(parents=True, exist_ok=True)
    if scores:
        target.with_suffix(".json").write_text(json.dumps(scores) + "\n")
    with open(where / "progress.csv") as file:
        header, *rows = file.readlines()
    every = max(1, len(rows) // 200)
    target.write_text("".join([header, *rows[every - 1 :: every]]))


def head_to_head(seed):
    """Mean score of the run with a pool against the run with current-only opponents, 400 games."""
    a, b = (ROOT / "runs/multiagent" / f"{study}__{seed}" for study in ("selfplay", "selfplay_latest_only"))
    target = RESULTS / "selfplay" / f"{seed}_against_latest_only.json"
    if not target.exists():
        target.write_text(json.dumps(rated(a, b, "--games", 400)["mean"]) + "\n")


def return_at(path, step):
    """Mean episodic_return of the rows within 2 % of a step: each row is the mean of the last 100 episodes."""
    with open(path) as file:
        rows = [(int(r["global_step"]), float(r["episodic_return"])) for r in csv.DictReader(file)]
    near = [x for at, x in rows if abs(at - step) <= 0.02 * step]
    return statistics.mean(near or [min(rows, key=lambda row: abs(row[0] - step))[1]])


def cell(values):
    return f"{statistics.mean(values):.1f} ({', '.join(f'{x:.1f}' for x in values)})"


def table():
    """Returns at 100k and 550k steps and at a run's end, where the study has that many."""
    lines = ["| return | at 100,000 steps | at 550,000 | at the end |", "| --- | --- | --- | --- |"]
    for study, (_, steps) in STUDIES.items():
        runs = sorted((RESULTS / study).glob("[0-9].csv"))
        if runs and steps:
            cells = [cell([return_at(path, at) for path in runs]) if at in steps else "" for at in (100_000, 550_000)]
            last = [return_at(path, steps[-1]) for path in runs]
            lines.append(f"| {study} | {' | '.join(cells)} | {cell(last)} at {steps[-1]:,} |")
    return "\n".join(lines)


def strength_table():
    columns = ("random", "mcts-50", "first tenth")
    lines = ["| run | learner moves | " + " | ".join(columns) + " |", "| --- | ---: |" + " --- |" * len(columns)]
    for study in ("selfplay", "selfplay_latest_only"):
        runs = [json.loads(path.read_text()) for path in sorted((RESULTS / study).glob("[0-9].json"))]
        for steps in zip(*runs):
            scores = [run[step] for run, step in zip(runs, steps)]
            cells = [", ".join(f"{x[key]:.2f}" for x in scores) for key in columns]
            lines.append(f"| {study} | {int(steps[0]):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed():
    """Steps per second on one core, the median over iterations of the median of three runs, taking turns."""
    rates = {"mappo": [], "ippo": [], "selfplay": []}
    for repeat in range(3):
        for algorithm, medians in rates.items():
            where = ROOT / "runs/multiagent_speed" / f"{algorithm}-{repeat}-{time.time():.0f}"
            steps = ["--total-timesteps", 300_000 if algorithm == "selfplay" else 150_000, "--compile"]
            script("--algorithm", algorithm, *steps, "--run-dir", where)
            with open(where / "progress.csv") as file:
                medians.append(statistics.median(float(row["sps"]) for row in list(csv.DictReader(file))[2:]))
    for algorithm, x in rates.items():
        print(f"| {algorithm} | {statistics.median(x):.0f} | {min(x):.0f}-{max(x):.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "speed"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES)
    args = parser.parse_args()
    if args.action == "speed":
        speed()
        return
    if args.action == "run":
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: train(*job), [(study, seed) for study in args.only for seed in SEEDS]))
            if {"selfplay", "selfplay_latest_only"} <= set(args.only):
                list(pool.map(head_to_head, SEEDS))
    print(table(), strength_table(), sep="\n\n")


if __name__ == "__main__":
    main()
