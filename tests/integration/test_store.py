"""The object store against the real embedded server."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medforge.cli import main
from medforge.embedded import serve
from medforge.files import list_files, sha256_bytes, tree_digest
from medforge.storage import MANIFEST, Entry, Store, connect


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(scope="module")
def environment(root: Path) -> Iterator[dict[str, str]]:
    with serve(root) as values:
        yield values


@pytest.fixture(scope="module")
def store(environment: dict[str, str]) -> Store:
    return Store.from_environment(environment)


@pytest.fixture
def bucket(store: Store, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    name = "t-" + sha256_bytes(request.node.nodeid.encode())[:12]
    store.ensure_bucket(name)
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nested and unicode names, an empty file, and one of several parts."""
    files = {
        "config.json": b"{}",
        "empty": b"",
        "a/b/c d+e%2F#?&'.bin": b"\0\1\2",
        "图像/é.txt": "图".encode(),
        "weights.bin": os.urandom(1 << 20) * 17,
    }
    for name, data in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "source"


def test_objects(store: Store, bucket: str) -> None:
    assert not store.exists(bucket, "a/b")
    store.put(bucket, "a/b", b"one")
    store.put(bucket, "a/b", b"two2")
    store.put(bucket, "empty", b"")
    assert store.get(bucket, "a/b") == b"two2"
    assert store.get(bucket, "empty") == b""
    assert store.exists(bucket, "a/b")
    assert store.exists(bucket, "empty")
    assert [entry[:2] for entry in store.list(bucket)] == [("a/b", 4), ("empty", 0)]
    assert bucket in store.buckets()
    store.ensure_bucket(bucket)


def test_a_prefix_is_a_folder(store: Store, bucket: str, tmp_path: Path) -> None:
    for key in ("m/v1/x", "m/v10/x", "m/v1.txt", "m/v1/d/y"):
        store.put(bucket, key, b"1")
    assert [entry.key for entry in store.list(bucket, "m/v1")] == ["m/v1/d/y", "m/v1/x"]
    assert store.folders(bucket, "m") == ["v1", "v10"]
    assert store.folders(bucket, "m/v1/") == ["d"]
    store.download_folder(bucket, "m/v1", tmp_path / "v1")
    assert list_files(tmp_path / "v1") == ["d/y", "x"]


def test_more_objects_than_a_page_of_a_listing(store: Store, bucket: str, root: Path) -> None:
    many = root / "store" / bucket / "many"
    many.mkdir()
    for number in range(1203):
        (many / f"{number:04}").write_bytes(b"")
    assert len(store.list(bucket, "many")) == 1203


def test_a_folder_comes_back_as_it_went(store: Store, bucket: str, folder: Path, tmp_path: Path) -> None:
    sent = store.upload_folder(folder, bucket, "models/v1/")
    assert set(sent) == set(list_files(folder))
    assert store.get_json(bucket, f"models/v1/{MANIFEST}") == sent
    assert store.download_folder(bucket, "models/v1", tmp_path / "back") == sent
    assert tree_digest(tmp_path / "back") == tree_digest(folder)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # Again over itself: what is whole is not fetched again, what is not is mended.
    (tmp_path / "back" / "config.json").write_bytes(b"[]")
    kept = (tmp_path / "back" / "weights.bin").stat().st_ino
    store.download_folder(bucket, "models/v1", tmp_path / "back")
    assert tree_digest(tmp_path / "back") == tree_digest(folder)
    assert (tmp_path / "back" / "weights.bin").stat().st_ino == kept


def test_a_prefix_without_a_manifest_is_downloaded_whole(store: Store, bucket: str, tmp_path: Path) -> None:
    store.put(bucket, "raw/a", b"1")
    store.put(bucket, "raw/b/c", b"")
    files = store.download_folder(bucket, "raw", tmp_path / "raw")
    assert files == {"a": {"sha256": None, "size": 1}, "b/c": {"sha256": None, "size": 0}}
    assert list_files(tmp_path / "raw") == ["a", "b/c"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "add", "manifest"])
def test_a_damaged_folder_is_refused(
    store: Store, bucket: str, root: Path, folder: Path, tmp_path: Path, damage: str
) -> None:
    store.upload_folder(folder, bucket, "m")
    stored = root / "store" / bucket / "m"
    data = (stored / "weights.bin").read_bytes()
    message = r"weights\.bin: is corrupted"
    if damage == "flip":
        (stored / "weights.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        (stored / "weights.bin").write_bytes(data[:-1])
    elif damage == "remove":
        (stored / "weights.bin").unlink()
        message = r"1 object \(weights\.bin\) missing"
    elif damage == "add":
        (stored / "evil.py").write_bytes(b"")
        message = r"1 object \(evil\.py\) there"
    else:
        (stored / MANIFEST).write_bytes(b'{"../x": {}}')
        message = "is refused"
    time.sleep(0.02)  # the server lists what changes beneath it after milliseconds
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_bytes(b"1")
    with pytest.raises(ValueError, match=message):
        store.download_folder(bucket, "m", tmp_path / "old")
    assert list_files(tmp_path / "old") == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "source"]


def test_keys_that_would_escape_are_refused(
    store: Store, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("m/../../x", "m//x"):
        monkeypatch.setattr(store, "list", lambda *_, key=key: [Entry(key, 1, "")])
        with pytest.raises(ValueError, match="is refused"):
            store.download_folder(bucket, "m", tmp_path / "t")
    monkeypatch.setattr(store, "list", lambda *_: [Entry("m/x", 1, ""), Entry("m/x/y", 1, "")])
    with pytest.raises(ValueError, match="both an object and a folder"):
        store.download_folder(bucket, "m", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_uploads_that_cannot_be_are_told(store: Store, bucket: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        store.upload_folder(tmp_path / "nothing", bucket, "m")
    with pytest.raises(ValueError, match="no such folder"):
        store.upload_folder(tmp_path / "missing", bucket, "m")
    store.put(bucket, "m/other", b"1")
    with pytest.raises(ValueError, match=r"already holds 1 object \(m/other\)"):
        store.upload_folder(folder, bucket, "m")
    (folder / MANIFEST).write_bytes(b"{}")
    with pytest.raises(ValueError, match="upload's own"):
        store.upload_folder(folder, bucket, "n")


def test_what_is_missing_is_named(store: Store, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"s3://{bucket}/none: there is no such object"):
        store.get(bucket, "none")
    with pytest.raises(ValueError, match=f"s3://{bucket}/none/: there is nothing here"):
        store.download_folder(bucket, "none", tmp_path / "t")
    for call in (
        lambda: store.get("no-bucket", "a"),
        lambda: store.put("no-bucket", "a", b"1"),
        lambda: store.list("no-bucket"),
        lambda: store.download_folder("no-bucket", "a", tmp_path / "t"),
    ):
        with pytest.raises(ValueError, match="there is no bucket 'no-bucket'"):
            call()
    assert not store.has_bucket("no-bucket")


@pytest.mark.parametrize("name", ["MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"])
def test_wrong_keys_are_told_and_not_shown(environment: dict[str, str], bucket: str, name: str) -> None:
    wrong = Store.from_environment({**environment, name: "quite-wrong"})
    for call in (wrong.buckets, lambda: wrong.get(bucket, "a"), lambda: wrong.exists(bucket, "a")):
        with pytest.raises(ValueError, match=r"refuses the keys.*MEDFORGE_S3_SECRET_KEY") as caught:
            call()
        assert "quite-wrong" not in str(caught.value)
        assert environment["MEDFORGE_S3_SECRET_KEY"] not in str(caught.value)


def test_keys_are_the_owners_alone_and_stay(root: Path, environment: dict[str, str]) -> None:
    path = root / "store-keys.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["secret_key"] == environment["MEDFORGE_S3_SECRET_KEY"]
    assert [p.name for p in root.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc to see other processes' arguments")
def test_keys_are_in_no_argument_list(environment: dict[str, str]) -> None:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:  # it ended meanwhile
            continue
    servers = [line for line in lines if b"serve\0s3" in line]
    assert servers
    assert not [line for line in servers if environment["MEDFORGE_S3_SECRET_KEY"].encode() in line]


def test_two_servers_over_one_folder_see_each_others_writes(root: Path, store: Store, bucket: str) -> None:
    with serve(root) as environment:
        other = Store.from_environment(environment)
        assert other.url != store.url
        assert not other.exists(bucket, "x/y")
        assert other.list(bucket) == []
        for text in (b"first", b"second, longer"):
            store.put(bucket, "x/y", text)
            time.sleep(0.02)  # what `embedded` promises: not minutes, as rclone's own cache would have it
            assert other.get(bucket, "x/y") == text
            assert [entry[:2] for entry in other.list(bucket, "x")] == [("x/y", len(text))]
        other.ensure_bucket("made-by-other")
        time.sleep(0.02)
        assert "made-by-other" in store.buckets()


def test_an_embedded_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "rclone"
    broken.write_text("#!/bin/sh\necho no room for a server >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr("medforge.embedded._binary", lambda: str(broken))
    with pytest.raises(ValueError, match=r"did not start[^$]*no room for a server"), serve(tmp_path / "root"):
        raise AssertionError("it served")


CHILD = """
import sys, time
from pathlib import Path
from medforge.embedded import serve
with serve(Path(sys.argv[1])):
    print("up", flush=True)
    if sys.argv[2] == "raise":
        raise RuntimeError("on purpose")
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


def _servers(root: Path) -> list[str]:
    out = subprocess.run(["ps", "-ewwo", "pid,stat,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in out.splitlines() if f"serve s3 {root}/" in line and " Z" not in line]


@pytest.mark.parametrize("end", ["normal", "raise", "SIGTERM", "SIGINT", "SIGKILL"])
def test_the_server_ends_with_its_process_however_that_ends(tmp_path: Path, end: str) -> None:
    if end == "SIGKILL" and sys.platform != "linux":
        pytest.skip("only Linux tells a child that its parent was killed")
    how = end if end in ("normal", "raise") else "wait"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell that starts this in the background makes SIGINT ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    if how == "wait":
        assert len(_servers(tmp_path)) == 1
        process.send_signal(getattr(signal, end))
    process.wait(20)
    deadline = time.monotonic() + 5
    while _servers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _servers(tmp_path) == []
    assert (process.returncode == 0) is (end == "normal")
    process.stdout.close()


def test_the_environments_store_goes_before_the_embedded_one(
    environment: dict[str, str], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with connect(tmp_path / "unused") as connected:
        assert connected.url == store.url
    assert not (tmp_path / "unused").exists()


def test_the_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MEDFORGE_S3_ENDPOINT", "MEDFORGE_S3_ACCESS_KEY", "MEDFORGE_S3_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> tuple[int, str]:
        status = main(["store", *words, "--root", str(tmp_path / "root")])
        told = capsys.readouterr()
        return status, told.out + told.err

    assert run("ls")[0] == 1
    assert run("put", str(folder), "s3://models/v1")[0] == 0
    assert run("put", str(folder / "config.json"), "s3://models/one/")[0] == 0
    assert run("ls")[1] == "s3://models\n"
    assert "s3://models/one/config.json" in run("ls", "s3://models/one")[1]
    assert "bytes in 1 objects" in run("ls", "s3://models/one/config.json")[1]
    assert run("ls", "s3://models/none")[0] == 1
    assert run("get", "s3://models/v1", str(tmp_path / "got"))[0] == 0
    assert tree_digest(tmp_path / "got") == tree_digest(folder)
    status, told = run("get", "s3://models/v1", str(tmp_path / "got"))
    assert status == 1
    assert "is not overwritten" in told
    assert run("get", "s3://models/one/config.json", str(tmp_path / "one.json"))[0] == 0
    assert (tmp_path / "one.json").read_bytes() == b"{}"
    assert run("put", str(tmp_path / "missing"), "s3://models/v2")[0] == 1
    assert _servers(tmp_path / "root") == []
