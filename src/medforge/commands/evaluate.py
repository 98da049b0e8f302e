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
    _add_predict(group)
    _add_score(group)


def _add_predict(group: Any) -> None:
    from medforge.commands.model import add_seeing

    predict = group.add_parser("predict", help="let a model answer a split; goes on where an earlier call stopped")
    predict.add_argument("model", type=Path, metavar="MODEL", help="the model's folder")
    predict.add_argument("dataset", type=Path, metavar="DATASET", help="a data set that `validate` wrote")
    predict.add_argument("out", type=Path, metavar="OUT", help="the predictions file (JSONL) to write")
    predict.add_argument("--arm", default="tuned", help="what the predictions are called (default tuned)")
    predict.add_argument("--split", choices=("validation", "test"), help="default test")
    predict.add_argument("--limit", type=int, metavar="N", help="only so many samples, chosen by the seed")
    predict.add_argument("--batch-size", type=int, metavar="N", help="samples generated at once")
    predict.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens")
    predict.add_argument("--seed", type=int, default=0)
    add_seeing(predict)
    predict.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from medforge.commands.model import seeing
    from medforge.config import EvaluateConfig
    from medforge.evaluate.predict import run

    names = ("split", "limit", "batch_size", "max_new_tokens")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        config = EvaluateConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    about = run(
        arguments.arm, arguments.model, arguments.dataset, arguments.out, config, seeing(arguments), arguments.seed
    )
    print(f"{arguments.out}: {about['n']} predictions, {about['reused']} of them from before")


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
