"""The contract of flags, run folders, exit statuses, checkpoints and resumption, held for every training script."""

import csv
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import TRAINING

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
    return {"trpo_continuous": SMALL_TRPO, "ppo_multiagent": SMALL_MULTI}.get(script.__name__, SMALL)


def rows(path):
    with open(path / "progress.csv") as file:
        return list(csv.DictReader(file))


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_run_folder_and_summary(trainer, tmp_path, capsys):
    assert run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["global_step"] == 2048 and summary["checkpoint"] == str(tmp_path / "a" / "checkpoint.pt")
    names = {p.name for p in (tmp_path / "a").iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {"args.json", "checkpoint.pt", "progress.csv", f"{trainer.__name__}.py"}
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    assert args["total_timesteps"] == 2048 and args["seed"] == 1
    table = rows(tmp_path / "a")
    first = ["global_step", "wall_time", "sps", "episodes", "episodic_return", "episodic_length"]
    assert list(table[0])[:6] == first
    assert [int(row["global_step"]) for row in table] == list(range(128, 2049, 128))
    assert float(table[-1]["episodic_return"]) == pytest.approx(summary["episodic_return"], rel=1e-5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "a")).Reload()
    assert {"charts/episodic_return", "charts/SPS", "charts/learning_rate", "losses/kl"} <= set(board.Tags()["scalars"])
    last = board.Scalars("losses/kl")[-1]
    assert last.step == 2048 and last.value == pytest.approx(float(table[-1]["kl"]), rel=1e-4)


def test_default_run_folder(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(trainer, small=small_for(trainer)) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    env_ids = {"trpo_continuous": "Pendulum-v1", "ppo_multiagent": "simple_spread"}
    env_id = env_ids.get(trainer.__name__, "CartPole-v1")
    assert folder.name.startswith(f"{env_id}__{trainer.__name__}__1__20")


def test_train_twice_in_one_process_is_the_same_run(trainer, tmp_path):
    for name in "ab":
        assert run(trainer, "--run-dir", tmp_path / name, small=small_for(trainer)) == 0
    assert tensors(trainer, tmp_path / "a") == tensors(trainer, tmp_path / "b")
    assert run(trainer, "--run-dir", tmp_path / "c", "--seed", 2, small=small_for(trainer)) == 0
    assert tensors(trainer, tmp_path / "a") != tensors(trainer, tmp_path / "c")


def test_compiled_runs_of_different_shapes_in_one_process(tmp_path):
    """Unguarded compiled code must still be the code of this run: other shapes and flags in between change nothing."""
    import ppo_clip

    flags = {"a": [], "b": ["--env-id", "Pendulum-v1"], "c": ["--no-norm-adv"], "d": []}
    for name, more in flags.items():
        assert run(ppo_clip, "--run-dir", tmp_path / name, *more, "--compile") == 0
        assert run(ppo_clip, "--run-dir", tmp_path / f"{name}-eager", *more) == 0
        ours, eager = (ppo_clip.load_checkpoint(tmp_path / x)["agent"] for x in (name, f"{name}-eager"))
        for key, x in ours.items():
            torch.testing.assert_close(x, eager[key], rtol=1e-3, atol=1e-4)
    assert tensors(ppo_clip, tmp_path / "a") == tensors(ppo_clip, tmp_path / "d")


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_uninterrupted(trainer, tmp_path):
    assert run(trainer, "--run-dir", tmp_path / "whole", small=small_for(trainer)) == 0
    assert run(trainer, "--run-dir", tmp_path / "parts", "--stop-at-step", 1000, small=small_for(trainer)) == 0
    assert int(rows(tmp_path / "parts")[-1]["global_step"]) == 1024
    assert trainer.main(["--resume", str(tmp_path / "parts")]) == 0  # every other flag comes from the checkpoint
    assert tensors(trainer, tmp_path / "parts") == tensors(trainer, tmp_path / "whole")
    for a, b in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        drop = ("wall_time", "sps")
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}


def test_resume_into_another_folder(trainer, tmp_path):
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 1024, small=small_for(trainer))
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    run(trainer, "--run-dir", tmp_path / "whole", small=small_for(trainer))
    assert trainer.main(["--resume", str(tmp_path / "a" / "checkpoint.pt"), "--run-dir", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "checkpoint.pt").read_bytes() == before
    assert tensors(trainer, tmp_path / "b") == tensors(trainer, tmp_path / "whole")
    assert int(rows(tmp_path / "b")[0]["global_step"]) == 1152


def test_a_new_seed_begins_a_stream_of_its_own(trainer, tmp_path):
    """A population's clone must not repeat its donor's noise: --seed with --resume changes it."""
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 1024, small=small_for(trainer))
    for name, seed in (("same", 1), ("b", 7), ("c", 7), ("d", 8)):
        flags = ["--resume", tmp_path / "a" / "checkpoint.pt", "--run-dir", tmp_path / name, "--seed", seed]
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


def test_resume_with_nothing_left_to_do(trainer, tmp_path):
    run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer))
    before = tensors(trainer, tmp_path / "a")
    assert trainer.main(["--resume", str(tmp_path / "a")]) == 0
    assert tensors(trainer, tmp_path / "a") == before and len(rows(tmp_path / "a")) == 16


def test_flags_beat_the_checkpoint(trainer, tmp_path):
    flags = ["--lr-schedule", "constant"] if hasattr(trainer.Args, "lr_schedule") else []
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 1024, "--gamma", 0.9, *flags, small=small_for(trainer))
    assert trainer.main(["--resume", str(tmp_path / "a"), "--gae-lambda", "0.5", "--total-timesteps", "4096"]) == 0
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    assert (args["gae_lambda"], args["gamma"], args["total_timesteps"]) == (0.5, 0.9, 4096)
    assert int(rows(tmp_path / "a")[-1]["global_step"]) == 4096


def test_schedules_and_switches_show_in_the_log(tmp_path):
    import ppo_clip

    def column(name, key, *flags):
        run(ppo_clip, "--run-dir", tmp_path / name, "--stop-at-step", 512, *flags)
        return [float(row[key]) for row in rows(tmp_path / name)]

    remaining = [1 - step / 2048 for step in (0, 128, 256, 384)]
    assert column("a", "learning_rate") == pytest.approx([3e-4 * x for x in remaining])
    assert column("a", "clip_coef") == [0.2] * 4 and column("a", "epochs") == [2] * 4
    assert column("b", "learning_rate", "--lr-schedule", "constant") == pytest.approx([3e-4] * 4)
    assert column("c", "clip_coef", "--anneal-clip") == pytest.approx([0.2 * x for x in remaining])
    assert column("d", "clipfrac", "--no-clip") == [0] * 4 and column("d", "clip_coef") == [float("inf")] * 4
    assert column("e", "epochs", "--target-kl", 1e-9) == [1] * 4


def test_learning_rate_flag_beats_the_adapted_rate(tmp_path):
    import ppo_clip

    adaptive = [
        "--lr-schedule",
        "kl-adaptive",
        "--kl-lr-target",
        1.0,
    ]  # far too high: the rate doubles at every iteration
    run(ppo_clip, "--run-dir", tmp_path / "a", "--stop-at-step", 512, *adaptive)
    assert [float(r["learning_rate"]) for r in rows(tmp_path / "a")] == pytest.approx([3e-4, 6e-4, 12e-4, 24e-4])
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")])
    assert float(rows(tmp_path / "b")[0]["learning_rate"]) == pytest.approx(
        48e-4
    )  # the adapted rate is in the checkpoint
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "c"), "--learning-rate", "1e-4"])
    assert float(rows(tmp_path / "c")[0]["learning_rate"]) == pytest.approx(1e-4)
    fixed = ["--lr-schedule", "linear", "--learning-rate", "1e-3"]
    ppo_clip.main(["--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "d"), *fixed])
    assert float(rows(tmp_path / "d")[0]["learning_rate"]) == pytest.approx(1e-3 * (1 - 512 / 2048))


def test_rows_past_the_checkpoint_are_cut_off(trainer, tmp_path):
    run(trainer, "--run-dir", tmp_path / "a", "--stop-at-step", 1024, small=small_for(trainer))
    path = tmp_path / "a" / "progress.csv"
    kept = path.read_text()
    path.write_text(kept + kept.splitlines()[-1].replace("1024", "1152", 1) + "\n1280,3.3,")  # as a crash leaves it
    assert trainer.main(["--resume", str(tmp_path / "a"), "--stop-at-step", "1024"]) == 0
    assert path.read_text() == kept


def test_ten_sigkills_change_nothing(script, tmp_path, cli):
    """Killed ten times, at random moments of start-up and training, and resumed each time: the same final bits."""
    flags = [*small_for(script), "--total-timesteps", 40960, "--checkpoint-every", 4096]
    assert cli(script.__name__, *flags, "--run-dir", "whole").returncode == 0
    chance, progress = random.Random(0), tmp_path / "killed" / "progress.csv"

    def start(**kwargs):
        begun = (tmp_path / "killed" / "checkpoint.pt").exists()
        return cli(script.__name__, *(["--resume", "killed"] if begun else [*flags, "--run-dir", "killed"]), **kwargs)

    for kill in range(10):
        before = progress.stat().st_ino if progress.exists() else None
        process = start(wait=False)
        if kill % 3 == 0:
            time.sleep(chance.uniform(0, 3))
        else:  # the file is made anew when training begins
            while not progress.exists() or progress.stat().st_ino == before:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, "the run ended before its tenth kill"
        process.kill()
        process.wait()
    assert start().returncode == 0
    assert tensors(script, tmp_path / "killed") == tensors(script, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_checkpoint_that_resumes(trainer, tmp_path, cli, number):
    flags = [*small_for(trainer), "--total-timesteps", 10_000_000, "--vectorization", "async"]
    process = cli(trainer.__name__, *flags, "--run-dir", "a", wait=False, start_new_session=True)
    while not (tmp_path / "a" / "progress.csv").exists() or len(rows(tmp_path / "a")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(
        number
    )  # Ctrl-C reaches the group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    summary = json.loads(out.splitlines()[-1])
    assert int(rows(tmp_path / "a")[-1]["global_step"]) == summary["global_step"]
    again = cli(
        trainer.__name__, "--resume", "a", "--vectorization", "sync", "--stop-at-step", summary["global_step"] + 256
    )
    assert again.returncode == 0 and int(rows(tmp_path / "a")[-1]["global_step"]) == summary["global_step"] + 256


# ---- mistakes: one line, status 2, nothing written -------------------------------------------------------------------


MISTAKES = [
    (["--env-id", "Hoper-v4"], "Hoper"),
    (["--env-id", "no_such_module:Thing-v0"], "no_such_module"),
    (["--env-id", "toy_envs:TupleActions-v0"], "action space"),
    (["--num-minibatches", "5"], "does not divide"),
    (["--num-envs", "0"], "num_envs must be positive"),
    (["--total-timesteps", "100"], "shorter than one iteration"),
    (["--gamma", "1.5"], "gamma must lie in"),
    (["--capture-video"], "--evaluate"),
    (["--resume", "nowhere"], "there is no checkpoint"),
    (["--evaluate", "nowhere"], "there is no checkpoint"),
    pytest.param(["--cuda"], "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
]


@pytest.mark.parametrize("flags,message", MISTAKES)
def test_a_mistake_is_one_line(trainer, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if trainer.__name__ == "ppo_multiagent":
        flags = [x.replace("toy_envs:TupleActions-v0", "toy_parallel.mixed") for x in flags]
    assert run(trainer, *flags, small=small_for(trainer)) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and err.startswith(f"{trainer.__name__}.py: ") and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in TRAINING if name.startswith("ppo")])
def test_advantages_of_single_samples_cannot_be_normalised(name, tmp_path, capsys):
    script = importlib.import_module(name)
    assert run(script, "--num-minibatches", 128, "--run-dir", tmp_path / "a") == 2
    assert "at least 2" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run(script, "--num-minibatches", 128, "--no-norm-adv", "--run-dir", tmp_path / "a") == 0


def test_a_flag_that_does_not_exist(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(trainer, "--no-such-flag", 1) == 2
    assert "no-such-flag" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_missing_envpool_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    assert run(script, "--vectorization", "envpool", small=small_for(script)) == 2
    err = capsys.readouterr().err
    assert "pip install envpool" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_holds_another_run(trainer, tmp_path, capsys):
    run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_damaged_and_foreign_checkpoints(trainer, tmp_path, capsys):
    run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer))
    whole = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    flipped = [bytearray(whole) for _ in range(20)]
    for seed, blob in enumerate(flipped):
        blob[random.Random(seed).randrange(len(blob))] ^= 1 << seed % 8
    bad = [b"", whole[:1000], whole[:-1], whole + b"x", *flipped]
    for blob in bad:
        (tmp_path / "bad.pt").write_bytes(blob)
        capsys.readouterr()
        assert trainer.main(["--resume", str(tmp_path / "bad.pt"), "--run-dir", str(tmp_path / "b")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "checksum" in err
    state = trainer.load_checkpoint(tmp_path / "a")
    trainer.save_checkpoint(state | {"script": "something_else"}, tmp_path / "foreign.pt")
    assert trainer.main(["--resume", str(tmp_path / "foreign.pt")]) == 2
    assert "something_else.py" in capsys.readouterr().err
    assert trainer.main(["--resume", str(tmp_path / "a"), "--env-id", "Acrobot-v1"]) == 2
    assert "not of Acrobot-v1" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert (
        torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["global_step"] == 2048
    )  # plain torch reads it too


# ---- failures: one line, status 1, the last checkpoint stays ---------------------------------------------------------


@pytest.mark.parametrize("env,message", [("NanObs", "observation"), ("HugeReward", "reward")])
def test_what_is_not_finite_stops_the_run(tmp_path, capsys, env, message):
    import ppo_clip

    assert run(ppo_clip, "--env-id", f"toy_envs:{env}-v0", "--run-dir", tmp_path / "a", "--total-timesteps", 20480) == 1
    err = capsys.readouterr().err
    assert message in err and "not finite" in err and err.count("\n") == 1
    checkpoint = ppo_clip.load_checkpoint(tmp_path / "a")
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    import ppo_clip

    assert run(ppo_clip, "--run-dir", tmp_path / "a", "--learning-rate", 1e30, "--max-grad-norm", 1e30) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("is nan at step" in err or "is inf at step" in err)
    assert ppo_clip.load_checkpoint(tmp_path / "a")["global_step"] == 0


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(script, tmp_path, cli):
    """A limit on the size of files stands for the full disk: the write fails half-way, with an OSError as there."""
    flags = [*small_for(script), "--run-dir", "a"]
    assert cli(script.__name__, *flags, "--stop-at-step", 512).returncode == 0
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1000,) * 2)

    process = cli(script.__name__, "--resume", "a", preexec_fn=small_files)
    assert process.returncode == 1
    assert "File too large" in process.stderr and process.stderr.count("\n") == 1, process.stderr
    assert (tmp_path / "a" / "checkpoint.pt").read_bytes() == before and not (
        tmp_path / "a" / "checkpoint.pt.tmp"
    ).exists()


# ---- other observations and actions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["DictObs", "OffsetActions", "BoxTarget", "Endless"])
def test_spaces(script, tmp_path, env):
    discrete_refused = script.__name__ == "trpo_continuous" and env != "BoxTarget"
    status = run(script, "--env-id", f"toy_envs:{env}-v0", "--run-dir", tmp_path / "a", small=small_for(script))
    assert status == (2 if discrete_refused else 0)


@pytest.mark.parametrize("vectorization", ["async", "envpool"])
def test_vectorizations_train_and_resume(script, tmp_path, vectorization):
    if vectorization == "envpool":
        pytest.importorskip("envpool", reason="optional package envpool is not installed")
    flags = ["--vectorization", vectorization]
    run(script, "--run-dir", tmp_path / "whole", *flags, small=small_for(script))
    run(script, "--run-dir", tmp_path / "parts", "--stop-at-step", 1024, *flags, small=small_for(script))  # on schedule
    assert script.main(["--resume", str(tmp_path / "parts")]) == 0
    assert tensors(script, tmp_path / "parts") == tensors(script, tmp_path / "whole")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluate_prints_one_json_line(trainer, tmp_path, capsys):
    run(trainer, "--run-dir", tmp_path / "a", small=small_for(trainer))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    lines = []
    for _ in range(2):
        capsys.readouterr()
        assert trainer.main(["--evaluate", str(tmp_path / "a"), "--eval-episodes", "3"]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and lines[0].count("\n") == 1
    result = json.loads(lines[0])
    assert set(result) - {"mean_by_agent"} == {"mean", "std", "returns"} and len(result["returns"]) == 3
    assert result["mean"] == pytest.approx(np.mean(result["returns"])) and result["std"] == pytest.approx(
        np.std(result["returns"])
    )
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_capture_video(tmp_path, capsys, monkeypatch):
    import ppo_clip

    run(ppo_clip, "--env-id", "toy_envs:Picture-v0", "--run-dir", tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "moviepy", None)
    monkeypatch.setattr(ppo_clip, "find_spec", lambda name: None)
    assert ppo_clip.main(["--evaluate", str(tmp_path / "a"), "--capture-video"]) == 2
    assert "pip install moviepy" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("moviepy", reason="optional package moviepy is not installed")
    assert ppo_clip.main(["--evaluate", str(tmp_path / "a"), "--capture-video", "--eval-episodes", "2"]) == 0
    run(ppo_clip, "--env-id", "toy_envs:Unrenderable-v0", "--run-dir", tmp_path / "b")
    capsys.readouterr()
    assert ppo_clip.main(["--evaluate", str(tmp_path / "b"), "--capture-video"]) == 2
    err = capsys.readouterr().err
    assert "cannot render Unrenderable-v0: no display (" in err and err.count("\n") == 1
    assert not (tmp_path / "b" / "videos").exists()
    videos = sorted((tmp_path / "a" / "videos").iterdir())
    assert [v.suffix for v in videos] == [".mp4", ".mp4"] and all(v.stat().st_size > 0 for v in videos)


def test_no_noise_and_no_stray_files(tmp_path, cli):
    """The v4 environments train without a warning on the terminal or a MUJOCO_LOG.TXT in the working folder."""
    process = cli("ppo_clip", "--env-id", "HalfCheetah-v4", "--total-timesteps", 2048, "--run-dir", "a", "--no-compile")
    assert process.returncode == 0
    assert process.stderr == "" and {p.name for p in tmp_path.iterdir()} == {"a"}


def test_subprocess_status_and_streams(tmp_path, cli):
    process = cli("ppo_clip", "--env-id", "Hoper-v4")
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert isinstance(process, subprocess.CompletedProcess)
