"""`medforge config schema|check`."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Declare `config`."""
    group = commands.add_parser("config", help="print the configuration's schema, or check a file").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    schema = group.add_parser("schema", help="the JSON schema of a run's configuration: every field and its meaning")
    schema.set_defaults(run=_schema)
    check = group.add_parser("check", help="check a YAML file and print it with all defaults filled in")
    check.add_argument("file")
    check.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as data.split=by-study")
    check.set_defaults(run=_check)


def _schema(_: argparse.Namespace) -> None:
    import json

    from medforge.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _check(arguments: argparse.Namespace) -> None:
    from medforge.config import load_config

    print(load_config(arguments.file, arguments.set).model_dump_json(indent=2))
