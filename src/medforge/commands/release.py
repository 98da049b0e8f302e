"""`medforge gate`, `signing-key`, `approve` and `releases`: from figures to a decision that a person signed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from medforge.commands.store import add_root


def add(commands: Any) -> None:
    """Declare the four commands."""
    gate = commands.add_parser("gate", help="judge results by a policy; exit status 1 if it is not met")
    gate.add_argument("results", type=Path, metavar="RESULTS", help="results.json of an evaluation")
    gate.add_argument("policy", type=Path, metavar="POLICY", help="YAML file of rules")
    gate.add_argument("out", type=Path, metavar="OUT", help="verdict.json to write")
    gate.set_defaults(run=_gate)

    key = commands.add_parser("signing-key", help="make a reviewer's key: OUT, to be kept secret, and OUT.pub")
    key.add_argument("out", type=Path, metavar="OUT")
    key.set_defaults(run=_signing_key)

    approve = commands.add_parser("approve", help="sign that a release may be served, or with --refuse that not")
    approve.add_argument("release", metavar="RELEASE", help="digest, 6 or more of its first characters, or channel")
    approve.add_argument("--key", type=Path, required=True, metavar="FILE", help="the reviewer's private key")
    approve.add_argument("--reviewer", required=True, metavar="NAME")
    approve.add_argument("--refuse", action="store_true", help="sign a refusal, which outweighs every approval")
    approve.add_argument("--comment", default="", metavar="TEXT")
    approve.set_defaults(run=_approve)

    releases = commands.add_parser("releases", help="list the releases, their channels, verdicts and approvals")
    releases.add_argument(
        "--trusted", type=Path, nargs="+", action="extend", default=[], metavar="FILE.pub", help="reviewers' keys"
    )
    releases.set_defaults(run=_releases)
    for command in (approve, releases):
        command.add_argument("--bucket", default="medforge", help="bucket of the releases (%(default)s)")
        add_root(command)


def _gate(arguments: argparse.Namespace) -> int:
    from medforge.config import load_policy
    from medforge.files import read_json, write_json
    from medforge.release.policy import judge, verdict_markdown

    results = read_json(arguments.results)
    try:
        verdict = judge(results, load_policy(arguments.policy))
    except ValueError as error:
        raise ValueError(
            str(error) if str(arguments.policy) in str(error) else f"{arguments.results}: {error}"
        ) from None
    write_json(arguments.out, verdict)
    print(verdict_markdown(verdict), end="")
    return 0 if verdict["passed"] else 1


def _signing_key(arguments: argparse.Namespace) -> None:
    from medforge.release.sign import new_key

    key = new_key(arguments.out)
    print(f"Made key {key}: keep {arguments.out} secret, and give {arguments.out}.pub to those who check releases.")


def _approve(arguments: argparse.Namespace) -> None:
    from datetime import datetime, timezone

    from medforge.release.publish import resolve
    from medforge.release.sign import Decision, approve
    from medforge.storage import connect

    decision: Decision = "refuse" if arguments.refuse else "approve"
    now = datetime.now(timezone.utc).replace(microsecond=0)
    with connect(arguments.root, create=False) as store:
        digest = resolve(store, arguments.bucket, arguments.release)
        document = approve(
            store, arguments.bucket, digest, arguments.key, arguments.reviewer, decision, arguments.comment, now
        )
    payload = document["payload"]
    done = "refused" if arguments.refuse else "approved"
    if payload["signed_at"] != now.isoformat():
        print(f"{digest[:12]} was {done} with this key already, by {payload['reviewer']} at {payload['signed_at']}.")
    else:
        print(f"{digest[:12]} is {done} by {payload['reviewer']} (release {digest}).")


def _releases(arguments: argparse.Namespace) -> None:
    from medforge.release.publish import list_releases
    from medforge.release.sign import approvals, load_public_key
    from medforge.storage import connect, is_configured

    trusted = [load_public_key(path) for path in arguments.trusted]
    none_yet = f"No releases in bucket {arguments.bucket!r} yet; `make pipeline-run` makes one."
    if not is_configured() and not (arguments.root / "store").is_dir():
        print(f"{none_yet} (There is no store at {arguments.root / 'store'}.)")
        return
    with connect(arguments.root, create=False) as store:
        found = list_releases(store, arguments.bucket) if store.has_bucket(arguments.bucket) else []
        if not found:
            print(none_yet)
            return
        table = [("RELEASE", "NAME", "CHANNELS", "VERDICT", "FIRST RULE", "APPROVAL")]
        for row in found:
            verdict, digest = row["verdict"], row["release"]
            if verdict is None:
                table.append((digest[:12], "?", ", ".join(row["channels"]) or "-", "unusable", "-", "-"))
                continue
            table.append(
                (
                    digest[:12],
                    str(row["about"].get("name", "-")),
                    ", ".join(row["channels"]) or "-",
                    "passed" if verdict["passed"] else "not passed",
                    _first_rule(verdict),
                    approvals(store, arguments.bucket, digest, trusted)["status"],
                )
            )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in found:
        if row["problem"]:
            print(f"{row['release'][:12]}: {row['problem']}")
    if not trusted and any(line[-1] == "untrusted" for line in table):
        print("Give the reviewers' keys with --trusted FILE.pub to see which signatures count.")


def _first_rule(verdict: dict[str, Any]) -> str:
    rule = verdict["rules"][0]
    ours, theirs = rule["candidate"]["value"], rule["reference"]["value"]
    where = "" if rule["slice"] == "all" else f"[{rule['slice']}]"
    before = "" if theirs is None else f" ({verdict['reference']} {theirs:.3f})"
    return f"{rule['metric']}{where} {ours:.3f}{before}" if ours is not None else f"{rule['metric']}{where} -"
