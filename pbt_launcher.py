# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#                 "tensorboard==2.21.0", "tqdm==4.70.1", "matplotlib==3.11.2"]
# ///
"""Population Based Training (Jaderberg et al. 2017, arXiv 1711.09846) over any script of this project.

Nobody knows beforehand which hyperparameters are good, and the answer changes as a policy learns: a step size that is
right at the start may be wrong at the end. Random search trains many members, each with settings of its own that never
change, and keeps the best. What the others cost is lost. PBT trains the same members side by side and lets them learn
from each other. After every --interval steps:

    score      each member by the mean raw return of the episodes that ended since the last decision (at most 100)
    exploit    a member near the bottom copies one near the top: its checkpoint AND its hyperparameters
    explore    the copy then changes the hyperparameters: times 0.8 or 1.2, or drawn anew from their prior

Why copy both? With the weights alone a member would soon suffer again from the settings that held it back. With the
settings alone it would keep the weights that its own had spoiled. Why explore? Without it a population could only
choose among its first draws, and after a few copies all members would have the same settings. For the cost of a random
search, PBT thus gives a trained policy and the schedule of hyperparameters that led to it.

A *leg* is what one member trains between two decisions. It is a pure function: a checkpoint and flags go in, a
checkpoint and a score come out. The launcher knows nothing of a script's algorithm, only what all scripts share: train,
evaluate, parse_args, and flags like --resume, --stop-at-step and --run-dir. A leg that is lost is run once more; a
member that fails twice becomes a copy. Every event is a line in RUN_DIR/events.jsonl; all that the launcher knows
follows from them. So --resume goes on after any crash, in --mode sync with the same decisions (if the same legs fail).

    python pbt_launcher.py ppo_clip.py --env-id Hopper-v4 --run-dir pbt/hopper --population 8 --slots 2 \\
        --mutate learning_rate:log:1e-5:1e-3 --mutate clip_coef:lin:0.1:0.4
    python pbt_launcher.py ppo_clip.py ... --resume              # the same command goes on where it was interrupted
    python pbt_launcher.py ppo_clip.py ... --quantile 0          # random search: nobody copies but who failed twice
    python pbt_launcher.py ppo_clip.py --env-id Hopper-v4 --run-dir pbt/again --replay pbt/hopper --seed 101
    python pbt_launcher.py ppo_clip.py ... -- --num-envs 16 --num-steps 128    # after --: flags for the script

A population of 8 in 2 slots takes about four times as long as two runs side by side. How to read its result: the best
score is the highest of many noisy ones, so it is biased upwards; evaluate best.pt on fresh episodes. A winner may have
had a good schedule or just luck: --replay trains its schedule again, with other seeds. lineage.png shows who copied
whom, schedule.png what all have tried. PBT is greedy: what raises the score within one --interval is copied, even if it
costs later, like a learning rate that falls too early. A longer interval looks further ahead, and decides less often.

Departures from the paper: all members decide together, so that a seed fixes every decision (--mode async: one by one,
as in the paper). A quarter copies a quarter; in the paper it is a fifth. A hyperparameter is perturbed or, with
probability 1/4, drawn anew; in the paper these are two strategies. A score is of a leg's last 100 episodes, not 10.
"""

import contextlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

SCRIPT = Path(__file__).stem
Repeated = tyro.conf.UseAppendAction[list[str]]


@dataclass
class Args:
    """Population Based Training over a script that keeps this project's contract of flags and run folders."""

    script: tyro.conf.Positional[str]  # the training script, e.g. ppo_clip.py; its own flags follow after --
    script_flags: tyro.conf.Suppress[list[str]] = field(default_factory=list)  # the flags after --
    env_id: str | None = None  # the script's --env-id (default: the script's)
    run_dir: str = "pbt"  # folder of the whole population; with --executor ray one that every node sees
    total_timesteps: int = 1_000_000  # environment steps of each member
    population: int = 8  # number of members
    interval: int = 50_000  # environment steps between two decisions; long enough for several episodes each
    mutate: Repeated = field(default_factory=list)  # search NAME:KIND:LOW:HIGH (log, lin or int), or NAME:cat:A,B,C
    seed: int = 1  # all draws follow from it; member j begins with seed + j

    score: Literal["training", "evaluation"] = "training"  # from the leg's own episodes, or fresh ones without noise
    eval_episodes: int = 10  # with --score evaluation: how many; they have the same seed for all members
    quantile: float = 0.25  # the bottom fraction copies from the top one; 0: random search
    warmup: int = 0  # before this step only failed members become copies; early scores tell little
    min_gap: float = 0.0  # replace a member only if the other's score is higher by more than this
    resample_probability: float = 0.25  # explore: the chance of a draw from the prior instead of times 0.8 or 1.2
    mode: Literal["sync", "async"] = "sync"  # async (the paper): decide about each member as it finishes a leg

    slots: int = 2  # legs that run at the same time
    gpus: str | None = None  # e.g. 0,1: spread the slots over these devices; the script still needs -- --cuda
    leg_timeout: float | None = None  # seconds until a leg counts as hung (default: 4 hours, later 5 times the median)
    executor: Literal["local", "ray"] = "local"  # ray (optional package): slots are actors on a Ray cluster
    ray_address: str | None = None  # HOST:PORT of a running cluster (default: start one on this machine)
    num_cpus: float = 1.0  # with --executor ray: CPUs of a slot
    num_gpus: float = 0.0  # with --executor ray: GPUs of a slot, fractions allowed

    resume: bool = False  # go on with the population in --run-dir
    replay: str | None = None  # no search: every member follows the schedule that the winner in this folder had
    schedule: tyro.conf.Suppress[list[str]] = field(default_factory=list)  # of --replay: [last step, hyperparameters]


# ==== Score, exploit, explore: pure functions, so that a seed fixes every decision ====================================


def ranked(scores):
    """Members from best to worst. scores: {member: score}; None is the worst, ties go by the number."""
    return sorted(scores, key=lambda m: (math.inf if scores[m] is None else -scores[m], m))


def exploit(scores, args, rng):
    """Who copies whom: {loser: donor}. scores: {member: score}. A member with None is left alone, as nothing is known
    of it: it has ended no leg since it began or became a copy, or no episode ended in its leg (it may just do well). A
    member that has failed twice is replaced in decide()."""
    scores = {m: x for m, x in scores.items() if x is not None}
    copies = truncation(scores, 0 if args.replay else args.quantile, rng)  # 0, as in random search: nobody copies
    # Close scores are mostly noise, and a copy costs the loser all that it has learned itself: hence the gap. Nobody
    # copies an equal: once a task is solved, all scores are equal, and copies would only destroy variety.
    return {m: donor for m, donor in copies.items() if scores[donor] - scores[m] > args.min_gap}


def truncation(scores, quantile, rng):
    """Truncation selection (paper, section 4.1): each of the bottom fraction copies one of the top fraction, drawn at
    random: the highest score is often luck, and if all copied that one, soon a single lineage would be left."""
    order = ranked(scores)
    k = min(math.ceil(len(order) * quantile), len(order) // 2)  # an end is at most a half, so nobody is in both
    return {m: order[rng.integers(k)] for m in sorted(order[len(order) - k :])}


@dataclass(frozen=True)
class Hyperparameter:
    """One searched hyperparameter. Its prior is uniform on its scale: log, lin, int, or cat (a choice of words)."""

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple = ()

    @classmethod
    def parse(cls, text):
        """From NAME:KIND:LOW:HIGH or NAME:cat:A,B. Raises UserError."""
        match text.split(":"):
            case [name, "cat", words] if all(words.split(",")):
                return cls(name.replace("-", "_"), "cat", choices=tuple(words.split(",")))
            case [name, "log" | "lin" | "int" as kind, low, high]:
                with contextlib.suppress(ValueError):  # of float()
                    h = cls(name.replace("-", "_"), kind, float(low), float(high))
                    positive = kind != "log" or min(h.flip(h.low), h.flip(h.high)) > 0
                    whole = kind != "int" or h.low.is_integer() and h.high.is_integer() and max(-h.low, h.high) < 2**62
                    if positive and whole and h.low <= h.high and math.isfinite(h.high - h.low):
                        return h
        raise UserError(
            f"--mutate {text}: expected NAME:log:LOW:HIGH, NAME:lin:LOW:HIGH, NAME:int:LOW:HIGH or NAME:cat:A,B; "
            "bounds above 0 for log (below 1 for gamma and gae_lambda), and whole for int"
        )

    def flip(self, x):
        """gamma and gae_lambda are searched as 1 - x, because 1 / (1 - gamma) is the horizon. From gamma 0.99 (horizon
        100), 0.8 * 0.99 would lead to 5, but 1 - 0.8 * 0.01 leads to 125. Applied twice, flip is the identity."""
        return 1 - x if self.name in ("gamma", "gae_lambda") else x

    def inside(self, x):  # the nearest value within the bounds
        x = min(max(x, self.low), self.high)
        return round(x) if self.kind == "int" else x

    def sample(self, rng):
        """A draw from the prior."""
        if self.kind == "cat":
            return self.choices[rng.integers(len(self.choices))]
        if self.kind == "int":
            return int(rng.integers(round(self.low), round(self.high) + 1))
        ends = sorted((self.flip(self.low), self.flip(self.high)))
        x = np.exp(rng.uniform(*np.log(ends))) if self.kind == "log" else rng.uniform(*ends)
        return self.inside(self.flip(float(x)))

    def perturb(self, x, rng):
        """x times 0.8 or 1.2, within the bounds (paper, section 4.1): a factor, since most hyperparameters matter by
        their ratio, and a small one, since the copied weights were trained with x. An integer moves by at least 1, a
        category to a neighbour; 0, which no factor would ever move, is drawn anew."""
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


def explore(values, hyperparameters, chance, rng):
    """A copy's hyperparameters, from the donor's {name: value}: each perturbed or, sometimes, drawn from its prior. By
    steps of 20 % a factor of ten takes eleven copies or more. A draw gets there at once, and restores variety."""
    return {h.name: h.sample(rng) if rng.random() < chance else h.perturb(values[h.name], rng) for h in hyperparameters}


# ==== The loop ========================================================================================================


def train(args):
    """Train a population to its end. A member trains a leg in a slot, waits for the decision about it, and trains the
    next leg: as itself, or as a copy of another one. Returns a summary. Raises UserError, nearly always before anything
    is written: a mistake that only a first leg shows leaves a folder, which the corrected command may use."""
    population, running, signals = Population(args), {}, []  # running: slot -> its leg, and when that started

    def note(number, frame):  # for the loop to look at; the same again kills, but timeout(1) sends it twice at once
        signals.append(number)
        signal.signal(number, signal.SIG_IGN)
        time.sleep(0.2)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    with contextlib.ExitStack() as at_the_end:
        count = min(args.slots, args.population)
        slots = [LocalSlot(i, args) for i in range(count)] if args.executor == "local" else ray_slots(args, count)
        at_the_end.callback(lambda: [slot.kill() for slot in slots])
        check_flags(population, slots[0], signals)
        if not signals:
            at_the_end.enter_context(population)
        while population.active() and not signals:
            for slot in slots:
                if slot not in running and slot.available() and (startable := population.startable(running.values())):
                    leg, request = population.next_leg(startable[0])
                    shutil.rmtree(population.folder / leg["leg"], ignore_errors=True)  # left by a killed launcher
                    running[slot] = leg, time.monotonic()
                    slot.start(request)
                if slot in running:
                    leg, started = running[slot]
                    result, seconds = slot.poll(), time.monotonic() - started
                    if result is None and seconds > population.time_limit():
                        slot.kill()
                        result = {"error": f"{leg['leg']} hung: no result after {seconds:.0f} s (see --leg-timeout)"}
                    if result is not None:
                        del running[slot]
                        population.finish(leg | {"seconds": seconds}, result)
            if members := population.due():
                population.decide(members)
            time.sleep(0.01)  # a leg takes minutes
    summary = {"best": None, "leg": population.best, "score": None}
    if population.best:
        best = shutil.copy(population.checkpoint(population.best), population.folder / "best.pt")
        summary |= {"best": os.path.relpath(best), "score": population.legs[population.best]["score"]}
        draw(population)
    return summary | {"signal": next(iter(signals), None)}


# ==== The population: a list of events, and what follows from it, so that nothing is lost in a crash ==================


@dataclass
class Member:
    """What is known of one member."""

    id: int
    hyper: dict  # its hyperparameters, {name: value}
    seed: int
    step: int = 0  # environment steps so far, through all copies
    waiting: bool = False  # for the next decision: it has finished a leg, or failed twice
    tries: int = 0  # legs that it has run itself, finished or failed; the next one is named m<id>/t<tries + 1>
    failures: int = 0  # of its next leg, so far
    score: float | None = None  # of its last leg; None if it has run none since it became a copy, say: see exploit
    leg: str | None = None  # name of the leg, perhaps another member's, whose checkpoint its next leg starts from


def generator(args, purpose, *numbers):
    """Each decision has random numbers of its own, which depend on the seed and on what they are for. So there is no
    random state to save, and a resumed launcher draws the same again. purpose: 1 for first draws, 2 for decisions."""
    return np.random.default_rng((args.seed, purpose, *numbers))


class Population:
    """Members and finished legs. They start from the flags, and only `apply` changes them, one event at a time. To
    resume is to apply the stored events again; no second copy of the state could disagree with them. As a context it
    holds the file of events, locked, to which `record` appends."""

    def __init__(self, args, events=()):
        self.args, self.folder = args, Path(args.run_dir).resolve()
        self.hyperparameters = [Hyperparameter.parse(text) for text in args.mutate]
        self.members, self.legs, self.decisions, self.best = {}, {}, 0, None
        for j in range(args.population):
            rng = generator(args, 1, j)
            self.members[j] = Member(j, {h.name: h.sample(rng) for h in self.hyperparameters}, args.seed + j)
        for event in events:
            self.apply(event)

    def active(self):
        """The members that have steps left to train."""
        return [m for m in self.members.values() if m.step < self.args.total_timesteps]

    def startable(self, running):
        """The members whose next leg can start: those that neither train nor wait for a decision. Those with the fewest
        steps come first, so that with few slots nobody falls behind. A second try comes last, so that it may get
        another slot, if it was the slot that failed."""
        busy = {leg["member"] for leg, _ in running}
        idle = [m for m in self.active() if not (m.waiting or m.id in busy)]
        return sorted(idle, key=lambda m: (m.failures, m.step))

    def next_leg(self, member):
        """A member's next leg, in the form that its event will record, and the request to a slot: the script's flags.
        --total-timesteps is the whole run's, since a script's schedules depend on it; --stop-at-step ends the leg. Each
        try has its own folder, so a leg that was given up but still runs on a lost machine overwrites nothing."""
        args, name = self.args, f"m{member.id:02d}/t{member.tries + 1:03d}"
        target = min((member.step // args.interval + 1) * args.interval, args.total_timesteps)  # the next decision
        hyper = next((hyper for step, hyper in args.schedule if step >= target), member.hyper)  # --replay, or its own
        leg = {"member": member.id, "leg": name, "source": member.leg, "hyper": hyper, "seed": member.seed}
        flags = {"env_id": args.env_id, "total_timesteps": args.total_timesteps, "stop_at_step": target}
        flags |= {"checkpoint_every": args.interval, "seed": member.seed, "run_dir": self.folder / name}
        flags |= {"num_workers": 0, "resume": member.leg and self.checkpoint(member.leg)}  # the slots are the processes
        request = {"log": f"{self.folder / name}.log", "train": command_line(flags | hyper) + args.script_flags}
        if args.score == "evaluation":  # with the same seed for all members, and another one after the next interval
            flags = {"env_id": args.env_id, "evaluate": self.folder / name, "eval_episodes": args.eval_episodes}
            request["evaluate"] = command_line(flags | {"seed": args.seed + target})
        return leg, request

    def time_limit(self):
        """Seconds after which a leg counts as hung. Legs usually take about equally long, so one that has run for five
        times the median, and for a minute, is stuck, not slow. Before any has finished, nobody can tell."""
        seconds = [leg["seconds"] for leg in self.legs.values()]
        return self.args.leg_timeout or (max(60.0, 5 * statistics.median(seconds)) if seconds else 4 * 3600.0)

    def due(self):
        """The members to decide about (`ready` in the paper): those that wait. In sync mode there are none until all
        members wait. Then no decision depends on who was faster, and the seed fixes them all. In async mode members are
        compared at different steps, and one that has failed twice waits until another finishes a leg."""
        active = self.active()
        waiting = [m for m in active if m.waiting]
        one_is_enough = self.args.mode == "async" and any(m.failures < 2 for m in waiting)
        return waiting if one_is_enough or len(waiting) == len(active) else []

    def decide(self, members):
        """Exploit and explore. All are ranked, but only those that wait can become copies: nobody's leg is broken off.
        A member that has failed twice copies the best one, whatever the flags say of copies. All copies are one event,
        so that a crash leaves all of them or none. Raises RunFailed if there is nobody to copy."""
        args, everybody, copies = self.args, self.members.values(), []
        rng = generator(args, 2, self.decisions)
        donors = exploit({m.id: m.score for m in everybody}, args, rng)
        bad = {m.leg for m in everybody if m.failures >= 2} | {None}  # checkpoints that may be damaged, or do not exist
        sound = ranked({m.id: m.score for m in everybody if m.leg not in bad})
        searched = [] if args.replay else self.hyperparameters  # a replay's are those of the schedule
        for m in members:
            donor = donors.get(m.id) if m.step >= args.warmup else None
            if m.failures >= 2:
                if not sound:
                    raise RunFailed("the legs of all members have failed twice: see above, and go on with --resume")
                donor = sound[0]
            if donor is not None:  # m gets a seed that no one else has, or the two would repeat each other's noise
                hyper = explore(self.members[donor].hyper, searched, args.resample_probability, rng)
                copies.append({"member": m.id, "donor": donor, "hyper": hyper, "seed": int(rng.integers(2**31))})
                tqdm.write(f"member {m.id} copies member {donor}: {readable(hyper)}", file=sys.stderr)
        self.record("decide", members=[m.id for m in members], copies=copies)

    def finish(self, leg, result):
        """Record a leg's result, and delete the checkpoints that no next leg starts from. A leg that failed is run once
        more, since its machine may have died. A member that fails twice has a damaged checkpoint, or hyperparameters
        with which it diverges each time: the next decision makes it a copy."""
        name, member = leg["leg"], leg["member"]
        if "error" not in result and (result["signal"] or not self.checkpoint(name).exists()):
            result = {"error": f"{name} ended without a checkpoint, signal {result['signal']}"}
        if "error" in result:
            if result.get("mistake") and not self.legs:  # no leg has finished: the flags are wrong for all members
                raise UserError(result["error"])
            say(f"member {member}: {result['error']}")
            self.record("failed", member=member, leg=name, error=result["error"])
            self.checkpoint(name).unlink(missing_ok=True)
            return
        returns = [x for x in result["returns"] if math.isfinite(x)]  # raw rewards, however a script scales them
        if not returns:
            say(f"{name}: no episode ended; --interval should be several episodes of each environment long")
        outcome = {"step": result["step"], "score": statistics.fmean(returns) if returns else None}
        self.record("leg", **leg, **outcome)
        tqdm.write(readable({"member": member} | outcome | leg["hyper"]), file=sys.stderr)
        self.bar.update(sum(m.step for m in self.members.values()) - self.bar.n)
        # The event is on the disk by now. So a launcher that is killed here does not miss what it has deleted.
        for unused in self.legs.keys() - {m.leg for m in self.members.values()} - {self.best}:
            self.checkpoint(unused).unlink(missing_ok=True)

    def apply(self, event):
        """Fold one event, a dict as in events.jsonl, into the state."""
        m = self.members.get(event.get("member"))
        if event["event"] == "leg":
            self.legs[event["leg"]] = event
            m.leg, m.step, m.score = event["leg"], event["step"], event["score"]
            m.waiting, m.tries, m.failures = True, m.tries + 1, 0
            if m.score is not None and (self.best is None or m.score > self.legs[self.best]["score"]):
                self.best = m.leg
        elif event["event"] == "failed":
            m.tries, m.failures = m.tries + 1, m.failures + 1
            if m.failures == 2:
                m.waiting, m.score = True, None
        elif event["event"] == "decide":
            before = {j: replace(m) for j, m in self.members.items()}  # in async mode a donor may become a copy, too
            for copy in event["copies"]:
                m, donor = self.members[copy["member"]], before[copy["donor"]]
                m.leg, m.step, m.hyper, m.seed = donor.leg, donor.step, copy["hyper"], copy["seed"]
                m.score, m.failures = None, 0
            for j in event["members"]:
                self.members[j].waiting = False
            self.decisions += 1
        elif event["event"] == "resume":  # what made legs fail may be mended: two new tries
            for m in self.members.values():
                m.waiting, m.failures = m.waiting and not m.failures, 0

    def __enter__(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "events.jsonl", "a")
            lock(self.file)
        except OSError as error:
            busy = isinstance(error, BlockingIOError)
            raise UserError(f"{self.folder}: {'another launcher is using it' if busy else error.strerror}") from error
        check_folder(self.args)  # once more, since nobody else can write now; without --resume no leg has finished here
        events, size = read_events(self.folder) if self.args.resume else ([], 0)
        self.file.truncate(size)
        for event in events:
            self.apply(event)
        self.record("resume") if events else self.record("args", args=asdict(self.args))
        total, initial = len(self.members) * self.args.total_timesteps, sum(m.step for m in self.members.values())
        self.bar = tqdm(total=total, initial=initial, unit=" steps", disable=None)  # shown on a terminal
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()

    def record(self, event, **content):
        """Append an event to events.jsonl, wait until it is on the disk, then apply it as a resumed launcher would."""
        line = json.dumps({"event": event} | content)
        print(line, file=self.file, flush=True)
        os.fsync(self.file.fileno())
        self.apply(json.loads(line))

    def checkpoint(self, leg):
        return self.folder / leg / "checkpoint.pt"

    def lineage(self, leg):
        """The legs from the first to this one, through all copies."""
        chain = []
        while leg:
            chain.append(leg)
            leg = self.legs[leg]["source"]
        return chain[::-1]


def readable(values):
    return ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in values.items())


def command_line(flags):
    return [f"--{name.replace('_', '-')}={x}" for name, x in flags.items() if x is not None]


def read_events(folder):
    """The events in a folder, and their size in bytes. An unfinished last line does not count. Raises UserError."""
    path = Path(folder) / "events.jsonl"
    if (path.parent / "checkpoint.pt").exists():
        raise UserError(f"{folder} holds a single run, no population")
    content = path.read_bytes() if path.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    try:
        events = [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not all(isinstance(event, dict) and "event" in event for event in events):
        raise UserError(f"{path} is not of {SCRIPT}.py")
    return events, len(content)


def load_population(folder):
    """The population in a folder, to look at. Raises UserError if there is none."""
    events, _ = read_events(folder)
    if not events:
        raise UserError(f"{folder} holds no population")
    if events[0].get("args", {}).keys() != {f.name for f in fields(Args)}:
        raise UserError(f"the population in {folder} is of another version of {SCRIPT}.py")
    return Population(Args(**events[0]["args"]), events)


def winners_schedule(population):
    """[[last step, hyperparameters]] of the legs that led to the best one. Raises UserError if there is none."""
    if population.best is None:
        raise UserError(f"--replay {population.folder}: no leg with a score has finished there")
    chain = [population.legs[leg] for leg in population.lineage(population.best)]
    return [[leg["step"], leg["hyper"]] for leg in chain] + [[sys.maxsize, chain[-1]["hyper"]]]  # and so to the end


# ==== Slots: legs run in processes of their own, so that a crash costs one leg ========================================


class Script:
    """A training script in the process that runs its legs: it has train(args), evaluate(args) and parse_args(argv)."""

    def __init__(self, path):
        self.path, self.module = path, None

    def load(self):
        """Import it, once for all legs: importing torch takes longer than many a leg."""
        if self.module is None:
            spec = importlib.util.spec_from_file_location(Path(self.path).stem, self.path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.module = module
        return self.module

    def answer(self, request):
        """Do what is requested: {"check": flags}, or for a leg {"log": path, "train": flags} and perhaps "evaluate":
        flags. Returns a dict: a leg's step, returns and signal, or an error and whether the flags are to blame."""
        try:
            script = self.load()
            if "check" in request:  # whatever a script can say of its flags without training
                args = script.parse_args(request["check"])
                if hasattr(script, "check_args"):
                    script.check_args(args)
                if hasattr(script, "make_env"):
                    script.make_env(args.env_id).close()
                return {"checked": True}
            Path(request["log"]).parent.mkdir(parents=True, exist_ok=True)
            with open(request["log"], "a") as log:
                os.dup2(log.fileno(), 1)  # what the script prints
                os.dup2(log.fileno(), 2)
            summary = script.train(script.parse_args(request["train"]))
            if "evaluate" in request:  # fresh episodes tell more than those of training
                summary |= {"returns": script.evaluate(script.parse_args(request["evaluate"]))["returns"]}
            return {"step": summary["global_step"], "returns": summary["returns"], "signal": summary["signal"]}
        except (Exception, SystemExit) as error:
            kind = type(error).__name__  # the script's UserError is another class than ours
            text = first_line(error) if kind in ("UserError", "RunFailed") else f"{kind}: {first_line(error)}"
            if kind == "SystemExit":  # argparse has said why to the log, if anywhere
                text = f"it ends with status {error} at {shlex.join(request.get('check') or request['train'])}"
            return {"error": f"{Path(self.path).name}: {text}", "mistake": kind in ("UserError", "SystemExit")}

    def serve(self, pipe, gpu):
        """The process of a LocalSlot. When the launcher dies, this process kills its whole group, itself included."""
        os.setsid()  # a group of its own, which Ctrl-C in the terminal does not reach
        launcher = multiprocessing.parent_process()
        threading.Thread(target=lambda: (launcher.join(), os.killpg(0, signal.SIGKILL)), daemon=True).start()
        for number in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        with contextlib.suppress(Exception, SystemExit):  # answer will tell of it
            self.load()  # while the launcher starts
        while True:
            pipe.send(self.answer(pipe.recv()))


def check_flags(population, slot, signals):
    """Let the script itself read the flags of a first leg, before anything is written: with the first draws, and with
    both ends of each prior, since a bound that it refuses might be drawn only after hours. This happens in a slot, as
    the launcher's own machine may lack what legs need, such as a GPU. Raises UserError."""

    def wait(for_what, asked):
        deadline = time.monotonic() + population.time_limit()
        while not (answer := asked()) and not signals:
            if time.monotonic() > deadline:
                raise UserError(f"{for_what} (see --leg-timeout)")
            time.sleep(0.01)
        return answer or {}

    first = population.members[0]
    trials = [("", m.hyper) for m in population.members.values()]
    for text, h in zip(population.args.mutate, population.hyperparameters, strict=True):
        ends = h.choices or (h.inside(h.low), h.inside(h.high))
        trials += [(f"--mutate {text}: ", first.hyper | {h.name: x}) for x in ends]
    for culprit, hyper in trials:
        wait("no slot is free", slot.available)
        if signals:
            return
        slot.start({"check": population.next_leg(replace(first, hyper=hyper))[1]["train"]})
        answer = wait(f"{population.args.script} does not answer", slot.poll)
        if "error" in answer:
            raise UserError(culprit + answer["error"])


class LocalSlot:
    """A process on this machine, so that a crash takes one leg with it and nothing else. A slot can start, poll and
    kill a leg; none of the three waits for the leg to end."""

    def __init__(self, index, args):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bits, however many slots there are
        # Python clears up the semaphores of a process that was killed, and need not warn of each.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        devices = args.gpus.split(",") if args.gpus else [None]
        self.script, self.gpu, self.process = Script(args.script), devices[index % len(devices)], None
        self.available()

    def available(self):
        """Can a leg start here now? A process that has died is made anew."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")  # a fork would inherit the other slots' pipes
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=self.script.serve, args=(theirs, self.gpu))
            self.process.start()
            theirs.close()  # now the pipe ends when the process does
        return True

    def start(self, request):
        with contextlib.suppress(OSError):  # it is dead: poll will say so
            self.pipe.send(request)

    def poll(self):
        """None while the leg runs, then its result."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                return self.pipe.recv()
        if self.process.is_alive():
            return None
        self.kill()
        return {"error": f"the leg's process ended with exit code {self.process.exitcode} (-9: killed)"}

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes that the script has started
        self.process.kill()
        self.process.join()


# ==== Ray: slots on many machines =====================================================================================


class RaySlot:
    """An actor on a Ray cluster, with a LocalSlot's interface. It is lost with its worker or node, and then made anew.
    An actor imports the script once, a Ray task would for every leg. A leg's clock starts when the cluster has room."""

    def __init__(self, ray, args):
        self.ray, self.args, self.actor = ray, args, None

    def available(self):
        """Can a leg start here now? Not while the cluster has no room for the actor."""
        if self.actor is None:
            options = {"num_cpus": self.args.num_cpus, "num_gpus": self.args.num_gpus}
            self.actor = self.ray.remote(**options)(Script).remote(str(Path(self.args.script).resolve()))
            self.made = self.actor.__ray_ready__.remote()
        return bool(self.ray.wait([self.made], timeout=0)[0])  # if it died meanwhile, its first leg will fail

    def start(self, request):
        self.future = self.actor.answer.remote(request)

    def poll(self):
        try:
            return self.ray.get(self.future) if self.ray.wait([self.future], timeout=0)[0] else None
        except self.ray.exceptions.RayError as error:
            self.actor = None
            return {"error": f"{type(error).__name__}: the leg's worker or node was lost"}

    def kill(self):
        if self.actor is not None:
            self.ray.kill(self.actor)
            self.actor = None


def ray_slots(args, count):
    """Slots on a cluster that runs, or on one that is started here. Raises UserError where that cannot work."""
    address, stderr = args.ray_address, os.dup(2)
    if address:  # Ray would try a dead address for minutes; one attempt takes 40 s at most
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray

        if address and ":" in address:  # where nobody listens, a socket knows at once
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # while Ray tries, it warns, and we want one line
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address or "local", ignore_reinit_error=True, **quiet)
    except ImportError:
        raise UserError("--executor ray needs the package: pip install ray==2.60.0") from None
    except Exception as error:
        where = f"--ray-address {address}: no cluster there within a minute" if address else "cannot start Ray"
        raise UserError(f"{where}: {first_line(error)}") from error
    finally:
        os.dup2(stderr, 2)

    # A member may go on anywhere, so all nodes must see the checkpoints of all others: the folder has to be shared.
    ray.cloudpickle.register_pickle_by_value(sys.modules[Script.__module__])  # nodes need not have this file
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes]
    if not any(cpus >= args.num_cpus and gpus >= args.num_gpus for cpus, gpus in room):
        raise UserError(f"--num-cpus {args.num_cpus} --num-gpus {args.num_gpus}: the nodes have (CPUs, GPUs) {room}")
    run_dir, script = Path(args.run_dir).resolve(), Path(args.script).resolve()
    parent = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    with tempfile.NamedTemporaryFile(dir=parent) as file:
        probe = Path(file.name)
        seen = ray.remote(num_cpus=0)(lambda: probe.exists() and script.exists())
        for node in nodes:
            pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(seen.options(scheduling_strategy=pinned).remote()):
                raise UserError(f"node {node['NodeManagerAddress']} does not see {parent} and {script}: share them")
    return [RaySlot(ray, args) for _ in range(count)]


# ==== Figures =========================================================================================================


def draw(population):
    """lineage.png: who copied whom, and with what score. schedule.png: the hyperparameters of all members. In both, the
    legs that led to the best score stand out; --replay trains what they did."""
    import matplotlib.figure  # here, because it is slow to import

    legs, winner, searched = population.legs, set(population.lineage(population.best)), population.hyperparameters
    begin = {name: legs[leg["source"]]["step"] if leg["source"] else 0 for name, leg in legs.items()}
    scores = [leg["score"] for leg in legs.values() if leg["score"] is not None]
    colours = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(min(scores), max(scores)), "viridis")

    def save(axis, name, legend):  # legend: {label: style}
        for label, style in legend.items():
            axis.plot([], [], label=label, **style)
        axis.set(xlabel="environment steps")
        axis.figure.legend(loc="outside lower center", ncols=4, frameon=False)
        axis.figure.savefig(population.folder / name, dpi=110)

    axis = matplotlib.figure.Figure((10, 0.45 * len(population.members) + 2), layout="constrained").subplots()
    axis.set(title="Who copied whom", ylabel="member", yticks=sorted(population.members))
    axis.figure.colorbar(colours, ax=axis, label="score of the leg")
    for name, leg in legs.items():
        row, donor = leg["member"], legs.get(leg["source"], leg)["member"]
        style = {"color": "0.8" if leg["score"] is None else colours.to_rgba(leg["score"]), "solid_capstyle": "butt"}
        axis.plot([begin[name], leg["step"]], [row, row], lw=9 if name in winner else 3, **style)
        if donor != row:  # the first leg of a copy
            arrow = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.2", "color": "C3" if name in winner else "0.5"}
            axis.annotate("", xy=(begin[name], row), xytext=(begin[name], donor), arrowprops=arrow)
    legend = {"the way to the best score": {"color": "0.3", "lw": 9}, "other legs": {"color": "0.3", "lw": 3}}
    legend["copy, from donor to member (red: on that way)"] = {"color": "0.5", "marker": ">"}
    save(axis, "lineage.png", legend)
    if not searched:
        return

    figure = matplotlib.figure.Figure((10, 2.2 * len(searched) + 1), layout="constrained")
    axes = figure.subplots(len(searched), squeeze=False, sharex=True)[:, 0]
    thick, thin = {"color": "C3", "lw": 3, "zorder": 3}, {"color": "0.6", "lw": 1}
    for h, axis in zip(searched, axes, strict=True):
        for name, leg in legs.items():
            x = leg["hyper"][h.name]
            y = h.choices.index(x) if h.kind == "cat" else h.flip(x)  # as it is searched
            axis.plot([begin[name], leg["step"]], [y, y], **(thick if name in winner else thin))
        axis.set(ylabel=h.name if h.flip(0) == 0 else f"1 - {h.name}", yscale="log" if h.kind == "log" else "linear")
        if h.kind == "cat":
            axis.set_yticks(range(len(h.choices)), h.choices)
    axes[0].set(title="Hyperparameters over time")
    save(axes[-1], "schedule.png", {"the way to the best score": thick, "other legs": thin})


# ==== Plumbing: errors, signals, arguments, entry =====================================================================


class UserError(Exception):
    """The user's mistake: one line on standard error, exit status 2."""


class RunFailed(Exception):
    """The run cannot go on: one line on standard error, exit status 1."""


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(text):
    show(f"{SCRIPT}.py: {text}", sys.stderr)


def show(text, file):
    """Print a line. If nobody reads it any more (`| head -1`), the run still goes on."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def lock(file):
    """Keep other processes out. Raises BlockingIOError if one of them was first."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError("another process is using it") from None
    except (ImportError, OSError):
        pass  # Windows has no such locks, some file systems have none: we do without


def cli(argv) -> Args:
    """tyro's reading of the command line. Raises UserError: one line in place of tyro's box."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):  # where there is no terminal it is plain
            args = tyro.cli(Args, args=argv)
    except SystemExit as stop:
        if not stop.code:  # --help
            show(box.getvalue(), sys.stdout)
            raise
        message = re.split(r"(?m)^\W*-{9,}\W*$", box.getvalue())[1]  # title, rule, message, rule, help
        raise UserError(" ".join(message.split())) from None
    for key, x in vars(args).items():
        if x == "":  # --resume "$RUN", say, where RUN is not set
            raise UserError(f"--{key.replace('_', '-')} is empty")
    return args


# Flags about this process, which may change with --resume; and the script's flags that only the launcher sets.
PROCESS_ONLY = {"resume", "run_dir", "slots", "gpus", "leg_timeout", "executor", "ray_address", "num_cpus", "num_gpus"}
OURS = {"env_id", "total_timesteps", "stop_at_step", "seed", "checkpoint_every", "run_dir", "resume", "evaluate"}


def parse_args(argv) -> Args:
    """Our flags and, after --, the script's. With --replay, --mutate and the schedule are the other population's."""
    split = argv.index("--") if "--" in argv else len(argv)
    args = replace(cli(argv[:split]), script_flags=argv[split + 1 :])
    if args.replay:  # its schedule is stored here, since the population there may go on, or be deleted
        other = load_population(args.run_dir if args.resume else args.replay)
        if args.mutate or (args.interval, args.total_timesteps) != (other.args.interval, other.args.total_timesteps):
            same = f"--interval {other.args.interval} and --total-timesteps {other.args.total_timesteps}"
            raise UserError(f"--replay {args.replay} needs {same}, and no --mutate")
        theirs = range(other.args.seed - args.population + 1, other.args.seed + other.args.population)
        if args.seed in theirs and not args.resume:
            raise UserError("--replay needs another --seed: with the winner's its luck would be repeated, too")
        args.mutate = other.args.mutate
        args.schedule = other.args.schedule if args.resume else winners_schedule(other)
    return args


def check_args(args):
    """Raise UserError for what cannot work. A number must be positive and finite, unless it is named here."""
    lowest = dict.fromkeys(("seed", "quantile", "warmup", "min_gap", "resample_probability", "num_cpus", "num_gpus"), 0)
    highest = {"quantile": 0.5, "resample_probability": 1}
    for key, x in vars(args).items():
        low, high = lowest.get(key, sys.float_info.min), highest.get(key, 2**63 - 1)
        if isinstance(x, int | float) and not isinstance(x, bool) and not low <= x <= high:
            bounds = "positive" if low == sys.float_info.min else f"{low} or more"
            raise UserError(f"--{key.replace('_', '-')} {x} must be {bounds}, and at most {high}")
    if not Path(args.script).is_file() or not args.script.endswith(".py"):
        raise UserError(f"there is no script {args.script}, or it is no .py file")
    copying = ("quantile", "warmup", "min_gap", "resample_probability")
    useless = (  # when, which flags, and what to say of them
        (args.executor != "local", ("gpus",), "goes with --executor local"),
        (args.executor != "ray", ("ray_address", "num_cpus", "num_gpus"), "goes with --executor ray"),
        (args.score != "evaluation", ("eval_episodes",), "goes with --score evaluation"),
        (args.replay and not args.resume, copying, "does nothing with --replay, where nobody copies"),
    )
    for when, names, what in useless:
        for name in names if when else ():
            if getattr(args, name) != getattr(Args, name):
                raise UserError(f"--{name.replace('_', '-')} {what}")
    first = -(-max(args.interval, args.warmup) // args.interval) * args.interval  # the first decision that may copy
    if first >= args.total_timesteps and args.quantile and not args.replay:
        raise UserError("no decision falls before --total-timesteps: see --interval and --warmup, or give --quantile 0")
    names = [Hyperparameter.parse(text).name for text in args.mutate]
    names += [x.split("=")[0][2:].replace("-", "_") for x in args.script_flags if x.startswith("--")]
    for name in names:
        if name in OURS or names.count(name) > 1:
            raise UserError(f"{name}: {'the launcher sets this flag' if name in OURS else 'it is given twice'}")


def check_folder(args):
    """The folder must be unused or, with --resume, hold this population. Raises UserError."""
    if args.resume:
        for key, stored in vars(load_population(args.run_dir).args).items():
            here = getattr(args, key)
            if key == "script":  # whose folder may have moved
                here, stored = Path(here).name, Path(stored).name
            if key not in PROCESS_ONLY and here != stored:
                flag = f"--{key.replace('_', '-')}" if key != "script" else "the script"
                raise UserError(f"--resume: {flag} is {here} here, but {stored} in {args.run_dir}")
    elif any(event["event"] == "leg" for event in read_events(args.run_dir)[0]):
        raise UserError(f"{args.run_dir} holds a population: go on with --resume, or choose another --run-dir")


def main(argv) -> int:
    try:
        args = parse_args(argv)
        check_args(args)
        check_folder(args)
        result = train(args)
        if result["signal"] and Path(args.run_dir, "events.jsonl").exists():  # else there is nothing to go on with
            rest = shlex.join(["--resume", *(x for x in argv if x != "--resume")])
            say(f"to go on:    python {shlex.quote(os.path.relpath(__file__))} {rest}")
        elif result["leg"]:
            say(f"to evaluate: python {args.script} --evaluate {shlex.quote(result['best'])}")
        show(json.dumps(result), sys.stdout)
        return 128 + result["signal"] if result["signal"] else 0
    except (UserError, RunFailed, OSError) as error:
        say(error)
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
