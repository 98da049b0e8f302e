"""`medforge keys add|list|rotate|revoke`: the API keys of a gateway."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

PREFIX = "MEDFORGE_GATEWAY_"
_DEFAULTS = {"SECRET_KEY": "change-this", "DATABASE": "", "DATA_DIR": ".medforge/gateway"}


def add(commands: Any) -> None:
    """Declare `keys`."""
    group = commands.add_parser("keys", help="make, list, rotate and revoke the gateway's API keys").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    new = group.add_parser("add", help="make a key, and print it: it cannot be shown again")
    new.add_argument("name", metavar="NAME", help="whose key it is, such as ris-north")
    new.add_argument("--scopes", default="diagnose", help="what it may do, of diagnose,chat,jobs,feedback,admin")
    new.add_argument("--kind", default="system", help="system, page, batch or person (%(default)s)")
    new.add_argument("--rate", metavar="N/UNIT", help="requests, such as 120/minute; else the gateway's own limit")
    new.add_argument("--quota", metavar="N/UNIT", help="requests over a long time, such as 20000/day")
    new.add_argument("--days", type=float, metavar="N", help="how long it is valid; else until it is revoked")
    new.set_defaults(run=_add)
    show = group.add_parser("list", help="list the keys, without their secrets")
    show.set_defaults(run=_list)
    rotate = group.add_parser("rotate", help="make a new secret for a client, and print it")
    rotate.add_argument("name", metavar="NAME")
    rotate.add_argument("--grace-hours", type=float, default=24, metavar="N", help="validity of the old (%(default)s)")
    rotate.set_defaults(run=_rotate)
    revoke = group.add_parser("revoke", help="make a client's keys invalid")
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(run=_revoke)
    for command in (new, show, rotate, revoke):
        where = command.add_mutually_exclusive_group()
        where.add_argument("--database", metavar="URL", help=f"SQLAlchemy URL ({PREFIX}DATABASE)")
        where.add_argument("--data-dir", type=Path, metavar="DIR", help=f"folder of the gateway ({PREFIX}DATA_DIR)")


def _add(arguments: argparse.Namespace) -> None:
    import time

    apikeys = _apikeys()
    now = time.time()
    key, text = apikeys.add(
        _engine(arguments), _secret_key(), arguments.name, now, kind=arguments.kind,
        scopes=[scope.strip() for scope in arguments.scopes.split(",") if scope.strip()],
        rate=arguments.rate, quota=arguments.quota,
        expires=None if arguments.days is None else now + arguments.days * 86400,
    )  # fmt: skip
    _show(key, text)


def _list(arguments: argparse.Namespace) -> None:
    import time

    apikeys = _apikeys()
    keys = apikeys.listed(_engine(arguments))
    if not keys:
        print("There are no keys; `medforge keys add NAME` makes one.")
        return
    now = time.time()
    rows = [("NAME", "ID", "KIND", "STATE", "SCOPES", "CREATED", "EXPIRES", "LAST USED")]
    for key in keys:
        times = (_day(key.created), _day(key.expires), _day(key.last_used))
        rows.append((key.name, key.id, key.kind, key.state(now), ",".join(sorted(key.scopes)), *times))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _rotate(arguments: argparse.Namespace) -> None:
    import time

    apikeys = _apikeys()
    grace = arguments.grace_hours * 3600
    _show(*apikeys.rotate(_engine(arguments), _secret_key(), arguments.name, time.time(), grace))


def _revoke(arguments: argparse.Namespace) -> None:
    import time

    apikeys = _apikeys()
    keys = apikeys.revoke(_engine(arguments), arguments.name, time.time())
    print(
        f"Revoked {', '.join(key.id for key in keys)}. A running gateway takes it for key_cache_seconds more at most."
    )


def _show(key: Any, text: str) -> None:
    """The key on stdout, so that it can be piped; what to know of it on stderr."""
    print(
        f"Key {key.id} of {key.name}: {', '.join(sorted(key.scopes))}. Keep it now, it is not shown again:",
        file=sys.stderr,
    )
    print(text)


def _day(seconds: float | None) -> str:
    from datetime import datetime, timezone

    return "-" if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).isoformat(" ", "minutes")[:16]


def _setting(name: str) -> str:
    """A setting as the gateway itself finds it: the environment, then `.env`, then its default."""
    import os

    from dotenv import dotenv_values

    return os.environ.get(PREFIX + name) or dotenv_values(".env").get(PREFIX + name) or _DEFAULTS[name]


def _secret_key() -> str:
    key = _setting("SECRET_KEY")
    if key == _DEFAULTS["SECRET_KEY"]:
        print(
            f"{PREFIX}SECRET_KEY is not set: the key is for a development gateway that has none either", file=sys.stderr
        )
    return key


def _apikeys() -> Any:
    try:
        from medforge import apikeys
    except ImportError:
        raise ValueError("API keys need SQLAlchemy; install it with `pip install 'medforge[gateway]'`") from None
    return apikeys


def _engine(arguments: argparse.Namespace) -> Any:
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    apikeys = _apikeys()
    url = arguments.database or ("" if arguments.data_dir else _setting("DATABASE"))
    if not url:
        folder = (arguments.data_dir or Path(_setting("DATA_DIR"))).resolve()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "gateway.db"
        path.touch(mode=0o600)
        url = f"sqlite:///{path}"
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, hide_parameters=True)
        apikeys.create(engine)
    except ArgumentError:
        raise ValueError("--database: is not an SQLAlchemy URL, such as postgresql://host/name") from None
    except SQLAlchemyError as error:
        raise ValueError(
            f"the database cannot be used ({type(error).__name__}); is it there, and may you write to it?"
        ) from None
    return engine
