"""Steps per second on Hopper-v4 beside Stable-Baselines3, sb3-contrib and the bare environments, in one run:

    python benchmark/speed.py ppo       # ppo_clip.py and ppo_klpen.py beside SB3's PPO
    python benchmark/speed.py trpo      # trpo_continuous.py beside sb3-contrib's TRPO
    python benchmark/speed.py teams     # ppo_multiagent.py's algorithms on its built-in worlds, one core
    python benchmark/speed.py workers   # collecting with one process and with one for each core, rollout by rollout
    python benchmark/speed.py update    # a minibatch of ppo_clip.py, as it is and compiled
    python benchmark/speed.py parts     # where an iteration of ppo_clip.py spends its time; takes its flags
    python benchmark/speed.py pbt       # what a population costs beyond its work, beside Ray Tune's PBT
    python benchmark/speed.py gpu       # what --cuda brings on this machine; --seconds, --only

The first two do the same work: N = 8, T = 256, normalised observations and rewards; PPO 10 epochs of 64-sample
minibatches; TRPO 10 conjugate-gradient iterations on all states and 20 critic epochs of 128-sample minibatches. The
contenders take turns, `--repeats` times, so that a noisy neighbour disturbs all of them; the table has the medians.
Steps per second are those of all iterations but the first three. Start-up is what the process took beyond all its
iterations at that rate. The baselines run in a virtual environment of their own, made here on first use (.venv-sb3).
Quiet cores are up to you. `--results benchmark/results` stores the numbers, to which tests then hold docs/speed.md.

`pbt`: 4 members x 5 legs of 2 s in 2 slots, so 20 s if nothing else took time. pbt_launcher.py and Ray Tune's
PopulationBasedTraining (pip install "ray[tune]==2.60.0") with its function API and with its class API (reset_config and
reuse_actors, its fastest) take turns. Every process imports what our scripts import, every leg spins for 2 s, reads and
writes a checkpoint. Wall time of the whole process, start-up included.

`gpu`: microseconds per minibatch of ppo_clip.py in every form, on the CPU, too; milliseconds per policy step of
trpo_continuous.py on 2048 states; then whole runs with 1, 8, 16 and 64 environments. Stable-Baselines3 runs beside them
where it is installed. The last line names the fastest command. On an H200 a run took 25 s to start. Rows come one by
one, so what is cut short keeps what it has measured.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import torch
from reproduce import ROOT, SB3, SB3_PYTHON, cpu_name, csv_rows, markdown, versions
from torch.utils.benchmark import Timer

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


# ---- processes: every measurement of a whole run goes through here ---------------------------------------------------


def run(command, cores=None, limit=0):
    """Run a command, on these cores alone and for `limit` seconds at most, where they are given. Returns its output,
    wall-clock seconds and peak memory in MB. Raises SystemExit if it fails; that its time is up is no failure."""
    start = time.perf_counter()
    process = subprocess.Popen(
        ["timeout", "--foreground", "--kill-after=20", *map(str, [limit, *command])],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: cores and os.sched_setaffinity(0, cores),
    )  # fmt: skip
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 124):  # 124: timeout has ended it
        sys.exit(f"{' '.join(map(str, command))} failed:\n{out}")
    return out, time.perf_counter() - start, usage.ru_maxrss / 1024


def training(script, *flags, cores=None, limit=0):
    """Steps per second of a run of a script, past its third iteration; start-up and memory. Raises SystemExit."""
    python = SB3_PYTHON if script == SB3 and SB3_PYTHON.exists() else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "progress.csv"
        out = ["--csv", path] if script == SB3 else ["--run-dir", folder]
        _, wall, memory = run([python, ROOT / script, *flags, *out], cores, limit)
        rows = [(int(row["global_step"]), float(row["wall_time"])) for row in csv_rows(path)]
    if len(rows) < 4:
        sys.exit(f"{script}: {len(rows)} iterations in {wall:.0f} s are too few")
    (before, start), (step, end) = rows[2], rows[-1]
    sps = (step - before) / (end - start)
    return {"sps": sps, "startup_s": wall - step / sps, "memory_mb": memory}


def bare(cores):
    """Steps per second of a plain loop over environments, in one independent process for each core."""
    with ThreadPoolExecutor() as pool:
        outs = list(pool.map(lambda core: run([sys.executable, "-c", BARE], {core})[0], cores))
    return {"sps": sum(map(float, outs))}


def in_turns(contenders, repeats, form):
    """{name: results} of functions without arguments; each is shown as `form` says."""
    results = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, contender in contenders.items():
            results[name].append(contender())
            print(f"{repeat + 1}/{repeats} {name}: {form.format(results[name][-1])}", file=sys.stderr)
    return results


def compared(name, values, one, digits=0):
    """A row of a table: median, range, and the median as a multiple of `one`."""
    middle = statistics.median(values)
    return [name, f"{middle:.{digits}f}", f"{min(values):.{digits}f}-{max(values):.{digits}f}", f"{middle / one:.2f}"]


def save(name, results, folder):
    if folder:
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


# ---- beside the baselines, on the CPU --------------------------------------------------------------------------------


WIDE, SAME = ["--num-envs", 16, "--num-steps", 128], ["--cg-iters", 10, "--vf-epochs", 20, "--num-minibatches", 16]
GROUPS = {  # {group: {contender: (cores, script, *flags)}}; the first of each is the baseline
    "ppo": {
        "Stable-Baselines3 PPO, 1 core": (1, SB3, "ppo"),
        "bare environments, 1 core": (1, "bare"),
        "bare environments, 2 cores": (2, "bare"),
        "ppo_clip.py, 1 core": (1, "ppo_clip.py", "--compile"),
        "ppo_klpen.py, 1 core": (1, "ppo_klpen.py", "--compile"),
        "ppo_clip.py, 1 core, --no-compile": (1, "ppo_clip.py", "--no-compile"),
        "ppo_clip.py, 2 cores": (2, "ppo_clip.py", "--compile"),
        "ppo_klpen.py, 2 cores": (2, "ppo_klpen.py", "--compile"),
        "ppo_clip.py, 2 cores, 16 x 128": (2, "ppo_clip.py", "--compile", *WIDE),
    },
    "trpo": {
        "sb3-contrib TRPO, 1 core": (1, SB3, "trpo", "--cg-iters", 10),
        "bare environments, 1 core": (1, "bare"),
        "trpo_continuous.py, 1 core": (1, "trpo_continuous.py", "--compile", *SAME),
        "trpo_continuous.py, 1 core, --no-compile": (1, "trpo_continuous.py", "--no-compile", *SAME),
        "trpo_continuous.py, 2 cores": (2, "trpo_continuous.py", "--compile", *SAME),
    },
    "teams": {
        "MAPPO, simple_spread": (1, "ppo_multiagent.py", "--compile"),
        "IPPO, simple_spread": (1, "ppo_multiagent.py", "--compile", "--algorithm", "ippo"),
        "self-play, connect_four, learner's moves": (1, "ppo_multiagent.py", "--compile", "--algorithm", "selfplay"),
    },
}


def beside_baselines(group, steps, repeats, folder):
    """The table of one group of contenders, and its numbers in folder/speed_GROUP.json, if there is a folder. The
    baselines, which are slower, take half of the steps, and games, whose iterations are long, four times as many."""
    if group != "teams" and not SB3_PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-sb3"], check=True)
        packages = ["-r", ROOT / "requirements.txt", "stable-baselines3==2.9.2", "sb3-contrib==2.9.2"]
        subprocess.run([SB3_PYTHON, "-m", "pip", "install", "-q", *packages], check=True)

    def contender(cores, script, *flags):
        if script == "bare":
            return partial(bare, range(cores))
        length = steps // 2 if script == SB3 else 4 * steps if "selfplay" in flags else steps
        return partial(training, script, *flags, "--total-timesteps", length, cores=range(cores))

    for script in {script for _, script, *_ in GROUPS[group].values()} - {SB3, "bare"}:
        training(script, "--compile", "--total-timesteps", 20_480, cores=range(1))  # fills the compiler's cache
    contenders = {name: contender(*what) for name, what in GROUPS[group].items()}
    results = in_turns(contenders, repeats, "{0[sps]:.0f} steps/s")
    save(f"speed_{group}", results, folder)
    baseline, rows = statistics.median(x["sps"] for x in next(iter(results.values()))), []
    for name, found in results.items():
        rows.append(compared(name, [x["sps"] for x in found], baseline))
        for key in ("startup_s", "memory_mb"):
            rows[-1].append(f"{statistics.median(x[key] for x in found):.0f}" if key in found[0] else "")
    made_with = versions(sys.executable if group == "teams" else SB3_PYTHON)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, {', '.join(f'{name} {x}' for name, x in made_with.items())}\n")
    task = "several agents, 1 core" if group == "teams" else "Hopper-v4"
    head = [task, "steps/s (median)", "range", "x baseline", "start-up, s", "peak memory, MB"]
    print(markdown(head, rows, words=(2,)))


# ---- collecting ------------------------------------------------------------------------------------------------------


def workers(rollouts, folder):
    """Milliseconds of a rollout in one process and in one for each core, taking turns within this program; beside them
    the same for independent processes, which share nothing: what the machine gives."""
    import ppo_clip as script

    agent, _ = agent_and_batch(script, "cpu")
    times = [], []
    with script.Actors(script.Args(num_workers=1), agent) as alone, script.Actors(script.Args(), agent) as together:
        for repeat in range(rollouts):
            for actors, seconds in zip((alone, together), times):
                start = time.perf_counter()
                actors.collect(agent, seed=(repeat,))
                seconds.append(time.perf_counter() - start)
    one, many = (statistics.median(seconds) * 1e3 for seconds in times)
    factor = statistics.median(bare(range(script.CORES))["sps"] / bare({0})["sps"] for _ in range(3))
    print(f"collecting: {one:.1f} ms in one process, {many:.1f} ms in {script.CORES}: {one / many:.2f} x")
    print(f"independent processes: {factor:.2f} x; collecting reaches {one / many / factor:.0%} of that")
    found = {"one_ms": one, "many_ms": many, "processes": script.CORES, "independent": factor}
    save("speed_workers", found, folder)


# ---- a minibatch -----------------------------------------------------------------------------------------------------


def agent_and_batch(script, device, B=2048):
    """An agent for Hopper, and a batch as make_batch gives it, of random numbers."""
    torch.manual_seed(0)
    agent = script.Agent(11, gym.spaces.Box(-1, 1, (3,))).to(device)
    obs, action, advantage = (torch.randn(*shape, device=device) for shape in ((B, 11), (B, 3), (B,)))
    with torch.no_grad():
        parameters, value = agent.policy_parameters(obs), agent.value(obs)
        logprob = agent.distribution(parameters).log_prob(action)
    batch = {"obs": obs, "action": action, "old_policy": parameters, "logprob": logprob, "value": value}
    return agent, batch | {"advantage": advantage, "return": value + advantage}


def seconds(function):
    """Median time of a call, the GPU's work included."""
    for _ in range(4):  # compiling, recording
        function()
    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=1).median


def minibatch(mode, M=64, B=2048):
    """Microseconds of a minibatch of M in an epoch of B of ppo_clip.py, in one of the forms that it can have."""
    import ppo_clip as script

    device = torch.device("cpu" if "CPU" in mode else "cuda")
    args = script.Args(compile="compiled" in mode, cuda="CPU" not in mode)
    agent, data = agent_and_batch(script, device, B)
    order = torch.randperm(B, device=device).view(-1, M)
    coef = {key: torch.tensor(x, device=device) for key, x in vars(args).items() if isinstance(x, float)}
    state = script.initial_state(agent, len(script.ppo_loss(agent, data, coef, True)[1]) + 1)
    update = script.update
    if "call by call" in mode:
        update, args.compile = script.compiled(update, args.cuda), False
    graph = script.CudaGraph if "captured" in mode else lambda function: function
    with unittest.mock.patch.object(script, "CudaGraph", graph):
        epoch = script.accelerated(args, update, agent, state, data, order, coef, True)
    return seconds(epoch) / len(order) * 1e6


def policy_step(device):
    """Milliseconds of a step of trpo_continuous.py."""
    import trpo_continuous as script

    (agent, data), args = agent_and_batch(script, device), script.Args(cuda=device == "cuda")
    functions = script.functions_of_theta(agent, data, args)
    before = {key: x.clone() for key, x in agent.state_dict().items()}

    def step():
        agent.load_state_dict(before)  # always from the same place
        script.policy_step(*functions, args.max_kl, args.beta, args)

    return seconds(step) * 1e3


def update(folder):
    results = {mode: minibatch(mode) for mode in ("CPU, eager", "CPU, compiled, call by call", "CPU, compiled")}
    for mode, x in results.items():
        print(f"ppo_clip.py, a minibatch of 64, {mode}: {x:.0f} us")
    save("speed_update", results, folder)


def parts(flags):
    """Milliseconds of each part of an iteration of ppo_clip.py, the mean over all iterations but the first five. The
    GPU is waited for before and after each part, so an iteration takes a little longer than in a run."""
    import ppo_clip as script

    times, wait = {}, torch.cuda.synchronize if "--cuda" in flags else lambda: None

    def timed(name, function):
        def call(*args, **kwargs):
            wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            times.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return call

    for place, name in ((script.Actors, "collect"), (script, "make_batch"), (script, "mean_kl"), (script.Run, "log")):
        setattr(place, name, timed(name, getattr(place, name)))
    script.Agent.update_statistics = timed("update_statistics", script.Agent.update_statistics)
    accelerated = script.accelerated
    script.accelerated = lambda *args: timed("epoch", accelerated(*args))
    with tempfile.TemporaryDirectory() as folder:
        args = script.parse_args(["--total-timesteps", "81920", "--compile", *flags, "--run-dir", f"{folder}/run"])
        script.train(args)
        ends = [float(row["wall_time"]) for row in csv_rows(Path(folder, "run/progress.csv"))]
    times["iteration"] = [end - start for start, end in pairwise([0, *ends])]
    n = len(ends) - 5
    if n < 1:
        sys.exit(f"speed.py parts: {len(ends)} iterations are too few: give a larger --total-timesteps")
    found = {name: 1e3 * sum(x[-(len(x) * n // len(ends)) :]) / n for name, x in times.items()}
    found["the rest"] = found["iteration"] - sum(x for name, x in found.items() if name != "iteration")
    print(f"ppo_clip.py {' '.join(flags)}: " + ", ".join(f"{name} {x:.1f}" for name, x in found.items()) + " ms")


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

SCRIPT = """
def parse_args(argv):
    parser = argparse.ArgumentParser()
    kinds = {"--run-dir": Path, "--resume": Path, "--x": float}
    for name in ("--total-timesteps", "--stop-at-step", "--seed", "--checkpoint-every", "--num-workers", *kinds):
        parser.add_argument(name, type=kinds.get(name, int))
    return parser.parse_args(argv)

def train(args):
    state = torch.load(args.resume, weights_only=True) if args.resume else {"step": 0, "theta": 0.0}
    spin()
    state = {"step": args.stop_at_step, "theta": state["theta"] + args.x}
    args.run_dir.mkdir(parents=True)
    torch.save(state, args.run_dir / "checkpoint.pt")
    return {"global_step": state["step"], "returns": [state["theta"]], "signal": None}
"""

TUNE = """
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


def population(repeats, stored):
    """What a population costs beyond its work. stored: the folder for the result, or None."""
    folder = Path(tempfile.mkdtemp())
    (folder / "work.py").write_text(WORK + SCRIPT)
    (folder / "tune.py").write_text(WORK + TUNE)
    ours = [ROOT / "pbt_launcher.py", folder / "work.py", "--population", 4, "--slots", 2]
    ours += ["--interval", 1, "--total-timesteps", 5, "--mutate", "x:lin:0.1:1.0"]
    commands = {  # and, last, a new folder
        "pbt_launcher.py, sync": [*ours, "--run-dir"],
        "pbt_launcher.py, async": [*ours, "--mode", "async", "--run-dir"],
        "Ray Tune PBT, class, reuse_actors": [folder / "tune.py", "class"],
        "Ray Tune PBT, function": [folder / "tune.py", "function"],
    }

    def wall_time(command):
        return run([sys.executable, *command, tempfile.mkdtemp(dir=folder)])[1]

    contenders = {name: partial(wall_time, command) for name, command in commands.items()}
    results = in_turns(contenders, repeats, "{:.1f} s")
    text = population_table(results)
    print(text)
    save("pbt_overhead", results, stored)
    if stored:
        (stored / "pbt_overhead.md").write_text(text + "\n")


def population_table(results):
    """results: {contender: [seconds, ...]}."""
    head = ["4 members x 5 legs x 2 s, 2 slots", "wall time, s (median)", "range", "x ideal 20 s"]
    return markdown(head, [compared(name, x, 20, digits=1) for name, x in results.items()], words=(2,))


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_rows(env_id, end):
    """(name, function, the form of its result) of each row, the most interesting ones first. A whole run's name is its
    command; it is ended at the time `end`, but not within 20 seconds."""

    def whole(script, *flags):
        measure = partial(training, script, *flags, limit=max(20, end - time.time()))
        return " ".join(map(str, (script, *flags))), measure, "{0[sps]:.0f} steps/s, start-up {0[startup_s]:.1f} s"

    def hopper(N, iterations):
        sizes = ["--env-id", env_id, "--num-envs", N, "--num-steps", 2048 // N]
        return [*sizes, "--total-timesteps", 2048 * iterations]

    both = "compiled and captured", "CPU, compiled"
    cuda, many = ["--cuda", "--compile"], ["--num-envs", 4096, "--checkpoint-every", 10**9]
    yield whole("ppo_clip.py", *cuda, *hopper(64, 40))
    yield whole("ppo_clip.py", "--no-cuda", "--compile", *hopper(64, 40))
    forms = [(mode, 64, 2048) for mode in ("eager", "compiled", "captured", *both)]
    forms += [(mode, 1024, 8192) for mode in both]
    for mode, M, B in forms:
        yield f"ppo_clip.py, minibatch of {M}, {mode}", partial(minibatch, mode, M, B), "{:.0f} us"
    for device in ("cuda", "cpu"):
        name = f"trpo_continuous.py, policy step on 2048 states, {device}"
        yield name, partial(policy_step, device), "{:.2f} ms"
    for N in (16, 8, 1):
        yield whole("ppo_clip.py", *cuda, *hopper(N, 15 if N == 1 else 40))
    yield whole("ppo_clip.py", *cuda, "--num-minibatches", 2, *hopper(64, 40))
    selfplay = ["--algorithm", "selfplay", "--num-minibatches", 16, "--total-timesteps", 4096 * 64 * 12]
    yield whole("ppo_multiagent.py", *cuda, *many, *selfplay)
    yield whole("ppo_multiagent.py", *cuda, *many, "--total-timesteps", 4096 * 25 * 12)
    yield whole("trpo_continuous.py", *cuda, *hopper(64, 40))
    if SB3_PYTHON.exists() or importlib.util.find_spec("stable_baselines3"):
        for N in (64, 1):
            for device in ("cpu", "cuda"):
                yield whole(SB3, "ppo", *hopper(N, 5), "--device", device)
    for N in (16, 8, 1):  # last: before torch 2.13 each process compiles anew for the CPU, which may take a minute
        yield whole("ppo_clip.py", "--no-cuda", "--compile", *hopper(N, 15 if N == 1 else 40))


def gpu(env_id, budget, only):
    """The GPU table. No row is started after `budget` seconds; only those whose name contains `only` are."""
    if not torch.cuda.is_available():
        sys.exit("speed.py gpu: torch finds no CUDA device here")
    made_with = ", ".join(f"{name} {x}" for name, x in versions(sys.executable).items())
    cores, end, whole_runs = len(os.sched_getaffinity(0)), time.time() + budget, {}
    print(f"| {torch.cuda.get_device_name()}, {cores} cores, {made_with} | |\n| --- | --- |", flush=True)
    for name, measure, form in gpu_rows(env_id, end):
        if only not in name:
            continue
        text = "not started: the time is up"
        if time.time() < end:
            try:
                result = measure()
                text = form.format(result)
                if name.startswith("ppo_clip.py --") and "--num-minibatches" not in name:  # another algorithm
                    whole_runs[name] = result["sps"]
            except (Exception, SystemExit) as error:  # the compiler's may be of any kind
                text = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[-1][:100]}"
        print(f"| {name} | {text} |", flush=True)
    if whole_runs:
        best = max(whole_runs, key=whole_runs.get)
        command = best.split(" --total-timesteps")[0]
        print(f"the fastest of ppo_clip.py, {whole_runs[best]:.0f} steps/s: python {command}", flush=True)
        for flag, what in (("--no-cuda", "the CPU alone"), ("--cuda", "the GPU")):
            if not any(flag in name.split() for name in whole_runs):
                print(f"{what} was not tried", flush=True)


# ---- entry -----------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=(*GROUPS, "workers", "update", "parts", "pbt", "gpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--env-id", default="Hopper-v4", help="with gpu")
    parser.add_argument("--seconds", type=float, default=240, help="with gpu: no row is started after this")
    parser.add_argument("--only", default="", help="with gpu: rows whose name contains this")
    parser.add_argument("--results", type=Path, help="write the numbers into this folder, too")
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["parts"]:
        parts(sys.argv[2:])
        return
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
