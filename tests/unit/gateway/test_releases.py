"""GET /v1/releases/current."""

from __future__ import annotations

from serving.gateway import api
from serving.gateway.settings import Settings
from tests.unit.gateway.conftest import Gateway, Serve, make_key
from tests.unit.gateway.fake import RELEASE, Fake

PATH = "/v1/releases/current"


def test_what_is_served(gateway: Gateway) -> None:
    assert gateway.client.get(PATH).json() == {
        "stable": {"digest": RELEASE, "model": "medforge", "version": "chest 0.1.0", "track": "stable"},
        "candidate": None,
        "candidate_weight": 0.0,
        "heads": ["match", "region"],
        "about": {"name": "chest", "base": "tiny"},
        "disclaimer": api.DISCLAIMER,
    }


def test_a_candidate_is_told(serve: Serve, settings: Settings) -> None:
    other = Fake(release="c" * 64)
    try:
        with serve(settings.model_copy(update={"candidate": other.url, "candidate_weight": 0.2})) as gateway:
            told = gateway.client.get(PATH).json()
            assert (told["candidate"]["digest"], told["candidate_weight"]) == ("c" * 64, 0.2)
    finally:
        other.close()


def test_any_valid_key_may_ask(serve: Serve, settings: Settings) -> None:
    with serve(settings) as gateway:
        text = make_key(settings, "page", scopes=("feedback",), kind="page")
        assert gateway.client.get(PATH, headers={"authorization": f"Bearer {text}"}).status_code == 200
        assert gateway.client.get(PATH, headers={"authorization": ""}).status_code == 401


def test_before_the_upstream_ever_answered(serve: Serve, settings: Settings, fake: Fake) -> None:
    fake.stop()
    with serve(settings) as gateway:
        answer = gateway.client.get(PATH)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
