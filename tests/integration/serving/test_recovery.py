"""Backup, loss and recovery, by the steps of docs/backup.md: the store, the gateway's database, the audit log."""

from __future__ import annotations

import base64
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sql
from pydantic import SecretStr

from medforge import apikeys
from medforge.audit import verify_files
from medforge.cli import main
from medforge.config import PolicyConfig, RuleConfig
from medforge.embedded import serve as embedded
from medforge.files import write_json
from medforge.release.policy import judge
from medforge.release.promote import newest_approved, promote
from medforge.release.publish import fetch_release, list_releases, publish, read_channel
from medforge.release.sign import approve, is_approved, load_public_key, new_key
from medforge.rollout.log import Log
from medforge.storage import Store
from serving.gateway.database import Database, Seal, answers, feedback
from serving.gateway.jobstore import JobStore
from serving.gateway.settings import Settings
from tests.conftest import png
from tests.integration.serving.test_postgres import Server, server
from tests.unit.gateway.conftest import SECRET, Serve, until
from tests.unit.gateway.fake import Fake

__all__ = ["server"]  # the fixture

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
ABOUT = {"name": "eyes", "base": "tiny", "dataset": "phantom"}
BUCKET = "medforge"
ASK = {"question": "Which organ is shown?", "images": [{"data": base64.b64encode(png()).decode()}]}


def published(store: Store, work: Path, figure: float, channel: str) -> str:
    """A release without a model that loads: what is proved here are its bytes."""
    arms = {arm: {"all": {"exact_match": {"value": v, "n": 100}}} for arm, v in (("tuned", figure), ("base", 0.4))}
    rules = [RuleConfig(name="good-enough", metric="exact_match", bound=0.5)]
    write_json(work / "verdict.json", judge({"arms": arms}, PolicyConfig(name="unit", rules=rules)))
    write_json(work / "model" / "config.json", {"figure": figure})
    (work / "model" / "weights.bin").write_bytes(os.urandom(300_000))
    parts = {name: work / name for name in ("model", "verdict.json")}
    return str(publish(store, BUCKET, channel, parts, ABOUT, NOW)["release"])


def rclone(environment: Mapping[str, str], *words: str) -> None:
    """rclone, to which the store of `environment` is the remote `store:`, set up as the document says."""
    settings = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENDPOINT": f"http://{environment['MEDFORGE_S3_ENDPOINT']}",
        "ACCESS_KEY_ID": environment["MEDFORGE_S3_ACCESS_KEY"],
        "SECRET_ACCESS_KEY": environment["MEDFORGE_S3_SECRET_KEY"],
    }
    remote = {f"RCLONE_CONFIG_STORE_{name}": value for name, value in settings.items()}
    program = Path(sys.executable).with_name("rclone")
    subprocess.run([program, *words], env={**os.environ, **remote}, check=True, capture_output=True, timeout=60)


def test_a_lost_store_is_restored_elsewhere(tmp_path: Path) -> None:
    key, backup = tmp_path / "reviewer", tmp_path / "backup"
    new_key(key)
    trusted = [load_public_key(key.with_name("reviewer.pub"))]
    with embedded(tmp_path / "a") as environment:
        store = Store.from_environment(environment)
        first = published(store, tmp_path / "1", 0.8, "candidate")
        signed = approve(store, BUCKET, first, key, "R", "approve", "", NOW)
        promote(store, BUCKET, first, "champion", trusted, NOW)
        steps = Log(store, BUCKET, "hospital/medforge", "R", lambda: datetime.now(timezone.utc))
        steps.note("weight", first, weight=0.1)
        steps.note("promoted", first)
        decided = steps.entries()
        rclone(environment, "copy", f"store:{BUCKET}/channels", str(backup / "channels"))
        rclone(environment, "copy", "--immutable", f"store:{BUCKET}/rollouts", str(backup / "rollouts"))
        # while the backup runs, another release is published, and a channel moves
        second = published(store, tmp_path / "2", 0.9, "candidate")
        rclone(environment, "copy", "--immutable", f"store:{BUCKET}/releases", str(backup / "releases"))
        late = tmp_path / "late"
        rclone(environment, "copy", f"store:{BUCKET}/channels", str(late / "channels"))
    shutil.rmtree(tmp_path / "a")

    with embedded(tmp_path / "b") as environment:
        store = Store.from_environment(environment)
        store.ensure_bucket(BUCKET)
        rclone(environment, "copy", str(backup / "releases"), f"store:{BUCKET}/releases")
        rclone(environment, "copy", str(backup / "rollouts"), f"store:{BUCKET}/rollouts")
        rclone(environment, "copy", str(backup / "channels"), f"store:{BUCKET}/channels")
        restored = Log(store, BUCKET, "hospital/medforge", "R", lambda: NOW)
        assert restored.entries() == decided and len(decided[0]) == 2 and decided[1] == ""
        for digest in (first, second):
            fetch_release(store, BUCKET, digest, tmp_path / "got" / digest)  # every byte against its SHA-256
        assert [row["problem"] for row in list_releases(store, BUCKET)] == ["", ""]
        assert is_approved(store, BUCKET, first, trusted)
        assert newest_approved(store, BUCKET, "champion", trusted) == first
        # the channel is the one of the backup's moment: older than the newest release, and never without its own
        assert (read_channel(store, BUCKET, "candidate") or {})["release"] == first
        # the reviewer's key works as before: the decision that it signed is the one that stands
        assert approve(store, BUCKET, first, key, "R", "approve", "", datetime.now(timezone.utc)) == signed
        approve(store, BUCKET, second, key, "R", "approve", "", NOW)
        assert is_approved(store, BUCKET, second, trusted)

    # in the other order, a channel may name what the backup has not
    shutil.rmtree(backup / "releases" / second)
    shutil.copytree(late / "channels", backup / "channels", dirs_exist_ok=True)
    # and a copy that was changed is found, whatever the copying program said
    weights = backup / "releases" / first / "model" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with embedded(tmp_path / "c") as environment:
        store = Store.from_environment(environment)
        store.ensure_bucket(BUCKET)
        rclone(environment, "copy", str(backup), f"store:{BUCKET}")
        problems = {row["release"]: row["problem"] for row in list_releases(store, BUCKET)}
        assert problems[second] == "has no manifest: its upload was interrupted"
        with pytest.raises(ValueError, match=r"weights\.bin: is corrupted"):
            fetch_release(store, BUCKET, first, tmp_path / "got" / "c")


def back_up_gateway(data_dir: Path, backup: Path) -> None:
    """What docs/backup.md says of a gateway with SQLite, which goes on running."""
    backup.mkdir()
    with closing(sqlite3.connect(data_dir / "gateway.db")) as connection:
        connection.execute("VACUUM INTO ?", (str(backup / "gateway.db"),))
    shutil.copytree(data_dir / "audit", backup / "audit")


def rows(database: Path, table: sql.Table) -> int:
    """How many rows a copy of the database holds; 0 where it lacks the table."""
    with closing(sqlite3.connect(database)) as connection:
        try:
            return int(connection.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def test_a_lost_gateway_goes_on_from_its_backup(
    serve: Serve, settings: Settings, key: str, fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = tmp_path / "backup"
    once = {"idempotency-key": "once"}
    with serve(settings) as gateway:
        client = gateway.client
        first = client.post("/v1/diagnose", json=ASK, headers=once).raise_for_status().json()
        verdict = {"request_id": first["id"], "verdict": "wrong"}
        client.post("/v1/feedback", json=verdict).raise_for_status()
        fake.stop()  # the job waits
        job = f"/v1/jobs/{client.post('/v1/jobs', json={'items': [ASK, ASK]}).raise_for_status().json()['id']}"
        until(lambda: gateway.parts.database.answered._rows == {})
        back_up_gateway(settings.data_dir, backup)
        shutil.copy(settings.data_dir / "gateway.db", tmp_path / "naive.db")
        noted = gateway.parts.audit.head
        fake.start()
        client.post("/v1/diagnose", json=ASK).raise_for_status()  # after the backup: lost with the machine
        later = gateway.parts.audit.head
    assert rows(backup / "gateway.db", answers) == 1 == rows(backup / "gateway.db", feedback)
    assert rows(tmp_path / "naive.db", answers) == 0  # what was written lately stands in gateway.db-wal

    asked = len(fake.requests)
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    shutil.copytree(backup, elsewhere.data_dir)
    shutil.rmtree(settings.data_dir)
    with serve(elsewhere) as gateway:  # its client has the key that was made before the loss
        client = gateway.client
        # a backup may hold the items as running: their worker's lease of 30 s has to end first
        until(lambda: client.get(job).raise_for_status().json()["status"] == "finished", 60)
        assert [item["result"]["decision"] for item in client.get(f"{job}/results").json()["items"]] == ["answered"] * 2
        asked_for_job = len(fake.requests) - asked
        again = client.post("/v1/diagnose", json=ASK, headers=once)
        assert (again.headers["idempotent-replayed"], again.json()) == ("true", first)
        assert len(fake.requests) == asked + asked_for_job > asked  # the job was asked, the kept answer was not
        assert client.post("/v1/feedback", json=verdict | {"verdict": "correct"}).status_code == 201

    # the chain of the backup goes on, and says that what came after the backup is gone
    assert main(["audit", "verify", str(elsewhere.data_dir / "audit"), "--head", noted]) == 0
    assert "The chain is whole" in capsys.readouterr().out
    kept, now = (sum(chain.rows for chain in verify_files(folder / "audit")) for folder in (backup, elsewhere.data_dir))
    assert now > kept
    assert main(["audit", "verify", str(elsewhere.data_dir / "audit"), "--head", later]) == 1
    assert "were removed" in capsys.readouterr().err

    # under another secret nothing of it is to be had
    other = elsewhere.model_copy(update={"secret_key": SecretStr("another-secret-0123456789abcdef01234")})
    with serve(other) as gateway:
        refused = gateway.client.get(job)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthenticated")
        secret = other.secret_key.get_secret_value()
        _, text = apikeys.rotate(gateway.parts.database.engine, secret, "test", time.time(), 0)
        mine = {"authorization": f"Bearer {text}"}
        assert gateway.client.get(job, headers=mine).status_code == 200  # the client is the same
        sealed = gateway.client.get(f"{job}/results", headers=mine)
        assert (sealed.status_code, sealed.json()["error"]["code"]) == (500, "unreadable")


def test_a_lost_postgresql_is_restored_from_a_dump(server: Server, tmp_path: Path) -> None:
    dump, seal = server.folder / "gateway.dump", Seal(Settings(_env_file=None, secret_key=SecretStr(SECRET)))
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        for name in ("before", "after"):
            connection.execute(f"CREATE DATABASE {name}")
    before = Database(server.url("before"))
    before.create()
    apikeys.create(before.engine)
    key, text = apikeys.add(before.engine, SECRET, "ris", time.time(), scopes=["jobs"])
    JobStore(before, seal, 60).add("job-1", "caller", None, [(b"a question", None)], 0.0)
    before.close()
    server.run("pg_dump", "--format=custom", f"--dbname={server.url('before')}", f"--file={dump}")
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE before")

    server.run("pg_restore", "--exit-on-error", f"--dbname={server.url('after')}", str(dump))
    after = Database(server.url("after"))
    try:
        after.create()
        parts = apikeys.parse(text)
        found = apikeys.find(after.engine, key.id, time.time())
        assert parts and found and apikeys.matches(found, parts[1], SECRET) and found.scopes == {"jobs"}
        store = JobStore(after, seal, 60)
        (item,) = store.claim("worker", 5, time.time(), 60)
        assert store.payload(item) == b"a question"
    finally:
        after.close()
