"""The gateway's application: its parts put together, its routes, and what surrounds them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medforge import __version__, apikeys, reference
from serving.gateway import chat, diagnose, documentation, feedback, health, jobs, page, releases
from serving.gateway.admission import Admission
from serving.gateway.authentication import Authentication
from serving.gateway.context import Traffic, exchange_of
from serving.gateway.database import Database
from serving.gateway.drift import Drift
from serving.gateway.limits import Limits
from serving.gateway.metrics import Metrics
from serving.gateway.middleware import Envelope, route_of, translate
from serving.gateway.oidc import Oidc
from serving.gateway.parts import Parts
from serving.gateway.scribe import Scribe
from serving.gateway.settings import Settings
from serving.gateway.upstream import Upstreams

_OTHERS = 64  # requests that are open beside those that wait for a model: lists, feedback, bodies that come in


def create_app(settings: Settings) -> FastAPI:
    """The application. Files and connections are opened when its lifespan begins; `app.state.parts` is there then."""
    metrics = Metrics()
    app = _Gateway(
        title="MedForge gateway",
        version=__version__,
        lifespan=partial(_lifespan, settings, metrics),
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        root_path=settings.root_path,
        redirect_slashes=False,
        # FastAPI's own would send exceptions with their messages, which may hold what a caller sent
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.traffic = traffic = Traffic(settings.concurrency + settings.queue + _OTHERS)
    app.add_middleware(Envelope, settings=settings, metrics=metrics, traffic=traffic)
    app.hot[f"{settings.root_path}{chat.PATH}"] = Envelope(chat.CHAT, settings, metrics, traffic)
    for kind in (RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _explain)
    app.router.routes.append(chat.ROUTE)
    for module in (health, releases, chat, diagnose, jobs, feedback, page):
        app.include_router(module.router())
    app.openapi = partial(documentation.describe, app)  # type: ignore[method-assign]
    return app


class _Gateway(FastAPI):
    """FastAPI, but for POST requests to the paths of `hot`: their apps need nothing of its layers and routes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.hot: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            send = partial(_tell_in_a_line, send)
        hot = self.hot.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if hot is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        await hot(scope, receive, send)


async def _tell_in_a_line(send: Send, message: Message) -> None:
    """Starlette tells by a traceback why it could not begin. Of a mistake the error says all."""
    error = sys.exc_info()[1]
    if message["type"] == "lifespan.startup.failed" and isinstance(error, OSError | ValueError):
        message = {**message, "message": f"cannot begin: {error}"}
    await send(message)


async def _explain(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette raise, in the gateway's own shape."""
    told = translate(error)
    exchange = exchange_of(request.scope)
    exchange.error = told.code
    own: Mapping[str, str] = getattr(error, "headers", None) or {}
    headers = {name.lower(): value for name, value in own.items()} | dict(told.headers())
    if told.status == 405 and (allowed := documentation.methods(request.app, route_of(request.scope))):
        headers["allow"] = allowed  # the router names the methods of the first route at this path only
    return Response(told.encode(exchange.request_id), told.status, headers, "application/json")


@asynccontextmanager
async def _lifespan(settings: Settings, metrics: Metrics, app: FastAPI) -> AsyncIterator[None]:
    """Open the parts in the order in which they need each other, and close them the other way round."""
    async with AsyncExitStack() as stack:
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            told = f"data_dir: {settings.data_dir}: {error.strerror}; name a folder that this process may write to"
            raise ValueError(told) from error
        database = Database(settings.database_url)
        stack.callback(database.close)
        database.create()
        apikeys.create(database.engine)
        audit = Scribe(settings.data_dir / "audit", settings.audit_fsync)
        stack.push_async_callback(audit.close)
        await audit.start()
        oidc = Oidc(settings) if settings.oidc_issuer else None
        if oidc is not None:
            stack.push_async_callback(oidc.close)
        upstreams = Upstreams(settings, metrics)
        stack.push_async_callback(upstreams.close)
        limits = Limits(settings, metrics)
        stack.push_async_callback(limits.close)
        app.state.parts = parts = Parts(
            settings=settings,
            metrics=metrics,
            authentication=Authentication(settings, database.engine, oidc),
            limits=limits,
            admission=Admission(settings, metrics),
            upstreams=upstreams,
            database=database,
            audit=audit,
            drift=Drift(reference.load(settings.reference) if settings.reference else None, metrics),
        )
        await upstreams.start()
        await stack.enter_async_context(jobs.working(parts))
        yield
