"""A downloaded release is loaded only whole, unchanged and approved: every way that it can differ is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medforge.files import canonical_json, list_files, sha256_bytes
from medforge.release.sign import key_id
from medforge.release.verify import require_approval, verify_folder

KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
CONTENT = {
    "model/config.json": b"{}",
    "model/weights.safetensors": b"\0" * 3_000_000,
    "model/empty.txt": b"",
    "verdict.json": b'{"passed": true}',
    "README.md": b"card",
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A whole release that nobody signed."""
    folder = tmp_path / "release"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, {})
    return folder


def write_manifest(folder: Path, changes: dict[str, Any]) -> str:
    table = {name: {"sha256": sha256_bytes(data), "size": len(data)} for name, data in CONTENT.items()}
    data = canonical_json({"schema_version": 1, "files": table, "about": {"name": "unit"}} | changes)
    (folder / "manifest.json").write_bytes(data)
    return sha256_bytes(data)


def digest_of(folder: Path) -> str:
    return sha256_bytes((folder / "manifest.json").read_bytes())


def sign(folder: Path, key: Ed25519PrivateKey = KEY, decision: str = "approve", **changes: Any) -> Path:
    """A signature over the release, as `medforge approve` writes it."""
    digest = digest_of(folder)
    payload = {
        "release": digest,
        "verdict_sha256": sha256_bytes(CONTENT["verdict.json"]),
        "manifest_sha256": digest,
        "reviewer": "R",
        "decision": decision,
        "comment": "",
        "signed_at": "2026-01-01T00:00:00+00:00",
    } | changes
    document = {
        "payload": payload,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(canonical_json(payload))).decode(),
    }
    path = folder / "signatures" / f"{key_id(key.public_key())}-{decision}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def status(folder: Path) -> str:
    return verify_folder(folder, [KEY.public_key()]).status


def test_a_whole_approved_release_is_taken(release: Path) -> None:
    sign(release)
    found = verify_folder(release, [KEY.public_key()], digest_of(release))
    assert (found.digest, found.status) == (digest_of(release), "approved")
    assert found.manifest["about"] == {"name": "unit"} and found.model == release / "model"
    assert [row["status"] for row in found.signatures] == ["approved"]
    require_approval(found)


@pytest.mark.parametrize("name", [name for name, data in CONTENT.items() if data])
@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "link"])
def test_each_file_counts(release: Path, name: str, damage: str) -> None:
    sign(release)
    path = release / name
    data = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "longer":
        path.write_bytes(data + b"x")
    elif damage == "link":
        path.symlink_to(release / "nothing")
    with pytest.raises(ValueError, match=Path(name).name.replace(".", r"\.")):
        verify_folder(release, [KEY.public_key()])


@pytest.mark.parametrize(
    "name", ["evil.py", "model/evil.py", "manifest.json.bak", "model/manifest.json", "signature/x"]
)
def test_nothing_may_stand_beside_them(release: Path, name: str) -> None:
    sign(release)
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_bytes(b"1")
    with pytest.raises(ValueError, match="does not name them"):
        verify_folder(release, [KEY.public_key()])


def test_an_empty_file_that_the_downloader_skipped_is_made(release: Path) -> None:
    (release / "model" / "empty.txt").unlink()
    sign(release)
    assert status(release) == "approved"
    assert (release / "model" / "empty.txt").read_bytes() == b""
    (release / "model" / "empty.txt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"empty\.txt"):
        status(release)


def test_the_digest_is_the_manifests(release: Path) -> None:
    sign(release)
    with pytest.raises(ValueError, match="is not of release 0000"):
        verify_folder(release, [KEY.public_key()], "0" * 64)
    before = digest_of(release)
    path = release / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="is not of release"):
        verify_folder(release, [KEY.public_key()], before)
    # without the digest the signature tells: it is of another manifest
    assert status(release) == "bad"


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"../up": {"sha256": "0" * 64, "size": 1}}},
        {"files": {"verdict.json": {"sha256": "short", "size": 1}}},
        {"files": {"other.json": {"sha256": "0" * 64, "size": 1}}},
        {"schema_version": 2},
        {"about": None},
    ],
)
def test_a_manifest_that_is_none_is_refused(release: Path, changes: dict[str, Any]) -> None:
    write_manifest(release, changes)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify_folder(release, [KEY.public_key()])


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_broken_manifest_is_refused(release: Path, data: bytes) -> None:
    (release / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        verify_folder(release, [])
    (release / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no release"):
        verify_folder(release, [])


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        ([], "unsigned"),
        ([(KEY, "approve")], "approved"),
        ([(STRANGER, "approve")], "untrusted"),
        ([(STRANGER, "refuse")], "untrusted"),
        ([(KEY, "approve"), (STRANGER, "refuse")], "approved"),
        ([(KEY, "refuse")], "refused"),
        ([(KEY, "approve"), (KEY, "refuse")], "refused"),
    ],
)
def test_only_an_approved_release_is_served(
    release: Path, decisions: list[tuple[Ed25519PrivateKey, str]], expected: str
) -> None:
    for key, decision in decisions:
        sign(release, key, decision)
    found = verify_folder(release, [KEY.public_key()])
    assert found.status == expected
    for allow_unsigned in (False, True):
        if expected == "approved" or (allow_unsigned and expected in ("unsigned", "untrusted")):
            require_approval(found, allow_unsigned)
        else:
            with pytest.raises(ValueError, match=f"release {found.digest[:12]} is not served"):
                require_approval(found, allow_unsigned)


@pytest.mark.parametrize("damage", ["comment", "garbage", "renamed", "other-release", "not-json-name", "swapped-key"])
def test_a_bad_signature_is_refused_even_for_candidates(release: Path, damage: str) -> None:
    sign(release)
    path = sign(release, STRANGER)
    document = json.loads(path.read_text())
    if damage == "comment":
        document["payload"]["comment"] = "changed"
    elif damage == "swapped-key":
        document["public_key"] = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()
    if damage == "garbage":
        path.write_bytes(b"\xff\0")
    elif damage == "renamed":
        path.rename(path.with_name(path.name.replace("approve", "refuse")))
    elif damage == "other-release":
        sign(release, STRANGER, release="0" * 64)
    elif damage == "not-json-name":
        (path.parent / "note.txt").write_text("hello")
    else:
        path.write_text(json.dumps(document))
    found = verify_folder(release, [KEY.public_key()])
    assert found.status == "bad"
    for allow_unsigned in (False, True):
        with pytest.raises(ValueError, match="a signature does not hold"):
            require_approval(found, allow_unsigned)


def test_nothing_is_changed_by_looking(release: Path) -> None:
    sign(release)
    before = {name: (release / name).stat().st_mtime_ns for name in list_files(release)}
    status(release)
    assert {name: (release / name).stat().st_mtime_ns for name in list_files(release)} == before
