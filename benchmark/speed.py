"""Steps per second on Hopper-v4 beside Stable-Baselines3, sb3-contrib and the bare environments, in one run:

    python benchmark/speed.py ppo       # ppo_clip.py and ppo_klpen.py beside SB3's PPO
    python benchmark/speed.py trpo      # trpo_continuous.py beside sb3-contrib's TRPO
    python benchmark/speed.py teams     # ppo_multiagent.py's algorithms on its built-in worlds, one core
    python benchmark/speed.py workers   # collecting with one process and with one for each core, rollout by rollout
    python benchmark/speed.py gpu       # what --cuda brings on this machine: benchmark/gpu_speed.py

The first two do the same work: N = 8, T = 256, normalised observations and rewards; PPO 10 epochs of 64-sample
minibatches; TRPO 10 conjugate-gradient iterations on all states and 20 critic epochs of 128-sample minibatches. The
contenders take turns, `--repeats` times, so that a noisy neighbour disturbs all of them; the table has the medians.
Steady state is the rate over all iterations but the first five. Start-up is what the process took beyond all its
iterations at that rate. The baselines run in a virtual environment of their own, made here on first use (.venv-sb3).
Quiet cores are up to you.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from reproduce import cpu_name

ROOT = Path(__file__).parent.parent
SB3 = [
    "stable-baselines3==2.9.2",
    "sb3-contrib==2.9.2",
    "gymnasium[mujoco]==1.4.0",
    "mujoco==4.0.0",
    "torch==2.13.0",
    "numpy==2.4.6",
]

BARE = """
import time, warnings, gymnasium as gym, numpy as np
warnings.filterwarnings("ignore")
envs = [gym.make("Hopper-v4", disable_env_checker=True) for _ in range(8)]
for seed, env in enumerate(envs):
    env.reset(seed=seed)
actions = np.random.default_rng(0).normal(size=(3000, 8, 3)).clip(-1, 1).astype(np.float32)
start = time.perf_counter()
for action in actions:
    for env, x in zip(envs, action):
        *_, terminated, truncated, _ = env.step(x)
        if terminated or truncated:
            env.reset()
print(8 * len(actions) / (time.perf_counter() - start))
"""


def run(command, cores):
    """Run a command on these cores; returns its output, wall-clock seconds and peak memory in MB."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed:\n{process.stderr.read()}")
    return out, time.perf_counter() - start, usage.ru_maxrss / 1024


def bare(cores):
    """Steps per second of a plain loop over environments, in one independent process for each core."""
    with ThreadPoolExecutor() as pool:
        outs = list(pool.map(lambda core: run([sys.executable, "-c", BARE], {core})[0], cores))
    return {"sps": sum(map(float, outs))}


def training(command, path, cores):
    _, wall, memory = run(command, cores)
    with open(path) as file:
        table = [(int(row["global_step"]), float(row["sps"])) for row in csv.DictReader(file)]
    steps = [b - a for (a, _), (b, _) in zip([(0, 0), *table], table)]
    seconds = [n / sps for n, (_, sps) in zip(steps, table)]
    sps = sum(steps[5:]) / sum(seconds[5:])
    return {"sps": sps, "startup_s": wall - sum(steps) / sps, "memory_mb": memory}


class Contenders:
    """Functions that measure one contender each; `steps` of training, half as many for the slower baselines."""

    def __init__(self, steps):
        self.steps, self.folder = steps, Path(tempfile.mkdtemp())

    def ours(self, script, cores, *flags):
        path = self.folder / f"{script}-{time.time()}"
        command = [sys.executable, ROOT / script, "--total-timesteps", self.steps, "--run-dir", path, *flags]
        return training(command, path / "progress.csv", cores)

    def sb3(self, algorithm, *flags):
        path = self.folder / "sb3.csv"
        command = [ROOT / ".venv-sb3/bin/python", "-W", "ignore", ROOT / "benchmark/sb3.py", algorithm, *flags]
        return training([*command, "--total-timesteps", self.steps // 2, "--csv", path], path, {0})

    def ppo(self):
        one, two, sixteen = {0}, {0, 1}, ["--num-envs", 16, "--num-steps", 128]
        alone = ["--num-workers", 0]
        return {
            "Stable-Baselines3 PPO, 1 core": lambda: self.sb3("ppo"),
            "bare environments, 1 core": lambda: bare(one),
            "bare environments, 2 cores": lambda: bare(two),
            "ppo_clip.py, 1 core": lambda: self.ours("ppo_clip.py", one, "--compile", *alone),
            "ppo_klpen.py, 1 core": lambda: self.ours("ppo_klpen.py", one, "--compile", *alone),
            "ppo_clip.py, 1 core, --no-compile": lambda: self.ours("ppo_clip.py", one, "--no-compile", *alone),
            "ppo_clip.py, 2 cores": lambda: self.ours("ppo_clip.py", two, "--compile"),
            "ppo_klpen.py, 2 cores": lambda: self.ours("ppo_klpen.py", two, "--compile"),
            "ppo_clip.py, 2 cores, 16 x 128": lambda: self.ours("ppo_clip.py", two, "--compile", *sixteen),
        }

    def trpo(self):
        one, two, script = {0}, {0, 1}, "trpo_continuous.py"
        same = ["--cg-iters", 10, "--vf-epochs", 20, "--num-minibatches", 16]
        alone = ["--num-workers", 0]
        return {
            "sb3-contrib TRPO, 1 core": lambda: self.sb3("trpo", "--cg-iters", 10),
            "bare environments, 1 core": lambda: bare(one),
            "trpo_continuous.py, 1 core": lambda: self.ours(script, one, *same, "--compile", *alone),
            "trpo_continuous.py, 1 core, --no-compile": lambda: self.ours(script, one, *same, "--no-compile", *alone),
            "trpo_continuous.py, 2 cores": lambda: self.ours(script, two, *same, "--compile"),
        }

    def teams(self):
        one, script = {0}, "ppo_multiagent.py"
        selfplay = ["--algorithm", "selfplay", "--compile", "--total-timesteps", 4 * self.steps]
        return {
            "MAPPO, simple_spread": lambda: self.ours(script, one, "--compile"),
            "IPPO, simple_spread": lambda: self.ours(script, one, "--algorithm", "ippo", "--compile"),
            "self-play, connect_four, learner's moves": lambda: self.ours(script, one, *selfplay),
        }


def workers(repeats):
    """Milliseconds of a rollout in one process and in one for each core, taking turns within this program; beside them
    the same for independent processes, which share nothing: what the machine gives."""
    sys.path.insert(0, str(ROOT))
    import gymnasium as gym
    import torch

    import ppo_clip as script

    torch.set_num_threads(1)
    agent = script.Agent(11, gym.make("Hopper-v4").action_space)
    seconds, own = {1: [], script.CORES: []}, []
    with ExitStack() as stack:
        actors = {k: stack.enter_context(script.Actors(script.Args(num_workers=k), agent)) for k in seconds}
        for repeat in range(repeats):
            for k, x in actors.items():
                run, inside = x.own.run, []

                def timed(seeds, run=run, inside=inside):
                    start = time.perf_counter()
                    result = run(seeds)
                    inside.append(time.perf_counter() - start)
                    return result

                x.own.run = timed
                start = time.perf_counter()
                x.collect(agent, seed=(repeat,))
                seconds[k].append(time.perf_counter() - start)
                own += [seconds[k][-1] - inside[0]] if k > 1 else []
                x.own.run = run
    one, many = (statistics.median(x) * 1e3 for x in seconds.values())
    alone = [(bare({0})["sps"], bare(range(script.CORES))["sps"]) for _ in range(3)]
    factor = statistics.median(b / a for a, b in alone)
    print(f"collecting: {one:.1f} ms in one process, {many:.1f} ms in {script.CORES}: {one / many:.2f} x")
    print(f"independent processes: {factor:.2f} x; collecting reaches {one / many / factor:.0%} of that")
    print(
        f"the parent's time beyond its own environments: {statistics.median(own) * 1e3:.1f} ms a rollout (with waiting)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=("ppo", "trpo", "teams", "workers", "gpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    args, rest = parser.parse_known_args()
    if args.group == "gpu":
        import gpu_speed

        gpu_speed.main(rest)
        return
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    if args.group == "workers":
        workers(40)
        return
    sb3_python = ROOT / ".venv-sb3/bin/python"
    if args.group != "teams" and not sb3_python.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-sb3"], check=True)
        subprocess.run([sb3_python, "-m", "pip", "install", "-q", *SB3], check=True)
    measure = Contenders(args.steps)
    contenders = getattr(measure, args.group)()
    scripts = {"ppo": ("ppo_clip.py", "ppo_klpen.py"), "trpo": ("trpo_continuous.py",), "teams": ("ppo_multiagent.py",)}
    for script in scripts[args.group]:
        measure.ours(script, {0}, "--compile", "--total-timesteps", 20_480)  # fills the compiler's cache
    results = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        for name, contender in contenders.items():
            results[name].append(contender())
            print(f"{repeat + 1}/{args.repeats} {name}: {results[name][-1]['sps']:.0f} steps/s", file=sys.stderr)

    baseline_name, baseline = next(iter(results.items()))
    baseline = statistics.median(r["sps"] for r in baseline)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(SB3)}\n")
    task = "several agents, 1 core" if args.group == "teams" else "Hopper-v4"
    first = baseline_name.split()[0].strip(",")
    print(f"| {task} | steps/s (median) | range | x {first} | start-up, s | peak memory, MB |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for name, rows in results.items():
        sps = sorted(r["sps"] for r in rows)
        middle = statistics.median(sps)
        line = f"| {name} | {middle:.0f} | {sps[0]:.0f}-{sps[-1]:.0f} | {middle / baseline:.2f} |"
        for key in ("startup_s", "memory_mb"):
            line += f" {statistics.median(r[key] for r in rows):.0f} |" if key in rows[0] else " |"
        print(line)
    json.dump(results, open(ROOT / f"benchmark/results/speed_{args.group}.json", "w"), indent=1)


if __name__ == "__main__":
    main()
