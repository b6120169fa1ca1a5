"""The benchmark's grids and tables: end to end with tiny runs, resumable, and equal to what is committed."""

import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import ROOT
from forking import Forked
from waiting import wait_for

reproduce = importlib.import_module("reproduce")
plot = importlib.import_module("plot")
speed = importlib.import_module("speed")

TINY = ["--steps", "2048", "--seeds", "1"]


def command(tmp_path, study, *flags):
    program = [sys.executable, str(ROOT / "benchmark/reproduce.py"), study, *TINY, *flags]
    return [*program, "--results", str(tmp_path / "results"), "--run-dir", str(tmp_path / "runs")]


def running(tmp_path):
    """Scripts in progress whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(path.read_bytes())
    return [c for c in found if b"ppo_clip.py" in c and str(tmp_path / "runs").encode() in c]


@pytest.mark.slow
@pytest.mark.parametrize("study", [name for name in reproduce.STUDIES if name != "v4-baselines"])
def test_every_setting_of_every_study_runs(study, tmp_path, monkeypatch, capsys):
    """One environment each, so that a misspelt flag or environment shows here and not after eight hours. Settings of
    other libraries are left out."""
    settings, env = reproduce.STUDIES[study].settings, reproduce.STUDIES[study].envs[-1]
    settings = tuple(s for s in settings if s.script != "benchmark/sb3.py")
    for package in ("mpe2", "gymnasium_robotics"):
        if env.startswith(package):
            pytest.importorskip(package, reason=f"optional package {package} is not installed")
    steps = 3200 if settings[0].script == "ppo_multiagent.py" else 2048  # one iteration or two
    only = dataclasses.replace(reproduce.STUDIES[study], settings=settings, envs=(env,), seeds=1, steps=steps)
    names = ("PIPE", "DEVNULL", "run")
    forks = types.SimpleNamespace(Popen=Forked, **{name: getattr(subprocess, name) for name in names})
    monkeypatch.setattr(reproduce, "subprocess", forks)
    folders = tmp_path / "results", tmp_path / "runs"
    assert reproduce.reproduce(study, only, 2, *folders) == 0, capsys.readouterr()
    stored = reproduce.read(study, tmp_path / "results")
    names = {s.name for s in settings}
    assert set(stored) == {(name, env, 1) for name in names}
    assert all(steps <= int(rows[-1]["step"]) < 2 * steps for rows in stored.values())
    text = plot.table(study, tmp_path / "results")
    assert all(f"| {name} |" in text for name in names)
    assert (f"| {env}" in text) == (study != "ppo-table1")  # whose scores ask for three seeds of everything
    plot.curves(study, tmp_path / "results")
    assert (tmp_path / "results" / f"{study}.png").exists() and (tmp_path / "results" / f"{study}.json").exists()


@pytest.mark.slow
def test_a_stopped_grid_goes_on_without_repeating_finished_runs(tmp_path):
    """SIGTERM goes to the grid alone, which stops its runs; SIGKILL takes them with it, as a power cut would."""
    flags = ["--envs", "Pendulum-v1", "--steps", "20480", "--seeds", "2"]
    for how, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        grid = command(tmp_path, "truncation", *flags)
        process = subprocess.Popen(grid, stderr=subprocess.PIPE, start_new_session=True)
        wait_for(lambda: reproduce.read("truncation", tmp_path / "results") and running(tmp_path), process)
        if how == signal.SIGTERM:
            process.terminate()
        else:
            os.killpg(process.pid, how)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err.decode()
        assert how == signal.SIGKILL or not running(tmp_path)
    before = {path: path.stat().st_mtime for path in (tmp_path / "runs").glob("*/*/progress.csv")}
    done = set(reproduce.read("truncation", tmp_path / "results"))
    last = subprocess.run(command(tmp_path, "truncation", *flags), capture_output=True, timeout=300)
    assert last.returncode == 0, last.stderr
    stored = reproduce.read("truncation", tmp_path / "results")
    assert len(stored) == 4 and done < set(stored)
    unchanged = [path for path, t in before.items() if path.stat().st_mtime == t]
    assert len(unchanged) >= len(done)
    assert all(len(rows) == 10 for rows in stored.values())


def test_a_signal_that_comes_while_a_run_is_started_leaves_none_behind(tmp_path, monkeypatch):
    stop, start, started = [], reproduce.Run.start, []

    def start_and_signal(run):
        start(run)
        started.append(run.process)
        stop.append(signal.SIGTERM)

    monkeypatch.setattr(reproduce.Run, "start", start_and_signal)
    study = dataclasses.replace(reproduce.STUDIES["cartpole"], seeds=3, steps=4_000_000)
    assert reproduce.reproduce("cartpole", study, 2, tmp_path / "results", tmp_path / "runs", stop) == 0
    assert started and all(process.poll() is not None for process in started)
    assert not reproduce.read("cartpole", tmp_path / "results")


def test_a_run_that_another_study_has_is_copied(tmp_path):
    """TRPO with default flags stands in two studies; a row that no run could give shows where it came from."""
    other = next(s for s in reproduce.STUDIES["figure3"].settings if s.script == "trpo_continuous.py")
    row = {"global_step": 2048, "episodic_return": 12345, "kl": 0, "learning_rate": 0}
    reproduce.store("figure3", tmp_path / "results", other, "Hopper-v4", 1, [row])
    study = reproduce.STUDIES["trpo-forms"]
    same = next(s for s in study.settings if (s.script, s.flags) == (other.script, other.flags))
    only = dataclasses.replace(study, settings=(same,), envs=("Hopper-v4",), seeds=1, steps=2048)
    assert reproduce.reproduce("trpo-forms", only, 1, tmp_path / "results", tmp_path / "runs") == 0
    rows = reproduce.read("trpo-forms", tmp_path / "results")[same.name, "Hopper-v4", 1]
    assert [(r["step"], r["episodic_return"]) for r in rows] == [("2048", "12345")]
    assert not (tmp_path / "runs").exists()
    shorter = dataclasses.replace(only, steps=20480)
    elsewhere = reproduce.stored_elsewhere("trpo-forms", tmp_path / "results", same, "Hopper-v4", 1, shorter.steps)
    assert elsewhere == (None, None)
    (origin,) = reproduce.origins("trpo-forms", tmp_path / "results")
    assert origin["copied from"] == "figure3" and origin["torch"]


def test_of_two_twins_the_newer_one_is_copied_and_origins_add_up(tmp_path):
    (same,) = (s for s in reproduce.STUDIES["v4"].settings if s.script == "trpo_continuous.py")
    for name, date, value in (("v4", "2026-11-26", 1), ("figure3", "2026-11-27", 2)):
        (twin,) = (s for s in reproduce.STUDIES[name].settings if s.script == "trpo_continuous.py")
        row = {"global_step": 2048, "episodic_return": value, "kl": 0, "learning_rate": 0}
        reproduce.store(name, tmp_path, twin, "Hopper-v4", 1, [row], {"date": date})
    rows, origin = reproduce.stored_elsewhere("pendulums", tmp_path, same, "Hopper-v4", 1, 2048)
    assert rows[0]["episodic_return"] == "2" and origin == {"date": "2026-11-27", "copied from": "figure3"}
    for date in ("2026-11-28", "2026-11-28", "2026-11-29"):
        reproduce.store("v4", tmp_path, same, "Hopper-v4", 1, [row], {"date": date})
    assert [x["date"] for x in reproduce.origins("v4", tmp_path)] == ["2026-11-26", "2026-11-28", "2026-11-29"]


def test_a_short_trial_does_not_count_as_the_study(tmp_path):
    study = reproduce.STUDIES["cartpole"]
    row = {"global_step": 2048, "episodic_return": 9, "kl": 0, "learning_rate": 0}
    reproduce.store("cartpole", tmp_path, study.settings[0], "CartPole-v1", 1, [row])
    rates = []
    for steps in (2048, 4096):
        only = dataclasses.replace(study, seeds=1, steps=steps)
        assert reproduce.reproduce("cartpole", only, 1, tmp_path, tmp_path / "runs") == 0
        (rows,) = reproduce.read("cartpole", tmp_path).values()
        assert int(rows[-1]["step"]) == steps
        rates.append(rows[0]["learning_rate"])
    assert len(list((tmp_path / "runs/cartpole").iterdir())) == 1  # the first one was stored already
    assert rates[1] == "0.0003"  # as at the start of a run: it does not go on from a shorter one


@pytest.mark.slow
def test_populations_are_compared(tmp_path, monkeypatch):
    """The whole study, small: two populations of two members, then three ways to train one member alone, which another
    machine does: all it has is what the first stage has stored."""
    for name, value in (("POPULATION", 2), ("LEGS", 2), ("REPLAYS", 1)):
        monkeypatch.setattr(reproduce, name, value)
    path, study = tmp_path / "pbt_Pendulum-v1_8192.json", (["Pendulum-v1"], 8192, 1, 2, tmp_path, tmp_path / "runs")
    for stages in (reproduce.STAGES[:1], reproduce.STAGES):
        with monkeypatch.context() as patch:
            patch.setattr(reproduce, "STAGES", stages)
            patch.setattr(reproduce, "train_way", functools.partial(trained_on_a_bare_machine, reproduce.train_way))
            reproduce.populations(*study)
        (row,) = json.loads(path.read_text())
        assert (
            ("replay" in row) == (len(stages) == 2) and row["made"]["pbt"]["torch"] and "commit" in row["made"]["pbt"]
        )
    assert all(-2000 < row[arm] < 0 for arm in ("pbt", "random"))
    lengths = {"pbt_members": 2, "random_members": 2, "replay": 1, "constant": 1, "defaults": 1}
    assert {arm: len(row[arm]) for arm in lengths} == lengths
    folder = tmp_path / "runs/Pendulum-v1-8192"
    folders = {way: folder / f"{way}-0" for ways in reproduce.STAGES for way in ways}
    folders["pbt"] = folder / "stored-pbt-0"
    legs = {way: reproduce.legs(path) for way, path in folders.items()}
    assert {way: len(x) for way, x in legs.items()} == {
        "pbt": 4,
        "random": 4,
        "replay": 2,
        "constant": 2,
        "defaults": 2,
    }
    assert legs["constant"][0]["hyper"] == {} and set(row["random_best"]) == {
        "learning_rate", "clip_coef", "ent_coef", "gae_lambda"
    }  # fmt: skip
    winner = max(legs["pbt"], key=lambda leg: leg["score"])
    assert legs["replay"][-1]["hyper"] == winner["hyper"] == row["pbt_best"]
    assert set(row["made"]) == {"pbt", "random", "replay", "constant", "defaults"}
    assert f"| PBT, best member, 50 fresh episodes | {row['pbt']:.0f} |" in plot.populations_table(tmp_path)
    assert "| the schedule less the constant setting |" in plot.populations_table(tmp_path)
    monkeypatch.setattr(reproduce, "output", None)
    reproduce.populations(*study)  # what is stored is not run again


def trained_on_a_bare_machine(train_way, way, row, env, slots, results, folder):
    if way == "replay":
        shutil.rmtree(folder / "pbt-0")
    train_way(way, row, env, slots, results, folder)
    if way == "pbt":
        assert (results / f"pbt_{env}_{row['total_timesteps']}.pbt-0.gz").exists()


def test_a_member_that_became_a_copy_has_no_score_of_its_own(tmp_path, monkeypatch):
    lines = [{"event": "leg", "member": m, "score": s, "hyper": {}} for m, s in ((0, 1.0), (1, 2.0), (2, None))]
    lines += [{"event": "decide", "members": [1], "copies": [{"member": 1, "donor": 0}]}]
    (tmp_path / "defaults-0").mkdir()
    (tmp_path / "defaults-0/events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(reproduce, "output", lambda *command: None)
    row = {"repetition": 0, "total_timesteps": 2000}
    reproduce.train_way("defaults", row, "Hopper-v4", 1, tmp_path, tmp_path)
    assert str(row["defaults"]) == "[1.0, nan, nan]"


@pytest.mark.slow
def test_a_signal_goes_on_to_the_launcher(tmp_path):
    command = ["pbt", "--envs", "Pendulum-v1", "--steps", "400000", "--seeds", "1", "--workers", "1"]
    command += ["--results", str(tmp_path / "results"), "--run-dir", str(tmp_path / "runs")]
    program = [sys.executable, str(ROOT / "benchmark/reproduce.py"), *command]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list((tmp_path / "runs").glob("pbt/*/pbt-0/m*/t*/progress.csv")), process)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "to go on:" in err and "Traceback" not in err
    assert not running(tmp_path)


def test_a_study_of_an_older_version_is_not_mixed_with_todays(tmp_path):
    (tmp_path / "pbt_Hopper-v4_2000.json").write_text('[{"repetition": 0, "pbt": 1}]')
    with pytest.raises(SystemExit, match="is of an older version"):
        reproduce.populations(["Hopper-v4"], 2000, 1, 1, tmp_path, tmp_path)


def test_time_limits_become_ends():
    import gymnasium as gym

    env = gym.make("reproduce:Pendulum-v1-terminal-v0")
    env.reset(seed=0)
    endings = [env.step(env.action_space.sample())[2:4] for _ in range(200)]
    assert endings[-1] == (True, False) and not any(any(e) for e in endings[:-1])


def test_normalised_scores_of_a_worked_example():
    """Two settings, two environments, by hand: random is 0, the best setting's mean is 1."""
    found = {
        ("a", "Hopper-v4"): {1: 1017.7, 2: 3017.7}, ("b", "Hopper-v4"): {1: 17.7, 2: 1017.7},
        ("a", "Swimmer-v4"): {1: 0.8, 2: 0.8}, ("b", "Swimmer-v4"): {1: 100.8, 2: 100.8},
    }  # fmt: skip
    scores = plot.normalised(found, ["Hopper-v4", "Swimmer-v4"])
    assert scores["a"] == pytest.approx({1: 0.25, 2: 0.75}) and scores["b"] == pytest.approx({1: 0.5, 2: 0.75})


def test_scores_are_of_the_seeds_that_all_have():
    found = {("a", "Hopper-v4"): {1: 1017.7, 2: 9e9}, ("b", "Hopper-v4"): {1: 517.7}}
    assert plot.normalised(found, ["Hopper-v4"]) == {"a": {1: pytest.approx(1)}, "b": {1: pytest.approx(0.5)}}


def test_the_interval_is_students():
    pytest.importorskip("scipy")
    assert plot.interval([1.0, 2.0, 3.0]) == "-0.48 to 4.48"  # 2 +- 4.303 / sqrt(3)
    assert plot.interval([1.0]) == ""


def test_a_return_at_a_step_lies_on_the_line_between_its_neighbours(tmp_path):
    setting = reproduce.STUDIES["cartpole"].settings[0]
    rows = [{"global_step": x, "episodic_return": x / 10, "kl": 0, "learning_rate": 0} for x in (1000, 2000)]
    reproduce.store("cartpole", tmp_path, setting, "CartPole-v1", 1, rows)
    assert plot.returns("cartpole", tmp_path, 1250) == {("ppo_clip.py", "CartPole-v1"): {1: pytest.approx(125)}}


def test_table_1_has_the_papers_eleven_rows():
    study = reproduce.STUDIES["ppo-table1"]
    assert {s.name for s in study.settings} == set(plot.PAPER) and len(plot.PAPER) == 11
    assert len(study.runs()) == 11 * 7 * 3 and set(study.envs) == set(plot.RANDOM)


def test_statistics_alone(tmp_path):
    reproduce.statistics_alone(tmp_path, tmp_path, seeds=2, solved=2048, rollouts=3)
    with gzip.open(tmp_path / "statistics.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert [(x["way"], x["seed"], x["rollout"]) for x in rows[:4]] == [
        ("usual", "1", "1"), ("usual", "1", "2"), ("usual", "1", "3"), ("steady", "1", "1")
    ]  # fmt: skip
    assert len(rows) == 12 and rows[0]["falls"] == rows[3]["falls"] and rows[0]["kl"] != rows[3]["kl"]
    table = plot.draw_statistics(tmp_path)
    assert table.splitlines()[0].endswith("| 1 | 2 |") and (tmp_path / "statistics.png").exists()


def test_the_committed_tables_are_those_of_the_stored_data(tmp_path):
    results = ROOT / "benchmark/results"
    shutil.copy(results / "statistics.csv.gz", tmp_path)
    assert (results / "statistics.md").read_text() == plot.draw_statistics(tmp_path) + "\n"
    for study in reproduce.STUDIES:
        if runs := reproduce.read(study, results):
            assert (results / f"{study}.md").read_text() == plot.table(study, results) + "\n"
            if study in plot.LESS:
                assert (results / f"{study}.less.md").read_text() == plot.less_table(study, results) + "\n"
            if study in ("v4", "v4-baselines", "v5"):
                assert (results / f"{study}.seeds.md").read_text() == plot.seeds_table(study, results) + "\n"
            if (results / f"{study}.fresh.csv").exists():
                assert (results / f"{study}.fresh.md").read_text() == plot.fresh_table(study, results) + "\n"
            assert all(list(row) == list(reproduce.COLUMNS) for rows in runs.values() for row in rows)
    assert (results / "selfplay.md").read_text() == plot.selfplay(results) + "\n"
    assert (results / "pbt.md").read_text() == plot.populations_table(results) + "\n"
    overhead = json.loads((results / "pbt_overhead.json").read_text())
    assert (results / "pbt_overhead.md").read_text() == speed.population_table(overhead) + "\n"


def test_differences_of_a_worked_example():
    """Over the seeds that both have: 10, 20 and 30 more, so 20 ± 10 / 3 ** 0.5."""
    assert plot.difference({1: 110, 2: 120, 3: 130, 4: 9e9}, {1: 100, 2: 100, 3: 100, 5: 0}) == "20 ± 6 (3)"


def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, message in (
        (["v4", "--results", "."], "nothing is stored of v4 in ."),
        (["runs", "nosuch"], "nosuch is not the folder of a run"),
    ):
        monkeypatch.setattr(sys, "argv", ["plot.py", *argv])
        with pytest.raises(SystemExit) as stop:
            plot.main()
        assert message in f"{stop.value}{capsys.readouterr().err}" and not list(tmp_path.iterdir())


def test_table_1_is_drawn_from_whole_data_and_its_curves_from_others(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "benchmark/results/ppo-table1.csv.gz", tmp_path)
    monkeypatch.setattr(plot, "curves", lambda *study: pytest.fail("its curves are drawn"))
    monkeypatch.setattr(sys, "argv", ["plot.py", "ppo-table1", "--results", str(tmp_path)])
    pytest.importorskip("scipy")
    plot.main()
    assert (tmp_path / "ppo-table1.png").stat().st_size > 20_000
    one = next(s for s in reproduce.STUDIES["ppo-table1"].settings)
    (tmp_path / "ppo-table1.csv.gz").unlink()
    row = {"global_step": 2048, "episodic_return": 9, "kl": 0, "learning_rate": 0}
    reproduce.store("ppo-table1", tmp_path, one, "Hopper-v4", 1, [row])
    drawn = []
    monkeypatch.setattr(plot, "curves", lambda *study: drawn.append(study))
    plot.main()
    assert drawn == [("ppo-table1", tmp_path)] and capsys.readouterr().out


def test_settings_are_frozen_and_distinct():
    for study in reproduce.STUDIES.values():
        assert len({s.name for s in study.settings}) == len(study.settings)
        assert len({(s.script, s.flags, s.env) for s in study.settings}) == len(study.settings)
        with pytest.raises(dataclasses.FrozenInstanceError):
            study.steps = 1


def test_run_folders_of_ones_own_are_drawn(tmp_path, monkeypatch):
    for name, last in (("a", 3), ("b", 2), ("c", 0)):  # c: no episode has ended
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text('{"env_id": "CartPole-v1"}')
        (tmp_path / name / "my_ppo.py").touch()
        rows = [f"{128 * i},{10.0 * i if last else 'nan'}" for i in range(1, last + 2)]
        (tmp_path / name / "progress.csv").write_text("\n".join(["global_step,episodic_return", *rows]))
    monkeypatch.chdir(tmp_path)
    plot.runs("a", "b", "c")
    assert (tmp_path / "runs.png").stat().st_size > 5000


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--seeds", "0"], ["--steps", "-1"]])
def test_numbers_that_cannot_work_are_refused(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "cartpole", *flags, "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert stop.value.code == 2 and "must be 1 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_row_of_the_gpus_table_is_a_command_that_its_script_accepts():
    names = [name for name, *_ in speed.gpu_rows("Hopper-v4", 0)]
    commands = [name.split() for name in names if name.split()[0].endswith(".py") and "--" in name]
    assert len(commands) >= 12 and {"--cuda", "--no-cuda"} <= {x for command in commands[:2] for x in command}
    for script, *flags in commands:
        if script != speed.SB3:
            module = importlib.import_module(Path(script).stem)
            module.check_args(module.parse_args([x for x in flags if x not in ("--cuda", "--compile")]))
