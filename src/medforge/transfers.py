"""Many files through a few threads, under one bar of bytes; the first error stops them all."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from medforge.progress import Progress

THREADS = 8


def transfer(what: str, sizes: Mapping[str, int], job: Callable[[str, Counter], None]) -> None:
    """Run `job(name, count)` for every name in threads, under one bar of bytes. The first error stops them all."""
    with Progress(what, sum(sizes.values()), "B") as progress, ThreadPoolExecutor(THREADS) as pool:
        count = Counter(progress)
        # The biggest first: no thread is left alone with it at the end.
        names = sorted(sizes, key=lambda name: (-sizes[name], name))
        futures: list[Future[None]] = [pool.submit(job, name, count) for name in names]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            count.stop()
            pool.shutdown(cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Another thread of the transfer failed; its error is the one that is told."""


class Counter:
    """What the threads of a transfer share: the bar, and the word to stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock, self._stopped = progress, threading.Lock(), False

    def __call__(self, count: int) -> None:
        if self._stopped:
            raise _StoppedError
        with self._lock:
            self._progress.advance(count)

    def stop(self) -> None:
        self._stopped = True


class HashingReader:
    """Reads for the SDK, and hashes what it read: the digest is that of the bytes that were sent."""

    def __init__(self, stream: Any, count: Counter) -> None:
        self._stream, self._count, self.digest = stream, count, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.digest.update(data)
        self._count(len(data))
        return data
