"""`medforge convert` and `medforge validate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medforge.config import DataConfig

FORMATS = ("auto", "vqa-rad", "slake", "conversations", "phantom")


def add(commands: Any) -> None:
    """Declare `convert` and `validate`. An option that is left out takes the configuration's default."""
    convert = commands.add_parser("convert", help="turn source files into a data set")
    convert.add_argument("source", metavar="SOURCE", help="a folder, a JSON file, s3://bucket/prefix, or `phantom`")
    convert.add_argument("out", metavar="OUT", type=Path, help="the data set folder to write")
    convert.add_argument("--format", choices=FORMATS, help="default: auto, which finds it and says what it found")
    convert.add_argument("--split", choices=("source", "by-study"), help="keep the source's splits, or deal studies")
    convert.add_argument("--languages", metavar="en,zh", help="keep only these")
    convert.add_argument("--licence", help="licence of a source whose format does not tell it (conversations)")
    convert.add_argument("--validation-share", type=float, metavar="SHARE", help="of the studies, where it is dealt")
    convert.add_argument("--test-share", type=float, metavar="SHARE", help="of the studies, where it is dealt")
    convert.add_argument("--seed", type=int, default=0, help="of the dealing, and of the phantoms (default 0)")
    convert.add_argument("--images", type=int, metavar="N", help="phantom only: how many are drawn")
    convert.add_argument("--size", type=int, metavar="PIXELS", help="phantom only: width and height")
    convert.set_defaults(run=_convert)

    validate = commands.add_parser("validate", help="try every sample on a model's processor; write the sound ones")
    validate.add_argument("dataset", metavar="DATASET", type=Path, help="a data set that `convert` wrote")
    validate.add_argument("model", metavar="MODEL", type=Path, help="the base model's folder")
    validate.add_argument("out", metavar="OUT", type=Path, help="the clean data set folder to write")
    validate.add_argument("--min-pixels", type=int, metavar="N", help="smaller images are enlarged to this")
    validate.add_argument("--max-pixels", type=int, metavar="N", help="larger images are reduced to this")
    validate.add_argument("--max-length", type=int, metavar="TOKENS", help="longer samples are rejected")
    validate.add_argument("--shared-images", choices=("report", "reject"), help="training samples shared with test")
    validate.add_argument("--max-rejected", type=float, metavar="SHARE", help="stop when more is rejected (0 to 1)")
    validate.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: by the data set's size and the processors)"
    )
    validate.set_defaults(run=_validate)


def _convert(arguments: argparse.Namespace) -> None:
    from medforge.config import DataConfig
    from medforge.convert import PHANTOM, run

    phantom = _given(arguments, "images", "size")
    if arguments.source == PHANTOM:
        phantom["seed"] = arguments.seed
    elif phantom:
        raise ValueError(f"--{next(iter(phantom))} is for the source phantom only")
    fields = _given(arguments, "format", "split", "licence", "validation_share", "test_share")
    if arguments.languages is not None:
        fields["languages"] = [language for language in arguments.languages.split(",") if language]
    data: DataConfig = _settings(DataConfig, fields | {"source": arguments.source, "phantom": phantom})
    manifest = run(arguments.source, arguments.out, data, arguments.seed)
    _print_splits({split: counts["samples"] for split, counts in manifest["counts"].items()})
    _print_rejects(manifest["rejected"])
    print(f"data set {manifest['root'][:16]} in {arguments.out}")


def _validate(arguments: argparse.Namespace) -> int:
    from medforge.config import DataConfig, ModelConfig
    from medforge.validate import WorkerKilledError, run

    data = _settings(DataConfig, _given(arguments, "shared_images", "max_rejected"))
    model = _settings(ModelConfig, _given(arguments, "min_pixels", "max_pixels", "max_length"))
    try:
        report = run(arguments.dataset, arguments.model, arguments.out, data, model, arguments.workers)
    except WorkerKilledError as error:
        print(f"medforge validate: {error}", file=sys.stderr)
        return 1
    _print_splits(report["counts"]["kept"], report["counts"]["in"])
    _print_rejects(report["counts"]["rejected"])
    length = report["tokens"]["length"]
    print(f"tokens a sample: median {length['median']}, 95 of 100 at most {length['p95']}, longest {length['max']}")
    for pair in report["leakage"]:
        if pair["advice"]:
            print(f"shared: {pair['shared_images']} images, {pair['shared_studies']} studies; {pair['advice']}")
    if count := report["conflicts"]["count"]:
        print(f"conflicts: {count} samples ask what another asks of the same images, and answer differently")
    print(f"data set {report['dataset_out'][:16]} in {arguments.out}; the report is its validation.json")
    return 0


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _settings(model: Any, fields: dict[str, Any]) -> Any:
    """The configuration's section; ValueError in the command line's words."""
    from pydantic import ValidationError

    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = [
            f"--{str(item['loc'][-1]).replace('_', '-')}: {item['msg']}" if item["loc"] else item["msg"]
            for item in error.errors()
        ]
        raise ValueError("; ".join(problems)) from None


def _print_splits(kept: dict[str, int], before: dict[str, int] | None = None) -> None:
    for split in before or kept:
        of = f" of {before[split]}" if before else ""
        print(f"{split:<12}{kept.get(split, 0):>8}{of} samples")


def _print_rejects(rejected: dict[str, int]) -> None:
    for reason, count in rejected.items():
        print(f"rejected    {count:>8} {reason}")
