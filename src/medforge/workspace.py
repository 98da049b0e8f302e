"""Steps that are reused when nothing they depend on has changed, and go on where they were killed.

A step's key is the digest of its inputs, its settings, the code it runs and the libraries that matter. Where the
environment names a workspace (MEDFORGE_WORKSPACE), a finished step is kept there under its key,

    <workspace>/<step>/<key>/record.json, out/<output>     finished: verified, then linked into the run
    <workspace>/<step>/<key>.partial/out, scratch          unfinished: the next attempt finds its checkpoints here

and elsewhere (in a pod) it writes straight to its outputs. MEDFORGE_RUN names the run's folder: each step leaves
`steps/<task>.json` there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from medforge import __version__
from medforge.files import link_tree, read_json, sha256_file, sha256_json, tree_digest, write_json
from medforge.lifetime import end_with

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy", "pillow", "pyarrow", "matplotlib")
_PACKAGE = Path(__file__).parent
_FACES = ("cli.py", "__main__.py", "apikeys.py", "audit.py")  # no step reaches them: test_layers.py

Body = Callable[[dict[str, Path], Path], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Step:
    """What decides a step's result.

    `package` is the part of medforge that does the work, `task` the step's name in this run (a step such as train
    runs several times). `inputs` are files or folders, `settings` JSON-able values. `logs` are outputs that differ
    from run to run and have no digest.
    """

    package: str
    task: str
    inputs: Mapping[str, Path]
    settings: Any
    outputs: Mapping[str, Path]
    logs: frozenset[str] = field(default=frozenset())

    def key(self) -> str:
        """The digest of all that decides the result."""
        inputs = {name: tree_digest(path) for name, path in self.inputs.items()}
        return sha256_json(
            {
                "package": self.package,
                "inputs": inputs,
                "settings": self.settings,
                "code": code_digest(self.package),
                "libraries": libraries(),
            }
        )


def code_digest(package: str | None = None) -> str:
    """The digest of the source that a step of `package` can reach, or of all of medforge.

    A step never imports another step, so it reaches the top-level modules, `models`, `metrics`, `steps` and its own
    package.
    """
    paths = [path for path in _PACKAGE.glob("*.py") if path.name not in _FACES]
    for folder in (package, "models", "metrics", "steps") if package else ("",):
        paths += [path for path in (_PACKAGE / folder).rglob("*") if path.suffix in (".py", ".html")]
    return sha256_json({path.relative_to(_PACKAGE).as_posix(): sha256_file(path) for path in sorted(set(paths))})


def code_version() -> str:
    """The version of the code: the release's number and the digest of the sources."""
    return f"{__version__}+{code_digest()[:12]}"


def libraries() -> dict[str, str]:
    """The versions of the installed libraries that decide bytes; builds of one version count as one."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def run_step(step: Step, body: Body, reuse: bool = True) -> dict[str, Any]:
    """Do the step, or reuse it, and return the values that `body` returned.

    `body` gets the path for each output and a scratch folder that outlives a kill where there is a workspace.
    With `reuse=False` it is called each time: for work whose result stands outside, such as in an object store.
    """
    if pid := os.environ.get("MEDFORGE_RUN_PID"):
        end_with(int(pid))
    started, clock = datetime.now(timezone.utc), time.monotonic()
    try:
        record = _run(step, body, reuse)
    except BaseException as error:
        _note(step, "error", {"task": step.task, "error": str(error) or type(error).__name__})
        raise
    times = {"started_at": started.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 2)}
    _note(step, "json", record | times)
    return dict(record["values"])


def _run(step: Step, body: Body, reuse: bool) -> dict[str, Any]:
    key = step.key()
    workspace = os.environ.get("MEDFORGE_WORKSPACE")
    if not workspace or not reuse:
        with tempfile.TemporaryDirectory(prefix="medforge-") as scratch:
            values = body(dict(step.outputs), Path(scratch)) or {}
        return _record(step, key, values, dict(step.outputs)) | {"reused": False}
    folder = Path(workspace) / step.package / key
    with _lock(folder):
        record = _finished(folder)
        if record is None:
            print(f"{step.task}: running", flush=True)
            record = _attempt(step, key, folder, body)
            reused = False
        else:
            print(f"{step.task}: reused; its inputs, settings and code are unchanged", flush=True)
            reused = True
        for name, path in step.outputs.items():
            link_tree(folder / "out" / name, path)
    return record | {"reused": reused, "task": step.task}


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished step whose outputs are still what it wrote; else None."""
    if not (folder / "record.json").is_file():
        return None
    record: dict[str, Any] = read_json(folder / "record.json")
    for name, digest in record["outputs"].items():
        path = folder / "out" / name
        if not path.exists() or tree_digest(path) != digest:
            print(f"{path}: was changed or is gone; the step is done again", flush=True)
            shutil.rmtree(folder)
            return None
    return record


def _attempt(step: Step, key: str, folder: Path, body: Body) -> dict[str, Any]:
    partial = folder.with_name(f"{folder.name}.partial")
    out, scratch = partial / "out", partial / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    for left in out.glob(".*.tmp"):  # half-written by an attempt that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    outputs = {name: out / name for name in step.outputs}
    record = _record(step, key, body(outputs, scratch) or {}, outputs)
    write_json(partial / "record.json", record)
    shutil.rmtree(scratch)
    partial.rename(folder)
    return record


def _record(step: Step, key: str, values: Mapping[str, Any], outputs: dict[str, Path]) -> dict[str, Any]:
    return {
        "step": step.package,
        "task": step.task,
        "key": key,
        "outputs": {name: tree_digest(path) for name, path in outputs.items() if name not in step.logs},
        "values": dict(values),
    }


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time works on a key; another waits and then finds it finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _note(step: Step, ending: str, value: Mapping[str, Any]) -> None:
    if run := os.environ.get("MEDFORGE_RUN"):
        write_json(Path(run) / "steps" / f"{step.task}.{ending}", value)
