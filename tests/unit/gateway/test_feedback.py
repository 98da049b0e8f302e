"""A verdict is kept with what is known of the answer; nobody judges another's answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from serving.gateway import api
from serving.gateway.database import feedback
from serving.gateway.errors import GatewayError
from serving.gateway.feedback import keep
from serving.gateway.parts import Parts
from tests.unit.gateway.conftest import Gateway, Serve, make_key
from tests.unit.gateway.keeping import keeping, png


def note(parts: Parts, request_id: str = "r1", caller: str = "c") -> None:
    row = {"caller": caller, "request_id": request_id, "route": "/v1/diagnose", "release": "a" * 64, "track": "stable"}

    async def noted() -> None:
        parts.database.answered.note(row | {"decision": "answered", "at": time.time()})

    asyncio.run(noted())


def kept(parts: Parts) -> list[dict[str, Any]]:
    with parts.database.engine.connect() as connection:
        rows = connection.execute(sql.select(feedback).order_by(feedback.c.at, feedback.c.id))
        return [dict(row._mapping) for row in rows]


def verdict(value: str = "wrong", **more: Any) -> api.FeedbackRequest:
    return api.FeedbackRequest.model_validate({"request_id": "r1", "verdict": value, **more})


def test_a_verdict_is_kept_with_release_and_decision(tmp_path: Path) -> None:
    region = {"label": "nodule", "image": 0, "box": [0.1, 0.2, 0.3, 0.4], "pixels": [1, 2, 3, 4], "source": "text"}
    with keeping(tmp_path) as parts:
        note(parts)
        keep(parts.database, "fb-1", "c", verdict(correction="No nodule.", comment="see", regions=[region]), 5.0)
        (row,) = kept(parts)
    assert json.loads(row.pop("regions")) == [region]
    assert row == {
        "id": "fb-1", "caller": "c", "request_id": "r1", "release": "a" * 64, "decision": "answered",
        "verdict": "wrong", "correction": "No nodule.", "comment": "see", "status": "unreviewed", "at": 5.0,
        "replaced_at": None,
    }  # fmt: skip


def test_a_later_verdict_replaces_the_earlier_and_keeps_it(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        note(parts)
        for number, value in enumerate(("wrong", "partly", "correct")):
            keep(parts.database, f"fb-{number}", "c", verdict(value), float(number))
        assert [(row["verdict"], row["replaced_at"]) for row in kept(parts)] == [
            ("wrong", 1.0), ("partly", 2.0), ("correct", None)
        ]  # fmt: skip


def test_of_many_verdicts_at_once_one_stands(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        note(parts)
        parts.database.answered.write()
        threads = [
            threading.Thread(target=keep, args=(parts.database, f"fb-{number}", "c", verdict(), float(number)))
            for number in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = kept(parts)
    assert len(rows) == 12
    assert [row["replaced_at"] for row in rows].count(None) == 1


@pytest.mark.parametrize(("request_id", "caller"), [("r2", "c"), ("r1", "d")])
def test_an_unknown_or_foreign_answer_is_404(request_id: str, caller: str, tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        note(parts)
        with pytest.raises(GatewayError) as told:
            keep(parts.database, "fb", caller, verdict(request_id=request_id), 0.0)
        assert told.value.status == 404
        assert kept(parts) == []


def test_over_http(gateway: Gateway, serve: Serve) -> None:
    asked = gateway.client.post("/v1/diagnose", json={"question": "Is it normal?", "images": [{"data": png()}]})
    assert asked.status_code == 200, asked.text
    body = {"request_id": asked.json()["id"], "verdict": "unsafe", "comment": "words that no log may have"}
    told = gateway.client.post("/v1/feedback", json=body)
    assert told.status_code == 201, told.text
    assert told.json() == {"id": told.json()["id"], "request_id": body["request_id"], "status": "kept"}
    (row,) = kept(gateway.parts)
    assert (row["verdict"], row["decision"], row["release"]) == ("unsafe", asked.json()["decision"], "a" * 64)
    assert gateway.metric("medforge_gateway_feedback_total", verdict="unsafe") == 1
    (log,) = (gateway.parts.settings.data_dir / "audit").glob("*.jsonl")
    assert "words that no log may have" not in log.read_text()
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["route"], last["decision"], last["release"]) == ("/v1/feedback", "unsafe", "a" * 64)

    other = make_key(gateway.parts.settings, "other")
    foreign = gateway.client.post("/v1/feedback", json=body, headers={"authorization": f"Bearer {other}"})
    assert foreign.status_code == 404
    assert foreign.json()["error"]["param"] == "request_id"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b'{"request_id":"r1"}', "verdict"),
        (b'{"request_id":"r1","verdict":"good"}', "verdict"),
        (b'{"request_id":"r1","verdict":"wrong","comments":"x"}', "comments"),
        (b'{"request_id":"r1","verdict":"wrong","regions":[{}]}', "regions.0.label"),
        (b'{"request_id":"","verdict":"wrong"}', "request_id"),
        (rb'{"request_id":"r1","verdict":"wrong","comment":"a\u0000b"}', "comment"),
    ],
)
def test_a_wrong_body_names_the_field(body: bytes, param: str | None, gateway: Gateway) -> None:
    told = gateway.client.post("/v1/feedback", content=body, headers={"content-type": "application/json"})
    assert told.status_code == 422
    assert told.json()["error"]["param"] == param


def test_a_key_without_the_scope_may_not(gateway: Gateway) -> None:
    text = make_key(gateway.parts.settings, "asker", scopes=("diagnose",))
    headers = {"authorization": f"Bearer {text}"}
    assert gateway.client.post("/v1/feedback", json={}, headers=headers).status_code == 403
    assert gateway.client.post("/v1/feedback", json={}, headers={"authorization": ""}).status_code == 401
