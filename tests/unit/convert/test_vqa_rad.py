from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medforge.files import sha256_bytes
from medforge.records import Turn, sample_id
from tests.conftest import png


def row(qid: int, image: str = "a.jpg", **changes: Any) -> dict[str, Any]:
    values = {
        "qid": qid,
        "image_name": image,
        "image_organ": "HEAD",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "question": f"Is finding {qid} seen?",
    }
    return {name: value for name, value in (values | changes).items() if value is not ...}


def test_worked_example(source: Any, convert: Any) -> None:
    rows = [row(7, answer=" Yes ", answer_type="CLOSED ", question_type="ATRIB, PRES", question="Is it dense?")]
    done = convert(source({"trainset.json": rows, "testset.json": [row(8, "b.jpg")]}, {"images/a.jpg": 1, "b.jpg": 2}))
    sample = done.dataset.samples("train")[0]
    assert sample.turns == (Turn("user", "<image>\nIs it dense?"), Turn("assistant", "Yes"))
    assert (sample.answer_type, sample.question_type, sample.question_type_from) == ("closed", "attribute", "field")
    assert (sample.study_id, sample.language, sample.source, sample.licence) == ("a.jpg", "en", "VQA-RAD", "CC0-1.0")
    assert sample.images[0].sha256 == sha256_bytes(png(1))
    assert (sample.images[0].width, sample.images[0].height) == (64, 48)
    assert sample.id == sample_id("VQA-RAD", sample.images, sample.turns, "7")
    assert done.dataset.image_bytes(sample.images[0]) == png(1)  # unchanged: encoding anew would lose
    assert (done.manifest["source"], done.manifest["licence"]) == ("VQA-RAD", "CC0-1.0")


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"answer": " "}, "blank-answer", "field answer is blank"),
        ({"answer": None}, "blank-answer", "field answer is null"),
        ({"question": ""}, "blank-question", "field question is blank"),
        ({"question": ...}, "bad-row", "field question is missing"),
        ({"answer": ["x"]}, "bad-row", "field answer is a list, not text"),
        ({"answer": True}, "bad-row", "field answer is true or false"),
        ({"image_name": "gone.jpg"}, "missing-image", "images/gone.jpg or gone.jpg"),
        ({"image_name": "../a.jpg"}, "missing-image", "leads out of the source folder"),
        ({"image_name": "broken.jpg"}, "unreadable-image", "broken.jpg: "),
        ({"question": "see <image>"}, "image-marks", "2 <image> marks for 1 images"),
        ({"answer": "no<|im_end|>"}, "special-token", "<|im_end|>"),
    ],
)
def test_a_row_that_cannot_be_used_is_rejected_by_name(
    source: Any, convert: Any, changes: dict[str, Any], reason: str, detail: str
) -> None:
    folder = source({"trainset.json": [row(1), row(2, **changes)], "testset.json": [row(3)]}, {"images/a.jpg": 1})
    (folder / "images/broken.jpg").write_bytes(png(1)[:500])
    done = convert(folder)
    assert done.reasons == {"trainset.json#2": reason}
    assert done.rejects[0].detail.startswith("trainset.json row 2: ")
    assert detail in done.rejects[0].detail
    assert done.rejects[0].stage == "convert"
    assert len(done.samples) == 2


def test_a_row_that_is_no_object(source: Any, convert: Any) -> None:
    done = convert(source({"trainset.json": [row(1), "text", None]}, {"images/a.jpg": 1}))
    assert list(done.reasons.values()) == ["bad-row", "bad-row"]
    assert "is text; an object is expected" in done.rejects[0].detail


def test_missing_types_come_from_rules(source: Any, convert: Any) -> None:
    rows = [row(1, question_type="???", answer_type="", question="Where is it?", answer="left")]
    sample = convert(source({"trainset.json": rows}, {"images/a.jpg": 1})).samples[0]
    assert (sample.question_type, sample.question_type_from, sample.answer_type) == ("position", "rule", "open")


def test_true_repeats_keep_ids_apart_and_the_rest_keep_theirs(source: Any, convert: Any) -> None:
    rows = [row(1), row(1), row(2, question="Is finding 1 seen?")]
    done = convert(source({"trainset.json": rows}, {"images/a.jpg": 1}))
    assert len({s.id for s in done.samples}) == 3
    alone = convert(source({"trainset.json": rows[2:]}, {"images/a.jpg": 1}, name="other"), out="alone")
    assert alone.samples[0].id in {s.id for s in done.samples}


def test_displayed_size_follows_exif(source: Any, convert: Any) -> None:
    folder = source({"trainset.json": [row(1)]}, {"images/a.jpg": 1})
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "JPEG", exif=exif)
    (folder / "images/a.jpg").write_bytes(stream.getvalue())
    done = convert(folder)
    ref = done.samples[0].images[0]
    assert (ref.width, ref.height) == (20, 30)
    assert done.dataset.images(done.samples[0])[0].size == (20, 30)


def test_hub_parquet(tmp_path: Path, convert: Any) -> None:
    folder = tmp_path / "vqa-rad"
    (folder / "data").mkdir(parents=True)
    rows = [
        {"image": {"bytes": png(1), "path": None}, "question": "is there a mass?", "answer": "Yes"},
        {"image": {"bytes": png(1), "path": None}, "question": "is there a mass?", "answer": "Yes"},
        {"image": {"bytes": None, "path": "x.jpg"}, "question": "which plane?", "answer": "axial"},
        {"image": {"bytes": b"no image", "path": None}, "question": "which plane?", "answer": "axial"},
    ]
    for split, part in (("train", rows), ("test", [rows[0] | {"answer": ""}, rows[0] | {"question": "How many?"}])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"data/{split}-00000-of-00001.parquet")
    done = convert(folder, validation_share=0)
    assert {split: c["samples"] for split, c in done.manifest["counts"].items()} == {"train": 2, "test": 1}
    train = "data/train-00000-of-00001.parquet"
    assert done.reasons == {
        f"{train}#3": "missing-image",
        f"{train}#4": "unreadable-image",
        "data/test-00000-of-00001.parquet#1": "blank-answer",
    }
    assert len({s.id for s in done.samples}) == 3
    sample = done.samples[0]
    assert (sample.answer_type, sample.question_type, sample.question_type_from) == ("closed", "presence", "rule")
    assert sample.study_id == sample.images[0].sha256


def test_parquet_is_not_guessed_to_be_vqa_rad(tmp_path: Path, convert: Any) -> None:
    (tmp_path / "some").mkdir()
    pq.write_table(pa.table({"image": [b""], "question": [""], "answer": [""]}), tmp_path / "some/train-0.parquet")
    with pytest.raises(ValueError, match=r"no known format, it holds train-0\.parquet"):
        convert(tmp_path / "some")


def test_parquet_faults(tmp_path: Path, convert: Any) -> None:
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"image": [b""], "text": [""]}), tmp_path / "s/train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: has no column question and no answer"):
        convert(tmp_path / "s", format="vqa-rad")
    (tmp_path / "s/train-0.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train-0\.parquet: is not a Parquet file"):
        convert(tmp_path / "s", format="vqa-rad")


def test_the_real_data(shared_data: Path, convert: Any) -> None:
    done = convert(shared_data / "vqa_rad", validation_share=0)
    train, test = done.dataset.samples("train"), done.dataset.samples("test")
    assert (len(train), len(test), len(done.rejects)) == (3064, 451, 0)
    assert len({s.id for s in done.samples}) == 3515
    train_images = {s.images[0].sha256 for s in train}
    test_images = {s.images[0].sha256 for s in test}
    assert (len(train_images), len(test_images)) == (314, 203)
    assert test_images <= train_images
    assert sum(s.answer in ("2", "4", "12") for s in train) >= 10  # the integers of the source
    questions = {(s.images[0].sha256, s.turns[0].text) for s in train}
    assert len({(s.images[0].sha256, s.turns[0].text) for s in test} & questions) == 14
    assert {s.question_type_from for s in done.samples} == {"field"}
    assert {s.answer_type for s in done.samples} == {"open", "closed"}
    # each image once a split, and the rest of the folder is small
    size = sum((shared_data / "vqa_rad/images" / name).stat().st_size for name in {s.study_id for s in train})
    shards = [shard["bytes"] for shard in done.manifest["shards"] if shard["split"] == "train"]
    assert size < sum(shards) < 1.1 * size
