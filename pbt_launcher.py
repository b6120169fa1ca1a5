# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "matplotlib==3.11.2",
# ]
# ///
"""Population Based Training (Jaderberg et al. 2017, arXiv 1711.09846; notes §2.4) over any script of this project.

A population {(theta_j, h_j)} of parameters and hyperparameters is trained side by side. Every --interval steps:

    eval       score = mean raw return of the episodes that ended since the last time, at most 100
    exploit    a member in the bottom quantile takes a checkpoint (weights, optimiser, normalisers, adaptive
               coefficients) AND hyperparameters of a member drawn uniformly from the top quantile
    explore    each of the copied hyperparameters is multiplied by 0.8 or 1.2, or drawn anew from its prior

A *leg* is what one member trains between two decisions. It is a pure function, checkpoint and flags in, checkpoint and
score out, through the contract that every script keeps (--resume, --run-dir, --seed, --stop-at-step, ...), so the
launcher knows nothing of the algorithm, and a leg that is lost is simply run again. All that happens is one line each
in events.jsonl; the launcher's state is the fold of these events (`apply`), which is also how --resume finds it again.

Commands:
    python pbt_launcher.py ppo_clip.py --env-id Hopper-v4 --run-dir pbt/hopper --population 8 --slots 2 \\
        --mutate learning_rate:log:1e-5:1e-3 --mutate clip_coef:lin:0.1:0.4
    python pbt_launcher.py ppo_clip.py ... --resume              # the same command goes on after any kind of death
    python pbt_launcher.py ppo_clip.py ... --quantile 0          # random search: the same code, no copies
    python pbt_launcher.py ppo_clip.py --run-dir pbt/again --replay pbt/hopper --env-id Hopper-v4
    python pbt_launcher.py ppo_clip.py ... -- --num-envs 16 --num-steps 128      # after --: to the script, unchanged

--mutate NAME:KIND:... with KIND log or lin (LOW:HIGH), int (LOW:HIGH), cat (A,B,C). Values never leave their bounds.
gamma and gae_lambda are perturbed as 1 - x: 0.8 x 0.99 would be another problem, 1 - 0.8 x 0.01 is the next horizon.

What it does not tell: the score of the best member is selected, hence optimistic: evaluate best.pt on fresh episodes;
whether a schedule or a lucky member won: --replay trains the winner's schedule again, with other seeds.
"""

import ast
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro


@dataclass
class Args:
    """Population Based Training over a script that keeps this project's contract of flags and run folders."""

    script: tyro.conf.Positional[str]
    """the training script, e.g. ppo_clip.py"""
    env_id: str | None = None
    """passed to the script"""
    run_dir: str = "pbt"
    """folder of the whole population; for --executor ray one that every node sees"""
    total_timesteps: int = 1_000_000
    """environment steps of each member's run"""
    population: int = 8
    """number of members"""
    interval: int = 50_000
    """environment steps of a leg, between two decisions"""
    mutate: tyro.conf.UseAppendAction[list[str]] = dataclasses.field(default_factory=list)
    """a hyperparameter to search: NAME:log:LOW:HIGH, NAME:lin:LOW:HIGH, NAME:int:LOW:HIGH or NAME:cat:A,B,C (repeat)"""
    seed: int = 1
    """of all draws; member j's first seed is seed + j"""

    quantile: float = 0.25
    """truncation selection: the bottom fraction copies from the top fraction; 0: nobody copies, i.e. random search"""
    selection: Literal["truncation", "tournament"] = "truncation"
    """tournament: every member meets a random other one, and copies it if it scores higher"""
    resample_probability: float = 0.25
    """explore: chance that a hyperparameter is drawn from its prior instead of multiplied by 0.8 or 1.2"""
    mode: Literal["sync", "async"] = "sync"
    """sync: decide when all members have finished a leg; reproducible. async: each member as it finishes (the paper)"""

    slots: int = 2
    """legs that run at the same time"""
    gpus: str = ""
    """e.g. 0,1: spread the slots over these devices (CUDA_VISIBLE_DEVICES); the script still needs -- --cuda"""
    executor: Literal["local", "ray"] = "local"
    """ray (optional package): slots are actors on a Ray cluster"""
    ray_address: str | None = None
    """of a running cluster; none: a local one is started"""
    num_cpus: float = 1.0
    """ray: CPUs of a slot"""
    num_gpus: float = 0.0
    """ray: GPUs of a slot, fractions allowed"""
    timeout_factor: float = 5.0
    """a leg that takes this many times the median leg, and more than 60 s, counts as hanging and is killed"""

    resume: bool = False
    """go on with the population in --run-dir"""
    replay: str | None = None
    """no search: every member trains with the schedule of hyperparameters that the winner in this folder had"""
    dry_run: bool = False
    """print the commands of the first legs and stop"""


class UserError(Exception):
    """The user's mistake: one line on standard error, exit status 2."""


class RunFailed(Exception):
    """The run cannot go on: one line on standard error, exit status 1."""


# ==== Exploit and explore: pure functions =============================================================================


def ranked(scores):
    """Members from best to worst. scores: member -> score; None or nan is worst; ties go by the member's number."""
    return sorted(scores, key=lambda m: (-scores[m] if is_score(scores[m]) else math.inf, m))


def is_score(x):
    return x is not None and not math.isnan(x)


def truncation(scores, quantile, rng):
    """Truncation selection (paper, section 4.1): {loser: donor}. Top and bottom are disjoint; a donor has a score."""
    order = ranked(scores)
    k = min(math.ceil(len(order) * quantile), len(order) // 2)
    top = [m for m in order[:k] if is_score(scores[m])]
    return {m: top[rng.integers(len(top))] for m in sorted(order[len(order) - k :]) if top}


def tournament(scores, rng):
    """Binary tournament (paper, section 4.3): {loser: donor}. Every member meets one other, drawn at random."""
    copies = {}
    for m in sorted(scores):
        others = [o for o in sorted(scores) if o != m]
        rival = others[rng.integers(len(others))] if others else m
        if is_score(scores[rival]) and ranked({m: scores[m], rival: scores[rival]})[0] == rival != m:
            copies[m] = rival
    return {m: donor for m, donor in copies.items() if donor not in copies}  # nobody copies what is being replaced


@dataclass(frozen=True)
class Hyperparameter:
    """One searched hyperparameter: its prior, uniform on its scale, and how it is perturbed."""

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple = ()

    @classmethod
    def parse(cls, text):
        """From the command line's NAME:KIND:LOW:HIGH or NAME:cat:A,B. Raises UserError."""
        name, _, rest = text.replace("-", "_", text.split(":")[0].count("-")).partition(":")
        kind, *bounds = rest.split(":")
        try:
            if kind == "cat" and len(bounds) == 1:
                return cls(name, kind, choices=tuple(bounds[0].split(",")))
            low, high = map(float, bounds)
            assert kind in ("log", "lin", "int") and low <= high and (kind != "log" or low > 0)
            assert name not in ("gamma", "gae_lambda") or kind != "log" or high < 1
            return cls(name, kind, low, high)
        except (ValueError, AssertionError):
            usage = "NAME:log:LOW:HIGH, NAME:lin:LOW:HIGH, NAME:int:LOW:HIGH or NAME:cat:A,B"
            raise UserError(f"--mutate {text}: expected {usage}") from None

    def inside(self, x):
        x = min(max(x, self.low), self.high)
        return round(x) if self.kind == "int" else x

    def flip(self, x):
        """gamma and gae_lambda live on the scale of 1 - x; applied twice it is the identity."""
        return 1 - x if self.name in ("gamma", "gae_lambda") else x

    def sample(self, rng):
        """A draw from the prior."""
        if self.kind == "cat":
            return self.choices[rng.integers(len(self.choices))]
        if self.kind == "int":
            return int(rng.integers(round(self.low), round(self.high) + 1))
        ends = sorted((self.flip(self.low), self.flip(self.high)))
        if self.kind == "log":
            return self.inside(self.flip(float(np.exp(rng.uniform(*np.log(ends))))))
        return self.inside(self.flip(float(rng.uniform(*ends))))

    def perturb(self, x, rng):
        """x times 0.8 or 1.2 within the bounds; an integer moves by one at least, a category to a neighbour, and 0,
        which no factor moves, is drawn anew."""
        up = rng.random() < 0.5
        if self.kind == "cat":
            index = self.choices.index(x) + (1 if up else -1)
            return self.choices[min(max(index, 0), len(self.choices) - 1)]
        if self.flip(x) == 0:
            return self.sample(rng)
        new = self.flip(self.flip(x) * (1.2 if up else 0.8))
        if self.kind == "int" and round(new) == x:
            new = x + (1 if up else -1)
        return self.inside(new)


def explore(values, hyperparameters, resample_probability, rng):
    """A copy's hyperparameters: each perturbed, or drawn from its prior with the given probability."""
    new = {}
    for h in hyperparameters:
        resample = rng.random() < resample_probability
        new[h.name] = h.sample(rng) if resample else h.perturb(values[h.name], rng)
    return new


# ==== The population: a fold over events ==============================================================================


@dataclass
class Member:
    """What the launcher knows of one member."""

    id: int
    hyper: dict
    seed: int
    step: int = 0
    legs: int = 0  # finished ones; after a copy, the donor's
    tries: int = 0  # legs that this member has run, finished or failed; the next one is named m<id>/t<tries + 1>
    failures: int = 0  # of the next leg, so far
    score: float | None = None
    leg: str | None = None  # whose checkpoint the next leg starts from
    earlier: str | None = None  # the one before it, should that be damaged
    parent: int | None = None


class Population:
    """Members and finished legs; changed by `apply` alone, so that events.jsonl holds all that there is to know."""

    def __init__(self):
        self.members, self.legs, self.generations, self.best = {}, {}, 0, None

    def apply(self, event):
        """Fold one event, a dict as in events.jsonl, into the state."""
        kind = event["event"]
        if kind == "member":
            self.members[event["id"]] = Member(event["id"], event["hyper"], event["seed"])
        elif kind == "leg":
            m = self.members[event["member"]]
            self.legs[event["leg"]] = {k: event[k] for k in ("step", "score", "sha256", "hyper", "source", "seconds")}
            m.earlier, m.leg, m.step, m.score = m.leg, event["leg"], event["step"], event["score"]
            m.legs, m.tries, m.failures = m.legs + 1, m.tries + 1, 0
            if is_score(m.score) and (self.best is None or m.score > self.legs[self.best]["score"]):
                self.best = m.leg
        elif kind == "failed":
            m = self.members[event["member"]]
            m.tries, m.failures = m.tries + 1, m.failures + 1
        elif kind == "back":  # the checkpoint is damaged: from the one before it, the last leg again
            m = self.members[event["member"]]
            m.leg, m.earlier, m.legs, m.step = m.earlier, None, m.legs - 1, self.legs[m.earlier]["step"]
        elif kind == "decide":  # all copies of one boundary at once: a crash leaves all of them or none
            self.generations += event["generation"]
            before = {j: dataclasses.replace(m) for j, m in self.members.items()}
            for c in event["copies"]:
                m, donor = self.members[c["member"]], before.get(c["donor"], Member(0, {}, 0))
                m.hyper, m.seed, m.parent, m.score, m.failures = c["hyper"], c["seed"], c["donor"], None, 0
                m.leg, m.earlier, m.step, m.legs = donor.leg, donor.earlier, donor.step, donor.legs

    def lineage(self, leg):
        """The legs from the first to this one, through all copies."""
        chain = []
        while leg:
            chain.append(leg)
            leg = self.legs[leg]["source"]
        return chain[::-1]


class Journal:
    """events.jsonl, append-only, and state.json, replaced atomically; --resume folds the events again."""

    def __init__(self, run_dir):
        self.path, self.state, self.population = run_dir / "events.jsonl", run_dir / "state.json", Population()
        if self.path.exists():
            whole = [line for line in self.path.read_bytes().splitlines(True) if line.endswith(b"\n")]
            for line in whole:
                self.population.apply(json.loads(line))
            with open(self.path, "r+b") as file:  # half a line is an event that did not happen
                file.truncate(sum(map(len, whole)))
        self.file = open(self.path, "a")

    def write(self, event, **content):
        event = {"event": event, **content}
        line = json.dumps(event)
        self.file.write(line + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.population.apply(json.loads(line))
        population = self.population
        state = {"generations": population.generations, "best": population.best, "legs": population.legs}
        state["members"] = {m.id: dataclasses.asdict(m) for m in population.members.values()}
        temporary = Path(f"{self.state}.tmp")
        temporary.write_text(json.dumps(state, indent=1))
        os.replace(temporary, self.state)


# ==== Legs: processes that import the script once and train many times ================================================


def serve(script):
    """A slot's process: read a leg's flags per line from standard input, answer with a line of JSON on standard output.
    When the launcher dies, standard input ends, and this process kills its group: nothing is left behind."""
    commands, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the script prints goes to the log, not into the protocol
    waiting = queue.Queue()

    def listen():
        for line in commands:
            waiting.put(json.loads(line))
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    run_leg = leg_runner(script)
    while True:
        print(json.dumps(run_leg(waiting.get())), file=replies, flush=True)


def leg_runner(script):
    """A function from a leg's flags to its result. A script that has train(args) and parse_args(argv) is imported,
    once; any other is started anew for every leg, as a user would. A script that does not tell a leg's own returns is
    scored by its last episodic_return, in which a copy's first legs still see the donor's episodes."""
    tree = ast.parse(Path(script).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if {"train", "parse_args"} <= functions:
        spec = importlib.util.spec_from_file_location(Path(script).stem, script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def run_imported(argv):
        try:
            summary = module.train(module.parse_args(argv))
        except SystemExit:
            return {"error": f"it does not take these flags: {shlex.join(argv)}", "mistake": True}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "mistake": type(error).__name__ == "UserError"}
        returns = summary.get("returns", [summary["episodic_return"]] if "episodic_return" in summary else [])
        return {"signal": summary.get("signal"), "step": summary["global_step"], "returns": returns}

    def run_process(argv):
        command = [sys.executable, script, *argv]
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            return {"error": lines[-1], "mistake": process.returncode == 2}
        with open(Path(argv[argv.index("--run-dir") + 1]) / "progress.csv") as file:
            last = list(csv.DictReader(file))[-1]
        return {"signal": None, "step": int(last["global_step"]), "returns": [float(last["episodic_return"])]}

    return run_imported if {"train", "parse_args"} <= functions else run_process


class LocalSlot:
    """One process on this machine that runs legs; a crash or a kill takes a leg with it and nothing else."""

    def __init__(self, index, args):
        self.args, self.log = args, Path(args.run_dir) / f"slot-{index}.log"
        self.env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.slots))}
        if args.gpus:
            devices = args.gpus.split(",")
            self.env["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]
        self.start_process()

    def start_process(self):
        command = [sys.executable, __file__, "--serve", self.args.script]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self.env, start_new_session=True
            )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.answer = b""

    def available(self):
        """Can a leg start here now? A process that died is made anew."""
        if self.process.poll() is not None:
            self.start_process()
        return True

    def start(self, argv):
        with contextlib.suppress(BrokenPipeError):  # dead already: poll will say so
            self.process.stdin.write(json.dumps(argv).encode() + b"\n")
            self.process.stdin.flush()

    def poll(self):
        """None while the leg runs, then its result."""
        self.answer += self.process.stdout.read() or b""
        if b"\n" in self.answer:
            line, _, self.answer = self.answer.partition(b"\n")
            return json.loads(line)
        if self.process.poll() is not None:
            return {"error": f"the slot's process ended with status {self.process.returncode} (see {self.log})"}
        return None

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class RaySlot:
    """An actor on a Ray cluster that runs legs; the same interface. Lost with its worker or node, and made anew."""

    def __init__(self, index, args):
        self.args, self.ray, self.actor = args, sys.modules["ray"], None

    def available(self):
        """Can a leg start here now? Not while the cluster has no room for this slot's actor."""
        if self.actor is None:
            options = {"num_cpus": self.args.num_cpus, "num_gpus": self.args.num_gpus}
            self.actor = self.ray.remote(**options)(RayWorker).remote(str(Path(self.args.script).resolve()))
            self.made = self.actor.__ray_ready__.remote()
        if not self.ray.wait([self.made], timeout=0)[0]:
            return False
        try:
            self.ray.get(self.made)
        except self.ray.exceptions.RayError:
            self.actor = None
        return self.actor is not None

    def start(self, argv):
        self.future = self.actor.leg.remote(argv)

    def poll(self):
        if not self.ray.wait([self.future], timeout=0)[0]:
            return None
        try:
            return self.ray.get(self.future)
        except self.ray.exceptions.RayError as error:
            self.actor = None
            return {"error": f"{type(error).__name__}: the leg's worker or node was lost"}

    def kill(self):
        if self.actor is not None:
            self.ray.kill(self.actor)
            self.actor = None


class RayWorker:
    def __init__(self, script):
        self.run_leg = leg_runner(script)

    def leg(self, argv):
        return self.run_leg(argv)


def make_slots(args):
    """The slots of this run. Raises UserError if Ray is not installed, or a node does not see the run folder."""
    if args.executor == "local":
        return [LocalSlot(i, args) for i in range(args.slots)]
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs the package: pip install 'ray[default]==2.60.0'") from None
    ray.cloudpickle.register_pickle_by_value(sys.modules[leg_runner.__module__])
    if not ray.is_initialized():
        ray.init(address=args.ray_address, log_to_driver=False, logging_level="ERROR")
    probe, script = Path(args.run_dir).resolve() / "probe", Path(args.script).resolve()
    probe.write_text("seen by every node?")

    @ray.remote(num_cpus=0)
    def sees():
        return probe.exists() and script.exists()

    for node in ray.nodes():
        pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if node["Alive"] and not ray.get(sees.options(scheduling_strategy=pinned).remote()):
            raise UserError(f"node {node['NodeManagerAddress']} does not see {probe} and {script}: use a shared folder")
    return [RaySlot(i, args) for i in range(args.slots)]


# ==== The launcher ====================================================================================================


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Launcher:
    """Runs legs in slots until every member has trained --total-timesteps, and decides between them who copies whom."""

    def __init__(self, args, run_dir):
        self.args, self.run_dir = args, run_dir
        self.hyperparameters = [Hyperparameter.parse(text) for text in args.mutate]
        self.schedule = winners_schedule(args.replay) if args.replay else []
        self.journal = Journal(self.run_dir)
        self.population = self.journal.population
        for j in range(len(self.population.members), args.population):
            rng = np.random.default_rng((args.seed, j))
            self.journal.write(
                "member", id=j, seed=args.seed + j, hyper={h.name: h.sample(rng) for h in self.hyperparameters}
            )
        self.slots, self.running, self.stop, self.boards = [], {}, None, {}
        self.failures_in_a_row = 0

    # ---- what is to be done --------------------------------------------------------------------------------------

    def target(self, member):
        """The step at which a member's next leg ends: the next multiple of the interval."""
        return min((member.step // self.args.interval + 1) * self.args.interval, self.args.total_timesteps)

    def finished(self, member):
        return member.step >= self.args.total_timesteps

    def ready(self):
        """Members whose next leg can start now. sync: those that have not yet finished this generation's."""
        busy = {m for m, _, _ in self.running.values()}
        members = [m for m in self.population.members.values() if m.id not in busy and not self.finished(m)]
        if self.args.mode == "sync":
            members = [m for m in members if m.legs <= self.population.generations]
        return sorted(members, key=lambda m: (m.legs, m.id))

    def flags(self, member):
        """The command line of a member's next leg, but for the script's name, and the leg's name."""
        leg = f"m{member.id:02d}/t{member.tries + 1:03d}"
        flags = {"--env-id": self.args.env_id} if self.args.env_id else {}
        flags |= {"--total-timesteps": self.args.total_timesteps, "--stop-at-step": self.target(member)}
        flags |= {"--seed": member.seed, "--checkpoint-every": self.args.interval, "--run-dir": self.run_dir / leg}
        flags |= {"--resume": self.checkpoint(member.leg)} if member.leg else {}
        if "num_workers" in Path(self.args.script).read_text():  # the slots are the processes, unless -- says otherwise
            flags["--num-workers"] = 0
        flags |= {f"--{name.replace('_', '-')}": x for name, x in self.hyper(member).items()}
        return [str(x) for pair in flags.items() for x in pair] + self.args.script_flags, leg

    def hyper(self, member):
        """The hyperparameters of a member's next leg: its own, or those of the schedule that is replayed."""
        return next((h for end, h in self.schedule if end >= self.target(member)), member.hyper)

    def checkpoint(self, leg):
        return self.run_dir / leg / "checkpoint.pt"

    def sound(self, leg):
        """Is this leg's checkpoint still the one that it wrote?"""
        path = self.checkpoint(leg)
        return path.exists() and sha256(path) == self.population.legs[leg]["sha256"]

    # ---- decisions -----------------------------------------------------------------------------------------------

    def rng(self, *purpose):
        """Every decision draws from a generator of its own: nothing to save, and the same draws after --resume."""
        return np.random.default_rng((self.args.seed, *purpose))

    def decide(self, generation, losers, rng):
        """Exploit and explore: who of `losers` copies whom. All copies are one event: a crash leaves all or none."""
        members = self.population.members
        scores = {m.id: m.score for m in members.values()}
        if self.args.quantile == 0 or self.schedule:
            copies = {}
        elif self.args.selection == "tournament":
            copies = tournament(scores, rng)
        else:
            copies = truncation(scores, self.args.quantile, rng)
        self.copy({m: d for m, d in copies.items() if m in losers and self.sound(members[d].leg)}, generation, rng)

    def decide_if_due(self):
        """sync: once all members have finished this generation's leg."""
        members, generations = self.population.members.values(), self.population.generations
        due = all(m.legs > generations or self.finished(m) for m in members) and not all(map(self.finished, members))
        if self.args.mode == "sync" and due:
            self.decide(1, set(self.population.members), self.rng(1, generations))

    def copy(self, copies, generation, rng):
        """Write {member: donor}, with the explored hyperparameters and a seed that no one else has."""
        content = []
        for m, donor in copies.items():
            values = self.population.members[donor].hyper
            hyper = explore(values, self.hyperparameters, self.args.resample_probability, rng)
            seed = int(rng.integers(2**31))
            content.append({"member": m, "donor": donor, "hyper": hyper, "seed": seed})
        if content or generation:
            self.journal.write("decide", generation=generation, copies=content)

    def replace(self, member):
        """A member that fails again and again restarts from the best other one; with nobody to copy, from scratch."""
        scores = {m.id: m.score for m in self.population.members.values() if m.id != member.id and m.leg}
        donors = [m for m in ranked(scores) if self.sound(self.population.members[m].leg)]
        rng = self.rng(2, member.id, member.tries)
        if donors:
            self.copy({member.id: donors[0]}, 0, rng)
        else:
            fresh = {h.name: h.sample(rng) for h in self.hyperparameters}
            copy = {"member": member.id, "donor": None, "hyper": fresh, "seed": member.seed + self.args.population}
            self.journal.write("decide", generation=0, copies=[copy])

    # ---- legs ----------------------------------------------------------------------------------------------------

    def start(self, slot, member):
        while member.leg and not self.sound(member.leg):  # damaged on disk: the one before it, else the best peer
            self.say(f"member {member.id}: the checkpoint of {member.leg} is damaged")
            if member.earlier:
                self.journal.write("back", member=member.id)
            else:
                self.replace(member)
        argv, leg = self.flags(member)
        shutil.rmtree(self.run_dir / leg, ignore_errors=True)  # what a launcher that was killed left of this leg
        self.running[slot] = (member.id, leg, time.time())
        self.slots[slot].start(argv)

    def finish(self, slot, result):
        """Take a leg's result into the journal."""
        m, leg, started = self.running.pop(slot)
        member, checkpoint = self.population.members[m], self.checkpoint(leg)
        if "error" not in result and (result["signal"] or not checkpoint.exists()):
            result = {"error": f"the leg was stopped by signal {result['signal']}"}
        if "error" in result:
            self.failed(member, leg, result)
            return
        self.failures_in_a_row = 0
        returns = [x for x in result["returns"] if not math.isnan(x)]
        event = {
            "member": m, "leg": leg, "step": result["step"], "score": statistics.fmean(returns) if returns else None,
            "hyper": self.hyper(member), "seed": member.seed, "source": member.leg, "seconds": time.time() - started,
            "sha256": sha256(checkpoint), "parent": member.parent,
        }  # fmt: skip
        self.journal.write("leg", **event)
        self.keep_best()
        self.board(event)
        self.delete_unused()
        if self.args.mode == "async":
            self.decide(0, {m}, self.rng(3, m, member.tries))

    def failed(self, member, leg, result):
        """Retry a failed leg once; then the member restarts from a strong peer. A mistake in the command ends all."""
        self.say(f"member {member.id}: {result['error']}")
        if result.get("mistake") and not self.population.legs:
            raise UserError(f"{self.args.script} says: {result['error']}")
        if "No space left" in result["error"]:
            time.sleep(5)
            return
        self.failures_in_a_row += 1
        if self.failures_in_a_row > 2 * self.args.population:
            raise RunFailed(f"{self.failures_in_a_row} legs in a row have failed, the last with: {result['error']}")
        self.journal.write("failed", member=member.id, leg=leg, error=result["error"])
        if member.failures >= 2:
            self.replace(member)

    def keep_best(self):
        """best.pt: the checkpoint of the leg with the highest score so far."""
        best, path = self.population.best, self.run_dir / "best.pt"
        if best and self.sound(best) and not (path.exists() and sha256(path) == self.population.legs[best]["sha256"]):
            shutil.copy(self.checkpoint(best), self.run_dir / "best.tmp")
            os.replace(self.run_dir / "best.tmp", path)

    def delete_unused(self):
        """Keep what a next leg may start from: at most two checkpoints a member, besides best.pt."""
        used = {leg for m in self.population.members.values() for leg in (m.leg, m.earlier)}
        for leg in set(self.population.legs) - used:
            self.checkpoint(leg).unlink(missing_ok=True)

    def disk_is_full(self):
        legs = [m.leg for m in self.population.members.values() if m.leg and self.checkpoint(m.leg).exists()]
        sizes = [self.checkpoint(leg).stat().st_size for leg in legs]
        return shutil.disk_usage(self.run_dir).free < 3 * self.args.population * max(sizes, default=10**6)

    def kill_hanging(self):
        seconds = [leg["seconds"] for leg in self.population.legs.values()]
        if not seconds:
            return
        limit = max(60.0, self.args.timeout_factor * statistics.median(seconds))
        for slot, (_, leg, started) in list(self.running.items()):
            if time.time() - started > limit:
                self.slots[slot].kill()
                self.finish(slot, {"error": f"{leg} hung: no result after {limit:.0f} s"})

    # ---- the loop ------------------------------------------------------------------------------------------------

    def run(self):
        """Until every member is done. Returns the summary that main prints."""
        self.slots = make_slots(self.args)
        self.keep_best()
        handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self.stop and not all(map(self.finished, self.population.members.values())):
                free = [i for i, slot in enumerate(self.slots) if i not in self.running and slot.available()]
                for slot, member in zip(free, self.ready(), strict=False):
                    if self.disk_is_full():
                        self.say("the disk is nearly full: waiting for space")
                        time.sleep(10)
                        break
                    self.start(slot, member)
                for slot in list(self.running):
                    result = self.slots[slot].poll()
                    if result is not None:
                        self.finish(slot, result)
                        self.table()
                self.kill_hanging()
                self.decide_if_due()
                time.sleep(0.02)
        finally:
            for slot in self.slots:
                slot.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.summary()

    def on_signal(self, number, frame):
        self.stop = number

    def summary(self):
        best = self.population.best
        score = self.population.legs[best]["score"] if best else None
        return {"best": os.path.relpath(self.run_dir / "best.pt"), "score": score, "leg": best, "signal": self.stop}

    # ---- what a person sees --------------------------------------------------------------------------------------

    def say(self, text):
        print(f"pbt_launcher.py: {text}", file=sys.stderr)

    def table(self):
        """The members, as they are now; redrawn in place on a terminal, else after every generation."""
        members, terminal = self.population.members.values(), sys.stderr.isatty()
        if not terminal and len(self.population.legs) % len(members):
            return
        names = [h.name for h in self.hyperparameters]
        rows = [["member", "step", "score", "parent", *names]]
        for m in members:
            values = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in m.hyper.values()]
            score = "" if not is_score(m.score) else f"{m.score:.1f}"
            rows.append([str(m.id), str(m.step), score, "" if m.parent is None else str(m.parent), *values])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        best = self.population.best
        lines.append(f"best so far: {best}, {self.population.legs[best]['score']:.1f}" if best else "no score yet")
        if terminal and getattr(self, "drawn", 0):
            print(f"\x1b[{self.drawn}A\x1b[J", end="", file=sys.stderr)
        self.drawn = len(lines)
        print("\n".join(lines), file=sys.stderr)

    def board(self, event):
        """TensorBoard: one run per member under RUN/tensorboard, with its score and its hyperparameters."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        name = f"m{event['member']:02d}"
        if name not in self.boards:
            self.boards[name] = EventFileWriter(str(self.run_dir / "tensorboard" / name))
        values = {"pbt/score": event["score"]} | {f"pbt/{key}": x for key, x in event["hyper"].items()}
        values = [Summary.Value(tag=k, simple_value=x) for k, x in values.items() if isinstance(x, int | float)]
        self.boards[name].add_event(Event(wall_time=time.time(), step=event["step"], summary=Summary(value=values)))
        self.boards[name].flush()


def winners_schedule(folder):
    """[(last step, hyperparameters)] of the legs from which the best leg in `folder` descends. Raises UserError."""
    if not (Path(folder) / "events.jsonl").exists():
        raise UserError(f"--replay {folder}: there is no events.jsonl")
    population = Journal(Path(folder)).population
    chain = [population.legs[leg] for leg in population.lineage(population.best)]
    return [(leg["step"], leg["hyper"]) for leg in chain] + [(math.inf, chain[-1]["hyper"])]


# ==== Figures =========================================================================================================


def draw(run_dir, population, names):
    """lineage.png: who copied whom, coloured by score. schedule.png: hyperparameters over time, the winner's thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    legs = population.legs
    member = {leg: int(leg[1:].split("/")[0]) for leg in legs}
    begin = {leg: legs[x["source"]]["step"] if x["source"] else 0 for leg, x in legs.items()}
    winner = set(population.lineage(population.best))
    scores = [x["score"] for x in legs.values() if is_score(x["score"])]
    colour = plt.cm.viridis
    norm = plt.Normalize(min(scores, default=0), max(scores, default=1))

    figure, axis = plt.subplots(figsize=(10, 0.45 * len(population.members) + 1.5))
    for leg, x in legs.items():
        row, source = member[leg], x["source"]
        shade = colour(norm(x["score"])) if is_score(x["score"]) else "0.8"
        axis.plot([begin[leg], x["step"]], [row, row], color=shade, lw=6 if leg in winner else 3, solid_capstyle="butt")
        if source and member[source] != row:
            axis.plot([begin[leg]] * 2, [member[source], row], color="red" if leg in winner else "0.6", lw=1)
    axis.set(xlabel="environment steps", ylabel="member", yticks=sorted(population.members))
    figure.colorbar(plt.cm.ScalarMappable(norm, colour), ax=axis, label="score")
    figure.tight_layout()
    figure.savefig(run_dir / "lineage.png", dpi=110)

    figure, axes = plt.subplots(
        max(len(names), 1), 1, figsize=(10, 2.2 * max(len(names), 1)), squeeze=False, sharex=True
    )
    for name, axis in zip(names, axes[:, 0], strict=False):
        for leg, x in legs.items():
            style = {"color": "C3", "lw": 3, "zorder": 3} if leg in winner else {"color": "0.6", "lw": 1}
            axis.plot([begin[leg], x["step"]], [x["hyper"][name]] * 2, **style)
        axis.set(ylabel=name)
    axes[-1, 0].set(xlabel="environment steps")
    figure.tight_layout()
    figure.savefig(run_dir / "schedule.png", dpi=110)


# ==== Arguments and entry =============================================================================================

THIS_PROCESS_ONLY = ("resume", "dry_run", "slots", "gpus", "executor", "ray_address", "num_cpus", "num_gpus", "run_dir")


def read_args(argv):
    """Our Args; what follows -- goes to the script, as args.script_flags."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = tyro.cli(Args, args=argv[:split])
    args.script_flags = argv[split + 1 :]
    return args


def check_args(args):
    """Raise UserError for what cannot work, before anything is written; store the arguments, or compare with them."""
    for key in ("population", "interval", "total_timesteps", "slots", "timeout_factor"):
        if not getattr(args, key) > 0:
            raise UserError(f"{key} must be positive")
    if not (0 <= args.quantile <= 0.5 and 0 <= args.resample_probability <= 1):
        raise UserError("quantile must lie in [0, 0.5] and resample_probability in [0, 1]")
    if not Path(args.script).is_file():
        raise UserError(f"there is no script {args.script}")
    names = [Hyperparameter.parse(text).name for text in args.mutate]
    if len(set(names)) < len(names):
        raise UserError("a hyperparameter is named by --mutate twice")
    run_dir, kept = Path(args.run_dir), {k: v for k, v in vars(args).items() if k not in THIS_PROCESS_ONLY}
    if args.dry_run:
        return
    if (run_dir / "args.json").exists():
        if not args.resume:
            raise UserError(f"{run_dir} holds a population: go on with --resume, or choose another --run-dir")
        stored = json.loads((run_dir / "args.json").read_text())
        for key, x in kept.items():
            if stored.get(key) != x:
                raise UserError(f"--resume: {key} is {x} here, but {stored.get(key)} in {run_dir}")
    elif args.resume:
        raise UserError(f"--resume: there is no population in {run_dir}")
    if args.replay:
        winners_schedule(args.replay)


def launch(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--serve"]:
        serve(argv[1])
    try:
        args = read_args(argv)
        check_args(args)
        if args.dry_run:
            return dry_run(args)
        run_dir = Path(args.run_dir).resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in vars(args).items() if k not in THIS_PROCESS_ONLY}
        if not args.resume:
            (run_dir / "args.json").write_text(json.dumps(kept, indent=2) + "\n")
        launcher = Launcher(args, run_dir)
        summary = launcher.run()
    except UserError as error:
        print(f"pbt_launcher.py: {error}", file=sys.stderr)
        return 2
    except (RunFailed, OSError) as error:
        print(f"pbt_launcher.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    if summary["signal"]:
        print(f"go on with: python {shlex.join([sys.argv[0], *argv])} --resume", file=sys.stderr)
        return 128 + summary["signal"]
    if summary["leg"]:
        draw(run_dir, launcher.population, [h.name for h in launcher.hyperparameters])
        print(f"evaluate with: python {args.script} --evaluate {summary['best']}", file=sys.stderr)
    return 0


def dry_run(args) -> int:
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(args, Path(folder))
        for member in launcher.ready():
            print(shlex.join(["python", args.script, *launcher.flags(member)[0]]).replace(folder, args.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(launch())
