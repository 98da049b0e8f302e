"""/v1/jobs: many questions at once, answered in the background.

A job's items are checked when it is sent. A document that is wrong anywhere is refused as a whole (422 names the
item's field); an image that cannot be read fails its own item at once, with the error that POST /v1/diagnose would
give, and the other items go on. What is kept of a job is in `jobstore`, who does the work in `worker`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import fastapi
from fastapi import Path, Query, Request
from starlette.responses import Response

from medforge.files import sha256_bytes
from serving.gateway import api, auditing
from serving.gateway.bodies import error_responses, json_body, parse, refuse_nul
from serving.gateway.context import admit, time_left
from serving.gateway.database import Seal
from serving.gateway.diagnose import diagnose
from serving.gateway.errors import GatewayError, bad_request
from serving.gateway.idempotency import HEADER, REPLAYED, Stored, once
from serving.gateway.images import Picture
from serving.gateway.jobstore import JobStore
from serving.gateway.parts import Context, Parts
from serving.gateway.reading import file_of, read_pictures
from serving.gateway.worker import Worker

ROUTE = "/v1/jobs"
EXAMPLE = {
    "name": "night of 1 May",
    "items": [
        {"task": "finding", "finding": "pleural effusion", "images": [{"data": "iVBORw0KGgo="}]},
        {"task": "report", "language": "zh", "images": [{"data": "data:image/jpeg;base64,/9j/4AAQ"}]},
    ],
}


class JobPage(api.Document):
    """A page of jobs, the newest first; `next` is the `before` of the page that follows."""

    jobs: list[api.JobStatus]
    next: str | None = None


_ID = r"^[A-Za-z0-9-]{1,40}$"
Id = Annotated[str, Path(pattern=_ID, description="The job's id.")]


def router() -> fastapi.APIRouter:
    """The routes."""
    routes = fastapi.APIRouter(tags=["jobs"])
    unknown = error_responses(404)
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "maxLength": 200},
        "description": "Makes it safe to send the job again when its answer was lost.",
    }
    routes.add_api_route(
        ROUTE,
        post,
        methods=["POST"],
        status_code=202,
        response_model=api.JobStatus,
        summary="Send many questions",
        openapi_extra={"requestBody": json_body(api.JobRequest, EXAMPLE), "parameters": [key]},
        responses=error_responses(409),
    )
    routes.add_api_route(ROUTE, page, methods=["GET"], summary="List your jobs")
    routes.add_api_route(f"{ROUTE}/{{id}}", get, methods=["GET"], summary="See how far a job is", responses=unknown)
    routes.add_api_route(
        f"{ROUTE}/{{id}}/results",
        results,
        methods=["GET"],
        response_model=api.JobResults,
        summary="Take a job's results",
        responses=unknown,
    )
    routes.add_api_route(f"{ROUTE}/{{id}}", cancel, methods=["DELETE"], summary="Cancel a job", responses=unknown)
    return routes


@asynccontextmanager
async def working(parts: Parts) -> AsyncIterator[None]:
    """While this is entered, the gateway works on jobs: its own, and those of others on the same database."""

    async def read(request: api.DiagnoseRequest) -> Sequence[Picture]:
        return await _pictures(request, parts)

    worker = Worker(parts, store_of(parts), read, diagnose)
    await worker.start()
    try:
        yield
    finally:
        await worker.stop()


def store_of(parts: Parts) -> JobStore:
    """The jobs of these parts' database."""
    return JobStore(parts.database, Seal(parts.settings), parts.settings.job_days * 86_400)


async def post(request: Request) -> Response:
    """Keep a job and answer at once; `Location` is where its status is. A wrong field refuses the whole job, an image
    that cannot be read only its own item."""
    context = await admit(request, "jobs")
    parts: Parts = request.app.state.parts
    body = await request.body()
    digest = sha256_bytes(body)

    async def answer() -> Stored:
        given: api.JobRequest = await asyncio.to_thread(parse, api.JobRequest, body)
        refuse_nul(given, "name")
        items = await _checked(given, parts, context)
        now = time.time()
        job = f"job-{int(now * 1000):012x}{secrets.token_hex(10)}"
        await auditing.note(parts, context, ROUTE, status=202, inputs=digest)  # no row, no job
        status = await parts.database.run(store_of(parts).add, job, context.caller.id, given.name, items, now)
        parts.database.jobs_changed(None)
        location = f"{request.scope.get('root_path', '')}{ROUTE}/{job}"
        return Stored(202, status.model_dump_json().encode(), {"location": location})

    stored = await once(parts, context, ROUTE, request.headers.get(HEADER), body, answer)
    if REPLAYED in stored.headers:
        await auditing.note(parts, context, ROUTE, status=202, inputs=digest, reason="replayed")
    return stored.response()


async def _checked(given: api.JobRequest, parts: Parts, context: Context) -> list[tuple[bytes, api.ErrorBody | None]]:
    """The items as they are kept, each with its error if its images cannot be read."""
    most = parts.settings.job_items
    if len(given.items) > most:
        raise GatewayError(422, "items-too-many", f"Send at most {most} items in a job", "items")
    checked: list[tuple[bytes, api.ErrorBody | None]] = []
    for position, item in enumerate(given.items):
        time_left(context)
        error = None
        try:
            await _pictures(item, parts)
        except GatewayError as raised:
            told = raised.body(context.request_id)["error"]
            error = api.ErrorBody(**told | {"param": f"items.{position}.{raised.param or 'images'}"})
        checked.append((item.model_dump_json().encode(), error))
    return checked


async def _pictures(request: api.DiagnoseRequest, parts: Parts) -> list[Picture]:
    """The images of an item, as POST /v1/diagnose reads them. GatewayError for the first that is not taken."""
    settings = parts.settings
    if len(request.images) > settings.max_images:
        raise bad_request("images-too-many", f"There may be {settings.max_images} images in an item", "images")
    files = [file_of(image, settings, f"images.{number}") for number, image in enumerate(request.images)]
    return await read_pictures(files, settings, parts.metrics)


async def page(
    request: Request,
    before: Annotated[str | None, Query(pattern=_ID, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobPage:
    """The caller's own jobs, the newest first."""
    context = await admit(request, "jobs")
    parts: Parts = request.app.state.parts
    found = await parts.database.run(store_of(parts).page, context.caller.id, before, limit)
    return JobPage(jobs=found, next=found[-1].id if len(found) == limit else None)


async def get(request: Request, id: Id) -> api.JobStatus:
    """How many of the items are done."""
    context = await admit(request, "jobs")
    parts: Parts = request.app.state.parts
    return await parts.database.run(store_of(parts).get, id, _owner(context))


async def results(
    request: Request,
    id: Id,
    after: Annotated[int, Query(ge=-1, le=2**31 - 1, description="`next` of the page before; -1 for the first.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The outcomes in the items' order, up to the first item that has not ended. `next` is null once the last item is
    given: until then, ask again with it."""
    context = await admit(request, "jobs")
    parts: Parts = request.app.state.parts
    found = await parts.database.run(store_of(parts).results, id, _owner(context), after, limit)
    body = found.model_dump_json().encode()
    await auditing.note(parts, context, f"{ROUTE}/{{id}}/results", status=200, outputs=sha256_bytes(body))
    return Response(body, media_type="application/json")


async def cancel(request: Request, id: Id) -> api.JobStatus:
    """Cancel what is not done; the results so far stay. A job that has ended stays as it is."""
    context = await admit(request, "jobs")
    parts: Parts = request.app.state.parts
    status = await parts.database.run(store_of(parts).cancel, id, _owner(context), time.time())
    parts.database.jobs_changed(id)
    await auditing.note(parts, context, f"{ROUTE}/{{id}}", status=200, decision=status.status)
    return status


def _owner(context: Context) -> str | None:
    """Whose jobs the caller may see; None for everybody's."""
    return None if "admin" in context.caller.scopes else context.caller.id
