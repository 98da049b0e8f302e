"""Who calls: an API key or an OIDC token in `Authorization: Bearer …`, and what they may do."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from medforge import apikeys
from serving.gateway.errors import GatewayError
from serving.gateway.logs import logger, place
from serving.gateway.oidc import Oidc
from serving.gateway.parts import SCOPES, Caller, ClientClass
from serving.gateway.settings import Settings

_MOST_CACHED = 10_000
_LOOKUPS = 4  # at once: a flood of invented keys must not take every thread
_ANYONE = Caller("anonymous", "anonymous", "anonymous", frozenset(SCOPES))


@dataclass(frozen=True)
class _Found:
    """A look into the database; `key` is None where there is none."""

    key: apikeys.Key | None
    at: float


class Authentication:
    """Checks callers. Keys are looked up once in `key_cache_seconds`; a revoked one is taken no longer than that."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        oidc: Oidc | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on, self._cached_for = settings.authentication, settings.key_cache_seconds
        self._secret_key = settings.secret_key.get_secret_value()
        self._engine, self._oidc, self._clock, self._monotonic = engine, oidc, clock, monotonic
        self._cache: OrderedDict[str, _Found] = OrderedDict()
        self._looking: dict[str, asyncio.Task[apikeys.Key | None]] = {}
        self._places = asyncio.Semaphore(_LOOKUPS)

    async def identify(self, headers: Mapping[str, str], scope: str) -> Caller:
        """The caller, who has `scope` ("" for any). GatewayError 401, 403, or 503 where it cannot be found out."""
        if not self._on:
            return _ANYONE
        kind, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip()
        if kind.lower() != "bearer" or not token:
            raise _unknown("Send `Authorization: Bearer` with an API key or a token")
        caller = await (self._by_key(token) if token.startswith("mf_") else self._by_token(token))
        if scope and scope not in caller.scopes:
            raise GatewayError(403, "scope-missing", f"This key or token lacks the scope {scope!r}")
        return caller

    async def _by_key(self, token: str) -> Caller:
        parsed = apikeys.parse(token)
        key = await self._look_up(parsed[0]) if parsed else None
        if parsed is None or key is None or not apikeys.matches(key, parsed[1], self._secret_key):
            raise _unknown("This API key is not known")
        if (state := key.state(self._clock())) != "valid":
            raise _unknown(f"This API key is {state}")
        kind = cast(ClientClass, key.kind)
        return Caller(f"key-{key.client}", key.name, kind, key.scopes, key.rate, key.quota)

    async def _by_token(self, token: str) -> Caller:
        if self._oidc is None:
            raise _unknown("This is no API key, and tokens are not taken here")
        return await self._oidc.caller(token)

    async def _look_up(self, key_id: str) -> apikeys.Key | None:
        found = self._cache.get(key_id)
        if found is not None and self._monotonic() - found.at < self._cached_for:
            return found.key
        if (task := self._looking.get(key_id)) is None:  # many requests of a client ask the database once
            task = self._looking[key_id] = asyncio.create_task(self._find(key_id))
            task.add_done_callback(lambda _: self._looking.pop(key_id, None))
        return await asyncio.shield(task)

    async def _find(self, key_id: str) -> apikeys.Key | None:
        async with self._places:
            at = self._monotonic()
            try:
                key = await asyncio.to_thread(apikeys.find, self._engine, key_id, self._clock())
            except SQLAlchemyError as error:
                logger().error("keys cannot be read", **place(error))
                raise GatewayError(503, "database-unavailable", "Keys cannot be checked now", retry_after=2) from None
        self._cache[key_id] = _Found(key, at)
        self._cache.move_to_end(key_id)
        while len(self._cache) > _MOST_CACHED:
            self._cache.popitem(last=False)
        return key


def _unknown(message: str) -> GatewayError:
    return GatewayError(401, "unauthenticated", message)
