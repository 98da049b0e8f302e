"""What is kept, on a real PostgreSQL; and jobs whose worker is killed, there and on SQLite."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sql

from serving.gateway import api
from serving.gateway import database as module
from serving.gateway.database import Database, feedback
from serving.gateway.errors import GatewayError
from serving.gateway.feedback import keep
from serving.gateway.idempotency import Stored, once
from serving.gateway.images import Picture
from serving.gateway.jobs import store_of
from serving.gateway.jobstore import JobStore
from serving.gateway.parts import Context, Parts
from serving.gateway.settings import Settings
from serving.gateway.worker import Worker
from tests.unit.gateway.conftest import Serve, make_key, until
from tests.unit.gateway.keeping import answered, ask, context, keeping, png

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@dataclass
class Server:
    """A PostgreSQL server of the test's own, run by somebody who is not root."""

    folder: Path
    port: int
    user: str | None
    process: subprocess.Popen[bytes] | None = None

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run([PROGRAMS[-1].with_name(program), *arguments], user=self.user, check=True, capture_output=True)

    def start(self) -> None:
        settings = (f"unix_socket_directories={self.folder}", "listen_addresses=127.0.0.1", "fsync=off")
        options = [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAMS[-1], "-D", self.folder / "data", "-p", str(self.port), *options],
                user=self.user,
                stdout=log,
                stderr=log,
            )
        until(self.answers, 60)

    def answers(self) -> bool:
        assert self.process and self.process.poll() is None, (self.folder / "log").read_text()
        try:
            with psycopg.connect(self.url("postgres"), connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    def stop(self, how: int = signal.SIGQUIT) -> None:
        assert self.process
        self.process.send_signal(how)
        self.process.wait(30)

    def url(self, name: str) -> str:
        return f"postgresql://medforge@127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The server; it is skipped where Debian's postgresql is not installed."""
    if not PROGRAMS:
        pytest.skip("no PostgreSQL: /usr/lib/postgresql is missing (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="medforge-pg-"))
    user = None if os.getuid() else "postgres"
    if user:
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        made = Server(folder, free.getsockname()[1], user)
    try:
        made.run("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "medforge", "--no-sync")
        made.start()
        yield made
        made.stop()
    finally:
        if made.process and made.process.poll() is None:
            made.process.kill()
        shutil.rmtree(folder)


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """A new database of the server."""
    name = f"t{abs(hash(request.node.nodeid)):x}"
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    return server.url(name)


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """What `work(0)` … `work(count - 1)`, all begun together, gave or raised."""
    told: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            told[number] = work(number)
        except Exception as error:
            told[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def add(store: JobStore, job: str, count: int) -> None:
    items = [(ask(f"question {number}").model_dump_json().encode(), None) for number in range(count)]
    store.add(job, "c", None, items, time.time())


def test_the_schema_is_made_once_though_many_make_it(url: str) -> None:
    databases = [Database(url) for _ in range(6)]
    assert at_once(lambda number: databases[number].create(), 6) == [None] * 6
    with databases[0].engine.connect() as connection:
        assert connection.execute(sql.select(module.version.c.version)).all() == [(len(module.MIGRATIONS),)]
    with databases[0].begin() as connection:
        connection.execute(module.version.update().values(version=99))
    with pytest.raises(ValueError, match="version 99"):
        databases[1].create()
    for database in databases:
        database.close()


def test_gateways_share_the_items_of_a_job(url: str, tmp_path: Path) -> None:
    calls: list[str] = []

    async def read(_: api.DiagnoseRequest) -> Sequence[Picture]:
        return []

    async def diagnose(_: Parts, question: api.Question, __: Sequence[Picture], at: Context) -> api.DiagnoseResponse:
        calls.append(at.request_id)
        await asyncio.sleep(0.01)
        return answered(at.request_id, f"to {question.question}")

    async def work(gateways: list[Parts]) -> None:
        workers = [Worker(parts, store_of(parts), read, diagnose, poll=0.02) for parts in gateways]
        for worker in workers:
            await worker.start()
        end = time.monotonic() + 30
        while store.get("job-1", "c").status != "finished":
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        for worker in workers:
            await worker.stop()

    with ExitStack() as stack:
        gateways = [stack.enter_context(keeping(tmp_path / str(n), database=url)) for n in range(3)]
        store = store_of(gateways[0])
        add(store, "job-1", 90)
        asyncio.run(work(gateways))
        items = store.results("job-1", "c", -1, 200).items
        assert store.counts() == {"waiting": 0, "running": 0}
    assert len(calls) == len(set(calls)) == 90
    assert [item.result and item.result.answer for item in items] == [f"to question {n}" for n in range(90)]


def test_items_are_claimed_once_and_a_job_ends_with_its_last_item(url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        gateways = [stack.enter_context(keeping(tmp_path / str(n), database=url)) for n in range(4)]
        stores = [store_of(parts) for parts in gateways]
        for turn in range(15):
            job = f"job-{turn}"
            add(stores[0], job, 4)
            claimed = at_once(lambda n: stores[n].claim(f"w{n}", 2, time.time(), 30), 4)
            held = [(n, item.position) for n, items in enumerate(claimed) for item in items]
            assert sorted(position for _, position in held) == [0, 1, 2, 3]

            def end(number: int, job: str = job, held: list[tuple[int, int]] = held) -> bool:
                worker, position = held[number]
                result = answered(f"{job}-{position}", "yes")
                return stores[number].finish(f"w{worker}", (job, position), time.time(), result, None)

            assert at_once(end, 4) == [True] * 4
            assert stores[0].get(job, "c").status == "finished"


def test_a_job_is_cancelled_while_its_items_end(url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        gateways = [stack.enter_context(keeping(tmp_path / str(n), database=url)) for n in range(4)]
        stores = [store_of(parts) for parts in gateways]
        for turn in range(15):
            job = f"job-{turn}"
            add(stores[0], job, 3)
            stores[0].claim("w", 3, time.time(), 30)

            def act(number: int, job: str = job) -> Any:
                if number == 3:
                    return stores[3].cancel(job, "c", time.time()).status
                result = answered(f"{job}-{number}", "yes")
                return stores[number].finish("w", (job, number), time.time(), result, None)

            *kept, status = at_once(act, 4)
            assert status in ("cancelled", "finished")
            items = stores[0].results(job, "c", -1, 9).items
            assert [item.result is not None for item in items] == kept
            assert stores[0].get(job, "c").status == status


def test_of_many_requests_with_one_key_one_is_done(url: str, tmp_path: Path) -> None:
    count = 0

    async def answer() -> Stored:
        nonlocal count
        count += 1
        await asyncio.sleep(0.3)
        return Stored(200, b"{}", {})

    async def all_at_once(gateways: list[Parts]) -> list[Any]:
        requests = [once(gateways[n % 2], context(), "/a", "key", b"body", answer) for n in range(10)]
        return list(await asyncio.gather(*requests, return_exceptions=True))

    with ExitStack() as stack:
        gateways = [stack.enter_context(keeping(tmp_path / str(n), database=url)) for n in range(2)]
        told = asyncio.run(all_at_once(gateways))
        again = asyncio.run(once(gateways[1], context(), "/a", "key", b"body", answer))
    assert count == 1
    assert sorted(e.status for e in told) == [200, *[409] * 9]
    assert again.headers["idempotent-replayed"] == "true"


def test_of_many_verdicts_at_once_one_stands(url: str, tmp_path: Path) -> None:
    row = {"caller": "c", "request_id": "r1", "route": "/v1/diagnose", "release": None, "track": None}
    given = api.FeedbackRequest(request_id="r1", verdict="partly", comment="一部分对")
    with keeping(tmp_path, database=url) as parts:

        async def note() -> None:
            for at in (1.0, time.time()):  # the same id twice, as a caller may choose it
                parts.database.answered.note(row | {"decision": "answered", "at": at})
                parts.database.answered.write()

        asyncio.run(note())
        told = at_once(lambda n: keep(parts.database, f"fb-{n}", "c", given, float(n)), 10)
        assert not [error for error in told if isinstance(error, Exception)]
        with parts.database.engine.connect() as connection:
            rows = connection.execute(sql.select(feedback)).all()
    assert len(rows) == 10
    assert [row.replaced_at for row in rows].count(None) == 1
    assert rows[0].comment == "一部分对"


def test_a_server_that_is_killed_is_503_and_is_found_again(server: Server, url: str, tmp_path: Path) -> None:
    with keeping(tmp_path, database=url) as parts:
        asyncio.run(parts.database.ping())
        server.stop(signal.SIGQUIT)
        for _ in range(3):
            with pytest.raises(GatewayError) as told:
                asyncio.run(parts.database.ping())
            assert (told.value.status, told.value.retry_after) == (503, 5)
        server.start()
        asyncio.run(parts.database.ping())


def test_the_gateway_on_postgresql(url: str, serve: Serve, settings: Settings) -> None:
    there = settings.model_copy(update={"database": url})
    with serve(there) as gateway:
        gateway.client.headers["authorization"] = f"Bearer {make_key(there)}"
        assert gateway.client.get("/readyz").status_code == 200
        job = {"items": [{"question": f"{number}?", "images": [{"data": png()}]} for number in range(5)]}
        sent = gateway.client.post("/v1/jobs", json=job, headers={"idempotency-key": "a"})
        again = gateway.client.post("/v1/jobs", json=job, headers={"idempotency-key": "a"})
        assert sent.status_code == again.status_code == 202 and sent.json()["id"] == again.json()["id"]
        place = sent.headers["location"]
        until(lambda: gateway.client.get(place).json()["status"] == "finished", 30)
        items = gateway.client.get(f"{place}/results").json()["items"]
        assert [item["index"] for item in items] == list(range(5)) and all(item["result"] for item in items)
        body = {"request_id": items[0]["result"]["id"], "verdict": "correct"}
        assert gateway.client.post("/v1/feedback", json=body).status_code == 201
        assert [made["id"] for made in gateway.client.get("/v1/jobs").json()["jobs"]] == [sent.json()["id"]]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_all_results_are_there_once_though_workers_are_killed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("url") if kind == "postgresql" else f"sqlite:///{tmp_path / 'shared.db'}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}
    count = 120

    def start(number: int) -> subprocess.Popen[bytes]:
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.integration.serving.job_process", str(folder), url]
        return subprocess.Popen(command, env=environment, cwd=tmp_path)

    def begun() -> list[str]:
        return [line for path in tmp_path.glob("*/begun") for line in path.read_text().splitlines()]

    def has_begun(items: int) -> bool:
        return len(begun()) >= items

    with keeping(tmp_path / "here", database=url) as parts:
        store = store_of(parts)
        add(store, "job-1", count)
        processes = [start(0), start(1)]
        try:
            for turn in range(3):
                until(partial(has_begun, 15 * (turn + 1)), 60)
                processes[turn % 2].send_signal(signal.SIGKILL)
                processes[turn % 2].wait(10)
                processes[turn % 2] = start(turn % 2)
            until(lambda: store.get("job-1", "c").status == "finished", 90)
        finally:
            for process in processes:
                process.kill()
                process.wait(10)
        status, items = store.get("job-1", "c"), store.results("job-1", "c", -1, 1000).items
    assert (status.done, status.failed) == (count, 0)
    assert [item.index for item in items] == list(range(count))
    assert [item.result and item.result.answer for item in items] == [f"to question {n}" for n in range(count)]
    assert len(set(begun())) == count
    assert count <= len(begun()) <= count + 3 * 4  # nothing was done again but what the killed ones held
