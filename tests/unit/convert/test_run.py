from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from medforge.config import DataConfig
from medforge.convert import detect, run
from medforge.files import list_files, tree_digest

TALK = {"image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


def test_detect(source: Any, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detect(shared_data / "vqa_rad") == "vqa-rad"
    assert detect(shared_data / "slake") == "slake"
    assert detect(source({"any.json": [TALK], "notes.json": "{}"})) == "conversations"
    assert capsys.readouterr().out.splitlines() == [
        "format vqa-rad: trainset.json and testset.json with image_name",
        "format slake: train.json, validate.json, test.json with q_lang",
        "format conversations: any.json with conversations",
    ]


def test_nothing_detected_says_what_is_needed(source: Any, convert: Any) -> None:
    with pytest.raises(ValueError) as error:
        convert(source({"a.json": "", "b.txt": "x"}))
    message = str(error.value)
    assert "it holds a.json (empty), b.txt" in message
    for name in ("vqa-rad: trainset.json", "slake: train.json", "conversations: *.json", "phantom: "):
        assert name in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"trainset.json": "["}, r"trainset\.json: line 1, column 2: not valid JSON"),
        ({"trainset.json": ""}, r"trainset\.json: is empty"),
        ({"trainset.json": {"data": 1}}, r"trainset\.json: holds an object with the keys data; a list"),
        ({"trainset.json": "[]"}, "has no rows"),
        ({"other.json": []}, r"is not VQA-RAD, which needs trainset\.json"),
    ],
)
def test_faults_of_the_source_name_the_file(source: Any, convert: Any, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(source(files), format="vqa-rad")


def test_wrong_path(convert: Any) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        convert("nowhere")


def test_settings_that_do_not_fit_are_errors(source: Any, convert: Any) -> None:
    folder = source({"trainset.json": '[{"image_name"}]'})
    with pytest.raises(ValueError, match=r"licence 'MIT': vqa-rad is CC0-1\.0; leave the licence out"):
        convert(folder, licence="MIT")
    with pytest.raises(ValueError, match="phantom is both"):
        convert(folder, format="phantom")
    with pytest.raises(ValueError, match="phantom is both"):
        convert("phantom", format="slake")


def test_licence_of_conversations(source: Any, convert: Any) -> None:
    done = convert(source({"train.json": [TALK]}, {"a.png": 1}), licence="CC-BY-4.0")
    assert (done.manifest["licence"], done.samples[0].licence) == ("CC-BY-4.0", "CC-BY-4.0")


def test_a_source_in_the_object_store(
    source: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source({"train.json": [TALK]}, {"a.png": 1}, name="talks")
    targets: list[Path] = []

    class FakeStore:
        def download_folder(self, bucket: str, prefix: str, target: Path) -> None:
            assert (bucket, prefix) == ("sources", "2024/talks")
            targets.append(target)
            shutil.copytree(folder, target)

    @contextmanager
    def connect(create: bool) -> Iterator[FakeStore]:
        assert not create
        yield FakeStore()

    monkeypatch.setattr("medforge.storage.connect", connect)
    stored = convert("s3://sources/2024/talks/", out="stored")
    assert stored.manifest["root"] == convert(folder).manifest["root"]
    assert not targets[0].exists()


def test_phantom(convert: Any) -> None:
    done = convert("phantom", phantom={"images": 12, "size": 56})
    assert done.dataset.splits() == ["train", "validation", "test"]
    assert sum(count["images"] for count in done.manifest["counts"].values()) == 12


def test_the_same_source_gives_the_same_bytes(source: Any, tmp_path: Path) -> None:
    rows = [TALK | {"image": f"{n}.png"} for n in range(5)] + [TALK | {"image": "gone.png"}]
    images = {f"{n}.png": n for n in range(5)}
    digests = set()
    for name in ("one/data", "two/data"):
        run(str(source({"all.json": rows}, images, name=name)), tmp_path / name / "out", DataConfig(), 3)
        digests.add(tree_digest(tmp_path / name / "out"))
    assert len(digests) == 1


def test_by_study_leaves_nothing_shared_in_real_data(shared_data: Path, convert: Any) -> None:
    done = convert(shared_data / "vqa_rad", split="by-study")
    held = {
        split: {s.images[0].sha256 for s in done.dataset.samples(split)}
        | {s.study_id for s in done.dataset.samples(split)}
        for split in ("train", "validation", "test")
    }
    assert not held["train"] & held["test"]
    assert not held["train"] & held["validation"]
    assert not held["validation"] & held["test"]
    assert len(done.samples) == 3515


def test_only_a_data_set_is_replaced(source: Any, convert: Any, tmp_path: Path) -> None:
    folder = source({"train.json": [TALK]}, {"a.png": 1})
    (tmp_path / "out").mkdir()
    first = convert(folder).manifest["root"]
    assert convert(folder).manifest["root"] == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="mine: exists and is no data set, so it is not overwritten"):
        convert(folder, out="mine")
    assert list_files(tmp_path / "mine") == ["notes.txt"]


def test_a_failed_second_run_leaves_the_first(source: Any, convert: Any, tmp_path: Path) -> None:
    folder = source({"train.json": [TALK]}, {"a.png": 1})
    first = convert(folder).manifest["root"]
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match="not one row is usable"):
        convert(folder)
    assert convert(source({"train.json": [TALK]}, {"a.png": 1}), out="again").manifest["root"] == first
    assert (tmp_path / "out/manifest.json").is_file()


def test_huggingface_opens_it(source: Any, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    convert(source({"train.json": [TALK], "test.json": [TALK]}, {"a.png": 1}), validation_share=0)
    opened = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in opened.items()} == {"train": 1, "test": 1}
    row = opened["test"][0]
    assert row["images"][0].size == (64, 48)
    assert row["turns"][1]["text"] == "A"
