"""The audit log: its chain against an independent computation, every kind of tampering, crashes, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from medforge import audit
from medforge.audit import AuditLog, verify, verify_files
from medforge.cli import main
from medforge.commands import GROUPS
from medforge.commands import audit as command

ENTRY = {"request_id": "r-1", "caller": "c-1", "route": "/v1/diagnose", "status": 200, "decision": "answered"}


def ticking() -> Callable[[], datetime]:
    start = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    ticks = iter(range(10**9))
    return lambda: start + timedelta(seconds=next(ticks))


def write(path: Path, count: int = 5) -> list[str]:
    log = AuditLog(path, clock=ticking())
    try:
        return [log.append(ENTRY | {"status": 200 + number}) for number in range(count)]
    finally:
        log.close()


def by_hand(row: dict[str, Any]) -> str:
    """The hash of a row as the module's documentation has it."""
    body = {name: value for name, value in row.items() if name != "hash"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_each_row_holds_the_hash_of_the_one_before(tmp_path: Path) -> None:
    hashes = write(tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["prev"] for row in rows] == ["0" * 64, *hashes[:-1]]
    assert [row["hash"] for row in rows] == hashes == [by_hand(row) for row in rows]
    assert rows[0]["at"] == "2026-01-02T03:04:05.000+00:00"
    assert {name: rows[2][name] for name in ENTRY} == ENTRY | {"status": 202}
    assert verify(tmp_path / "a.jsonl") == (5, hashes[-1])
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o600


def rehashed(line: str, **changes: Any) -> str:
    row = json.loads(line) | changes
    row["hash"] = by_hand(row)
    return json.dumps(row, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (lambda rows: [*rows[:2], rows[2].replace('"status":202', '"status":500'), *rows[3:]], 3),
        (lambda rows: [*rows[:2], rehashed(rows[2], status=500), *rows[3:]], 4),
        (lambda rows: [*rows[:2], *rows[3:]], 3),
        (lambda rows: rows[1:], 1),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], 2),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 4),
        (lambda rows: [*rows[:3], rehashed(rows[2], seq=4), *rows[3:]], 4),
        (lambda rows: [*rows[:2], rows[2].replace(",", ", "), *rows[3:]], 3),
        (lambda rows: [*rows[:2], "garbage", *rows[3:]], 3),
        (lambda rows: [*rows[:2], "", *rows[2:]], 3),
        (lambda rows: [*rows[:2], "[]", *rows[2:]], 3),
        (lambda rows: [*rows[:4], rows[4][:-20]], 5),
        (lambda rows: [*rows, rehashed(rows[0], seq=6)], 6),
        (lambda rows: [*rows[:4], rehashed(rows[4], seq=7)], 5),
    ],
    ids=["changed", "changed and hashed anew", "removed", "first removed", "swapped", "twice", "put in", "white space",
         "garbage", "empty line", "other JSON", "torn end", "added", "renumbered"],
)  # fmt: skip
def test_tampering_is_found_where_it_is(tamper: Callable[[list[str]], list[str]], line: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl: line {line}: "):
        verify(path)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    hashes = write(path, 3)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="line"):
            verify(path, hashes[-1])


def test_a_cut_off_tail_is_found_by_a_head_that_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    hashes = write(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert verify(path) == (3, hashes[2])  # a shorter chain is a whole one
    assert verify(path, hashes[1]) == (3, hashes[2])
    with pytest.raises(ValueError, match="rows at the end"):
        verify(path, hashes[4])


def test_a_restart_goes_on_with_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = write(path, 2), write(path, 3)
    assert verify(path, first[1]) == (5, second[-1])
    assert AuditLog(path).head == second[-1]


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="another process writes"):
        AuditLog(tmp_path / "a.jsonl")
    log.close()
    AuditLog(tmp_path / "a.jsonl").close()


def test_writers_of_a_folder_take_files_of_their_own_and_find_them_again(tmp_path: Path) -> None:
    one, two = AuditLog(tmp_path / "log"), AuditLog(tmp_path / "log")
    assert one.path != two.path
    one.append(ENTRY)
    one.close()
    again = AuditLog(tmp_path / "log")
    assert again.path == one.path
    last = again.append(ENTRY)
    head = two.append(ENTRY)
    for log in (two, again):
        log.close()
    assert verify(tmp_path / "log", last)[0] == verify(tmp_path / "log", head)[0] == 3
    one.path.unlink()
    with pytest.raises(ValueError, match="removed"):
        verify(tmp_path / "log", last)


@pytest.mark.parametrize("kept", [1, 40, -1], ids=["a byte", "a part", "all but the new line"])
def test_what_a_crash_tore_off_is_told_and_stays(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    hashes = write(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:kept]
    path.write_bytes(b"".join(lines[:2]) + torn)
    if kept != -1:
        with pytest.raises(ValueError, match="line 3"):
            verify(path)
    log = AuditLog(path, clock=ticking())
    log.append(ENTRY)
    log.close()
    assert path.read_bytes().startswith(b"".join(lines[:2]) + torn)
    (chain,) = verify_files(path)
    if kept == -1:  # the row was whole
        assert (chain.rows, chain.truncated) == (4, 0)
        assert verify(path, hashes[2])
        return
    assert (chain.rows, chain.truncated) == (4, 1)
    note = json.loads(path.read_bytes().splitlines()[3])
    assert (note["event"], note["bytes"]) == ("truncated", len(torn))
    assert note["sha256"] == hashlib.sha256(torn).hexdigest()
    # the torn bytes are under the chain's protection from now on
    data = path.read_bytes()
    path.write_bytes(data.replace(torn + b"\n", b"x" + torn[1:] + b"\n" if len(torn) > 1 else b"y\n"))
    with pytest.raises(ValueError, match="line 3"):
        verify(path)


def test_a_crash_while_a_crash_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 2)
    path.write_bytes(path.read_bytes() + b'{"at":"2026')
    AuditLog(path).close()
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"2026\n"), -7):
        path.write_bytes(whole[:cut])
        log = AuditLog(path)
        log.append(ENTRY)
        log.close()
        (chain,) = verify_files(path)
        assert chain.rows >= 4 and chain.truncated == 1


def test_a_log_whose_last_row_was_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 3)
    path.write_bytes(path.read_bytes().replace(b'"status":202', b'"status":500'))
    with pytest.raises(ValueError, match="last row was changed"):
        AuditLog(path)
    with pytest.raises(ValueError, match="last row was changed"):  # and the lock was given back
        AuditLog(path)


@pytest.mark.parametrize("fsync", [True, False])
def test_rows_are_on_the_disk_when_their_write_returns(fsync: bool, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.jsonl", fsync)
    flags = Path(f"/proc/self/fdinfo/{log._file}").read_text().split("flags:")[1].split()[0]
    assert bool(int(flags, 8) & os.O_DSYNC) == fsync
    log.close()


def test_a_full_disk_fails_the_row_and_leaves_a_whole_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    log = AuditLog(path)
    before = log.append(ENTRY)
    real = os.write

    def full(file: int, data: Any) -> int:
        if len(data) > 30:
            return real(file, bytes(data)[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "write", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.append(ENTRY)
    assert verify(path) == (1, before)
    after = log.append(ENTRY)
    log.close()
    assert verify(path) == (2, after)


def test_a_real_limit_of_the_files_size_fails_rows_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom medforge.audit import AuditLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "log = AuditLog(Path(sys.argv[1]))\nkept = failed = 0\n"
        "for _ in range(20):\n"
        "    try:\n        log.append({'status': 200})\n        kept += 1\n"
        "    except OSError:\n        failed += 1\n"
        "log.close()\nprint(kept, failed)\n"
    )
    path = tmp_path / "a.jsonl"
    told = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    kept, failed = map(int, told.stdout.split())
    assert kept > 0 and failed > 0 and kept + failed == 20
    assert verify(path)[0] == kept


def test_every_row_that_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom medforge.audit import AuditLog\n"
        "log = AuditLog(Path(sys.argv[1]))\n"
        "while True:\n    print(log.append({'status': 200}), flush=True)\n"
    )
    path = tmp_path / "a.jsonl"
    acknowledged: list[str] = []
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            acknowledged += [process.stdout.readline().strip() for _ in range(50)]
            process.send_signal(signal.SIGKILL)
    AuditLog(path).close()
    verify(path)
    found = {json.loads(line)["hash"] for line in path.read_text().splitlines() if line.endswith("}")}
    assert set(acknowledged) <= found and len(acknowledged) == 150


@pytest.mark.parametrize("how", ["removed", "cut", "grown"])
def test_a_file_that_is_changed_under_its_writer_is_not_written_on(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    log = AuditLog(path)
    log.append(ENTRY)
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, 10)
    else:
        with path.open("ab") as stream:
            stream.write(b"x\n")
    with pytest.raises(OSError, match="under its writer"):
        log.append(ENTRY)
    log.close()


@pytest.mark.parametrize(
    "entry",
    [
        {"question": "Is there a nodule?"},
        {"reason": "the patient Jane Doe"},
        {"caller": "x" * 201},
        {"status": 200.5},
        {"status": True},
        {"inputs": ["a"]},
        {"route": ""},
        {"hash": "0" * 64},
    ],
)
def test_what_may_be_health_information_is_not_taken(entry: dict[str, Any], tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="audit: ") as told:
        log.append(entry)
    assert "Jane" not in str(told.value)
    log.append({"status": 200, "reason": None})
    log.close()
    assert verify(tmp_path / "a.jsonl")[0] == 1
    with pytest.raises(OSError, match="closed"):
        log.append({"status": 200})


def test_only_audit_logs_are_verified(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no audit log"):
        verify(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    assert verify(tmp_path) == (0, "0" * 64)


def test_the_command_tells_heads_and_the_first_break(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command not in GROUPS:
        monkeypatch.setattr("medforge.cli.GROUPS", (command,))
    path = tmp_path / "audit-host-0.jsonl"
    hashes = write(path)
    assert main(["audit", "verify", str(tmp_path), "--head", hashes[0]]) == 0
    told = capsys.readouterr().out
    assert "5 rows, 2026-01-02T03:04:05.000+00:00 to 2026-01-02T03:04:09.000+00:00" in told and hashes[-1] in told
    assert main(["audit", "verify", str(path), "--head", "f" * 64]) == 1
    path.write_text(path.read_text().replace('"status":203', '"status":403'))
    assert main(["audit", "verify", str(path)]) == 1
    assert f"{path}: line 4" in capsys.readouterr().err
