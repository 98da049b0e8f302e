"""Whether a release may be rolled out: whole, judged as passed, approved by a trusted reviewer."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medforge.release.policy import failed_rules
from medforge.release.promote import check
from medforge.release.publish import read_release
from medforge.release.verify import Verified, require_approval, verify_folder
from medforge.storage import Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def check_release(
    store: Store, bucket: str, digest: str, trusted: list[Ed25519PublicKey], every_byte: bool = False
) -> None:
    """ValueError that says why a release may not be served.

    With `every_byte` all its files are read and hashed, for a server that does not do so itself (vLLM); else their
    names and sizes are compared, and the manifest and the verdict are hashed.
    """
    check(store, bucket, digest, trusted)
    manifest, verdict = read_release(store, bucket, digest)
    if verdict.get("passed") is not True:
        raise ValueError(f"release {digest[:12]} did not pass its policy: {'; '.join(failed_rules(verdict))}")
    if every_byte and (wrong := store.differing(bucket, f"releases/{digest}", manifest["files"])):
        raise ValueError(
            f"release {digest[:12]}: {', '.join(wrong[:3])} is corrupted or changed; do not use it, publish it again"
        )


def download_release(store: Store, bucket: str, digest: str, trusted: list[Ed25519PublicKey], target: Path) -> Verified:
    """Bring a release that may be served, with its manifest and signatures, to the folder `target`.

    Every file is hashed as it lies there; ValueError, and no folder, if one is not what the manifest says. A folder
    that is there already has to be this release, and is left: a pod's init containers run again after its node did.
    """
    check_release(store, bucket, digest, trusted)
    if os.path.lexists(target):
        try:
            return _proven(target, trusted, digest)
        except ValueError as error:
            raise ValueError(f"{target}: is there already and is another thing: {error}; remove it") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.iterdir():  # by a download that was killed: it may fill the disk
        if left.name.startswith(f".{target.name}.") and left.suffix == ".tmp":
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as work:
        folder = Path(work) / "release"
        store.download_folder(bucket, f"releases/{digest}", folder)
        release = _proven(folder, trusted, digest)
        os.replace(folder, target)
    return replace(release, folder=target)


def _proven(folder: Path, trusted: list[Ed25519PublicKey], digest: str) -> Verified:
    release = verify_folder(folder, trusted, digest)
    require_approval(release)
    return release
