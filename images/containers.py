"""Containers of podman, locked as the chart's security context has them, for the trials of `images/check.py`.

The root file system is read-only, /tmp alone can be written, there are no capabilities and no way to gain privileges.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_STOP_SECONDS = 30
_COPIED = re.compile(r"(?P<word>COPY|ADD) \S+ in (?P<place>\S+)")


class TrialError(Exception):
    """A trial went wrong; the message says what was expected and what came."""


@contextlib.contextmanager
def trial(name: str) -> Iterator[None]:
    """One line of the report: what was tried, and how long it took."""
    clock = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"  failed  {name}", flush=True)
        raise
    print(f"  ok      {name} ({time.monotonic() - clock:.1f} s)", flush=True)


def locked(image: str, command: Sequence[str], *options: str, detach: str = "") -> list[str]:
    """podman's command line for a container; `detach` is its name if it is to go on in the background."""
    line = ["podman", "run", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp:mode=1777"]  # noqa: S108
    line += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "host"]
    line += ["--env", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '1')}", *options]
    return [*line, *(("--detach", "--name", detach) if detach else ("--rm",)), image, *command]


def run(image: str, *command: str, options: Sequence[str] = (), code: int = 0) -> str:
    """Run a command in a container. Returns all that it printed; raises TrialError unless it ended with `code`."""
    line = locked(image, command, *options)
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603  our own words
    if done.returncode != code:
        said = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise TrialError(f"{image}: {' '.join(command)[:200]} ended with {done.returncode} instead of {code}:\n{said}")
    return done.stdout


@contextlib.contextmanager
def running(image: str, name: str, command: Sequence[str], *options: str) -> Iterator[None]:
    """A container in the background until the block ends, when SIGTERM has to end it in order."""
    started = subprocess.run(locked(image, command, *options, detach=name), capture_output=True, text=True)  # noqa: S603
    if started.returncode:
        raise TrialError(f"{image} does not start: {started.stderr.strip()}")
    try:
        yield
        podman("stop", "--time", str(_STOP_SECONDS), name)
        code = podman("inspect", "--format", "{{.State.ExitCode}}", name).strip()
        if code != "0":
            raise TrialError(f"{image}: ended with {code} after SIGTERM")
    except TrialError:
        logged = subprocess.run(["podman", "logs", name], capture_output=True, text=True)  # noqa: S603,S607
        print("\n".join((logged.stdout + logged.stderr).strip().splitlines()[-20:]), file=sys.stderr)
        raise
    finally:
        podman("rm", "--force", "--time", "0", name)


def podman(*arguments: str) -> str:
    """What podman prints. Raises TrialError with its words if it fails."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True)  # noqa: S603,S607  our own words
    if done.returncode:
        raise TrialError(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def identity(image: str) -> str:
    """The id of the image that has the name; empty if there is none."""
    return podman("images", "--quiet", "--no-trunc", "--filter", f"reference={image}").strip()


def inspect(image: str) -> dict[str, Any]:
    """What podman knows of an image."""
    (found,) = json.loads(podman("image", "inspect", image))
    return dict(found)


def sizes(images: Mapping[str, str], base: str) -> dict[str, dict[str, Any]]:
    """MB (10^6 bytes) of each image unpacked, of what it adds to its base, and of its largest layers."""
    under = int(inspect(base)["Size"])
    found = {}
    for name, image in images.items():
        total = int(inspect(image)["Size"])
        found[name] = {"total_mb": _mb(total), "over_base_mb": _mb(total - under), "layers_mb": layers(history(image))}
    return found


def history(image: str) -> list[dict[str, Any]]:
    """The image's layers as podman tells them, the last first."""
    return list(json.loads(podman("history", "--no-trunc", "--format", "json", image)))


def layers(told: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """MB of each layer of 1 MB or more by what made it, the largest first; the base's first is among them."""
    found: dict[str, float] = {}
    for layer in told:
        words = str(layer["CreatedBy"]).removeprefix("/bin/sh -c ").removeprefix("#(nop) ").strip()
        copied = _COPIED.match(words)
        key = f"{copied['word']} {copied['place']}" if copied else words
        found[key] = found.get(key, 0) + int(layer["size"])
    return {key: _mb(size) for key, size in sorted(found.items(), key=lambda item: -item[1]) if size >= 10**6}


def _mb(size: float) -> float:
    return round(size / 1e6, 1)
