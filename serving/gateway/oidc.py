"""Tokens of an OpenID Connect issuer: JWTs (RFC 7519) that are signed with one of its published keys (RFC 7517).

Only asymmetric algorithms are taken (RFC 8725, 3.1): `none` is no signature, and with HS256 the public key would be the
secret. Keys are cached; while the issuer is away the cached ones go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import jwt
import msgspec

from serving.gateway.errors import GatewayError
from serving.gateway.logs import logger
from serving.gateway.parts import SCOPES, Caller
from serving.gateway.settings import Settings

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
_FITS = {"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("EdDSA",)}  # kty → beginnings of its algorithms
LEEWAY = 30.0  # seconds that clocks may differ
FRESH_SECONDS = 600.0  # keys are fetched anew after it …
UNKNOWN_SECONDS = 60.0  # … and for a kid that is not known, so often at most
_AWAY_SECONDS = 5.0
_FETCH_SECONDS = 5.0
_MOST_BYTES = 1 << 20

Keys = dict[str | None, dict[str, Any]]


class Oidc:
    """An issuer. Its keys are fetched when the first token comes."""

    def __init__(self, settings: Settings, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._issuer, self._audience = settings.oidc_issuer, settings.oidc_audience
        self._url, self._claim = settings.oidc_jwks_url, settings.oidc_scope_claim
        self._monotonic = monotonic
        self._keys: Keys = {}
        self._fetched = self._tried = -1e9
        self._lock = asyncio.Lock()
        self._refresh: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop what is being fetched."""
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.gather(self._refresh, return_exceptions=True)

    async def caller(self, token: str) -> Caller:
        """Whose token it is. GatewayError 401 if it is not valid, 503 if the issuer never gave its keys."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise _invalid("it is no JWT") from None
        algorithm = header.get("alg")
        if algorithm not in ALGORITHMS:
            raise _invalid("its algorithm is not one of " + ", ".join(sorted(ALGORITHMS)))
        data = await self._key(header.get("kid"))
        if not algorithm.startswith(_FITS.get(data.get("kty", ""), ())) or data.get("alg", algorithm) != algorithm:
            raise _invalid("its algorithm does not fit its key")
        try:
            claims = jwt.decode(
                token,
                jwt.PyJWK(data, algorithm),
                algorithms=[algorithm],
                audience=self._audience,
                issuer=(self._issuer, f"{self._issuer}/"),  # settings lose the last slash that some issuers have
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:  # its message may hold claims
            raise _invalid(_REASONS.get(type(error), "its signature or claims are wrong")) from None
        return self._caller(claims)

    def _caller(self, claims: dict[str, Any]) -> Caller:
        client = str(claims.get("azp") or claims.get("client_id") or "oidc")
        given = claims.get(self._claim, "")
        listed: Iterable[Any] = given if isinstance(given, list) else str(given).split()
        scopes = frozenset(str(scope) for scope in listed) & set(SCOPES)
        who = hashlib.sha256(f"{self._issuer}\0{claims['sub']}".encode()).hexdigest()[:32]
        return Caller(f"oidc-{who}", client, "system" if claims["sub"] == client else "person", scopes)

    async def _key(self, kid: Any) -> dict[str, Any]:
        """The published key. A kid that is not known is looked for at the issuer's, once a minute at most."""
        if not isinstance(kid, str | None):
            raise _invalid("its kid is no text")
        age = self._monotonic() - self._fetched
        if (data := self._known(kid)) is None:
            async with self._lock:
                since = self._monotonic() - self._tried
                if self._known(kid) is None and since >= (UNKNOWN_SECONDS if self._keys else _AWAY_SECONDS):
                    await self._fetch()
            data = self._known(kid)
        elif age >= FRESH_SECONDS and self._monotonic() - self._tried >= UNKNOWN_SECONDS:
            self._tried = self._monotonic()
            self._refresh = asyncio.create_task(self._fetch())  # meanwhile the cached keys go on
        if not self._keys:
            raise GatewayError(503, "issuer-unavailable", "The issuer of tokens cannot be reached", retry_after=5)
        if data is None:
            raise _invalid("its key is not one of its issuer's")
        return data

    def _known(self, kid: str | None) -> dict[str, Any] | None:
        """A token without a kid means the only key."""
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    async def _fetch(self) -> None:
        """Fetch the keys; the cached ones stay where that fails."""
        self._tried = self._monotonic()
        try:
            timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                if not self._url:
                    found = await _get(session, f"{self._issuer}/.well-known/openid-configuration")
                    self._url = self._discovered(found)
                listed = (await _get(session, self._url)).get("keys")
            if not isinstance(listed, list):
                raise ValueError("its JWKS lists no keys")
            keys: Keys = {
                key.get("kid"): key
                for key in listed
                if isinstance(key, dict) and key.get("kty") in _FITS and key.get("use", "sig") == "sig"
            }
            if not keys:
                raise ValueError("its JWKS has no key to check signatures with")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            why = str(error) if type(error) is ValueError else type(error).__name__
            logger().warning("issuer's keys cannot be fetched", why=why, cached=len(self._keys))
            return
        self._keys, self._fetched = keys, self._monotonic()

    def _discovered(self, document: dict[str, Any]) -> str:
        """The JWKS' URL in a discovery document (OpenID Connect Discovery 1.0, 4.3)."""
        if str(document.get("issuer", "")).rstrip("/") != self._issuer:
            raise ValueError("its discovery document is another issuer's")
        url = document.get("jwks_uri")
        if not isinstance(url, str) or not url.startswith(("https://", f"{self._issuer}/")):
            raise ValueError("its discovery document has no https jwks_uri")
        return url


async def _get(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise ValueError(f"answers {response.status}")
        data = await response.content.read(_MOST_BYTES)
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        raise ValueError("does not answer with JSON") from None


_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it is from another issuer",
    jwt.InvalidSignatureError: "its signature is wrong",
    jwt.MissingRequiredClaimError: "it lacks one of exp, iss, aud and sub",
}


def _invalid(why: str) -> GatewayError:
    return GatewayError(401, "token-invalid", f"The token is not valid: {why}")
