"""What is learned: studies of many runs, such as a paper's table or figure. The scripts as they are, one run per core.

    python benchmark/reproduce.py --list                   # the studies, how many runs, roughly how long
    python benchmark/reproduce.py ppo-table1 --workers 2   # runs what is missing; it can be stopped at any moment
    python benchmark/reproduce.py v4 --fresh               # evaluates finished runs: STUDY.fresh.csv
    python benchmark/reproduce.py pbt --workers 2          # Population Based Training against random search
    python benchmark/reproduce.py statistics               # what running statistics alone do to a policy: four minutes
    python benchmark/plot.py ppo-table1                    # the table and the figure, from the stored data

A run that is finished is skipped, a broken one goes on from its checkpoint. benchmark/results/STUDY.csv.gz gets a run's
rows (at most 100 of them) when it is done: script, setting, env, seed, step, episodic_return, kl, learning_rate.
STUDY.json says with which versions, from which commit and on which machine; where it is missing, the history of the
file knows. What is stored is never run again, so a study can be carried from machine to machine; nor is a run that
another study has already stored: it is copied. Let one process at a time run a study, since each writes the whole file.
A study runs on one machine: spreading it over a Ray cluster was not built in. Runs of Stable-Baselines3 and sb3-contrib
need a virtual environment of their own; broken ones begin again:

    python3 -m venv .venv-sb3
    .venv-sb3/bin/pip install -r requirements.txt stable-baselines3==2.9.2 sb3-contrib==2.9.2
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import gzip
import importlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SB3, SB3_PYTHON = "benchmark/sb3.py", ROOT / ".venv-sb3/bin/python"
sys.path.insert(0, str(ROOT))
COLUMNS = ("script", "setting", "env", "seed", "step", "episodic_return", "kl", "learning_rate")
SEVEN = ("HalfCheetah", "Hopper", "InvertedDoublePendulum", "InvertedPendulum", "Reacher", "Swimmer", "Walker2d")
SEVEN = tuple(f"{name}-v4" for name in SEVEN)
MUJOCO = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4")
V5 = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")
STEPS_PER_SECOND = 6000  # of one core, roughly
FRESH = 50  # episodes in which a finished policy is evaluated


@dataclass(frozen=True)
class Setting:
    """One row of a table or one curve of a figure: a script and its flags. `env` makes an --env-id of a name."""

    name: str
    script: str
    flags: tuple = ()
    env: str = "{}"


@dataclass(frozen=True)
class Study:
    what: str
    settings: list
    envs: tuple
    seeds: int = 3
    steps: int = 1_000_000
    at: tuple = ()  # steps before the end at which the table reads the return, too

    def runs(self):
        return [(s, env, seed) for seed in range(1, self.seeds + 1) for s in self.settings for env in self.envs]


def of(script):
    """A function that makes settings of a script from their names and flags."""
    return lambda name, *flags: Setting(name, script, flags)


clip, klpen, trpo = of("ppo_clip.py"), of("ppo_klpen.py"), of("trpo_continuous.py")
team, sb3 = of("ppo_multiagent.py"), of(SB3)  # sb3's flags: the algorithm, then those of benchmark/sb3.py

# Flags that are defaults are left out: so the same run in two studies has the same command, and is run once.
TABLE1 = [clip("no clipping or penalty", "--clip-coef", "inf")]
TABLE1 += [clip(f"clipping, eps = {eps}", *(("--clip-coef", eps) if eps != 0.2 else ())) for eps in (0.1, 0.2, 0.3)]
TABLE1 += [
    klpen(f"adaptive KL, d_target = {d}", *(("--kl-target", d) if d != 0.01 else ())) for d in (0.003, 0.01, 0.03)
]
TABLE1 += [
    klpen(f"fixed KL, beta = {b}", "--beta-schedule", "fixed", *(("--beta-init", b) if b != 1 else ()))
    for b in (0.3, 1, 3, 10)
]
ADAPTIVE = ("--lr-schedule", "kl-adaptive")
LR = [clip("linear"), clip("constant", "--lr-schedule", "constant"), clip("kl-adaptive, band 1.5", *ADAPTIVE)]
LR += [clip("kl-adaptive, band 1", *ADAPTIVE, "--kl-lr-band", 1)]
FORMS = [trpo("constrained, mean KL"), trpo("constrained, max KL 0.2", "--kl-constraint", "max", "--max-kl", 0.2)]
FORMS += [trpo("penalised, beta = 1.5", "--form", "penalized", "--beta", 1.5)]
FORMS += [trpo("penalised, adaptive beta", "--form", "penalized", "--beta-schedule", "adaptive")]
V4 = [clip("ppo_clip.py"), klpen("ppo_klpen.py"), trpo("trpo_continuous.py")]
BASELINES = [sb3("Stable-Baselines3 PPO", "ppo"), sb3("sb3-contrib TRPO", "trpo")]
BASELINES += [sb3("sb3-contrib TRPO, gamma 0.995", "trpo", "--gamma", 0.995)]
FLAGS = [clip("ppo_clip.py --gamma 0.995", "--gamma", 0.995), klpen("ppo_klpen.py --gamma 0.995", "--gamma", 0.995)]
FLAGS += [clip("ppo_clip.py --num-envs 1 --num-steps 2048", "--num-envs", 1, "--num-steps", 2048)]
FLAGS += [clip("ppo_clip.py --num-envs 64 --num-steps 32", "--num-envs", 64, "--num-steps", 32)]
FLAGS += [klpen("ppo_klpen.py --beta-schedule fixed", "--beta-schedule", "fixed")]
FLAGS += [trpo("trpo_continuous.py --gamma 0.99", "--gamma", 0.99)]
STEADY = [of(s.script)(f"{s.script} --steady-obs", "--steady-obs") for s in V4]
LINEAR = ("--kl-schedule", "linear")
FALLING = [trpo("trpo_continuous.py --kl-schedule linear", *LINEAR)]
FALLING += [trpo("trpo_continuous.py --kl-schedule linear --steady-obs", *LINEAR, "--steady-obs")]
PENDULUMS = [clip("ppo_clip.py"), trpo("trpo_continuous.py"), *BASELINES[:2], STEADY[2], *FALLING]
SHORT = ("--max-kl", 0.01, "--gamma", 0.99, "--cg-iters", 15)  # on one action dimension, sb3-contrib's defaults
DOUBLE = [trpo("trpo_continuous.py"), trpo(f"trpo_continuous.py {' '.join(map(str, SHORT))}", *SHORT), BASELINES[1]]
LIMITS = [clip("bootstrapped")]
LIMITS += [Setting("time limit taken as the end", "ppo_clip.py", (), "reproduce:{}-terminal-v0")]
IPPO, ONE = ("--algorithm", "ippo"), ("--num-minibatches", 1)
SPREAD = [team("MAPPO"), team("MAPPO, V(s, a^-g)", "--critic-input", "state-actions"), team("IPPO", *IPPO)]
SPREAD += [team("MAPPO, one minibatch", *ONE), team("IPPO, one minibatch", *IPPO, *ONE)]
WIDE = ("--hidden-size", 128)
LONG = [team("MAPPO, width 128", *WIDE), team("IPPO, width 128", *IPPO, *WIDE)]
LISTENER = team("MAPPO, no shared parameters, 15 epochs", "--no-share-params", "--update-epochs", 15)
BODY = ("--env-kwargs", '{"scenario": "HalfCheetah", "agent_conf": "2x3"}', "--no-share-params")
BODY += ("--num-envs", 8, "--num-steps", 256, "--num-minibatches", 32, "--learning-rate", 3e-4, "--ent-coef", 0)
BODY += ("--max-grad-norm", 0.5)
LISTENERS, REFERENCE = ("mpe2.simple_speaker_listener_v4",), ("mpe2.simple_reference_v3",)

STUDIES = {
    "v4": Study("the three scripts with default flags", V4, MUJOCO, 10),
    "v4-baselines": Study("Stable-Baselines3 and sb3-contrib, the same work", BASELINES, MUJOCO, 10),
    "v5": Study("the same on the environments of version 5", V4, V5, 10),
    "v4-flags": Study("the same with other flags", FLAGS, MUJOCO, 5),
    "steady": Study("observations in a steady scale", STEADY, MUJOCO, 10),
    "kl-schedule": Study("TRPO, a bound that falls to 0", FALLING, MUJOCO, 10),
    "cartpole": Study("Discrete actions", [clip("ppo_clip.py")], ("CartPole-v1",), 10, 200_000),
    "ppo-table1": Study("PPO paper, Table 1: eleven objectives", TABLE1, SEVEN),
    "figure3": Study("PPO paper, Figure 3: PPO-clip and TRPO", [clip("PPO (clip)"), trpo("TRPO")], SEVEN),
    "trpo-forms": Study("the forms of TRPO", FORMS, ("Hopper-v4", "Walker2d-v4")),
    "kl-adaptive-lr": Study("learning-rate schedules", LR, MUJOCO),
    "pendulums": Study("solved, and unlearned again", PENDULUMS, tuple(x for x in SEVEN if "Pendulum" in x)),
    "double-pendulum": Study("TRPO, half the step", DOUBLE, ("InvertedDoublePendulum-v4",), 10),
    "truncation": Study("bootstrap at time limits, or not", LIMITS, ("Pendulum-v1", "Reacher-v4"), 5, 300_000),
    "spread": Study("three agents, three landmarks", SPREAD, ("simple_spread",), 10, 550_000, (100_000,)),
    "spread-10M": Study("the same, longer", LONG, ("simple_spread",), 3, 10_000_000, (100_000, 550_000)),
    "listener": Study("one speaks, one moves", [LISTENER], LISTENERS, 3, 2_000_000, (220_000,)),
    "reference": Study("both speak and move", [team("MAPPO")], REFERENCE, 3, 2_000_000, (190_000,)),
    "two-bodies": Study("MaMuJoCo, HalfCheetah 2x3", [team("MAPPO", *BODY)], ("gymnasium_robotics.mamujoco_v1",)),
}


class TimeLimitIsTheEnd(gym.Wrapper):
    """For the study `truncation`. The scripts find it in this file, which is on their PYTHONPATH."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, False, info


for env_id in STUDIES["truncation"].envs:
    gym.register(
        f"{env_id}-terminal-v0",
        entry_point=lambda env_id=env_id, **kwargs: TimeLimitIsTheEnd(gym.make(env_id, **kwargs)),
        disable_env_checker=True,
    )


# ---- stored data -----------------------------------------------------------------------------------------------------


def csv_rows(path):
    """The rows of a CSV file, packed or not, as dicts; none if there is no file yet."""
    data = path.read_bytes() if path.exists() else b""  # read at once, because it may be growing
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    return [row for row in csv.DictReader(lines) if None not in row.values()]  # the last one may not be whole yet


def replace(path, data):
    """Write a file as a whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def markdown(head, rows, words=()):
    """A table as text. Columns are aligned to the right, but for the first one and those whose number is in `words`."""
    rule = ["---" if i in (0, *words) else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def read(study, results):
    """{(setting, env, seed): rows} of what is stored; rows are dicts with COLUMNS."""
    runs = {}
    for row in csv_rows(results / f"{study}.csv.gz"):
        runs.setdefault((row["setting"], row["env"], int(row["seed"])), []).append(row)
    return runs


def stored_elsewhere(study, results, setting, env, seed, steps):
    """The rows of the same command (script, flags, environment, seed, steps) in another study, and their origin. If
    several have them: of the study that was stored last. (None, None) if none has."""
    found = []
    for name, other in STUDIES.items():
        for twin in other.settings:
            if name != study and (twin.script, twin.flags, twin.env) == (setting.script, setting.flags, setting.env):
                rows = read(name, results).get((twin.name, env, seed), [])
                if rows and steps <= int(rows[-1]["step"]) < steps + 8192:  # 8192: one iteration, surely
                    origin = origins(name, results)[-1]
                    rows = [row | {"global_step": row["step"]} for row in rows]
                    found.append((origin.get("date", ""), rows, origin | {"copied from": name}))
    return max(found, key=lambda x: x[0])[1:] if found else (None, None)


def origins(study, results):
    """Where the rows of a study come from: dates, machines and versions, the oldest first."""
    path = results / f"{study}.json"
    known = json.loads(path.read_text()) if path.exists() else [{}]
    return known if isinstance(known, list) else [known]


def store(study, results, setting, env, seed, progress, origin=None):
    """Add a finished run, at most 100 of its rows, the last one among them. Say with which versions it was made, if
    they are not those of an earlier one. The same runs give the same bytes."""
    run = {"script": setting.script, "setting": setting.name, "env": env, "seed": seed}
    measured = ("episodic_return", "kl", "learning_rate")
    points = progress[:: -max(1, -(-len(progress) // 100))][::-1]
    rows = [run | {"step": row["global_step"]} | {key: row.get(key, "") for key in measured} for row in points]
    runs = read(study, results) | {(setting.name, env, seed): rows}
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as file:
        table = io.TextIOWrapper(file, newline="")
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for key in sorted(runs) for row in runs[key])
        table.flush()
    results.mkdir(parents=True, exist_ok=True)
    replace(results / f"{study}.csv.gz", packed.getvalue())
    if origin is None:
        python = SB3_PYTHON if setting.script == SB3 else sys.executable
        origin = here(python)
    known = [x for x in origins(study, results) if x and x != origin] + [origin]
    replace(results / f"{study}.json", (json.dumps(known, indent=1) + "\n").encode())


def here(python):
    """The date, this checkout's commit, the machine, and the versions of an interpreter's packages."""
    git, found = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], {"date": str(datetime.date.today())}
    with contextlib.suppress(OSError):  # there may be no git
        run = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        found["commit"] = run.stdout.strip()
    return found | {"cpu": cpu_name()} | versions(python)


def versions(python):
    """Those of an interpreter and of the packages that it finds."""
    program = "import json, platform; from importlib.metadata import distributions; x = distributions();"
    program += "x = {d.name.replace('_', '-'): d.version for d in x} | {'python': platform.python_version()};"
    program += "print(json.dumps(x))"
    found = json.loads(subprocess.run([python, "-c", program], stdout=subprocess.PIPE, check=True, text=True).stdout)
    names = "python", "torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sb3-contrib"
    return {name: found[name] for name in names if name in found}


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


# ---- fresh episodes --------------------------------------------------------------------------------------------------


def play(folder, seed, noisy=False, **kwargs):
    """Steps of a run's policy without end, with the mean action or with sampled ones: (env, reward, done) each."""
    import torch

    script = importlib.import_module(next(folder.glob("*.py")).stem)
    checkpoint = script.load_checkpoint(folder)
    with contextlib.closing(script.make_env(checkpoint["args"]["env_id"], **kwargs)) as env:
        agent = script.Agent(env.observation_space.shape[0], env.action_space)
        agent.load_state_dict(checkpoint["agent"])
        torch.manual_seed(seed)
        obs, _ = env.reset(seed=seed)
        while True:
            with torch.no_grad():
                noise = agent.noise(1, 1)[0] if noisy else 0.0
                action = agent.act(torch.as_tensor(obs, dtype=torch.float32)[None], noise).numpy()
            obs, reward, terminated, truncated, _ = env.step(script.env_action(action, env.action_space)[0])
            yield env, float(reward), terminated or truncated
            if terminated or truncated:
                obs, _ = env.reset()


def fresh_episodes(folder):
    """Mean raw return of new episodes of a run's policy, with the mean action and with sampled ones: the last training
    episodes, the measure of the paper's Table 1, are of policies that were still changing."""
    result = {}
    for name, noisy in (("mean_action", False), ("sampled", True)):
        steps, returns = play(folder, 12345, noisy), []
        while len(returns) < FRESH:
            done, total = False, 0.0
            while not done:
                _, reward, done = next(steps)
                total += reward
            returns.append(total)
        result[name] = sum(returns) / FRESH
    return result


def evaluate(name, study, results, folder):
    """Evaluate the finished runs whose folders are here, and add them to STUDY.fresh.csv."""
    path = results / f"{name}.fresh.csv"
    known = {(row["setting"], row["env"], int(row["seed"])): row for row in csv_rows(path)}
    for setting, env, seed in tqdm(study.runs()):
        run, key = Run(name, study.steps, folder, setting, env, seed), (setting.name, env, seed)
        if key in known or run.step() < study.steps:
            continue
        if setting.script == SB3:
            if not (text := (run.folder / "fresh.json").read_text()):
                continue  # it has trained, and is still evaluating
            result = json.loads(text)
        else:
            result = fresh_episodes(run.folder)
        columns = {"setting": setting.name, "env": env, "seed": seed, "episodes": FRESH}
        known[key] = columns | {measure: f"{x:.1f}" for measure, x in result.items()}
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, known[key])
            writer.writeheader()
            writer.writerows(known[key] for key in sorted(known))
    return 0


# ---- running ---------------------------------------------------------------------------------------------------------


class Run:
    """One run of a grid: a process, and the folder that it writes."""

    def __init__(self, study, steps, folder, setting, env, seed):
        self.setting, self.env, self.seed, self.steps = setting, env, seed, steps
        trial = "" if steps == STUDIES[study].steps else f"__{steps}"  # another run: its schedules are shorter
        name = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{setting.name}__{env}__{seed}{trial}")
        self.folder = folder / study / name

    def command(self):
        flags = ["--env-id", self.setting.env.format(self.env), "--seed", self.seed, "--total-timesteps", self.steps]
        if self.setting.script == SB3:
            if not SB3_PYTHON.exists():
                sys.exit(f"{self.setting.name} needs {SB3_PYTHON}: see the head of this file")
            program = [SB3_PYTHON, "-W", "ignore", ROOT / SB3, *self.setting.flags]
            return [*program, *flags, "--csv", self.folder / "progress.csv", "--fresh", FRESH]
        program = [sys.executable, ROOT / self.setting.script, "--num-workers", 0]  # a run a core
        if (self.folder / "checkpoint.pt").exists():
            return [*program, "--resume", self.folder]
        return [*program, *flags, "--run-dir", self.folder, *self.setting.flags]

    def start(self):
        env, out = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmark")}, subprocess.DEVNULL
        command = list(map(str, self.command()))
        if self.setting.script == SB3:
            self.folder.mkdir(parents=True, exist_ok=True)
            out = open(self.folder / "fresh.json", "w")
        self.errors = tempfile.TemporaryFile("w+")  # not a pipe: a long run would fill it, and wait for a reader
        self.process = subprocess.Popen(command, env=env, stdout=out, stderr=self.errors)

    def progress(self):
        return csv_rows(self.folder / "progress.csv")

    def step(self):
        rows = self.progress()
        return int(rows[-1]["global_step"]) if rows else 0


def reproduce(name, study, workers, results, folder, stop=()):
    """Run what is missing of a study, `workers` at a time. Returns the number of runs that failed. As soon as there is
    something in `stop`, it stops its runs, each with a checkpoint, and returns. A shorter trial run does not count."""
    # 0.99: of older runs the last row was not stored.
    stored = {key for key, rows in read(name, results).items() if int(rows[-1]["step"]) >= 0.99 * study.steps}
    todo, running, finished, failed = [], [], 0, 0  # finished: steps of the runs that are
    for setting, env, seed in study.runs():
        if (setting.name, env, seed) in stored:
            continue
        rows, origin = stored_elsewhere(name, results, setting, env, seed, study.steps)
        if rows:
            store(name, results, setting, env, seed, rows, origin)
        else:
            todo.append(Run(name, study.steps, folder, setting, env, seed))
    total, before = len(todo), sum(run.step() for run in todo)
    bar = tqdm(total=total * study.steps, initial=before, unit=" steps", unit_scale=True, smoothing=0.05)
    try:
        while (todo or running) and not stop:
            while todo and len(running) < workers:
                todo[0].start()
                running.append(todo.pop(0))
            time.sleep(0.5)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                if run.process.returncode:
                    failed += 1
                    run.errors.seek(0)
                    tqdm.write(f"{run.folder.name}: status {run.process.returncode}: {run.errors.read().strip()}")
                else:
                    finished += run.steps
                    store(name, results, run.setting, run.env, run.seed, run.progress())
            done = total - len(todo) - len(running)
            bar.set_postfix_str(f"{done} of {total} runs, {failed} failed", refresh=False)
            bar.update(min(finished + sum(run.step() for run in running + todo), bar.total) - bar.n)
    finally:
        for run in running:
            run.process.terminate()  # our scripts end with a checkpoint
        for run in running:
            run.process.wait()
        bar.close()
    return failed


# ---- populations -----------------------------------------------------------------------------------------------------

SEARCH = ("--mutate", "learning_rate:log:3e-5:3e-3", "--mutate", "clip_coef:lin:0.05:0.4")
SEARCH += ("--mutate", "ent_coef:log:1e-5:1e-2", "--mutate", "gae_lambda:log:0.9:0.99")
POPULATION, LEGS, REPLAYS = 8, 20, 2
STAGES = ("pbt", "random"), ("replay", "constant", "defaults")


def output(*command):
    """What a command prints. A signal to this process goes on to it, and ends both."""
    print(" ".join(map(str, command)), flush=True)
    process = subprocess.Popen(  # in a session of its own, or Ctrl-C would reach it twice, and the second one kills
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, lambda number, frame: process.terminate()) for number in numbers]
    text, _ = process.communicate()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    return text


def populations(envs, steps, repetitions, slots, results, folder):
    """Does Population Based Training help ppo_clip.py? The population is the unit: a repetition has one of each kind.

    First PBT and random search (quantile 0: the same code, first draws and seeds), with the same number of environment
    steps: the best member on fresh episodes with the mean action. Then, to tell a good schedule from a lucky member,
    new seeds for three ways to train alone: with the schedule of PBT's winner (--replay), with the constant setting of
    random search's winner, and with the script's default flags.

    Some five hours of two cores for both environments of the study. What is stored at any moment can be published: each
    way of a repetition when it is done, with the population's events, so another machine may train the second stage."""
    for ways in STAGES:
        for repetition in range(repetitions):
            for env in envs:
                path = results / f"pbt_{env}_{steps}.json"
                rows = json.loads(path.read_text()) if path.exists() else []
                if any("made" not in row for row in rows):
                    sys.exit(f"{path} is of an older version: give --results a folder of its own")
                row = next((row for row in rows if row["repetition"] == repetition), None)
                if row is None:
                    row = {"repetition": repetition, "population": POPULATION, "total_timesteps": steps}
                    rows.append(row)
                for way in ways:
                    if way not in row:
                        train_way(way, row, env, slots, results, folder / f"{env}-{steps}")
                        row.setdefault("made", {})[way] = here(sys.executable)
                        replace(path, (json.dumps(rows, indent=1) + "\n").encode())


def train_way(way, row, env, slots, results, folder):
    """Train one way of a repetition, and add what it reached to the row. Goes on where it was broken off."""
    seed, steps, number = 1000 * (row["repetition"] + 1), row["total_timesteps"], row["repetition"]
    where, alone = folder / f"{way}-{number}", way not in STAGES[0]
    flags = {"pbt": SEARCH, "random": (*SEARCH, "--quantile", 0), "defaults": ("--quantile", 0)}
    if way == "constant":
        setting = [f"--{name.replace('_', '-')}={x}" for name, x in row["random_best"].items()]
        flags["constant"] = ("--quantile", 0, "--", *setting)
    if way == "replay":
        other = folder / f"stored-pbt-{number}"  # what the row tells of, wherever it was trained
        stored = gzip.decompress((results / f"pbt_{env}_{steps}.pbt-{number}.gz").read_bytes())
        other.mkdir(parents=True, exist_ok=True)
        replace(other / "events.jsonl", stored)
        flags["replay"] = ("--replay", other)
    command = [ROOT / "pbt_launcher.py", ROOT / "ppo_clip.py", "--env-id", env, "--run-dir", where]
    command += ["--seed", seed + 100 * alone, "--population", REPLAYS if alone else POPULATION]  # members' count up
    command += ["--slots", slots, "--total-timesteps", steps, "--interval", steps // LEGS]
    output(*command, *(["--resume"] if legs(where) else []), *flags[way])
    last = {leg["member"]: leg["score"] for leg in legs(where)}
    copied = {copy["member"] for event in events(where) for copy in event.get("copies", ())} if way != "pbt" else ()
    # nan: no episode ended in its last leg; or it failed twice, and is a copy of another one
    scores = [math.nan if last[m] is None or m in copied else last[m] for m in sorted(last)]
    if alone:
        row[way] = scores
        return
    evaluation = ["--evaluate", where / "best.pt", "--eval-episodes", FRESH, "--seed", seed + 500]
    row[way] = json.loads(output(ROOT / "ppo_clip.py", *evaluation))["mean"]
    row[f"{way}_members"] = scores
    best = max((leg for leg in legs(where) if leg["score"] is not None), key=lambda leg: leg["score"])
    row[f"{way}_best"] = best["hyper"]
    packed = gzip.compress((where / "events.jsonl").read_bytes(), mtime=0)
    replace(results / f"pbt_{env}_{steps}.{way}-{number}.gz", packed)


def events(folder):
    """What has happened in a population, in its order."""
    return importlib.import_module("pbt_launcher").read_events(folder)[0]


def legs(folder):
    """Its finished legs."""
    return [event for event in events(folder) if event["event"] == "leg"]


# ---- running statistics ----------------------------------------------------------------------------------------------


def statistics_alone(results, folder, seeds, solved=61_440, rollouts=150):
    """Is it enough to lose a solved task that the running statistics go on? trpo_continuous.py solves InvertedPendulum
    in 61,440 steps. From then on nothing learns: the policy acts for 150 rollouts, each of which enters the statistics,
    once as before and once so that the 0 of that moment stays and the unit may only grow."""
    import torch
    from torch.distributions import kl_divergence

    import trpo_continuous as trpo

    torch.set_num_threads(1)
    rows = []
    for seed in range(1, seeds + 1):
        run = folder / f"statistics/{seed}-{time.time():.0f}"
        flags = ["--env-id", "InvertedPendulum-v4", "--seed", seed, "--stop-at-step", solved, "--run-dir", run]
        if trpo.train(trpo.parse_args([*map(str, flags), "--num-workers", "0", "--no-compile"]))["signal"]:
            sys.exit("stopped: nothing is stored")
        args = trpo.parse_args(["--resume", str(run), "--num-workers", "0"])
        env = trpo.make_env(args.env_id)
        agent = trpo.Agent(env.observation_space.shape[0], env.action_space)
        for way in ("usual", "steady"):
            trpo.load_checkpoint(run, args.env_id, agent)
            torch.manual_seed(seed)  # the same noise for both
            with trpo.Actors(args, agent) as actors, torch.no_grad():
                for number in tqdm(range(1, rollouts + 1), desc=f"seed {seed}, {way}"):
                    obs = actors.collect(agent, seed=(seed, solved) if number == 1 else None)["obs"]
                    before = agent.policy(agent.obs_rms(obs))
                    agent.obs_rms.update(obs.flatten(0, 1), steady=way == "steady")
                    kl = kl_divergence(before, agent.policy(agent.obs_rms(obs))).mean().item()
                    falls = int(actors.rollout["terminated"].sum())
                    rows.append({"way": way, "seed": seed, "rollout": number, "falls": falls, "kl": f"{kl:.3g}"})
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(results / "statistics.csv.gz", gzip.compress(table.getvalue().encode(), mtime=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "pbt", "statistics"])
    parser.add_argument("--fresh", action="store_true", help="evaluate the finished runs: 50 new episodes, twice")
    parser.add_argument("--list", action="store_true", help="name the studies and stop")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, help="default: the study's; with pbt: populations of each kind, 5")
    parser.add_argument("--steps", type=int, help="environment steps of a run; default: the study's")
    parser.add_argument("--envs", nargs="+", help="only these environments")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmark/results")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/reproduce")
    args = parser.parse_args()
    if args.list or not args.study:
        for name, study in STUDIES.items():
            runs, stored = len(study.runs()), len(read(name, args.results))
            hours = (runs - stored) * study.steps / STEPS_PER_SECOND / 3600
            rest = f"; the rest takes some {hours:.1f} core hours" if stored < runs else ""
            print(f"{name:16}{study.what}: {stored} of {runs} runs of {study.steps:,} steps are stored{rest}")
        print("pbt             Population Based Training against random search: see docs/pbt_launcher.md")
        print("statistics      what running statistics alone do to a policy: four minutes")
        return 0
    if any(x is not None and x < 1 for x in (args.workers, args.seeds, args.steps)):
        parser.error("--workers, --seeds and --steps must be 1 or more")
    args.results.mkdir(parents=True, exist_ok=True)
    if args.study == "pbt":
        envs = args.envs or ("Hopper-v4", "Walker2d-v4")
        populations(envs, args.steps or 1_000_000, args.seeds or 5, args.workers, args.results, args.run_dir / "pbt")
        return 0
    if args.study == "statistics":
        statistics_alone(args.results, args.run_dir, args.seeds or 8)
        return 0
    if args.steps not in (None, STUDIES[args.study].steps) and args.results == parser.get_default("results"):
        parser.error("--steps makes other runs than the stored ones: give --results a folder of its own")
    given = {"seeds": args.seeds, "steps": args.steps, "envs": args.envs and tuple(args.envs)}
    study = dataclasses.replace(STUDIES[args.study], **{key: x for key, x in given.items() if x is not None})
    if args.fresh:
        return evaluate(args.study, study, args.results, args.run_dir)
    stop = []  # NOTE: a handler that raised could do so while a run is being started, and leave it behind
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    failed = reproduce(args.study, study, args.workers, args.results, args.run_dir, stop)
    return 128 + stop[0] if stop else min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
