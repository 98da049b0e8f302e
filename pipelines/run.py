"""Run the retraining pipeline on this machine: `python -m pipelines.run`, or `make pipeline-run`.

Everything that a run leaves stands in `runs/<run id>/`; finished steps are kept in `.medforge/workspace` and reused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from medforge.config import RunConfig, load_config
from medforge.files import link_tree, read_json, write_json
from medforge.workspace import code_version, libraries
from pipelines.console import Console
from pipelines.local import RunFailedError, execute, no_child_left, records, store

DEFAULT_CONFIG = "pipelines/configs/phantom.yaml"


def main() -> int:
    """Run the pipeline as the command line says. Returns 0 when it ended, whatever the verdict, else 1 or 130."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    overrides = list(arguments.set)
    if arguments.data:
        overrides.append(f"data.source={json.dumps(_source(arguments.data))}")
    try:
        config = load_config(arguments.config or DEFAULT_CONFIG, overrides)
        run(config, Path(arguments.runs).resolve(), Path(arguments.root).resolve(), sys.stdout)
    except (ValueError, OSError, RunFailedError) as error:
        print(f"pipeline-run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipeline-run: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.run", description=__doc__)
    parser.add_argument("--config", default="", help=f"the run's YAML file (default {DEFAULT_CONFIG})")
    parser.add_argument("--data", default="", help="a folder, JSON file or s3:// prefix; overrides data.source")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as data.split=by-study")
    parser.add_argument("--runs", default="runs", help="where runs are written (default runs)")
    parser.add_argument("--root", default=".medforge", help="embedded store and workspace (default .medforge)")
    return parser


def _source(data: str) -> str:
    if data.startswith("s3://") or data == "phantom":
        return data
    if not Path(data).exists():
        raise SystemExit(f"pipeline-run: DATA {data}: no such file or folder")
    return str(Path(data).resolve())


def run(config: RunConfig, runs: Path, root: Path, terminal: Any) -> dict[str, Any]:
    """Run the pipeline for `config`; returns the content of the run's run.json.

    Raises RunFailedError when a step fails, ValueError when this machine cannot run it.
    """
    config = _absolute(config)
    run_id, folder = _new_folder(config, runs)
    manifest: dict[str, Any] = {
        "run": run_id,
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": code_version(),
        "libraries": libraries(),
        "config": config.model_dump(),
        "status": "running",
        "passed": False,
        "release": None,
        "steps": [],
    }
    write_json(folder / "run.json", manifest)
    clock = time.monotonic()
    console = Console(folder / "log.txt", terminal)
    with contextlib.redirect_stdout(console), contextlib.closing(console):
        print(f"run {run_id}: everything is written to {folder}")
        try:
            with store(root, folder), no_child_left(), console.only_steps():
                # the escape is the same JSON; it keeps a path in it from being rewritten (see `execute`)
                given = {"config": config.to_json().replace("python3", "pytho\\u006e3")}
                outputs = execute(lambda: _build(config), given, folder)
            manifest["status"] = "finished"
        except BaseException:
            manifest["status"] = "failed"
            raise
        finally:
            manifest["seconds"] = round(time.monotonic() - clock, 1)
            manifest["steps"] = records(folder)
            manifest |= _outcome(manifest["steps"])
            write_json(folder / "run.json", manifest)
            _point_latest(runs, folder)
        _collect(outputs, folder)
        _summary(manifest, folder)
    return manifest


def _build(config: RunConfig) -> Any:
    from pipelines.retrain import build

    return build(config)


def _absolute(config: RunConfig) -> RunConfig:
    """The configuration with local paths made absolute: the steps run in folders of their own."""
    source, base = config.data.source, config.model.base
    data = config.data.model_copy(update={"source": str(Path(source).resolve()) if Path(source).exists() else source})
    model = config.model.model_copy(update={"base": str(Path(base).resolve()) if Path(base).is_dir() else base})
    return config.model_copy(update={"data": data, "model": model})


def _new_folder(config: RunConfig, runs: Path) -> tuple[str, Path]:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        run_id = f"{config.name}-{stamp}" + (f"-{number}" if number else "")
        with contextlib.suppress(FileExistsError):
            (runs / run_id).mkdir(parents=True)
            return run_id, runs / run_id
    raise RuntimeError(f"{runs}: a hundred runs started in the same second")


def _outcome(steps: list[dict[str, Any]]) -> dict[str, Any]:
    values = {step["task"]: step["values"] for step in steps}
    return {"passed": bool(values.get("gate", {}).get("passed")), "release": values.get("publish", {}).get("release")}


def _point_latest(runs: Path, folder: Path) -> None:
    fresh = runs / f".latest-{folder.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    fresh.replace(runs / "latest")


def _collect(artifacts: Path, folder: Path) -> None:
    """Put what a reader wants at the top of the run's folder."""
    wanted = {
        "evaluate/results": "",  # a folder: its files
        "gate/verdict": "verdict.json",
        "report/html": "report.html",
    }
    for inner, name in wanted.items():
        (found,) = artifacts.glob(f"*/{inner}")
        if found.is_dir():
            for file in found.iterdir():
                link_tree(file, folder / file.name)
        else:
            link_tree(found, folder / name)


def _summary(manifest: dict[str, Any], folder: Path) -> None:
    from medforge.evaluate.compare import summary_lines
    from medforge.release.policy import failed_rules

    print("\n".join(summary_lines(read_json(folder / "results.json"))))
    reused = [step["task"] for step in manifest["steps"] if step["reused"]]
    print(f"{manifest['seconds']:.0f} s; reused: {', '.join(reused) or 'nothing'}")
    print(f"report:  {folder / 'report.html'}")
    if manifest["passed"]:
        config = manifest["config"]["publish"]
        print(f"release: s3://{config['bucket']}/releases/{manifest['release']} (channel {config['channel']})")
    else:
        print("release: none; the candidate did not pass:")
        print("\n".join(f"  {line}" for line in failed_rules(read_json(folder / "verdict.json"))))


if __name__ == "__main__":
    raise SystemExit(main())
