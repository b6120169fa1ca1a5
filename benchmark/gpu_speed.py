"""What --cuda brings, on the GPU of this machine, in one command of under 8 minutes: the README's GPU table.

    python benchmark/gpu_speed.py [--env-id Hopper-v4]

Microseconds per 64-sample minibatch of ppo_clip.py, eager, compiled, captured and both; milliseconds per TRPO policy
step on 2048 states; steps per second of whole runs with 1, 16 and 64 environments; seconds until the first
iteration is done. Stable-Baselines3 (the optional package of benchmark/sb3.py) runs beside them where it is installed.
Contenders take turns; medians.
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

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def milliseconds(function, calls):
    """Median over 5 rounds of the time per call, the device's work included."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(rounds)


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


def minibatch_rows(device, M=64):
    """ppo_clip.py's epoch of 32 minibatches, four ways."""
    import ppo_clip as script

    for mode in ("eager", "compiled", "captured", "compiled and captured"):
        agent, args = hopper_agent(script, device), script.Args(compile="compiled" in mode, cuda="captured" in mode)
        data, order = batch_on(script, agent, device), torch.randperm(2048, device=device).view(-1, M)
        coef = {key: torch.tensor(x, device=device) for key, x in vars(args).items() if isinstance(x, float)}
        state = script.initial_state(agent, len(script.ppo_loss(agent, data, coef, True)[1]) + 1)
        update = script.compiled(script.update, cuda=True) if mode == "compiled" else script.update
        operands = agent, state, data, order, coef, True
        if mode == "compiled":  # minibatch by minibatch: a loop inside the compiled code is for the CPU
            run = functools.partial(script.epoch_of_updates, update, functools.reduce, *operands)
        else:
            run = script.accelerated(args, script.epoch_of_updates, update, *operands)
        for _ in range(4):
            run()
        micros = milliseconds(run, 10) / len(order) * 1e3
        print(f"| ppo_clip.py, minibatch of {M}, {mode} | {micros:.0f} us |", flush=True)


def trpo_rows(device):
    import trpo_continuous as script

    agent = hopper_agent(script, device)
    data, args = batch_on(script, agent, device), script.Args()
    before = {key: x.clone() for key, x in agent.state_dict().items()}

    def step():
        agent.load_state_dict(before)  # always from the same place
        script.policy_step(agent, data, args.beta, args)

    for _ in range(4):
        step()
    print(f"| trpo_continuous.py, policy step on 2048 states | {milliseconds(step, 10):.2f} ms |", flush=True)


def run_rows(args):
    """Whole runs: steps per second (median over iterations past the third) and time to the first iteration's end."""
    for num_envs in (1, 16, 64):
        sizes = ["--env-id", args.env_id, "--num-envs", num_envs, "--num-steps", 2048 // num_envs]
        steps = ["--total-timesteps", 2048 * 12]
        rows = {
            f"{name}, {flag}": [ROOT / f"{name}.py", *sizes, *steps, "--compile", flag]
            for name in ("ppo_clip", "trpo_continuous")
            for flag in ("--cuda", "--no-cuda")
        }
        if importlib.util.find_spec("stable_baselines3"):
            for device in ("cuda", "cpu"):
                rows[f"Stable-Baselines3 PPO, {device}"] = [ROOT / "benchmark/sb3.py", "ppo", *sizes, *steps]
                rows[f"Stable-Baselines3 PPO, {device}"] += ["--device", device]
        for label, command in rows.items():
            with tempfile.TemporaryDirectory() as folder:
                out = ["--csv", f"{folder}/progress.csv"] if "sb3" in str(command[0]) else ["--run-dir", folder]
                command = [sys.executable, *map(str, command), *out]
                run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
                if run.returncode:
                    print(f"| {label}, N = {num_envs} | failed: {run.stderr.strip().splitlines()[-1]} |", flush=True)
                    continue
                with open(f"{folder}/progress.csv") as file:
                    table = list(csv.DictReader(file))
            sps = statistics.median(float(row["sps"]) for row in table[3:])
            first = float(table[0]["wall_time"])
            print(f"| {label}, N = {num_envs} | {sps:.0f} steps/s, first iteration after {first:.1f} s |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="Hopper-v4")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_speed.py: torch finds no CUDA device here")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "gymnasium"))
    print(f"| {torch.cuda.get_device_name()}, {versions} | |\n| --- | --- |")
    device = torch.device("cuda")
    minibatch_rows(device)
    trpo_rows(device)
    run_rows(args)


if __name__ == "__main__":
    main()
