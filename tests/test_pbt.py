"""The launcher: selection and mutation as pure functions, the paper's toy, and populations that die in every way."""

import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from waiting import wait_for

import pbt_launcher as pbt

TOY = str(Path(__file__).parent / "helpers" / "toy_script.py")
SMALL = ["--population", "4", "--interval", "100", "--total-timesteps", "500"]
SMALL += ["--mutate", "learning_rate:log:1e-4:0.1"]


class Inline:
    """A slot in this process, so that nothing has to start: most tests are not about processes."""

    def __init__(self, index, args):
        self.script, self.available, self.kill = pbt.Script(args.script), lambda: True, lambda: None

    def start(self, request):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setattr(pbt.os, "dup2", lambda *files: None)  # pytest keeps its own standard output
            self.result = self.script.answer(request)

    def poll(self):
        result, self.result = self.result, None
        return result


PROCESS = pbt.LocalSlot


def finished(run_dir, *flags, status=0, script=TOY, slot=Inline, figures=False):
    """The launcher in this process, to its end. Returns what it wrote to standard output and to standard error."""
    out, err, sleep, calls = io.StringIO(), io.StringIO(), time.sleep, itertools.count()
    waits = not issubclass(slot, Inline) or "ray" in flags

    def limited(seconds):  # no population is endless, and where nobody is waited for, none is slow
        assert next(calls) < (12_000 if waits else 300), "the launcher comes to no end"
        sleep(seconds if waits else 0)

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pbt, "LocalSlot", slot)
        patch.setattr(pbt.time, "sleep", limited)
        if not figures:  # they take longer than a population
            patch.setattr(pbt, "draw", lambda population: None)
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = [signal.getsignal(number) for number in numbers]
        try:
            assert pbt.main([script, "--run-dir", str(run_dir), *map(str, flags)]) == status, err.getvalue()
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)  # those of the launcher are not for pytest
    assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


def refused(run_dir, *flags, **kwargs):
    """The one line of a command that ends with status 2 before anything is written."""
    before = run_dir.exists() and sorted(run_dir.iterdir())
    out, err = finished(run_dir, *flags, status=2, **kwargs)
    assert (run_dir.exists() and sorted(run_dir.iterdir())) == before
    assert out == "" and err.count("\n") == 1 and err.startswith("pbt_launcher.py: ")
    return err


def events(run_dir, kind=None):
    return [e for e in pbt.read_events(run_dir)[0] if kind in (None, e["event"])]


def decisions(run_dir):
    """What two equal runs agree on: members and legs, without durations."""
    population = pbt.load_population(run_dir)
    legs = {name: {k: x for k, x in leg.items() if k != "seconds"} for name, leg in population.legs.items()}
    return population.members, legs, population.best


def scores(run_dir):
    return sorted((e["member"], e["step"], e["score"]) for e in events(run_dir, "leg"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The folder of a population that nothing has disturbed, for tests that look at it or compare."""
    finished(folder := tmp_path_factory.mktemp("plain") / "a", *SMALL)
    return folder


def test_defaults():
    """A quarter is replaced, and drawn anew with a chance of a quarter, as in Ray Tune. The paper replaces a fifth."""
    ray = {"quantile": 0.25, "resample_probability": 0.25}
    ours = {"total_timesteps": 1_000_000, "population": 8, "interval": 50_000, "mutate": [], "seed": 1, "warmup": 0}
    ours |= {"score": "training", "eval_episodes": 10, "min_gap": 0.0, "mode": "sync", "replay": None, "resume": False}
    process = {"schedule": [], "run_dir": "pbt", "env_id": None, "script": TOY, "script_flags": [], "slots": 2}
    process |= {"gpus": None, "leg_timeout": None, "executor": "local", "ray_address": None, "num_cpus": 1.0}
    process |= {"num_gpus": 0.0}
    assert vars(pbt.Args(TOY)) == ray | ours | process


# ---- selection -------------------------------------------------------------------------------------------------------


def test_ranks_ties_and_missing_scores():
    assert pbt.ranked({0: 1.0, 1: 3.0, 2: 2.0}) == [1, 2, 0]
    assert pbt.ranked({2: 1.0, 0: 1.0, 1: 1.0}) == [0, 1, 2]
    assert pbt.ranked({0: None, 1: -1e9, 2: None}) == [1, 0, 2]


@pytest.mark.parametrize("n", range(1, 12))
@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.25, 0.5])
def test_truncation_takes_disjoint_ends(n, quantile):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = dict(enumerate(rng.normal(size=n).tolist()))
        order, copies = pbt.ranked(scores), pbt.truncation(scores, quantile, rng)
        k = min(math.ceil(n * quantile), n // 2)
        assert set(copies) == set(order[n - k :]) and set(copies.values()) <= set(order[:k])
    assert n > 1 or not copies  # one member never exploits


def test_truncation_draws_donors_uniformly():
    rng, scores = np.random.default_rng(0), {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
    donors = [pbt.truncation(scores, 0.5, rng)[3] for _ in range(2000)]
    assert set(donors) == {0, 1} and 900 < donors.count(0) < 1100
    assert pbt.truncation({}, 0.5, rng) == pbt.truncation({0: 1.0}, 0.5, rng) == {}


# ---- mutation --------------------------------------------------------------------------------------------------------


def draws(text, n=2000):
    h, rng = pbt.Hyperparameter.parse(text), np.random.default_rng(0)
    samples = [h.sample(rng) for _ in range(n)]
    walk = [samples[0]]
    for _ in range(n):
        walk.append(h.perturb(walk[-1], rng))
    return samples, walk


@pytest.mark.parametrize("text,median", [("x:log:1e-5:1e-3", 1e-4), ("x:lin:-1:3", 1.0), ("gamma:log:0.9:0.999", 0.99)])
def test_priors_and_bounds(text, median):
    low, high = map(float, text.split(":")[2:])
    samples, walk = draws(text)
    assert min(samples) >= low and max(samples) <= high and min(walk) >= low and max(walk) <= high
    assert len(set(walk)) > 100
    scale = (lambda x: math.log(1 - x)) if "gamma" in text else math.log if "log" in text else float
    assert np.median([scale(x) for x in samples]) == pytest.approx(scale(median), abs=0.2)


def test_one_step_multiplies():
    rng = np.random.default_rng(0)
    h, gamma = pbt.Hyperparameter.parse("learning-rate:log:1e-5:1e-3"), pbt.Hyperparameter.parse("gamma:lin:0.5:0.999")
    assert h.name == "learning_rate"
    assert {round(h.perturb(1e-4, rng) / 1e-4, 9) for _ in range(50)} == {0.8, 1.2}
    assert {round((1 - gamma.perturb(0.99, rng)) / 0.01, 9) for _ in range(50)} == {0.8, 1.2}
    assert {h.perturb(1e-3, rng) for _ in range(50)} == {1e-3, 0.8e-3}
    assert 4900 < sum(h.perturb(1e-4, rng) > 1e-4 for _ in range(10_000)) < 5100
    small = pbt.Hyperparameter.parse("n:int:0:8")
    assert {small.perturb(2, rng) for _ in range(50)} == {1, 3}  # 20 percent would be nothing


def test_integers_and_categories():
    samples, walk = draws("n:int:1:8")
    assert set(samples) == set(range(1, 9)) and all(isinstance(x, int) for x in samples + walk)
    assert set(walk) <= set(range(1, 9)) and len(set(walk)) >= 4 and 1 in walk and walk[-200:].count(1) < 200
    samples, walk = draws("f:cat:a,b,c")
    assert set(samples) == set(walk) == {"a", "b", "c"}
    assert all(abs("abc".index(x) - "abc".index(y)) <= 1 for x, y in zip(walk, walk[1:], strict=False))
    h, rng = pbt.Hyperparameter.parse("f:cat:a,b,c"), np.random.default_rng(0)
    assert {h.perturb("b", rng) for _ in range(50)} == {"a", "c"}


def test_a_prior_may_be_a_single_number():
    assert pbt.Hyperparameter.parse("x:lin:2:2").sample(np.random.default_rng(0)) == 2


def test_resampling_probability():
    h, rng = pbt.Hyperparameter.parse("x:lin:0:100"), np.random.default_rng(0)
    new = [pbt.explore({"x": 50.0}, [h], 0.25, rng)["x"] for _ in range(2000)]
    assert 0.7 < np.mean([x in (40.0, 60.0) for x in new]) < 0.8


BAD = ["x", "x:log:0:1", "x:lin:2:1", "x:cat", "x:what:0:1", "gamma:log:0.9:1", "x:lin:a:b", "x:lin:0:inf"]
BAD += ["x:lin:nan:nan", "x:lin:-inf:inf", "x:int:0.5:2", "x:cat:a,,b", "x:lin:1", "x:lin:1:2:3", "x:int:0:inf"]
BAD += ["x:lin:-1e308:1e308"]  # further apart than there are numbers


@pytest.mark.parametrize("text", BAD)
def test_bad_specifications(text, tmp_path):
    assert f"--mutate {text}: expected NAME:log:LOW:HIGH" in refused(tmp_path / "a", "--mutate", text)


# ---- the paper's toy (its Fig. 2), through the launcher's own selection and mutation ---------------------------------


def toy(seed, quantile):
    """Maximise Q = 1.2 - t0^2 - t1^2 by gradient ascent on the surrogate 1.2 - h0 t0^2 - h1 t1^2: two workers, one with
    h = (1, 0), one with (0, 1). Neither can get there alone. Returns the best Q after 200 steps."""
    rng = np.random.default_rng(seed)
    space = [pbt.Hyperparameter.parse(f"h{i}:lin:0:1") for i in (0, 1)]
    theta, hyper = [np.full(2, 0.9), np.full(2, 0.9)], [{"h0": 1.0, "h1": 0.0}, {"h0": 0.0, "h1": 1.0}]
    for step in range(1, 201):
        theta = [t - 0.02 * np.array([h["h0"], h["h1"]]) * t for t, h in zip(theta, hyper, strict=True)]
        if step % 5 == 0:
            scores = {i: 1.2 - float((t**2).sum()) + 1e-9 * rng.normal() for i, t in enumerate(theta)}  # no exact tie
            for loser, donor in pbt.truncation(scores, quantile, rng).items():
                theta[loser], hyper[loser] = theta[donor], pbt.explore(hyper[donor], space, 0.25, rng)
    return max(1.2 - float((t**2).sum()) for t in theta)


def test_the_papers_toy():
    """It proves the launcher, not PBT: random search with eight members gets there too."""
    assert np.mean([toy(seed, 0.5) >= 1.19 for seed in range(100)]) >= 0.95
    assert toy(0, 0.0) == pytest.approx(0.39, abs=0.001)  # nobody copies: the grid


# ---- populations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_population_to_its_end(tmp_path, mode):
    slots, slot = (2, PROCESS) if mode == "sync" else (1, Inline)
    out, err = finished(tmp_path / "a", *SMALL, "--mode", mode, "--slots", slots, slot=slot, figures=True)
    summary, legs = json.loads(out), events(tmp_path / "a", "leg")
    copies = [c for e in events(tmp_path / "a", "decide") for c in e["copies"]]
    together = {len(e["members"]) for e in events(tmp_path / "a", "decide")}
    assert together == ({4} if mode == "sync" else {1})  # with one slot, members end one by one
    assert summary["score"] == pytest.approx(max(e["score"] for e in legs))
    assert copies and all(c["donor"] != c["member"] for c in copies)
    seeds = [c["seed"] for c in copies] + [1, 2, 3, 4]
    assert len(set(seeds)) == len(seeds)  # a clone never repeats anybody's noise
    best = json.loads((tmp_path / "a" / "best.pt").read_bytes()[64:])
    assert 1.2 - (best["x"] - 1) ** 2 == pytest.approx(summary["score"])
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {"best.pt", "lineage.png", "schedule.png", "events.jsonl", *(f"m{j:02d}" for j in range(4))}
    assert len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) <= 4 + 1  # one a member, and the best
    line = r"^member \d, step \d00, score -?[\d.]+, learning_rate [\d.]+$"
    assert len(re.findall(line, err, flags=re.M)) == len(legs)
    assert "to evaluate: python" in err and "learning_rate" in err and "copies member" in err
    assert {m.step for m in pbt.load_population(tmp_path / "a").members.values()} == {500}


def test_same_seed_same_decisions(tmp_path, plain):
    finished(tmp_path / "b", *SMALL, "--slots", 3, slot=PROCESS)
    assert decisions(tmp_path / "b") == decisions(plain)
    finished(tmp_path / "c", *SMALL, "--seed", 2)
    assert decisions(tmp_path / "c") != decisions(plain)


def test_a_member_begins_with_nothing():
    expected = pbt.Member(2, {}, 3, step=0, waiting=False, tries=0, failures=0, score=None, leg=None)
    assert pbt.Population(pbt.Args(TOY)).members[2] == expected


def test_no_two_purposes_share_random_numbers():
    """NOTE: default_rng((1, 2)) and default_rng((1, 2, 0)) are the same generator."""
    args = pbt.Args(TOY)
    keys = [(1, j) for j in range(4)] + [(2, n) for n in range(4)]
    assert len({pbt.generator(args, *key).integers(2**62) for key in keys}) == len(keys)


def test_half_an_event_did_not_happen(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)  # killed before it deleted anything
        finished(tmp_path / "a", *SMALL)
    whole = (tmp_path / "a" / "events.jsonl").read_bytes()
    lines = whole.splitlines(True)
    before = decisions(tmp_path / "a")
    (tmp_path / "a" / "events.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:50])  # killed while it was written
    finished(tmp_path / "a", *SMALL, "--resume")
    assert decisions(tmp_path / "a") == before
    assert len(events(tmp_path / "a")) == len(lines) + 1 and len(events(tmp_path / "a", "resume")) == 1


def test_the_lineage_of_a_population_with_many_legs():
    population = pbt.Population(pbt.Args(TOY))
    population.legs = {f"{i}": {"source": f"{i - 1}" if i else None} for i in range(5000)}
    assert population.lineage("4999") == [str(i) for i in range(5000)]


def test_what_a_person_reads():
    values = {"x": 0.123456, "n": 12345, "f": "tanh", "score": None}
    assert pbt.readable(values) == "x 0.1235, n 12345, f tanh, score None"


def test_one_member_never_exploits(tmp_path):
    finished(tmp_path / "a", *SMALL, "--population", 1)
    assert len(events(tmp_path / "a", "decide")) == 4 and not [e for e in events(tmp_path / "a") if e.get("copies")]


def test_all_kinds_of_hyperparameters_reach_the_script(tmp_path):
    flags = ["--mutate", "units:int:16:256", "--mutate", "activation:cat:tanh,relu"]
    finished(tmp_path / "a", *SMALL, *flags)
    assert len({tuple(e["hyper"].values()) for e in events(tmp_path / "a", "leg")}) > 4


def test_what_legs_print_is_kept_and_the_slots_share_the_gpus(tmp_path):
    finished(tmp_path / "a", *SMALL, "--gpus", "3,5", "--", "--seconds", 0.05, slot=PROCESS)
    logs = [path.read_text() for path in (tmp_path / "a").glob("m*/t*.log")]
    assert len(logs) == 20 and set(logs) == {"CUDA_VISIBLE_DEVICES 3\n", "CUDA_VISIBLE_DEVICES 5\n"}


def test_replay_follows_the_winners_schedule(tmp_path):
    finished(tmp_path / "a", *SMALL)
    winner = pbt.load_population(tmp_path / "a")
    chain = [winner.legs[leg] for leg in winner.lineage(winner.best)]
    schedule = pbt.winners_schedule(winner)
    assert schedule == [[leg["step"], leg["hyper"]] for leg in chain] + [[sys.maxsize, chain[-1]["hyper"]]]
    assert schedule[1][1] != schedule[-1][1]
    content = (tmp_path / "a" / "events.jsonl").read_bytes()
    flags = ["--interval", 100, "--total-timesteps", 500, "--population", 2, "--replay", tmp_path / "a", "--seed", 9]
    longer = "needs --interval 100 and --total-timesteps 500, and no --mutate"
    assert longer in refused(tmp_path / "b", *flags, "--total-timesteps", 600)
    assert "--replay needs another --seed" in refused(tmp_path / "b", *flags[:-1], 3)  # members of a have 1 to 4
    for useless in ("--warmup", "--min-gap", "--resample-probability"):
        assert f"{useless} does nothing with --replay" in refused(tmp_path / "b", *flags, useless, 1)
    finished(tmp_path / "b", *flags)
    for m in (0, 1):
        legs = [e for e in events(tmp_path / "b", "leg") if e["member"] == m]
        assert [e["hyper"] for e in legs] == [leg["hyper"] for leg in chain]
        assert {e["seed"] for e in legs} == {9 + m}
    assert (tmp_path / "a" / "events.jsonl").read_bytes() == content
    before = decisions(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")  # what b needs of it, b has stored
    lines = (tmp_path / "b" / "events.jsonl").read_bytes().splitlines(True)
    (tmp_path / "b" / "events.jsonl").write_bytes(b"".join(lines[:1]))
    finished(tmp_path / "b", *flags, "--resume")
    assert decisions(tmp_path / "b") == before
    finished(tmp_path / "a", *SMALL)
    assert longer in refused(tmp_path / "c", *flags[2:])
    assert longer in refused(tmp_path / "c", *flags, "--mutate", "units:int:1:2")


def test_nobody_copies_during_the_warmup(tmp_path):
    finished(tmp_path / "a", *SMALL, "--warmup", 300)
    steps = [[c["member"] for c in e["copies"]] for e in events(tmp_path / "a", "decide")]
    assert len(steps) == 4 and steps[:2] == [[], []] and steps[2] and steps[3]


def test_a_small_lead_is_not_copied(tmp_path):
    for name, gap in (("small", 1e-9), ("large", 100)):
        finished(tmp_path / name, *SMALL, "--min-gap", gap)
    small, large = ([c for e in events(tmp_path / x, "decide") for c in e["copies"]] for x in ("small", "large"))
    assert small and not large


def test_the_gap_holds_and_a_member_without_a_score_is_left_alone():
    args = pbt.Args(TOY, min_gap=0.75, quantile=0.5)
    scores, seen = {0: 3.0, 1: 2.5, 2: 2.0, 3: None}, set()
    for seed in range(50):
        seen |= set(pbt.exploit(scores, args, np.random.default_rng(seed)).items())
    assert seen == {(2, 0)}
    assert pbt.exploit(scores, pbt.Args(TOY, quantile=0), np.random.default_rng(0)) == {}


def test_equal_scores_are_not_copied():
    args = pbt.Args(TOY, quantile=0.5)
    for seed in range(20):
        assert pbt.exploit(dict.fromkeys(range(8), 500.0), args, np.random.default_rng(seed)) == {}
        assert pbt.exploit({0: None, 1: 500.0, 2: None}, args, np.random.default_rng(seed)) == {}


def test_members_without_a_score_do_not_shield_the_worst():
    """As in async mode, where members that have just been copied have none."""
    scores = {0: 10.0, 1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0, 5: 1.0, 6: None, 7: None}
    assert set(pbt.exploit(scores, pbt.Args(TOY), np.random.default_rng(0))) == {4, 5}


@pytest.mark.parametrize(
    "returns,signal_,event,score",
    [
        ([], None, "leg", None),
        ([1.0, math.nan, 3.0, math.inf], None, "leg", 2.0),  # what is no number does not count
        ([1.0], signal.SIGTERM, "failed", None),  # somebody has stopped the leg before its end
    ],
)
def test_what_becomes_of_a_result(returns, signal_, event, score, tmp_path, capsys):
    population = pbt.Population(pbt.Args(TOY, population=1, run_dir=str(tmp_path)))
    recorded, population.bar = [], pbt.tqdm(disable=True)
    population.record = lambda event, **content: recorded.append((event, content.get("score")))
    (tmp_path / "m00" / "t001").mkdir(parents=True)
    (tmp_path / "m00" / "t001" / "checkpoint.pt").touch()
    leg, _ = population.next_leg(population.members[0])
    population.finish(leg, {"step": 50_000, "returns": returns, "signal": signal_})
    assert recorded == [(event, score)]
    assert ("m00/t001: no episode ended; --interval should be" in capsys.readouterr().err) == (returns == [])


def test_scores_by_evaluation(tmp_path, plain):
    finished(tmp_path / "a", *SMALL, "--score", "evaluation", "--eval-episodes", 3)
    ours, other = ([score for _, step, score in scores(x) if step == 100] for x in (tmp_path / "a", plain))
    assert len(ours) == 4 and ours == pytest.approx([1001 + score for score in other])  # 1000 + mean of 0, 1, 2


def test_evaluation_meets_the_same_episodes_in_all_members():
    population = pbt.Population(pbt.Args(TOY, score="evaluation", interval=100))
    seeds = [population.next_leg(m)[1]["evaluate"][-1] for m in population.members.values()]
    assert set(seeds) == {"--seed=101"}


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures that draw() has saved, by name."""
    import matplotlib.figure

    figures, save = {}, matplotlib.figure.Figure.savefig

    def savefig(figure, path, **kwargs):
        figures[path.name] = figure
        save(figure, path, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return figures


def words(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figures(tmp_path, drawn):
    flags = ["--mutate", "units:int:16:256", "--mutate", "activation:cat:tanh,relu", "--mutate", "gamma:log:0.9:0.999"]
    finished(tmp_path / "a", *SMALL, *flags, figures=True)
    axis = drawn["lineage.png"].axes[0]
    assert axis.get_title() and len(words(drawn["lineage.png"])) == 3
    copies = [(c["donor"], c["member"]) for e in events(tmp_path / "a", "decide") for c in e["copies"]]
    arrows = [(round(text.xyann[1]), round(text.xy[1])) for text in axis.texts]
    assert sorted(arrows) == sorted(copies)  # from the donor to the member
    schedule = drawn["schedule.png"]
    assert [x.get_ylabel() for x in schedule.axes] == ["learning_rate", "units", "activation", "1 - gamma"]
    assert [x.get_yscale() for x in schedule.axes] == ["log", "linear", "linear", "log"]
    assert [x.get_text() for x in schedule.axes[2].get_yticklabels()] == ["tanh", "relu"]
    assert schedule.axes[0].get_title() and len(words(schedule)) == 2
    assert all(len(x.lines) >= len(events(tmp_path / "a", "leg")) for x in schedule.axes)


def test_a_replay_has_a_schedule_to_show(tmp_path, drawn, plain):
    flags = ["--interval", 100, "--total-timesteps", 500, "--population", 2, "--replay", plain]
    finished(tmp_path / "b", *flags, "--seed", 9, figures=True)
    (axis,) = drawn["schedule.png"].axes
    assert axis.get_ylabel() == "learning_rate" and len(axis.lines) == 10 + 2 and axis.get_yscale() == "log"


# ---- trouble ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.mark.parametrize("kind", ["crash", "error", "full"])
def test_a_leg_that_fails_once_is_run_again(tmp_path, marks, plain, kind):
    (marks / kind).touch()
    slot = PROCESS if kind == "crash" else Inline
    finished(tmp_path / "a", *SMALL, "--", "--trouble", kind, "--marks", marks, slot=slot)
    assert len(events(tmp_path / "a", "failed")) == 1 and scores(tmp_path / "a") == scores(plain)


def trouble_after(legs, run_dir, marks, *names, slot=Inline):
    """A slot that leaves marks once so many legs have finished."""
    left = list(names)

    class Troubled(slot):
        def start(self, request):
            while left and len(events(run_dir, "leg")) >= legs:
                (marks / left.pop()).touch()
            super().start(request)

    return Troubled


class FirstMemberFails(Inline):
    """Legs of member 0 fail, `times` of them, once so many legs have finished."""

    after, times = 4, 2

    def start(self, request):
        log = Path(request.get("log", ""))
        if self.times and log.parent.name == "m00" and len(events(log.parent.parent, "leg")) >= self.after:
            self.times -= 1
            self.result = {"error": "toy_script.py: RuntimeError: an error, as planned"}
        else:
            super().start(request)


def test_a_member_that_keeps_failing_does_not_end_a_population_that_trains(tmp_path):
    """It goes last, so that the others' legs come between its failures."""
    slot = type("Failing", (FirstMemberFails,), {"after": 0, "times": 10})
    finished(tmp_path / "a", *SMALL, "--slots", 1, slot=slot)
    failed = events(tmp_path / "a", "failed")
    assert {e["member"] for e in failed} == {0} and events(tmp_path / "a")[1]["event"] != "leg"
    assert {m.step for m in pbt.load_population(tmp_path / "a").members.values()} == {500}


def test_a_member_that_always_diverges_does_not_make_decisions_depend_on_the_slots(tmp_path):
    """Its learning rate is too large, say: this is what happens in a search, and no accident."""

    class Diverges(Inline):
        def start(self, request):
            super().start(request)
            if "m03/" in request.get("log", "") and float(request["train"][-1].split("=")[-1]) > 1e-3:
                self.result = {"error": "toy_script.py: value_loss is nan"}

    flags = ["--population", 8, "--interval", 100, "--total-timesteps", 500, "--seed", 4]
    flags += ["--mutate", "learning_rate:log:1e-4:0.1"]
    for slots in (1, 3, 8):
        finished(tmp_path / str(slots), *flags, "--slots", slots, slot=Diverges)
    failed = events(tmp_path / "1", "failed")
    assert len(failed) >= 2 and not any((tmp_path / "1" / e["leg"] / "checkpoint.pt").exists() for e in failed)
    assert decisions(tmp_path / "1") == decisions(tmp_path / "3") == decisions(tmp_path / "8")


@pytest.mark.parametrize("mode,found", [("sync", False), ("async", True)])
def test_a_member_that_has_failed_twice_waits_for_a_leg_to_copy(mode, found):
    population = pbt.Population(pbt.Args(TOY, population=3, mode=mode))
    for _ in range(2):
        assert 0 in {m.id for m in population.startable([])}
        population.apply({"event": "failed", "member": 0})
    assert [m.id for m in population.startable([])] == [1, 2] and population.due() == []
    population.apply({"event": "leg", "leg": "m01/t001", "member": 1, "step": 50_000, "score": 1.0})
    assert ([m.id for m in population.due()] == [0, 1]) == found


def test_a_member_that_fails_at_once_does_not_jump_between_donors_that_are_still_training(tmp_path):
    """In async mode: it waits until another member has finished a leg, and fails twice from there."""

    class Slow(Inline):
        def start(self, request):
            super().start(request)
            failing = "m00/" in request.get("log", "")
            self.wait = 0 if failing or "check" in request else 30
            if failing:
                self.result = {"error": "toy_script.py: the GPU is gone"}

        def poll(self):
            self.wait -= 1
            return super().poll() if self.wait < 0 else None

    flags = ["--population", 3, "--interval", 100, "--total-timesteps", 300, "--mutate", "learning_rate:log:1e-4:0.1"]
    finished(tmp_path / "a", *flags, "--mode", "async", "--slots", 3, slot=Slow)
    assert 2 <= len(events(tmp_path / "a", "failed")) <= 2 * (1 + len(events(tmp_path / "a", "leg")))


def test_a_first_draw_that_the_script_refuses_is_found_before_anything_is_written(tmp_path):
    """Both ends of the prior would do, and so would the first member's draw."""
    draws = pbt.Population(pbt.Args(TOY, population=4, mutate=[SMALL[-1], "units:cat:16,many,32"])).members.values()
    words = [m.hyper["units"] for m in draws]

    class Refuses(Inline):
        def start(self, request):
            super().start(request)
            check = request.get("check", [])
            if f"--units={words[-1]}" in check and "--units=16" not in check:
                self.result = {"error": "toy_script.py: refused", "mistake": True}

    assert "toy_script.py" in refused(tmp_path / "a", *SMALL, "--mutate", "units:cat:16,many,32", slot=Refuses)


def test_a_member_that_fails_twice_restarts_from_a_peer(tmp_path):
    _, err = finished(tmp_path / "a", *SMALL, "--slots", 1, slot=FirstMemberFails)
    members = [e["member"] for e in events(tmp_path / "a", "failed")]
    assert len(members) == 2 and members[0] == members[1] and "RuntimeError: an error, as planned" in err
    assert {m.step for m in pbt.load_population(tmp_path / "a").members.values()} == {500}


def test_legs_that_all_fail_end_the_run(tmp_path, marks):
    for i in range(100):
        (marks / f"error{i}").touch()
    _, err = finished(tmp_path / "a", *SMALL, "--", "--trouble", "error", "--marks", marks, status=1)
    assert len(events(tmp_path / "a", "failed")) == 8
    assert "the legs of all members have failed twice: see above, and go on with --resume" in err.splitlines()[-1]
    shutil.rmtree(marks)
    marks.mkdir()  # what made them fail is mended
    finished(tmp_path / "a", *SMALL, "--resume", "--", "--trouble", "error", "--marks", marks)
    assert {m.step for m in pbt.load_population(tmp_path / "a").members.values()} == {500}


@pytest.mark.slow
@pytest.mark.parametrize("legs", [0, 3])
def test_a_leg_that_hangs_is_killed_the_first_ones_too(tmp_path, marks, legs):
    slot = trouble_after(legs, tmp_path / "a", marks, "hang", slot=PROCESS)
    flags = ["--leg-timeout", 10, "--", "--trouble", "hang", "--marks", marks]  # 10: a new slot imports torch first
    finished(tmp_path / "a", *SMALL, *flags, slot=slot)
    (failed,) = events(tmp_path / "a", "failed")
    assert re.search(r"hung: no result after \d+ s \(see --leg-timeout\)", failed["error"])
    assert len(events(tmp_path / "a", "leg")) == 20


def test_a_leg_past_the_limit_is_killed_and_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pbt.Population, "time_limit", lambda self: -1.0)
    killed = []

    class Hanging(Inline):
        def start(self, request):
            super().start(request)
            if "train" in request and not killed:
                self.result, self.kill = None, lambda: killed.append(request)

    _, err = finished(tmp_path / "a", *SMALL, "--slots", 1, slot=Hanging)
    (failed,) = events(tmp_path / "a", "failed")
    assert re.fullmatch(r"m00/t001 hung: no result after \d+ s \(see --leg-timeout\)", failed["error"])
    assert failed["error"] in err
    assert len(events(tmp_path / "a", "leg")) == 20


def test_the_bar_counts_the_steps_of_all_members(tmp_path, monkeypatch):
    class Bar:
        def __init__(self, total, initial, **_):
            self.n = initial
            shown.append((initial, total))

        def update(self, n):
            self.n += n
            shown.append(self.n)

        write = close = lambda *_, **__: None

    shown = []
    monkeypatch.setattr(pbt, "tqdm", Bar)
    finished(tmp_path / "a", *SMALL, "--quantile", 0)
    assert shown == [(0, 2000), *range(100, 2001, 100)]


def test_once_legs_have_finished_their_median_is_the_limit():
    population = pbt.Population(pbt.Args(TOY))
    for seconds, limit in (([], 14400), ([1, 1, 1], 60), ([100, 200, 300], 1000), ([10000], 50000)):
        population.legs = {i: {"seconds": x} for i, x in enumerate(seconds)}
        assert population.time_limit() == limit
        given = pbt.Population(pbt.Args(TOY, leg_timeout=1e6))
        given.legs = population.legs
        assert given.time_limit() == 1e6  # what the user says holds for all legs


def test_a_damaged_checkpoint_is_left_for_another_members(tmp_path, monkeypatch):
    """The script notices the damage. A member whose leg fails twice goes on from another checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)
        finished(tmp_path / "a", *SMALL, "--quantile", 0)
    lines = (tmp_path / "a" / "events.jsonl").read_bytes().splitlines(True)
    kept = [line for line in lines if b'"step": 500' not in line]
    (tmp_path / "a" / "events.jsonl").write_bytes(b"".join(kept))  # as if killed before the last legs
    member = pbt.load_population(tmp_path / "a").members[2]
    (tmp_path / "a" / member.leg / "checkpoint.pt").write_bytes(b"damaged" * 20)
    _, err = finished(tmp_path / "a", *SMALL, "--quantile", 0, "--resume")
    assert err.count("member 2: toy_script.py: damaged") == 2
    assert [e["member"] for e in events(tmp_path / "a", "failed")] == [2, 2]
    (copy,) = [c for e in events(tmp_path / "a", "decide") for c in e["copies"]]
    assert copy["member"] == 2 and copy["donor"] != 2
    assert {m.step for m in pbt.load_population(tmp_path / "a").members.values()} == {500}


def test_no_member_restarts_from_the_checkpoint_that_failed():
    """Members 0 and 1 share a damaged checkpoint, and member 0 has the best score."""
    population = pbt.Population(pbt.Args(TOY, population=3, mutate=["x:lin:0:1"]))
    for m, leg, score in zip(population.members.values(), ("m00/t001", "m00/t001", "m02/t001"), (3, None, 1)):
        m.leg, m.score, m.hyper = leg, score, {"x": 0.5}
    recorded = []
    population.record = lambda event, **content: recorded.append(content)
    population.members[1].failures = 2
    population.decide([population.members[1]])
    assert [c["donor"] for content in recorded for c in content["copies"]] == [2]


def living(mark):
    """The processes of a run: they have its mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] if mark.encode() in path.read_bytes() else []
    return found


@pytest.mark.slow
def test_twenty_sigkills_change_nothing_and_leave_no_process(tmp_path, cli, monkeypatch):
    small = [*SMALL, "--interval", 50]
    flags = [*small, "--", "--seconds", 0.15]  # 50 events in some 4 s
    finished(tmp_path / "whole", *small)
    chance, mark, struck = random.Random(0), f"pbt-test-{os.getpid()}-{time.time()}", set()
    monkeypatch.setenv("PBT_TEST", mark)
    for kill in range(20):
        flags_now = [*resume(tmp_path / "a"), *flags]
        process = cli("pbt_launcher", TOY, "--run-dir", tmp_path / "a", *flags_now, wait=False, fresh=kill == 0)
        if kill % 4 == 0:
            time.sleep(chance.uniform(0, 0.6))  # while it starts
        else:
            soon = len(events(tmp_path / "a")) + chance.randrange(1, 3)
            wait_for(lambda: len(events(tmp_path / "a")) >= soon or process.poll() is not None)  # noqa: B023
            time.sleep(chance.uniform(0, 0.1))  # at any moment between two events
        process.kill()
        process.communicate(timeout=60)
        struck.add(len(events(tmp_path / "a")))
    finished(tmp_path / "a", *resume(tmp_path / "a"), *flags)
    assert len(struck) > 8  # in the middle
    assert decisions(tmp_path / "a") == decisions(tmp_path / "whole")
    wait_for(lambda: not living(mark))


def resume(run_dir):
    return ["--resume"] if events(run_dir) else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_everything_and_say_how_to_go_on(tmp_path, cli, plain, monkeypatch, number):
    mark = f"pbt-signal-{os.getpid()}-{time.time()}"
    monkeypatch.setenv("PBT_TEST", mark)
    process = cli("pbt_launcher", TOY, "--run-dir", tmp_path / "a", *SMALL, "--", "--seconds", "0.2", wait=False)
    wait_for(lambda: len(events(tmp_path / "a", "leg")) >= 3, process)
    time.sleep(0.1)  # in the middle of the next legs
    assert living(mark)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err and "resource_tracker" not in err
    wait_for(lambda: not living(mark))
    command = shlex.split(err.splitlines()[-1].split("to go on:")[1])
    assert command[:2] == ["python", os.path.relpath(pbt.__file__, tmp_path)]
    assert command.index("--resume") < command.index("--")
    assert cli("pbt_launcher", *command[2:]).returncode == 0
    assert decisions(tmp_path / "a") == decisions(plain)


@pytest.mark.parametrize("legs", [1, 6])
def test_a_signal_ends_the_loop_and_the_summary_names_it(tmp_path, plain, legs):
    left = [signal.SIGTERM]  # a second one would end pytest

    class Signalled(Inline):
        def start(self, request):
            if left and len(events(tmp_path / "a", "leg")) == legs:
                os.kill(os.getpid(), left.pop())
            super().start(request)

    out, err = finished(tmp_path / "a", *SMALL, "--slots", 1, status=128 + signal.SIGTERM, slot=Signalled)
    assert json.loads(out)["signal"] == signal.SIGTERM and "to go on:" in err and "to evaluate" not in err
    assert len(events(tmp_path / "a", "leg")) < legs + 2 and json.loads(out)["leg"]
    finished(tmp_path / "a", *SMALL, "--slots", 1, "--resume")
    assert decisions(tmp_path / "a") == decisions(plain)


# ---- mistakes --------------------------------------------------------------------------------------------------------


MISTAKES = [
    (["--population", "0"], "--population 0 must be positive"),
    (["--quantile", "0.7"], "--quantile 0.7 must be 0 or more, and at most 0.5"),
    (["--seed", "-1"], "--seed -1 must be 0 or more"),
    (["--min-gap", "inf"], "--min-gap inf must be"),
    (["--leg-timeout", "0"], "--leg-timeout 0.0 must be positive"),
    (["--warmup", "-5"], "--warmup -5 must be 0 or more"),
    (["--interval", "500"], "no decision falls before --total-timesteps: see --interval and --warmup"),
    (["--warmup", "600"], "no decision falls before --total-timesteps"),
    (["--warmup", "450"], "no decision falls before --total-timesteps"),  # the last one is at 400
    (["--no-such-flag", "1"], "--no-such-flag"),
    (["--mutate", "learning-rate:lin:0:1"], "learning_rate: it is given twice"),
    (["--mutate", "units:int:1:2", "--", "--units", "3"], "units: it is given twice"),
    (["--mutate", "seed:int:1:5"], "seed: the launcher sets this flag"),
    (["--mutate", "run_dir:cat:a,b"], "run_dir: the launcher sets this flag"),
    (["--", "--seed", "3"], "seed: the launcher sets this flag"),
    (["--", "--resume=x"], "resume: the launcher sets this flag"),
    (["--", "--stop-at-step", "3"], "stop_at_step: the launcher sets this flag"),
    (["--eval-episodes", "3"], "--eval-episodes goes with --score evaluation"),
    (["--num-gpus", "1"], "--num-gpus goes with --executor ray"),
    (["--executor", "ray", "--gpus", "0"], "--gpus goes with --executor local"),
    (["--mutate", "units:int:0:1e30"], "--mutate units:int:0:1e30: expected NAME"),
    (["--env-id", ""], "--env-id is empty"),
    (["--resume"], "holds no population"),
    (["--replay", "nowhere"], "nowhere holds no population"),
    (["--mutate", "no_such:lin:0:1"], "toy_script.py: unrecognized arguments: --no-such="),
    (["--mutate", "units:lin:1.5:2"], "toy_script.py: argument --units: invalid int value"),
    (["--", "--no-such", "1"], "toy_script.py: unrecognized arguments: --no-such 1"),
]


@pytest.mark.parametrize("flags,message", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, flags, message):
    assert message in refused(tmp_path / "a", *SMALL, *flags)


def test_a_bound_outside_the_scripts_range_is_found_although_no_draw_is(tmp_path):
    """It would end a leg hours later: no member begins with it."""
    first = pbt.Population(pbt.Args(TOY, population=4, mutate=[SMALL[-1], "units:cat:16,32,many"])).members.values()
    assert {m.hyper["units"] for m in first} <= {"16", "32"}
    err = refused(tmp_path / "a", *SMALL, "--mutate", "units:cat:16,32,many")
    assert "--mutate units:cat:16,32,many: toy_script.py: argument --units: invalid int value: 'many'" in err


def test_a_mistake_that_only_the_first_leg_shows_leaves_a_folder_that_is_free(tmp_path):
    _, err = finished(tmp_path / "a", *SMALL, "--env-id", "nonsense", status=2)
    assert err == "pbt_launcher.py: toy_script.py: there is no nonsense\n"
    finished(tmp_path / "a", *SMALL, "--env-id", "sense")
    assert len(events(tmp_path / "a", "leg")) == 20 and len(events(tmp_path / "a", "args")) == 1


def test_scripts_that_cannot_be_members(tmp_path):
    assert "there is no script no_such_script.py" in refused(tmp_path / "a", *SMALL, script="no_such_script.py")
    (tmp_path / "notes.txt").touch()
    assert "there is no script" in refused(tmp_path / "a", *SMALL, script=str(tmp_path / "notes.txt"))
    sources = {"import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'"}
    sources |= {"x = 1": "has no attribute 'parse_args'", "import sys; sys.exit(3)": "it ends with status 3"}
    argparse = "import argparse\nparse_args = lambda argv: argparse.ArgumentParser().parse_args(argv)"
    sources[argparse] = "it ends with status 2 at --total-timesteps=500"
    for i, (source, message) in enumerate(sources.items()):
        script = tmp_path / f"script{i}.py"
        script.write_text(source)
        slot = PROCESS if source == argparse else Inline  # it writes to the slot's standard error
        err = refused(tmp_path / "a", *SMALL, script=str(script), slot=slot)
        assert f"{script.name}: " in err and message in err


def test_a_folder_belongs_to_one_population(tmp_path):
    finished(tmp_path / "a", *SMALL)
    assert "holds a population: go on with --resume" in refused(tmp_path / "a", *SMALL)
    err = refused(tmp_path / "a", *SMALL, "--interval", 50, "--resume")
    assert "--interval is 50 here, but 100 in" in err
    other = tmp_path / "other.py"
    shutil.copy(TOY, other)
    assert "the script is other.py here, but toy_script.py in" in refused(
        tmp_path / "a", *SMALL, "--resume", script=str(other)
    )
    out, _ = finished(tmp_path / "a", *SMALL, "--resume", "--slots", 1, "--leg-timeout", 10)  # these may change
    assert json.loads(out)["leg"]
    population = pbt.Population(pbt.Args(TOY, run_dir=str(tmp_path / "b")))
    with population:
        assert "another launcher is using it" in refused(tmp_path / "b", *SMALL)
        assert events(tmp_path / "b", "args")
    finished(tmp_path / "b", *SMALL)
    before = events(tmp_path / "b")
    with pytest.raises(pbt.UserError, match="holds a population"), population:  # it began while there were no legs yet
        pass
    assert events(tmp_path / "b") == before


def test_a_folder_of_a_single_run_is_called_that(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checkpoint.pt").touch()
    for flags in ([], ["--resume"]):
        assert "holds a single run, no population" in refused(tmp_path / "a", *SMALL, *flags)
    assert "holds a single run, no population" in refused(tmp_path / "b", *SMALL[:4], "--replay", tmp_path / "a")


def test_a_run_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    assert "file/a: Not a directory" in refused(tmp_path / "file" / "a", *SMALL)


@pytest.mark.parametrize(
    "content,message",
    [(b"{half\n", "is damaged"), (b'{"event": "member"}\n', "another version"), (b"{}\n[1]\n", "is not of")],
)
def test_a_file_of_events_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events.jsonl").write_bytes(content)
    assert message in refused(tmp_path / "a", *SMALL, "--resume")


# ---- with a real script ----------------------------------------------------------------------------------------------

PPO = str(ROOT / "ppo_clip.py")
CARTPOLE = ["--env-id", "CartPole-v1", "--population", "2", "--interval", "512", "--total-timesteps", "2048"]
CARTPOLE += ["--mutate", "learning_rate:log:1e-4:1e-2"]
FLAGS = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2", "--no-compile"]


GAMMA = ["--mutate", "gamma:lin:1.5:2"]
SCRIPT_MISTAKES = [
    ([*GAMMA, "--mutate", "ent_coef:lin:0:1"], "ppo_clip.py: --gamma 1."),
    (
        ["--mutate", "gae_lambda:lin:0.999:1.001"],
        "--mutate gae_lambda:lin:0.999:1.001: ppo_clip.py: --gae-lambda 1.001 must",
    ),
    (["--mutate", "no_such:lin:0:1"], "ppo_clip.py: "),
    (["--env-id", "NoSuch-v0"], "ppo_clip.py: cannot make NoSuch-v0"),
    (
        ["--total-timesteps", "100", "--interval", "50"],
        "ppo_clip.py: --total-timesteps is shorter than one iteration of 2048 steps",
    ),
    (["--", "--num-envs", "0"], "ppo_clip.py: --num-envs 0 must be positive"),
]


@pytest.mark.parametrize("flags,message", SCRIPT_MISTAKES)
def test_a_mistake_that_a_real_script_sees(tmp_path, flags, message):
    """The line begins with the flag that is to blame."""
    assert refused(tmp_path / "a", *CARTPOLE, *flags, script=PPO).startswith(f"pbt_launcher.py: {message}")


def test_bounds_are_tried_with_a_members_other_draws(tmp_path):
    """With the script's defaults for the others, 24 minibatches would be refused."""
    args = pbt.Args(PPO, env_id="CartPole-v1", population=2, mutate=["num_steps:cat:1536", "num_minibatches:cat:24,48"])
    pbt.check_flags(pbt.Population(args), Inline(0, args), [])


def test_a_real_script_scored_by_evaluation(tmp_path):
    """A leg's score is the mean of the script's own evaluation of its checkpoint."""
    import ppo_clip

    flags = [*CARTPOLE, "--total-timesteps", 512, "--quantile", 0]
    flags += ["--score", "evaluation", "--eval-episodes", 4, "--", *FLAGS]
    finished(tmp_path / "a", *flags, script=PPO)
    for leg in events(tmp_path / "a", "leg"):
        argv = ["--evaluate", str(tmp_path / "a" / leg["leg"]), "--eval-episodes", "4", "--seed", str(1 + 512)]
        assert leg["score"] == ppo_clip.evaluate(ppo_clip.parse_args(argv))["mean"]


@pytest.mark.slow
def test_quantile_zero_is_the_scripts_run_one_by_one_bit_for_bit(tmp_path):
    import ppo_clip

    finished(tmp_path / "a", *CARTPOLE, "--quantile", 0, "--", *FLAGS, script=PPO, slot=PROCESS)
    members = pbt.load_population(tmp_path / "a").members
    for m in members.values():
        flags = ["--env-id", "CartPole-v1", "--total-timesteps", "2048", "--checkpoint-every", "512", *FLAGS]
        flags += ["--seed", str(1 + m.id), "--learning-rate", str(m.hyper["learning_rate"])]
        assert ppo_clip.main([*flags, "--run-dir", str(tmp_path / f"single{m.id}")]) == 0
        single = ppo_clip.load_checkpoint(tmp_path / f"single{m.id}")
        ours = ppo_clip.load_checkpoint(tmp_path / "a" / m.leg)
        for key in ("agent", "adam"):
            assert all(torch.equal(x, single[key][name]) for name, x in ours[key].items())
        assert torch.equal(ours["rng"], single["rng"]) and ours["last"] == single["last"] and ours["last"]
        args = json.loads((tmp_path / "a" / m.leg / "args.json").read_text())
        assert args["num_workers"] == 0  # the slots are the processes
        assert "run folder" in (tmp_path / "a" / f"{m.leg}.log").read_text()  # what the script said


@pytest.mark.slow
def test_after_a_copy_the_optimiser_has_the_new_learning_rate(tmp_path):
    """The classic silent bug: the copied optimiser state brings the donor's rate back."""
    flags = [*CARTPOLE, "--quantile", 0.5, "--resample-probability", 0, "--", *FLAGS, "--lr-schedule", "constant"]
    finished(tmp_path / "a", *flags, script=PPO)
    legs = {e["leg"]: e for e in events(tmp_path / "a", "leg")}
    copies = [c for e in events(tmp_path / "a", "decide") for c in e["copies"]]
    assert len(copies) == 3
    for leg, e in legs.items():
        with open(tmp_path / "a" / leg / "progress.csv") as file:
            rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
        assert rates == pytest.approx([e["hyper"]["learning_rate"]] * 4, rel=1e-5)
        donor = legs[e["source"]] if e["source"] else e
        assert donor["hyper"] != e["hyper"] or donor["member"] == e["member"]


# ---- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install ray==2.60.0" in refused(tmp_path / "a", *SMALL, "--executor", "ray")


def test_a_dead_ray_address_is_given_up_at_once(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="optional package ray is not installed")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("it would try for minutes"))
    with socket.socket() as silent:  # a port of our own, at which nobody listens
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        err = refused(tmp_path / "a", *SMALL, "--executor", "ray", "--ray-address", address)
    assert f"--ray-address {address}: no cluster there within a minute: " in err and "refused" in err


def test_what_ray_raises_is_one_line(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="optional package ray is not installed")
    err = refused(tmp_path / "a", *SMALL, "--executor", "ray", "--ray-address", "garbage")
    assert "--ray-address garbage: no cluster there within a minute: Invalid address format: garbage" in err

    def init(address, include_dashboard, **kwargs):
        assert address == "local" and not include_dashboard
        raise RuntimeError("the node\ndid not start")

    monkeypatch.setattr(ray, "init", init)
    assert refused(tmp_path / "a", *SMALL, "--executor", "ray").endswith("cannot start Ray: the node\n")


@pytest.mark.slow
def test_two_ray_nodes_one_of_them_killed(tmp_path, plain):
    """The population ends as one trained locally, though a node dies with its legs."""
    ray = pytest.importorskip("ray", reason="optional package ray is not installed")
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    session = cluster.head_node.get_session_dir_path()  # in /tmp, where Ray leaves it
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        flags = [*SMALL, "--", "--seconds", "0.5"]
        too_much = refused(tmp_path / "c", *SMALL, "--executor", "ray", "--num-gpus", 1)
        assert "--num-cpus 1.0 --num-gpus 1.0: the nodes have (CPUs, GPUs) [(1.0, 0), (1.0, 0)]" in too_much
        bad = refused(tmp_path / "c", *SMALL, "--executor", "ray", "--mutate", "no_such:lin:0:1")
        assert "toy_script.py: unrecognized arguments: --no-such=" in bad

        def kill_a_node():
            wait_for(lambda: len(events(tmp_path / "a", "leg")) >= 4)
            cluster.remove_node(node, allow_graceful=False)
            return len(events(tmp_path / "a", "leg"))

        with ThreadPoolExecutor() as pool:
            legs_before = pool.submit(kill_a_node)
            finished(tmp_path / "a", "--executor", "ray", *flags)
            assert 4 <= legs_before.result() < 20  # in the middle
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(session, ignore_errors=True)
    assert scores(tmp_path / "a") == scores(plain)


def test_no_more_slots_are_made_than_there_are_members(tmp_path):
    made = []

    class Counted(Inline):
        def __init__(self, index, args):
            made.append(index)
            super().__init__(index, args)

    finished(tmp_path / "a", *SMALL, "--slots", 40, slot=Counted)
    assert made == [0, 1, 2, 3]


def test_a_script_that_does_not_even_read_its_flags_is_given_up(tmp_path):
    class Silent(Inline):
        def poll(self):
            return None

    message = "toy_script.py does not answer (see --leg-timeout)"
    assert message in refused(tmp_path / "a", *SMALL, "--leg-timeout", 1e-9, slot=Silent)


def test_a_signal_while_flags_are_checked_writes_nothing(tmp_path):
    class Signalled(Inline):
        def start(self, request):
            os.kill(os.getpid(), signal.SIGTERM)
            self.result = None

    out, err = finished(tmp_path / "a", *SMALL, status=128 + signal.SIGTERM, slot=Signalled)
    assert json.loads(out)["signal"] == signal.SIGTERM and not err and not (tmp_path / "a").exists()


def test_the_scripts_own_flags_come_last():
    """So they win over what the launcher chooses: it gives a leg one process, since the slots are the processes."""
    population = pbt.Population(pbt.Args("ppo_clip.py", population=2, script_flags=["--num-workers", "2"]))
    flags = population.next_leg(population.members[0])[1]["train"]
    assert "--num-workers=0" in flags
    assert importlib.import_module("ppo_clip").parse_args(flags).num_workers == 2
