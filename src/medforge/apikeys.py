"""API keys of the gateway: `mf_<id>_<secret>`, of which only a keyed hash of the secret is kept.

The secret is 256 bits from the system's generator, so a fast hash is enough: a slow one (argon2, bcrypt) protects what
people choose and what can be guessed, and would cost milliseconds a request. HMAC-SHA256 under the gateway's secret key
rather than plain SHA-256, so that somebody who can write to the database cannot add a key of their own.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Float, MetaData, String, Table, insert, select, update
from sqlalchemy.schema import CreateTable

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

SCOPES = ("diagnose", "chat", "jobs", "feedback", "admin")
KINDS = ("system", "page", "batch", "person")
LAST_USED_SECONDS = 3600.0  # how exactly `last_used` is kept
_KEY = re.compile(r"mf_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_RATE = re.compile(r"[1-9]\d*/(second|minute|hour|day)")

_keys = Table(
    "api_keys",
    MetaData(),
    Column("id", String(16), primary_key=True),
    Column("client", String(16), nullable=False),
    Column("name", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("scopes", String(200), nullable=False),
    Column("rate", String(32)),
    Column("quota", String(32)),
    Column("hash", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
    Column("last_used", Float),
)


@dataclass(frozen=True)
class Key:
    """A key, without its secret. Times are Unix seconds; `client` stays the same when the key is rotated."""

    id: str
    client: str
    name: str
    kind: str
    scopes: frozenset[str]
    rate: str | None
    quota: str | None
    hash: str
    created: float
    expires: float | None
    revoked: float | None
    last_used: float | None

    def state(self, now: float) -> str:
        """valid, revoked or expired."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


def create(engine: Engine) -> None:
    """Make the table if it is not there."""
    with _write(engine) as connection:
        connection.execute(CreateTable(_keys, if_not_exists=True))


def parse(token: str) -> tuple[str, str] | None:
    """Id and secret of what may be a key; None if it cannot be one."""
    match = _KEY.fullmatch(token)
    return (match[1], match[2]) if match else None


def matches(key: Key, secret: str, secret_key: str) -> bool:
    """Whether the secret is the key's, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(key.hash, _hash(secret, secret_key))


def add(
    engine: Engine,
    secret_key: str,
    name: str,
    now: float,
    *,
    kind: str = "system",
    scopes: Sequence[str] = ("diagnose",),
    rate: str | None = None,
    quota: str | None = None,
    expires: float | None = None,
) -> tuple[Key, str]:
    """A new key and its text, which can be had only now. ValueError that names the field if one is wrong."""
    _check(name, kind, scopes, rate, quota, expires, now)
    with _write(engine) as connection:
        if any(key.state(now) == "valid" for key in _of_name(connection, name)):
            raise ValueError(f"name: there is a key named {name!r} already; rotate or revoke it, or take another name")
        client = secrets.token_hex(8)
        return _insert(
            connection, secret_key,
            {"client": client, "name": name, "kind": kind, "scopes": " ".join(sorted(set(scopes))), "rate": rate,
             "quota": quota, "created": now, "expires": expires},
        )  # fmt: skip


def find(engine: Engine, key_id: str, now: float) -> Key | None:
    """The key of this id, valid or not. A valid one is marked as used, to the hour."""
    with engine.connect() as connection:
        row = connection.execute(select(_keys).where(_keys.c.id == key_id)).mappings().first()
    if row is None:
        return None
    key = _key(row)
    if key.state(now) == "valid" and (key.last_used is None or now - key.last_used >= LAST_USED_SECONDS):
        with _write(engine) as connection:
            connection.execute(update(_keys).where(_keys.c.id == key_id).values(last_used=now))
    return key


def listed(engine: Engine) -> list[Key]:
    """All keys, by name, newest first."""
    with engine.connect() as connection:
        rows = connection.execute(select(_keys).order_by(_keys.c.name, _keys.c.created.desc())).mappings()
        return [_key(row) for row in rows]


def rotate(engine: Engine, secret_key: str, name: str, now: float, grace: float) -> tuple[Key, str]:
    """A new key for the client of that name, and its text. The old one is valid for `grace` more seconds.

    The client keeps its limits, its jobs and its track. ValueError if no valid key has the name.
    """
    if not grace >= 0:
        raise ValueError("grace: has to be 0 or more seconds")
    with _write(engine) as connection:
        old = _valid(connection, name, now)
        end = now + grace
        for key in old:
            until = end if key.expires is None else min(key.expires, end)
            connection.execute(update(_keys).where(_keys.c.id == key.id).values(expires=until))
        last = old[0]
        lifetime = None if last.expires is None else last.expires - last.created
        return _insert(
            connection, secret_key,
            {"client": last.client, "name": name, "kind": last.kind, "scopes": " ".join(sorted(last.scopes)),
             "rate": last.rate, "quota": last.quota, "created": now,
             "expires": None if lifetime is None else now + lifetime},
        )  # fmt: skip


def revoke(engine: Engine, name: str, now: float) -> list[Key]:
    """The valid keys of that name, from now on revoked. ValueError if there are none."""
    with _write(engine) as connection:
        keys = _valid(connection, name, now)
        for key in keys:
            connection.execute(update(_keys).where(_keys.c.id == key.id).values(revoked=now))
        return keys


def _write(engine: Engine) -> AbstractContextManager[Connection]:
    """A transaction. The option lets the gateway's engine take SQLite's write lock at its beginning."""
    return engine.execution_options(write=True).begin()


def _valid(connection: Connection, name: str, now: float) -> list[Key]:
    """Newest first."""
    keys = [key for key in _of_name(connection, name) if key.state(now) == "valid"]
    if not keys:
        raise ValueError(f"name: no valid key is named {name!r}; `medforge keys list` shows all")
    return keys


def _of_name(connection: Connection, name: str) -> list[Key]:
    rows = connection.execute(select(_keys).where(_keys.c.name == name).order_by(_keys.c.created.desc())).mappings()
    return [_key(row) for row in rows]


def _insert(connection: Connection, secret_key: str, values: dict[str, Any]) -> tuple[Key, str]:
    secret = secrets.token_urlsafe(32)
    row = {"id": secrets.token_hex(8), "hash": _hash(secret, secret_key), "revoked": None, "last_used": None, **values}
    connection.execute(insert(_keys).values(**row))
    return _key(row), f"mf_{row['id']}_{secret}"


def _key(row: Any) -> Key:
    return Key(**{**row, "scopes": frozenset(row["scopes"].split())})


def _hash(secret: str, secret_key: str) -> str:
    return hmac.digest(secret_key.encode(), secret.encode(), "sha256").hex()


def _check(
    name: str, kind: str, scopes: Sequence[str], rate: str | None, quota: str | None, expires: float | None, now: float
) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r} is none: up to 64 letters, digits, blanks, dots, hyphens and underscores are")
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is none; one of {', '.join(KINDS)} is")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ValueError(f"scopes: {', '.join(unknown)} is none; {', '.join(SCOPES)} are")
    if not scopes:
        raise ValueError(f"scopes: a key needs at least one of {', '.join(SCOPES)}")
    for field, value in (("rate", rate), ("quota", quota)):
        if value is not None and not _RATE.fullmatch(value):
            raise ValueError(f"{field}: {value!r} is not a rate such as 120/minute")
    if expires is not None and expires <= now:
        raise ValueError("expires: lies in the past")
