"""Does Population Based Training help ppo_clip.py on Hopper-v4? Against random search, on fresh episodes, with replays.

    python benchmark/pbt_learning.py run      # resumable: finished populations are kept, broken ones go on
    python benchmark/pbt_learning.py table    # from benchmark/results/pbt_learning.json alone

Arms at equal environment steps, the population being the unit: PBT, and random search (quantile 0: the same code path,
the same initial draws, the same seeds), --repetitions of each. Then, of each population: its best member on 50 fresh
episodes with the mean action; and of each PBT population the winner's schedule of hyperparameters trained again with
new seeds (--replay), beside the script's defaults on the same seeds. Intervals: 95 %, bootstrap over populations.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results/pbt_learning.json"
SEARCH = ["--mutate", "learning_rate:log:3e-5:3e-3", "--mutate", "clip_coef:lin:0.05:0.4"]
SEARCH += ["--mutate", "ent_coef:log:1e-5:1e-2", "--mutate", "gae_lambda:log:0.9:0.99"]


def python(*command):
    print(" ".join(map(str, command)), flush=True)
    return subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout


def populate(args, name, seed, members, *flags):
    """One population, to its end; goes on where it was broken off. Returns its folder."""
    folder = ROOT / args.run_dir / f"{name}-{seed}"
    command = [ROOT / "pbt_launcher.py", ROOT / "ppo_clip.py", "--env-id", args.env_id, "--run-dir", folder, *flags]
    command += ["--seed", seed, "--population", members, "--slots", args.slots]
    command += ["--total-timesteps", args.total_timesteps, "--interval", args.total_timesteps // 20]
    python(*command, *(["--resume"] if (folder / "args.json").exists() else []), "--", "--compile")
    return folder


def final_returns(folder):
    """Every member's mean training return over its last leg; nan where no episode ended in it."""
    state = json.loads((folder / "state.json").read_text())
    return [float("nan") if m["score"] is None else m["score"] for m in state["members"].values()]


def run(args):
    rows = []
    for repetition in range(args.repetitions):
        seed = 1000 * (repetition + 1)  # members' seeds count up from it
        row = {"repetition": repetition, "population": args.population, "total_timesteps": args.total_timesteps}
        for arm, flags in (("pbt", []), ("random", ["--quantile", 0])):
            folder = populate(args, arm, seed, args.population, *SEARCH, *flags)
            evaluation = ["--evaluate", folder / "best.pt", "--eval-episodes", 50, "--seed", seed + 500]
            row[arm] = json.loads(python(ROOT / "ppo_clip.py", *evaluation))["mean"]
            row[f"{arm}_members"] = final_returns(folder)
        winner = ROOT / args.run_dir / f"pbt-{seed}"
        row["replay"] = final_returns(populate(args, "replay", seed + 100, 2, *SEARCH, "--replay", winner))
        row["defaults"] = final_returns(populate(args, "defaults", seed + 100, 2, "--quantile", 0))
        rows.append(row)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def interval(values, draws=10_000):
    """95 % bootstrap interval of the mean."""
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return np.percentile(means, [2.5, 97.5])


def table():
    rows = json.loads(RESULTS.read_text())
    arms = {
        "PBT, best member, 50 fresh episodes": [r["pbt"] for r in rows],
        "random search, best member, 50 fresh episodes": [r["random"] for r in rows],
        "PBT, all members' training return": [float(np.nanmean(r["pbt_members"])) for r in rows],
        "random search, all members' training return": [float(np.nanmean(r["random_members"])) for r in rows],
        "the winner's schedule again, new seeds, training return": [float(np.nanmean(r["replay"])) for r in rows],
        "defaults, the same new seeds, training return": [float(np.nanmean(r["defaults"])) for r in rows],
    }
    lines = ["| | mean | 95 % interval | by population |", "| --- | ---: | --- | --- |"]
    for name, x in arms.items():
        low, high = interval(x)
        lines.append(f"| {name} | {np.mean(x):.0f} | {low:.0f}-{high:.0f} | {', '.join(f'{v:.0f}' for v in x)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--env-id", default="Hopper-v4")
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--run-dir", default="runs/pbt_learning")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    print(table())


if __name__ == "__main__":
    main()
