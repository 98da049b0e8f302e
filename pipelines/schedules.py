"""Recurring runs: one of a name, replaced without a gap and without two at once.

The API cannot change a recurring run, so a new one is made at rest, the old one is stopped, the new one is started and
the old one is removed. That takes a moment in which no tick falls: near a tick it is waited for. Whatever is left of an
attempt that was killed has the same name, and the next attempt removes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from pipelines.client import Kubeflow, KubeflowError
from pipelines.cron import Cron, parse

ENABLE, DISABLE = "ENABLE", "DISABLE"
_MARGIN = timedelta(seconds=10)  # no tick may fall so near to a replacement
_LONGEST_WAIT = 60.0  # seconds; with a tick every few seconds there is no better moment


@dataclass(frozen=True)
class Schedule:
    """A recurring run as it is wanted. `start` and `end` are RFC 3339 texts or empty."""

    name: str
    cron: Cron
    experiment: str
    pipeline: str
    version: str
    parameters: dict[str, Any]
    start: str = ""
    end: str = ""
    pipeline_root: str = ""
    service_account: str = ""


def put(
    api: Kubeflow, wanted: Schedule, say: Callable[[str], None], pause: Callable[[float], None] = time.sleep
) -> Any:
    """Let `wanted` be the only recurring run of its name, and return it. A second call changes nothing.

    Raises KubeflowError; the old one then runs on.
    """
    old = find(api, wanted.name)
    same = next((run for run in old if run.mode == ENABLE and _is(run, wanted)), None)
    if same is not None:
        for run in old:
            if run is not same:
                _remove(api, run)
        say(f"schedule {wanted.name}: unchanged")
        return same
    fresh = _create(api, wanted)
    running = [run for run in old if run.mode == ENABLE]
    try:
        _wait_for_a_gap([wanted.cron, *_crons(running)], pause)
        for run in running:
            _set(api, run, "disable")
        _set(api, fresh, "enable")
    except BaseException:
        for run in running:
            _set(api, run, "enable")
        _remove(api, fresh)
        raise
    for run in old:
        _remove(api, run)
    say(f"schedule {wanted.name}: {'replaced' if old else 'made'}")
    return fresh


def remove(api: Kubeflow, name: str) -> int:
    """Remove the recurring runs of that name; returns how many there were. Runs that they started go on."""
    found = find(api, name)
    for run in found:
        _remove(api, run)
    return len(found)


def find(api: Kubeflow, name: str = "") -> list[Any]:
    """The recurring runs of the namespace, or those of a name."""
    listing = api.client.list_recurring_runs
    every = api.all("list the schedules", listing, "recurring_runs", namespace=api.namespace)
    return [run for run in every if not name or run.display_name == name]


def moment(text: str, field: str) -> str:
    """An RFC 3339 time with its zone. ValueError names the field."""
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise ValueError(f"{field}: {text!r} is no time with a zone, such as 2027-01-31T00:00:00Z")
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_window(start: str, end: str, now: datetime) -> None:
    """ValueError for a window that lies behind `now`, or ends before it begins."""
    if end and end <= (start or now.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")):
        raise ValueError(f"end: {end} is not after {start or 'now'}: the schedule would never run")


def _create(api: Kubeflow, wanted: Schedule) -> Any:
    experiment = api.ask(
        "make the experiment", api.client.create_experiment, wanted.experiment, namespace=api.namespace
    )
    return api.ask(
        "make the schedule",
        api.client.create_recurring_run,
        experiment.experiment_id,
        wanted.name,
        start_time=wanted.start or None,
        end_time=wanted.end or None,
        cron_expression=wanted.cron.text,
        max_concurrency=1,
        no_catchup=True,
        params=wanted.parameters,
        pipeline_id=wanted.pipeline,
        version_id=wanted.version,
        enabled=False,
        pipeline_root=wanted.pipeline_root or None,
        service_account=wanted.service_account or None,
    )


def _is(run: Any, wanted: Schedule) -> bool:
    """Whether a recurring run of the server does what is wanted."""
    schedule = run.trigger.cron_schedule if run.trigger else None
    version = run.pipeline_version_reference
    settings = run.runtime_config
    return bool(
        schedule
        and version
        and schedule.cron == wanted.cron.text
        and (_told(schedule.start_time), _told(schedule.end_time)) == (wanted.start, wanted.end)
        and version.pipeline_version_id == wanted.version
        and ((settings and settings.parameters) or {}) == wanted.parameters
        and ((settings and settings.pipeline_root) or "") == wanted.pipeline_root
        and (run.service_account or "") == (wanted.service_account or run.service_account or "")
        and run.no_catchup
        and int(run.max_concurrency or 0) == 1
    )


def _told(time: datetime | None) -> str:
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ") if time else ""


def _crons(runs: list[Any]) -> list[Cron]:
    """The expressions of schedules that run now; one that somebody made otherwise has none that we know."""
    found = []
    for run in runs:
        schedule = run.trigger.cron_schedule if run.trigger else None
        if schedule and len(str(schedule.cron).split()) == 6:
            found.append(parse(schedule.cron, datetime.now(timezone.utc)))
    return found


def _wait_for_a_gap(crons: list[Cron], pause: Callable[[float], None]) -> None:
    waited = 0.0
    while waited < _LONGEST_WAIT:
        now = datetime.now(timezone.utc)
        ticks = [tick for cron in crons for tick in cron.next(now - _MARGIN / 5) if tick <= now + _MARGIN]
        if not ticks:
            return
        seconds = (max(ticks) - now + _MARGIN / 5).total_seconds() + 0.1
        pause(seconds)
        waited += seconds


def _set(api: Kubeflow, run: Any, how: str) -> None:
    change = getattr(api.client, f"{how}_recurring_run")
    api.ask(f"{how} the schedule {run.recurring_run_id}", change, run.recurring_run_id)


def _remove(api: Kubeflow, run: Any) -> None:
    try:
        api.ask(f"remove the schedule {run.recurring_run_id}", api.client.delete_recurring_run, run.recurring_run_id)
    except KubeflowError as error:
        if error.status != 404:
            raise
