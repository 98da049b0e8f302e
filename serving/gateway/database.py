"""The gateway's database: SQLite in a file of its own, or PostgreSQL, through SQLAlchemy's Core.

What holds health information (the images and questions of waiting jobs, answers that are kept) is sealed with a key
that comes from the settings' secret: the database, its backups and its replicas hold it in no other form. A new
secret makes what is sealed unreadable. Feedback is kept in clear, and must hold no patient's data.

Times are seconds since 1970. Every call runs in one of the database's own threads, never on the event loop.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sql
import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import Column, Double, ForeignKey, Index, Integer, LargeBinary, String, Table, Text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from serving.gateway.errors import GatewayError
from serving.gateway.settings import Settings

T = TypeVar("T")
_THREADS = 8
_BUSY_MS = 10_000
_LOCK = 0x6D65_6466  # PostgreSQL's advisory lock of the migrations: "medf"
_NONCE = 12
_FLUSH_SECONDS = 0.5
_UNWRITTEN = 10_000

metadata = sql.MetaData()
version = Table("gateway_schema", metadata, Column("version", Integer, nullable=False))
answers = Table(
    "answers",
    metadata,
    Column("caller", String(200), primary_key=True),
    Column("request_id", String(200), primary_key=True),
    Column("route", String(100), nullable=False),
    Column("release", String(200)),
    Column("track", String(20)),
    Column("decision", String(50)),
    Column("at", Double, nullable=False, index=True),
)
feedback = Table(
    "feedback",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("caller", String(200), nullable=False),
    Column("request_id", String(200), nullable=False),
    Column("release", String(200)),
    Column("decision", String(50)),
    Column("verdict", String(20), nullable=False),
    Column("correction", Text),
    Column("regions", Text, nullable=False),
    Column("comment", Text),
    Column("status", String(20), nullable=False),
    Column("at", Double, nullable=False),
    Column("replaced_at", Double),
    Index("feedback_of_request", "caller", "request_id"),
)
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("caller", String(200), nullable=False, index=True),
    Column("name", String(200)),
    Column("status", String(20), nullable=False),  # open, finished, cancelled
    Column("created", Double, nullable=False),
    Column("finished", Double),
    Column("expires", Double, index=True),
    Column("items", Integer, nullable=False),
)
job_items = Table(
    "job_items",
    metadata,
    Column("job", String(40), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("status", String(20), nullable=False),  # waiting, running, done, failed, cancelled
    Column("attempts", Integer, nullable=False),
    Column("due", Double, nullable=False),  # waiting: not before; running: when the lease ends
    Column("worker", String(40)),
    Column("payload", LargeBinary),  # sealed; none once the item has ended
    Column("outcome", LargeBinary),  # sealed
    Index("job_items_due", "status", "position", "job", "due"),  # what `claim` sorts, without the rows' payloads
)
idempotency = Table(
    "idempotency",
    metadata,
    Column("key", String(64), primary_key=True),  # SHA-256 of caller, route and key
    Column("digest", String(64), nullable=False),
    Column("holder", String(40)),  # the request at work; none once there is an answer
    Column("answer", LargeBinary),  # sealed
    Column("expires", Double, nullable=False, index=True),
)


def _first_tables(connection: Connection) -> None:
    metadata.create_all(connection, [answers, feedback, jobs, job_items, idempotency])


# the schema's versions: the n-th function leads from n-1 to n; one that was released is never changed
MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_first_tables,)


class Database:
    """An engine, its schema and its threads. `url` is SQLAlchemy's: sqlite:///FILE or postgresql://…"""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(write=True)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")
        self.answered = Answered(self)
        # what is told when a job was sent (None) or cancelled (its id) through this gateway; the worker sets it
        self.jobs_changed: Callable[[str | None], None] = lambda _: None

    @property
    def dialect(self) -> str:
        """sqlite or postgresql."""
        return self.engine.dialect.name

    def create(self) -> None:
        """Make the tables, or bring them to this code's version. Several gateways may do so at once.

        ValueError if the schema is newer than this code, or the database cannot be used.
        """
        try:
            self._migrate()
        except sql.exc.DBAPIError as error:
            url, why = self.engine.url.render_as_string(hide_password=True), " ".join(str(error.orig).split())
            raise ValueError(f"database: {url} cannot be used: {why}; mend it, or name another") from error

    def _migrate(self) -> None:
        with self.begin() as connection:
            if self.dialect == "postgresql":
                connection.execute(sql.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            metadata.create_all(connection, [version])
            found = connection.execute(sql.select(version.c.version)).scalar()
            if found is None:
                connection.execute(version.insert().values(version=0))
            if (found or 0) > len(MIGRATIONS):
                raise ValueError(
                    f"the database's schema has version {found}, this gateway knows {len(MIGRATIONS)}: a newer gateway "
                    "wrote it; start that one, or give this one another database"
                )
            for migrate in MIGRATIONS[found or 0 :]:
                migrate(connection)
            connection.execute(version.update().values(version=len(MIGRATIONS)))

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction that writes: SQLite's one write lock is taken at its beginning."""
        with self._writer.begin() as connection:
            yield connection

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(*arguments)` in a thread of the database's. GatewayError 503 while the database is away."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise _away() from error
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
            raise _away() from error

    async def ping(self) -> None:
        """GatewayError 503 unless the database answers."""
        await self.run(self._ask)

    def _ask(self) -> None:
        with self.engine.connect() as connection:
            connection.execute(sql.text("SELECT 1"))

    def close(self) -> None:
        """Write what waits, wait for what runs, and close the connections."""
        try:
            self._threads.submit(self.answered.write).result()
        except (OperationalError, InterfaceError, PoolTimeout):
            structlog.get_logger().warning("answers lost", reason="database-unavailable")
        finally:
            self._threads.shutdown()
            self.engine.dispose()


class Answered:
    """Which requests were answered, by which release, with which decision: what feedback may refer to.

    Rows are collected and written together, at most half a second later, so that no answer waits for the database; a
    kill in that time loses them, and feedback on those requests is then refused. All but `write` on the event loop.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, row: dict[str, Any]) -> None:
        """Keep a row of `answers`."""
        with self._lock:
            self._rows[row["caller"], row["request_id"]] = row
            if len(self._rows) > _UNWRITTEN:  # the database has been away for long
                del self._rows[next(iter(self._rows))]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._start)

    def _start(self) -> None:
        self._timer = None
        self._task = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        try:
            await self._database.run(self.write)
        except GatewayError:  # they are kept, and tried again with the next answer
            structlog.get_logger().warning("answers not written", reason="database-unavailable")

    def write(self) -> None:
        """Write what was noted."""
        with self._lock:
            rows, self._rows = self._rows, {}
        if not rows:
            return
        told = msgspec.json.encode(list(rows.values())).decode()
        try:
            with self._database.begin() as connection:
                connection.execute(_upsert_answers(self._database.dialect), {"rows": told})
        except BaseException:
            with self._lock:
                self._rows = rows | self._rows
            raise


@lru_cache
def _upsert_answers(dialect: str) -> sql.Executable:
    """Write the rows of answers that the parameter `rows` holds as JSON.

    One statement, and not one a row: drivers give up Python's lock for each and have to wait for it again, in which
    time nobody is answered.
    """
    told = sql.bindparam("rows", type_=Text)
    names = [column.name for column in answers.c]
    if dialect == "postgresql":
        columns = [sql.column(column.name, column.type) for column in answers.c]
        rows = sql.func.jsonb_to_recordset(sql.cast(told, postgresql.JSONB)).table_valued(*columns)
        found = sql.select(*rows.render_derived(with_types=True).c)
        insert: Any = postgresql.insert(answers).from_select(names, found)
    else:
        each = sql.func.json_each(told).table_valued("value")
        found = sql.select(*(sql.func.json_extract(each.c.value, f"$.{name}") for name in names))
        # without a condition SQLite would take ON CONFLICT for a join's ON
        insert = sqlite.insert(answers).from_select(names, found.where(sql.text("1")))
    changed = {column.name: insert.excluded[column.name] for column in answers.c if not column.primary_key}
    return insert.on_conflict_do_update(index_elements=list(answers.primary_key.c.keys()), set_=changed)


def _away() -> GatewayError:
    return GatewayError(503, "database-unavailable", "The gateway's database does not answer; try later", None, 5)


def _engine(url: str) -> Engine:
    try:
        parsed = sql.make_url(url)
    except sql.exc.ArgumentError:
        raise ValueError("database: is no SQLAlchemy URL, such as postgresql://user:password@host/name") from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        return sql.create_engine(
            parsed, pool_pre_ping=True, pool_size=_THREADS, hide_parameters=True, connect_args={"connect_timeout": 5}
        )
    if backend != "sqlite":
        raise ValueError(f"database: {backend} is not supported: sqlite and postgresql are")
    if not parsed.database or parsed.database == ":memory:" or "uri" in parsed.query:
        raise ValueError("database: an SQLite URI or database in memory is not supported; name a file, as "
                         "sqlite:////folder/f")  # fmt: skip
    _make_private(Path(parsed.database))
    engine = sql.create_engine(parsed, pool_size=_THREADS, hide_parameters=True)
    sql.event.listen(engine, "connect", _set_up_sqlite)
    sql.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """Let nobody but this user read the file; SQLite gives the files beside it the same mode."""
    if path.is_dir():
        raise ValueError(f"database: {path} is a folder; name a file, as sqlite:///{path}/gateway.db")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # one that is there is not opened: closing it would let go of the locks that this process's connections hold
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        path.chmod(0o600)
    except OSError as error:
        told = f"database: {error.filename}: {error.strerror}; name a file in a folder that this process may write to"
        raise ValueError(told) from error


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by `_begin_sqlite`, not by the driver
    # secure_delete: an image that was removed leaves no bytes behind in the file
    for pragma in (f"busy_timeout={_BUSY_MS}", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    _write_ahead(connection)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on; it stays on in the file.

    Of several that do so at once in a new file SQLite lets one do it and refuses the others at once, whatever
    `busy_timeout` says, as each holds the lock that another waits for.
    """
    until = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class Seal:
    """Encryption of what is kept: AES-256-GCM under a key derived from the settings' secret (HKDF-SHA256).

    `place` says where the bytes belong, so that those of one row are refused in another.
    """

    def __init__(self, settings: Settings) -> None:
        secret = settings.secret_key.get_secret_value().encode()
        key = HKDF(hashes.SHA256(), 32, salt=None, info=b"medforge gateway: what is kept").derive(secret)
        self._cipher = AESGCM(key)

    def close(self, data: bytes, place: str) -> bytes:
        """`data`, sealed."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data, place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """What `close` sealed. GatewayError 500 if the secret is another one now, or the bytes were changed."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], place.encode())
        except (InvalidTag, ValueError):  # the latter for what is too short to be sealed
            raise GatewayError(
                500, "unreadable", "What was kept cannot be read: the gateway's secret_key is another one now"
            ) from None
