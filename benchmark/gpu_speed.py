"""What --cuda brings, on the GPU of this machine, in one command of five minutes: the GPU table.

    python benchmark/speed.py gpu [--seconds 290]

Microseconds per minibatch of ppo_clip.py in every form, on the CPU, too; milliseconds per policy step of
trpo_continuous.py on 2048 states; then whole runs with 1, 8, 16 and 64 environments: steps per second (median over
iterations past the third) and seconds from the command to the end of the first iteration, as whoever waits for it sees
them. Stable-Baselines3 (the optional package of benchmark/sb3.py) runs beside them where it is installed. The last
line names the fastest command. Rows come one by one, so a run that is cut short keeps what it has measured.
"""

import argparse
import csv
import functools
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def milliseconds(function, calls, rounds=5):
    """Median over rounds of the time per call, the device's work included."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def batch_on(script, agent, device, obs_dim=11, B=2048):
    """A batch as make_batch gives it, of random numbers."""
    obs, action, advantage = (torch.randn(*shape, device=device) for shape in ((B, obs_dim), (B, 3), (B,)))
    with torch.no_grad():
        parameters, value = agent.policy_parameters(obs), agent.value(obs)
        logprob = agent.distribution(parameters).log_prob(action)
    batch = {"obs": obs, "action": action, "old_policy": parameters, "logprob": logprob, "value": value}
    return batch | {"advantage": advantage, "return": value + advantage}


def hopper_agent(script, device):
    import gymnasium as gym

    torch.manual_seed(0)
    return script.Agent(11, gym.spaces.Box(-1, 1, (3,))).to(device)


def minibatch_row(mode, M, B):
    """An epoch of ppo_clip.py in one of its forms."""
    import ppo_clip as script

    device = torch.device("cpu" if "CPU" in mode else "cuda")
    args = script.Args(compile="compiled" in mode, cuda="captured" in mode)
    agent = hopper_agent(script, device)
    data, order = batch_on(script, agent, device, B=B), torch.randperm(B, device=device).view(-1, M)
    coef = {key: torch.tensor(x, device=device) for key, x in vars(args).items() if isinstance(x, float)}
    state = script.initial_state(agent, len(script.ppo_loss(agent, data, coef, True)[1]) + 1)
    operands = agent, state, data, order, coef, True
    if mode == "compiled":  # minibatch by minibatch: a loop inside the compiled code is for the CPU
        update = script.compiled(script.update, cuda=True)
        run = functools.partial(script.epoch_of_updates, update, functools.reduce, *operands)
    else:
        run = script.accelerated(args, script.epoch_of_updates, script.update, *operands)
    for _ in range(4):
        run()
    micros = milliseconds(run, 1 if mode == "eager" else 10) / len(order) * 1e3
    return f"| ppo_clip.py, minibatch of {M}, {mode} | {micros:.0f} us |"


def trpo_row(device):
    import trpo_continuous as script

    agent = hopper_agent(script, device)
    data, args = batch_on(script, agent, device), script.Args(cuda=device == "cuda")
    functions = script.functions_of_theta(agent, data, args)
    before = {key: x.clone() for key, x in agent.state_dict().items()}

    def step():
        agent.load_state_dict(before)  # always from the same place
        script.policy_step(agent, *functions, args.beta, args)

    for _ in range(4):
        step()
    return f"| trpo_continuous.py, policy step on 2048 states, {device} | {milliseconds(step, 10):.2f} ms |"


def run_of(command, path, limit):
    """Steps per second, and seconds from the command to the first row in the file. Raises RuntimeError."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    start, first = time.time(), None
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None:
            time.sleep(0.02)
            if first is None and path.exists() and path.read_text().count("\n") > 1:
                first = time.time() - start
            if time.time() - start > limit:
                process.terminate()
                process.wait(timeout=20)
                break
        err.seek(0)
        lines = [line for line in err.read().splitlines() if line.strip()] or ["without a word"]
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if len(rows) < 4:
        raise RuntimeError(f"exit status {process.returncode}, {lines[-1][:100]}")
    return statistics.median(float(row["sps"]) for row in rows[min(3, len(rows) - 2) :]), first


def contenders(args):
    """(name, N, command) of whole runs, the most interesting ones first."""
    multi, script = ROOT / "ppo_multiagent.py", ROOT / "ppo_clip.py"
    rare = ["--checkpoint-every", 10**9]

    def hopper(N, device):
        sizes = ["--env-id", args.env_id, "--num-envs", N, "--num-steps", 2048 // N, "--num-workers", min(N, 16)]
        return [*sizes, "--total-timesteps", 2048 * (15 if N == 1 else 40), "--compile", device]

    for N in (64, 16, 8, 1):
        yield "ppo_clip.py --cuda", N, [script, *hopper(N, "--cuda")]
    moves = [
        "--algorithm",
        "selfplay",
        "--num-envs",
        4096,
        "--num-minibatches",
        16,
        "--total-timesteps",
        4096 * 64 * 12,
    ]
    yield "self-play --cuda", 4096, [multi, *moves, *rare, "--cuda", "--compile"]
    steps = ["--num-envs", 4096, "--total-timesteps", 4096 * 25 * 12]
    yield "MAPPO --cuda", 4096, [multi, *steps, *rare, "--cuda", "--compile"]
    yield "trpo_continuous.py --cuda", 64, [ROOT / "trpo_continuous.py", *hopper(64, "--cuda")]
    if importlib.util.find_spec("stable_baselines3"):
        for N in (64, 1):
            for device in ("cpu", "cuda"):
                sizes = ["--env-id", args.env_id, "--num-envs", N, "--num-steps", 2048 // N]
                sb3 = [ROOT / "benchmark/sb3.py", "ppo", *sizes, "--total-timesteps", 2048 * 5, "--device", device]
                yield f"Stable-Baselines3 PPO, {device}", N, sb3
    for N in (64, 8, 1):  # last: before torch 2.13 each process compiles anew for the CPU, which may take a minute
        yield "ppo_clip.py --no-cuda", N, [script, *hopper(N, "--no-cuda")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="Hopper-v4")
    parser.add_argument("--seconds", type=float, default=290, help="no row is started after this")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args(argv)
    start = time.time()
    if not torch.cuda.is_available():
        sys.exit("speed.py gpu: torch finds no CUDA device here")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "gymnasium"))
    cores = len(os.sched_getaffinity(0))
    print(f"| {torch.cuda.get_device_name()}, {cores} cores, {versions} | |\n| --- | --- |", flush=True)
    rows = [lambda mode=mode: minibatch_row(mode, 64, 2048) for mode in ("eager", "compiled", "captured")]
    for M, B in ((64, 2048), (1024, 8192)):
        rows += [lambda m=mode, M=M, B=B: minibatch_row(m, M, B) for mode in ("compiled and captured", "CPU, compiled")]
    rows += [lambda device=device: trpo_row(device) for device in ("cuda", "cpu")]
    for row in rows if not args.only else ():
        if time.time() - start < args.seconds:
            print(row(), flush=True)
    best = 0, None
    for name, N, command in contenders(args):
        if time.time() - start > args.seconds:
            print(f"| {name}, N = {N} | not started: the time is up |", flush=True)
            continue
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "progress.csv"
            out = ["--csv", path] if "sb3" in str(command[0]) else ["--run-dir", folder]
            try:
                sps, first = run_of(
                    [sys.executable, *command, *out], path, limit=max(30, args.seconds - (time.time() - start))
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"| {name}, N = {N} | failed: {error} |", flush=True)
                continue
        print(f"| {name}, N = {N} | {sps:.0f} steps/s, first iteration after {first:.1f} s |", flush=True)
        if command[0].name == "ppo_clip.py":
            best = max(best, (sps, " ".join(map(str, [command[0].name, *command[1:]]))))
    if best[1]:
        print(f"the fastest of ppo_clip.py, {best[0]:.0f} steps/s: python {best[1]}", flush=True)


if __name__ == "__main__":
    main()
