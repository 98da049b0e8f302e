"""Processes that end with the one they work for, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_POLL_SECONDS = 0.5


def end_with(pid: int) -> None:
    """End this process, from a background thread, as soon as process `pid` is gone."""
    _watch(lambda: _is_alive(pid))


def end_with_parent() -> None:
    """End this process, from a background thread, as soon as its parent is gone."""
    parent = os.getppid()
    _watch(lambda: os.getppid() == parent)


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program (`preexec_fn`): ask for SIGKILL when the thread that started it ends.

    None where the system is not Linux (prctl(2)).
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGKILL, 0, 0, 0)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return ask


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a child to end, and end it where it has not done so in time."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _watch(is_wanted: Callable[[], bool]) -> None:
    def poll() -> None:
        while is_wanted():
            time.sleep(_POLL_SECONDS)
        os._exit(143)  # nobody is left to read an exception

    threading.Thread(target=poll, name="lifetime", daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
