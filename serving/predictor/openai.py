"""OpenAI's chat API under /openai/v1, with what the task heads say in the field `medforge`."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.predictor.documents import ChatRequest, make_ask, read_request
from serving.predictor.errors import Refusal, bad_request
from serving.predictor.generation import Done, Event, Piece, Token
from serving.predictor.plane import Answer, Ask, Begun, Plane

_LEAST = -9999.0  # what stands for the logarithm of 0, which JSON cannot say
TIMEOUT_HEADER = "x-request-timeout"


@dataclass(frozen=True)
class Served:
    """What is served: the release's digest, the name that it goes by, and what /models tells of it."""

    name: str
    release: str
    entry: dict[str, Any]


def routes(plane: Plane, served: Served, clock: Callable[[], float] = time.time) -> list[Route]:
    """The routes. All errors have OpenAI's shape."""

    begun = int(clock())

    async def models(request: Request) -> Response:
        if not plane.engine.healthy:  # the gateway asks here whether it may send requests
            return _refuse(
                Refusal(503, "broken", "the model fails on every request; restart the server", retry_after=30)
            )
        return JSONResponse({"object": "list", "data": [_model()]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            return _refuse(_unknown_model(served))
        return JSONResponse(_model())

    def _model() -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": begun, "owned_by": "medforge", **served.entry}

    async def chat(request: Request) -> Response:
        try:
            asked, ask = await asyncio.to_thread(_read, await request.body(), served)
            seconds = read_timeout(request.headers.get(TIMEOUT_HEADER))
            head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(clock()), "model": served.name}
            if not asked.stream:
                return JSONResponse(_completion(head, await plane.answer(ask, seconds), asked, served))
            events = plane.stream(ask, seconds)
            try:
                first = await anext(aiter(events))  # what is refused before the first token is refused by its status
            except BaseException:
                await events.aclose()
                raise
        except Refusal as refusal:
            return _refuse(refusal)
        assert isinstance(first, Begun)
        chunks = _Chunks(head, asked, served, first.prompt_tokens)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(chunks.write(events), media_type="text/event-stream", headers=headers)

    async def nothing(request: Request) -> Response:
        message = f"there is no {request.method} {request.url.path}; POST /openai/v1/chat/completions answers"
        return _refuse(Refusal(404, "not-found", message))

    return [
        Route("/openai/v1/models", models, methods=["GET"]),
        Route("/openai/v1/models/{name}", model, methods=["GET"]),
        Route("/openai/v1/chat/completions", chat, methods=["POST"]),
        Route("/openai/{path:path}", nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def _read(body: bytes, served: Served) -> tuple[ChatRequest, Ask]:
    """What a body asks. In a thread: images make large bodies, and others' tokens are not to wait for them."""
    asked = read_request(body)
    if asked.model not in (None, served.name):
        raise _unknown_model(served)
    return asked, make_ask(asked)


def read_timeout(value: str | None) -> float | None:
    """The seconds that a caller gives a request; None where it says nothing. Refusal 400 when it is no such number."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise bad_request("invalid-request", f"{TIMEOUT_HEADER}: is no number of seconds above 0", TIMEOUT_HEADER)
    return seconds


def _refuse(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


def _unknown_model(served: Served) -> Refusal:
    return Refusal(404, "model-not-found", f"model: this server has only {served.name}", "model")


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _extension(served: Served, told: Answer | Done) -> dict[str, Any]:
    """What the heads say. Boxes are on the first image."""
    return {
        "release": served.release,
        "region": None if told.region is None else list(told.region),
        "match": told.match,
        "image": 0,
    }


def _completion(head: dict[str, Any], answer: Answer, asked: ChatRequest, served: Served) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": _logprobs(answer.tokens) if asked.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    usage = _usage(answer.prompt_tokens, answer.completion_tokens)
    extension = _extension(served, answer)
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage, "medforge": extension}


def _logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    content = [
        entry(token.data, token.logprob) | {"top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class _Chunks:
    """The chunks of a streamed answer, as server-sent events."""

    def __init__(self, head: dict[str, Any], asked: ChatRequest, served: Served, prompt_tokens: int) -> None:
        self._head = head | {"object": "chat.completion.chunk"}
        self._asked, self._served, self._prompt_tokens = asked, served, prompt_tokens

    async def write(self, events: AsyncGenerator[Begun | Event, None]) -> AsyncIterator[bytes]:
        """The whole stream to its end. What goes wrong on the way is told as an error, without the closing [DONE]."""
        usage = self._asked.stream_options is not None and self._asked.stream_options.include_usage
        async with aclosing(events):
            yield self._chunk({"role": "assistant", "content": ""})
            try:
                async for event in events:
                    if isinstance(event, Piece):
                        yield self._chunk({"content": event.text}, event.tokens)
                    elif isinstance(event, Done):
                        # the heads' words stand in the last chunk, whichever that is
                        extra = {"medforge": _extension(self._served, event)}
                        yield self._chunk({}, finish=event.finish_reason, extra={} if usage else extra)
                        if usage:
                            count = _usage(self._prompt_tokens, event.completion_tokens)
                            yield _event({**self._head, "choices": [], "usage": count, **extra})
            except Refusal as refusal:
                yield _event(refusal.body())
                return
            yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        delta: dict[str, Any],
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        logprobs = _logprobs(tokens) if tokens and self._asked.logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**self._head, "choices": [choice], **(extra or {})})


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
