"""Releases in the object store: content-addressed, immutable, complete only when their manifest is there.

releases/<digest>/manifest.json      {schema_version, files: {name: {sha256, size}}, about}; digest is its SHA-256
releases/<digest>/<name>             model/…, verdict.json, results.json, report.html, README.md, sbom.json
releases/<digest>/signatures/…       what reviewers signed (medforge.release.sign)
channels/<channel>.json              {release, published_at, previous}
"""

from __future__ import annotations

import json
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from medforge.config import NAME
from medforge.files import canonical_json, list_files, read_json, sha256_bytes, sha256_file, write_atomic, write_json
from medforge.progress import track
from medforge.release.card import model_card, sbom
from medforge.release.policy import failed_rules
from medforge.storage import FileTable, Store, check_name, compare_listing, read_table

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
VERDICT = "verdict.json"
SIGNATURES = "signatures/"
_GENERATED = ("README.md", "sbom.json")
_SHORTEST_PREFIX = 6


def publish(
    store: Store, bucket: str, channel: str, parts: dict[str, Path], about: dict[str, Any], now: datetime
) -> dict[str, Any]:
    """Upload a release that passed its policy and let `channel` name it.

    `parts` maps names in the release to files or folders: `verdict.json` always, and `model`, `results.json`, …
    `about` is plain JSON for the model card (see `model_card`). `now` bears a time zone.

    Returns {release, outcome, channel, previous, published_at}: `outcome` is "published", "completed" where an
    interrupted upload was taken up again, or "reused" where the whole release was there and proved sound. Raises
    ValueError that names the rules if the verdict did not pass, if a part is missing, or if the store fails.
    """
    assert now.tzinfo is not None
    if not re.fullmatch(NAME, channel):
        raise ValueError(f"{channel!r} is no channel name: lower-case letters, digits and hyphens are")
    verdict = _passed_verdict(parts)
    with tempfile.TemporaryDirectory(prefix="medforge-") as work:
        files = _local_files(parts) | _generate(Path(work), parts, about, verdict)
        table: FileTable = {
            name: {"sha256": sha256_file(files[name]), "size": files[name].stat().st_size}
            for name in track(sorted(files), "hash release", unit="file")
        }
        manifest = canonical_json({"schema_version": SCHEMA_VERSION, "files": table, "about": about})
        digest = sha256_bytes(manifest)
        store.ensure_bucket(bucket)
        outcome = _upload(store, bucket, digest, manifest, table, files)
    return {"release": digest, "outcome": outcome, **point(store, bucket, channel, digest, now)}


def _passed_verdict(parts: dict[str, Path]) -> dict[str, Any]:
    if VERDICT not in parts:
        raise ValueError(f"a release needs a {VERDICT}: `medforge gate` makes one")
    verdict = read_json(parts[VERDICT])
    if not isinstance(verdict, dict) or not isinstance(verdict.get("rules"), list) or "policy" not in verdict:
        raise ValueError(f"{parts[VERDICT]}: is not a verdict; `medforge gate` makes one")
    if verdict.get("passed") is not True or failed_rules(verdict) or not verdict["rules"]:
        reasons = "\n".join(f"  {line}" for line in failed_rules(verdict)) or "  it says that it did not pass"
        raise ValueError(f"not published: the candidate did not pass the policy:\n{reasons}")
    return verdict


def _local_files(parts: dict[str, Path]) -> dict[str, Path]:
    """Every file of the release by its name in it."""
    files: dict[str, Path] = {}
    for name, path in parts.items():
        check_name(name, "release")
        if name in (MANIFEST, *_GENERATED) or f"{name}/".startswith(SIGNATURES):
            raise ValueError(f"{name}: the name is the release's own; give the part another")
        if path.is_dir():
            inside = {f"{name}/{child}": path / child for child in list_files(path)}
            if not inside:
                raise ValueError(f"{path}: holds no files; a release's {name} needs some")
            files |= inside
        elif path.is_file():
            files[name] = path
        else:
            raise ValueError(f"{path}: no such file or folder; it should be the release's {name}")
    return files


def _generate(work: Path, parts: dict[str, Path], about: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Path]:
    results = read_json(parts["results.json"]) if "results.json" in parts else None
    write_atomic(work / "README.md", model_card(about, verdict, results))
    write_json(work / "sbom.json", sbom(str(about.get("name") or "unnamed")))
    return {name: work / name for name in _GENERATED}


def _upload(store: Store, bucket: str, digest: str, manifest: bytes, table: FileTable, files: dict[str, Path]) -> str:
    prefix = f"releases/{digest}"
    there = {entry.key for entry in store.list(bucket, prefix)}
    whole = f"{prefix}/{MANIFEST}" in there
    wanting = store.differing(bucket, prefix, table)
    if whole and wanting:
        raise ValueError(
            f"s3://{bucket}/{prefix}: is published, but {', '.join(wanting[:3])} is missing or not what its manifest "
            "says: somebody changed it. Remove the folder, then publish again"
        )
    if whole:
        read_release(store, bucket, digest)
        return "reused"
    store.upload_files({f"{prefix}/{name}": files[name] for name in wanting}, bucket)
    store.put(bucket, f"{prefix}/{MANIFEST}", manifest)
    return "completed" if there else "published"


def point(store: Store, bucket: str, channel: str, digest: str, now: datetime) -> dict[str, Any]:
    """Let the channel name the release; one that does so already stays as it is. ValueError for a bad name."""
    if not re.fullmatch(NAME, channel):
        raise ValueError(f"{channel!r} is no channel name: lower-case letters, digits and hyphens are")
    before = read_channel(store, bucket, channel)
    if before is None or before["release"] != digest:
        stamp = now.astimezone(timezone.utc).isoformat(timespec="seconds")
        value = {"release": digest, "published_at": stamp, "previous": before and before["release"]}
        store.put(bucket, f"channels/{channel}.json", json.dumps(value, indent=2).encode() + b"\n")
        before = value
    return {"channel": channel, **before}


def read_channel(store: Store, bucket: str, channel: str) -> dict[str, Any] | None:
    """{release, published_at, previous} of a channel; None if there is no such channel."""
    key = f"channels/{channel}.json"
    if not store.exists(bucket, key):
        return None
    value = store.get_json(bucket, key)
    if not isinstance(value, dict) or not re.fullmatch(r"[0-9a-f]{64}", str(value.get("release"))):
        raise ValueError(f"s3://{bucket}/{key}: names no release; publish to the channel again")
    return value


def channels(store: Store, bucket: str) -> dict[str, str]:
    """Channel → digest of the release it names."""
    names = [entry.key.removeprefix("channels/").removesuffix(".json") for entry in store.list(bucket, "channels")]
    found = {name: read_channel(store, bucket, name) for name in names}
    return {name: value["release"] for name, value in found.items() if value}


def read_manifest(store: Store, bucket: str, digest: str) -> dict[str, Any]:
    """A release's manifest, proved to be the one that the digest names."""
    key = f"releases/{digest}/{MANIFEST}"
    data = store.get(bucket, key)
    if sha256_bytes(data) != digest:
        raise ValueError(
            f"s3://{bucket}/{key}: is corrupted or changed: its SHA-256 is {sha256_bytes(data)}. Do not use this "
            "release; publish it again"
        )
    manifest = json.loads(data)
    assert isinstance(manifest, dict)  # the digest proves that `publish` wrote it
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"s3://{bucket}/{key}: has schema version {manifest['schema_version']}; this MedForge reads 1")
    read_table(manifest["files"], key)
    return manifest


def read_release(store: Store, bucket: str, digest: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and verdict of a release, proved by digest, with every file there in its right size and none beside.

    The bytes of the other files are not read; `fetch_release` proves those.
    """
    manifest = read_manifest(store, bucket, digest)
    prefix = f"releases/{digest}/"
    sizes = {entry.key.removeprefix(prefix): entry.size for entry in store.list(bucket, prefix)}
    listed = {n: size for n, size in sizes.items() if n != MANIFEST and not n.startswith(SIGNATURES)}
    compare_listing(listed, manifest["files"], f"s3://{bucket}/{prefix}")
    data = store.get(bucket, prefix + VERDICT)
    if sha256_bytes(data) != manifest["files"][VERDICT]["sha256"]:
        raise ValueError(f"s3://{bucket}/{prefix}{VERDICT}: is corrupted or changed; do not use this release")
    return manifest, json.loads(data)


def list_releases(store: Store, bucket: str) -> list[dict[str, Any]]:
    """Every release as {release, channels, about, verdict, problem}, those with a channel first, then by name.

    `problem` says why an incomplete or changed release has no verdict; it is "" for a sound one. ValueError if the
    bucket is missing.
    """
    by_release: dict[str, list[str]] = {}
    for channel, digest in channels(store, bucket).items():
        by_release.setdefault(digest, []).append(channel)
    rows = []
    for digest in sorted({*store.folders(bucket, "releases"), *by_release}):
        row: dict[str, Any] = {"release": digest, "channels": sorted(by_release.get(digest, []))}
        if store.exists(bucket, f"releases/{digest}/{MANIFEST}"):
            try:
                manifest, verdict = read_release(store, bucket, digest)
                row |= {"about": manifest["about"], "verdict": verdict, "problem": ""}
            except ValueError as error:  # one changed release must not hide the others
                row |= {"about": {}, "verdict": None, "problem": str(error)}
        else:
            row |= {"about": {}, "verdict": None, "problem": "has no manifest: its upload was interrupted"}
        rows.append(row)
    return sorted(rows, key=lambda row: (not row["channels"], str(row["about"].get("name", "")), row["release"]))


def fetch_release(store: Store, bucket: str, digest: str, target: Path, part: str | None = None) -> dict[str, Any]:
    """Download a release, or only its folder `part` such as `model`, to the folder `target`. Returns the manifest.

    Every file is checked against the manifest, and that against the digest; `target` appears only when it is whole.
    """
    manifest, _ = read_release(store, bucket, digest)
    files: FileTable = manifest["files"]
    prefix = f"releases/{digest}"
    if part is not None:
        files = {name.removeprefix(f"{part}/"): i for name, i in files.items() if name.startswith(f"{part}/")}
        prefix = f"{prefix}/{part}"
        if not files:
            raise ValueError(f"release {digest[:12]} has no folder {part!r}")
    store.download_files(bucket, prefix, files, target)
    return manifest


def copy_release(store: Store, bucket: str, digest: str, target: Path) -> FileTable:
    """Download a release as it stands, with its manifest and what reviewers signed, to the folder `target`.

    Returns the files' table; a signature's own digest is None, as it is proved by its reviewer's key and not by the
    manifest. Every other file is checked as by `fetch_release`.
    """
    manifest, _ = read_release(store, bucket, digest)
    prefix = f"releases/{digest}/"
    sizes = {entry.key.removeprefix(prefix): entry.size for entry in store.list(bucket, prefix)}
    beside = {name: size for name, size in sizes.items() if name == MANIFEST or name.startswith(SIGNATURES)}
    files = manifest["files"] | {
        name: {"sha256": digest if name == MANIFEST else None, "size": size} for name, size in beside.items()
    }
    store.download_files(bucket, prefix, files, target)
    return files


def resolve(store: Store, bucket: str, name: str) -> str:
    """The digest that `name` means: a digest, a prefix of one of 6 characters or more, or a channel.

    ValueError if nothing is meant, or more than one release.
    """
    found = set()
    if re.fullmatch(rf"[0-9a-f]{{{_SHORTEST_PREFIX},64}}", name):
        found = {digest for digest in store.folders(bucket, "releases") if digest.startswith(name)}
    if re.fullmatch(NAME, name) and (channel := read_channel(store, bucket, name)):
        found.add(channel["release"])
    if len(found) > 1:
        raise ValueError(f"{name!r} means more than one release: {', '.join(sorted(found))}; write more of the digest")
    if not found:
        raise ValueError(
            f"no release or channel in bucket {bucket!r} is named {name!r}; `medforge releases` lists them (a digest "
            f"may be cut to {_SHORTEST_PREFIX} characters)"
        )
    return found.pop()
