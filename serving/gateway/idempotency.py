"""Idempotency-Key: a request that is sent twice, because its answer was lost, is done once.

The same caller, route, key and body get the answer that was stored, with the header idempotent-replayed: true. The
key with another body is refused (422); while the first is at work, so is the second (409, with Retry-After). Only
answers are stored: after an error the key is free, and the request may be sent again.

Answers hold health information: they are stored sealed (see `database.Seal`), and no longer than idempotency_hours.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError
from starlette.responses import Response

from medforge.files import sha256_bytes, sha256_json
from serving.gateway.database import Database, Seal, idempotency
from serving.gateway.errors import GatewayError
from serving.gateway.parts import Context, Parts

HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"
_KEY = re.compile(r"[!-~]{1,200}")
_SPARE_SECONDS = 10.0  # how long after its deadline a request that has not ended is taken for dead


@dataclass(frozen=True)
class Stored:
    """An answer as it went out."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    media_type: str = "application/json"

    def response(self) -> Response:
        """The answer to send."""
        return Response(self.body, self.status, dict(self.headers), self.media_type)


async def once(
    parts: Parts, context: Context, route: str, key: str | None, body: bytes, answer: Callable[[], Awaitable[Stored]]
) -> Stored:
    """`await answer()`, or what it gave when the same request was sent before. Without a key, it is always done.

    `key` is the header Idempotency-Key, `body` the request's. GatewayError 400 for a key that is none, 422 for one that
    came with another body, 409 while that request is at work.
    """
    if key is None:
        return await answer()
    if not _KEY.fullmatch(key):
        raise GatewayError(400, "idempotency-key", "Give 1 to 200 printable characters without spaces", HEADER)
    row = sha256_json([context.caller.id, route, key])
    claim = _Claim(parts.database, Seal(parts.settings), row, sha256_bytes(body), secrets.token_hex(16))
    now = time.time()
    stored = await parts.database.run(claim.take, now, now + max(0.0, context.deadline - time.monotonic()))
    if stored is not None:
        return replace(stored, headers={**stored.headers, REPLAYED: "true"})
    try:
        made = await answer()
        await parts.database.run(claim.keep, made, time.time() + parts.settings.idempotency_hours * 3600)
    except BaseException:
        # in a thread that goes on though this request was cancelled
        await parts.database.run(claim.release)
        raise
    return made


@dataclass(frozen=True)
class _Claim:
    """One request's hold on a key."""

    database: Database
    seal: Seal
    key: str
    digest: str
    holder: str

    def take(self, now: float, deadline: float) -> Stored | None:
        """The answer that is stored; None if the key is this request's now."""
        until = deadline + _SPARE_SECONDS
        row = {"key": self.key, "digest": self.digest, "holder": self.holder, "answer": None, "expires": until}
        with self.database.begin() as connection:
            connection.execute(idempotency.delete().where(idempotency.c.key == self.key, idempotency.c.expires <= now))
            try:
                with connection.begin_nested():
                    connection.execute(idempotency.insert().values(row))
                return None
            except IntegrityError:  # the key is taken
                found = connection.execute(sql.select(idempotency).where(idempotency.c.key == self.key)).one_or_none()
        if found is not None and found.digest != self.digest:
            raise GatewayError(
                422, "idempotency-key-reused", "This key came with another body before; take a new key", HEADER
            )
        if found is None or found.answer is None:
            raise GatewayError(409, "idempotency-key-in-use", "The first request is still at work", HEADER, 2)
        return _decode(self.seal.open(found.answer, self.key))

    def keep(self, made: Stored, expires: float) -> None:
        """Store the answer. Where the key was lost meanwhile, another request's answer stays."""
        values = {"answer": self.seal.close(_encode(made), self.key), "holder": None, "expires": expires}
        with self.database.begin() as connection:
            connection.execute(idempotency.update().where(*self._mine()).values(values))

    def release(self) -> None:
        """Give the key free."""
        with self.database.begin() as connection:
            connection.execute(idempotency.delete().where(*self._mine()))

    def _mine(self) -> tuple[sql.ColumnElement[bool], ...]:
        return idempotency.c.key == self.key, idempotency.c.holder == self.holder


def remove_expired(database: Database, now: float) -> None:
    """Remove the answers whose time is over."""
    with database.begin() as connection:
        connection.execute(idempotency.delete().where(idempotency.c.expires <= now))


def _encode(made: Stored) -> bytes:
    body = b64encode(made.body).decode()
    return json.dumps([made.status, body, dict(made.headers), made.media_type]).encode()


def _decode(data: bytes) -> Stored:
    status, body, headers, media_type = json.loads(data)
    return Stored(status, b64decode(body), headers, media_type)
