"""`python script.py` without the three seconds of importing torch: a fork of this process, which has imported it, runs
the script's file as __main__. Signals, exit status, pipes and process groups are real ones. What a test says about the
start of the interpreter, or about what is imported when, needs a fresh one: subprocess.Popen."""

import contextlib
import faulthandler
import gc
import inspect
import logging
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import warnings

import torch
import torch._dynamo  # which TRPO's first step imports
import torch.utils.tensorboard  # noqa: F401
import tyro  # noqa: F401
from tqdm import tqdm


class Forked(subprocess.Popen):
    """Popen([python, script, *flags], ...) in a fork. It knows what tests use: cwd, env, preexec_fn, pipes, groups."""

    def _execute_child(self, *values):  # which Popen calls between making its pipes and forgetting their other ends
        if torch.cuda.is_initialized():  # which does not survive a fork: as Popen has it, then
            super()._execute_child(*values)
            return
        given = inspect.signature(super()._execute_child).bind(*values).arguments
        pipes = [given[key] for key in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        sys.stdout.flush(), sys.stderr.flush()  # or both would write what is in the buffers
        self.pid = os.fork()
        if not self.pid:
            status = 70
            with contextlib.suppress(BaseException):  # nothing of the child may return into pytest
                become_fresh(given, pipes)
                status = run(list(map(str, given["args"][1:])))
            os._exit(status)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def become_fresh(given, pipes):
    """Undo what a new interpreter would not have inherited."""
    gc.freeze()  # what the parent left as garbage must not close files of ours, whose numbers are the same
    if given["start_new_session"]:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    sources = [x if x != -1 else nothing if i == 0 else i for i, x in enumerate((pipes[0], pipes[3], pipes[5]))]
    for number, source in enumerate([os.dup(x) for x in sources]):
        os.dup2(source, number)
    for number in map(int, os.listdir("/proc/self/fd")):  # the limit may be a billion
        if number > 2:
            with contextlib.suppress(OSError):
                os.close(number)
    faulthandler.disable()
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = open(number, "r" if number == 0 else "w", buffering=1 if number == 2 else -1, closefd=False)
        setattr(sys, name, stream), setattr(sys, f"__{name}__", stream)
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, action)
    os.chdir(given["cwd"] or ".")
    if given["env"] is not None:
        os.environ.clear(), os.environ.update(given["env"])
    sys.path[:0] = [x for x in os.environ.get("PYTHONPATH", "").split(":") if x]
    if given["preexec_fn"]:
        given["preexec_fn"]()
    torch.set_num_threads(1)  # OpenMP's threads have stayed behind
    tqdm.set_lock(threading.RLock())  # all processes share the one that it makes: who is killed would keep it
    multiprocessing.process._children.clear()
    multiprocessing.resource_tracker._resource_tracker.__init__()  # the parent's is at the other end of a closed pipe
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)  # as Python has them
    warnings.showwarning = warnings._showwarning_orig


def run(argv):
    """The file argv[0] as python runs it; its exit status."""
    sys.argv, sys.path[0:0] = argv, [os.path.dirname(os.path.abspath(argv[0]))]
    status = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:  # which a script should have seen to
        print(f"Exception ignored: {error!r}", file=sys.stderr)
        status = 120
    return status
