"""--cuda: what a CUDA graph asks of the code, emulated on the CPU; and on a GPU, where there is one, the real thing."""

import csv
import dataclasses
import importlib

import pytest
import torch
from conftest import CONTRACT
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = ["--num-envs", "4", "--num-steps", "32", "--num-minibatches", "4", "--checkpoint-every", "512"]
SMALL += ["--total-timesteps", "2048", "--no-compile"]
PENALIZED = ["--form", "penalized", "--beta-schedule", "adaptive"]
FLAGS = {
    "trpo_continuous": ["--env-id", "Pendulum-v1", "--vf-epochs", "3", *PENALIZED],
    "ppo_clip": ["--env-id", "CartPole-v1", "--update-epochs", "3"],
    "ppo_klpen": ["--env-id", "Pendulum-v1", "--update-epochs", "3", "--kl-target", "0.0001"],
    "ppo_multiagent": ["--update-epochs", "3", "--num-envs", "8"],
    "ppo_multiagent selfplay": ["--algorithm", "selfplay", "--num-envs", "8", "--snapshot-every", "1"],
}
RUNS = [name for name in FLAGS if name.split()[0] in CONTRACT]


class Tape(TorchDispatchMode):
    """A CUDA graph's rules on a CPU. The third call notes every operation and the tensors it read and wrote; later
    calls repeat these operations on these tensors, wherever they are, and run nothing of the Python."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.notes = function, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")  # for a size or a value
        assert not any(x in str(function) for x in ("rand", "exponential", *waits)), f"{function} in a graph"
        if str(function).startswith("aten.index"):  # x[mask] must first be counted
            indices = [x for x in args[1] if x is not None] if isinstance(args[1], list) else []
            assert all(x.dtype != torch.bool for x in indices), f"{function} with a mask in a graph"
        self.notes.append((function, args, kwargs or {}, out))
        return out

    def __call__(self):
        self.calls += 1
        if self.calls < 3:
            self.function()
        elif self.calls == 3:
            with self:
                self.function()
        else:
            with torch.no_grad():
                for function, args, kwargs, out in self.notes:
                    again = function(*args, **kwargs)
                    for old, new in zip(*(x if isinstance(x, tuple | list) else [x] for x in (out, again))):
                        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)


def final_state(script, path):
    state = script.load_checkpoint(path)
    with open(path / "progress.csv") as file:
        rows = [{k: x for k, x in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)]
    return state["agent"], state["adam"], rows


@pytest.mark.parametrize("name", RUNS)
def test_replayed_operations_are_the_run(name, tmp_path, monkeypatch):
    """No number that changes is baked into the updates, what they read and write never moves, nothing in them is
    random or waits for the device: rates and beta change all the time, and the replayed run is the same to a bit. The
    same holds for the rollouts of built-in worlds."""
    script, tapes, flags = importlib.import_module(name.split()[0]), [], [*SMALL, *FLAGS[name]]
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "run")]))

    def tape(function):
        tapes.append(Tape(function))
        return tapes[-1]

    monkeypatch.setattr(script, "CudaGraph", tape)
    for function in ("accelerated", "recorded"):  # as they are with --cuda, but for the device
        if original := getattr(script, function, None):
            on_a_gpu = lambda args, *rest, call=original: call(dataclasses.replace(args, cuda=True), *rest)  # noqa: E731
            monkeypatch.setattr(script, function, on_a_gpu)
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "replayed")]))
    assert len(tapes) == (2 if "recorded" in vars(script) else 1)
    assert all(tape.calls >= 8 and len(tape.notes) > 100 for tape in tapes)
    (agent, adam, rows), (agent2, adam2, rows2) = (final_state(script, tmp_path / x) for x in ("run", "replayed"))
    assert rows == rows2
    assert all(torch.equal(x, agent2[key]) for key, x in agent.items())
    assert all(torch.equal(x, adam2[key]) for key, x in adam.items())


def test_the_tape_notices_what_a_graph_must_not_do():
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])

    def put():
        x[mask] = 0.0

    for function in (lambda: x[mask], put, lambda: x.sum().item(), lambda: mask.nonzero(), lambda: torch.rand(3)):
        tape = Tape(function)
        tape(), tape()
        with pytest.raises(AssertionError, match="in a graph"):
            tape()


# ---- on a GPU --------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("mode", ["--no-compile", "--compile"])
def test_gpu_equals_cpu_after_one_iteration(name, mode, tmp_path):
    """From the same data, to 1e-4 of each tensor's size (Adam's first steps have the sign of a gradient: no more)."""
    script = importlib.import_module(name.split()[0])
    agents = []
    for device in ("--no-cuda", "--cuda"):
        flags = [*SMALL, *FLAGS[name], mode, device, "--stop-at-step", "1", "--run-dir", str(tmp_path / device)]
        script.train(script.parse_args(flags))
        agents.append(script.load_checkpoint(tmp_path / device)["agent"])
    for key, x in agents[0].items():
        assert (x - agents[1][key]).norm() <= 1e-4 * x.norm() + 1e-6, key


@gpu
@pytest.mark.parametrize("name", RUNS)
def test_schedules_are_seen_by_the_graph_and_a_run_resumes(name, tmp_path):
    script = importlib.import_module(name.split()[0])
    flags = [*SMALL, *FLAGS[name], "--cuda"]
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "whole")]))
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "parts"), "--stop-at-step", "1024"]))
    script.train(script.parse_args(["--resume", str(tmp_path / "parts")]))
    (whole, _, rows), (parts, _, rows2) = (final_state(script, tmp_path / x) for x in ("whole", "parts"))
    for key, x in whole.items():
        assert (x - parts[key]).norm() <= 1e-3 * x.norm() + 1e-5, key
    assert [row["global_step"] for row in rows] == [row["global_step"] for row in rows2]
    if name != "trpo_continuous":  # a rate that falls to 0: the last step moves less than a step in the middle
        assert float(rows[-1]["kl"]) < float(rows[len(rows) // 2]["kl"])


@gpu
@pytest.mark.parametrize("name", RUNS)
def test_no_sync_inside_an_epoch(name, tmp_path, monkeypatch):
    script = importlib.import_module(name.split()[0])

    class Strict(script.CudaGraph):
        def __call__(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().__call__()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(script, "CudaGraph", Strict)
    script.train(script.parse_args([*SMALL, *FLAGS[name], "--cuda", "--run-dir", str(tmp_path)]))


@gpu
def test_cartpole_is_learned_on_the_gpu(tmp_path):
    script = importlib.import_module("ppo_clip")
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", "100000", "--cuda", "--run-dir", str(tmp_path)]
    assert script.train(script.parse_args(flags))["episodic_return"] > 200
