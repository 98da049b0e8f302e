"""Requests to predictors: what they say, answers and streams, retries, deadlines, the circuit, the canary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from serving.gateway import api, upstream
from serving.gateway.answers import Capabilities, Completion, capabilities_of, completion_of, events
from serving.gateway.errors import GatewayError
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, Context
from serving.gateway.settings import Settings
from serving.gateway.upstream import Upstreams
from tests.unit.gateway.fake import RELEASE, Fake

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Is there an effusion?"}]}
A = api.Release(digest=RELEASE, model="medforge", track="stable")


def context(seconds: float = 10.0, caller: str = "a") -> Context:
    return Context("r-12345678", Caller(caller, caller, "system", frozenset()), time.monotonic() + seconds)


def run(fake: Fake, test: Callable[[Upstreams], Awaitable[Any]], metrics: Metrics | None = None, **values: Any) -> Any:
    """What `test` gives, with upstreams of these settings."""
    settings = Settings(_env_file=None, **{"stable": fake.url, "retry_budget": 1.0, **values})

    async def go() -> Any:
        upstreams = Upstreams(settings, metrics or Metrics())
        await upstreams.start()
        try:
            return await asyncio.wait_for(test(upstreams), 30)
        finally:
            await upstreams.close()

    return asyncio.run(go())


def refusal(fake: Fake, seconds: float = 10.0, **values: Any) -> GatewayError:
    async def test(upstreams: Upstreams) -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            await upstreams.complete(BODY, context(seconds), "stable")
        return caught.value

    error = run(fake, test, **values)
    assert isinstance(error, GatewayError)
    return error


async def until(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became so"
        await asyncio.sleep(0.02)


@pytest.fixture
def other() -> Iterator[Fake]:
    """The candidate."""
    made = Fake(release="c" * 64)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "POLL_READY", 0.05)
    monkeypatch.setattr(upstream, "POLL_AWAY", 0.05)


def test_it_says_what_it_is(fake: Fake) -> None:
    async def test(upstreams: Upstreams) -> None:
        assert upstreams.capabilities("stable") == Capabilities(
            "medforge", RELEASE, "chest 0.1.0", frozenset({"region", "match"}), "qwen3-vl", 3136, 1048576,
            {"name": "chest", "base": "tiny"},
        )  # fmt: skip
        assert upstreams.release("stable") == A.model_copy(update={"version": "chest 0.1.0"})

    run(fake, test)


def test_vllm_says_less(fake: Fake) -> None:
    fake.extended, fake.model = False, "Qwen/Qwen2.5-VL-7B-Instruct"

    async def test(upstreams: Upstreams) -> None:
        got = upstreams.capabilities("stable")
        assert (got.model, got.heads, got.family) == (fake.model, frozenset(), "qwen2.5-vl")
        assert upstreams.release("stable").digest == "f" * 64

    run(fake, test, stable_release="f" * 64)


def test_another_release_than_the_settings_name_is_not_ready(fake: Fake) -> None:
    async def test(upstreams: Upstreams) -> None:
        assert not upstreams.healthy("stable")
        assert "not ffff" in (upstreams.get("stable").problem or "")

    run(fake, test, stable_release="f" * 64)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"data": []}', b'{"data": [{}]}', b"\xff", b'{"data": 1}', b"null"])
def test_a_list_of_models_that_is_none_is_told(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"models|no model"):
        capabilities_of(data)


def test_an_answer_with_all_that_there_is(fake: Fake) -> None:
    fake.text, fake.top = "no effusion", {"no": -0.05, "yes": -3.0}
    body = BODY | {"logprobs": True, "top_logprobs": 2, "medforge": {"region": True, "match": True}}

    async def test(upstreams: Upstreams) -> Completion:
        return await upstreams.complete(body, context(7.0), "stable")

    got = run(fake, test)
    assert (got.text, got.finish_reason, got.region, got.match) == ("no effusion", "stop", (0.1, 0.2, 0.5, 0.6), 0.93)
    assert [(token.text, token.logprob, token.top) for token in got.tokens] == [
        ("no ", -0.1, {"no": -0.05, "yes": -3.0}),
        ("effusion", -0.1, {"no": -0.05, "yes": -3.0}),
    ]
    assert got.usage == api.Usage(prompt_tokens=10, completion_tokens=2, total_tokens=12)
    assert (got.track, got.release.digest) == ("stable", RELEASE)
    sent = fake.requests[0]
    assert (sent["model"], sent["stream"], sent["messages"]) == ("medforge", False, BODY["messages"])
    assert fake.headers[0]["x-request-id"] == "r-12345678"
    assert 6 < float(fake.headers[0]["x-request-timeout"]) <= 7


def test_a_stream_gives_the_same_completion(fake: Fake) -> None:
    fake.text = "there is no effusion 胸腔"
    body = BODY | {"logprobs": True, "medforge": {"region": True, "match": True}}

    async def test(upstreams: Upstreams) -> tuple[list[Any], Completion]:
        pieces = [piece async for piece in upstreams.stream(body, context(), "stable")]
        return pieces, await upstreams.complete(body, context(), "stable")

    pieces, whole = run(fake, test)
    assert pieces[:-1] == ["there ", "is ", "no ", "effusion ", "胸腔"]
    assert pieces[-1] == whole


def test_an_event_may_be_cut_anywhere() -> None:
    data = b'data: {"choices":[{"delta":{"content":"\xe8\x83\xb8"}}]}\r\n\r\n: comment\n\ndata: [DONE]\n\n'

    async def cut(size: int) -> list[Any]:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(data), size):
                yield data[start : start + size]

        return [piece if isinstance(piece, str) else piece.text async for piece in events(chunks(), "stable", A)]

    for size in (1, 2, 3, 7, 1000):
        assert asyncio.run(cut(size)) == ["胸", "胸"]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"delta": {}}]}', b'{"choices": 3}', b"\xff\xfe",
     b'{"choices":[{"message":{"content":"a"}}],"medforge":{"region":[0,0,2,1]}}',
     b'{"choices":[{"message":{"content":"a"}}],"medforge":{"match":1.5}}'],
)  # fmt: skip
def test_garbage_is_502_and_is_not_repeated(data: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        completion_of(data, "stable", A)
    assert (caught.value.status, caught.value.code) == (502, "upstream-garbage")
    assert "html" not in caught.value.message


def test_a_passing_failure_is_tried_again(fake: Fake) -> None:
    for status in (502, 503, 504, 429):
        fake.statuses.extend([status, status])

        async def test(upstreams: Upstreams) -> str:
            return (await upstreams.complete(BODY, context(), "stable")).text

        metrics = Metrics()
        assert run(fake, test, metrics, retries=2) == "no"
        retried = metrics.registry.get_sample_value("medforge_gateway_upstream_retries_total", {"track": "stable"})
        assert retried == 2


def test_an_attempts_time_is_that_from_its_sending_to_the_answers_end(fake: Fake) -> None:
    fake.first_byte_seconds = 0.3
    fake.statuses.append(503)

    async def test(upstreams: Upstreams) -> None:
        await upstreams.complete(BODY, context(), "stable")

    metrics = Metrics()
    run(fake, test, metrics, retries=1)
    name, labels = "medforge_gateway_upstream_seconds", {"track": "stable", "outcome": "answered"}
    assert metrics.registry.get_sample_value(f"{name}_count", labels) == 1
    assert 0.3 <= (metrics.registry.get_sample_value(f"{name}_sum", labels) or 0) < 5
    assert metrics.registry.get_sample_value(f"{name}_count", {**labels, "outcome": "failed"}) == 1


def test_it_is_not_tried_more_often_than_the_settings_say(fake: Fake) -> None:
    fake.statuses.extend([503] * 10)
    fake.retry_after = "7"
    error = refusal(fake, retries=1)
    assert (error.status, error.code, error.retry_after) == (503, "overloaded", 7)
    assert len(fake.requests) == 2


def test_nor_than_the_budget_allows(fake: Fake) -> None:
    fake.statuses.extend([503] * 1000)

    async def test(upstreams: Upstreams) -> None:
        for _ in range(40):
            with pytest.raises(GatewayError):
                await upstreams.complete(BODY, context(), "stable")

    run(fake, test, retries=3, retry_budget=0.1, breaker_failures=1000)
    assert 40 < len(fake.requests) <= 40 + 4 + 3  # a tenth, and the reserve


@pytest.mark.parametrize(("status", "told"), [(500, 502), (501, 502), (400, 400), (422, 400), (401, 502), (404, 502)])
def test_what_another_try_would_not_mend_is_told_at_once(fake: Fake, status: int, told: int) -> None:
    fake.statuses.append(status)
    assert refusal(fake).status == told
    assert len(fake.requests) == 1


def test_an_answer_that_breaks_off_is_not_asked_again(fake: Fake) -> None:
    fake.text, fake.hang_up_after = "one two three", 2

    async def test(upstreams: Upstreams) -> list[str]:
        got: list[str] = []
        with pytest.raises(GatewayError) as caught:
            async for piece in upstreams.stream(BODY, context(), "stable"):
                assert isinstance(piece, str)
                got.append(piece)
        assert caught.value.status == 502
        return got

    assert run(fake, test) == ["one ", "two "]
    assert len(fake.requests) == 1


def test_a_slow_answer_ends_at_the_deadline(fake: Fake) -> None:
    fake.first_byte_seconds = 5
    began = time.monotonic()
    error = refusal(fake, 0.3)
    assert (error.status, error.code) == (504, "upstream-timeout")
    assert time.monotonic() - began < 2
    assert len(fake.requests) == 1


def test_slow_tokens_end_at_the_deadline_too(fake: Fake) -> None:
    fake.text, fake.token_seconds = "a " * 100, 0.1

    async def test(upstreams: Upstreams) -> None:
        with pytest.raises(GatewayError) as caught:
            async for _ in upstreams.stream(BODY, context(0.5), "stable"):
                pass
        assert caught.value.status == 504

    run(fake, test)


def test_a_stream_that_is_left_is_cancelled_at_the_upstream(fake: Fake) -> None:
    fake.text, fake.token_seconds = "a " * 200, 0.02

    async def test(upstreams: Upstreams) -> None:
        stream = upstreams.stream(BODY, context(), "stable")
        assert await stream.__anext__() == "a "
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: fake.cancelled == 1)

    run(fake, test)


def test_the_circuit_opens_tries_and_closes(fake: Fake) -> None:
    fake.statuses.extend([500] * 3)
    metrics = Metrics()

    async def test(upstreams: Upstreams) -> None:
        for _ in range(3):
            with pytest.raises(GatewayError):
                await upstreams.complete(BODY, context(), "stable")
        assert metrics.registry.get_sample_value("medforge_gateway_breaker_open", {"track": "stable"}) == 1
        with pytest.raises(GatewayError) as caught:
            await upstreams.complete(BODY, context(), "stable")
        assert (caught.value.status, caught.value.code) == (503, "upstream-unavailable")
        assert len(fake.requests) == 3  # it was left alone
        await asyncio.sleep(0.35)
        assert (await upstreams.complete(BODY, context(), "stable")).text == "no"
        assert metrics.registry.get_sample_value("medforge_gateway_breaker_open", {"track": "stable"}) == 0

    run(fake, test, metrics, breaker_failures=3, breaker_seconds=0.3)


def test_a_half_open_circuit_lets_one_through(fake: Fake) -> None:
    fake.statuses.extend([500])

    async def test(upstreams: Upstreams) -> None:
        with pytest.raises(GatewayError):
            await upstreams.complete(BODY, context(), "stable")
        await asyncio.sleep(0.25)
        fake.first_byte_seconds = 0.2
        outcomes = await asyncio.gather(
            *(upstreams.complete(BODY, context(), "stable") for _ in range(10)), return_exceptions=True
        )
        assert sum(isinstance(one, Completion) for one in outcomes) == 1
        assert len(fake.requests) == 2

    run(fake, test, breaker_failures=1, breaker_seconds=0.2)


def test_a_callers_own_short_limit_does_not_open_the_circuit(fake: Fake) -> None:
    fake.first_byte_seconds = 0.5

    async def test(upstreams: Upstreams) -> None:
        for _ in range(5):
            with pytest.raises(GatewayError):
                await upstreams.complete(BODY, context(0.05), "stable")
        assert upstreams.get("stable").breaker.state == "closed"
        fake.first_byte_seconds = 0
        assert (await upstreams.complete(BODY, context(), "stable")).text == "no"

    run(fake, test, breaker_failures=2, deadline=10)


def test_an_upstream_that_was_killed_and_restarted(fake: Fake) -> None:
    async def test(upstreams: Upstreams) -> None:
        assert upstreams.healthy("stable")
        await asyncio.to_thread(fake.stop)
        with pytest.raises(GatewayError) as caught:
            await upstreams.complete(BODY, context(), "stable")
        assert caught.value.status in (502, 503)
        await until(lambda: not upstreams.healthy("stable"))
        assert "cannot be reached" in (upstreams.get("stable").problem or "")
        fake.release = "b" * 64  # it comes back as another release
        await asyncio.to_thread(fake.start)
        await until(lambda: upstreams.healthy("stable"))
        got = await upstreams.complete(BODY, context(), "stable")
        assert got.release.digest == upstreams.release("stable").digest == "b" * 64

    run(fake, test)


def test_an_upstream_that_is_not_there_at_the_start(fake: Fake) -> None:
    fake.stop()

    async def test(upstreams: Upstreams) -> None:
        assert not upstreams.healthy("stable")
        await asyncio.to_thread(fake.start)
        await until(lambda: upstreams.healthy("stable"))

    run(fake, test)


def test_the_candidate_is_given_to_its_share_and_only_while_it_is_well(fake: Fake, other: Fake) -> None:
    callers = [Caller(f"key-{number}", "", "system", frozenset()) for number in range(400)]

    async def test(upstreams: Upstreams) -> None:
        first = [upstreams.choose(caller) for caller in callers]
        assert 60 < first.count("candidate") < 140  # 100 expected, sd 8.7
        assert [upstreams.choose(caller) for caller in callers] == first
        await asyncio.to_thread(other.stop)
        await until(lambda: not upstreams.healthy("candidate"))
        assert {upstreams.choose(caller) for caller in callers} == {"stable"}
        await asyncio.to_thread(other.start)
        await until(lambda: upstreams.healthy("candidate"))
        assert [upstreams.choose(caller) for caller in callers] == first
        got = await upstreams.complete(BODY, context(), "candidate")
        assert (got.track, got.release.digest) == ("candidate", "c" * 64)

    run(fake, test, candidate=other.url, candidate_weight=0.25)


def test_the_upstreams_key_is_sent(fake: Fake) -> None:
    async def test(upstreams: Upstreams) -> None:
        await upstreams.complete(BODY, context(), "stable")

    run(fake, test, upstream_key="up-secret")
    assert fake.headers[0]["authorization"] == "Bearer up-secret"
