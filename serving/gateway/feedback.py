"""POST /v1/feedback: a reader's verdict on an answer, kept apart from training data.

Verdicts stand in a table of their own with the status `unreviewed`. Nothing in MedForge reads that table into a data
set: a verdict is a claim that somebody made, not a label. To train on it a person has to validate it and convert it
like any other source, which is a separate act.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import fastapi
import sqlalchemy as sql
from fastapi import Request
from sqlalchemy.engine import Row

from medforge.files import canonical_json, sha256_bytes
from serving.gateway import api, auditing
from serving.gateway.bodies import error_responses, json_body, parse, refuse_nul
from serving.gateway.context import admit
from serving.gateway.database import Database, answers, feedback
from serving.gateway.errors import GatewayError
from serving.gateway.parts import Parts

ROUTE = "/v1/feedback"
EXAMPLE = {
    "request_id": "5f2c7d0e9b1a4c3e8d6f7a8b9c0d1e2f",
    "verdict": "wrong",
    "correction": "No pleural effusion.",
    "regions": [],
    "comment": "The costophrenic angle is clear.",
}


def router() -> fastapi.APIRouter:
    """The route."""
    routes = fastapi.APIRouter(tags=["feedback"])
    routes.add_api_route(
        ROUTE,
        post,
        methods=["POST"],
        status_code=201,
        response_model=api.FeedbackResponse,
        summary="Say whether an answer was right",
        openapi_extra={"requestBody": json_body(api.FeedbackRequest, EXAMPLE)},
        responses=error_responses(404),
    )
    return routes


async def post(request: Request) -> api.FeedbackResponse:
    """Keep a verdict on an answer that the same caller got. A later verdict takes the place of an earlier one, which
    is kept as history. Corrections and comments must hold no patient's data."""
    context = await admit(request, "feedback")
    parts: Parts = request.app.state.parts
    body = await request.body()
    given = parse(api.FeedbackRequest, body)
    refuse_nul(given, "request_id", "correction", "comment")
    identity = f"fb-{secrets.token_hex(16)}"
    known = await parts.database.run(keep, parts.database, identity, context.caller.id, given, time.time())
    await auditing.note(
        parts, context, ROUTE, status=201, release=known.release, inputs=sha256_bytes(body), decision=given.verdict
    )
    parts.metrics.feedback.labels(given.verdict).inc()
    return api.FeedbackResponse(id=identity, request_id=given.request_id)


def keep(database: Database, identity: str, caller: str, given: api.FeedbackRequest, now: float) -> Row[Any]:
    """Write the verdict under the id `identity`. Returns what is known of the answer; GatewayError 404 if nothing is.

    The verdict that it replaces keeps its row, with the time at which it was replaced.
    """
    database.answered.write()
    answer = sql.select(answers).where(answers.c.caller == caller, answers.c.request_id == given.request_id)
    mine = (feedback.c.caller == caller, feedback.c.request_id == given.request_id, feedback.c.replaced_at.is_(None))
    with database.begin() as connection:
        known = connection.execute(answer.with_for_update()).one_or_none()  # one verdict on it at a time
        if known is None:
            raise GatewayError(
                404,
                "request-unknown",
                "No answer of yours has this id, or it is too old; give the x-request-id of the answer",
                "request_id",
            )
        connection.execute(feedback.update().where(*mine).values(replaced_at=now))
        row = given.model_dump(include={"request_id", "verdict", "correction", "comment"}) | {
            "id": identity,
            "caller": caller,
            "regions": canonical_json([region.model_dump(mode="json") for region in given.regions]).decode(),
            "release": known.release,
            "decision": known.decision,
            "status": "unreviewed",
            "at": now,
        }
        connection.execute(feedback.insert().values(row))
    return known
