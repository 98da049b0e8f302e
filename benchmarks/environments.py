"""Environments of their own for the peers, and commands run in them with their time and memory measured."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medforge.files import sha256_json, write_atomic

_VERSIONS = (
    "import importlib.metadata as m, json, sys\n"
    "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
    "print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))\n"
)


@dataclass(frozen=True)
class Ran:
    """A command that ended: exit code, wall time, peak of resident memory, and the file with its output.

    `peak_bytes` is that of the largest single process: the command, or a descendant that it waited for (getrusage(2)).
    Helper processes, such as a data loader's workers, do not add to it. The kernel counts from the process that
    started the command, so that one has to stay small.
    """

    code: int
    seconds: float
    peak_bytes: int
    log: Path

    def tail(self, lines: int = 3) -> str:
        """The last lines of the output that are not blank."""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


@dataclass(frozen=True)
class Environment:
    """A virtual environment that pip fills with `requirements`, at the versions that `constraints` allow."""

    name: str
    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()

    def folder(self, cache: Path) -> Path:
        """Where it is kept below `cache`: other requirements, or another Python, make another environment."""
        content = [list(self.requirements), list(self.constraints), list(sys.version_info[:2])]
        return cache / f"{self.name}-{sha256_json(content)[:12]}"

    def make(self, cache: Path) -> Path:
        """Install it, unless that was done before. Returns its Python.

        Raises ValueError with the end of pip's output when it fails; what is half made is made anew the next time.
        """
        folder = self.folder(cache).absolute()
        python, mark = folder / "venv" / "bin" / "python", folder / "made"
        if mark.is_file():
            return python
        print(f"installing {', '.join(self.requirements)} into {folder} (once; some minutes)", flush=True)
        constraints = folder / "constraints.txt"
        write_atomic(constraints, "".join(f"{line}\n" for line in self.constraints))
        # an environment cannot be moved once it is made, so the mark at the end stands in for a rename
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder / "venv")],
            [*pip, "--constraint", str(constraints), *self.requirements],
        ):
            ran = run(command, folder / "install.log")
            if ran.code:
                raise ValueError(f"{self.name} cannot be installed, see {ran.log}: {ran.tail()}")
        mark.touch()
        return python


def machine() -> dict[str, Any]:
    """The machine, as far as it decides speed."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or None,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(python: Path, packages: Sequence[str]) -> dict[str, str | None]:
    """The versions of `packages` in the environment of `python`; None for one that is not installed."""
    command = [str(python), "-c", _VERSIONS, *packages]
    ended = subprocess.run(command, capture_output=True, check=True)  # noqa: S603  our own environment's Python
    return dict(json.loads(ended.stdout))


def run(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    folder: Path | None = None,
) -> Ran:
    """Run `command`, its output in the file `log`, with `environment` added to this process's own.

    After `timeout` seconds it is killed with all that it started; the exit code is then negative. The same happens
    when this process is interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        started = time.monotonic()
        process = subprocess.Popen(  # noqa: S603  the benchmark's own commands
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=folder,
            start_new_session=True,
        )
        timer = threading.Timer(timeout or 0, _kill, [process.pid])
        if timeout:
            timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - started
        finally:
            timer.cancel()
            _kill(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in kilobytes elsewhere
    return Ran(process.returncode, seconds, usage.ru_maxrss * unit, log)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep `folder` to this process until the block ends: two would overwrite each other's runs and share the cores.

    A SIGTERM in the block ends it as an interrupt does, so that what `run` started ends too. Raises ValueError when
    another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another benchmark runs here; wait for it, or name another --cache") from None
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _kill(group: int) -> None:
    """End a process with all that it started, where any of them is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
