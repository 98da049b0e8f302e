"""`medforge audit verify`: prove that an audit log is what its writers left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Declare `audit`."""
    group = commands.add_parser("audit", help="prove that the gateway's audit log was not changed").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    verify = group.add_parser(
        "verify", help="check the chain of hashes; exit status 1 names the first row that was changed or removed"
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="a log (audit-….jsonl), or a folder of them")
    verify.add_argument(
        "--head",
        metavar="HASH",
        help="a head that was printed earlier and kept elsewhere: its row must still be there, or the log's end "
        "was cut off, which the chain alone cannot tell",
    )
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    from medforge.audit import verify_files

    for chain in verify_files(arguments.path, arguments.head):
        span = f"{chain.first} to {chain.last}" if chain.rows else "none yet"
        torn = f", {chain.truncated} after an interruption" if chain.truncated else ""
        print(f"{chain.path}: {chain.rows} rows{torn}, {span}\n  head {chain.head}")
    print("The chain is whole." + ("" if arguments.head else " Keep the heads elsewhere, and give one with --head."))
