"""What the gateway's routes share: who calls, and the parts that `app.create_app` puts together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from serving.gateway.admission import Admission
    from serving.gateway.authentication import Authentication
    from serving.gateway.database import Database
    from serving.gateway.drift import Drift
    from serving.gateway.limits import Limits
    from serving.gateway.metrics import Metrics
    from serving.gateway.scribe import Scribe
    from serving.gateway.settings import Settings
    from serving.gateway.upstream import Upstreams

SCOPES = ("diagnose", "chat", "jobs", "feedback", "admin")
ClientClass = Literal["system", "page", "batch", "person", "anonymous"]


@dataclass(frozen=True)
class Caller:
    """Who calls. `id` is a key's id or a token's subject, hashed; never a secret. `kind` is the metrics' label."""

    id: str
    name: str
    kind: ClientClass
    scopes: frozenset[str]
    rate: str | None = None
    quota: str | None = None


@dataclass(frozen=True)
class Context:
    """One request on its way: its id, its caller, and when it has to be answered (time.monotonic())."""

    request_id: str
    caller: Caller
    deadline: float


@dataclass
class Parts:
    """The gateway's parts. `draining` is set by SIGTERM: /readyz fails, and new requests are refused with 503."""

    settings: Settings
    metrics: Metrics
    authentication: Authentication
    limits: Limits
    admission: Admission
    upstreams: Upstreams
    database: Database
    audit: Scribe
    drift: Drift
    draining: bool = field(default=False)
