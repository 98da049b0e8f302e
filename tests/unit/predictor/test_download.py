"""The download of a release runs apart: with the system's own SIGTERM, and ended with all that it started."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.predictor.loading import _download


@pytest.fixture
def downloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in the place of kserve_storage; tests write its `Storage.download(uri, folder)`."""
    folder = tmp_path / "lib"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "kserve_storage.py"


def write(path: Path, body: str) -> None:
    head = "import os, signal, sys, time\nclass Storage:\n    @staticmethod\n    def download(uri, folder):\n"
    path.write_text(head + textwrap.indent(textwrap.dedent(body).strip(), "        ") + "\n")


@pytest.fixture
def left() -> Iterator[object]:
    """The predictor's own handler: SIGTERM leaves by an exception, so that what is written is removed."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    yield leave
    signal.signal(signal.SIGTERM, before)


def test_its_process_has_no_handler_of_sigterm(downloader: Path, left: object, tmp_path: Path) -> None:
    """multiprocessing's pool ends its children by SIGTERM; one with a handler in Python may sleep through it."""
    write(downloader, "open(f'{folder}/told', 'w').write(f'{uri} {signal.getsignal(signal.SIGTERM)!r}')")
    folder = _download("s3://med/releases/abc", tmp_path)
    assert (folder / "told").read_text() == f"s3://med/releases/abc/ {signal.SIG_DFL!r}"


def test_it_is_ended_with_its_children(downloader: Path, left: object, tmp_path: Path) -> None:
    write(
        downloader,
        """
        child = os.fork()
        if child: open(f'{folder}/../children', 'w').write(f'{os.getpid()} {child}')
        time.sleep(60)
        """,
    )

    def end() -> None:
        while not (tmp_path / "children").exists() or not (tmp_path / "children").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit):
        _download("s3://med/releases/abc", tmp_path)
    family = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in family):
        assert time.monotonic() < deadline, family
        time.sleep(0.05)


def test_what_failed_is_told_in_one_line(downloader: Path, tmp_path: Path) -> None:
    write(downloader, "raise RuntimeError('Failed to fetch model.\\n No model found in releases/abc/.')")
    with pytest.raises(ValueError, match=r"cannot be downloaded: .*No model found.*check AWS_ENDPOINT_URL"):
        _download("s3://med/x", tmp_path)
    write(downloader, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ValueError, match="cannot be downloaded: ended with -9"):
        _download("s3://med/x", tmp_path)
