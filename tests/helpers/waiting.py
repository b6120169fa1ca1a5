"""Waiting for what another process does, with an end: a test that hangs tells nobody which one it was."""

import time


def wait_for(condition, process=None, seconds=120):
    """Return once condition() holds. Fails after so many seconds, or when the process (a Popen) has ended before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)
