"""POST /v1/diagnose: images and a question in, an answer or an abstention out.

With `Accept: text/event-stream` the way to the answer is told as it goes: `status` (stage: images, waiting, locating,
verifying, answering), `delta` (text of the answer while it is written), and last `result`, the document that is given
otherwise, or `error`. A delta is provisional, and says so: the answer is verified only when it is whole, and an
abstention withdraws it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import fastapi
import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from medforge.files import sha256_bytes, sha256_json
from serving.gateway import api, auditing, examples
from serving.gateway.balance import Track
from serving.gateway.chat import NOTICE
from serving.gateway.consultation import Consultation, Outcome, Tell
from serving.gateway.context import ClientGone, admit, exchange_of, while_connected
from serving.gateway.errors import GatewayError
from serving.gateway.idempotency import HEADER, REPLAYED, Stored, once
from serving.gateway.images import Picture
from serving.gateway.logs import logger, place
from serving.gateway.middleware import CLIENT_GONE
from serving.gateway.parts import Context, Parts
from serving.gateway.prompts import image_parts, refuse_marks
from serving.gateway.reading import Asked, in_thread, read_pictures, read_request

PATH = "/v1/diagnose"
BEAT_SECONDS = 15.0  # a stream that says nothing for longer is cut off by proxies
_FALLS_BACK = frozenset({"upstream-unavailable", "upstream-error", "upstream-garbage", "overloaded"})


async def diagnose(
    parts: Parts,
    question: api.Question,
    pictures: Sequence[Picture],
    context: Context,
    tell: Tell | None = None,
    *,
    route: str = PATH,
    inputs: str | None = None,
) -> api.DiagnoseResponse:
    """The answer to a question about pictures, or why there is none; its row of the audit log is written.

    `tell(event, data)` is told what goes on. `inputs` is the SHA-256 of the request for that row; without it, that of
    the question and the images' own. Raises GatewayError where nothing could be asked.
    """
    refuse_marks(question)
    if tell is not None:
        await tell("status", {"stage": "waiting"})
    async with parts.admission.place(context):
        outcome = await _consult(parts, question, pictures, context, tell)
    response = _response(question, pictures, context, outcome)
    _count(parts, pictures, response)
    await auditing.record(
        parts,
        context,
        route,
        status=200,
        release=response.release.digest,
        track=response.release.track,
        inputs=inputs or _inputs(question, pictures),
        outputs=sha256_bytes(_encode(response)),
        decision=response.decision,
        reason=response.reason,
    )
    return response


async def _consult(
    parts: Parts, question: api.Question, pictures: Sequence[Picture], context: Context, tell: Tell | None
) -> Outcome:
    """Ask the caller's track. A candidate that fails before a part of its answer went out gives way to stable."""
    chosen = parts.upstreams.choose(context.caller)
    images = await in_thread(image_parts, pictures)  # as base64, which for large images takes a while

    def consultation(track: Track) -> Consultation:
        return Consultation(parts, question, pictures[0], images, context, track, tell)

    first = consultation(chosen)
    try:
        return await first.run()
    except GatewayError as error:
        if chosen == "stable" or first.told or error.code not in _FALLS_BACK:
            raise
        return await consultation("stable").run()


def _response(
    question: api.Question, pictures: Sequence[Picture], context: Context, outcome: Outcome
) -> api.DiagnoseResponse:
    """What the caller is told. An abstention withholds answer and finding, and of `locate` the place: it is the answer
    there. The scores stay, as they say why."""
    shown = outcome.reason is None
    return api.DiagnoseResponse(
        id=context.request_id,
        created=datetime.now(timezone.utc),
        task=question.task,
        decision="answered" if shown else "abstained",
        reason=outcome.reason,
        reason_text=None if outcome.reason is None else api.REASONS[outcome.reason][question.language],
        answer=(outcome.text or "").strip() if shown else None,
        finding=outcome.finding if shown else None,
        regions=outcome.regions if shown or question.task != "locate" else [],
        match=outcome.match,
        confidence=outcome.confidence,
        release=outcome.release,
        images=[picture.out for picture in pictures],
        usage=outcome.usage,
    )


def _count(parts: Parts, pictures: Sequence[Picture], response: api.DiagnoseResponse) -> None:
    metrics, track = parts.metrics, response.release.track
    metrics.decisions.labels(response.task, response.decision, track).inc()
    if response.reason is not None:
        metrics.abstentions.labels(response.reason, track).inc()
    for histogram, score in ((metrics.match_score, response.match), (metrics.confidence, response.confidence)):
        if score is not None:
            histogram.labels(track).observe(score.value)
    metrics.tokens.labels("prompt").inc(response.usage.prompt_tokens)
    metrics.tokens.labels("completion").inc(response.usage.completion_tokens)
    for picture in pictures:
        parts.drift.note_image(picture.statistics)
    parts.drift.note_answer(response.answer, response.decision, track)


def _inputs(question: api.Question, pictures: Sequence[Picture]) -> str:
    asked = question.model_dump(include=set(api.Question.model_fields))
    return sha256_json([asked, [[picture.out.sha256, picture.out.frame] for picture in pictures]])


def _encode(response: api.DiagnoseResponse) -> bytes:
    return response.model_dump_json().encode()


def router() -> fastapi.APIRouter:
    """The route POST /v1/diagnose."""
    routes = fastapi.APIRouter(tags=["diagnose"])
    routes.add_api_route(
        PATH,
        post,
        methods=["POST"],
        response_model=api.DiagnoseResponse,
        operation_id="diagnose",
        summary="Ask about images: a question, a report, a finding, or where it is",
        description=f"Scope `diagnose`. {__doc__}",
        responses=examples.RESPONSES,
        openapi_extra={"requestBody": examples.request_body(), "parameters": [examples.IDEMPOTENCY_KEY]},
    )
    return routes


async def post(request: Request) -> Response:
    """The route itself."""
    context = await admit(request, "diagnose")
    parts: Parts = request.app.state.parts
    asked: Asked | None = None
    try:
        asked = await read_request(request, parts.settings)
        refuse_marks(asked.question)
        pictures = await read_pictures(asked.files, parts.settings, parts.metrics)
        work = _Work(parts, context, asked, pictures, request.headers.get(HEADER))
        if _wants_events(request.headers.get("accept", "")):
            return _Events(work)
        stored = await while_connected(request.receive, work.answer(None))
    except (GatewayError, ClientGone) as error:
        await _note_failure(parts, context, asked, error)
        raise
    exchange_of(request.scope).track = stored.headers["x-medforge-track"]
    return stored.response()


def _wants_events(accept: str) -> bool:
    """Whether the client names event streams; `*/*` means the document."""
    return any(part.split(";")[0].strip().lower() == "text/event-stream" for part in accept.split(","))


async def _note_failure(parts: Parts, context: Context, asked: Asked | None, error: GatewayError | ClientGone) -> None:
    """The audit log's row of a request that got no answer."""
    if isinstance(error, GatewayError) and error.code == "audit-unavailable":
        return
    status = error.status if isinstance(error, GatewayError) else CLIENT_GONE
    inputs = asked.digest if asked else None
    await auditing.record(parts, context, PATH, status=status, release=None, track=None, inputs=inputs, outputs=None)


class _Work:
    """One request that was read, and how it is answered."""

    def __init__(
        self, parts: Parts, context: Context, asked: Asked, pictures: Sequence[Picture], key: str | None
    ) -> None:
        self.parts, self.context, self.asked, self.pictures = parts, context, asked, pictures
        self._key = key

    async def answer(self, tell: Tell | None) -> Stored:
        """The answer as it goes out, the stored one where the same request was answered before."""

        async def make() -> Stored:
            response = await diagnose(
                self.parts, self.asked.question, self.pictures, self.context, tell, inputs=self.asked.digest
            )
            headers = {
                "x-medforge-release": response.release.digest or "unknown",
                "x-medforge-track": response.release.track,
                "x-medforge-notice": NOTICE,
            }
            return Stored(200, _encode(response), headers)

        stored = await once(self.parts, self.context, PATH, self._key, self.asked.identity, make)
        if REPLAYED in stored.headers:
            outputs = sha256_bytes(stored.body)
            await auditing.note(
                self.parts, self.context, PATH, status=200, inputs=self.asked.digest, outputs=outputs, reason="replayed"
            )
        return stored


class _Events(Response):
    """The answer as server-sent events. What goes wrong from here on is an event too: the status has gone out."""

    def __init__(self, work: _Work) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # nginx would gather the events
        self.headers["x-medforge-notice"] = NOTICE
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        beat = asyncio.create_task(_beat(send))
        try:
            await while_connected(receive, self._run(scope, send))
        except ClientGone as error:
            await _note_failure(self._work.parts, self._work.context, self._work.asked, error)
            raise
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self, scope: Scope, send: Send) -> None:
        async def tell(event: str, data: Any) -> None:
            await send(_event(event, msgspec.json.encode(data)))

        work, exchange = self._work, exchange_of(scope)
        try:
            await tell("status", {"stage": "images", "images": [one.out.model_dump() for one in work.pictures]})
            stored = await work.answer(tell)
            exchange.track = stored.headers["x-medforge-track"]
            await send(_event("result", stored.body))
        except GatewayError as error:
            exchange.error = error.code
            await tell("error", _error(error, work.context))
            await _note_failure(work.parts, work.context, work.asked, error)
        except Exception as error:
            exchange.error = "internal"
            logger().error("failed", request_id=work.context.request_id, route=PATH, **place(error))
            told = GatewayError(500, "internal", "The gateway failed; tell its operator the request's id")
            await tell("error", _error(told, work.context))


def _error(error: GatewayError, context: Context) -> dict[str, Any]:
    """The usual document, with what the status and Retry-After would have told."""
    extra = {"status": error.status, "retry_after": error.retry_after}
    return {"error": error.body(context.request_id)["error"] | extra}


def _event(name: str, data: bytes) -> dict[str, Any]:
    body = b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _beat(send: Callable[[Any], Awaitable[None]]) -> None:
    """A comment now and then, so that no proxy takes a long silence for a dead connection."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        await send({"type": "http.response.body", "body": b": still at work\n\n", "more_body": True})
