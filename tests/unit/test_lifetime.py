"""A process ends with the one it works for, also when that is killed without a chance to say so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

WATCHER = "import sys, time; from medforge import lifetime; {call}; print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize("call", ["lifetime.end_with({pid})", "lifetime.end_with_parent()"])
def test_a_child_ends_with_a_killed_parent(call: str) -> None:
    parent_code = (
        "import os, subprocess, sys, time\n"
        f"code = {WATCHER.format(call=call)!r}.replace('{{pid}}', str(os.getpid()))\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)\n"
        "print(child.pid, child.stdout.readline().strip(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, ready = parent.stdout.readline().split()
    assert ready == "ready" and psutil.pid_exists(int(pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.05)
