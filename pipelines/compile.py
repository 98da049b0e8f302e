"""Compile the retraining pipeline to Kubeflow's IR YAML: `python -m pipelines.compile`, or `make pipeline-compile`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from medforge.config import RunConfig, load_config
from pipelines.run import DEFAULT_CONFIG


def main() -> int:
    """Compile as the command line says. Returns 0, or 1 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    parser.add_argument("--config", default="", help=f"the run's YAML file (default {DEFAULT_CONFIG})")
    parser.add_argument("--data", default="", help="data.source, such as an s3:// prefix that the cluster can read")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as seed=3")
    parser.add_argument("--out", default="dist/retrain.yaml", help="the file to write (default dist/retrain.yaml)")
    arguments = parser.parse_args()
    overrides = [*arguments.set, *([f"data.source={arguments.data}"] if arguments.data else [])]
    try:
        compile_pipeline(load_config(arguments.config or DEFAULT_CONFIG, overrides), Path(arguments.out))
    except (ValueError, OSError) as error:
        print(f"pipeline-compile: {error}", file=sys.stderr)
        return 1
    print(arguments.out)
    return 0


def compile_pipeline(config: RunConfig, out: Path) -> None:
    """Write the pipeline for `config`'s stages to the YAML file `out`, whole or not at all.

    The components run in the image that MEDFORGE_IMAGE named when they were imported.
    """
    from kfp import compiler

    from pipelines.retrain import build

    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.stem}.tmp.yaml")  # the compiler tells the format by the ending
    try:
        compiler.Compiler().compile(build(config), str(work))
        os.replace(work, out)
    finally:
        work.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
