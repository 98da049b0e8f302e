"""A gateway on a real port, with a fake predictor behind it.

`gateway` is started with `settings`; a test that needs others makes its own with `serve`:

    def test_x(serve: Serve, settings: Settings) -> None:
        with serve(settings.model_copy(update={"queue": 0})) as gateway: ...
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from medforge import apikeys
from serving.gateway.parts import Parts
from serving.gateway.settings import Settings
from tests.unit.gateway.fake import Fake

SECRET = "a-secret-for-tests-0123456789abcdef"


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `condition()` is true; AssertionError if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.01)


@dataclass
class Gateway:
    """A running gateway, and a client that has the key of all scopes."""

    url: str
    app: FastAPI
    server: uvicorn.Server
    client: httpx.Client

    @property
    def parts(self) -> Parts:
        parts = self.app.state.parts
        assert isinstance(parts, Parts)
        return parts

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if it has none yet."""
        return self.parts.metrics.registry.get_sample_value(name, labels) or 0.0


Serve = Callable[..., AbstractContextManager[Gateway]]


@pytest.fixture
def fake() -> Iterator[Fake]:
    """A predictor with heads."""
    made = Fake()
    yield made
    made.close()


@pytest.fixture
def settings(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A development gateway's, authentication on, in a folder of its own."""
    monkeypatch.chdir(tmp_path)  # no .env of the developer's is read
    return Settings(
        _env_file=None,
        data_dir=tmp_path / "gateway",
        secret_key=SecretStr(SECRET),
        stable=fake.url,
        port=0,
        rate="10000/minute",
        quota="1000000/day",
        deadline=20.0,
        drain_seconds=5.0,
        audit_fsync=False,
    )


def make_key(settings: Settings, name: str = "test", scopes: tuple[str, ...] = apikeys.SCOPES, **more: Any) -> str:
    """The text of a new API key in the settings' database."""
    from serving.gateway.database import Database

    database = Database(settings.database_url)
    try:
        apikeys.create(database.engine)
        secret = settings.secret_key.get_secret_value()
        _, text = apikeys.add(database.engine, secret, name, time.time(), scopes=scopes, **more)
    finally:
        database.close()
    return text


@pytest.fixture
def key(settings: Settings) -> str:
    """An API key with all scopes."""
    return make_key(settings)


@pytest.fixture
def serve(key: str) -> Serve:
    """Start a gateway with the given settings; it ends with the `with` block."""

    @contextmanager
    def start(settings: Settings, app: FastAPI | None = None) -> Iterator[Gateway]:
        from serving.gateway.app import create_app

        app = app or create_app(settings)
        config = uvicorn.Config(
            app, "127.0.0.1", 0, log_config=None, access_log=False, proxy_headers=False, server_header=False, ws="none"
        )
        config.timeout_graceful_shutdown = 2
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive())
            assert server.started, "the gateway did not start"
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
                yield Gateway(url, app, server, client)
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive(), "the gateway did not end"

    return start


@pytest.fixture
def gateway(serve: Serve, settings: Settings) -> Iterator[Gateway]:
    """A gateway with `settings`."""
    with serve(settings) as running:
        yield running
