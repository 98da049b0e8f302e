"""The audit log's process: rows that wait share a write, failures, kills, signals, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from medforge.audit import AuditLog, verify
from serving.gateway import scribe
from serving.gateway.scribe import Scribe
from tests.unit.gateway.keeping import full_disk

ENTRY = {"request_id": "r-1", "caller": "c-1", "route": "/v1/diagnose", "status": 200}


@asynccontextmanager
async def writing(folder: Path, fsync: bool = False) -> AsyncIterator[Scribe]:
    made = Scribe(folder, fsync)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def pid(of: Scribe) -> int:
    assert of._process is not None
    return of._process.pid


def rows(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("fsync", [True, False])
def test_a_row_is_in_the_file_when_its_write_returns(fsync: bool, tmp_path: Path) -> None:
    async def run() -> None:
        async with writing(tmp_path, fsync) as log:
            for number in range(5):
                await log.write(ENTRY | {"status": 200 + number, "reason": None})
                assert [row["status"] for row in rows(tmp_path)] == [200 + one for one in range(number + 1)]
            assert verify(log.path) == (5, log.head)
            process = Path(f"/proc/{pid(log)}")
            (file,) = (one.name for one in (process / "fd").iterdir() if one.resolve() == log.path)
            flags = (process / "fdinfo" / file).read_text().split("flags:")[1].split()[0]
            assert bool(int(flags, 8) & os.O_DSYNC) == fsync

    asyncio.run(run())
    AuditLog(next(tmp_path.glob("*.jsonl"))).close()  # the process is gone, and its lock with it


def test_rows_that_wait_share_a_write(tmp_path: Path) -> None:
    async def run() -> tuple[int, int]:
        async with writing(tmp_path, fsync=True) as log:
            before = psutil.Process(pid(log)).io_counters().write_count
            await asyncio.gather(*(log.write(ENTRY) for _ in range(500)))
            return psutil.Process(pid(log)).io_counters().write_count - before, len(log._waiting)

    writes, waiting = asyncio.run(run())
    assert verify(tmp_path)[0] == 500 and waiting == 0
    assert writes < 250  # of the log and of what it tells together


def test_what_may_be_health_information_is_not_sent(tmp_path: Path) -> None:
    async def run() -> None:
        async with writing(tmp_path) as log:
            with pytest.raises(ValueError, match="audit: question"):
                await log.write({"question": "Is there a nodule?"})
            await log.write(ENTRY)

    asyncio.run(run())
    assert verify(tmp_path)[0] == 1


def test_a_full_disk_fails_rows_until_there_is_room(tmp_path: Path) -> None:
    async def run() -> None:
        async with writing(tmp_path) as log:
            await log.write(ENTRY)
            with full_disk(log):
                for _ in range(2):
                    with pytest.raises(OSError, match="File too large"):
                        await log.write(ENTRY)
                assert not await log.probe() and log.refused == 2
            assert await log.probe() and log.refused == 0
            assert await log.probe()  # which writes nothing
            await log.write(ENTRY)

    asyncio.run(run())
    assert [(row.get("event"), row.get("refused")) for row in rows(tmp_path)] == [
        (None, None), ("resumed", 2), (None, None),
    ]  # fmt: skip
    assert verify(tmp_path)[0] == 3


def test_a_caller_that_hangs_up_does_not_undo_its_row(tmp_path: Path) -> None:
    async def run() -> None:
        async with writing(tmp_path) as log:
            os.kill(pid(log), signal.SIGSTOP)
            task = asyncio.create_task(log.write(ENTRY))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            os.kill(pid(log), signal.SIGCONT)
            await log.write(ENTRY)
            assert log.refused == 0

    asyncio.run(run())
    assert [row["seq"] for row in rows(tmp_path)] == [1, 2]


def test_a_process_that_is_killed_fails_what_waits_and_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with writing(tmp_path) as log:
            await log.write(ENTRY)
            os.kill(pid(log), signal.SIGSTOP)
            waiting = [asyncio.create_task(log.write(ENTRY)) for _ in range(3)]
            await asyncio.sleep(0.05)
            os.kill(pid(log), signal.SIGKILL)
            failed = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(one, OSError) and "has ended" in str(one) for one in failed)
            with pytest.raises(OSError, match="another is started in a moment"):
                await log.write(ENTRY)
            assert log.refused == 4
            monkeypatch.setattr(scribe, "_APART", 0.0)
            first = log.path
            await asyncio.gather(*(log.write(ENTRY) for _ in range(3)))
            assert (log.refused, log.path) == (0, first)

    asyncio.run(run())
    assert verify(tmp_path)[0] == 4


def test_a_process_that_ends_right_after_its_first_word_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Scribe.data_received

    def lose(log: Scribe, data: bytes) -> None:
        real(log, data)
        log.connection_lost(None)  # before `start` goes on

    async def run() -> None:
        log = Scribe(tmp_path, fsync=False)
        with monkeypatch.context() as patch:
            patch.setattr(Scribe, "data_received", lose)
            await log.start()
        assert log._opened is not None
        log._opened.close()
        monkeypatch.setattr(scribe, "_APART", 0.0)
        await asyncio.wait_for(log.write(ENTRY), 15)
        await log.close()

    asyncio.run(run())
    assert verify(tmp_path)[0] == 1


def test_a_caller_that_hangs_up_while_it_is_started_again_disturbs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scribe, "_APART", 0.0)

    async def run() -> None:
        async with writing(tmp_path) as log:
            os.kill(pid(log), signal.SIGKILL)
            while log._transport is not None:
                await asyncio.sleep(0.01)
            first = asyncio.create_task(log.write(ENTRY))
            await asyncio.sleep(0.03)
            first.cancel()
            began = time.monotonic()
            await log.write(ENTRY)
            assert time.monotonic() - began < scribe._STOP_SECONDS  # nobody waited for the new process's end
            assert log.refused == 0

    asyncio.run(run())
    assert verify(tmp_path)[0] == 1


def test_signals_do_not_end_it_while_the_gateway_lives(tmp_path: Path) -> None:
    async def run() -> None:
        async with writing(tmp_path) as log:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid(log), number)
            await log.write(ENTRY)

    asyncio.run(run())
    assert verify(tmp_path)[0] == 1


def test_closing_writes_what_was_sent(tmp_path: Path) -> None:
    async def run() -> None:
        log = Scribe(tmp_path, fsync=False)
        await log.start()
        os.kill(pid(log), signal.SIGSTOP)
        tasks = [asyncio.create_task(log.write(ENTRY)) for _ in range(200)]
        await asyncio.sleep(0.05)
        os.kill(pid(log), signal.SIGCONT)
        await log.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(OSError, match="closed"):
            await log.write(ENTRY)
        await log.close()

    asyncio.run(run())
    assert verify(tmp_path)[0] == 200


def test_it_ends_with_a_gateway_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom serving.gateway.scribe import Scribe\n"
        "async def main():\n"
        "    log = Scribe(Path(sys.argv[1]), False)\n    await log.start()\n"
        "    await log.write({'status': 200})\n    print(log._process.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    ) as process:
        assert process.stdout
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    child.wait(10)
    assert verify(tmp_path)[0] == 1


@pytest.mark.parametrize("how", ["in use", "changed"])
def test_a_log_that_cannot_be_gone_on_with_is_not_started(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = AuditLog(path)
    log.append(ENTRY)
    if how == "changed":
        log.close()
        path.write_bytes(path.read_bytes().replace(b'"status":200', b'"status":500'))

    async def run() -> None:
        made = Scribe(path, fsync=False)
        began = time.monotonic()
        with pytest.raises(ValueError, match="another process writes" if how == "in use" else "last row was changed"):
            await made.start()
        await made.close()
        assert time.monotonic() - began < 5

    asyncio.run(run())
    log.close()


def test_a_program_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def run() -> None:
        made = Scribe(tmp_path, fsync=False)
        with pytest.raises(ValueError, match="does not start"):
            await made.start()
        await made.close()

    asyncio.run(run())
