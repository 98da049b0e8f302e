"""OpenAI's own client, unchanged but for its base URL, against the gateway on a real port."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.gateway.settings import Settings
from tests.conftest import png
from tests.unit.gateway.conftest import Gateway, Serve, make_key, until
from tests.unit.gateway.fake import RELEASE, Fake

IMAGE = f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def messages(text: str = "Is there a nodule?", images: int = 1) -> Any:
    content: list[Any] = [{"type": "image_url", "image_url": {"url": IMAGE}} for _ in range(images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def connect(gateway: Gateway, key: str, **options: Any) -> openai.OpenAI:
    """A client; it tries once, unless the options say otherwise."""
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        api_key=key, base_url=f"{gateway.url}/v1", http_client=http, **({"max_retries": 0, "timeout": 20} | options)
    )


@pytest.fixture
def client(gateway: Gateway, key: str) -> Iterator[openai.OpenAI]:
    with connect(gateway, key) as made:
        yield made


def test_an_answer_with_all_that_the_api_has(client: openai.OpenAI, fake: Fake) -> None:
    fake.text = "no nodule 结节"
    raw = client.chat.completions.with_raw_response.create(
        model="medforge",
        messages=messages("有结节吗？"),
        logprobs=True,
        temperature=0,
        extra_body={"medforge": {"region": True, "match": True}},
    )
    answer = raw.parse()
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "no nodule 结节")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (10, 3, 13)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [token.token for token in choice.logprobs.content] == ["no ", "nodule ", "结节"]
    assert answer.model_extra is not None
    assert answer.model_extra["medforge"]["region"] == [0.1, 0.2, 0.5, 0.6]
    assert raw.headers["x-medforge-release"] == RELEASE
    assert raw.headers["x-medforge-notice"] == "not for diagnostic use without review"
    assert answer._request_id == raw.headers["x-request-id"] == fake.headers[0]["x-request-id"]
    assert fake.requests[0]["messages"] == messages("有结节吗？")
    assert "authorization" not in fake.headers[0]  # the caller's key is the gateway's only


def test_a_model_by_another_name_is_the_served_one(client: openai.OpenAI, fake: Fake) -> None:
    client.chat.completions.create(model="gpt-4o", messages=messages())
    assert fake.requests[0]["model"] == "medforge"


def test_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["medforge"]


def test_a_stream_comes_piece_by_piece(client: openai.OpenAI, fake: Fake) -> None:
    fake.text = "one two three"
    stream = client.chat.completions.create(
        model="medforge", messages=messages(), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert pieces == ["one ", "two ", "three"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 13


def test_the_first_piece_does_not_wait_for_the_last(client: openai.OpenAI, fake: Fake) -> None:
    fake.text, fake.token_seconds = "one two", 0.5
    stream = client.chat.completions.create(model="medforge", messages=messages(), stream=True)
    first = next(iter(stream))
    assert first.choices[0].delta.content == "one "
    assert fake.open == 1  # it is still being written
    assert len(list(stream)) == 2


def test_a_stream_that_is_closed_ends_the_work(client: openai.OpenAI, fake: Fake) -> None:
    fake.text, fake.token_seconds = " ".join(["word"] * 100), 0.1
    stream = client.chat.completions.create(model="medforge", messages=messages(), stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: fake.open == 0, 5)


def test_async_clients_side_by_side(gateway: Gateway, key: str, fake: Fake) -> None:
    fake.text = lambda body: body["messages"][0]["content"][-1]["text"].upper()

    async def work() -> tuple[list[str | None], list[str]]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            api_key=key, base_url=f"{gateway.url}/v1", http_client=http, max_retries=0
        ) as client:
            calls = [
                client.chat.completions.create(model="medforge", messages=messages(f"question {number}"))
                for number in range(10)
            ]
            whole = [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]
            stream = await client.chat.completions.create(model="medforge", messages=messages("a b"), stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        return whole, pieces

    whole, pieces = asyncio.run(work())
    assert whole == [f"QUESTION {number}" for number in range(10)]
    assert "".join(pieces) == "A B"


def test_a_wrong_key(gateway: Gateway) -> None:
    with connect(gateway, "mf_0123456789abcdef_" + "x" * 43) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="medforge", messages=messages())
    assert caught.value.code == "unauthenticated"
    assert caught.value.request_id


def test_a_key_without_the_scope(gateway: Gateway, settings: Settings) -> None:
    key = make_key(settings, "reader", scopes=("feedback",))
    with connect(gateway, key) as client, pytest.raises(openai.PermissionDeniedError, match="'chat'"):
        client.chat.completions.create(model="medforge", messages=messages())


def test_a_bad_request_names_the_field(client: openai.OpenAI, fake: Fake) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="medforge", messages=messages(images=5))
    assert (caught.value.code, caught.value.param) == ("images-too-many", "messages.0.content.4")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="medforge", messages=[])
    assert caught.value.param == "messages"
    assert fake.requests == []


def test_what_the_upstream_refuses_is_a_bad_request(client: openai.OpenAI, fake: Fake) -> None:
    fake.statuses.append(400)
    with pytest.raises(openai.BadRequestError, match="scripted failure"):
        client.chat.completions.create(model="medforge", messages=messages())


def test_what_is_not_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="medforge", input="text")
    assert caught.value.code == "not-found"


def test_too_many_requests(gateway: Gateway, settings: Settings) -> None:
    key = make_key(settings, "slow", rate="2/minute")
    with connect(gateway, key) as client:
        for _ in range(2):
            client.chat.completions.create(model="medforge", messages=messages())
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="medforge", messages=messages())
    assert caught.value.code == "rate-exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60


def test_an_upstream_that_is_away(client: openai.OpenAI, fake: Fake) -> None:
    fake.stop()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="medforge", messages=messages())
    assert caught.value.status_code == 503
    assert caught.value.code == "upstream-unavailable"


def test_the_clients_own_retries_ride_over_a_busy_spell(gateway: Gateway, key: str, fake: Fake) -> None:
    """Three refusals: the gateway's first attempt and its two retries. The client waits and comes again."""
    fake.statuses.extend([503, 503, 503])
    with connect(gateway, key, max_retries=2) as client:
        answer = client.chat.completions.create(model="medforge", messages=messages())
    assert answer.choices[0].message.content == "no"
    assert len(fake.requests) == 4


def test_the_clients_time_is_up(gateway: Gateway, key: str, fake: Fake) -> None:
    fake.first_byte_seconds = 10
    with connect(gateway, key, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="medforge", messages=messages())
    until(lambda: fake.open == 0, 5)


def test_the_gateways_time_is_up(client: openai.OpenAI, fake: Fake) -> None:
    fake.first_byte_seconds = 10
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model="medforge", messages=messages(), extra_headers={"x-request-timeout": "0.5"}
        )
    assert caught.value.status_code == 504


def test_a_stream_that_breaks_off_is_an_error(client: openai.OpenAI, fake: Fake) -> None:
    fake.text, fake.hang_up_after = "one two three four", 2
    stream = client.chat.completions.create(model="medforge", messages=messages(), stream=True)
    pieces: list[str | None] = []
    with pytest.raises(openai.APIError) as caught:
        pieces.extend(chunk.choices[0].delta.content for chunk in stream)
    assert getattr(caught.value, "code", None) == "upstream-error"


def test_answers_of_the_gateway_without_authentication(serve: Serve, settings: Settings) -> None:
    """What a developer on one machine does: any text is a key."""
    with (
        serve(settings.model_copy(update={"authentication": False})) as gateway,
        connect(gateway, "anything") as client,
    ):
        answer = client.chat.completions.create(model="medforge", messages=messages())
    assert answer.choices[0].message.content == "no"
