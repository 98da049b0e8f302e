"""The trials' own parts: the locked command line, layers, the storage that one run has to itself."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from images import check, containers, standin
from images.build import NAMES


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """podman and buildah that do as little as can be, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("podman", "buildah"):
        program(folder, name, "exit 0")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("CONTAINERS_STORAGE_CONF", "CONTAINERS_CONF", "TMPDIR"):
        monkeypatch.setenv(name, "")  # so that they are as before afterwards
    return folder


def test_a_container_is_locked_as_the_chart_locks_it() -> None:
    line = containers.locked("i:1", ["go"], "--env=A=b")
    joined = " ".join(line)
    for words in ("--read-only --read-only-tmpfs=false", "--cap-drop ALL", "--security-opt no-new-privileges"):
        assert words in joined
    assert line[-3:] == ["--rm", "i:1", "go"]
    assert containers.locked("i:1", [], detach="n")[-4:] == ["--detach", "--name", "n", "i:1"]


def test_layers_are_told_by_what_made_them_the_largest_first() -> None:
    told = [
        {"CreatedBy": "/bin/sh -c #(nop) USER 10001:10001", "size": 0},
        {"CreatedBy": f"/bin/sh -c #(nop) COPY dir:{'0f' * 32} in /app ", "size": 2_000_000},
        {"CreatedBy": f"/bin/sh -c #(nop) COPY dir:{'1f' * 32} in /opt/venv ", "size": 425_807_872},
        {"CreatedBy": f"/bin/sh -c #(nop) ADD file:{'2f' * 32} in /", "size": 198_993_920},
    ]
    assert list(containers.layers(told).items()) == [("COPY /opt/venv", 425.8), ("ADD /", 199.0), ("COPY /app", 2.0)]


def test_a_command_that_ends_otherwise_is_told_with_its_last_words(engines: Path) -> None:
    program(engines, "podman", "echo the reason >&2; exit 3")
    with pytest.raises(containers.TrialError, match=r"i:1: go on ended with 3 instead of 0:\nthe reason"):
        containers.run("i:1", "go", "on")
    assert containers.run("i:1", "go", code=3) == "the reason\n"


def test_the_storage_is_one_runs_alone_and_begins_empty(tmp_path: Path, engines: Path) -> None:
    scratch = tmp_path / "scratch"
    for leftover in ("work/rootfs/etc", "run/libpod"):
        (scratch / leftover).mkdir(parents=True)
    with standin.storage(scratch) as work:
        assert not list(work.iterdir()) and not list((scratch / "run").iterdir())
        assert f'graphroot = "{scratch}/graph"' in Path(os.environ["CONTAINERS_STORAGE_CONF"]).read_text()
        with pytest.raises(ValueError, match="another run is there"), standin.storage(scratch):
            pass
    assert not work.exists()
    with standin.storage(scratch):
        pass


def test_a_full_disk_is_told_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(standin.shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**9))
    with pytest.raises(ValueError, match=r"3\.0 GB are free and \d+ are needed; make room"):
        standin.require_space(tmp_path)


def test_each_image_has_its_trials() -> None:
    assert set(check.ABSENT) == set(check.MODULES) == set(check.COMMANDS) == set(NAMES)
    assert "torch" in check.ABSENT["gateway"] and "torch" in check.ABSENT["data"]


def test_an_answer_that_is_awaited_in_vain_is_told() -> None:
    clock = time.monotonic()
    with pytest.raises(containers.TrialError, match="not within 1 s"):
        check.wait(lambda: False, 1.0)
    assert time.monotonic() - clock < 5
    assert check.ask(f"http://127.0.0.1:{check.free_port()}/") == (0, None)
