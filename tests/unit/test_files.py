from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from medforge import files


def test_canonical_json_and_digests(tmp_path: Path) -> None:
    assert files.canonical_json({"b": 1, "a": "肺"}) == '{"a":"肺","b":1}'.encode()
    assert files.sha256_json({"a": 1, "b": 2}) == files.sha256_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.canonical_json(float("nan"))
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "empty").write_bytes(b"")
    assert files.sha256_bytes(b"") == files.sha256_file(tmp_path / "empty") == empty


def test_tree_digest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/x").write_text("x")
    assert files.tree_digest(tmp_path / "one") == files.tree_digest(tmp_path / "two")
    (tmp_path / "two/sub/x").rename(tmp_path / "two/x")
    assert files.tree_digest(tmp_path / "one") != files.tree_digest(tmp_path / "two")
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        files.tree_digest(tmp_path / "gone")


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/file.json"
    files.write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"new": 2})
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_value_that_json_has_not_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "f", [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "f", float("inf"))
    assert files.read_json(tmp_path / "f") == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a JSON document is expected"),
        (b"  \n", "is empty"),
        (b'[1,\n{"a": ', "line 2, column 7: not valid JSON"),
        (b"[1] [2]", "line 1, column 5: not valid JSON: Extra data"),
        (b'"\xff"', "is not UTF-8 text"),
    ],
)
def test_read_json_names_the_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        files.read_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_read_json_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: no such file"):
        files.read_json(tmp_path / "gone")
    with pytest.raises(ValueError, match="is a folder"):
        files.read_json(tmp_path)
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf[]")
    assert files.read_json(tmp_path / "bom") == []


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "a/b"
    with files.new_folder(target) as work:
        (work / "x").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.new_folder(target) as work:
        (work / "y").write_text("2")
        raise RuntimeError
    assert files.list_files(tmp_path) == ["a/b/x"]
    with files.new_folder(target) as work:
        (work / "z").write_text("3")
    assert files.list_files(tmp_path) == ["a/b/z"]


def test_replace_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "source").mkdir()
    files.replace_folder(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").is_dir()


def test_link_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/sub").mkdir(parents=True)
    (tmp_path / "a/sub/x").write_text("1")
    files.link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/sub/x").samefile(tmp_path / "a/sub/x")

    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    files.link_tree(tmp_path / "a", tmp_path / "c")
    files.link_tree(tmp_path / "a/sub/x", tmp_path / "d/x")
    assert (tmp_path / "c/sub/x").read_text() == (tmp_path / "d/x").read_text() == "1"
    assert not (tmp_path / "c/sub/x").samefile(tmp_path / "a/sub/x")
