"""A checkpoint on the disk: a folder that is whole or absent, and that tells when a byte of it is not what was written.

`step-00000120` holds safetensors files, `state.json` and `manifest.json`, which names the step, whether it was the
best, and the size and SHA-256 of every other file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.files import canonical_json, sha256_file
from medforge.storage import read_table

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was whole when it was found. Later calls of `save` may prune its folder."""

    step: int
    folder: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, that were saved as the group `name`; ValueError if there is no such group."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors"))) or "none"
            raise ValueError(f"{self.folder}: has no tensors {name!r}; there are: {there}")
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors


def folder_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def folder_step(name: str) -> int | None:
    """The step that a folder is named for, or None."""
    digits = name.removeprefix("step-")
    return int(digits) if re.fullmatch(r"[0-9]+", digits) and folder_name(int(digits)) == name else None


def manifest_of(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of the checkpoint in `folder`; ValueError if it is missing, or not that of `step`."""
    try:
        return read_manifest((folder / MANIFEST).read_bytes(), str(folder), step)
    except FileNotFoundError:
        raise ValueError(f"is half-written or half-deleted: it has no {MANIFEST}") from None


def read_manifest(data: bytes, where: str, step: int) -> dict[str, Any]:
    """The manifest in `data`; ValueError if it is not that of the checkpoint of `step`."""
    try:
        value = json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is corrupted: {error}") from None
    if not isinstance(value, dict) or set(value) != {"schema_version", "step", "best", "files"}:
        raise ValueError(f"{MANIFEST} is corrupted: it has other fields than a checkpoint's")
    if (value["schema_version"], value["step"]) != (1, step) or not isinstance(value["best"], bool):
        raise ValueError(f"{MANIFEST} is corrupted: it is not that of step {step} in schema version 1")
    names = set(read_table(value["files"], f"{where}/{MANIFEST}"))
    if STATE not in names or MANIFEST in names or any("/" in name for name in names):
        raise ValueError(f"{MANIFEST} is corrupted: it does not name the files of a checkpoint")
    return value


def check_files(folder: Path, manifest: Mapping[str, Any], digests: bool) -> None:
    """Raise ValueError unless the folder holds the manifest's files, of the right sizes and, on demand, digests."""
    for name, info in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"is half-deleted: {name} is missing")
        if (size := path.stat().st_size) != info["size"]:
            raise ValueError(f"{name} is corrupted: it has {size} bytes, the manifest says {info['size']}")
        if digests and sha256_file(path) != info["sha256"]:
            raise ValueError(f"{name} is corrupted: its SHA-256 is not the manifest's")


def write_files(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: bytes, best: bool
) -> None:
    """Fill an empty folder with the files of a checkpoint, the manifest last. OSError if the disk is full."""
    for group, values in tensors.items():
        _write_tensors(folder / f"{group}.safetensors", values)
    (folder / STATE).write_bytes(state)
    files = {path.name: {"sha256": sha256_file(path), "size": path.stat().st_size} for path in folder.iterdir()}
    manifest = {"schema_version": 1, "step": step, "best": best, "files": files}
    (folder / MANIFEST).write_bytes(canonical_json(manifest))


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # Rust's words for what Python calls OSError
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    path.chmod(0o644)  # safetensors makes 0600


def install(work: Path, target: Path) -> None:
    """Rename a filled folder to `target` when all of it is on the disk. At every moment one of the two is whole."""
    for path in [*work.iterdir(), work]:
        _sync(path)
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(work, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
