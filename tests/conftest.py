"""Fixtures shared by all tests. The scripts are imported, so what is tested is the code that runs."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
HELPERS = Path(__file__).parent / "helpers"  # toy environments and scripts, batches
sys.path[:0] = [str(ROOT), str(HELPERS), str(Path(__file__).parent), str(ROOT / "benchmark")]
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
from forking import Forked  # noqa: E402

from ppo_clip import can_compile  # noqa: E402

TRAINING = ["trpo_continuous", "ppo_clip", "ppo_klpen"]  # one agent each
PPO = ["ppo_clip", "ppo_klpen"]
CONTRACT = [*TRAINING, "ppo_multiagent"]  # keep the contract of flags and run folders
SCRIPTS = [*CONTRACT, "pbt_launcher"]


needs_compiler = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler and Python's headers")


def pytest_collection_modifyitems(config, items):
    """The slow tests first where several processes share the work, so that none waits for the others at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=SCRIPTS)
def any_script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=TRAINING)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=PPO)
def ppo(request):
    return importlib.import_module(request.param)


@pytest.fixture(params=CONTRACT)
def trainer(request):
    return importlib.import_module(request.param)


@pytest.fixture
def cli(tmp_path):
    """Start a script in an empty folder, as a user would; returns the finished process or, wait=False, the Popen. With
    fresh=True in an interpreter of its own, otherwise in a fork of this one, which has imported the packages."""

    started = []

    def start(name, *flags, wait=True, fresh=False, cwd=tmp_path, **kwargs):
        path = name if name.endswith(".py") else ROOT / f"{name}.py"
        command = [sys.executable, str(path), *map(str, flags)]
        env = os.environ | {"PYTHONPATH": str(HELPERS)}
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = (subprocess.Popen if fresh else Forked)(command, cwd=cwd, env=env, **(defaults | kwargs))
        started.append(process)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)  # s: whoever hangs says so
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    yield start
    for process in started:  # of a test that has failed, too
        process.kill()
        with process:  # which closes its pipes, and waits
            pass
