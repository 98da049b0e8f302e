"""OIDC tokens against an issuer on a real port: RSA and EC keys, discovery, rotation, absence, forgeries."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from serving.gateway import oidc as module
from serving.gateway.errors import GatewayError
from serving.gateway.oidc import Oidc
from serving.gateway.parts import Caller
from serving.gateway.settings import Settings
from tests.unit.gateway.fake import Loop

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    """A public key as its issuer publishes it."""
    kind: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
    }
    algorithm = next((made for base, made in kind.items() if isinstance(key, base)), jwt.algorithms.OKPAlgorithm)
    shown = json.loads(algorithm.to_jwk(key.public_key()))
    return {**shown, **({"kid": kid} if kid else {}), **more}


class Issuer:
    """An identity provider; `keys` is what it publishes."""

    def __init__(self) -> None:
        self.keys = [jwk(RSA, "r", use="sig"), jwk(EC, "e"), jwk(ED, "d")]
        self.fetches = self.discoveries = 0
        self.named: str | None = None
        self._loop = Loop()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/realm"

    def start(self) -> None:
        self._loop.run(self._start())

    def stop(self) -> None:
        self._loop.run(self._runner.cleanup())

    def close(self) -> None:
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/realm/.well-known/openid-configuration", self._discover)
        app.router.add_get("/realm/keys", self._keys)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _discover(self, _: web.Request) -> web.Response:
        self.discoveries += 1
        return web.json_response({"issuer": self.named or self.url, "jwks_uri": f"{self.url}/keys"})

    async def _keys(self, _: web.Request) -> web.Response:
        self.fetches += 1
        return web.json_response({"keys": self.keys})


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.close()


def oidc(issuer: Issuer, clock: Clock | None = None, **values: Any) -> Oidc:
    settings = Settings(_env_file=None, oidc_issuer=issuer.url, oidc_audience="medforge", **values)
    return Oidc(settings, clock or Clock())


def token(issuer: Issuer, key: Any = RSA, algorithm: str = "RS256", kid: str | None = "r", **claims: Any) -> str:
    now = time.time()
    default = {
        "iss": issuer.url, "aud": "medforge", "sub": "Dr Jane Doe", "exp": now + 300, "nbf": now - 1,
        "scope": "openid diagnose chat", "azp": "viewer",
    }  # fmt: skip
    made = {name: value for name, value in {**default, **claims}.items() if value is not None}
    return jwt.encode(made, key, algorithm=algorithm, headers={"kid": kid} if kid else {})


def caller(one: Oidc, text: str) -> Caller:
    return asyncio.run(one.caller(text))


def refusal(one: Oidc, text: str) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        asyncio.run(one.caller(text))
    return caught.value


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(RSA, "RS256", "r"), (RSA, "PS256", "r"), (EC, "ES256", "e"), (ED, "EdDSA", "d")],
)
def test_a_token_says_who_calls(issuer: Issuer, key: Any, algorithm: str, kid: str) -> None:
    got = caller(oidc(issuer), token(issuer, key, algorithm, kid))
    who = hashlib.sha256(f"{issuer.url}\0Dr Jane Doe".encode()).hexdigest()[:32]
    assert got == Caller(f"oidc-{who}", "viewer", "person", frozenset({"diagnose", "chat"}))
    assert "Jane" not in repr(got)


def test_scopes_may_be_a_list_in_another_claim(issuer: Issuer) -> None:
    got = caller(oidc(issuer, oidc_scope_claim="roles"), token(issuer, roles=["jobs", "cook", 7]))
    assert got.scopes == {"jobs"}
    assert caller(oidc(issuer), token(issuer, scope=None)).scopes == frozenset()


def test_a_client_that_calls_for_itself_is_a_system(issuer: Issuer) -> None:
    assert caller(oidc(issuer), token(issuer, sub="pacs", azp="pacs")).kind == "system"


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": time.time() - 31 - 60}, "expired"),
        ({"exp": None}, "lacks"),
        ({"nbf": time.time() + 86400}, "not valid yet"),  # long after the time of collection
        ({"aud": "another"}, "another audience"),
        ({"aud": None}, "lacks"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"sub": None}, "lacks"),
    ],
)
def test_wrong_claims_are_refused(issuer: Issuer, claims: dict[str, Any], why: str) -> None:
    error = refusal(oidc(issuer), token(issuer, **claims))
    assert error.status == 401
    assert why in error.message


def test_clocks_may_differ_a_little(issuer: Issuer) -> None:
    assert caller(oidc(issuer), token(issuer, exp=time.time() - 20, nbf=time.time() + 20)).name == "viewer"


def test_forgeries_are_refused(issuer: Issuer) -> None:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    claims = jwt.decode(token(issuer), options={"verify_signature": False})
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    unsigned = f"{part({'alg': 'none', 'kid': 'r'})}.{part(claims)}."
    head = f"{part({'alg': 'HS256', 'kid': 'r'})}.{part(claims)}"
    mac = base64.urlsafe_b64encode(hmac.new(public, head.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()
    changed = token(issuer).split(".")
    changed[1] = part({**claims, "scope": "admin"})
    one = oidc(issuer)
    for forged in (
        unsigned,
        f"{head}.{mac}",  # signed with the public key as if it were a secret
        ".".join(changed),
        token(issuer, OTHER),  # another's key under a known kid
        token(issuer, RSA, kid="e"),  # an RSA signature under the EC key's name
        "a.b.c",
        "no token",
        "",
    ):
        assert refusal(one, forged).status == 401
    assert caller(one, token(issuer)).name == "viewer"


def test_a_key_for_encryption_signs_nothing(issuer: Issuer) -> None:
    issuer.keys = [jwk(RSA, "r", use="enc"), jwk(EC, "e")]
    assert refusal(oidc(issuer), token(issuer)).status == 401


def test_without_a_kid_the_only_key_is_meant(issuer: Issuer) -> None:
    assert refusal(oidc(issuer), token(issuer, kid=None)).status == 401
    issuer.keys = issuer.keys[:1]
    assert caller(oidc(issuer), token(issuer, kid=None)).name == "viewer"


def test_keys_are_fetched_once(issuer: Issuer) -> None:
    async def test() -> None:
        one = oidc(issuer)
        text = token(issuer)
        await asyncio.gather(*(one.caller(text) for _ in range(20)))
        assert (issuer.discoveries, issuer.fetches) == (1, 1)

    asyncio.run(test())


def test_a_new_key_is_found_but_the_issuer_is_asked_once_a_minute(issuer: Issuer) -> None:
    async def test() -> None:
        clock = Clock()
        one = oidc(issuer, clock)
        await one.caller(token(issuer))
        issuer.keys.append(jwk(OTHER, "new"))
        clock.now += 59
        for _ in range(5):
            with pytest.raises(GatewayError):
                await one.caller(token(issuer, OTHER, kid="new"))
        assert issuer.fetches == 1
        clock.now += 2
        assert (await one.caller(token(issuer, OTHER, kid="new"))).name == "viewer"
        for number in range(50):  # invented kids do not become a flood of requests
            with pytest.raises(GatewayError):
                await one.caller(token(issuer, OTHER, kid=f"invented-{number}"))
        assert issuer.fetches == 2

    asyncio.run(test())


def test_cached_keys_go_on_while_the_issuer_is_away(issuer: Issuer) -> None:
    async def test() -> None:
        clock = Clock()
        one = oidc(issuer, clock)
        await one.caller(token(issuer))
        await asyncio.to_thread(issuer.stop)
        clock.now += 10 * module.FRESH_SECONDS
        for _ in range(3):
            assert (await one.caller(token(issuer))).name == "viewer"
            await asyncio.sleep(0.05)
        await asyncio.to_thread(issuer.start)
        issuer.keys = issuer.keys[1:]  # the RSA key was withdrawn meanwhile
        clock.now += module.UNKNOWN_SECONDS
        await one.caller(token(issuer, EC, "ES256", "e"))
        await asyncio.sleep(0.3)
        with pytest.raises(GatewayError):
            await one.caller(token(issuer))
        await one.close()

    asyncio.run(test())


def test_an_issuer_that_never_answered_is_503(issuer: Issuer) -> None:
    text = token(issuer)
    issuer.stop()
    assert refusal(oidc(issuer), text).status == 503


def test_another_issuers_discovery_document_is_not_believed(issuer: Issuer) -> None:
    issuer.named = "https://evil.example"
    assert refusal(oidc(issuer), token(issuer)).status == 503
    assert issuer.fetches == 0
