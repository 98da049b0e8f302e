from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medforge import dataset_writer
from medforge.dataset import Dataset, Reject, decode_image
from medforge.dataset_writer import DatasetWriter, image_name, refuse_overwrite, write_dataset
from medforge.files import list_files, tree_digest
from medforge.records import Box, Turn
from tests.conftest import png


def test_what_is_written_is_read(make_sample: Any, tmp_path: Path) -> None:
    pairs = [make_sample(n, split=split) for n, split in enumerate(("test", "train", "train"))]
    manifest = write_dataset(tmp_path / "d", pairs)
    opened = Dataset.open(tmp_path / "d")
    assert opened.splits() == ["train", "test"]
    assert opened.samples("train") == [pairs[1][0], pairs[2][0]]
    assert opened.samples("validation") == []
    assert opened.image_bytes(pairs[0][0].images[0]) == pairs[0][1][0]
    assert [image.size for image in opened.images(pairs[0][0])] == [(64, 48)]
    assert opened.digest == manifest["root"]
    assert manifest["counts"]["train"] == {
        "images": 2,
        "answer_type=closed": 2,
        "language=en": 2,
        "question_type=presence": 2,
        "samples": 2,
    }
    assert (manifest["min_pixels"], manifest["rejected"]) == (None, {})
    assert opened.rejects() == []


def test_the_same_samples_give_the_same_bytes(make_sample: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [make_sample(n) for n in range(20)])
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_an_image_is_kept_once_however_many_questions_it_has(make_sample: Any, tmp_path: Path) -> None:
    data = png(0, 400, 300)
    pairs = [make_sample(n, image=0) for n in range(200)]
    write_dataset(tmp_path / "d", [(sample, [data]) for sample, _ in pairs])
    (shard,) = Dataset.open(tmp_path / "d").manifest["shards"]
    assert len(data) < shard["bytes"] < len(data) + 60_000


def test_rows_of_an_image_stand_together(make_sample: Any, tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [make_sample(n, image=n % 3) for n in range(9)])
    studies = [s.study_id for s in Dataset.open(tmp_path / "d").samples("train")]
    assert studies == sorted(studies)


def test_shards_and_row_groups(make_sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "SHARD_BYTES", 3 * len(png()))
    monkeypatch.setattr(dataset_writer, "GROUP_ROWS", 2)
    pairs = [make_sample(n) for n in range(8)]
    manifest = write_dataset(tmp_path / "d", pairs)
    paths = [shard["path"] for shard in manifest["shards"]]
    assert paths == [f"data/train-{n:05d}-of-{len(paths):05d}.parquet" for n in range(len(paths))]
    assert len(paths) > 1
    opened = Dataset.open(tmp_path / "d")
    assert opened.samples("train") == [sample for sample, _ in pairs]
    assert [opened.image_bytes(sample.images[0]) for sample, _ in pairs] == [images[0] for _, images in pairs]


def test_a_row_group_stays_below_its_raw_size(
    make_sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_writer, "GROUP_RAW_BYTES", 3 * len(png()))
    manifest = write_dataset(tmp_path / "d", [make_sample(n, image=0) for n in range(7)])
    file = pq.ParquetFile(tmp_path / "d" / manifest["shards"][0]["path"])
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 3, 1]


def test_damage_is_found(make_sample: Any, tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "d", [make_sample()])
    shard = tmp_path / "d" / manifest["shards"][0]["path"]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: its SHA-256 is not the manifest's"):
        Dataset.open(tmp_path / "d")
    shard.unlink()
    with pytest.raises(ValueError, match="the manifest names this shard, but it is missing"):
        Dataset.open(tmp_path / "d", verify=False)


def test_open_says_what_is_wrong(make_sample: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json, so it is not a data set"):
        Dataset.open(tmp_path)
    write_dataset(tmp_path / "d", [make_sample()])
    path = tmp_path / "d/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version 99 is not 1; convert it again"):
        Dataset.open(tmp_path / "d")


def test_image_cache_drops_the_oldest(make_sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medforge.dataset._CACHE_BYTES", 1)
    monkeypatch.setattr(dataset_writer, "GROUP_ROWS", 1)
    pairs = [make_sample(n) for n in range(4)]
    write_dataset(tmp_path / "d", pairs)
    opened = Dataset.open(tmp_path / "d")
    for sample, (data,) in pairs + pairs:
        assert opened.image_bytes(sample.images[0]) == data
        assert len(opened._bytes) == 1


def test_rejects_and_extra_files(make_sample: Any, tmp_path: Path) -> None:
    reject = Reject("a#1", "convert", "blank-answer", "row 1")
    extra = {"more.json": lambda manifest: {"of": manifest["root"]}}
    with DatasetWriter(tmp_path / "d", "unit", "CC0-1.0", "unit", (1, 2), extra) as writer:
        writer.add(*make_sample())
        writer.reject(reject)
    opened = Dataset.open(tmp_path / "d")
    assert opened.rejects() == [reject]
    assert opened.manifest["rejected"] == {"blank-answer": 1}
    assert (opened.manifest["min_pixels"], opened.manifest["max_pixels"]) == (1, 2)
    assert json.loads((tmp_path / "d/more.json").read_text()) == {"of": opened.digest}


def test_the_llava_pair(make_sample: Any, tmp_path: Path) -> None:
    turns = (Turn("user", "<image>Where?"), Turn("assistant", "at <|box:0|>"))
    sample, images = make_sample(split="test", turns=turns, boxes=(Box("mass", (0.1, 0.2, 0.3, 0.45678)),))
    write_dataset(tmp_path / "d", [(sample, images)])
    (row,) = json.loads((tmp_path / "d/test.json").read_text())
    assert row["conversations"] == [
        {"from": "human", "value": "<image>Where?"},
        {"from": "gpt", "value": "at [0.100, 0.200, 0.300, 0.457]"},
    ]
    assert (tmp_path / "d" / row["image"]).read_bytes() == images[0]
    types = json.loads((tmp_path / "d/type_mapping.json").read_text())
    assert types == {sample.id: {"question_type": "presence", "answer_type": "closed", "from": "field"}}


def test_a_failure_leaves_the_old_data_set(make_sample: Any, tmp_path: Path) -> None:
    old = write_dataset(tmp_path / "d", [make_sample()])["root"]
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d", "unit", "x", "unit") as writer:
        writer.add(*make_sample(1))
        raise RuntimeError
    with (
        pytest.raises(ValueError, match=r"no sample is left \(\{'blank-answer': 1\}\); first: row 1"),
        DatasetWriter(tmp_path / "d", "unit", "x", "unit") as writer,
    ):
        writer.reject(Reject("a#1", "convert", "blank-answer", "row 1"))
    assert Dataset.open(tmp_path / "d").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_refuse_overwrite(make_sample: Any, tmp_path: Path) -> None:
    refuse_overwrite(tmp_path / "absent")
    refuse_overwrite(tmp_path)  # empty
    write_dataset(tmp_path / "d", [make_sample()])
    refuse_overwrite(tmp_path / "d")
    with pytest.raises(ValueError, match="exists and is no data set"):
        DatasetWriter(tmp_path, "unit", "x", "unit")
    assert "d/manifest.json" in list_files(tmp_path)


@pytest.mark.parametrize(("mode", "low", "high"), [("I;16", 100, 40_000), ("F", -1.5, 2.5), ("I", 0, 70_000)])
def test_deep_grey_images_are_scaled_by_their_range(mode: str, low: float, high: float) -> None:
    kind = {"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
    stream = io.BytesIO()
    Image.fromarray(np.array([[low, high], [low, high]], dtype=kind)).save(stream, "TIFF")
    pixels = np.asarray(decode_image(stream.getvalue()))
    assert pixels.shape == (2, 2, 3)
    assert pixels[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("data", [b"", b"text", png()[:200], png()[:-30][:-200]])
def test_decode_refuses_what_is_no_whole_image(data: bytes) -> None:
    with pytest.raises(ValueError) as error:
        decode_image(data)
    assert "0x" not in str(error.value)  # no address: the same fault reads the same


def test_decode_refuses_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(png())


def test_image_name() -> None:
    assert image_name("ab", png()) == "ab.png"
    assert image_name("ab", b"\xff\xd8\xff\xe0") == "ab.jpg"
    assert image_name("ab", b"?") == "ab.img"
