"""Pipelines on Kubeflow: `python -m pipelines.kubeflow submit | upload | schedule | unschedule | runs`.

Who we are to the API, and where it is, stands in the environment: see pipelines/client.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from medforge import __version__
from medforge.files import sha256_file
from pipelines import schedules
from pipelines.client import Kubeflow, KubeflowError, named
from pipelines.compile import add_arguments, load, pipeline_of, release_parameters, write
from pipelines.cron import parse

FINISHED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
_PATIENCE = 300.0  # seconds for which an API that cannot be reached is asked again while a run is followed
_LISTED = 10


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: its file, name, the version that its content is, and what its parameters are set to."""

    file: Path
    name: str
    version: str
    parameters: dict[str, Any]
    experiment: str
    pipeline_root: str
    service_account: str


def main() -> int:
    """Do as the command line says. Returns 0, 1 after an error or a run that failed, or 130."""
    arguments = _parser().parse_args()
    try:
        return int(arguments.do(arguments, Kubeflow.connect(os.environ)))
    except (ValueError, OSError) as error:
        print(f"pipeline-{arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pipeline-{arguments.command}: interrupted; a run that was submitted goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.kubeflow", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, do: Callable[..., int], help: str, compiles: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(do=do)
        if compiles:
            add_arguments(made)
        return made

    submit = command("submit", _submit, "upload the pipeline if it is new, and start a run")
    submit.add_argument("--name", default="", help="the run's name (default: the configuration's, and the time)")
    submit.add_argument("--wait", action="store_true", help="follow the run; the exit status is its state")
    submit.add_argument("--poll", type=float, default=10.0, help="seconds between two looks (default 10)")
    command("upload", _upload, "make a version of the pipeline, unless its content is one already")
    schedule = command("schedule", _schedule, "run it again and again; replaces the schedule of the same name")
    schedule.add_argument("--cron", required=True, help='six fields, seconds first, UTC: "0 0 2 * * *" is 02:00 daily')
    schedule.add_argument("--name", default="", help="the schedule's name (default: the pipeline's)")
    schedule.add_argument("--start", default="", help="no run before, such as 2027-01-31T00:00:00Z")
    schedule.add_argument("--end", default="", help="no run after")
    unschedule = command("unschedule", _unschedule, "remove a schedule; runs that it started go on", compiles=False)
    unschedule.add_argument("--name", required=True, help="the schedule's name")
    runs = command("runs", _runs, "the last runs and the schedules, with their state and page", compiles=False)
    runs.add_argument("--limit", type=int, default=_LISTED, help=f"how many runs (default {_LISTED})")
    return parser


def _submit(arguments: argparse.Namespace, api: Kubeflow) -> int:
    with _package(arguments) as package:
        pipeline, version = upload(api, package)
        experiment = api.ask(
            "make the experiment", api.client.create_experiment, package.experiment, namespace=api.namespace
        )
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        run = api.ask(
            "start the run",
            api.client.run_pipeline,
            experiment.experiment_id,
            arguments.name or f"{package.experiment}-{stamp}",
            params=package.parameters,
            pipeline_id=pipeline,
            version_id=version,
            pipeline_root=package.pipeline_root or None,
            service_account=package.service_account or None,
        )
    print(f"run {run.display_name}: {api.link('runs', run.run_id)}", flush=True)
    return follow(api, run.run_id, arguments.poll) if arguments.wait else 0


def _upload(arguments: argparse.Namespace, api: Kubeflow) -> int:
    with _package(arguments) as package:
        upload(api, package)
    return 0


def _schedule(arguments: argparse.Namespace, api: Kubeflow) -> int:
    now = datetime.now(timezone.utc)
    cron = parse(arguments.cron, now)
    start, end = (
        schedules.moment(getattr(arguments, name), name) if getattr(arguments, name) else ""
        for name in ("start", "end")
    )
    schedules.check_window(start, end, now)
    with _package(arguments) as package:
        pipeline, version = upload(api, package)
    wanted = schedules.Schedule(
        name=arguments.name or package.name,
        cron=cron,
        experiment=package.experiment,
        pipeline=pipeline,
        version=version,
        parameters=package.parameters,
        start=start,
        end=end,
        pipeline_root=package.pipeline_root,
        service_account=package.service_account,
    )
    made = schedules.put(api, wanted, print)
    first = datetime.fromisoformat(start.replace("Z", "+00:00")) if start else now
    times = ", ".join(f"{time:%Y-%m-%d %H:%M:%S}" for time in cron.next(max(first, now), 3))
    print(f"{cron.text} in UTC (or the zone that Kubeflow's operator gave its controller): {times}, …")
    print(f"one run at a time; what is missed is not made up for: {api.link('recurringrun', made.recurring_run_id)}")
    return 0


def _unschedule(arguments: argparse.Namespace, api: Kubeflow) -> int:
    if not schedules.remove(api, arguments.name):
        names = sorted({run.display_name for run in schedules.find(api)})
        raise ValueError(f"no schedule is named {arguments.name!r}; there are {', '.join(names) or 'none'}")
    print(f"schedule {arguments.name}: removed")
    return 0


def _runs(arguments: argparse.Namespace, api: Kubeflow) -> int:
    if arguments.limit < 1:
        raise ValueError(f"limit is {arguments.limit}; at least 1 is needed")
    listing = api.client.list_runs
    page = api.ask(
        "list the runs", listing, page_size=arguments.limit, sort_by="created_at desc", namespace=api.namespace
    )
    for run in page.runs or []:
        took = f"{run.finished_at - run.created_at}".partition(".")[0] if _ended(run) else ""
        created = run.created_at.astimezone(timezone.utc)
        print(
            f"{run.state or 'PENDING':<10} {created:%Y-%m-%d %H:%M} {took:>9} {run.display_name} "
            f"{api.link('runs', run.run_id)}"
        )
    if not page.runs:
        print(f"no run in the namespace {api.namespace}")
    for run in schedules.find(api):
        cron = run.trigger.cron_schedule.cron if run.trigger and run.trigger.cron_schedule else "not by cron"
        print(
            f"schedule   {run.display_name}: {cron} (UTC), {'on' if run.mode == schedules.ENABLE else 'off'} "
            f"{api.link('recurringrun', run.recurring_run_id)}"
        )
    return 0


def _ended(run: Any) -> bool:
    """Whether the run's end is known; the server tells 1970 before it."""
    return bool(run.finished_at and run.created_at and run.finished_at >= run.created_at)


@contextmanager
def _package(arguments: argparse.Namespace) -> Iterator[Package]:
    """What the command line names, compiled to a file that is there for the block."""
    if not arguments.cluster:
        raise ValueError("--cluster is missing: name the cluster's YAML file; pipelines/clusters/ has examples")
    config, cluster = load(arguments)
    assert cluster is not None
    parameters = release_parameters(arguments, config, cluster) or {"config": config.to_json()}
    pipeline = pipeline_of(arguments.pipeline, config, cluster)
    with tempfile.TemporaryDirectory(prefix="medforge-") as folder:
        file = Path(folder) / f"{arguments.pipeline}.yaml"
        write(pipeline, file)
        yield Package(
            file=file,
            name=pipeline.component_spec.name,
            version=f"{__version__}-{sha256_file(file)[:12]}",
            parameters=parameters,
            experiment=config.name if arguments.pipeline == "retrain" else pipeline.component_spec.name,
            pipeline_root=cluster.pipeline_root,
            service_account=cluster.service_account,
        )


def upload(api: Kubeflow, package: Package) -> tuple[str, str]:
    """The ids of the pipeline and of the version with this content; made where they are not there yet."""
    import kfp_server_api

    client = api.client
    listed = api.all(
        "list the pipelines",
        client.list_pipelines,
        "pipelines",
        namespace=api.namespace,
        filter=named(package.name),
    )
    pipeline = next((item.pipeline_id for item in listed if item.display_name == package.name), None)
    if pipeline is None:
        wanted = kfp_server_api.V2beta1Pipeline(display_name=package.name, namespace=api.namespace)
        make = client.pipelines.pipeline_service_create_pipeline
        pipeline = api.ask("make the pipeline", make, pipeline=wanted).pipeline_id
    versions = api.all(
        "list the versions",
        client.list_pipeline_versions,
        "pipeline_versions",
        pipeline_id=pipeline,
        filter=named(package.version),
    )
    version = next((item.pipeline_version_id for item in versions if item.display_name == package.version), None)
    if version is not None:
        print(f"pipeline {package.name}: version {package.version} is there already")
    else:
        send = client.upload_pipeline_version
        sent = api.ask("upload the version", send, str(package.file), package.version, pipeline_id=pipeline)
        version = sent.pipeline_version_id
        print(f"pipeline {package.name}: version {package.version} uploaded")
    return str(pipeline), str(version)


def follow(api: Kubeflow, run_id: str, poll: float, pause: Callable[[float], None] = time.sleep) -> int:
    """Print the run's states until it ends. Returns 0 when it succeeded, else 1."""
    shown, failing_since = "", None
    while True:
        try:
            run = api.ask("look at the run", api.client.get_run, run_id)
            failing_since = None
        except KubeflowError as error:
            failing_since = failing_since or time.monotonic()
            if not error.passing or time.monotonic() - failing_since > _PATIENCE:
                raise
            print(f"run {run_id}: {error}; it is asked again", file=sys.stderr, flush=True)
            pause(poll)
            continue
        state = run.state or "PENDING"
        if state != shown:
            print(f"run {run.display_name}: {state}", flush=True)
            shown = state
        if state in FINISHED:
            for task in (run.run_details and run.run_details.task_details) or []:
                if task.state == "FAILED":
                    why = " ".join(str(task.error.message).split())[:200] if task.error else "see its log"
                    print(f"  {task.display_name}: {why}", flush=True)
            return 0 if state in ("SUCCEEDED", "SKIPPED") else 1
        pause(poll)


if __name__ == "__main__":
    raise SystemExit(main())
