"""Compile a pipeline to Kubeflow's IR YAML: `python -m pipelines.compile`, or `make pipeline-compile`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from medforge.config import RunConfig, load_config
from pipelines.cluster import ClusterConfig, load_cluster
from pipelines.run import DEFAULT_CONFIG

PIPELINES = ("retrain", "release")


def main() -> int:
    """Compile as the command line says. Returns 0, or 1 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out", default="", help="the file to write (default dist/<pipeline>.yaml)")
    arguments = parser.parse_args()
    out = Path(arguments.out or f"dist/{arguments.pipeline}.yaml")
    try:
        config, cluster = load(arguments)
        write(pipeline_of(arguments.pipeline, config, cluster), out)
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


def load(arguments: argparse.Namespace) -> tuple[RunConfig, ClusterConfig | None]:
    """The run's and the cluster's configuration that the arguments name. ValueError says what is wrong."""
    overrides = [*arguments.set, *([f"data.source={arguments.data}"] if arguments.data else [])]
    config = load_config(arguments.config or DEFAULT_CONFIG, overrides)
    return config, load_cluster(arguments.cluster) if arguments.cluster else None


def pipeline_of(name: str, config: RunConfig, cluster: ClusterConfig | None) -> Any:
    """The pipeline of that name, for the cluster if there is one. ValueError for what the cluster cannot do."""
    if name == "retrain":
        from pipelines.retrain import build

        return build(config, cluster)
    from pipelines.release import release
    from pipelines.settle import for_cluster

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
