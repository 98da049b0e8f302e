"""A row of the audit log for each request that was let in: who, when, which release, digests, what was decided.

The row is on the disk before the answer goes out; where it cannot be written, the request fails with 503.
"""

from __future__ import annotations

import time

from serving.gateway.errors import GatewayError
from serving.gateway.parts import Context, Parts


async def record(
    parts: Parts,
    context: Context,
    route: str,
    *,
    status: int,
    release: str | None,
    track: str | None,
    inputs: str | None,
    outputs: str | None,
    decision: str | None = None,
    reason: str | None = None,
) -> None:
    """Write the row of an answer, and let feedback refer to it if it is one.

    `inputs` and `outputs` are the SHA-256 of the request and of the answer. GatewayError 503 if the row cannot be
    written. A caller that hangs up meanwhile does not undo it.
    """
    await note(
        parts, context, route, status=status, release=release, track=track, inputs=inputs, outputs=outputs,
        decision=decision, reason=reason,
    )  # fmt: skip
    if status == 200:
        row = {"caller": context.caller.id, "request_id": context.request_id, "route": route, "release": release}
        parts.database.answered.note(row | {"track": track, "decision": decision, "at": time.time()})


async def note(parts: Parts, context: Context, route: str, **entry: str | int | None) -> None:
    """Write the row of a request that is no answer of a model: a job that was sent, a reader's verdict."""
    known = {
        "request_id": context.request_id,
        "caller": context.caller.id,
        "client": context.caller.kind,
        "route": route,
    }
    try:
        await parts.audit.write(known | entry)
    except OSError as error:
        message = "The audit log cannot be written, so nothing is answered; the operator has to look after it"
        raise GatewayError(503, "audit-unavailable", message, None, 30) from error
    parts.metrics.audit_rows.inc()
