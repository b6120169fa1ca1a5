"""--cuda: what a CUDA graph asks of the code, emulated on the CPU; and on a GPU, where there is one, the real thing."""

import copy
import csv
import dataclasses
import importlib

import pytest
import torch
from batches import make_agent, make_batch, make_coef
from conftest import CONTRACT
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = ["--num-envs", "4", "--num-steps", "32", "--num-minibatches", "4", "--checkpoint-every", "512"]
SMALL += ["--total-timesteps", "2048", "--no-compile"]
PENALIZED = ["--form", "penalized", "--beta-schedule", "adaptive"]
FLAGS = {
    "trpo_continuous": ["--env-id", "Pendulum-v1", "--vf-epochs", "3", *PENALIZED],
    "ppo_clip": ["--env-id", "CartPole-v1", "--update-epochs", "3"],
    "ppo_klpen": ["--env-id", "Pendulum-v1", "--update-epochs", "3", "--kl-target", "0.0001"],
    "ppo_multiagent": ["--update-epochs", "3", "--num-envs", "8"],
    "ppo_multiagent selfplay": ["--algorithm", "selfplay", "--num-envs", "8"],
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
            self.result = self.function()
        elif self.calls == 3:
            with self:
                self.result = self.function()
        else:
            with torch.no_grad():
                for function, args, kwargs, out in self.notes:
                    again = function(*args, **kwargs)
                    for old, new in zip(*(x if isinstance(x, tuple | list) else [x] for x in (out, again))):
                        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)
        return self.result


def final_state(script, path):
    state = script.load_checkpoint(path)
    with open(path / "progress.csv") as file:
        rows = [{k: x for k, x in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)]
    return state["agent"], state["adam"], rows


@pytest.mark.parametrize("name", RUNS)
def test_replayed_operations_are_the_run(name, tmp_path, monkeypatch):
    """No number that changes is baked into the graphs, what they read and write never moves, nothing in them is random
    or waits for the device: rates and beta change all the time, and the replayed run is the same to a bit. The same
    holds for the rollouts of built-in worlds."""
    script, tapes, flags = importlib.import_module(name.split()[0]), [], [*SMALL, *FLAGS[name]]
    on_device = "accelerated", "recorded", "functions_of_theta", "TeamEnvironments"
    for function in on_device:  # as they are with --cuda, but for the device
        if original := getattr(script, function, None):

            def on_a_gpu(*operands, original=original):
                with_cuda = lambda x: dataclasses.replace(x, cuda=True) if isinstance(x, script.Args) else x  # noqa: E731
                return original(*map(with_cuda, operands))

            monkeypatch.setattr(script, function, on_a_gpu)

    def tape(function):
        tapes.append(Tape(function))
        return tapes[-1]

    monkeypatch.setattr(script, "CudaGraph", lambda function: function)  # the same without the recording
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "run")]))
    monkeypatch.setattr(script, "CudaGraph", tape)
    script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / "replayed")]))
    assert len(tapes) == {"trpo_continuous": 3, "ppo_multiagent": 2}.get(name.split()[0], 1)
    assert all(tape.calls >= 8 and len(tape.notes) > 20 for tape in tapes)
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
both = pytest.mark.parametrize("mode", ["--no-compile", "--compile"])


def relative_error(x, reference):
    x, reference = x.cpu().double(), reference.cpu().double()
    return ((x - reference).norm() / (reference.norm() + 1e-8)).item()


@gpu
@both
@pytest.mark.parametrize("name", RUNS)
def test_gpu_equals_cpu_after_one_iteration(name, mode, tmp_path):
    """From the same data, in eight epochs, of which the graph replays six: all parameters together to 2e-5 of their
    size, which is some 1e-3 of the way that they have gone. (A single bias that hardly has a gradient may differ by
    more: Adam divides by the gradient's size.) Self-play takes steps of 1e-5 instead of 7e-4, so for it the limit is a
    larger part of the way. With large steps the input of some ReLU comes so near to 0 that rounding decides whether it
    has a gradient. From there two runs part, on the CPU as well."""
    script = importlib.import_module(name.split()[0])
    agents = []
    for device, how in (("--no-cuda", "--no-compile"), ("--cuda", mode)):
        epochs = "--vf-epochs" if name == "trpo_continuous" else "--update-epochs"
        flags = [*SMALL, *FLAGS[name], epochs, "8", how, device, "--stop-at-step", "1"]
        flags += ["--learning-rate", "1e-5"] if "selfplay" in name else []
        script.train(script.parse_args([*flags, "--run-dir", str(tmp_path / device)]))
        agents.append(script.load_checkpoint(tmp_path / device)["agent"])
    cpu, gpu = ([x for key, x in agent.items() if "rms" not in key] for agent in agents)
    assert relative_error(parameters_to_vector(gpu), parameters_to_vector(cpu)) < 2e-5
    assert all(relative_error(agents[1][key], x) < 1e-4 for key, x in agents[0].items() if "rms" in key)


def epochs_on(script, device, compile, epochs=9):
    """The policy's parameters after epochs of updates, with another batch and another learning rate in each."""
    agent = make_agent(script).to(device)
    data = {key: x.to(device) for key, x in make_batch(script, make_agent(script)).items()}
    coef = {key: x.to(device) for key, x in make_coef().items()}
    order = torch.zeros(4, 64, dtype=torch.long, device=device)
    state = script.initial_state(agent, len(script.ppo_loss(agent, data, coef, True)[1]) + 1)
    args = script.Args(compile=compile, cuda=device == "cuda")
    run_epoch = script.accelerated(args, script.update, agent, state, data, order, coef, True)
    rng = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order.copy_(torch.randperm(256, generator=rng).view_as(order))
        coef["learning_rate"].fill_(1e-3 * (1 - epoch / epochs))
        data["advantage"].copy_(torch.randn(256, generator=rng))
        run_epoch()
    return state


@gpu
@both
@pytest.mark.parametrize("name", ["ppo_clip", "ppo_klpen"])
def test_replayed_epochs_see_new_batches_and_rates(name, mode):
    script = importlib.import_module(name.split()[0])
    cpu, cuda = epochs_on(script, "cpu", False), epochs_on(script, "cuda", mode == "--compile")
    assert all(relative_error(cuda[key], x) < 1e-4 for key, x in cpu.items())


@gpu
def test_policy_step_of_trpo_equals_the_cpus():
    """Six steps, each from where the CPU's has led, the last four replayed; a stiff system in float32 leaves 1e-3."""
    script = importlib.import_module("trpo_continuous")
    agent = make_agent(script)
    agents, datas, args, functions = {}, {}, {}, {}
    for device in ("cpu", "cuda"):
        agents[device] = copy.deepcopy(agent).to(device)
        datas[device] = {key: x.to(device) for key, x in make_batch(script, agent).items()}
        args[device] = script.Args(num_envs=8, cuda=device == "cuda")
        functions[device] = script.functions_of_theta(agents[device], datas[device], args[device])
    for step in range(6):
        before = parameters_to_vector(agents["cpu"].actor.parameters())
        agents["cuda"].load_state_dict(agents["cpu"].state_dict())
        for key, x in make_batch(script, agents["cpu"], seed=step).items():
            datas["cpu"][key].copy_(x), datas["cuda"][key].copy_(x)
        cpu, cuda = (script.policy_step(*functions[x], args[x].max_kl, 1.0, args[x]) for x in ("cpu", "cuda"))
        after, there = (parameters_to_vector(agents[x].actor.parameters()).cpu() for x in ("cpu", "cuda"))
        assert (there - after).norm() < 1e-3 * (after - before).norm()
        assert cpu["line_search_step"] == cuda["line_search_step"] == 0
        assert cpu["kl"] == pytest.approx(cuda["kl"], rel=1e-2)


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
        assert relative_error(parts[key], x) < 1e-3, key
    assert [row["global_step"] for row in rows] == [row["global_step"] for row in rows2]
    if name != "trpo_continuous":  # a rate that falls to 0: the last step moves less than a step in the middle
        kl = "kl" if "kl" in rows[-1] else "approx_kl"
        assert float(rows[-1][kl]) < float(rows[len(rows) // 2][kl])


@gpu
@both
@pytest.mark.parametrize("name", RUNS)
def test_no_sync_inside_an_epoch(name, mode, tmp_path, monkeypatch):
    """After the first call, in which the compiler may look at the device."""
    script = importlib.import_module(name.split()[0])
    replays = []

    class Strict(script.CudaGraph):
        def __call__(self):
            torch.cuda.set_sync_debug_mode("error" if self.calls else "default")
            try:
                return super().__call__()
            finally:
                torch.cuda.set_sync_debug_mode("default")
                replays.append(self.calls)

    monkeypatch.setattr(script, "CudaGraph", Strict)
    script.train(script.parse_args([*SMALL, *FLAGS[name], mode, "--cuda", "--run-dir", str(tmp_path)]))
    assert max(replays) > 10


@gpu
@both
def test_cartpole_is_learned_on_the_gpu(mode, tmp_path):
    script = importlib.import_module("ppo_clip")
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", "100000", mode, "--cuda", "--run-dir", str(tmp_path)]
    assert script.train(script.parse_args(flags))["episodic_return"] > 200
