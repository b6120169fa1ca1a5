"""Actors as processes: the same bits whatever their number, and nothing hangs or stays behind when something dies."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import test_contract
import torch
import toy_envs
from conftest import CONTRACT, HELPERS, ROOT, needs_compiler
from test_contract import rows, run, tensors
from toy_envs import Broken
from waiting import wait_for

import ppo_clip


def small_for(script):
    """Flags of a small run in which processes share the work: built-in worlds do not need them."""
    several = ["--env-id", "toy_parallel.mortals"] if script.__name__ == "ppo_multiagent" else []
    return [*test_contract.small_for(script), *several]


def children(pid):
    """Process ids of the living children of a process."""
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(cli, tmp_path, script):
    """A run in a process group of its own, after some iterations, and the process ids of its workers."""
    small = [*small_for(script), "--total-timesteps", 10_000_000, "--run-dir", "a"]
    process = cli(script.__name__, *small, "--num-workers", 2, wait=False, start_new_session=True)
    progress = tmp_path / "a" / "progress.csv"
    wait_for(lambda: progress.exists() and len(rows(tmp_path / "a")) >= 3, process)
    workers = children(process.pid)
    assert len(workers) == 1  # the first part of the environments is the process's own
    return process, workers


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_bits(trainer, tmp_path):
    flags, results = ["--num-envs", 5, "--num-steps", 64, "--total-timesteps", 1280, "--num-minibatches", 5], []
    for k in (0, 1, 2, 3, 5, 16):
        more = [*flags, "--run-dir", tmp_path / str(k), "--num-workers", k]
        assert run(trainer, *more, small=small_for(trainer)) == 0
        results.append(tensors(trainer, tmp_path / str(k)))
    assert all(result == results[0] for result in results)


def test_a_run_resumes_with_another_number_of_workers(trainer, tmp_path):
    run(trainer, "--run-dir", tmp_path / "whole", "--num-workers", 0, small=small_for(trainer))
    run(trainer, "--run-dir", tmp_path / "parts", "--num-workers", 2, "--stop-at-step", 512, small=small_for(trainer))
    for step, k in ((1024, 0), (1536, 2), (2048, 1)):
        flags = ["--resume", tmp_path / "parts", "--num-workers", k, "--stop-at-step", step]
        assert trainer.main(list(map(str, flags))) == 0
    assert tensors(trainer, tmp_path / "parts") == tensors(trainer, tmp_path / "whole")


def test_the_number_of_workers_is_this_machines_and_not_the_checkpoints(trainer, tmp_path):
    flags = ["--run-dir", tmp_path, "--num-workers", trainer.CORES + 1, "--stop-at-step", 128]
    run(trainer, *flags, small=small_for(trainer))
    assert trainer.parse_args(["--resume", str(tmp_path)]).num_workers == trainer.CORES >= 1


@pytest.mark.slow
def test_spawned_workers_give_the_same_bits(tmp_path):
    """macOS and Windows do not fork: everything that a worker needs must survive being sent to it."""
    runs, scripts = {}, [importlib.import_module(name) for name in CONTRACT]
    for script in scripts:
        flags = [*map(str, small_for(script)), "--total-timesteps", "512", "--num-workers", "2", "--run-dir"]
        assert script.main([*flags, str(tmp_path / f"{script.__name__}-forked")]) == 0
        runs[script.__name__] = [*flags, f"{script.__name__}-spawned"]
    code = f"""
import importlib, multiprocessing
context = multiprocessing.get_context("spawn")
multiprocessing.get_context = lambda method: context
if __name__ == "__main__":
    for name, flags in {runs}.items():
        assert importlib.import_module(name).main(flags) == 0
"""
    (tmp_path / "spawning.py").write_text(code)
    flags = {"env": os.environ | {"PYTHONPATH": f"{ROOT}:{HELPERS}"}, "cwd": tmp_path, "timeout": 300}
    process = subprocess.run([sys.executable, "spawning.py"], capture_output=True, text=True, **flags)
    assert process.returncode == 0, process.stderr
    for script in scripts:
        ours, theirs = (tensors(script, tmp_path / f"{script.__name__}-{how}") for how in ("forked", "spawned"))
        assert ours == theirs, script.__name__


# ---- deaths and signals ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line(trainer, tmp_path, cli):
    process, workers = started(cli, tmp_path, trainer)
    before = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["global_step"]
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process died, exit code [-9]" in err.splitlines()[-1] and "Traceback" not in err
    step = trainer.load_checkpoint(tmp_path / "a")["global_step"]
    assert step >= before  # whole, and it goes on:
    assert trainer.main(["--resume", str(tmp_path / "a"), "--stop-at-step", str(step + 128)]) == 0


@pytest.mark.slow
def test_a_killed_parent_leaves_no_orphan_and_no_noise(trainer, tmp_path, cli):
    process, workers = started(cli, tmp_path, trainer)
    process.kill()
    _, err = process.communicate(timeout=30)  # ends only when the workers have closed their end of the pipe
    wait_for(lambda: not any(map(alive, workers)), seconds=10)
    assert all("run folder a" in line or "checkpoints cut off" in line for line in err.splitlines()), err


@pytest.mark.slow
def test_a_killed_parent_leaves_no_orphan_even_if_an_environment_hangs(tmp_path, cli):
    flags = ["--env-id", "toy_envs:Broken-step-hang-v0", "--run-dir", "a", "--num-workers", 2, "--no-compile"]
    process = cli("ppo_clip", *flags, wait=False)
    wait_for(lambda: len(list(tmp_path.glob("hanging-*"))) == 2, process)
    (worker,) = children(process.pid)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not alive(worker), seconds=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "send,number", [(os.killpg, signal.SIGINT), (os.killpg, signal.SIGTERM), (os.kill, signal.SIGTERM)]
)
def test_a_signal_leaves_a_checkpoint_that_resumes(trainer, send, number, tmp_path, cli):
    """Sent to the whole group, as Ctrl-C is, or to the run alone."""
    process, workers = started(cli, tmp_path, trainer)
    send(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err and not any(map(alive, workers))
    step = json.loads(out.splitlines()[-1])["global_step"]
    assert trainer.load_checkpoint(tmp_path / "a")["global_step"] == step
    assert int(rows(tmp_path / "a")[-1]["global_step"]) == step
    again = ["--resume", tmp_path / "a", "--num-workers", 0, "--stop-at-step", step + 256]
    assert trainer.main(list(map(str, again))) == 0
    assert int(rows(tmp_path / "a")[-1]["global_step"]) == step + 256


@pytest.mark.slow
def test_ctrl_c_while_environments_are_made_is_one_line(tmp_path, cli):
    flags = ["--env-id", "toy_envs:Slow-v0", "--num-workers", 2, "--no-compile"]
    process = cli("ppo_clip", *flags, wait=False, start_new_session=True)
    wait_for((tmp_path / "making").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "ppo_clip.py: interrupted\n"
    assert [p.name for p in tmp_path.iterdir()] == ["making"]


@pytest.mark.slow
@needs_compiler
def test_ctrl_c_while_compiling_is_one_line(tmp_path, cli, monkeypatch):
    """An empty cache, so that the compiler is running, which Ctrl-C reaches as well."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the compiler leaves what it was writing
    flags = ["--env-id", "CartPole-v1", "--run-dir", "a", "--num-workers", 2, "--compile"]
    process = cli("ppo_clip", *flags, wait=False, fresh=True, start_new_session=True)
    wait_for(lambda: any("cc1plus" in command(pid) for pid in descendants(process.pid)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert len([x for x in err.splitlines() if "interrupted" in x or "evaluate" in x]) == 1, err


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_whose_environment_hangs(tmp_path, cli):
    flags = ["--env-id", "toy_envs:Broken-step-hang-v0", "--run-dir", "a", "--num-workers", 2, "--no-compile"]
    process = cli("ppo_clip", *flags, wait=False)
    wait_for(lambda: len(list(tmp_path.glob("hanging-*"))) == 2, process)
    workers = children(process.pid)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    wait_for(lambda: not any(map(alive, workers)), seconds=10)


def descendants(pid):
    found = children(pid)
    return found + [x for child in found for x in descendants(child)]


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_program_that_an_environment_starts_in_a_worker_can_be_ended(tmp_path, monkeypatch):
    """A simulator, say: with SIGTERM ignored, which a program inherits, terminate() would leave it behind."""

    def init(self):
        self.simulator = subprocess.Popen(["sleep", "1000"])

    def close(self):
        self.simulator.terminate()
        (tmp_path / f"ended-{self.simulator.pid}").write_text(str(self.simulator.wait(timeout=5)))

    monkeypatch.setattr(toy_envs.NoRenderMode, "__init__", init)
    monkeypatch.setattr(toy_envs.NoRenderMode, "close", close)
    flags = ["--env-id", "toy_envs:NoRenderMode-v0", "--num-steps", 32, "--total-timesteps", 64]
    assert run(ppo_clip, *flags, "--run-dir", tmp_path / "a", "--num-workers", 2) == 0
    assert [path.read_text() for path in tmp_path.glob("ended-*")] == ["-15"] * 3


@pytest.mark.parametrize("draw", [np.random.rand, lambda n: np.array([random.random()])])  # noqa: NPY002
def test_global_random_numbers_follow_from_the_seed(draw, tmp_path, monkeypatch, capsys):
    """Environments of one's own may draw from them. A run that is resumed draws the same, and so does an evaluation."""
    monkeypatch.setattr(toy_envs.NoRenderMode, "observe", lambda self: draw(1))
    monkeypatch.setattr(toy_envs.NoRenderMode, "reward", lambda self, obs, action, t: float(draw(1)[0]))
    monkeypatch.setattr(toy_envs.NoRenderMode, "obs", np.zeros(1), raising=False)
    flags = ["--env-id", "toy_envs:NoRenderMode-v0", "--num-workers", 2]
    run(ppo_clip, *flags, "--run-dir", tmp_path / "whole")
    np.random.rand(7)  # noqa: NPY002
    run(ppo_clip, *flags, "--run-dir", tmp_path / "parts", "--stop-at-step", 512)
    np.random.rand(7)  # noqa: NPY002
    assert ppo_clip.main(["--resume", str(tmp_path / "parts"), "--num-workers", "2"]) == 0
    assert tensors(ppo_clip, tmp_path / "whole") == tensors(ppo_clip, tmp_path / "parts")
    capsys.readouterr()
    for seed in (3, 3, 2**40):
        assert ppo_clip.main(["--evaluate", str(tmp_path / "whole"), "--seed", str(seed)]) == 0
    first, again, other = capsys.readouterr().out.splitlines()
    assert first == again != other


def test_environments_are_closed_in_every_process(tmp_path, monkeypatch):
    """Also one that has started something of its own: nothing stays behind. One that fails to close has no say."""

    def close(self):
        (tmp_path / f"closed-{os.getpid()}-{id(self)}").touch()
        raise RuntimeError("too late")

    monkeypatch.setattr(toy_envs.NoRenderMode, "close", close)
    flags = ["--env-id", "toy_envs:NoRenderMode-v0", "--num-envs", 4, "--num-steps", 32, "--total-timesteps", 256]
    assert run(ppo_clip, *flags, "--run-dir", tmp_path / "a", "--num-workers", 2) == 0
    closed = [path.name.split("-")[1:] for path in tmp_path.glob("closed-*")]
    assert len({pid for pid, _ in closed}) == 2
    assert len([pid for pid, _ in closed if int(pid) != os.getpid()]) == 2  # the two of the worker


# ---- environments that fail ------------------------------------------------------------------------------------------

FAILURES = [
    ("Broken-step-raise", "step() raised ZeroDivisionError: a bug (toy_envs.py, line "),
    ("Broken-step-import", "step() raised ImportError: no module named physics (toy_envs.py, line "),
    ("Broken-step-exit", "step() raised SystemExit: 0 (toy_envs.py, line "),
    ("Broken-step-shape", "step() returned [0. 0. 0.] and 1.0: not finite, or not of shape (1,)"),
    ("Broken-step-short", "step() returned 0.0 and 1.0: not finite, or not of shape (1,)"),
    ("Broken-step-nan", "step() returned [nan] and 1.0: not finite"),
    ("Broken-reset-raise", "reset() raised ZeroDivisionError: a bug (toy_envs.py, line "),
    ("Broken-reset-shape", "reset() returned the observation [0. 0. 0.]: not finite, or not of shape (1,)"),
    ("Broken-reset-nan", "reset() returned the observation [nan]: not finite"),
    ("HugeReward", "step() returned [0.] and inf: not finite"),
]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("env,message", FAILURES)
def test_an_environment_that_fails_ends_the_run_with_one_line(env, message, num_workers, tmp_path, capfd):
    """Of this process and its workers together (capfd sees them all)."""
    flags = ["--env-id", f"toy_envs:{env}-v0", "--run-dir", tmp_path / "a", "--num-workers", num_workers]
    assert run(ppo_clip, *flags) == 1
    first, line = capfd.readouterr().err.splitlines()
    assert "run folder" in first and line.startswith("ppo_clip.py: environment 0, step ") and message in line
    checkpoint = ppo_clip.load_checkpoint(tmp_path / "a")
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


@pytest.mark.parametrize(
    "answer,message",
    [
        ((np.zeros(1, np.float32), 1.0, False, {}), "step() raised ValueError: not enough values to unpack"),
        ((np.zeros(1, np.float32), None, False, False, {}), "step() raised TypeError: float() argument must be"),
        ((np.zeros(1, np.float32), 1e39, False, False, {}), "step() returned [0.] and 1e+39: not finite"),
        ((np.zeros(1, np.float32), 1.0, False, None, {}), None),  # None is no end
        ((np.zeros(1, np.float32), np.float64(1.0), np.False_, np.False_, {}), None),
    ],
    ids=["of the old form", "no reward", "too large for a float32", "no end", "numpy"],
)
def test_what_step_returns(answer, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_envs.NoRenderMode, "step", lambda self, action: answer)
    flags = ["--env-id", "toy_envs:NoRenderMode-v0", "--run-dir", tmp_path / "a", "--num-workers", 0]
    assert run(ppo_clip, *flags) == (1 if message else 0)
    assert message is None or f"environment 0, step 0 of the rollout: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "obs,start,end",
    [
        (np.append(np.linspace(0, 1, 59), np.inf), "[0.", "inf]: not finite"),
        (np.array([1e39]), "[1.e+39]: not finite", ""),
    ],
    ids=["wide", "too large for a float32"],
)
def test_an_observation_that_is_not_finite_is_one_line(obs, start, end, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy_envs.NoRenderMode, "observation_space", gym.spaces.Box(-1, 1, obs.shape))
    monkeypatch.setattr(toy_envs.NoRenderMode, "observe", lambda self: obs)
    assert run(ppo_clip, "--env-id", "toy_envs:NoRenderMode-v0", "--run-dir", tmp_path / "a") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and f"reset() returned the observation {start}" in lines[1] and end in lines[1]
    assert len(lines[1]) < 300


def test_an_environment_that_only_a_worker_cannot_make_says_why(tmp_path, capsys, monkeypatch):
    parent = os.getpid()

    def init(self):
        if os.getpid() != parent:
            raise RuntimeError("no licence is left")

    monkeypatch.setattr(toy_envs.NoRenderMode, "__init__", init)
    flags = ["--env-id", "toy_envs:NoRenderMode-v0", "--run-dir", tmp_path / "a", "--num-workers", 2]
    assert run(ppo_clip, *flags) == 1
    assert "no licence is left" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("call,after,at", [("step", 20, 20), ("reset", 20, 19), ("reset", 0, 0)])
def test_the_failing_environment_is_named_wherever_it_stands(call, after, at, tmp_path, capsys, monkeypatch):
    begin_episode = ppo_clip.Environments.begin_episode

    def begin(self, i, t, **seed):
        self.envs[2].unwrapped.after = after  # the others fail after 30 steps
        begin_episode(self, i, t, **seed)

    monkeypatch.setattr(ppo_clip.Environments, "begin_episode", begin)
    flags = ["--env-id", f"toy_envs:Broken-{call}-raise-v0", "--run-dir", tmp_path / "a", "--num-workers", 0]
    assert run(ppo_clip, *flags, "--num-envs", 4, "--num-steps", 32) == 1
    assert f"environment 2, step {at} of the rollout: {call}() raised" in capsys.readouterr().err


def test_the_failing_environment_is_named_also_in_a_worker(tmp_path, capsys, monkeypatch):
    parent, step = os.getpid(), Broken.step
    monkeypatch.setattr(Broken, "step", lambda self, x: (Broken.good if os.getpid() == parent else step)(self, x))
    flags = ["--env-id", "toy_envs:Broken-step-raise-v0", "--run-dir", tmp_path / "a", "--num-workers", 2]
    assert run(ppo_clip, *flags, "--num-envs", 4, "--num-steps", 32) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    message = "environment 2, step 30 of the rollout: step() raised ZeroDivisionError: a bug ("
    assert line.startswith(f"ppo_clip.py: {message}")


def test_an_environment_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(ppo_clip, "--env-id", "toy_envs:Broken-__init__-raise-v0") == 1
    err, message = capsys.readouterr().err, "__init__() raised ZeroDivisionError: a bug (toy_envs.py, line "
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
