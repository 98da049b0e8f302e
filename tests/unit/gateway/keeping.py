"""Parts of which only what keeps is real: settings, metrics, database, audit log."""

from __future__ import annotations

import base64
import io
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from PIL import Image
from pydantic import SecretStr

from medforge.audit import AuditLog
from serving.gateway import api
from serving.gateway.database import Database
from serving.gateway.drift import Drift
from serving.gateway.jobstore import JobStore
from serving.gateway.metrics import Metrics
from serving.gateway.parts import Caller, ClientClass, Context, Parts
from serving.gateway.scribe import Scribe
from serving.gateway.settings import Settings

NOW = 1_000_000.0  # when jobs are put into the store


def png(shade: int = 100) -> str:
    """An image in base64."""
    stream = io.BytesIO()
    Image.new("L", (64, 64), shade).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def ask(question: str, image: str | None = None) -> api.DiagnoseRequest:
    return api.DiagnoseRequest(question=question, images=[api.ImageIn(data=png() if image is None else image)])


def answered(request_id: str, answer: str) -> api.DiagnoseResponse:
    return api.DiagnoseResponse(
        id=request_id,
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        task="ask",
        decision="answered",
        answer=answer,
        release=api.Release(digest="a" * 64, model="medforge"),
        images=[api.ImageOut(sha256="b" * 64, format="png", width=64, height=64)],
    )


def context(request_id: str = "request-1", caller: str = "caller-1", *scopes: str, seconds: float = 30.0) -> Context:
    kind: ClientClass = "system"
    return Context(request_id, Caller(caller, "a name", kind, frozenset(scopes)), time.monotonic() + seconds)


@contextmanager
def full_disk(scribe: Scribe) -> Iterator[None]:
    """Let the audit log's process write nothing more."""
    assert scribe._process is not None
    before = resource.prlimit(scribe._process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(scribe._process.pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(scribe._process.pid, resource.RLIMIT_FSIZE, before)


class InProcess:
    """The audit log's writer without its process."""

    def __init__(self, folder: Path) -> None:
        self.log = AuditLog(folder, fsync=False)

    async def write(self, entry: dict[str, Any]) -> None:
        self.log.append(entry)


@contextmanager
def keeping(folder: Path, **changes: Any) -> Iterator[Parts]:
    """The parts, in a folder; `changes` are settings."""
    values: dict[str, Any] = {"data_dir": folder, "secret_key": SecretStr("s" * 32), "audit_fsync": False} | changes
    settings = Settings(_env_file=None, **values)
    metrics, absent = Metrics(), cast(Any, None)
    database = Database(settings.database_url)
    database.create()
    audit = InProcess(folder / "audit")
    try:
        yield Parts(settings, metrics, absent, absent, absent, absent, database, cast(Any, audit), Drift(None, metrics))
    finally:
        audit.log.close()
        database.close()


def add(store: JobStore, job: str = "job-1", count: int = 3, caller: str = "c", now: float = NOW) -> api.JobStatus:
    """Put a job of so many questions into the store."""
    items = [(ask(f"question {number}").model_dump_json().encode(), None) for number in range(count)]
    return store.add(job, caller, None, items, now)
