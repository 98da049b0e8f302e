"""Running a pipeline on this machine: its environment, its store, its end; shared by all pipelines."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medforge.files import read_json


class RunFailedError(RuntimeError):
    """A step failed; the message says which and why."""


@contextlib.contextmanager
def store(root: Path, folder: Path) -> Iterator[None]:
    """The environment of the steps: the object store, the workspace, and the run that they belong to."""
    from medforge.embedded import serve
    from medforge.storage import is_configured

    steps = {
        "MEDFORGE_WORKSPACE": str(root / "workspace"),
        "MEDFORGE_RUN": str(folder),
        "MEDFORGE_RUN_PID": str(os.getpid()),
        "TOKENIZERS_PARALLELISM": "false",
        # threads that spin while they wait for each other, by default for 300,000 turns, take the cores from those that
        # they wait for as soon as anything else runs on the machine
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "6000"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        server = {} if is_configured() else stack.enter_context(serve(root))
        os.environ.update(steps | server)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def no_child_left() -> Iterator[None]:
    """End what the block has started, and all that those started, if it is left by an exception."""
    import psutil

    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    except BaseException:
        started = [child for child in psutil.Process().children() if child.pid not in before]
        family = [process for child in started for process in [*child.children(recursive=True), child]]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        raise


def execute(build: Callable[[], Any], arguments: dict[str, str], folder: Path) -> Path:
    """Run the pipeline that `build` gives by kfp's local runner in `folder`; returns the folder of the artifacts.

    Raises RunFailedError when a step fails, ValueError when this machine cannot run it.
    """
    # kfp's local runner puts its own interpreter in the place of these letters wherever they stand in an argument
    if "python3" in str(folder):
        raise ValueError(
            f"{folder}: the path holds 'python3', which kfp's local runner would rewrite; move the project"
        )
    # kfp tells each argument of each step; the run's own lines say what a user wants to know
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfp import local

        artifacts = folder / "artifacts"
        plain_print = builtins.print
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(artifacts),
            workspace_root=str(folder / "kfp"),
            raise_on_error=True,
            enable_caching=False,
        )
        try:
            build()(**arguments)
        except RuntimeError as error:
            raise RunFailedError(_failure(folder) or str(error)) from None
        finally:
            builtins.print = plain_print  # kfp replaces it, and steps that run side by side do not put it back
            logging.disable(logging.NOTSET)
            shutil.rmtree(folder / "kfp", ignore_errors=True)
    return artifacts


def _failure(folder: Path) -> str | None:
    for path in sorted(folder.glob("steps/*.error")):
        error = read_json(path)
        return f"{error['task']}: {error['error']}\n(the whole log is in {folder / 'log.txt'})"
    return None


def records(folder: Path) -> list[dict[str, Any]]:
    """What the steps noted, in the order in which they ended."""
    paths = sorted((folder / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [read_json(path) for path in paths]
