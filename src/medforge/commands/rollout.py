"""`medforge deploy`, `rollout status|watch|promote|rollback` and `verify-release`: a release on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.commands.store import add_root

if TYPE_CHECKING:
    from medforge.rollout.rollout import Rollout

_RELEASE = "digest, 6 or more of its first characters, or channel"


def add(commands: Any) -> None:
    """Declare the commands."""
    deploy = commands.add_parser("deploy", help="give an approved release to a share of the callers, on a cluster")
    deploy.add_argument("release", metavar="RELEASE", help=_RELEASE)
    deploy.add_argument(
        "--canary", type=float, required=True, metavar="PERCENT", help="share of callers, above 0 and at most 100"
    )
    deploy.set_defaults(run=_deploy)

    group = commands.add_parser("rollout", help="look at a canary, watch, promote or roll it back").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    status = group.add_parser("status", help="what is served and tried, and what was decided")
    status.set_defaults(run=_status)
    watch = group.add_parser("watch", help="watch the canary's alerts, and roll it back when one fires")
    watch.add_argument("--prometheus", default="", metavar="URL", help="its API (MEDFORGE_PROMETHEUS_URL)")
    watch.add_argument("--minutes", type=float, default=30, metavar="N", help="how long at least (%(default)s)")
    watch.add_argument(
        "--most-minutes", type=float, metavar="N", help="how long to wait for requests (4 times --minutes)"
    )
    watch.add_argument(
        "--requests", type=int, default=100, metavar="N", help="requests that the canary has to get (%(default)s)"
    )
    watch.set_defaults(run=_watch)
    promote = group.add_parser("promote", help="give the canary's release to all callers")
    promote.add_argument("release", nargs="?", default="", metavar="RELEASE", help="which one it has to be")
    promote.add_argument("--channel", default="champion", help="channel that will name it (%(default)s)")
    promote.set_defaults(run=_promote)
    rollback = group.add_parser("rollback", help="remove the canary; without one, go back to the release before")
    rollback.add_argument(
        "release", nargs="?", default="", metavar="RELEASE",
        help="which one has to go, by 6 or more characters of its digest; needed after another rollback",
    )  # fmt: skip
    rollback.add_argument("--reason", default="asked for", metavar="TEXT", help="for the decision log")
    rollback.add_argument("--channel", default="champion", help="channel that named it (%(default)s)")
    rollback.set_defaults(run=_rollback)
    for command in (deploy, status, watch, promote, rollback):
        command.add_argument("--namespace", default="", help="MEDFORGE_NAMESPACE, else the context's or the pod's own")
        command.add_argument("--name", default="", help="the chart's full name (MEDFORGE_ROLLOUT_NAME, else medforge)")
        add_root(command)
    for command in (deploy, watch, promote, rollback):
        _add_trusted(command)
        command.add_argument(
            "--ready-minutes", type=float, default=30, metavar="N", help="how long a model may load (%(default)s)"
        )
    for command in (watch, promote, rollback):
        command.add_argument(
            "--settle-seconds", type=float, default=130, metavar="N",
            help="until every gateway has read routing.json: the kubelet's sync and cache time (%(default)s)",
        )  # fmt: skip

    verify = commands.add_parser("verify-release", help="prove that a release is whole and approved, and download it")
    verify.add_argument("release", metavar="RELEASE", help=f"a folder; or in the store: {_RELEASE}")
    verify.add_argument("--out", type=Path, metavar="DIR", help="where to put it, if it is not there already")
    verify.add_argument("--bucket", default="medforge", help="bucket of the releases (%(default)s)")
    _add_trusted(verify)
    add_root(verify)
    verify.set_defaults(run=_verify)


def _add_trusted(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--trusted", type=Path, nargs="+", action="extend", default=[], metavar="FILE.pub",
        help="reviewers' keys, or folders of them (MEDFORGE_TRUSTED_KEYS)",
    )  # fmt: skip


@contextmanager
def _rollout(arguments: argparse.Namespace, **plan: Any) -> Iterator[Rollout]:
    import getpass
    import os
    import socket

    from medforge.rollout.kubernetes import Kubernetes
    from medforge.rollout.rollout import Plan, Rollout
    from medforge.storage import connect

    name = arguments.name or os.environ.get("MEDFORGE_ROLLOUT_NAME") or "medforge"
    # a canary is taken back without keys; going back to another release asks for its approval, and says so
    approves = arguments.run in (_deploy, _promote)
    trusted = _keys(arguments.trusted, approves) if "trusted" in arguments else []
    api = Kubernetes.from_environment(arguments.namespace)
    with connect(arguments.root, create=False) as store:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user has no name
            user = f"user-{os.getuid()}"
        by = f"{user}@{socket.gethostname()}"
        yield Rollout(api, store, Plan(name=name, **plan), trusted, by, f"{by}:{os.getpid()}")


def _keys(paths: list[Path], needed: bool = True) -> list[Any]:
    """The keys in the files, else those of MEDFORGE_TRUSTED_KEYS; where none is needed, none if it is not set."""
    import os

    from medforge.release.promote import TRUSTED_KEYS, read_keys, trusted_keys

    if not (needed or paths or os.environ.get(TRUSTED_KEYS)):
        return []
    return trusted_keys(read_keys(paths) if paths else None)


def _times(arguments: argparse.Namespace) -> dict[str, float]:
    return {"ready_seconds": arguments.ready_minutes * 60, "settle_seconds": arguments.settle_seconds}


def _deploy(arguments: argparse.Namespace) -> None:
    with _rollout(arguments, ready_seconds=arguments.ready_minutes * 60) as rollout:
        rollout.deploy(arguments.release, arguments.canary / 100)


def _watch(arguments: argparse.Namespace) -> None:
    import os

    from medforge.rollout.watch import Patience, Prometheus

    prometheus = Prometheus.from_environment(os.environ, arguments.prometheus)
    most = 4 * arguments.minutes if arguments.most_minutes is None else arguments.most_minutes
    patience = Patience(arguments.minutes * 60, most * 60, arguments.requests)
    with _rollout(arguments, **_times(arguments)) as rollout:
        seen = rollout.watch(prometheus, patience)
    print(f"no alert in {seen['seconds']:.0f} s and {seen['requests']:.0f} requests")


def _promote(arguments: argparse.Namespace) -> None:
    with _rollout(arguments, channel=arguments.channel, **_times(arguments)) as rollout:
        rollout.promote(arguments.release)


def _rollback(arguments: argparse.Namespace) -> None:
    with _rollout(arguments, channel=arguments.channel, **_times(arguments)) as rollout:
        if not rollout.rollback(arguments.reason, release=arguments.release):
            print("nothing was rolled back: there is no canary; `medforge rollout status` tells what is served")


def _status(arguments: argparse.Namespace) -> int:
    with _rollout(arguments) as rollout:
        told = rollout.status()
    for track in ("stable", "canary"):
        if told[track] is not None:
            state = "ready" if told[track]["ready"] else told[track]["missing"]
            print(f"{track:8}{told[track]['release'][:12]}  {state}")
    routing = told["routing"]
    print(f"{'callers':8}{routing['weight']:.1%} are given the canary")
    if told["holder"]:
        print(f"{'busy':8}{told['holder']}")
    for entry in told["log"][-20:]:
        detail = ", ".join(f"{name} {value}" for name, value in entry["detail"].items())
        print(f"{entry['at'][:19]}  {entry['release'][:12]}  {entry['event']:12}{detail}  ({entry['by']})")
    if told["problem"]:
        print(f"the decision log is not sound: {told['problem']}")
        return 1
    return 0


def _verify(arguments: argparse.Namespace) -> None:
    from medforge.release.publish import resolve
    from medforge.release.verify import require_approval, verify_folder
    from medforge.rollout.checks import check_release, download_release
    from medforge.storage import connect

    trusted = _keys(arguments.trusted)
    folder = Path(arguments.release)
    if folder.is_dir():
        if arguments.out is not None:
            raise ValueError(f"--out is for a release in the store; {folder} is a folder already")
        release = verify_folder(folder, trusted)
        require_approval(release)
        digest = release.digest
    else:
        with connect(arguments.root, create=False) as store:
            digest = resolve(store, arguments.bucket, arguments.release)
            if arguments.out is None:
                check_release(store, arguments.bucket, digest, trusted, every_byte=True)
            else:
                download_release(store, arguments.bucket, digest, trusted, arguments.out)
    where = f", in {arguments.out}" if arguments.out else ""
    print(f"{digest} is whole, and approved by a trusted reviewer{where}")
