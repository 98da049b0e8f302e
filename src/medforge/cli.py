"""`medforge <command>`: the steps of the pipeline, the store and the releases, from a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from medforge import __version__
from medforge.commands import GROUPS


def parser() -> argparse.ArgumentParser:
    """The parser of every command. Nothing heavy is imported: `--help` has to answer at once."""
    top = argparse.ArgumentParser(
        prog="medforge", description="Fine-tune, prove and serve medical vision-language models."
    )
    top.add_argument("--version", action="version", version=f"medforge {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 after a mistake that the user can mend, which is told in one line."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ValueError, OSError) as error:
        print(f"medforge {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"medforge {arguments.command}: interrupted", file=sys.stderr)
        return 130
