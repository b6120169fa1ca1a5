"""A script that keeps the contract of flags and run folders in a few lines, for the launcher's tests. It climbs
1.2 - (x - 1)^2 from x = 0 with gradient steps of size --learning-rate: too small is slow, above 1 it diverges. It
evaluates a checkpoint to 1000 more than its score, so that a test sees which of the two the launcher used.

--trouble makes a leg misbehave, once per marker file in the folder --marks: crash, hang, error or full (disk)."""

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

LOCK = multiprocessing.RLock()  # as tqdm has one; Python complains of the semaphore if the process is killed


class UserError(Exception):
    pass


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(argv):
    parser = Parser()
    parser.add_argument("--env-id")
    for name in ("--total-timesteps", "--stop-at-step", "--seed", "--checkpoint-every", "--num-workers"):
        parser.add_argument(name, type=int)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--eval-episodes", type=int)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--gamma", type=float, default=0.99)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--trouble", default="")
    parser.add_argument("--marks", type=Path)
    return parser.parse_args(argv)


def trouble(args):
    for mark in args.marks.glob(f"{args.trouble}*") if args.marks else []:
        try:
            mark.unlink()  # once
        except FileNotFoundError:
            continue
        if args.trouble == "crash":
            os.kill(os.getpid(), 9)
        if args.trouble == "hang":
            time.sleep(1000)
        raise OSError(28, "No space left on device") if args.trouble == "full" else RuntimeError("an error, as planned")


def load(path):
    content = path.read_bytes()
    if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
        raise UserError("damaged")
    return json.loads(content[64:])


def score(x):
    return 1.2 - min((x - 1) ** 2, 1e6)


def evaluate(args):
    x = load(args.evaluate / "checkpoint.pt")["x"]
    return {"returns": [1000 + score(x) + noise for noise in range(args.eval_episodes)], "seed": args.seed}


def train(args):
    if args.env_id == "nonsense":
        raise UserError("there is no nonsense")
    state = {"step": 0, "x": 0.0, "noise": []}
    if args.resume:
        state = load(args.resume)
    print("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    trouble(args)
    with subprocess.Popen(["sleep", "60"]) as worker:  # scripts have processes of their own, which must not survive
        time.sleep(args.seconds)
        worker.kill()
    args.run_dir.mkdir(parents=True)
    while state["step"] < min(args.total_timesteps, args.stop_at_step):
        state["x"] -= args.learning_rate * 2 * (state["x"] - 1)
        state["step"] += 10
    state["noise"].append([args.seed, state["step"]])
    final = score(state["x"])
    payload = json.dumps(state).encode()
    (args.run_dir / "checkpoint.tmp").write_bytes(hashlib.sha256(payload).hexdigest().encode() + payload)
    os.replace(args.run_dir / "checkpoint.tmp", args.run_dir / "checkpoint.pt")
    header = "global_step,wall_time,sps,episodes,episodic_return,episodic_length\n"
    (args.run_dir / "progress.csv").write_text(header + f"{state['step']},0,0,10,{final},1\n")
    return {"global_step": state["step"], "returns": [final], "signal": None}


if __name__ == "__main__":
    try:
        print(json.dumps(train(parse_args(sys.argv[1:]))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
