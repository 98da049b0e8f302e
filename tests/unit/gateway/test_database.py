"""The database: who can read it, its schema's versions, and what is sealed in it."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from pydantic import SecretStr

from serving.gateway import database as module
from serving.gateway.database import Database, Seal, answers
from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'private' / 'gateway.db'}"


def sealer(secret: str = "s" * 32) -> Seal:
    return Seal(Settings(_env_file=None, secret_key=SecretStr(secret)))


def version_of(database: Database) -> int:
    with database.engine.connect() as connection:
        return int(connection.execute(sql.select(module.version.c.version)).scalar_one())


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    database.create()
    files = list((tmp_path / "private").iterdir())
    assert {path.name for path in files} >= {"gateway.db", "gateway.db-wal"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*files, tmp_path / "private"])
    database.close()


def test_sqlite_is_set_up_as_said(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    with database.engine.connect() as connection:
        told = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "secure_delete", "busy_timeout")
        }
    assert told == {
        "journal_mode": "wal", "foreign_keys": 1, "synchronous": 2, "secure_delete": 1, "busy_timeout": 10_000
    }  # fmt: skip
    database.close()


def test_the_schema_is_made_once_though_many_make_it(tmp_path: Path) -> None:
    databases = [Database(url(tmp_path)) for _ in range(6)]
    failures: list[BaseException] = []

    def create(database: Database) -> None:
        try:
            database.create()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert version_of(databases[0]) == len(module.MIGRATIONS)
    with databases[0].engine.connect() as connection:
        assert connection.execute(sql.select(sql.func.count()).select_from(module.version)).scalar() == 1
    for database in databases:
        database.close()


def test_a_new_file_that_another_is_writing_is_waited_for(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    other = sqlite3.connect(tmp_path / "private" / "gateway.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # SQLite refuses WAL at once now, without waiting for busy_timeout
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    database.create()
    assert version_of(database) == len(module.MIGRATIONS)
    database.close()
    other.close()


def test_a_file_that_another_keeps_locked_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY_MS", 100)
    database = Database(url(tmp_path))
    other = sqlite3.connect(tmp_path / "private" / "gateway.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ValueError, match="database is locked"):
        database.create()
    database.close()
    other.close()


def test_what_is_no_file_of_sqlite_is_refused_at_once(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    (tmp_path / "private" / "gateway.db").write_bytes(b"of another program" * 100)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^database: sqlite:.*gateway\.db cannot be used: file is not a database; "):
        database.create()
    assert time.monotonic() - begun < 5
    database.close()


def test_a_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    mode = tmp_path.stat().st_mode
    with pytest.raises(ValueError, match="is a folder; name a file"):
        Database(f"sqlite:///{tmp_path}")
    assert tmp_path.stat().st_mode == mode


def test_a_second_one_in_a_process_leaves_the_first_ones_locks(tmp_path: Path) -> None:
    first = Database(url(tmp_path))
    first.create()
    log = tmp_path / "private" / "gateway.db-wal"
    before = log.stat().st_ino
    Database(url(tmp_path)).close()  # POSIX: to close a file lets go of all the process's locks on it
    # who closes the database and finds no other's lock takes itself for the last, and removes the log
    subprocess.run(
        [sys.executable, "-c", "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
         "c.execute('SELECT * FROM answers').fetchall(); c.close()", str(tmp_path / "private" / "gateway.db")],
        check=True,
    )  # fmt: skip
    assert log.stat().st_ino == before
    first.close()


def test_migrations_run_once_and_in_order_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(url(tmp_path))
    database.create()
    ran: list[str] = []

    def second(connection: Any) -> None:
        ran.append("second")
        connection.exec_driver_sql("CREATE TABLE more (x INTEGER)")

    def third(connection: Any) -> None:
        ran.append("third")
        connection.exec_driver_sql("CREATE TABLE yet_more (x INTEGER)")
        if len(ran) < 3:
            raise RuntimeError("stopped half-way")

    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, second, third))
    with pytest.raises(RuntimeError):
        database.create()
    assert version_of(database) == len(module.MIGRATIONS) - 2
    assert "more" not in sql.inspect(database.engine).get_table_names()
    database.create()
    database.create()
    assert ran == ["second", "third", "second", "third"]
    assert version_of(database) == len(module.MIGRATIONS)
    database.close()


def test_a_newer_schema_is_not_touched(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    database.create()
    with database.begin() as connection:
        connection.execute(module.version.update().values(version=99))
    with pytest.raises(ValueError, match="version 99"):
        database.create()
    assert version_of(database) == 99
    database.close()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:/tmp/x.db?uri=true", "an SQLite URI"),
        ("mysql://host/name", "mysql is not supported"),
        ("gateway.db", "no SQLAlchemy URL"),
    ],
)
def test_other_databases_are_refused(wrong: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Database(wrong)


def test_a_database_that_is_away_is_503_without_its_password(tmp_path: Path) -> None:
    database = Database("postgresql://user:hunter2@127.0.0.1:1/none")
    with pytest.raises(GatewayError) as told:
        asyncio.run(database.ping())
    assert (told.value.status, told.value.code) == (503, "database-unavailable")
    assert "hunter2" not in told.value.message
    database.close()


def test_a_locked_database_is_503_and_the_event_loop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUSY_MS", 300)
    database, other = Database(url(tmp_path)), Database(url(tmp_path))
    database.create()

    def write() -> None:
        with database.begin():
            pass

    async def ticks() -> int:
        count = 0
        task = asyncio.create_task(database.run(write))
        while not task.done():
            await asyncio.sleep(0.01)
            count += 1
        with pytest.raises(GatewayError, match="does not answer"):
            await task
        return count

    with other.begin():
        assert asyncio.run(ticks()) >= 10
    database.close()
    other.close()


def test_what_is_sealed_opens_in_its_place_with_its_secret_only() -> None:
    seal = sealer()
    sealed = seal.close(b"an answer", "a")
    assert b"answer" not in sealed and sealed != seal.close(b"an answer", "a")
    assert seal.open(sealed, "a") == b"an answer"
    assert sealer().open(sealed, "a") == b"an answer"  # after a restart
    for wrong in (
        lambda: seal.open(sealed, "b"),
        lambda: sealer("t" * 32).open(sealed, "a"),
        lambda: seal.open(sealed[:-1] + bytes([sealed[-1] ^ 1]), "a"),
        lambda: seal.open(sealed[:5], "a"),
        lambda: seal.open(b"", "a"),
    ):
        with pytest.raises(GatewayError) as told:
            wrong()
        assert told.value.code == "unreadable"


def row(number: int, **changes: Any) -> dict[str, Any]:
    known = {"caller": "c", "request_id": f"r{number}", "route": "/v1/diagnose", "release": "x", "track": "stable"}
    return known | {"decision": "answered", "at": time.time()} | changes


def test_answers_are_written_together_soon(tmp_path: Path) -> None:
    database = Database(url(tmp_path))
    database.create()

    async def work() -> None:
        for number in range(100):
            database.answered.note(row(number))
        database.answered.note(row(7, decision="abstained"))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not count(database):
            await asyncio.sleep(0.05)

    asyncio.run(work())
    assert count(database) == 100
    with database.engine.connect() as connection:
        found = connection.execute(sql.select(answers.c.decision).where(answers.c.request_id == "r7")).scalar()
    assert found == "abstained"
    database.close()


def count(database: Database) -> int:
    with database.engine.connect() as connection:
        return connection.execute(sql.select(sql.func.count()).select_from(answers)).scalar_one()


def test_answers_wait_while_the_database_is_away_and_are_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_MS", 50)
    database, other = Database(url(tmp_path)), Database(url(tmp_path))
    database.create()

    async def work() -> None:
        database.answered.note(row(1))
        with other.begin():
            await asyncio.sleep(1.0)
        database.answered.note(row(2))

    asyncio.run(work())
    database.close()
    other.close()
    again = Database(url(tmp_path))
    assert count(again) == 2
    again.close()


def test_a_killed_writer_leaves_a_sound_database(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom serving.gateway.database import *\nimport time\n"
        "database = Database(sys.argv[1])\ndatabase.create()\nnumber = 0\n"
        "while True:\n"
        "    with database.begin() as connection:\n"
        "        connection.execute(answers.insert().values(caller='c', request_id=str(number), route='r', at=0.0))\n"
        "    number += 1\n    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, url(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(20):
            last = process.stdout.readline()
        process.kill()
    database = Database(url(tmp_path))
    database.create()
    assert count(database) >= int(last) == 20
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    database.close()
