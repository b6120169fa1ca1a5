"""Does Population Based Training help ppo_clip.py? Against random search, on fresh episodes, with replays.

    python benchmark/pbt_learning.py run --env-id Hopper-v4      # and Walker2d-v4; some five hours each on two cores
    python benchmark/pbt_learning.py table --env-id Hopper-v4    # from benchmark/results alone

`run` can be broken off and started again: populations that have ended are kept, those that have not go on.

Arms at equal environment steps, the population being the unit: PBT, and random search (quantile 0: the same code, the
same first draws, the same seeds), --repetitions of each. Of each population, the best member on 50 fresh episodes with
the mean action. Then, to tell a good schedule from a lucky member, ten new seeds each for three ways to train alone:
with the schedule of PBT's winner (--replay), with the constant setting of random search's winner, and with the script's
default flags. Intervals: 95 %, bootstrap over repetitions.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SEARCH = ["--mutate", "learning_rate:log:3e-5:3e-3", "--mutate", "clip_coef:lin:0.05:0.4"]
SEARCH += ["--mutate", "ent_coef:log:1e-5:1e-2", "--mutate", "gae_lambda:log:0.9:0.99"]
ARMS = {
    "pbt": "PBT, best member, 50 fresh episodes",
    "random": "random search, best member, 50 fresh episodes",
    "pbt_members": "PBT, all members' training return",
    "random_members": "random search, all members' training return",
    "replay": "the schedule of PBT's winner again, new seeds, training return",
    "constant": "the setting of random search's winner again, the same new seeds, training return",
    "defaults": "defaults, the same new seeds, training return",
}


def results(args):
    return ROOT / f"benchmark/results/pbt_{args.env_id}_{args.total_timesteps}.json"


def python(*command):
    print(" ".join(map(str, command)), flush=True)
    return subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout


def populate(args, name, seed, members, *flags, script_flags=()):
    """One population, to its end; goes on where it was broken off. Returns its folder."""
    folder = ROOT / args.run_dir / f"{args.env_id}-{args.total_timesteps}" / f"{name}-{seed}"
    command = [ROOT / "pbt_launcher.py", ROOT / "ppo_clip.py", "--env-id", args.env_id, "--run-dir", folder, *flags]
    command += ["--seed", seed, "--population", members, "--slots", args.slots]
    command += ["--total-timesteps", args.total_timesteps, "--interval", args.total_timesteps // 20]
    resume = ["--resume"] if legs(folder) else []
    python(*command, *resume, "--", args.compile, *script_flags)
    return folder


def legs(folder):
    """The finished legs of a population, in their order."""
    path = folder / "events.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "leg"]


def final_returns(folder):
    """Every member's mean training return over its last leg; nan where no episode ended in it."""
    last = {leg["member"]: leg["score"] for leg in legs(folder)}
    return [float("nan") if last[m] is None else last[m] for m in sorted(last)]


def run(args):
    rows = []
    for repetition in range(args.repetitions):
        seed = 1000 * (repetition + 1)  # members' seeds count up from it
        row = {"repetition": repetition, "population": args.population, "total_timesteps": args.total_timesteps}
        folders = {}
        for arm, flags in (("pbt", []), ("random", ["--quantile", 0])):
            folders[arm] = populate(args, arm, seed, args.population, *SEARCH, *flags)
            evaluation = ["--evaluate", folders[arm] / "best.pt", "--eval-episodes", 50, "--seed", seed + 500]
            row[arm] = json.loads(python(ROOT / "ppo_clip.py", *evaluation))["mean"]
            row[f"{arm}_members"] = final_returns(folders[arm])
        best = max(legs(folders["random"]), key=lambda leg: -np.inf if leg["score"] is None else leg["score"])
        constant = [f"--{name.replace('_', '-')}={x}" for name, x in best["hyper"].items()]
        alone = {"replay": (["--replay", folders["pbt"]], ()), "constant": (["--quantile", 0], constant)}
        alone["defaults"] = (["--quantile", 0], ())
        for arm, (flags, script_flags) in alone.items():
            folder = populate(args, arm, seed + 100, args.replays, *flags, script_flags=script_flags)
            row[arm] = final_returns(folder)
        rows.append(row)
        results(args).write_text(json.dumps(rows, indent=1) + "\n")


def interval(values, draws=10_000):
    """95 % bootstrap interval of the mean."""
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return np.percentile(means, [2.5, 97.5])


def table(args):
    rows = json.loads(results(args).read_text())
    lines = ["| | mean | 95 % interval | by repetition |", "| --- | ---: | --- | --- |"]
    for arm, name in ARMS.items():
        x = [float(np.nanmean(row[arm])) for row in rows if arm in row]  # the runs of 200 000 steps have no constant
        if x:
            low, high = interval(x)
            lines.append(f"| {name} | {np.mean(x):.0f} | {low:.0f}-{high:.0f} | {', '.join(f'{v:.0f}' for v in x)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--env-id", default="Hopper-v4")
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--total-timesteps", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--replays", type=int, default=10, help="new seeds for each way to train alone")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--run-dir", default="runs/pbt_learning")
    parser.add_argument("--compile", action="store_const", const="--compile", default="--compile")
    parser.add_argument("--no-compile", action="store_const", const="--no-compile", dest="compile")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    print(table(args))


if __name__ == "__main__":
    main()
