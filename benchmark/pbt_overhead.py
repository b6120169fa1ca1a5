"""What a population costs beyond its work: 4 members x 5 legs of 2 s, 2 slots, so 20 s if nothing else took time.

    pip install "ray[tune]==2.60.0"
    python benchmark/pbt_overhead.py

Interleaved, `--repeats` times: pbt_launcher.py, and Ray Tune's PopulationBasedTraining with its function API and with
its class API (reset_config and reuse_actors, its fastest). Every process imports what our scripts import (torch,
gymnasium, tyro, TensorBoard), every leg spins for 2 s, reads and writes a checkpoint. Wall time of the whole process,
start-up included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

WORK = """
import argparse, json, time
from pathlib import Path
import gymnasium, numpy as np, torch, tyro
from torch.utils.tensorboard import SummaryWriter

def spin(seconds=2.0):
    end = time.perf_counter() + seconds
    x = np.ones((64, 64))
    while time.perf_counter() < end:
        x = np.tanh(x @ x)
"""

SCRIPT = (
    WORK
    + """
def parse_args(argv):
    parser = argparse.ArgumentParser()
    for name in ("--total-timesteps", "--stop-at-step", "--seed", "--checkpoint-every", "--num-workers"):
        parser.add_argument(name, type=int)
    parser.add_argument("--x", type=float)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", type=Path)
    return parser.parse_args(argv)

def train(args):
    state = torch.load(args.resume, weights_only=True) if args.resume else {"step": 0, "theta": 0.0}
    spin()
    state = {"step": args.stop_at_step, "theta": state["theta"] + args.x}
    args.run_dir.mkdir(parents=True)
    torch.save(state, args.run_dir / "checkpoint.pt")
    return {"global_step": state["step"], "returns": [state["theta"]], "signal": None}
"""
)

TUNE = (
    WORK
    + """
import os, random, sys, tempfile
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

def load(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)

def save(state, folder):
    torch.save(state, Path(folder) / "state.pt")

def function(config):
    state, checkpoint = {"step": 0, "theta": 0.0}, tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = load(folder)
    while state["step"] < 5:
        spin()
        state = {"step": state["step"] + 1, "theta": state["theta"] + config["x"]}
        with tempfile.TemporaryDirectory() as folder:
            save(state, folder)
            tune.report({"score": state["theta"]}, checkpoint=tune.Checkpoint.from_directory(folder))

class Class(tune.Trainable):
    def setup(self, config):
        self.state, self.config = {"step": 0, "theta": 0.0}, config
    def step(self):
        spin()
        self.state = {"step": self.state["step"] + 1, "theta": self.state["theta"] + self.config["x"]}
        return {"score": self.state["theta"], "done": self.state["step"] >= 5}
    def save_checkpoint(self, folder):
        save(self.state, folder)
    def load_checkpoint(self, folder):
        self.state = load(folder)
    def reset_config(self, config):
        self.config, self.state = config, {"step": 0, "theta": 0.0}
        return True

if __name__ == "__main__":
    import ray
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", perturbation_interval=1, hyperparam_mutations={"x": tune.uniform(0.1, 1.0)}
    )
    trainable = {"function": function, "class": Class}[sys.argv[1]]
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"x": tune.uniform(0.1, 1.0)},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", scheduler=scheduler, num_samples=4, reuse_actors=sys.argv[1] == "class"
        ),
        run_config=tune.RunConfig(
            storage_path=sys.argv[2], name="run", verbose=0, stop={"training_iteration": 5},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1 if sys.argv[1] == "class" else 0),
        ),
    )
    results = tuner.fit()
    assert all(not r.error for r in results), [r.error for r in results]
    print(json.dumps({"legs": sum(r.metrics["training_iteration"] for r in results)}))
"""
)


def seconds(command):
    start = time.perf_counter()
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if run.returncode:
        sys.exit(f"{command} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    (folder / "work.py").write_text(SCRIPT)
    (folder / "tune.py").write_text(TUNE)
    ours = [sys.executable, ROOT / "pbt_launcher.py", folder / "work.py", "--population", 4, "--slots", 2]
    ours += ["--interval", 1, "--total-timesteps", 5, "--mutate", "x:lin:0.1:1.0"]
    results = {}
    for repeat in range(args.repeats):
        contenders = {
            "pbt_launcher.py, sync": [*ours, "--run-dir", folder / f"sync{repeat}"],
            "pbt_launcher.py, async": [*ours, "--run-dir", folder / f"async{repeat}", "--mode", "async"],
            "Ray Tune PBT, class, reuse_actors": [sys.executable, folder / "tune.py", "class", folder / f"c{repeat}"],
            "Ray Tune PBT, function": [sys.executable, folder / "tune.py", "function", folder / f"f{repeat}"],
        }
        for name, command in contenders.items():
            results.setdefault(name, []).append(seconds(command))
            print(f"{repeat + 1}/{args.repeats} {name}: {results[name][-1]:.1f} s", file=sys.stderr)
    print("| 4 members x 5 legs x 2 s, 2 slots | wall time, s (median) | range | x ideal 20 s |")
    print("| --- | ---: | --- | ---: |")
    for name, x in results.items():
        middle = statistics.median(x)
        print(f"| {name} | {middle:.1f} | {min(x):.1f}-{max(x):.1f} | {middle / 20:.2f} |")
    (ROOT / "benchmark/results/pbt_overhead.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
