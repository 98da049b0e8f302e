"""A request's row: it is there before the answer, and without it there is no answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from medforge import audit
from medforge.audit import verify
from serving.gateway import auditing
from serving.gateway.errors import GatewayError
from serving.gateway.parts import Parts
from tests.unit.gateway.keeping import context, keeping


def rows(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "audit").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


async def record(parts: Parts, status: int = 200) -> None:
    await auditing.record(
        parts, context(), "/v1/diagnose", status=status, release="a" * 64, track="stable", inputs="b" * 64,
        outputs="c" * 64, decision="abstained", reason="low-match",
    )  # fmt: skip


def test_the_row_says_who_which_release_and_what_was_decided(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        asyncio.run(record(parts))
        (row,) = rows(tmp_path)
        assert {name: row[name] for name in row if name not in ("seq", "at", "prev", "hash")} == {
            "request_id": "request-1",
            "caller": "caller-1",
            "client": "system",
            "route": "/v1/diagnose",
            "status": 200,
            "release": "a" * 64,
            "track": "stable",
            "inputs": "b" * 64,
            "outputs": "c" * 64,
            "decision": "abstained",
            "reason": "low-match",
        }
        assert parts.metrics.registry.get_sample_value("medforge_gateway_audit_rows_total") == 1
    assert verify(tmp_path / "audit")[0] == 1


def test_a_name_is_never_in_it(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        asyncio.run(record(parts))
        assert "a name" not in json.dumps(rows(tmp_path))


def test_without_a_row_there_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with keeping(tmp_path) as parts:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(audit.AuditLog, "_write", fail)
            with pytest.raises(GatewayError) as told:
                asyncio.run(record(parts))
        assert (told.value.status, told.value.code, told.value.retry_after) == (503, "audit-unavailable", 30)
        assert "No space" not in told.value.message
        assert parts.database.answered._rows == {}  # nothing that feedback could refer to
        asyncio.run(record(parts))
        assert len(rows(tmp_path)) == 1


def test_only_answers_can_be_given_feedback_on(tmp_path: Path) -> None:
    with keeping(tmp_path) as parts:
        asyncio.run(record(parts, status=502))
        assert parts.database.answered._rows == {}
        asyncio.run(record(parts))
        assert list(parts.database.answered._rows) == [("caller-1", "request-1")]
