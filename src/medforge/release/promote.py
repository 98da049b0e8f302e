"""From an approved release to the one that is served: the keys that count, the check, and the channel."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.release.publish import list_releases, point, read_channel, read_release
from medforge.release.sign import approvals, public_key
from medforge.storage import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TRUSTED_KEYS = "MEDFORGE_TRUSTED_KEYS"
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


def trusted_keys(text: str | None = None) -> list[Ed25519PublicKey]:
    """The reviewers' public keys in `text`, PEM blocks one after the other; by default the variable
    MEDFORGE_TRUSTED_KEYS, which an operator sets from a ConfigMap.

    Whose signature counts is the operator's to say: it is no parameter of a pipeline, which its caller could choose.
    ValueError when there is none.
    """
    given = os.environ.get(TRUSTED_KEYS, "") if text is None else text
    found = [public_key(block.encode(), TRUSTED_KEYS) for block in _PEM.findall(given)]
    if not found:
        raise ValueError(f"{TRUSTED_KEYS} holds no public key (PEM); without one no approval can be checked")
    return found


def read_keys(paths: list[Path]) -> str:
    """The PEM texts of key files, or of the *.pub in a folder, for MEDFORGE_TRUSTED_KEYS."""
    files = [file for path in paths for file in (sorted(path.glob("*.pub")) if path.is_dir() else [path])]
    return "\n".join(file.read_text() for file in files)


def check(store: Store, bucket: str, digest: str, trusted: list[Ed25519PublicKey]) -> dict[str, Any]:
    """`approvals` of a whole release that may be served. ValueError says why another may not."""
    read_release(store, bucket, digest)
    found = approvals(store, bucket, digest, trusted)
    if found["status"] != "approved":
        told = "; ".join(f"{row['name']}: {row['why'] or row['status']}" for row in found["signatures"])
        raise ValueError(
            f"release {digest[:12]} is {found['status']}{f' ({told})' if told else ''}: only one that a trusted "
            "reviewer approved, and none refused, is served; `medforge approve` signs it"
        )
    return found


def promote(
    store: Store, bucket: str, digest: str, channel: str, trusted: list[Ed25519PublicKey], now: datetime
) -> dict[str, Any]:
    """Let `channel` name an approved release. Returns {channel, release, published_at, previous}."""
    check(store, bucket, digest, trusted)
    return point(store, bucket, channel, digest, now)


def newest_approved(store: Store, bucket: str, channel: str, trusted: list[Ed25519PublicKey]) -> str | None:
    """The release to serve: the one that `channel` names if it may be served, else the approved one that was signed
    last; None without any."""
    found: dict[str, str] = {}
    named = read_channel(store, bucket, channel) if store.has_bucket(bucket) else None
    for row in list_releases(store, bucket) if store.has_bucket(bucket) else []:
        if row["verdict"] is None:
            continue
        try:
            signatures = check(store, bucket, row["release"], trusted)["signatures"]
        except ValueError:  # not approved: not to be served
            continue
        found[row["release"]] = max(s["payload"]["signed_at"] for s in signatures if s["status"] == "approved")
    if named and named["release"] in found:
        return str(named["release"])
    return max(found, key=lambda digest: found[digest], default=None)
