"""The launcher: selection and mutation as pure functions, the paper's toy, and populations that die in every way."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import pbt_launcher as pbt

TOY = str(Path(__file__).parent / "helpers" / "toy_script.py")
SMALL = ["--population", "4", "--interval", "100", "--total-timesteps", "500"]
SMALL += ["--mutate", "learning_rate:log:1e-4:0.1"]


def launch(run_dir, *flags, script=TOY, **kwargs):
    command = [sys.executable, str(ROOT / "pbt_launcher.py"), script, "--run-dir", str(run_dir), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finished(run_dir, *flags, status=0, **kwargs):
    process = launch(run_dir, *flags, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def population(run_dir):
    """What two equal runs agree on: members and legs, without durations."""
    state = json.loads((run_dir / "state.json").read_text())
    for leg in state["legs"].values():
        leg.pop("seconds")
    return state


# ---- selection -------------------------------------------------------------------------------------------------------


def test_ranks_ties_and_missing_scores():
    assert pbt.ranked({0: 1.0, 1: 3.0, 2: 2.0}) == [1, 2, 0]
    assert pbt.ranked({2: 1.0, 0: 1.0, 1: 1.0}) == [0, 1, 2]
    assert pbt.ranked({0: math.nan, 1: -1e9, 2: None}) == [1, 0, 2]


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


def test_truncation_draws_donors_uniformly_and_never_one_without_a_score():
    rng, scores = np.random.default_rng(0), {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
    donors = [pbt.truncation(scores, 0.5, rng)[3] for _ in range(2000)]
    assert set(donors) == {0, 1} and 900 < donors.count(0) < 1100
    assert set(pbt.truncation({0: 1.0, 1: None, 2: math.nan, 3: None}, 0.5, rng).values()) == {0}
    assert pbt.truncation({0: None, 1: math.nan}, 0.5, rng) == {}


def test_tournament_copies_the_better_of_two():
    rng, scores = np.random.default_rng(0), {0: 4.0, 1: 3.0, 2: None, 3: 1.0}
    for _ in range(200):
        copies = pbt.tournament(scores, rng)
        assert all(pbt.ranked({m: scores[m], d: scores[d]})[0] == d for m, d in copies.items())
        assert not set(copies) & set(copies.values()) and 0 not in copies and 2 not in copies.values()
    assert pbt.tournament({0: 1.0}, rng) == {}


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


def test_integers_and_categories():
    samples, walk = draws("n:int:1:8")
    assert set(samples) == set(range(1, 9)) and all(isinstance(x, int) for x in samples + walk)
    assert set(walk) <= set(range(1, 9)) and len(set(walk)) >= 4 and 1 in walk and walk[-200:].count(1) < 200
    samples, walk = draws("f:cat:a,b,c")
    assert set(samples) == set(walk) == {"a", "b", "c"}
    assert all(abs("abc".index(x) - "abc".index(y)) <= 1 for x, y in zip(walk, walk[1:], strict=False))


def test_resampling_probability():
    h, rng = pbt.Hyperparameter.parse("x:lin:0:100"), np.random.default_rng(0)
    new = [pbt.explore({"x": 50.0}, [h], 0.25, rng)["x"] for _ in range(2000)]
    assert 0.7 < np.mean([x in (40.0, 60.0) for x in new]) < 0.8


@pytest.mark.parametrize("text", ["x", "x:log:0:1", "x:lin:2:1", "x:cat", "x:what:0:1", "gamma:log:0.9:1", "x:lin:a:b"])
def test_bad_specifications(text, tmp_path, capsys):
    assert pbt.launch([TOY, "--run-dir", str(tmp_path / "a"), "--mutate", text]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and text in err and not (tmp_path / "a").exists()


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


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_population_to_its_end(tmp_path, mode):
    out, err = finished(tmp_path / "a", *SMALL, "--mode", mode)
    summary, log = json.loads(out), events(tmp_path / "a")
    legs, copies = (
        [e for e in log if e["event"] == "leg"],
        [c for e in log if e["event"] == "decide" for c in e["copies"]],
    )
    assert len([e for e in log if e["event"] == "member"]) == 4
    assert summary["score"] == pytest.approx(max(e["score"] for e in legs))
    assert copies and all(c["donor"] != c["member"] for c in copies)
    seeds = [c["seed"] for c in copies] + [1, 2, 3, 4]
    assert len(set(seeds)) == len(seeds)  # a clone never repeats anybody's noise
    best = json.loads((tmp_path / "a" / "best.pt").read_bytes()[64:])
    assert 1.2 - (best["x"] - 1) ** 2 == pytest.approx(summary["score"])
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"lineage.png", "schedule.png", "state.json", "tensorboard", "args.json"} <= names
    assert len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) <= 2 * 4
    assert "evaluate with: python" in err and "learning_rate" in err
    final = pbt.Journal(tmp_path / "a").population.members.values()
    assert {m.step for m in final} == {500}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "m00")).Reload()
    assert {"pbt/score", "pbt/learning_rate"} <= set(board.Tags()["scalars"])


def test_same_seed_same_decisions(tmp_path):
    for name, slots in (("a", 1), ("b", 3)):
        finished(tmp_path / name, *SMALL, "--slots", slots)
    assert population(tmp_path / "a") == population(tmp_path / "b")
    finished(tmp_path / "c", *SMALL, "--seed", 2)
    assert population(tmp_path / "a") != population(tmp_path / "c")


def test_events_replay_to_the_same_state(tmp_path):
    finished(tmp_path / "a", *SMALL)
    (tmp_path / "b").mkdir()
    whole = (tmp_path / "a" / "events.jsonl").read_bytes()
    (tmp_path / "b" / "events.jsonl").write_bytes(whole + whole[:50].rstrip(b"\n"))  # and half an event
    journal = pbt.Journal(tmp_path / "b")
    stored = json.loads((tmp_path / "a" / "state.json").read_text())
    assert {str(m.id): vars(m) for m in journal.population.members.values()} == stored["members"]
    assert journal.population.legs == stored["legs"] and journal.population.best == stored["best"]
    assert (tmp_path / "b" / "events.jsonl").read_bytes() == whole


def test_one_member_never_exploits(tmp_path):
    finished(tmp_path / "a", *SMALL, "--population", 1)
    assert not [c for e in events(tmp_path / "a") if e["event"] == "decide" for c in e["copies"]]


def test_all_kinds_of_hyperparameters_reach_the_script(tmp_path):
    finished(tmp_path / "a", *SMALL, "--mutate", "units:int:16:256", "--mutate", "activation:cat:tanh,relu")
    assert len({tuple(e["hyper"].values()) for e in events(tmp_path / "a") if e["event"] == "leg"}) > 4


def test_dry_run_prints_and_writes_nothing(tmp_path):
    out, _ = finished(tmp_path / "a", *SMALL, "--dry-run", "--", "--seconds", 0.5)
    lines = out.splitlines()
    assert len(lines) == 4 and all("--learning-rate" in line and line.endswith("--seconds 0.5") for line in lines)
    assert not (tmp_path / "a").exists()


def test_replay_follows_the_winners_schedule(tmp_path):
    finished(tmp_path / "a", *SMALL)
    journal = pbt.Journal(tmp_path / "a")
    chain = [journal.population.legs[leg] for leg in journal.population.lineage(journal.population.best)]
    finished(tmp_path / "b", *SMALL, "--population", 2, "--replay", tmp_path / "a", "--seed", 9)
    for m in (0, 1):
        legs = [e for e in events(tmp_path / "b") if e["event"] == "leg" and e["member"] == m]
        assert [e["hyper"] for e in legs] == [leg["hyper"] for leg in chain]
        assert {e["seed"] for e in legs} == {9 + m}


def test_a_script_without_train_runs_as_a_process_per_leg(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(Path(TOY).read_text().replace("def train(", "def learn(").replace("train(parse", "learn(parse"))
    finished(tmp_path / "a", *SMALL, script=str(script))
    finished(tmp_path / "b", *SMALL)
    a, b = ([(e["member"], e["score"]) for e in events(tmp_path / x) if e["event"] == "leg"] for x in "ab")
    assert sorted(a) == sorted(b)


# ---- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crash", "error", "full"])
def test_a_leg_that_fails_once_is_run_again(tmp_path, kind):
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / kind).touch()
    finished(tmp_path / "a", *SMALL, "--", "--trouble", kind, "--marks", tmp_path / "marks")
    finished(tmp_path / "b", *SMALL)
    failed = [e for e in events(tmp_path / "a") if e["event"] == "failed"]
    assert len(failed) == (0 if kind == "full" else 1)
    results = [
        sorted((e["member"], e["step"], e["score"]) for e in events(tmp_path / x) if e["event"] == "leg") for x in "ab"
    ]
    assert results[0] == results[1]


def test_a_member_that_fails_twice_restarts_from_a_peer(tmp_path):
    (tmp_path / "marks").mkdir()
    process = launch(tmp_path / "a", *SMALL, "--slots", 1, "--", "--trouble", "error", "--marks", tmp_path / "marks")
    while len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) < 4:
        time.sleep(0.01)
        assert process.poll() is None
    for i in range(2):
        (tmp_path / "marks" / f"error{i}").touch()
    assert process.wait(timeout=120) == 0
    members = [e["member"] for e in events(tmp_path / "a") if e["event"] == "failed"]
    assert len(members) == 2 and {m.step for m in pbt.Journal(tmp_path / "a").population.members.values()} == {500}


def test_a_leg_that_hangs_is_killed(tmp_path, monkeypatch):
    (tmp_path / "marks").mkdir()
    source = (ROOT / "pbt_launcher.py").read_text().replace("limit = max(60.0,", "limit = max(3.0,")
    (tmp_path / "launcher.py").write_text(source)
    command = [sys.executable, str(tmp_path / "launcher.py"), TOY, "--run-dir", str(tmp_path / "a"), *SMALL]
    command += ["--", "--trouble", "hang", "--marks", str(tmp_path / "marks")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) < 3:
        time.sleep(0.01)
    (tmp_path / "marks" / "hang").touch()
    assert process.wait(timeout=120) == 0
    assert [e["error"] for e in events(tmp_path / "a") if e["event"] == "failed"][0].count("hung") == 1


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    finished(tmp_path / "a", *SMALL, "--quantile", 0)
    lines = (tmp_path / "a" / "events.jsonl").read_bytes().splitlines(True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    kept = [line for line in lines if b'"step": 500' not in line and b'"leg", "member"' not in line[:0]]
    (tmp_path / "b" / "events.jsonl").write_bytes(b"".join(kept))  # as if killed before the last generation
    population = pbt.Journal(tmp_path / "b").population
    for m, harm in ((0, b"damaged"), (1, b"")):
        (tmp_path / "b" / population.members[m].leg / "checkpoint.pt").write_bytes(harm)
    out, err = finished(tmp_path / "b", *SMALL, "--quantile", 0, "--resume")
    assert err.count("is damaged") >= 2
    log = events(tmp_path / "b")
    assert [e["event"] for e in log].count("back") + sum(len(e["copies"]) for e in log if e["event"] == "decide") >= 2
    assert {m.step for m in pbt.Journal(tmp_path / "b").population.members.values()} == {500}


def children(pid):
    """All processes whose command line serves this run's slots."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"--serve" in path.read_bytes() and str(pid).encode() in path.with_name("environ").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_twenty_sigkills_change_nothing_and_leave_no_process(tmp_path):
    flags = [*SMALL, "--", "--seconds", 0.05]
    finished(tmp_path / "whole", *flags)
    chance, mark = random.Random(0), f"pbt-test-{os.getpid()}-{time.time()}"
    started = False
    for _ in range(20):
        resume = ["--resume"] if (tmp_path / "killed" / "args.json").exists() else []
        process = launch(tmp_path / "killed", *resume, *flags, env=os.environ | {"PBT_TEST": mark})
        deadline = time.time() + chance.uniform(0.2, 1.6)
        while time.time() < deadline and process.poll() is None:
            time.sleep(0.01)
        started = started or (tmp_path / "killed" / "state.json").exists()
        process.kill()
        process.communicate()
    resume = ["--resume"] if (tmp_path / "killed" / "args.json").exists() else []
    finished(tmp_path / "killed", *resume, *flags)
    assert started and population(tmp_path / "killed") == population(tmp_path / "whole")
    deadline = time.time() + 5
    while children(mark) and time.time() < deadline:
        time.sleep(0.05)
    assert not children(mark)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_everything_and_say_how_to_go_on(tmp_path, number):
    process = launch(tmp_path / "a", *SMALL, "--", "--seconds", 0.2)
    while len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) < 3:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in err and "Traceback" not in err
    finished(tmp_path / "a", *SMALL, "--resume", "--", "--seconds", 0.2)
    finished(tmp_path / "b", *SMALL, "--", "--seconds", 0.2)
    assert population(tmp_path / "a") == population(tmp_path / "b")


# ---- mistakes --------------------------------------------------------------------------------------------------------


MISTAKES = [
    (["--population", "0"], "population must be positive"),
    (["--quantile", "0.7"], "quantile must lie in"),
    (["--mutate", "learning_rate:lin:0:1"], "twice"),
    (["--resume"], "there is no population"),
    (["--replay", "nowhere"], "no events.jsonl"),
    (["--env-id", "nonsense"], "there is no nonsense"),
]


@pytest.mark.parametrize("flags,message", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    _, err = finished(tmp_path / "a", *SMALL, *flags, status=2)
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_other_mistakes(tmp_path):
    _, err = finished(tmp_path / "a", *SMALL, script="no_such_script.py", status=2)
    assert "there is no script" in err
    finished(tmp_path / "a", *SMALL)
    _, err = finished(tmp_path / "a", *SMALL, status=2)
    assert "holds a population" in err
    _, err = finished(tmp_path / "a", *SMALL, "--interval", 50, "--resume", status=2)
    assert "interval is 50 here, but 100" in err


# ---- with a real script ----------------------------------------------------------------------------------------------

CARTPOLE = ["--env-id", "CartPole-v1", "--population", "2", "--interval", "512", "--total-timesteps", "2048"]
CARTPOLE += ["--mutate", "learning_rate:log:1e-4:1e-2"]
FLAGS = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2", "--no-compile"]


def test_quantile_zero_is_the_scripts_run_one_by_one_bit_for_bit(tmp_path):
    import ppo_clip

    finished(tmp_path / "a", *CARTPOLE, "--quantile", 0, "--", *FLAGS, script=str(ROOT / "ppo_clip.py"))
    members = pbt.Journal(tmp_path / "a").population.members
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


def test_after_a_copy_the_optimiser_has_the_new_learning_rate(tmp_path):
    """The classic silent bug: the copied optimiser state brings the donor's rate back."""
    flags = [*CARTPOLE, "--quantile", 0.5, "--resample-probability", 0, "--", *FLAGS, "--lr-schedule", "constant"]
    finished(tmp_path / "a", *flags, script=str(ROOT / "ppo_clip.py"))
    log = events(tmp_path / "a")
    legs = {e["leg"]: e for e in log if e["event"] == "leg"}
    copies = [c for e in log if e["event"] == "decide" for c in e["copies"]]
    assert len(copies) == 3
    for leg, e in legs.items():
        with open(tmp_path / "a" / leg / "progress.csv") as file:
            rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
        assert rates == pytest.approx([e["hyper"]["learning_rate"]] * 4, rel=1e-5)
        assert (
            e["source"] is None
            or legs[e["source"]]["hyper"] != e["hyper"]
            or legs[e["source"]]["member"] == e["member"]
        )


# ---- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert pbt.launch([TOY, *SMALL, "--run-dir", str(tmp_path / "a"), "--executor", "ray"]) == 2
    assert "pip install 'ray[default]" in capsys.readouterr().err


def test_two_ray_nodes_one_of_them_killed(tmp_path):
    """The population ends as one trained locally, though a node dies with its legs."""
    ray = pytest.importorskip("ray", reason="optional package ray is not installed")
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        flags = [*SMALL, "--", "--seconds", "0.5"]
        args = [TOY, "--run-dir", str(tmp_path / "a"), "--executor", "ray", *flags]

        def kill_a_node():
            while len(list((tmp_path / "a").glob("m*/*/checkpoint.pt"))) < 5:
                time.sleep(0.05)
            cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill_a_node)
        killer.start()
        assert pbt.launch(args) == 0
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    finished(tmp_path / "b", *flags)
    scores = [
        sorted((e["member"], e["step"], e["score"]) for e in events(tmp_path / x) if e["event"] == "leg") for x in "ab"
    ]
    assert scores[0] == scores[1]
