"""Waiting for what another process does, with an end: a test that hangs tells nobody which one it was."""

import contextlib
import threading
import time


def wait_for(condition, process=None, seconds=120):
    """Return once condition() holds. Fails after so many seconds, or when the process (a Popen) has ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate(timeout=seconds)[1]
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def killed_after(seconds, process):
    """For calls that take no timeout, such as reading to the end: they end with the process."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
