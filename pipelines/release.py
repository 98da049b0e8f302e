"""The release pipeline: is the release approved, and then the one that is served; on a cluster by way of a canary.

    python -m pipelines.release [--release candidate] [--channel champion] --trusted FILE.pub …

A person's decision stands between this and the retraining pipeline: `medforge approve`.
"""
# No `from __future__ import annotations` here: kfp reads the annotations as types.

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kfp import dsl

from components.approved.component import approved
from components.deploy.component import complete, deploy
from components.promote.component import promote
from components.rollback.component import rollback
from components.watch.component import watch

NAME = "medforge-release"
PARAMETERS: dict[str, Any] = {
    "release": "candidate",
    "bucket": "medforge",
    "channel": "champion",
    "canary": 0,  # percent of the callers
    "namespace": "",
    "name": "medforge",
    "watch_minutes": 30.0,
    "watch_requests": 100,
}


def _always(task: Any) -> Any:
    """A step whose result stands outside: one that a cache answered would not have done anything."""
    return task.set_caching_options(False)


def build(defaults: Mapping[str, Any] | None = None) -> Any:
    """The pipeline. `defaults` are of its parameters, in the place of PARAMETERS."""
    given = PARAMETERS | dict(defaults or {})

    @dsl.pipeline(name=NAME, description="Check that a release is approved, then let its channel name it.")
    def release(
        release: str = given["release"],
        bucket: str = given["bucket"],
        channel: str = given["channel"],
        canary: int = given["canary"],
        namespace: str = given["namespace"],
        name: str = given["name"],
        watch_minutes: float = given["watch_minutes"],
        watch_requests: int = given["watch_requests"],
    ) -> None:
        """`release` is a digest, the beginning of one, or a channel.

        With `canary` at 0 the channel is all that changes. Above it, so many percent of the callers of the chart's
        installation `name` in `namespace` are given the release for `watch_minutes` and `watch_requests` requests,
        then all; an alert, or a step that fails, takes it back.
        """
        run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
        undo = rollback(canary=canary, namespace=namespace, name=name, run=run, channel=channel)
        with dsl.ExitHandler(_always(undo.set_display_name("roll back if it failed"))):
            checked = _always(approved(release=release, bucket=bucket)).set_display_name("approved?")
            digest = checked.outputs["Output"]
            with dsl.If(canary == 0, "channel only"):
                _always(promote(release=digest, bucket=bucket, channel=channel))
            with dsl.Else("by a canary"):
                deployed = _always(deploy(release=digest, percent=canary, namespace=namespace, name=name, run=run))
                watched = watch(namespace=namespace, name=name, run=run, minutes=watch_minutes, requests=watch_requests)
                _always(watched).after(deployed)
                finish = complete(release=deployed.output, namespace=namespace, name=name, run=run, channel=channel)
                _always(finish).after(watched)

    return release


def main() -> int:
    """Run it on this machine. Returns 0 when the channel names the release, else 1 or 130."""
    from medforge.release.promote import TRUSTED_KEYS, read_keys
    from pipelines.console import Console
    from pipelines.local import RunFailedError, execute, no_child_left, records, store

    parser = argparse.ArgumentParser(prog="python -m pipelines.release", description=__doc__)
    parser.add_argument("--release", default="candidate", help="digest, 6 or more of its characters, or channel")
    parser.add_argument("--bucket", default="medforge", help="bucket of the releases (default medforge)")
    parser.add_argument("--channel", default="champion", help="the channel of what is served (default champion)")
    parser.add_argument("--trusted", type=Path, nargs="+", default=[], metavar="FILE.pub", help="reviewers' keys")
    parser.add_argument("--runs", default="runs", help="where runs are written (default runs)")
    parser.add_argument("--root", default=".medforge", help="embedded store and workspace (default .medforge)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(arguments.runs).resolve() / f"release-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"
    given = {"release": arguments.release, "bucket": arguments.bucket, "channel": arguments.channel}
    try:
        if arguments.trusted:
            os.environ[TRUSTED_KEYS] = read_keys(arguments.trusted)
        folder.mkdir(parents=True)
        console = Console(folder / "log.txt", sys.stdout)
        with (
            contextlib.redirect_stdout(console),
            contextlib.closing(console),
            store(Path(arguments.root).resolve(), folder),
            no_child_left(),
            console.only_steps(),
        ):
            execute(build, given, folder)
        done = next(step["values"] for step in records(folder) if step["task"] == "promote")
        print(f"{done['channel']}: {done['release']} (before: {done['previous'] or 'none'})")
    except (ValueError, OSError, RunFailedError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
