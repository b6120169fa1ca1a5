"""Steps per second on Hopper-v4 beside Stable-Baselines3, sb3-contrib and the bare environments, in one run:

    python benchmark/speed.py ppo       # ppo_clip.py and ppo_klpen.py beside SB3's PPO
    python benchmark/speed.py trpo      # trpo_continuous.py beside sb3-contrib's TRPO
    python benchmark/speed.py teams     # ppo_multiagent.py's algorithms on its built-in worlds, one core
    python benchmark/speed.py workers   # collecting with one process and with one for each core, rollout by rollout
    python benchmark/speed.py update    # a minibatch of ppo_clip.py, as it is and compiled
    python benchmark/speed.py pbt       # what a population costs beyond its work, beside Ray Tune's PBT
    python benchmark/speed.py gpu       # what --cuda brings on this machine; --seconds, --only

The first two do the same work: N = 8, T = 256, normalised observations and rewards; PPO 10 epochs of 64-sample
minibatches; TRPO 10 conjugate-gradient iterations on all states and 20 critic epochs of 128-sample minibatches. The
contenders take turns, `--repeats` times, so that a noisy neighbour disturbs all of them; the table has the medians.
Steady state is the rate over all iterations but the first five. Start-up is what the process took beyond all its
iterations at that rate. The baselines run in a virtual environment of their own, made here on first use (.venv-sb3).
Quiet cores are up to you. `--results benchmark/results` stores the numbers, to which tests then hold docs/speed.md.

`pbt`: 4 members x 5 legs of 2 s in 2 slots, so 20 s if nothing else took time. pbt_launcher.py and Ray Tune's
PopulationBasedTraining (pip install "ray[tune]==2.60.0") with its function API and with its class API (reset_config and
reuse_actors, its fastest) take turns. Every process imports what our scripts import, every leg spins for 2 s, reads and
writes a checkpoint. Wall time of the whole process, start-up included.

`gpu`, in five minutes: microseconds per minibatch of ppo_clip.py in every form, on the CPU, too; milliseconds per
policy step of trpo_continuous.py on 2048 states; then whole runs with 1, 8, 16 and 64 environments: steps per second
(median over iterations past the third) and seconds from the command to the end of the first iteration.
Stable-Baselines3 runs beside them where it is installed. The last line names the fastest command. Rows come one by one,
so a run that is cut short keeps what it has measured.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import gymnasium as gym
import torch
from reproduce import cpu_name

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
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


# ---- beside the baselines, on the CPU --------------------------------------------------------------------------------


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


def beside_baselines(group, steps, repeats, folder):
    """The table of one group of contenders, and its numbers in folder/speed_GROUP.json, if there is a folder."""
    sb3_python = ROOT / ".venv-sb3/bin/python"
    if group != "teams" and not sb3_python.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-sb3"], check=True)
        subprocess.run([sb3_python, "-m", "pip", "install", "-q", *SB3], check=True)
    measure = Contenders(steps)
    contenders = getattr(measure, group)()
    scripts = {"ppo": ("ppo_clip.py", "ppo_klpen.py"), "trpo": ("trpo_continuous.py",), "teams": ("ppo_multiagent.py",)}
    for script in scripts[group]:
        measure.ours(script, {0}, "--compile", "--total-timesteps", 20_480)  # fills the compiler's cache
    results = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, contender in contenders.items():
            results[name].append(contender())
            print(f"{repeat + 1}/{repeats} {name}: {results[name][-1]['sps']:.0f} steps/s", file=sys.stderr)

    baseline_name, baseline = next(iter(results.items()))
    baseline = statistics.median(r["sps"] for r in baseline)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(SB3)}\n")
    task = "several agents, 1 core" if group == "teams" else "Hopper-v4"
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
    save(group, results, folder)


# ---- collecting ------------------------------------------------------------------------------------------------------


def workers(rollouts, folder):
    """Milliseconds of a rollout in one process and in one for each core, taking turns within this program; beside them
    the same for independent processes, which share nothing: what the machine gives."""
    import ppo_clip as script

    torch.set_num_threads(1)
    agent = script.Agent(11, gym.make("Hopper-v4").action_space)
    seconds, own = {1: [], script.CORES: []}, []
    with ExitStack() as stack:
        actors = {k: stack.enter_context(script.Actors(script.Args(num_workers=k), agent)) for k in seconds}
        for repeat in range(rollouts):
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
    own = statistics.median(own) * 1e3
    print(f"the parent's time beyond its own environments: {own:.1f} ms a rollout (with waiting)")
    found = {"one_ms": one, "many_ms": many, "processes": script.CORES, "independent": factor, "own_ms": own}
    save("workers", found, folder)


def save(name, results, folder):
    if folder:
        (folder / f"speed_{name}.json").write_text(json.dumps(results, indent=1) + "\n")


# ---- a minibatch -----------------------------------------------------------------------------------------------------


def milliseconds(function, calls, rounds=5):
    """Median over rounds of the time per call, the GPU's work included."""
    times = []
    for _ in range(rounds):
        torch.cuda.is_available() and torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.is_available() and torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def batch_on(script, agent, device, obs_dim=11, B=2048):
    """A batch as make_batch gives it, of random numbers."""
    obs, action, advantage = (torch.randn(*shape, device=device) for shape in ((B, obs_dim), (B, 3), (B,)))
    with torch.no_grad():
        parameters, value = agent.policy_parameters(obs), agent.value(obs)
        logprob = agent.distribution(parameters).log_prob(action)
    batch = {"obs": obs, "action": action, "old_policy": parameters, "logprob": logprob, "value": value}
    return batch | {"advantage": advantage, "return": value + advantage}


def hopper_agent(script, device):
    torch.manual_seed(0)
    return script.Agent(11, gym.spaces.Box(-1, 1, (3,))).to(device)


def epoch_of(mode, M, B):
    """An epoch of ppo_clip.py as a function, in one of the forms that it can have."""
    import ppo_clip as script

    device = torch.device("cpu" if "CPU" in mode else "cuda")
    args = script.Args(compile="compiled" in mode, cuda="CPU" not in mode)
    agent = hopper_agent(script, device)
    data, order = batch_on(script, agent, device, B=B), torch.randperm(B, device=device).view(-1, M)
    coef = {key: torch.tensor(x, device=device) for key, x in vars(args).items() if isinstance(x, float)}
    state = script.initial_state(agent, len(script.ppo_loss(agent, data, coef, True)[1]) + 1)
    update = script.update
    if "call by call" in mode:
        update, args.compile = script.compiled(update, args.cuda), False
    graph = script.CudaGraph if "captured" in mode else lambda function: function
    with unittest.mock.patch.object(script, "CudaGraph", graph):
        return script.accelerated(args, update, agent, state, data, order, coef, True)


def microseconds(mode, M=64, B=2048):
    """Of one minibatch of M samples in an epoch of B."""
    run = epoch_of(mode, M, B)
    for _ in range(4):
        run()
    return milliseconds(run, 1 if "eager" in mode else 10) / (B // M) * 1e3


def update(folder):
    torch.set_num_threads(1)
    results = {mode: microseconds(mode) for mode in ("CPU, eager", "CPU, compiled, call by call", "CPU, compiled")}
    for mode, x in results.items():
        print(f"ppo_clip.py, a minibatch of 64, {mode}: {x:.0f} us")
    save("update", results, folder)


# ---- populations -----------------------------------------------------------------------------------------------------


WORK = """
import argparse, json, time
from pathlib import Path
import gymnasium, numpy as np, torch, tyro
from torch.utils.tensorboard import SummaryWriter

def spin(seconds=2.0):
    end = time.perf_counter() + seconds
    x = np.ones((64, 64))
    while time.perf_counter() < end:
        x = np.tanh(x @ x)
"""

SCRIPT = (
    WORK
    + """
def parse_args(argv):
    parser = argparse.ArgumentParser()
    for name in ("--total-timesteps", "--stop-at-step", "--seed", "--checkpoint-every", "--num-workers"):
        parser.add_argument(name, type=int)
    parser.add_argument("--x", type=float)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", type=Path)
    return parser.parse_args(argv)

def train(args):
    state = torch.load(args.resume, weights_only=True) if args.resume else {"step": 0, "theta": 0.0}
    spin()
    state = {"step": args.stop_at_step, "theta": state["theta"] + args.x}
    args.run_dir.mkdir(parents=True)
    torch.save(state, args.run_dir / "checkpoint.pt")
    return {"global_step": state["step"], "returns": [state["theta"]], "signal": None}
"""
)

TUNE = (
    WORK
    + """
import os, random, sys, tempfile
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

def load(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)

def save(state, folder):
    torch.save(state, Path(folder) / "state.pt")

def function(config):
    state, checkpoint = {"step": 0, "theta": 0.0}, tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = load(folder)
    while state["step"] < 5:
        spin()
        state = {"step": state["step"] + 1, "theta": state["theta"] + config["x"]}
        with tempfile.TemporaryDirectory() as folder:
            save(state, folder)
            tune.report({"score": state["theta"]}, checkpoint=tune.Checkpoint.from_directory(folder))

class Class(tune.Trainable):
    def setup(self, config):
        self.state, self.config = {"step": 0, "theta": 0.0}, config
    def step(self):
        spin()
        self.state = {"step": self.state["step"] + 1, "theta": self.state["theta"] + self.config["x"]}
        return {"score": self.state["theta"], "done": self.state["step"] >= 5}
    def save_checkpoint(self, folder):
        save(self.state, folder)
    def load_checkpoint(self, folder):
        self.state = load(folder)
    def reset_config(self, config):
        self.config, self.state = config, {"step": 0, "theta": 0.0}
        return True

if __name__ == "__main__":
    import ray
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=1, hyperparam_mutations={"x": tune.uniform(0.1, 1.0)}
    )
    trainable = {"function": function, "class": Class}[sys.argv[1]]
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"x": tune.uniform(0.1, 1.0)},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", scheduler=scheduler, num_samples=4, reuse_actors=sys.argv[1] == "class"
        ),
        run_config=tune.RunConfig(
            storage_path=sys.argv[2], name="run", verbose=0, stop={"training_iteration": 5},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1 if sys.argv[1] == "class" else 0),
        ),
    )
    results = tuner.fit()
    assert all(not r.error for r in results), [r.error for r in results]
    print(json.dumps({"legs": sum(r.metrics["training_iteration"] for r in results)}))
"""
)


def seconds(command):
    start = time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if process.returncode:
        sys.exit(f"{command} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
    return time.perf_counter() - start


def population(repeats, stored):
    """What a population costs beyond its work. stored: the folder for the result, or None."""
    folder, results = Path(tempfile.mkdtemp()), {}
    (folder / "work.py").write_text(SCRIPT)
    (folder / "tune.py").write_text(TUNE)
    ours = [sys.executable, ROOT / "pbt_launcher.py", folder / "work.py", "--population", 4, "--slots", 2]
    ours += ["--interval", 1, "--total-timesteps", 5, "--mutate", "x:lin:0.1:1.0"]
    for repeat in range(repeats):
        contenders = {
            "pbt_launcher.py, sync": [*ours, "--run-dir", folder / f"sync{repeat}"],
            "pbt_launcher.py, async": [*ours, "--run-dir", folder / f"async{repeat}", "--mode", "async"],
            "Ray Tune PBT, class, reuse_actors": [sys.executable, folder / "tune.py", "class", folder / f"c{repeat}"],
            "Ray Tune PBT, function": [sys.executable, folder / "tune.py", "function", folder / f"f{repeat}"],
        }
        for name, command in contenders.items():
            results.setdefault(name, []).append(seconds(command))
            print(f"{repeat + 1}/{repeats} {name}: {results[name][-1]:.1f} s", file=sys.stderr)
    text = population_table(results)
    print(text)
    if stored:
        (stored / "pbt_overhead.json").write_text(json.dumps(results, indent=1) + "\n")
        (stored / "pbt_overhead.md").write_text(text + "\n")


def population_table(results):
    """results: {contender: [seconds, ...]}."""
    lines = ["| 4 members x 5 legs x 2 s, 2 slots | wall time, s (median) | range | x ideal 20 s |"]
    lines += ["| --- | ---: | --- | ---: |"]
    for name, x in results.items():
        middle = statistics.median(x)
        lines += [f"| {name} | {middle:.1f} | {min(x):.1f}-{max(x):.1f} | {middle / 20:.2f} |"]
    return "\n".join(lines)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def trpo_row(device):
    import trpo_continuous as script

    agent = hopper_agent(script, device)
    data, args = batch_on(script, agent, device), script.Args(cuda=device == "cuda")
    functions = script.functions_of_theta(agent, data, args)
    before = {key: x.clone() for key, x in agent.state_dict().items()}

    def step():
        agent.load_state_dict(before)  # always from the same place
        script.policy_step(*functions, args.beta, args)

    for _ in range(4):
        step()
    return f"| trpo_continuous.py, policy step on 2048 states, {device} | {milliseconds(step, 10):.2f} ms |"


def timed_run(command, path, limit):
    """Steps per second, and seconds from the command to the first row in the file. Raises RuntimeError."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start, first = time.time(), None
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None:
            time.sleep(0.02)
            if first is None and path.exists() and path.read_text().count("\n") > 1:
                first = time.time() - start
            if time.time() - start > limit:
                process.terminate()
                process.wait(timeout=20)
                break
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.strip()] or ["without a word"]
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if len(rows) < 4:
        raise RuntimeError(f"exit status {process.returncode}, {lines[-1][:100]}")
    return statistics.median(float(row["sps"]) for row in rows[min(3, len(rows) - 2) :]), first


def gpu_contenders(env_id):
    """(name, N, command) of whole runs, the most interesting ones first."""
    multi, script = ROOT / "ppo_multiagent.py", ROOT / "ppo_clip.py"
    rare = ["--checkpoint-every", 10**9]

    def hopper(N, device):
        sizes = ["--env-id", env_id, "--num-envs", N, "--num-steps", 2048 // N, "--num-workers", min(N, 16)]
        return [*sizes, "--total-timesteps", 2048 * (15 if N == 1 else 40), "--compile", device]

    for N in (64, 16, 8, 1):
        yield "ppo_clip.py --cuda", N, [script, *hopper(N, "--cuda")]
    moves = ["--algorithm", "selfplay", "--num-envs", 4096, "--num-minibatches", 16]
    moves += ["--total-timesteps", 4096 * 64 * 12]
    yield "self-play --cuda", 4096, [multi, *moves, *rare, "--cuda", "--compile"]
    steps = ["--num-envs", 4096, "--total-timesteps", 4096 * 25 * 12]
    yield "MAPPO --cuda", 4096, [multi, *steps, *rare, "--cuda", "--compile"]
    yield "trpo_continuous.py --cuda", 64, [ROOT / "trpo_continuous.py", *hopper(64, "--cuda")]
    if importlib.util.find_spec("stable_baselines3"):
        for N in (64, 1):
            for device in ("cpu", "cuda"):
                sizes = ["--env-id", env_id, "--num-envs", N, "--num-steps", 2048 // N]
                sb3 = [ROOT / "benchmark/sb3.py", "ppo", *sizes, "--total-timesteps", 2048 * 5, "--device", device]
                yield f"Stable-Baselines3 PPO, {device}", N, sb3
    for N in (64, 8, 1):  # last: before torch 2.13 each process compiles anew for the CPU, which may take a minute
        yield "ppo_clip.py --no-cuda", N, [script, *hopper(N, "--no-cuda")]


def gpu(env_id, budget, only):
    """The GPU table. No row is started after `budget` seconds; only those whose name contains `only` are."""
    start = time.time()
    if not torch.cuda.is_available():
        sys.exit("speed.py gpu: torch finds no CUDA device here")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "gymnasium"))
    cores = len(os.sched_getaffinity(0))
    print(f"| {torch.cuda.get_device_name()}, {cores} cores, {versions} | |\n| --- | --- |", flush=True)

    def minibatch_row(mode, M, B):
        return f"| ppo_clip.py, minibatch of {M}, {mode} | {microseconds(mode, M, B):.0f} us |"

    rows = [lambda mode=mode: minibatch_row(mode, 64, 2048) for mode in ("eager", "compiled", "captured")]
    for M, B in ((64, 2048), (1024, 8192)):
        rows += [lambda m=mode, M=M, B=B: minibatch_row(m, M, B) for mode in ("compiled and captured", "CPU, compiled")]
    rows += [lambda device=device: trpo_row(device) for device in ("cuda", "cpu")]
    for row in rows if not only else ():
        if time.time() - start < budget:
            print(row(), flush=True)
    best = 0, None
    for name, N, command in gpu_contenders(env_id):
        if time.time() - start > budget:
            print(f"| {name}, N = {N} | not started: the time is up |", flush=True)
            continue
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "progress.csv"
            out = ["--csv", path] if "sb3" in str(command[0]) else ["--run-dir", folder]
            try:
                limit = max(30, budget - (time.time() - start))
                sps, first = timed_run([sys.executable, *command, *out], path, limit)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"| {name}, N = {N} | failed: {error} |", flush=True)
                continue
        print(f"| {name}, N = {N} | {sps:.0f} steps/s, first iteration after {first:.1f} s |", flush=True)
        if command[0].name == "ppo_clip.py":
            best = max(best, (sps, " ".join(map(str, [command[0].name, *command[1:]]))))
    if best[1]:
        print(f"the fastest of ppo_clip.py, {best[0]:.0f} steps/s: python {best[1]}", flush=True)


# ---- entry -----------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=("ppo", "trpo", "teams", "workers", "update", "pbt", "gpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--env-id", default="Hopper-v4", help="with gpu")
    parser.add_argument("--seconds", type=float, default=290, help="with gpu: no row is started after this")
    parser.add_argument("--only", default="", help="with gpu: rows whose name contains this")
    parser.add_argument("--results", type=Path, help="write the numbers into this folder, too")
    args = parser.parse_args()
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
    if args.group == "workers":
        workers(40, args.results)
    elif args.group == "update":
        update(args.results)
    elif args.group == "pbt":
        population(args.repeats, args.results)
    elif args.group == "gpu":
        gpu(args.env_id, args.seconds, args.only)
    else:
        beside_baselines(args.group, args.steps, args.repeats, args.results)


if __name__ == "__main__":
    main()
