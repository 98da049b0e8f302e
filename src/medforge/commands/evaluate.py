"""`medforge evaluate …`: predictions of the arms, and the scores and the report made of them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare `evaluate`."""
    group = commands.add_parser("evaluate", help="score predictions and write the report").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    _add_score(group)


def _add_score(group: Any) -> None:
    score = group.add_parser("score", help="write results.json, comparison.md and report.html of predictions files")
    score.add_argument(
        "--predictions",
        action="append",
        required=True,
        metavar="ARM=FILE",
        help="an arm and its JSONL, once for each arm, such as base=base.jsonl and tuned=tuned.jsonl",
    )
    score.add_argument("dataset", type=Path, metavar="DATASET", help="the data set folder that was answered")
    score.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    score.add_argument("--about", type=Path, metavar="FILE", help="JSON told in the results: model digests, settings")
    score.add_argument("--verdict", type=Path, metavar="FILE", help="the gate's verdict.json, for the report")
    score.add_argument(
        "--curves",
        action="append",
        default=[],
        metavar="STAGE=FILE",
        help='a stage\'s losses for the report: JSON rows such as {"step": 10, "loss": 1.2}',
    )
    score.add_argument("--samples", type=int, default=24, metavar="N", help="cases in the report (default 24)")
    score.set_defaults(run=_score)


def _score(arguments: argparse.Namespace) -> None:
    from medforge.dataset import Dataset
    from medforge.evaluate import report, score
    from medforge.evaluate.compare import summary_lines
    from medforge.files import read_json

    files = _named(arguments.predictions, "--predictions")
    about = {} if arguments.about is None else read_json(arguments.about)
    if not isinstance(about, dict):
        raise ValueError(f"{arguments.about}: a JSON object is expected")
    results = score.run(files, arguments.dataset, arguments.out, about)
    report.write(
        results,
        {arm: score.read_arm(arm, path) for arm, path in files.items()},
        Dataset.open(arguments.dataset, verify=False),  # `score.run` has just verified it
        arguments.out,
        verdict=None if arguments.verdict is None else read_json(arguments.verdict),
        curves={stage: read_json(path) for stage, path in _named(arguments.curves, "--curves").items()},
        samples=arguments.samples,
    )
    print("\n".join(summary_lines(results)))
    print(f"report: {arguments.out / 'report.html'}")


def _named(values: list[str], option: str) -> dict[str, Path]:
    """The ``NAME=FILE`` values of an option; ValueError for another form or a name given twice."""
    from medforge.config import NAME

    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not path or not re.fullmatch(NAME, name):
            raise ValueError(f"{option} {value!r} is not of the form NAME=FILE with a lower-case name")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice")
        found[name] = Path(path)
    return found
