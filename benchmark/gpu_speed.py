"""What --cuda brings, on the GPU of this machine, in one command of under 8 minutes: the README's GPU table.

    python benchmark/gpu_speed.py [--env-id Hopper-v4]

Microseconds per 64-sample minibatch of ppo_clip.py, eager, compiled and captured; milliseconds per TRPO policy step on
2048 states, eager and captured; steps per second of whole runs with 1, 16 and 64 environments; seconds until the first
iteration is done. Stable-Baselines3 (the optional package of benchmark/sb3.py) runs beside them where it is installed.
Contenders take turns; medians.
"""

import argparse
import csv
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
    data = {key: x.to(device) for key, x in script.empty_batch(agent, obs_dim, B).items()}
    for key in ("obs", "action", "advantage", "return"):
        data[key].normal_()
    data["weight"].fill_(1)
    with torch.no_grad():
        data["policy"].copy_(agent.policy(data["obs"]))
        data["logprob"].copy_(agent.dist.log_prob(data["policy"], data["action"]))
    return data


def hopper_agent(script, device):
    import gymnasium as gym

    return script.Agent(11, gym.spaces.Box(-1, 1, (3,)), torch.Generator().manual_seed(0)).to(device)


def minibatch_rows(device, M=64):
    """ppo_clip.py's epoch of 32 minibatches, three ways."""
    import ppo_clip as script

    for mode in ("eager", "compiled", "captured"):
        agent = hopper_agent(script, device)
        flat = script.flatten_parameters(agent.parameters())
        adam = {"params": flat, "m": torch.zeros_like(flat), "v": torch.zeros_like(flat), "step": flat.new_zeros(())}
        data = batch_on(script, agent, device)
        inputs = {key: x for key, x in data.items() if key != "policy"}
        values = dict(zip(script.COEFFICIENTS, (3e-4, 0.2, 0.0, 0.5, 0.5), strict=True))
        coef = {key: torch.tensor(x, device=device) for key, x in values.items()}
        metrics = torch.zeros(len(script.METRICS), device=device)
        step = script.minibatch_update if mode == "eager" else script.compiled(script.minibatch_update, device)
        order = torch.randperm(2048, device=device).view(-1, M)

        def epoch(step=step, agent=agent, adam=adam, inputs=inputs, coef=coef, metrics=metrics, order=order):
            for index in order.unbind():
                step(script.ppo_loss, agent, adam, inputs, index, coef, metrics, True, False)

        run = script.graphed(epoch, device) if mode == "captured" else epoch
        for _ in range(4):
            run()
        micros = milliseconds(run, 10) / len(order) * 1e3
        print(f"| ppo_clip.py, minibatch of {M}, {mode} | {micros:.0f} us |", flush=True)


def trpo_rows(device):
    import trpo_continuous as script

    for mode in ("eager", "captured"):
        agent = hopper_agent(script, device)
        params = script.flatten_parameters(agent.policy_parameters())
        data, args, old = batch_on(script, agent, device), script.Args(), params.clone()
        scalars = torch.tensor([args.max_kl, args.beta], device=device).unbind()

        def step(agent=agent, params=params, data=data, args=args, old=old, scalars=scalars):
            params.copy_(old)  # always from the same place
            script.policy_update(agent, params, data, *scalars, args)

        run = script.graphed(step, device) if mode == "captured" else step
        for _ in range(4):
            run()
        print(
            f"| trpo_continuous.py, policy step on 2048 states, {mode} | {milliseconds(run, 10):.2f} ms |", flush=True
        )


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
