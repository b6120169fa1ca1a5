"""The contract of flags, run folders, exit statuses, checkpoints and resumption, held for every training script."""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import importlib
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_compiler
from waiting import killed_after, wait_for

BASE = ["--num-envs", "2", "--num-steps", "64", "--num-minibatches", "4"]
BASE += ["--no-compile", "--total-timesteps", "2048", "--checkpoint-every", "512"]
SMALL = ["--env-id", "CartPole-v1", "--update-epochs", "2", *BASE]
SMALL_TRPO = ["--env-id", "Pendulum-v1", "--vf-epochs", "2", *BASE]  # Box actions only; its epochs are the critic's
SMALL_MULTI = ["--update-epochs", "2", *BASE, "--num-steps", "32", "--num-envs", "4"]


def run(script, *flags, small=SMALL):
    """The script's own main(), in this process: its exit status."""
    try:
        return script.main([*small, *map(str, flags)])
    except SystemExit as stop:  # tyro's own errors
        return stop.code


def tensors(script, path):
    """Everything in a checkpoint that another run could differ in, as one flat dict."""
    state, flat = script.load_checkpoint(path), {}

    def walk(prefix, x):
        if isinstance(x, dict):
            for key, value in x.items():
                walk(f"{prefix}.{key}", value)
        elif prefix.split(".")[1] not in ("args", "wall_time"):
            flat[prefix] = x.tolist() if isinstance(x, torch.Tensor) else x

    walk("", state)
    return flat


def small_for(script):
    flags = {"trpo_continuous": SMALL_TRPO, "ppo_multiagent": SMALL_MULTI}.get(script.__name__, SMALL)
    return [*flags, "--num-workers", "0"]


def rows(path):
    # Read at once: csv would take the second line for the first of a file that is empty when it begins.
    return list(csv.DictReader((path / "progress.csv").read_text().splitlines()))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """small_run(script, *flags): the folder of that run, and what it printed. It is made once, for all who ask."""

    @functools.cache
    def made(script, *flags):
        folder = tmp_path_factory.mktemp(script.__name__) / "a"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert run(script, "--run-dir", folder, *flags, small=small_for(script)) == 0
        return folder, out.getvalue()

    return made


@pytest.fixture
def whole(trainer, small_run, tmp_path):
    """A copy of the small run's folder, to do with what one likes."""
    return shutil.copytree(small_run(trainer)[0], tmp_path / "whole")


@pytest.fixture
def half(trainer, small_run, tmp_path):
    """The same of a run that has stopped half-way, at a scheduled checkpoint."""
    return shutil.copytree(small_run(trainer, "--stop-at-step", 1024)[0], tmp_path / "half")


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_run_folder_and_summary(trainer, small_run):
    folder, out = small_run(trainer)
    summary = json.loads(out)
    assert summary["global_step"] == 2048 and summary["checkpoint"] == str(folder / "checkpoint.pt")
    names = {p.name for p in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {"args.json", "checkpoint.pt", "progress.csv", f"{trainer.__name__}.py"}
    args = json.loads((folder / "args.json").read_text())
    assert args["total_timesteps"] == 2048 and args["seed"] == 1
    assert args == vars(trainer.parse_args([*small_for(trainer), "--run-dir", str(folder)]))  # all of them
    table = rows(folder)
    first = ["global_step", "wall_time", "sps", "episodes", "episodic_return", "episodic_length"]
    assert list(table[0])[:6] == first
    assert [int(row["global_step"]) for row in table] == list(range(128, 2049, 128))
    assert float(table[-1]["episodic_return"]) == pytest.approx(summary["episodic_return"], rel=1e-5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    tags = {"charts/episodic_return", "charts/SPS", "charts/learning_rate"}  # CleanRL's names
    tags |= {"losses/kl"} if trainer.__name__ != "ppo_multiagent" else set()
    tags |= {f"losses/{key}" for key in ("policy_loss", "value_loss", "entropy", "explained_variance")}
    tags |= {"losses/approx_kl"} if trainer.__name__ != "trpo_continuous" else set()
    tags |= {"losses/clipfrac"} if hasattr(trainer.Args, "clip_coef") else set()
    assert tags <= set(board.Tags()["scalars"])
    last = board.Scalars("losses/entropy")[-1]
    assert last.step == 2048 and last.value == pytest.approx(float(table[-1]["entropy"]), rel=1e-4)


def test_train_twice_in_one_process_is_the_same_run(trainer, whole, tmp_path, monkeypatch):
    """The second one without --run-dir: in the default folder."""
    monkeypatch.chdir(tmp_path)
    assert run(trainer, small=small_for(trainer)) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    env_ids = {"trpo_continuous": "Pendulum-v1", "ppo_multiagent": "simple_spread"}
    env_id = env_ids.get(trainer.__name__, "CartPole-v1")
    assert re.fullmatch(rf"{env_id}__{trainer.__name__}__1__20\d{{6}}-\d{{6}}", folder.name)
    assert tensors(trainer, whole) == tensors(trainer, folder)
    assert run(trainer, "--run-dir", tmp_path / "c", "--seed", 2, small=small_for(trainer)) == 0
    assert tensors(trainer, whole) != tensors(trainer, tmp_path / "c")


@pytest.mark.slow
@needs_compiler
def test_compiled_runs_of_different_shapes_in_one_process(tmp_path, capsys):
    """Compiled code must be the code of this run: other shapes and flags in between change nothing."""
    import ppo_clip

    flags = {"a": [], "b": ["--env-id", "Pendulum-v1"], "c": ["--no-norm-adv"], "d": []}
    for name, more in flags.items():
        assert run(ppo_clip, "--run-dir", tmp_path / name, *more, "--compile") == 0
        assert "ppo_clip.py: compiling in the first iteration" in capsys.readouterr().err  # or it seems to hang
        assert run(ppo_clip, "--run-dir", tmp_path / f"{name}-eager", *more) == 0
        assert "compiling" not in capsys.readouterr().err
        ours, eager = (ppo_clip.load_checkpoint(tmp_path / x)["agent"] for x in (name, f"{name}-eager"))
        for key, x in ours.items():
            torch.testing.assert_close(x, eager[key], rtol=1e-3, atol=1e-4)
    assert tensors(ppo_clip, tmp_path / "a") == tensors(ppo_clip, tmp_path / "d")


def test_many_shapes_can_be_compiled_in_one_process(trainer, monkeypatch):
    """The limit is of what is traced, whoever compiles it; torch's own is 8."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=8):
        for n in range(1, 12):

            def epoch(x=torch.zeros(n)):  # noqa: B008
                return x + 1

            assert trainer.compiled(epoch, False)().shape == (n,)


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_uninterrupted(trainer, whole, tmp_path):
    assert run(trainer, "--run-dir", tmp_path / "parts", "--stop-at-step", 1000, small=small_for(trainer)) == 0
    assert int(rows(tmp_path / "parts")[-1]["global_step"]) == 1024
    assert trainer.main(["--resume", str(tmp_path / "parts")]) == 0  # every other flag comes from the checkpoint
    assert tensors(trainer, tmp_path / "parts") == tensors(trainer, whole)
    for a, b in zip(rows(tmp_path / "parts"), rows(whole), strict=True):
        drop = ("wall_time", "sps")
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


def test_resume_into_another_folder(trainer, half, whole, tmp_path):
    before = (half / "checkpoint.pt").read_bytes()
    assert trainer.main(["--resume", str(half / "checkpoint.pt"), "--run-dir", str(tmp_path / "b")]) == 0
    assert (half / "checkpoint.pt").read_bytes() == before
    assert tensors(trainer, tmp_path / "b") == tensors(trainer, whole)
    assert int(rows(tmp_path / "b")[0]["global_step"]) == 1152


def test_a_new_seed_begins_a_stream_of_its_own(trainer, half, tmp_path):
    """A population's clone must not repeat its donor's noise: --seed with --resume changes it."""
    for name, seed in (("same", 1), ("b", 7), ("c", 7), ("d", 8)):
        flags = ["--resume", half / "checkpoint.pt", "--run-dir", tmp_path / name, "--seed", seed]
        flags += ["--stop-at-step", 1152]  # one iteration
        assert trainer.main(list(map(str, flags))) == 0
    assert tensors(trainer, tmp_path / "b") == tensors(trainer, tmp_path / "c")
    streams = [tensors(trainer, tmp_path / name)[".rng"] for name in ("same", "b", "d")]
    assert streams[0] != streams[1] != streams[2] != streams[0]


def test_the_summary_holds_the_returns_of_this_call_only(trainer, tmp_path):
    flags = [*small_for(trainer), "--run-dir", str(tmp_path), "--stop-at-step", "1024"]
    first = trainer.train(trainer.parse_args(flags))
    assert len(first["returns"]) == min(first["episodes"], 100)
    assert first["episodic_return"] == pytest.approx(np.mean(first["returns"]))
    second = trainer.train(trainer.parse_args(["--resume", str(tmp_path)]))
    new = second["episodes"] - first["episodes"]
    assert len(second["returns"]) == new < 100 and new > 0
    window = [*first["returns"], *second["returns"]][-100:]
    assert second["episodic_return"] == pytest.approx(np.mean(window))
    assert trainer.train(trainer.parse_args(["--resume", str(tmp_path)]))["returns"] == []


def test_resume_with_nothing_left_to_do(trainer, whole):
    before = tensors(trainer, whole)
    assert trainer.main(["--resume", str(whole)]) == 0
    assert tensors(trainer, whole) == before and len(rows(whole)) == 16


def test_flags_beat_the_checkpoint(trainer, tmp_path):
    """And a run that becomes longer has a rate that falls over its new length."""
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 1024, "--gamma", 0.9, small=small_for(trainer))
    assert trainer.main(["--resume", str(tmp_path / "a"), "--gae-lambda", "0.5", "--total-timesteps", "4096"]) == 0
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    assert (args["gae_lambda"], args["gamma"], args["total_timesteps"]) == (0.5, 0.9, 4096)
    assert int(rows(tmp_path / "a")[-1]["global_step"]) == 4096
    if args.get("lr_schedule") == "linear":  # not trpo_continuous.py's
        rates = [float(rows(tmp_path / "a")[i]["learning_rate"]) / args["learning_rate"] for i in (7, 8)]
        assert rates == pytest.approx([1 - 896 / 2048, 1 - 1024 / 4096])


def test_schedules_and_switches_show_in_the_log(tmp_path):
    import ppo_clip

    def column(name, key, *flags):
        run(ppo_clip, "--run-dir", tmp_path / name, "--stop-at-step", 512, *flags)
        return [float(row[key]) for row in rows(tmp_path / name)]

    remaining = [1 - step / 2048 for step in (0, 128, 256, 384)]
    assert column("a", "learning_rate") == pytest.approx([3e-4 * x for x in remaining])
    assert column("a", "epochs") == [2] * 4
    assert column("b", "learning_rate", "--lr-schedule", "constant") == pytest.approx([3e-4] * 4)
    assert column("c", "clipfrac", "--clip-coef", "inf") == [0] * 4
    assert column("d", "epochs", "--target-kl", 1e-9) == [1] * 4


def test_learning_rate_flag_beats_the_adapted_rate(tmp_path):
    import ppo_clip

    adaptive = ["--lr-schedule", "kl-adaptive", "--kl-lr-target", 1.0]  # far too high: the rate doubles every time
    run(ppo_clip, "--run-dir", tmp_path / "a", "--stop-at-step", 512, *adaptive)
    assert [float(r["learning_rate"]) for r in rows(tmp_path / "a")] == pytest.approx([3e-4, 6e-4, 12e-4, 24e-4])
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")])
    assert float(rows(tmp_path / "b")[0]["learning_rate"]) == pytest.approx(48e-4)  # it is in the checkpoint
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "c"), "--learning-rate", "1e-4"])
    assert float(rows(tmp_path / "c")[0]["learning_rate"]) == pytest.approx(1e-4)
    fixed = ["--lr-schedule", "linear", "--learning-rate", "1e-3"]
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "d"), *fixed])
    assert float(rows(tmp_path / "d")[0]["learning_rate"]) == pytest.approx(1e-3 * (1 - 512 / 2048))


KL_ADAPTIVE = ["--lr-schedule", "kl-adaptive", "--kl-lr-target", "1"]


@pytest.mark.parametrize(
    "name,adaptive,flag,column",
    [
        ("ppo_clip", KL_ADAPTIVE, ("--learning-rate", 1e-4), "learning_rate"),
        ("ppo_klpen", ["--kl-target", "1"], ("--beta-init", 5.0), "beta"),
        ("trpo_continuous", ["--form", "penalized", "--beta-schedule", "adaptive"], ("--beta", 5.0), "beta"),
    ],
)
def test_a_flag_given_to_a_branch_outlives_its_death(name, adaptive, flag, column, tmp_path, monkeypatch):
    """The branch dies in its first iteration: its first checkpoint must not bring the adapted value back."""
    script = importlib.import_module(name)
    run(script, "--run-dir", tmp_path / "a", "--stop-at-step", 512, *adaptive, small=small_for(script))

    def die(*args, **kwargs):
        raise script.RunFailed("dead")

    with monkeypatch.context() as patch:
        patch.setattr(script.Actors, "collect", die)
        branch = ["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b"), flag[0], str(flag[1])]
        assert script.main(branch) == 1
    assert script.main(["--resume", str(tmp_path / "b"), "--stop-at-step", "640"]) == 0
    assert float(rows(tmp_path / "b")[0][column]) == pytest.approx(flag[1])


def test_rows_past_the_checkpoint_are_cut_off(trainer, half):
    path = half / "progress.csv"
    kept = path.read_text()
    path.write_text(kept + kept.splitlines()[-1].replace("1024", "1152", 1) + "\n1280,3.3,")  # as a crash leaves it
    assert trainer.main(["--resume", str(half), "--stop-at-step", "1152"]) == 0
    assert path.read_text().startswith(kept)
    assert [int(row["global_step"]) for row in rows(half)] == list(range(128, 1153, 128))


@pytest.mark.slow
def test_ten_sigkills_change_nothing(trainer, tmp_path, cli):
    """The run or, every third time, its worker is killed at random moments of start-up and training, and the run is
    resumed each time: the same final bits. For other moments: KILLS=1 pytest -k ten_sigkills."""
    flags = [*small_for(trainer), "--total-timesteps", 20480, "--checkpoint-every", 1024]
    assert cli(trainer.__name__, *flags, "--run-dir", "whole").returncode == 0
    chance, progress, killed = (
        random.Random(int(os.environ.get("KILLS", 0))),
        tmp_path / "killed" / "progress.csv",
        tmp_path / "killed",
    )

    def start(**kwargs):
        begun = ["--resume", "killed"] if (killed / "checkpoint.pt").exists() else [*flags, "--run-dir", "killed"]
        return cli(trainer.__name__, *begun, "--num-workers", 2, **kwargs)

    def seen():
        return progress.stat().st_mtime_ns if progress.exists() else None

    for kill in range(10):
        before, process = seen(), start(wait=False, fresh=kill == 0)
        start_up = time.monotonic() + chance.uniform(0, 3 if kill == 0 else 0.2)
        training = lambda: seen() != before  # noqa: B023, E731
        wait_for(lambda: training() or kill % 3 == 0 and time.monotonic() > start_up, process)  # noqa: B023
        if kill % 3:
            further = len(rows(killed)) + chance.randrange(12)  # a checkpoint is written every eight rows
            wait_for(lambda: len(rows(killed)) >= further, process)  # noqa: B023
            time.sleep(chance.uniform(0, 0.01))
        assert process.poll() is None, "the run ended before its tenth kill"
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[0]) if workers and kill % 3 == 2 else process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert start().returncode == 0
    assert tensors(trainer, killed) == tensors(trainer, tmp_path / "whole")


# ---- mistakes: one line, status 2, nothing written -------------------------------------------------------------------


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MISTAKES = [
    (["--env-id", "Hoper-v4"], "Hoper"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-id", "toy_envs:TupleActions-v0"], "action space"),
    (["--num-minibatches", "5"], "divide"),
    (["--num-envs", "0"], "--num-envs 0 must be"),
    (["--total-timesteps", "100"], "shorter than one iteration"),
    (["--gamma", "1.5"], "--gamma 1.5 must"),
    (["--capture-video"], "--evaluate"),
    (["--resume", "nowhere"], "there is no checkpoint"),
    (["--evaluate", "nowhere"], "there is no checkpoint"),
    pytest.param(["--cuda"], "CUDA", marks=no_gpu),
]


@pytest.mark.parametrize("flags,message", MISTAKES)
def test_a_mistake_is_one_line(trainer, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if trainer.__name__ == "ppo_multiagent":
        flags = [x.replace("toy_envs:TupleActions-v0", "toy_parallel.mixed") for x in flags]
    assert run(trainer, *flags, small=small_for(trainer)) == 2
    assert message in one_line(capsys, trainer)
    assert not list(tmp_path.iterdir())


def test_advantages_of_single_samples_cannot_be_normalised(ppo, tmp_path, capsys):
    flags = ["--num-minibatches", 128, "--run-dir", tmp_path / "a", "--stop-at-step", 128]
    assert run(ppo, *flags) == 2
    assert "at least 2" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run(ppo, *flags, "--no-norm-adv") == 0


OUT_OF_RANGE = ["--seed -1", f"--seed {2**70}", "--gamma nan", "--gae-lambda -0.1", "--learning-rate inf"]
OUT_OF_RANGE += ["--learning-rate 0.0", "--stop-at-step 0", "--stop-at-step -5", "--checkpoint-every 0"]
OUT_OF_RANGE += ["--max-grad-norm nan", "--num-workers -1", "--vf-coef -1.0", "--ent-coef inf"]
OUT_OF_RANGE += ["--target-kl nan", "--target-kl -1.0", "--clip-coef nan"]
OUT_OF_RANGE += ["--total-timesteps 0", "--update-epochs 0", "--num-minibatches 0"]
OUT_OF_RANGE += ["--kl-lr-band 0.5 --lr-schedule kl-adaptive", "--kl-lr-target nan --lr-schedule kl-adaptive"]
UNREADABLE = [
    ("--gamma x", "--gamma"),
    ("--gamma", "--gamma"),
    ("--num-envs 2.5", "--num-envs"),
    ("--lr-schedule sometimes", "--lr-schedule"),
    ("--no-such-flag 3", "--no-such-flag"),
]


def one_line(capsys, script):
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith(f"{script.__name__}.py: ") and not out
    return err


def test_numbers_out_of_range_and_unreadable_flags(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def known(text):
        return all(hasattr(trainer.Args, x[2:].replace("-", "_")) for x in text.split() if x.startswith("--"))

    texts = list(filter(known, OUT_OF_RANGE))
    assert len(texts) >= 10
    for text in texts:
        assert run(trainer, *text.split(), small=small_for(trainer)) == 2, text
        assert f"{' '.join(text.split()[:2])} must be" in one_line(capsys, trainer)
    for text, flag in UNREADABLE:
        assert run(trainer, *text.split(), small=small_for(trainer)) == 2, text
        assert flag in one_line(capsys, trainer)
    assert not list(tmp_path.iterdir())


def test_an_unreadable_flag_is_one_plain_line_on_a_terminal_too(trainer, monkeypatch, capsys):
    """tyro colours its box where there is a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(trainer, "--gamma", "x", small=[]) == 2
    err = one_line(capsys, trainer)
    assert err == f"{trainer.__name__}.py: Error parsing --gamma: could not convert string to float: 'x'\n"


def test_values_of_another_type_are_refused_from_python_too(trainer, tmp_path):
    """NumPy's would make checkpoints that cannot be loaded without running code; a name that is none of a flag's would
    choose one in silence. A whole number will do for a float."""
    wrong = [("gamma", np.float64(0.9)), ("num_steps", np.int64(64)), ("run_dir", tmp_path / "a"), ("gamma", None)]
    wrong += [("num_envs", "2"), ("num_envs", 2.0), ("compile", "no"), ("resume", 3)]
    wrong += [(key, "cosine") for key in ("lr_schedule", "form", "algorithm") if hasattr(trainer.Args, key)]
    for key, x in wrong:
        with pytest.raises(trainer.UserError, match=f"{key} is .*, not of "):
            trainer.train(trainer.Args(**{key: x}))
    assert not (tmp_path / "a").exists()
    args = trainer.Args(gamma=1, compile=False)
    trainer.check_args(args)
    assert type(args.gamma) is float


def test_a_flag_of_a_copys_own_may_be_of_any_type(trainer):
    own = [("sizes", tuple[int, ...], (64, 64)), ("kind", Literal["a", "b"] | None, None), ("names", list[str], None)]
    own = [(name, kind, dataclasses.field(default=x)) for name, kind, x in own]
    Own = dataclasses.make_dataclass("Own", own, bases=(trainer.Args,))
    trainer.check_args(Own(compile=False, kind="b", names=["x"]))
    with pytest.raises(trainer.UserError, match="kind is 'c', not of"):
        trainer.check_args(Own(compile=False, kind="c", names=["x"]))


def test_the_ends_of_a_range_are_allowed(trainer):
    for text in ("--seed 0", "--gamma 0", "--gamma 1", "--gae-lambda 0", "--gae-lambda 1", "--num-workers 0"):
        trainer.check_args(trainer.parse_args(text.split()))


@pytest.mark.parametrize("flag", ["--resume", "--run-dir", "--evaluate", "--env-id"])
def test_an_empty_word_is_not_a_missing_flag(trainer, flag, tmp_path, monkeypatch, capsys):
    """`--resume "$RUN"`, where RUN is not set, must not begin a new run."""
    monkeypatch.chdir(tmp_path)
    assert run(trainer, flag, "", small=small_for(trainer)) == 2
    assert f"{flag} is empty" in one_line(capsys, trainer) and not list(tmp_path.iterdir())


USELESS = [
    ("--eval-episodes 3", "--eval-episodes goes with --evaluate"),
    ("--kl-lr-target 0.1", "--kl-lr-target goes with --lr-schedule kl-adaptive"),
    ("--kl-lr-band=2", "--kl-lr-band goes with --lr-schedule kl-adaptive"),
    ("--beta-schedule fixed --kl-target 0.1", "--kl-target goes with --beta-schedule adaptive"),
]


def test_flags_that_do_nothing_are_refused(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text, message in USELESS:
        names = [x.split("=")[0][2:].replace("-", "_") for x in text.split() if x.startswith("--")]
        if all(hasattr(trainer.Args, name) for name in names):
            assert run(trainer, *text.split(), small=small_for(trainer)) == 2, text
            assert message in one_line(capsys, trainer)
    assert not list(tmp_path.iterdir())


def test_compiling_is_the_default_where_it_pays(trainer, monkeypatch):
    for steps, found, expected in ((200_000, True, True), (199_999, True, False), (200_000, False, False)):
        monkeypatch.setattr(trainer, "can_compile", lambda found=found: found)
        assert trainer.parse_args(["--total-timesteps", str(steps)]).compile == expected


def test_what_compiling_needs(trainer, tmp_path, monkeypatch, capsys):
    """A compiler without Python's header files, or the other way round, is found before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Python.h").touch()
    for compiler, headers, expected in (("g++", tmp_path, True), (None, tmp_path, False), ("g++", "/nowhere", False)):
        monkeypatch.setattr(trainer.shutil, "which", lambda name, compiler=compiler: compiler)
        monkeypatch.setattr(trainer.sysconfig, "get_path", lambda name, headers=headers: str(headers))
        assert trainer.can_compile() == expected
    assert run(trainer, "--compile", small=[x for x in small_for(trainer) if x != "--no-compile"]) == 2
    assert "--compile needs a C++ compiler and Python's headers" in one_line(capsys, trainer)
    assert [p.name for p in tmp_path.iterdir()] == ["Python.h"]


def test_flags_that_do_nothing_beside_evaluate(trainer, whole, capsys):
    for flag in ("--no-compile", "--gamma=0.9", "--num-workers=2", "--resume=x"):
        assert trainer.main(["--evaluate", str(whole), flag]) == 2
        assert "does nothing with --evaluate" in one_line(capsys, trainer)
    assert trainer.main(["--evaluate", str(whole), "--eval-episodes", "0"]) == 2
    assert "--eval-episodes 0 must be positive" in one_line(capsys, trainer)


def test_a_stored_kl_lr_target_does_not_forbid_another_schedule(ppo, tmp_path):
    """Only flags that are given now can be in vain, not those of the run that is resumed."""
    flags = ["--lr-schedule", "kl-adaptive", "--kl-lr-target", 0.02, "--stop-at-step", 512]
    assert run(ppo, "--run-dir", tmp_path, *flags) == 0
    assert ppo.main(["--resume", str(tmp_path), "--lr-schedule", "linear", "--stop-at-step", "640"]) == 0


@pytest.mark.parametrize(
    "path,message", [("file", "File exists"), ("file/b", "Not a directory"), ("/proc/x/y", "No such")]
)
def test_a_run_dir_that_cannot_be_one(trainer, path, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert run(trainer, "--run-dir", path, small=small_for(trainer)) == 2
    assert message in one_line(capsys, trainer)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_images_are_refused(ppo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(ppo, "--env-id", "toy_envs:Image-v0") == 2
    assert "observations of shape (8, 8, 3); this script is for vectors" in one_line(capsys, ppo)


@pytest.mark.slow
def test_two_processes_in_one_folder(trainer, tmp_path, cli):
    flags, name = [*small_for(trainer), "--total-timesteps", 10_000_000, "--run-dir", "a"], trainer.__name__
    process = cli(name, *flags, wait=False)
    wait_for(lambda: (tmp_path / "a" / "progress.csv").exists() and len(rows(tmp_path / "a")) >= 3, process)
    second = cli(name, "--resume", "a")
    assert second.returncode == 2 and second.stderr == f"{name}.py: a: another process is using it\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    steps = [int(row["global_step"]) for row in rows(tmp_path / "a")]
    assert process.returncode == 143 and steps == list(range(128, steps[-1] + 1, 128))


def test_a_progress_file_that_this_script_did_not_write(trainer, half, tmp_path, capsys):
    """In a run's folder, or, as Stable-Baselines3 has a file of this name, too, in another program's."""
    before = (half / "checkpoint.pt").read_bytes()
    for garbage in (b"who\nwrote\nthis\n", b"\xff\xfe\n\xff\n", b"global_step,sps\n\n"):
        (half / "progress.csv").write_bytes(garbage)
        assert trainer.main(["--resume", str(half)]) == 2
        assert "progress.csv is not what this script wrote" in one_line(capsys, trainer)
        assert (half / "progress.csv").read_bytes() == garbage
    assert (half / "checkpoint.pt").read_bytes() == before
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "progress.csv").write_text("time/fps,loss\n1,2\n")
    assert run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer)) == 2
    assert "progress.csv is not what this script wrote" in one_line(capsys, trainer)
    assert [p.read_text() for p in (tmp_path / "a").iterdir()] == ["time/fps,loss\n1,2\n"]


def test_a_checkpoint_of_another_network_or_observation(ppo, tmp_path, capsys, monkeypatch):
    run(ppo, "--run-dir", tmp_path / "a", "--stop-at-step", 512)
    mlp = ppo.mlp
    monkeypatch.setattr(ppo, "mlp", lambda *sizes, **gains: mlp(*sizes, **gains, hidden=(32, 32)))
    for flags in (["--resume", tmp_path / "a", "--run-dir", tmp_path / "b"], ["--evaluate", tmp_path / "a"]):
        capsys.readouterr()
        assert ppo.main(list(map(str, flags))) == 2
        assert "does not fit this agent: size mismatch for critic.4.weight" in one_line(capsys, ppo)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_mujoco_is_imported_only_where_it_is_needed(ppo, tmp_path, cli, monkeypatch):
    """Seen by a fresh interpreter, whose exit status and streams are looked at, too."""
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    cartpole = ["--env-id", "CartPole-v1", "--run-dir", "a", "--stop-at-step", 128]
    assert cli(ppo.__name__, *SMALL, *cartpole, fresh=True).returncode == 0
    process = cli(ppo.__name__, *SMALL, "--env-id", "Hopper-v4", "--run-dir", "b", fresh=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "MUJOCO_GL" in process.stderr
    assert process.stdout == ""


def test_an_environment_without_render_mode_and_one_that_fails_in_evaluation(ppo, tmp_path, capsys, monkeypatch):
    import toy_envs

    assert run(ppo, "--env-id", "toy_envs:NoRenderMode-v0", "--run-dir", tmp_path) == 0
    capsys.readouterr()
    assert ppo.main(["--evaluate", str(tmp_path), "--eval-episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["returns"] == [5, 5]

    def step(self, action):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(toy_envs.NoRenderMode, "step", step)
    assert ppo.main(["--evaluate", str(tmp_path)]) == 1
    assert "episode 0: step() raised ZeroDivisionError: a bug (test_contract.py, line " in one_line(capsys, ppo)

    monkeypatch.setattr(toy_envs.NoRenderMode, "step", lambda self, action: (np.zeros(1), np.nan, False, False, {}))
    assert ppo.main(["--evaluate", str(tmp_path)]) == 1
    assert "episode 0: step() returned [0.] and nan: not finite" in one_line(capsys, ppo)


@pytest.mark.slow
def test_the_scripts_own_copy_resumes_its_folder(trainer, half, tmp_path, cli):
    process = cli(f"half/{trainer.__name__}.py", "--resume", "half")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["global_step"] == 2048


@pytest.mark.slow
def test_a_copy_under_another_name_has_runs_of_its_own(trainer, half, tmp_path, cli):
    name = trainer.__name__
    shutil.copy(ROOT / f"{name}.py", tmp_path / "my_ppo.py")
    command = ["my_ppo.py", *small_for(trainer), "--stop-at-step", "128", "--run-dir"]
    first = cli(*command, "mine")
    assert first.returncode == 0 and first.stderr.startswith("my_ppo.py: ")
    assert torch.load(tmp_path / "mine" / "checkpoint.pt", weights_only=True)["script"] == "my_ppo"
    second = cli(*command, "x", "--resume", "half")
    assert second.returncode == 2 and re.search(rf"is of {name}.py on [\w-]+, not of my_ppo.py", second.stderr)


@pytest.mark.slow
def test_json_is_valid_and_a_closed_pipe_is_no_traceback(trainer, tmp_path, cli):
    name = trainer.__name__
    env = ["--num-steps", 16, "--num-envs", 8] if name == "ppo_multiagent" else ["--env-id", "Pendulum-v1"]
    small = [*small_for(trainer), *env]
    process = cli(name, *small, "--total-timesteps", 128, "--run-dir", "a")
    summary = json.loads(process.stdout, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert summary["episodes"] == 0 and summary["episodic_return"] is None
    for flags in (["--help"], ["--evaluate", "a"]):
        closed = cli(name, *flags, wait=False, fresh=name == "ppo_clip")
        closed.stdout.close()
        with killed_after(60, closed):
            assert closed.stderr.read() == "" and closed.wait() == 0


@pytest.mark.slow
def test_what_a_person_sees(trainer, tmp_path, cli):
    flags, name = [*small_for(trainer), "--checkpoint-every", 4000], trainer.__name__  # so that it cuts nothing off
    process = cli(name, *flags, "--run-dir", "a")
    env_id = {"ppo_multiagent": "simple_spread", "trpo_continuous": "Pendulum-v1"}.get(name, "CartPole-v1")
    lines = process.stderr.splitlines()
    assert lines[0] == f"{name}.py: {env_id}, seed 1, run folder a"
    assert [line.split(": ")[1] for line in lines[1:]] == ["to evaluate", "to go on", "to plot"]
    commands = [line.split(": ", 2)[2].strip() for line in lines[1:]]
    script = os.path.relpath(trainer.__file__, tmp_path)  # from the folder in which it was started
    assert commands[0] == f"python {script} --evaluate a" and commands[2] == "tensorboard --logdir a"
    again = cli(name, *commands[1].split()[2:])
    assert again.returncode == 0 and json.loads(again.stdout)["global_step"] == 4096
    finished = cli(name, "--resume", "a")
    assert finished.returncode == 0 and "nothing to do: a is at step 4096 already" in finished.stderr


@pytest.mark.slow
def test_the_bar_ends_whole(trainer, tmp_path, cli):
    """On a terminal: one bar, one speed, and 100 % at the end also where the last iteration passes the total."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    flags = [*small_for(trainer), "--total-timesteps", "1000", "--run-dir", tmp_path / "a"]
    process = cli(trainer.__name__, *flags, wait=False, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with killed_after(60, process), contextlib.suppress(OSError):  # the other side has closed
        while part := os.read(ours, 4096):
            seen += part
    assert process.wait(timeout=60) == 0
    bars = [line for line in re.split(r"[\r\n]+", seen.decode()) if "steps/s" in line]
    assert bars[-1].startswith("100%") and "1024/1024" in bars[-1] and "return" in bars[-1]
    assert all(line.count("steps/s") == 1 for line in bars)


def test_a_checkpoint_elsewhere_is_no_run_folder(trainer, tmp_path, monkeypatch, capsys):
    """A copy of a checkpoint that lies in a folder of other things begins a folder of its own."""
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 512, small=small_for(trainer))
    run(trainer, "--run-dir", tmp_path / "b", "--stop-at-step", 512, small=small_for(trainer))
    shutil.copy(tmp_path / "a" / "checkpoint.pt", tmp_path / "b" / "best.pt")
    before = contents(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert trainer.main(["--resume", "b/best.pt", "--stop-at-step", "512"]) == 0  # nothing to do, so no folder
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "b/best.pt" and not Path("runs").exists()
    assert trainer.main(["--resume", "b/best.pt", "--stop-at-step", "640"]) == 0
    assert contents(tmp_path / "b") == before
    (folder,) = (tmp_path / "runs").iterdir()
    assert trainer.load_checkpoint(folder)["global_step"] == 640
    assert trainer.main(["--resume", "a/checkpoint.pt", "--stop-at-step", "640"]) == 0  # but this one is of its folder
    assert trainer.load_checkpoint(tmp_path / "a")["global_step"] == 640


def test_a_checkpoint_runs_no_code(trainer, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    monkeypatch.chdir(tmp_path)
    torch.save({"script": trainer.__name__, "args": {"env_id": "x"}, "bad": Payload()}, "bad.pt")
    with pytest.raises(trainer.UserError, match="is damaged"):
        trainer.load_checkpoint("bad.pt")
    assert not Path("ran").exists()


def test_a_checkpoint_is_flushed_before_it_is_renamed(trainer, tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, f=original, name=name: (calls.append(name), f(*x)))
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 128, small=small_for(trainer))
    assert calls == ["fsync", "replace"] * 2


def test_a_copy_that_logs_something_else_does_not_mix_up_columns(tmp_path, capsys, monkeypatch):
    import ppo_clip

    run(ppo_clip, "--run-dir", tmp_path / "a", "--stop-at-step", 512)
    before, log = (tmp_path / "a" / "progress.csv").read_text(), ppo_clip.Run.log
    monkeypatch.setattr(ppo_clip.Run, "log", lambda self, *x: log(self, *x[:-1], {"mine": 1.0} | x[-1]))
    assert ppo_clip.main(["--resume", str(tmp_path / "a")]) == 1
    assert "progress.csv has other columns: resume into a new --run-dir" in capsys.readouterr().err
    assert (tmp_path / "a" / "progress.csv").read_text() == before
    assert ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")]) == 0
    assert rows(tmp_path / "b")[0]["mine"] == "1"


@pytest.mark.parametrize("error,status", [(OSError(38, "Function not implemented"), 0), (BlockingIOError(), 2)])
def test_file_systems_without_locks(error, status, tmp_path, monkeypatch):
    """Some clusters' file systems have none: that is no reason not to train."""
    import ppo_clip

    def flock(file, how):
        raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(ppo_clip, "--run-dir", tmp_path / "a") == status


def test_without_a_terminal_there_are_lines(trainer, tmp_path, capsys, monkeypatch):
    tqdm = trainer.tqdm

    def impatient(**more):
        assert more.pop("mininterval") == 10
        return tqdm(mininterval=0, **more)

    monkeypatch.setattr(trainer, "tqdm", impatient)
    assert run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer)) == 0
    assert len([line for line in capsys.readouterr().err.splitlines() if "steps/s, return" in line]) == 16


@pytest.mark.slow
def test_nobody_who_reads_is_no_reason_to_stop(tmp_path, cli):
    """`python ppo_clip.py ... 2>&1 | head -1`: the run goes on, and its status is that of the run."""
    process = cli("ppo_clip", *SMALL, "--run-dir", "a", wait=False, fresh=True)
    process.stderr.close()
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and len(rows(tmp_path / "a")) == 16
    failing = cli("ppo_clip", *SMALL, "--env-id", "toy_envs:Broken-step-raise-v0", "--run-dir", "b", wait=False)
    failing.stderr.close()
    failing.stdout.close()
    assert failing.wait(timeout=120) == 1


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_that_holds_another_run(trainer, whole, capsys):
    before = contents(whole)
    assert run(trainer, "--run-dir", whole, small=small_for(trainer)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert contents(whole) == before


def test_damaged_and_foreign_checkpoints(trainer, whole, tmp_path, capsys):
    checkpoint, good = (whole / "checkpoint.pt").read_bytes(), tensors(trainer, whole)
    flipped = [bytearray(checkpoint) for _ in range(20)]
    for seed, blob in enumerate(flipped):
        blob[random.Random(seed).randrange(len(blob))] ^= 1 << seed % 8
    for blob in (b"", checkpoint[:1000], checkpoint[: len(checkpoint) // 2]):
        (tmp_path / "bad.pt").write_bytes(blob)
        assert trainer.main(["--resume", str(tmp_path / "bad.pt"), "--run-dir", str(tmp_path / "b")]) == 2
        assert "is damaged" in one_line(capsys, trainer)
    ours = {"script": trainer.__name__}
    for foreign in ({"weights": torch.zeros(3)}, torch.zeros(3), ours, ours | {"args": {"env_id": "CartPole-v1"}}):
        torch.save(foreign, tmp_path / "bad.pt")  # whole, but not ours
        assert trainer.main(["--resume", str(tmp_path / "bad.pt")]) == 2
        assert capsys.readouterr().err.endswith(f"is damaged, or no checkpoint of {trainer.__name__}.py\n")
    refused = 0
    for blob in flipped:  # a flipped bit is noticed, or lies where nothing is stored
        (tmp_path / "bad.pt").write_bytes(blob)
        try:
            assert tensors(trainer, tmp_path / "bad.pt") == good
        except trainer.UserError:
            refused += 1
    assert refused >= 15
    torch.save(trainer.load_checkpoint(whole) | {"script": "something_else"}, tmp_path / "foreign.pt")
    assert trainer.main(["--resume", str(tmp_path / "foreign.pt")]) == 2
    assert "something_else.py" in capsys.readouterr().err
    assert trainer.main(["--resume", str(whole), "--env-id", "Acrobot-v1"]) == 2
    assert re.search(r"not of (\w+.py on )?Acrobot-v1", capsys.readouterr().err)
    assert not (tmp_path / "b").exists()
    assert torch.load(whole / "checkpoint.pt", weights_only=True)["global_step"] == 2048  # plain torch reads it, too


# ---- failures: one line, status 1, the last checkpoint stays ---------------------------------------------------------


def test_a_failure_after_a_signal_is_no_clean_stop(tmp_path, capsys, monkeypatch):
    import ppo_clip

    def fail(self, *args):
        self.signal = signal.SIGTERM
        raise ppo_clip.RunFailed("the disk is full")

    monkeypatch.setattr(ppo_clip.Run, "log", fail)
    assert run(ppo_clip, "--run-dir", tmp_path / "a") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ppo_clip.py: the disk is full"


def test_the_command_to_go_on_is_about_the_same_run_or_a_longer_one(trainer, tmp_path, monkeypatch, capsys):
    """It works from another folder than the script's. The run of 2000 steps ends at 2048, after whole iterations."""
    monkeypatch.chdir(tmp_path)
    flags, script = ["--run-dir", "a b"], os.path.relpath(trainer.__file__)
    for more, end in ((["--stop-at-step", "512"], ""), ([], " --total-timesteps 4096")):
        assert trainer.main([*small_for(trainer), "--total-timesteps", "2000", *flags, *more]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert f"{trainer.__name__}.py: to go on:    python {script} --resume 'a b'{end}" in lines
        flags = ["--resume", "a b"]


def test_checkpoints_that_cut_off_long_episodes_are_a_line(tmp_path, capsys):
    import ppo_clip

    line = "checkpoints cut off all episodes every {} steps, so few long ones count: see --checkpoint-every\n"
    for every, told in ((512, True), (4000, False)):  # CartPole-v1 has up to 500 steps; two environments
        flags = ["--run-dir", tmp_path / str(every), "--stop-at-step", 128, "--checkpoint-every", every]
        assert run(ppo_clip, *flags) == 0
        assert (f"ppo_clip.py: {line}".format(every // 2) in capsys.readouterr().err) == told


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    import ppo_clip

    assert run(ppo_clip, "--run-dir", tmp_path / "a", "--learning-rate", 1e18, "--max-grad-norm", 1e18) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "is nan at step" in err or "is inf at step" in err
    assert ppo_clip.load_checkpoint(tmp_path / "a")["global_step"] == 0


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(trainer, half, cli):
    """A limit on the size of files stands for the full disk: the write fails half-way, with an OSError as there."""
    before = (half / "checkpoint.pt").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000,) * 2)

    process = cli(trainer.__name__, "--resume", "half", preexec_fn=small_files)
    assert process.returncode == 1
    assert "File too large" in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr, process.stderr
    assert (half / "checkpoint.pt").read_bytes() == before and not (half / "checkpoint.pt.tmp").exists()


# ---- other observations and actions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["DictObs", "OffsetActions", "BoxTarget", "Endless"])
def test_spaces(script, tmp_path, env):
    discrete_refused = script.__name__ == "trpo_continuous" and env != "BoxTarget"
    status = run(script, "--env-id", f"toy_envs:{env}-v0", "--run-dir", tmp_path / "a", small=small_for(script))
    assert status == (2 if discrete_refused else 0)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_prints_one_json_line(trainer, whole, capsys):
    before, lines = contents(whole), []
    for _ in range(2):
        assert trainer.main(["--evaluate", str(whole), "--eval-episodes", "3"]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and lines[0].count("\n") == 1
    result = json.loads(lines[0])
    assert set(result) - {"mean_by_agent"} == {"mean", "std", "returns"} and len(result["returns"]) == 3
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert result["std"] == pytest.approx(np.std(result["returns"])) and contents(whole) == before


def test_what_a_gpu_has_trained_is_evaluated_without_one(trainer, half, monkeypatch):
    state = torch.load(half / "checkpoint.pt", weights_only=True)
    state["args"]["cuda"] = True
    torch.save(state, half / "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trainer.main(["--evaluate", str(half), "--eval-episodes", "1"]) == 0
    assert trainer.main(["--resume", str(half)]) == 2


def test_capture_video(tmp_path, capsys, monkeypatch):
    import ppo_clip

    run(ppo_clip, "--env-id", "toy_envs:Picture-v0", "--run-dir", tmp_path / "a")
    run(ppo_clip, "--env-id", "toy_envs:Unrenderable-v0", "--run-dir", tmp_path / "b")
    run(ppo_clip, "--env-id", "toy_envs:NoRenderMode-v0", "--run-dir", tmp_path / "c")
    monkeypatch.setitem(sys.modules, "moviepy", None)
    capsys.readouterr()
    assert ppo_clip.main(["--evaluate", str(tmp_path / "a"), "--capture-video"]) == 2
    assert "MoviePy is not installed, run `pip install" in one_line(capsys, ppo_clip)
    monkeypatch.undo()
    pytest.importorskip("moviepy", reason="optional package moviepy is not installed")
    assert ppo_clip.main(["--evaluate", str(tmp_path / "a"), "--capture-video", "--eval-episodes", "2"]) == 0
    videos = sorted((tmp_path / "a" / "videos").iterdir())
    assert [v.suffix for v in videos] == [".mp4", ".mp4"] and all(v.stat().st_size > 0 for v in videos)
    capsys.readouterr()
    assert ppo_clip.main(["--evaluate", str(tmp_path / "b"), "--capture-video"]) == 1
    err = one_line(capsys, ppo_clip)
    assert "raised RuntimeError: no display (toy_envs.py, line " in err and "MUJOCO_GL=egl" in err
    assert ppo_clip.main(["--evaluate", str(tmp_path / "c"), "--capture-video"]) == 1
    one_line(capsys, ppo_clip)


@pytest.mark.slow
def test_no_noise_and_no_stray_files(tmp_path, cli):
    """The v4 environments train without a warning on the terminal or a MUJOCO_LOG.TXT in the working folder."""
    flags = ["--env-id", "HalfCheetah-v4", "--total-timesteps", 2048, "--run-dir", "a", "--no-compile"]
    process = cli("ppo_clip", *flags, fresh=True)
    assert process.returncode == 0
    assert all(line.startswith("ppo_clip.py: ") for line in process.stderr.splitlines())
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
