"""The routing's document, and the candidate's address."""

from __future__ import annotations

import json

import pytest

from medforge.rollout.routing import Place, Routing, candidate_url, parse

ROUTING = Routing(Place("http://s/v1", "a" * 64), Place("http://c/v1", ""), 0.25)


def test_it_is_read_as_it_was_written() -> None:
    assert parse(json.dumps(ROUTING.document()), "x") == ROUTING
    assert parse('{"stable": {"url": "http://s"}}', "x") == Routing(Place("http://s", ""), None, 0.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stable": {}}', '{"stable": {"url": "u"}, "weight": "much"}'])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="x: is no routing"):
        parse(text, "x")


@pytest.mark.parametrize(
    ("stable", "candidate"),
    [
        ("http://m-stable-predictor.n.svc.cluster.local/openai/v1", "http://m-canary-predictor.n.svc.cluster.local/openai/v1"),
        ("http://m-stable-predictor:8080/v1", "http://m-canary-predictor:8080/v1"),
        ("https://m-stable-predictor.n/m-stable-predictor", "https://m-canary-predictor.n/m-stable-predictor"),
    ],
)  # fmt: skip
def test_the_candidate_is_asked_at_its_own_service(stable: str, candidate: str) -> None:
    assert candidate_url(stable, "m-stable-predictor", "m-canary-predictor") == candidate


@pytest.mark.parametrize("url", ["http://10.0.0.1/v1", "http://other.n/v1", "http://m-stable-predictor-2.n/v1", ""])
def test_an_address_of_something_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a rollout needs it at the Service m-stable-predictor"):
        candidate_url(url, "m-stable-predictor", "m-canary-predictor")
