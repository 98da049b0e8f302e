from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medforge.config import DataConfig
from medforge.convert import boxes, run
from medforge.convert.common import UNSPLIT, RowError
from medforge.convert.conversations import split_of
from medforge.dataset import Dataset
from medforge.records import IMAGE_MARK, Box, Turn, problems
from tests.conftest import png


def talk(*texts: str) -> list[dict[str, str]]:
    """A LLaVA conversation of these turns, human first."""
    return [{"from": "human" if n % 2 == 0 else "gpt", "value": text} for n, text in enumerate(texts)]


def one(source: Any, convert: Any, row: dict[str, Any], **files: Any) -> Any:
    """The one sample that `row` becomes beside images a.png and images/b.png."""
    folder = source({"train.json": [row], **files}, {"a.png": 1, "images/b.png": 2})
    done = convert(folder, format="conversations")
    assert not done.rejects
    return done.samples[0]


def reason(source: Any, convert: Any, row: Any) -> tuple[str, str]:
    """Why `row` is rejected beside a sound row."""
    good = {"image": "a.png", "conversations": talk("Sound?", "yes")}
    folder = source({"train.json": [good, row]}, {"a.png": 1, "images/b.png": 2})
    done = convert(folder, format="conversations")
    assert [r.id for r in done.rejects] == ["train.json#2"]
    return done.rejects[0].reason, done.rejects[0].detail


def test_llava_worked_example(source: Any, convert: Any) -> None:
    row = {
        "id": "17506892_F1",
        "image": "b.png",
        "conversatons": talk("<image>\nWhere is it? ", "Left lobe.", "Sure?", "Yes."),
        "study_id": "S1",
        "question_type": "Position",
        "target_diag": "nodule",
    }
    sample = one(source, convert, row)
    assert sample.turns == (
        Turn("user", "<image>\nWhere is it?"),
        Turn("assistant", "Left lobe."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    assert (sample.study_id, sample.source, sample.licence) == ("S1", "source", "unknown")
    assert (sample.question_type, sample.question_type_from, sample.answer_type) == ("position", "field", "closed")
    assert (sample.language, sample.target_diagnosis) == ("en", "nodule")


def test_messages_with_parts_several_images_and_a_system_turn(source: Any, convert: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "now?"}]
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "larger"},
        ],
        "images": ["a.png", "images/b.png"],
    }
    sample = one(source, convert, row)
    assert [turn.text for turn in sample.turns] == ["Be brief.", "<image>\nbefore\n<image>\nnow?", "larger"]
    assert len(sample.images) == 2
    assert (sample.question_type_from, sample.answer_type, sample.study_id) == ("rule", "open", "a.png")


def test_images_inside_the_content(source: Any, convert: Any) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "lung"}]}
    assert len(one(source, convert, row).images) == 1


def test_marks_are_put_before_the_first_user_turn(source: Any, convert: Any) -> None:
    row = {"image": ["a.png", "b.png"], "conversations": talk("Compare.", "same")}
    assert one(source, convert, row).turns[0].text == "<image>\n<image>\nCompare."


def test_a_mark_at_the_end_stays_there(source: Any, convert: Any) -> None:
    row = {"image": "a.png", "conversations": talk("What is it?\n<image>", "a lung")}
    assert one(source, convert, row).turns[0].text == "What is it?\n<image>"


def test_absolute_paths_are_rebased(source: Any, convert: Any) -> None:
    for path in ("/mnt/x/source/images/b.png", "/b.png", "C:\\data\\images\\b.png", "file:///data/b.png"):
        sample = one(source, convert, {"image": path, "conversations": talk("?!", "no")})
        assert (
            sample.images[0].sha256
            == one(source, convert, {"image": "b.png", "conversations": talk("?!", "no")}).images[0].sha256
        ), path
        assert sample.study_id == "b.png"


def test_two_absolute_paths_to_one_file_are_ambiguous(source: Any, convert: Any) -> None:
    rows = [{"image": f"/data/{patient}/1.png", "conversations": talk("Which?", patient)} for patient in ("p1", "p2")]
    done = convert(source({"train.json": rows}, {"images/1.png": 1}))
    assert [r.reason for r in done.rejects] == ["ambiguous-image"]


def test_med_grit_pairs(source: Any, convert: Any) -> None:
    row = {"id": "a", "conversations": [["<image> Where?", "here <ref>liver</ref><box>(100,200),(300,400)</box>"]]}
    sample = one(source, convert, row)
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert sample.turns[1].text == "here <|box:0|>"
    assert sample.boxes == (Box("liver", (0.1, 0.2, 0.3, 0.4), 0),)


def test_a_row_without_images_is_text_only(source: Any, convert: Any) -> None:
    sample = one(source, convert, {"conversations": talk("What is a nodule?", "A small round spot.")})
    assert sample.images == ()
    assert sample.study_id == sample.id


def test_llama_factory_tags_and_columns(source: Any, convert: Any) -> None:
    info = {
        "mine": {
            "file_name": "mine.json",
            "formatting": "sharegpt",
            "columns": {"messages": "dialogue", "images": "pics", "system": "rule"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "Q", "assistant_tag": "A"},
        },
        "absent": {"file_name": "absent.json", "formatting": "alpaca"},
    }
    row = {
        "dialogue": [{"who": "Q", "said": "Is it large?"}, {"who": "A", "said": "no"}],
        "pics": ["/abs/a.png"],
        "rule": "Be brief.",
    }
    folder = source({"mine.json": [row], "dataset_info.json": info, "other.json": "{"}, {"a.png": 1})
    done = convert(folder, format="conversations")
    assert [turn.role for turn in done.samples[0].turns] == ["system", "user", "assistant"]


def test_dataset_info_faults(source: Any, convert: Any) -> None:
    alpaca = {"mine": {"file_name": "mine.json"}}
    with pytest.raises(ValueError, match="mine: formatting is alpaca; only sharegpt"):
        convert(source({"mine.json": [], "dataset_info.json": alpaca}), format="conversations")
    with pytest.raises(ValueError, match="none of its entries names a file"):
        convert(source({"dataset_info.json": {"x": {"file_name": "gone.json"}}}), format="conversations")


@pytest.mark.parametrize(
    ("row", "expected", "detail"),
    [
        ("text", "bad-row", "is no object"),
        ({"image": "a.png"}, "bad-row", "field conversations or conversatons or messages is missing"),
        ({"image": "a.png", "conversations": []}, "bad-row", "no list of turns"),
        ({"image": "a.png", "conversations": ["x"]}, "bad-row", "turn 1 is neither"),
        ({"image": "a.png", "conversations": [{"x": 1}]}, "bad-row", "has the keys ['x']"),
        ({"image": "a.png", "conversations": [{"from": "tool", "value": ""}]}, "bad-role", "from is 'tool'"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": 3}]}, "bad-row", "neither text nor a list"),
        ({"image": 5, "conversations": talk("a", "b")}, "bad-row", "field image is neither a path"),
        ({"image": "c.png", "conversations": talk("a", "b")}, "missing-image", "c.png or images/c.png"),
        ({"image": "/d/c.png", "conversations": talk("a", "b")}, "missing-image", "nor images/c.png"),
        ({"image": "a.png", "conversations": talk("<image><image>a", "b")}, "image-marks", "2 <image> marks for 1"),
        ({"image": "a.png", "conversations": talk("a", "b <image>")}, "image-marks", "assistant turn"),
        ({"image": "a.png", "conversations": talk("<image>", "b")}, "blank-question", "blank"),
        ({"image": "a.png", "conversations": talk("a", " ")}, "blank-answer", "blank"),
        ({"image": "a.png", "conversations": talk("a")}, "blank-answer", "the last turn is the user's"),
        ({"image": "a.png", "conversations": talk("a", "b <|box:0|>")}, "special-token", "<|box:0|>"),
        ({"image": "a.png", "conversations": talk("a", "<box>(1,2)</box>")}, "bad-box", "<box> belongs to no box"),
        ({"image": "a.png", "conversations": talk("a", "<box>(9,9),(5,5)</box>")}, "box-range", "x1<x2"),
        ({"image": "a.png", "conversations": talk("a", "<box>(1,2),(3,4000)</box>")}, "box-range", "0–1"),
        ({"image": "a.png", "conversations": talk("a", "<box>(1.2.3,2),(3,4)</box>")}, "bad-box", "no number"),
    ],
)
def test_rejects(source: Any, convert: Any, row: Any, expected: str, detail: str) -> None:
    found = reason(source, convert, row)
    assert found[0] == expected
    assert detail in found[1]


def test_json_lines(source: Any, convert: Any) -> None:
    good = json.dumps({"image": "a.png", "conversations": talk("Sound?", "是")})
    folder = source({"dev.jsonl": f"{good}\n\n{good[:30]}\n{good}\n"}, {"a.png": 1})
    done = convert(folder)
    assert done.reasons == {"dev.jsonl#2": "bad-row"}
    assert "is not valid JSON" in done.rejects[0].detail
    assert [s.split for s in done.samples] == ["validation", "validation"]
    single = convert(folder / "dev.jsonl", out="single")
    assert single.manifest["source"] == "dev"
    assert len(single.samples) == 2


def test_splits_by_names_of_files(source: Any, convert: Any) -> None:
    rows = {f"{name}.json": [{"image": "a.png", "conversations": talk(name, "no")}] for name in ("train", "test", "x")}
    done = convert(source(rows, {"a.png": 1}))
    assert {s.question: s.split for s in done.samples} == {"train": "train", "test": "test", "x": "train"}


def test_without_names_studies_are_dealt(source: Any, convert: Any) -> None:
    rows = [{"image": f"{n}.png", "conversations": talk(f"Q{n}", "no")} for n in range(40)]
    folder = source({"data.json": rows}, {f"{n}.png": n for n in range(40)})
    counts = convert(folder, test_share=0.25, validation_share=0.25).manifest["counts"]
    assert set(counts) == {"train", "validation", "test"}
    assert sum(count["samples"] for count in counts.values()) == 40


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.json", "train"),
        ("trainset.json", "train"),
        ("llava_med_train_60k.json", "train"),
        ("val2017.jsonl", "validation"),
        ("dev.json", "validation"),
        ("validation.json", "validation"),
        ("tests.json", "test"),
        ("device.json", UNSPLIT),
        ("contest.json", UNSPLIT),
    ],
)
def test_split_of(name: str, split: str) -> None:
    assert split_of(name) == split


def test_a_name_with_two_splits() -> None:
    with pytest.raises(ValueError, match=r"train_val\.json: .* train and validation; rename it"):
        split_of("train_val.json")


def test_boxes_in_both_notations_and_scales() -> None:
    turns = (
        Turn("user", "<image>and<image> find <|object_ref_start|>the mass<|object_ref_end|>"),
        Turn("assistant", "<|object_ref_start|>mass<|object_ref_end|><|box_start|>(0,1),(500,1000)<|box_end|>"),
        Turn("assistant", "<ref>a</ref><box>(1,2),(3,4)</box> <box>(5,6),(7,8)</box>, <box>(9,9),(10,10)</box>"),
    )
    marked, found = boxes.extract(turns)
    assert [turn.text for turn in marked] == [
        "<image>and<image> find the mass",
        "<|box:0|>",
        "<|box:1|> <|box:2|>, <|box:3|>",
    ]
    assert found == (
        Box("mass", (0.0, 0.001, 0.5, 1.0), 1),
        Box("a", (0.001, 0.002, 0.003, 0.004), 1),
        Box("a", (0.005, 0.006, 0.007, 0.008), 1),
        Box("", (0.009, 0.009, 0.01, 0.01), 1),
    )
    _, found = boxes.extract((Turn("user", "<box>(0.25,0),(0.5,1)</box>"),))
    assert found[0].xyxy == (0.25, 0.0, 0.5, 1.0)


WORDS = st.text(st.sampled_from("ab <>|()[]01,.\nref肺"), max_size=30)


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_no_notation_survives_extraction(texts: list[str]) -> None:
    turns = tuple(Turn("user", text.replace("ab", "<box>(1,2),(3,4)</box>")) for text in texts)
    try:
        marked, found = boxes.extract(turns)
    except RowError as error:
        assert error.reason in ("bad-box", "special-token")
        return
    assert not re.search(r"</?box>|</?ref>|<\|box_", "".join(turn.text for turn in marked))
    assert sum(turn.text.count("<|box:") for turn in marked) == len(found)


VALUE = st.one_of(WORDS, st.none(), st.integers(), st.lists(WORDS, max_size=2))
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "tool"])}, optional={"value": VALUE, "content": VALUE}
)
ROW = st.one_of(
    VALUE,
    st.fixed_dictionaries(
        {},
        optional={
            "id": VALUE,
            "image": st.one_of(VALUE, st.sampled_from(["a.png", ["a.png"]])),
            "conversations": st.one_of(VALUE, st.lists(TURN, max_size=4)),
            "study_id": VALUE,
        },
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, max_size=6))
def test_every_row_is_a_sound_sample_or_a_reject(rows: list[Any], tmp_path: Path) -> None:
    good = {"image": "a.png", "conversations": talk("Sound?", "yes")}
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "train.json").write_text(json.dumps([good, *rows]), "utf-8")
    run(str(tmp_path / "train.json"), tmp_path / "out", DataConfig(format="conversations"))
    dataset = Dataset.open(tmp_path / "out")
    samples = [s for split in dataset.splits() for s in dataset.samples(split)]
    assert len(samples) + len(dataset.rejects()) == 1 + len(rows)
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        assert problems(sample) == []
        assert sum(turn.text.count(IMAGE_MARK) for turn in sample.turns) == len(sample.images)
