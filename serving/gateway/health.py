"""/livez (the process), /readyz (what it needs), /metrics: for the platform, without authentication or limits."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from serving.gateway.errors import GatewayError
from serving.gateway.parts import Parts

_SECONDS = 2.0  # for the database, and for the audit log


def router() -> APIRouter:
    """The routes."""
    made = APIRouter(tags=["health"])

    @made.get("/livez", summary="Whether the process answers")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @made.get("/readyz", summary="Whether requests can be answered", responses={503: {"description": "Not ready"}})
    async def readyz(request: Request) -> JSONResponse:
        """`reasons` says what is wanting; the candidate's state is told, and does not count."""
        reasons, told = await readiness(request.app.state.parts)
        return JSONResponse({"ready": not reasons, "reasons": reasons, **told}, 503 if reasons else 200)

    @made.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.parts.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return made


async def readiness(parts: Parts) -> tuple[list[str], dict[str, Any]]:
    """Why requests cannot be answered (nothing if they can), and the upstreams' states."""
    reasons = ["draining"] if parts.draining else []
    upstreams = {}
    for track in parts.upstreams.tracks:
        upstream = parts.upstreams.get(track)
        upstreams[track] = {
            "ready": upstream.ready,
            "circuit": upstream.breaker.state,
            "release": upstream.release.digest,
            "reason": upstream.problem,
        }
        if track == "stable" and upstream.problem:
            reasons.append(f"the stable upstream {upstream.problem}")
        elif track == "stable" and upstream.breaker.wait:
            # when the wait is over the gateway is ready again, so that a request comes and tries the upstream
            reasons.append("the stable upstream has failed too often; its circuit is open")
    if not await _database_answers(parts):
        reasons.append("the database does not answer")
    if not await _audit_writes(parts):
        reasons.append("the audit log cannot be written")
    return reasons, {"upstreams": upstreams}


async def _database_answers(parts: Parts) -> bool:
    """Whether it does, in time."""
    try:
        await asyncio.wait_for(parts.database.ping(), _SECONDS)
    except (GatewayError, asyncio.TimeoutError):
        return False
    return True


async def _audit_writes(parts: Parts) -> bool:
    """Whether an answer would get its row, without which it is not given."""
    if not parts.audit.refused:
        return True
    try:
        return await asyncio.wait_for(parts.audit.probe(), _SECONDS)
    except asyncio.TimeoutError:
        return False
