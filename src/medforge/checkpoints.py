"""Checkpoints that survive: a kill at any moment, a full disk, bad bytes, and the loss of the disk itself.

A checkpoint is a folder (checkpoint_files) that is written under a temporary name, synced and renamed, so that it is
whole or absent; every read checks it against its manifest. With a `url`, each is also sent to the object store by a
thread of its own, its manifest last: an object folder without one is half-uploaded and passed over.

The folder and the url belong to one run alone: whatever stands there as `step-…` is pruned. One process writes (rank
0); the others only read (`fetch=False`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.checkpoint_files import (
    MANIFEST,
    STATE,
    Checkpoint,
    check_files,
    folder_name,
    folder_step,
    install,
    manifest_of,
    read_manifest,
    write_files,
)
from medforge.files import canonical_json, sha256_bytes
from medforge.storage import Store, connect, parse_url

if TYPE_CHECKING:
    import torch

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAITING = 2  # checkpoints that wait for the one under way; with a third the oldest is dropped
_PAUSES = (1.0, 4.0, 15.0, 60.0)  # seconds before an upload is tried again

Fits = Callable[[Mapping[str, Any]], bool]


def _always(_: Mapping[str, Any]) -> bool:
    return True


class Checkpoints:
    """The newest `keep` checkpoints of a run and its best one, in `folder` and, with `url`, in the object store."""

    def __init__(self, folder: Path, keep: int = 2, url: str | None = None, log: Callable[[str], None] = print) -> None:
        """Nothing is read or written yet. `url` is ``s3://bucket/prefix``; ValueError if it is not, or if keep < 1."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint has to be kept")
        self.folder, self.keep, self._log = folder, keep, log
        self._url = url.rstrip("/") if url else None
        bucket, prefix = parse_url(url) if url else ("", "")
        self._bucket, self._prefix = bucket, prefix + "/" if prefix else ""
        self._fits: Fits = _always
        self._bad_here: set[int] = set()  # steps that were skipped: pruned after the next success, not counted
        self._bad_there: set[int] = set()
        # What follows is shared with the thread that uploads, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._waiting: list[int] = []
        self._sending: int | None = None
        self._unsent: set[int] = set()
        self._best: int | None = None
        self._closed = False

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        state: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> bool:
        """Write the checkpoint of `step` and leave its upload to the thread; then prune what is no longer kept.

        Each group of `tensors` becomes `<group>.safetensors`, `state` (JSON: keys are strings) `state.json`. With
        `best` it is the best so far, and is kept until a later one is. Returns False, having said so, when the disk
        is full; all earlier checkpoints then stand as they were. Other errors raise; ValueError if `state` holds a
        NaN or an infinity.
        """
        assert step >= 0
        assert not self._closed, "save after close"
        target = self.folder / folder_name(step)
        for group in tensors:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", group):
                raise ValueError(f"{target}: {group!r} cannot name a file; use letters, digits, _ and -")
        try:
            told = canonical_json(dict(state))
        except ValueError as error:
            raise ValueError(f"{target / STATE}: {error}; write null for a figure that is not known") from None
        need = len(told) + sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        work = self.folder / f".{target.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            work.mkdir()
            write_files(work, step, tensors, told, best)
            install(work, target)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError) or error.errno not in _FULL:
                raise
            self._log(
                f"checkpoint of step {step} NOT saved: {error.strerror}: it needs {_size(need)}, the file system of "
                f"{self.folder} has {_size(_room(self.folder))} left; earlier checkpoints are untouched"
            )
            return False
        self._bad_here.discard(step)
        with self._changed:  # the thread begins when it is known which is the best
            if self._url:
                self._enqueue(step)
            self._prune(step)
        return True

    def latest(self, fits: Fits = _always, fetch: bool = True) -> Checkpoint | None:
        """The newest checkpoint that is whole and whose state `fits`; None if there is none.

        A newer one in the store than on the disk is fetched into the folder. One that is corrupt, half-written,
        half-deleted or half-uploaded, or that does not fit (`fits` returns False, or raises ValueError with the
        reason), is skipped for the one before, and said; it is pruned after the next success. With `fetch=False`
        nothing is written and the store is not asked.

        Raises ValueError (or OSError, for a full disk) when the disk has none and the store cannot be asked: to begin
        anew then would throw away what it holds.
        """
        self._fits = fits
        return self._find(best=False, fetch=fetch)

    def best(self, fetch: bool = True) -> Checkpoint | None:
        """The newest checkpoint that was saved as the best, found as `latest` finds its own, by the same `fits`."""
        return self._find(best=True, fetch=fetch)

    def close(self, seconds: float = 60.0) -> None:
        """Wait up to `seconds` for the uploads, end their thread, and say what was not uploaded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._sending is None, seconds)
            self._stop.set()
            self._waiting.clear()
            unsent = sorted(self._unsent)
            self._unsent.clear()
        if self._thread:
            self._thread.join(1.0)  # longer only where it waits for the network; it is a daemon
        if unsent:
            steps = ", ".join(str(step) for step in unsent)
            self._log(f"not uploaded to {self._url}: the checkpoint of step {steps}; see {self.folder}")

    # on the disk

    def _find(self, best: bool, fetch: bool) -> Checkpoint | None:
        if fetch:
            self._sweep()
        here: Checkpoint | None = None
        for step, folder in sorted(self._folders().items(), reverse=True):
            try:
                manifest = manifest_of(folder, step)
                if manifest["best"] or not best:
                    here = self._open(folder, manifest)
                    self._bad_here.discard(step)
                    break
            except (OSError, ValueError) as error:
                self._bad_here.add(step)
                self._log(f"checkpoint {folder} skipped: {error}")
        if not fetch or not self._url:
            return here
        try:
            with connect() as store:
                return self._fetch(store, here, best)
        except (OSError, ValueError) as error:
            if here is None:
                self._log(f"{self.folder} has no checkpoint to go on from, and {self._url} cannot be used")
                raise
            self._log(f"going on from {here.folder}, though {self._url} may have a newer checkpoint: {error}")
            return here

    def _open(self, folder: Path, manifest: Mapping[str, Any]) -> Checkpoint:
        check_files(folder, manifest, digests=True)
        state = json.loads((folder / STATE).read_bytes())
        if not self._fits(state):
            raise ValueError("its state does not fit this run")
        return Checkpoint(manifest["step"], folder, state)

    def _folders(self) -> dict[int, Path]:
        """The folders that may be checkpoints, by step. An `.old` one is that step's when a kill left it alone."""
        found: dict[int, Path] = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                step = folder_step(path.name.removesuffix(".old"))
                if step is not None and path.is_dir():
                    found.setdefault(step, path)
        return found

    def _sweep(self) -> None:
        """Remove what killed writers and pruners left; give a folder that was about to be replaced its name back."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("step-*.old"):
            if path.with_suffix("").is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.replace(path, path.with_suffix(""))

    def _prune(self, saved: int) -> None:
        """Remove all but the newest `keep` whole ones, the best, the one just saved, and those still to be sent."""
        folders, whole = self._folders(), {}
        for step in set(folders) - self._bad_here:
            with suppress(OSError, ValueError):
                manifest = manifest_of(folders[step], step)
                check_files(folders[step], manifest, digests=False)
                whole[step] = manifest["best"]
        best = max((step for step, is_best in whole.items() if is_best), default=None)
        doomed = []
        with self._changed:  # so that nothing is taken up for sending meanwhile
            self._best = best
            kept = {*sorted(whole)[-self.keep :], saved, best, self._sending, *self._waiting}
            for step in set(folders) - kept:
                gone = self.folder / f".{folder_name(step)}.pruned"
                try:
                    os.replace(folders[step], gone)  # at once, so that no half of it bears its name
                except OSError as error:
                    self._log(f"checkpoint {folders[step]} cannot be removed: {error}")
                else:
                    doomed.append(gone)
                    self._bad_here.discard(step)
                    self._unsent.discard(step)
        for gone in doomed:
            shutil.rmtree(gone, ignore_errors=True)

    # in the store

    def _fetch(self, store: Store, here: Checkpoint | None, best: bool) -> Checkpoint | None:
        """`here`, or the newest checkpoint in the store that is newer, after it was fetched."""
        there = self._listing(store)
        for step in sorted(there, reverse=True):
            if here and step <= here.step:
                break
            if MANIFEST not in there[step]:
                self._log(f"checkpoint {self._url}/{folder_name(step)} skipped: is half-uploaded: it has no {MANIFEST}")
                continue
            try:
                found = self._download(store, step, best)
            except ValueError as error:
                self._listing(store)  # raises where it is the store that fails and not this checkpoint
                self._bad_there.add(step)
                self._log(f"checkpoint {self._url}/{folder_name(step)} skipped: {error}")
                continue
            if found:
                return found
        if here and not best and not self._closed and MANIFEST not in there.get(here.step, ()):
            self._enqueue(here.step)  # the run was killed before it was sent
        return here

    def _download(self, store: Store, step: int, best: bool) -> Checkpoint | None:
        """Fetch a checkpoint into the folder, each byte checked; None where the `best` is sought and this is not."""
        key = self._prefix + folder_name(step)
        data = store.get(self._bucket, f"{key}/{MANIFEST}")
        manifest = read_manifest(data, f"{self._url}/{folder_name(step)}", step)
        if best and not manifest["best"]:
            return None
        state = store.get(self._bucket, f"{key}/{STATE}")
        if sha256_bytes(state) != manifest["files"][STATE]["sha256"]:
            raise ValueError(f"{STATE} is corrupted: its SHA-256 is not the manifest's")
        if not self._fits(json.loads(state)):  # asked before gigabytes are fetched
            raise ValueError("its state does not fit this run")
        target = self.folder / folder_name(step)
        work = self.folder / f".{target.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            store.download_files(self._bucket, key, manifest["files"], work / "files")
            (work / "files" / MANIFEST).write_bytes(data)
            install(work / "files", target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self._bad_here.discard(step)
        self._log(f"fetched checkpoint {self._url}/{target.name}")
        return Checkpoint(step, target, json.loads(state))

    def _listing(self, store: Store) -> dict[int, set[str]]:
        """The names of the objects of each step."""
        found: dict[int, set[str]] = {}
        if store.has_bucket(self._bucket):
            for entry in store.list(self._bucket, self._prefix):
                folder, _, name = entry.key[len(self._prefix) :].partition("/")
                step = folder_step(folder)
                if step is not None and name:
                    found.setdefault(step, set()).add(name)
        return found

    def _enqueue(self, step: int) -> None:
        dropped = None
        with self._changed:
            self._waiting = [*(waiting for waiting in self._waiting if waiting != step), step]
            self._unsent.add(step)
            if len(self._waiting) > _WAITING:
                dropped = self._waiting.pop(0)
                self._unsent.discard(dropped)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="checkpoint upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if dropped is not None:
            self._log(f"checkpoint of step {dropped} is not uploaded: uploads are slow, and newer ones are waiting")

    def _send_all(self) -> None:
        """The thread: sends what waits, in order, until it is closed and nothing waits."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._sending = step = self._waiting.pop(0)
            sent = self._try_to_send(step)
            with self._changed:
                self._sending = None
                if sent and step not in self._waiting:
                    self._unsent.discard(step)
                self._changed.notify_all()

    def _try_to_send(self, step: int) -> bool:
        for pause in (*_PAUSES, None):
            try:
                with connect() as store:
                    self._send(store, step)
                    self._tidy(store, step)
                return True
            except Exception as error:  # whatever it is, training goes on
                if pause is None:
                    self._log(f"checkpoint of step {step} is not uploaded to {self._url} after several tries: {error}")
                if pause is None or self._stop.wait(pause):
                    break
        return False

    def _send(self, store: Store, step: int) -> None:
        """Upload one checkpoint, its manifest last; ValueError if a file is no longer what the manifest says."""
        folder, key = self.folder / folder_name(step), self._prefix + folder_name(step)
        data = (folder / MANIFEST).read_bytes()
        store.ensure_bucket(self._bucket)
        if store.exists(self._bucket, f"{key}/{MANIFEST}"):  # of another run of the step: it must not vouch for this
            store.remove(self._bucket, f"{key}/{MANIFEST}")
        for name, info in read_manifest(data, str(folder), step)["files"].items():
            # not `upload_files`: its pool of threads cannot be stopped, and would hold the process at its end
            sent = store.send(folder / name, self._bucket, f"{key}/{name}", self._count)  # type: ignore[arg-type]
            if sent != info:
                raise ValueError(f"{folder / name}: is corrupted: its SHA-256 is not the manifest's")
        store.put(self._bucket, f"{key}/{MANIFEST}", data)
        self._bad_there.discard(step)

    def _count(self, _: int) -> None:
        if self._stop.is_set():
            raise InterruptedError("the checkpoints were closed")

    def _tidy(self, store: Store, sent: int) -> None:
        """Prune the store as the disk is pruned, and send the best if it is not there (it was dropped, or failed)."""
        try:
            there, whole = self._listing(store), {}
            for step in [step for step in there if MANIFEST in there[step] and step not in self._bad_there]:
                data = store.get(self._bucket, f"{self._prefix}{folder_name(step)}/{MANIFEST}")
                with suppress(ValueError):
                    whole[step] = read_manifest(data, "", step)["best"]
            best = max((step for step, is_best in whole.items() if is_best), default=-1)
            for step in sorted(set(there) - {*sorted(whole)[-self.keep :], sent, best}):
                for name in sorted(there[step], key=lambda name: (name != MANIFEST, name)):
                    store.remove(self._bucket, f"{self._prefix}{folder_name(step)}/{name}")
                self._bad_there.discard(step)
        except Exception as error:  # the upload itself has succeeded
            self._log(f"old checkpoints below {self._url} could not be removed, the next upload tries again: {error}")
            return
        with self._changed:
            if self._best is not None and self._best > best and not self._waiting and not self._stop.is_set():
                self._waiting.append(self._best)
                self._unsent.add(self._best)


def _room(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
