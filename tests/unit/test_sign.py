"""Keys and signature documents, without a store."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medforge.files import canonical_json
from medforge.release.sign import _load_private_key, check_signature, key_id, load_public_key, new_key

DIGEST = "d" * 64
MANIFEST = {"files": {"verdict.json": {"sha256": "e" * 64, "size": 3}}}
SEED = bytes(range(32))


def _signed(key: Ed25519PrivateKey, **changes: Any) -> dict[str, Any]:
    payload = {
        "release": DIGEST,
        "verdict_sha256": "e" * 64,
        "manifest_sha256": DIGEST,
        "reviewer": "Dr Ü",
        "decision": "approve",
        "comment": "",
        "signed_at": "2026-01-01T00:00:00+00:00",
    } | changes
    return {
        "payload": payload,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(canonical_json(payload))).decode(),
    }


def _check(document: Any, name: str | None = None) -> str:
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return check_signature(data, name or f"{key_id(key.public_key())}-approve.json", DIGEST, MANIFEST)


def test_a_sound_signature_holds() -> None:
    assert _check(_signed(Ed25519PrivateKey.from_private_bytes(SEED))) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [("reviewer", "Mallory"), ("decision", "refuse"), ("release", "0" * 64), ("comment", "ok"), ("signed_at", "now")],
)
def test_a_changed_payload_does_not(field: str, value: str) -> None:
    document = _signed(Ed25519PrivateKey.from_private_bytes(SEED))
    document["payload"][field] = value
    assert "was changed" in _check(document)


@pytest.mark.parametrize(
    "changes", [{"release": "0" * 64}, {"verdict_sha256": "0" * 64}, {"manifest_sha256": "0" * 64}]
)
def test_a_signature_of_another_release_does_not(changes: dict[str, str]) -> None:
    assert _check(_signed(Ed25519PrivateKey.from_private_bytes(SEED), **changes)) == "it signs another release"


def test_a_signature_under_anothers_name_does_not() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SEED)
    assert "file name" in _check(_signed(Ed25519PrivateKey.generate()))
    assert "file name" in _check(_signed(key), f"{key_id(key.public_key())}-refuse.json")
    assert "file name" in _check(_signed(key, decision="perhaps"))


@pytest.mark.parametrize(
    "document", [b"", b"{}", b"[]", b"\xff", b'{"payload": {}, "public_key": "!", "signature": ""}']
)
def test_what_is_no_document_is_said_to_be_none(document: bytes) -> None:
    assert "not a signature document" in _check(document)


def test_a_new_key_is_its_owners_alone_and_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "reviewer.pem"
    made = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_id(load_public_key(path.with_name("reviewer.pem.pub"))) == made
    assert key_id(_load_private_key(path).public_key()) == made
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is not overwritten"):
        new_key(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"reviewer\.pem\.pub: is there already"):
        new_key(path)
    assert not path.exists()
    assert before.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_the_wrong_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "k"
    new_key(path)
    with pytest.raises(ValueError, match="is not a public key"):
        load_public_key(path)
    with pytest.raises(ValueError, match="is not a private key"):
        _load_private_key(tmp_path / "k.pub")
    with pytest.raises(ValueError, match="no such file"):
        _load_private_key(tmp_path / "missing")
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    formats = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (tmp_path / "rsa").write_bytes(other.private_bytes(*formats, serialization.NoEncryption()))
    with pytest.raises(ValueError, match="another kind"):
        _load_private_key(tmp_path / "rsa")
    locked = Ed25519PrivateKey.generate().private_bytes(*formats, serialization.BestAvailableEncryption(b"secret"))
    (tmp_path / "locked").write_bytes(locked)
    with pytest.raises(ValueError, match="password"):
        _load_private_key(tmp_path / "locked")
