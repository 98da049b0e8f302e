"""`python -m serving.gateway`: serve until SIGTERM. Settings come from the environment; --help lists them."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr, ValidationError

from serving.gateway import logs
from serving.gateway.app import create_app
from serving.gateway.logs import logger
from serving.gateway.protocol import BoundedProtocol
from serving.gateway.settings import PREFIX, Settings, load

_NOTICE_SECONDS = 1.0  # how long /readyz says so before the socket closes, so that balancers see it
_SWITCH_SECONDS = 0.0005
_COLLECTED_AFTER = 10_000  # new objects; a request makes hundreds, and next to none is left in a cycle
_LAST_SECONDS = 3  # for what still runs when drain_seconds have passed


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM first refuses new requests, in words, while open ones go on."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds
        self._asked: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain; the second ends at once."""
        if self._asked is not None or not hasattr(self._app.state, "parts"):
            self.should_exit = True
            self.force_exit = self._asked is not None and sig == signal.SIGINT
            return
        self._asked = time.monotonic()
        self._app.state.parts.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now. uvicorn asks ten times a second."""
        if self._asked is not None and not self.should_exit:
            passed = time.monotonic() - self._asked
            idle = self._app.state.traffic.open == 0 and passed >= min(_NOTICE_SECONDS, self._drain_seconds)
            self.should_exit = idle or passed >= self._drain_seconds
        return await super().on_tick(counter)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not go through it again and again
        gc.set_threshold(_COLLECTED_AFTER)
        if self.started:
            address = self.servers[0].sockets[0].getsockname()
            logger().info("listening", host=address[0], port=address[1])


def main() -> int:
    """Serve. Returns 0 after an orderly end, 1 where it could not begin."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.gateway",
        description="The gateway in front of the predictors. Its settings are environment variables or lines of .env:",
        epilog=_listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        settings = load()
    except ValidationError as error:  # its own text would show secrets
        for one in error.errors(include_url=False, include_input=False):
            name = PREFIX + str(one["loc"][0]).upper() if one["loc"] else "settings"
            print(f"{name}: {one['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(settings.log_level)
    if not settings.authentication:
        logger().warning("authentication is off: everybody who reaches this gateway may call it")
    # the database's threads wait for the interpreter as long as this whenever they come back from the disk, and with
    # them who waits for the database: at Python's 5 ms that was most of an answer's time
    sys.setswitchinterval(_SWITCH_SECONDS)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        ws="none",
    )
    server = Server(config, app, settings.drain_seconds)
    try:
        server.run()
    except SystemExit:  # uvicorn's, where it could not begin; the log says why
        return 1
    return 0 if server.started else 1


def _listed() -> str:
    lines = []
    for name, field in Settings.model_fields.items():
        default = "***" if isinstance(field.default, SecretStr) else repr(field.default)
        lines.append(f"  {PREFIX}{name.upper()} ({default})")
        if field.description:
            lines.append(f"      {field.description}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
