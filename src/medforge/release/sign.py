"""What a person decided about a release: an Ed25519 signature (RFC 8032) over its digests, kept beside it."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medforge.files import canonical_json, sha256_bytes, write_atomic
from medforge.release.policy import failed_rules
from medforge.release.publish import SIGNATURES, VERDICT, read_manifest, read_release
from medforge.storage import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Decision = Literal["approve", "refuse"]
Status = Literal["approved", "refused", "unsigned", "untrusted", "bad"]


def new_key(path: Path) -> str:
    """Make a signing key: the private half at `path`, for its owner's eyes only, the public half at `path`.pub.

    Returns the key's id, 16 hexadecimal digits. ValueError if either file is there already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_name(path.name + ".pub")
    for file in (path, public_path):
        if file.exists():
            raise ValueError(f"{file}: is there already and is not overwritten: its signatures would lose their key")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    # Created with its mode, and never over another: not even for a moment can others read it.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(pem)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_atomic(public_path, public)
    return key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the public key's 32 bytes."""
    return sha256_bytes(key.public_bytes_raw())[:16]


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file; ValueError if it is none, or a private one."""
    return public_key(_read(path), str(path))


def public_key(pem: bytes, where: str) -> Ed25519PublicKey:
    """The public key in a PEM text that stands in `where`; ValueError if it is none, or a private one."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{where}: is not a public key; give the .pub that `medforge signing-key` wrote") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{where}: is a key of another kind; `medforge signing-key` makes Ed25519 keys")
    return key


def _load_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise ValueError(f"{path}: is locked by a password; give a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{path}: is not a private key; `medforge signing-key` makes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: is a key of another kind; `medforge signing-key` makes Ed25519 keys")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `medforge signing-key` makes a key") from None


def approve(
    store: Store,
    bucket: str,
    digest: str,
    private_key_path: Path,
    reviewer: str,
    decision: Decision,
    comment: str,
    now: datetime,
) -> dict[str, Any]:
    """Sign a decision about a whole release and put it beside it. Returns the signature's document.

    A decision that the same key has signed before stands, and is returned as it was. Raises ValueError if the
    release is incomplete or changed, or if one is to be approved whose verdict did not pass.
    """
    assert now.tzinfo is not None
    if not reviewer.strip():
        raise ValueError("a decision needs the reviewer's name")
    key = _load_private_key(private_key_path)
    manifest, verdict = read_release(store, bucket, digest)
    if decision == "approve" and verdict["passed"] is not True:
        raise ValueError(f"release {digest[:12]} did not pass its policy: {'; '.join(failed_rules(verdict))}")
    public = key.public_key()
    name = f"{key_id(public)}-{decision}.json"
    path = f"releases/{digest}/{SIGNATURES}{name}"
    if store.exists(bucket, path):
        before = store.get(bucket, path)
        if not check_signature(before, name, digest, manifest):
            document: dict[str, Any] = json.loads(before)
            return document
    payload = {
        "release": digest,
        "verdict_sha256": manifest["files"][VERDICT]["sha256"],
        "manifest_sha256": digest,
        "reviewer": reviewer.strip(),
        "decision": decision,
        "comment": comment,
        "signed_at": now.astimezone(timezone.utc).isoformat(timespec="seconds"),
    }
    document = {
        "payload": payload,
        "public_key": base64.b64encode(public.public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(canonical_json(payload))).decode(),
    }
    store.put(bucket, path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    return document


def check_signature(data: bytes, name: str, digest: str, manifest: dict[str, Any]) -> str:
    """Why the signature document `data` of that file name does not hold for the release; "" if it does."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        document = json.loads(data)
        payload = document["payload"]
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(document["public_key"], validate=True))
        signature = base64.b64decode(document["signature"], validate=True)
        signed = canonical_json(payload)
        decision = payload["decision"]
        told = (payload["release"], payload["manifest_sha256"], payload["verdict_sha256"])
        payload["reviewer"], payload["comment"], payload["signed_at"]
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        return f"is not a signature document ({type(error).__name__}: {error})"
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return "the signature does not fit what it signs: one of them was changed"
    if told != (digest, digest, manifest["files"][VERDICT]["sha256"]):
        return "it signs another release"
    if decision not in ("approve", "refuse") or name != f"{key_id(key)}-{decision}.json":
        return "its file name does not fit its key and decision"
    return ""


def approvals(store: Store, bucket: str, digest: str, trusted: Sequence[Ed25519PublicKey]) -> dict[str, Any]:
    """What was decided about a release: {release, status, signatures: [{name, status, why, payload}]}.

    The status is `refused` if a trusted key refused, else `bad` if a signature was tampered with, else `approved` if
    a trusted key approved, else `untrusted` if only other keys signed, else `unsigned`.
    """
    manifest = read_manifest(store, bucket, digest)
    entries = store.list(bucket, f"releases/{digest}/{SIGNATURES}")
    documents = ((entry.key.rpartition("/")[2], store.get(bucket, entry.key)) for entry in entries)
    status, rows = judge_signatures(documents, digest, manifest, trusted)
    return {"release": digest, "status": status, "signatures": rows}


def judge_signatures(
    documents: Iterable[tuple[str, bytes]], digest: str, manifest: dict[str, Any], trusted: Sequence[Ed25519PublicKey]
) -> tuple[Status, list[dict[str, Any]]]:
    """What signature documents, as (file name, bytes), decide: the status and the rows that `approvals` tells of."""
    known = {base64.b64encode(key.public_bytes_raw()).decode() for key in trusted}
    rows: list[dict[str, Any]] = []
    for name, data in documents:
        if why := check_signature(data, name, digest, manifest):
            rows.append({"name": name, "status": "bad", "why": why, "payload": None})
            continue
        document = json.loads(data)
        payload = document["payload"]
        status = {"approve": "approved", "refuse": "refused"}[payload["decision"]]
        if document["public_key"] not in known:
            status = "untrusted"
        rows.append({"name": name, "status": status, "why": "", "payload": payload})
    found = {row["status"] for row in rows}
    order: tuple[Status, ...] = ("refused", "bad", "approved", "untrusted")
    return next((status for status in order if status in found), "unsigned"), rows


def is_approved(store: Store, bucket: str, digest: str, trusted: Sequence[Ed25519PublicKey]) -> bool:
    """Whether a trusted key approved the release, none refused it, and no signature was tampered with."""
    return bool(approvals(store, bucket, digest, trusted)["status"] == "approved")
