"""Compile a pipeline to Kubeflow's IR YAML: `python -m pipelines.compile`, or `make pipeline-compile`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medforge.config import RunConfig, load_config
from medforge.steps.rollout import MOST_WATCHES
from pipelines.cluster import ClusterConfig, load_cluster, seconds
from pipelines.run import DEFAULT_CONFIG

PIPELINES = ("retrain", "release")
PROMETHEUS = "MEDFORGE_PROMETHEUS_URL"
_LONGEST_WATCH = 7 * 24 * 60  # minutes


def main() -> int:
    """Compile as the command line says. Returns 0, or 1 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", default="", help="the file to write (default dist/<pipeline>.yaml)")
    arguments = parser.parse_args()
    out = Path(arguments.out or f"dist/{arguments.pipeline}.yaml")
    try:
        config, cluster = load(arguments)
        write(pipeline_of(arguments.pipeline, config, cluster, release_parameters(arguments, config, cluster)), out)
    except (ValueError, OSError) as error:
        print(f"pipeline-compile: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is compiled, for `load`."""
    parser.add_argument("--pipeline", choices=PIPELINES, default="retrain", help="which one (default retrain)")
    parser.add_argument("--config", default="", help=f"the run's YAML file (default {DEFAULT_CONFIG})")
    parser.add_argument("--data", default="", help="data.source, such as an s3:// prefix that the cluster can read")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as seed=3")
    parser.add_argument("--cluster", default="", help="the cluster's YAML file; pipelines/clusters/ has examples")
    release = parser.add_argument_group("of the release pipeline")
    release.add_argument("--release", help="digest or channel (default candidate)")
    release.add_argument("--bucket", help="bucket of the releases (default: the run's publish.bucket)")
    release.add_argument("--channel", help="the channel that then names it (default champion)")
    release.add_argument("--canary", type=int, help="percent of the callers to begin with; 0, the default: no canary")
    release.add_argument("--serving", metavar="NAMESPACE", help="where the chart is installed; for a canary")
    release.add_argument("--installation", help="the chart's release (default medforge); for a canary")
    release.add_argument("--watch-minutes", type=float, help="how long the canary is watched (default 30)")
    release.add_argument("--watch-requests", type=int, help="until at least so many requests came (default 100)")


def load(arguments: argparse.Namespace) -> tuple[RunConfig, ClusterConfig | None]:
    """The run's and the cluster's configuration that the arguments name. ValueError says what is wrong."""
    overrides = [*arguments.set, *([f"data.source={arguments.data}"] if arguments.data else [])]
    config = load_config(arguments.config or DEFAULT_CONFIG, overrides)
    return config, load_cluster(arguments.cluster) if arguments.cluster else None


def release_parameters(
    arguments: argparse.Namespace, config: RunConfig, cluster: ClusterConfig | None
) -> dict[str, Any]:
    """The release pipeline's parameters that the arguments set; none for another pipeline. ValueError names one."""
    named = {option: getattr(arguments, option) for option in _OF_RELEASE}
    given = {option: value for option, value in named.items() if value is not None}
    if arguments.pipeline != "release":
        if given:
            raise ValueError(f"{_shown(next(iter(given)))}: has an effect with --pipeline release alone; leave it out")
        return {}
    if not 0 <= given.get("canary", 0) <= 100:
        raise ValueError(f"--canary is {given['canary']}; 0 to 100 percent of the callers are possible")
    if given.get("canary"):
        _check_canary(given, cluster)
    elif idle := next((option for option in _OF_CANARY if option in given), None):
        raise ValueError(f"{_shown(idle)}: has an effect with a canary alone; add --canary PERCENT, or leave it out")
    return {"bucket": config.publish.bucket} | {_OF_RELEASE[option]: value for option, value in given.items()}


_OF_CANARY = {
    "serving": "namespace",
    "installation": "name",
    "watch_minutes": "watch_minutes",
    "watch_requests": "watch_requests",
}
_OF_RELEASE = {"release": "release", "bucket": "bucket", "channel": "channel", "canary": "canary", **_OF_CANARY}


def _shown(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _check_canary(given: Mapping[str, Any], cluster: ClusterConfig | None) -> None:
    """ValueError for a canary that could not be watched to its end."""
    from pipelines.release import PARAMETERS

    if not given.get("serving"):
        raise ValueError("--serving is missing: name the namespace of the chart, where the canary goes")
    minutes, requests = (given.get(name, PARAMETERS[name]) for name in ("watch_minutes", "watch_requests"))
    if not 0 < minutes < _LONGEST_WATCH:
        raise ValueError(f"--watch-minutes is {minutes:g}; more than 0 and less than {_LONGEST_WATCH} are possible")
    if requests < 0:
        raise ValueError(f"--watch-requests is {requests}; at least 0 are possible")
    if cluster is None:
        return
    if PROMETHEUS not in cluster.env:
        raise ValueError(f"env.{PROMETHEUS}: is missing in the cluster's file: where a canary's alerts are looked up")
    limit = cluster.step("watch").timeout
    if limit and seconds(limit) < MOST_WATCHES * 60 * minutes:
        raise ValueError(
            f"steps.watch.timeout: {limit} is less than {MOST_WATCHES} times --watch-minutes {minutes:g}, the longest "
            "that a canary with few requests is watched; give the step more, or watch it for less"
        )


def pipeline_of(
    name: str, config: RunConfig, cluster: ClusterConfig | None, parameters: Mapping[str, Any] | None = None
) -> Any:
    """The pipeline of that name, for the cluster if there is one. ValueError for what the cluster cannot do.

    `parameters` are the release pipeline's, other than its defaults.
    """
    if name == "retrain":
        from pipelines.retrain import build

        return build(config, cluster)
    from pipelines.release import build as build_release
    from pipelines.settle import for_cluster

    release = build_release(parameters)
    if cluster is None:
        return release
    if cluster.trusted_keys is None:
        raise ValueError("trusted_keys: the cluster's file names no reviewers' keys, so that nothing could be released")
    return for_cluster(release, cluster)


def write(pipeline: Any, out: Path) -> None:
    """Write the pipeline to the YAML file `out`, whole or not at all."""
    from kfp import compiler

    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.stem}.tmp.yaml")  # the compiler tells the format by the ending
    try:
        compiler.Compiler().compile(pipeline, str(work))
        os.replace(work, out)
    finally:
        work.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
