"""The decision log of rollouts: one immutable object of the store a step, named by its time and its digest.

rollouts/<namespace>/<name>/<time>-<digest>.json   {schema_version, at, by, release, event, detail, previous}

`previous` is the SHA-256 of the entry before: an entry that was changed, removed or put in between breaks the chain.
An entry is never dated before the one before it, as clocks of different machines may differ by a little.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from medforge.files import canonical_json, sha256_bytes
from medforge.storage import Store

SCHEMA_VERSION = 1
_TIME = "%Y%m%dT%H%M%S.%fZ"


class Log:
    """The log of one installation, `place` being <namespace>/<name>; `by` says who acts."""

    def __init__(self, store: Store, bucket: str, place: str, by: str, now: Callable[[], datetime]) -> None:
        self._store, self._bucket, self._prefix, self._by, self._now = store, bucket, f"rollouts/{place}", by, now

    def note(self, event: str, release: str, **detail: Any) -> None:
        """Write one entry. ValueError if the store does not take it."""
        keys = self._keys()
        at = self._now().astimezone(timezone.utc)
        if keys:
            before = datetime.strptime(keys[-1].rpartition("/")[2].partition("-")[0], _TIME)
            at = max(at, before.replace(tzinfo=timezone.utc) + timedelta(microseconds=1))
        entry = {
            "schema_version": SCHEMA_VERSION,
            "at": at.isoformat(timespec="microseconds"),
            "by": self._by,
            "release": release,
            "event": event,
            "detail": detail,
            "previous": sha256_bytes(self._store.get(self._bucket, keys[-1])) if keys else None,
        }
        data = canonical_json(entry)
        self._store.put(self._bucket, f"{self._prefix}/{at:{_TIME}}-{sha256_bytes(data)[:16]}.json", data)

    def entries(self) -> tuple[list[dict[str, Any]], str]:
        """All entries, oldest first, and what is wrong with their chain ("" if nothing). A changed one is left out."""
        found: list[dict[str, Any]] = []
        problem, previous = "", None
        for key in self._keys():
            data = self._store.get(self._bucket, key)
            digest, before, previous = sha256_bytes(data), previous, sha256_bytes(data)
            if not key.endswith(f"-{digest[:16]}.json"):
                problem = problem or f"{key}: was changed"
                continue
            entry = json.loads(data)
            if entry["previous"] != before:
                problem = problem or f"{key}: the entry before it was changed, removed or put in"
            found.append(entry)
        return found, problem

    def _keys(self) -> list[str]:
        return [entry.key for entry in self._store.list(self._bucket, self._prefix)]
