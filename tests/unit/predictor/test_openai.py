"""OpenAI's chat API by its answers, without a socket."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from medforge.models.generate import generate
from serving.predictor.generation import Generation
from serving.predictor.openai import Served, routes
from serving.predictor.plane import Plane
from tests.unit.predictor.examples import QUESTIONS, ask, data_uri, metric, planes

SERVED = Served("medforge", "d" * 64, {"max_model_len": 4096, "medforge": {"heads": ["region"]}})
ASK = {
    "model": "medforge",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_uri()}},
                {"type": "text", "text": QUESTIONS[0]},
            ],
        }
    ],
    "max_tokens": 6,
}


@asynccontextmanager
async def clients(generation: Generation, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Plane]]:
    async with planes(generation, **options) as plane:
        app = Starlette(routes=routes(plane, SERVED, clock=lambda: 1_000_000.0))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test/openai/v1") as client:
            yield client, plane


async def post(client: httpx.AsyncClient, headers: Any = None, **changes: Any) -> httpx.Response:
    return await client.post("/chat/completions", json=ASK | changes, headers=headers)


def events(response: httpx.Response) -> list[Any]:
    """The documents of a stream, and None for its closing [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer(generation: Generation) -> None:
    async def run() -> None:
        async with clients(generation) as (client, plane):
            prompt = plane.prepare(ask()).prompt
            (alone,) = generate(generation.model, generation.encoder, [prompt], 6)
            response = await post(client, logprobs=True, top_logprobs=2, medforge={"region": True, "match": True})
            assert response.status_code == 200
            told = response.json()
            assert told["object"] == "chat.completion" and told["created"] == 1_000_000 and told["model"] == "medforge"
            (choice,) = told["choices"]
            assert choice["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
            assert choice["finish_reason"] == ("stop" if alone.ended else "length")
            assert told["usage"] == {
                "prompt_tokens": prompt.length,
                "completion_tokens": alone.tokens,
                "total_tokens": prompt.length + alone.tokens,
            }
            content = choice["logprobs"]["content"]
            assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace").strip() == alone.text
            assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)
            extension = told["medforge"]
            assert extension["release"] == "d" * 64 and extension["image"] == 0
            assert 0 < extension["match"] < 1 and len(extension["region"]) == 4
            plain = (await post(client)).json()
            assert plain["choices"][0]["logprobs"] is None
            assert (plain["medforge"]["region"], plain["medforge"]["match"]) == (None, None)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_what_the_whole_answer_says(generation: Generation, usage: bool) -> None:
    async def run() -> None:
        async with clients(generation) as (client, _):
            more: Any = {"logprobs": True, "top_logprobs": 1, "medforge": {"region": True, "match": True}}
            whole = (await post(client, **more)).json()
            options: Any = {"stream_options": {"include_usage": True}} if usage else {}
            response = await post(client, stream=True, **options, **more)
            assert response.headers["content-type"].startswith("text/event-stream")
            *chunks, done = events(response)
            assert done is None and len({chunk["id"] for chunk in chunks}) == 1
            assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            expected = whole["choices"][0]
            assert "".join(c["delta"].get("content", "") for c in choices) == expected["message"]["content"]
            assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [expected["finish_reason"]]
            told = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
            assert [t["bytes"] for t in told] == [t["bytes"] for t in expected["logprobs"]["content"]]
            assert [("medforge" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
            assert chunks[-1]["medforge"]["match"] == pytest.approx(whole["medforge"]["match"], abs=1e-5)
            if usage:
                assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
            else:
                assert all("usage" not in chunk for chunk in chunks)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_models(generation: Generation) -> None:
    async def run() -> None:
        async with clients(generation) as (client, _):
            entry = {"id": "medforge", "object": "model", "created": 1_000_000, "owned_by": "medforge", **SERVED.entry}
            assert (await client.get("/models")).json() == {"object": "list", "data": [entry]}
            assert (await client.get("/models/medforge")).json() == entry
            assert (await client.get("/models/other")).status_code == 404

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_broken_model_is_not_offered(generation: Generation) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError

    async def run() -> None:
        async with clients(generation) as (client, _):
            hook = generation.model.register_forward_pre_hook(failing)
            assert [(await post(client)).status_code for _ in range(3)] == [500] * 3
            assert (await client.get("/models")).status_code == 503
            hook.remove()
            assert (await post(client)).status_code == 200
            assert (await client.get("/models")).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 60))


def test_requests_that_are_prepared_at_once_do_not_mix(generation: Generation) -> None:
    async def run() -> None:
        async with clients(generation, max_batch=4, queue=60) as (client, plane):
            asked = [
                {"messages": [{"role": "user", "content": f"{question} {n}"}]}
                for n, question in enumerate(QUESTIONS * 5)
            ]
            alone = [(await post(client, **fields)).json()["choices"][0]["message"]["content"] for fields in asked]
            told = await asyncio.gather(*(post(client, **fields) for fields in asked))
            assert [response.json()["choices"][0]["message"]["content"] for response in told] == alone
            assert metric(plane.engine, "requests_total") == 2 * len(asked)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_errors_have_one_shape(generation: Generation) -> None:
    async def run() -> None:
        async with clients(generation) as (client, plane):
            made = [
                (await post(client, model="other"), 404, "model-not-found"),
                (await post(client, n=2), 400, "unsupported"),
                (await post(client, max_tokens=17), 400, "max-tokens"),
                (await post(client, stream=True, max_tokens=17), 400, "max-tokens"),  # by its status, not in the stream
                (await post(client, headers={"x-request-timeout": "soon"}), 400, "invalid-request"),
                (await post(client, headers={"x-request-timeout": "0"}), 400, "invalid-request"),
                (await post(client, headers={"x-request-timeout": "1e-6"}), 504, "timeout"),
                (await post(client, headers={"x-request-timeout": "1e-6"}, stream=True), 504, "timeout"),
                (await client.post("/chat/completions", content=b"{"), 400, "invalid-request"),
                (await client.get("/chat/completions"), 404, "not-found"),
                (await client.post("/completions", json=ASK), 404, "not-found"),
            ]
            for response, status, code in made:
                assert response.status_code == status
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert response.json()["error"]["code"] == code
            assert metric(plane.engine, "failures_total", reason="timeout") == 2
            plane.engine.capacity = 0
            for stream in (False, True):
                response = await post(client, stream=stream)
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_goes_wrong_in_a_stream_is_told_in_it(generation: Generation) -> None:
    calls: list[int] = []

    def failing(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the patient's name")

    generation.model.register_forward_pre_hook(failing)
    generation.encoder.end_id = -1

    async def run() -> None:
        async with clients(generation) as (client, _):
            response = await post(client, stream=True, max_tokens=16)
            assert response.status_code == 200
            *chunks, last = events(response)
            assert chunks and last["error"]["code"] == "internal" and "name" not in response.text
            assert (await post(client)).status_code == 200

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_probability_of_nothing_can_be_said_in_json(generation: Generation) -> None:
    import torch

    def only(module: Any, arguments: Any, output: Any) -> Any:
        output.logits = torch.full_like(output.logits, -math.inf)
        output.logits[..., 65] = 0.0
        return output

    generation.model.register_forward_hook(only)

    async def run() -> None:
        async with clients(generation) as (client, _):
            content = (await post(client, logprobs=True, top_logprobs=3)).json()["choices"][0]["logprobs"]["content"]
            assert content[0]["logprob"] == 0.0
            assert [top["logprob"] for top in content[0]["top_logprobs"]] == [0.0, -9999.0, -9999.0]

    asyncio.run(asyncio.wait_for(run(), 60))
