"""`medforge store-check` against the embedded server, and against stores that break their word in one thing each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medforge.cli import main
from medforge.commands.storecheck import CHECKS, conformance
from medforge.embedded import serve
from medforge.s3 import Entry
from medforge.storage import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with serve(tmp_path_factory.mktemp("embedded")) as environment:
        made = Store.from_environment(environment)
        made.ensure_bucket("medforge")
        yield made


def test_the_embedded_store_does_all_of_it_and_is_left_clean(store: Store) -> None:
    told: list[str] = []
    assert conformance(store, "medforge", told.append) == []
    assert told == [f"ok      {name}" for name in CHECKS]
    assert store.list("medforge") == []


def _kept_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put: Callable[..., None] = store.put
    monkeypatch.setattr(
        store, "put", lambda bucket, key, data: None if store.exists(bucket, key) else put(bucket, key, data)
    )


def _prefix_without_its_slash(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(bucket: str, prefix: str = "") -> list[Entry]:
        return store._listing(bucket, prefix)

    monkeypatch.setattr(store, "list", listed)


def _range_ignored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    get = store._client.get_object

    def whole(*given: Any, offset: int = 0, **options: Any) -> Any:
        return get(*given, **options)

    monkeypatch.setattr(store._client, "get_object", whole)


def _says_that_all_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "exists", lambda bucket, key: True)


def _cuts_large_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = store.upload_files

    def cut(files: dict[str, Path], bucket: str) -> Any:
        table = upload(files, bucket)
        for key, path in files.items():
            store.put(bucket, key, path.read_bytes()[: 16 << 20])
        return table

    monkeypatch.setattr(store, "upload_files", cut)


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        (_kept_for_ever, "read what was just overwritten"),
        (_prefix_without_its_slash, "list folders"),
        (_range_ignored, "read from an offset"),
        (_says_that_all_is_there, "tell and remove"),
        (_cuts_large_files, "files in several parts"),
    ],
)
def test_what_a_store_does_not_do_is_named(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Store, pytest.MonkeyPatch], None],
    failed: str,
) -> None:
    told: list[str] = []
    with monkeypatch.context() as patched:
        broken(store, patched)
        assert conformance(store, "medforge", told.append) == [failed]
    assert [line for line in told if line.startswith("failed")] and len(told) == len(CHECKS)
    assert store.list("medforge") == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ENDPOINT", "ACCESS_KEY", "SECRET_KEY"):
        monkeypatch.delenv(f"MEDFORGE_S3_{name}", raising=False)
    assert main(["store-check", "s3://medforge/folder"]) == 1
    assert "a bucket is checked, not a folder in it; write s3://medforge" in capsys.readouterr().err
    assert main(["store-check", "s3://medforge", "--create"]) == 0
    told = capsys.readouterr().out
    assert "made the bucket medforge" in told and "does what MedForge asks of a store" in told
    assert main(["store-check", "s3://another"]) == 1
    assert "there is no bucket 'another'" in capsys.readouterr().err
