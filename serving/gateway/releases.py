"""GET /v1/releases/current: what is served now."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serving.gateway import api
from serving.gateway.context import admit
from serving.gateway.errors import GatewayError
from serving.gateway.parts import Parts


def router() -> APIRouter:
    """The route."""
    made = APIRouter(tags=["releases"])

    @made.get("/v1/releases/current", summary="The releases that are served")
    async def current(request: Request) -> api.CurrentRelease:
        """Release, heads and provenance. Any valid key or token may ask."""
        await admit(request, "")
        parts: Parts = request.app.state.parts
        upstreams = parts.upstreams
        known = upstreams.capabilities("stable")
        if not known.model:
            raise GatewayError(503, "upstream-unavailable", "The model's server has not answered yet", retry_after=2)
        candidate = upstreams.release("candidate") if "candidate" in upstreams.tracks else None
        return api.CurrentRelease(
            stable=upstreams.release("stable"),
            candidate=candidate if candidate and candidate.model else None,
            candidate_weight=upstreams.weight,
            heads=sorted(known.heads),
            about=dict(known.about),
        )

    return made
