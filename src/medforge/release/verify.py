"""A release that was downloaded, proved whole and unchanged, and approved by a person, before anything loads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.files import list_files, sha256_bytes, sha256_file
from medforge.progress import track
from medforge.release.publish import MANIFEST, SCHEMA_VERSION, SIGNATURES, VERDICT
from medforge.release.sign import Status, judge_signatures
from medforge.storage import FileTable, compare_listing, read_table

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_READERS = 4  # files that are hashed at once: hashing lets other threads run


@dataclass(frozen=True)
class Verified:
    """A whole release in a folder. `status` and `signatures` are as `medforge.release.sign.approvals` tells them."""

    folder: Path
    digest: str
    manifest: dict[str, Any]
    status: Status
    signatures: tuple[dict[str, Any], ...]

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return self.folder / "model"


def verify_folder(folder: Path, trusted: Sequence[Ed25519PublicKey], digest: str | None = None) -> Verified:
    """The release in `folder`, every file of which has the SHA-256 that its manifest tells, and none is beside them.

    `digest` is the manifest's SHA-256 where it is known. An empty file of the manifest that is missing is made: KServe
    does not download those. Raises ValueError that names what is missing, extra or changed. Whether the release may be
    served is for `require_approval` to say.
    """
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: holds no release: there is no {MANIFEST}; give a folder releases/<digest>")
    data = manifest_file.read_bytes()
    found = sha256_bytes(data)
    if digest is not None and found != digest:
        raise ValueError(f"{manifest_file}: is not of release {digest}: its SHA-256 is {found}; download it again")
    manifest = _read_manifest(data, manifest_file)
    files: FileTable = manifest["files"]
    _make_empty(folder, files)
    there = [name for name in list_files(folder) if name != MANIFEST and not name.startswith(SIGNATURES)]
    compare_listing({name: (folder / name).stat().st_size for name in there}, files, f"{folder}/")
    with ThreadPoolExecutor(_READERS) as readers:
        digests = readers.map(lambda name: sha256_file(folder / name), sorted(files))
        for name, sha256 in zip(track(sorted(files), "verify release", unit="file"), digests, strict=True):
            if sha256 != files[name]["sha256"]:
                raise ValueError(f"{folder / name}: is corrupted or changed: its SHA-256 is {sha256}; do not use it")
    signed = [name for name in list_files(folder) if name.startswith(SIGNATURES)]
    documents = ((name.rpartition("/")[2], (folder / name).read_bytes()) for name in signed)
    status, rows = judge_signatures(documents, found, manifest, trusted)
    return Verified(folder, found, manifest, status, tuple(rows))


def require_approval(release: Verified, allow_unsigned: bool = False) -> None:
    """Raise ValueError unless a trusted key approved the release, none refused it, and all signatures are sound.

    With `allow_unsigned`, for candidates, one that nobody decided about, or only keys that are not trusted, passes too.
    """
    if release.status == "approved" or (allow_unsigned and release.status in ("unsigned", "untrusted")):
        return
    bad = "; ".join(f"{row['name']}: {row['why']}" for row in release.signatures if row["why"])
    told = {
        "refused": "a reviewer refused it",
        "bad": f"a signature does not hold: {bad}",
        "untrusted": "only keys that are not trusted signed it; name the reviewers' public keys as trusted",
        "unsigned": "nobody has approved it; `medforge approve` signs it",
    }[release.status]
    raise ValueError(f"release {release.digest[:12]} is not served: {told}")


def _read_manifest(data: bytes, where: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: is not valid JSON ({type(error).__name__}); download the release again") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{where}: is no release's manifest of schema version {SCHEMA_VERSION}")
    files = read_table(manifest.get("files"), str(where))
    if VERDICT not in files or not isinstance(manifest.get("about"), dict):
        raise ValueError(f"{where}: is no release's manifest: it lacks {VERDICT} or about")
    return manifest


def _make_empty(folder: Path, files: FileTable) -> None:
    for name, info in files.items():
        path = folder / name
        if info["size"] == 0 and not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                raise ValueError(f"{path}: is missing, empty as it should be, and cannot be made: {error}") from None
