"""The predictions file: append, resume after a crash, refuse what is broken, seal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medforge.evaluate.predictions import append, missing, prediction_from_row, prediction_key, read, seal
from tests.unit.evaluate.examples import prediction

ROWS = [prediction(n, prediction="右肺 “ok”", boxes=((0.1, 0.2, 0.3, 0.4),), nll=0.1 * n) for n in range(5)]
KEYS = [row.key for row in ROWS]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "base.jsonl"
    append(path, ROWS[:2])
    append(path, [])
    append(path, ROWS[2:])
    assert read(path) == ROWS
    assert path.read_bytes().count(b"\n") == len(ROWS)


def test_the_key_depends_on_sample_arm_model_and_settings() -> None:
    first = prediction_key("s", "base", "m", {"a": 1, "b": 2})
    assert first == prediction_key("s", "base", "m", {"b": 2, "a": 1})
    others = {
        prediction_key("t", "base", "m", {"a": 1, "b": 2}),
        prediction_key("s", "tuned", "m", {"a": 1, "b": 2}),
        prediction_key("s", "base", "n", {"a": 1, "b": 2}),
        prediction_key("s", "base", "m", {"a": 1, "b": 3}),
    }
    assert len(others | {first}) == 5


def test_a_crash_anywhere_in_the_last_row_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    append(whole, ROWS)
    seal(whole, KEYS)
    data = whole.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    torn = tmp_path / "torn.jsonl"
    for end in (*range(start, len(data) - 3, 29), *range(len(data) - 3, len(data) + 1)):
        torn.write_bytes(data[:end])
        todo = missing(torn, KEYS)
        assert todo in ([KEYS[-1]], [])
        append(torn, [row for row in ROWS if row.key in todo])
        seal(torn, KEYS)
        assert torn.read_bytes() == data, end


def test_a_torn_row_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "base.jsonl"
    append(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert read(path) == ROWS[:-1]
    assert "line 5 is torn" in capsys.readouterr().err


def test_rows_in_another_order_and_of_other_settings_seal_to_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    append(one, ROWS)
    append(other, [prediction(77), *reversed(ROWS)])
    seal(one, KEYS)
    assert seal(other, KEYS) == ROWS
    assert one.read_bytes() == other.read_bytes()


def test_sealing_an_unfinished_file_is_refused_and_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    append(path, ROWS[1:])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"1 of 5 predictions are missing; first: {KEYS[0]}"):
        seal(path, KEYS)
    assert path.read_bytes() == before


def test_of_two_rows_with_one_key_the_first_counts(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    append(path, [prediction(1, prediction="first"), prediction(1, prediction="second")])
    assert [row.prediction for row in read(path)] == ["first"]


def test_missing_of_no_file_is_everything(tmp_path: Path) -> None:
    assert missing(tmp_path / "none.jsonl", KEYS) == KEYS
    with pytest.raises(ValueError, match="is not a predictions file"):
        read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("broken", [b'{"key": "x"', b"\xff\xfe", b"[]", b"{}"])
def test_a_broken_row_elsewhere_is_refused_by_line(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "base.jsonl"
    append(path, ROWS)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], broken, *lines[2:]]))
    with pytest.raises(ValueError, match=r"base\.jsonl: line 3: "):
        read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("nll", value) for value in (-1.0, float("nan"), float("inf"), "1", True)],
        *[("answer_tokens", value) for value in (0, 1.5, None)],
        ("generated_tokens", -1),
        ("finish", "eos"),
        ("answer_type", "OPEN"),
        ("question_type_from", "guess"),
        ("prediction", None),
        ("reference", " "),
        ("boxes", [[0, 0, 1]]),
        ("boxes", None),
        ("predicted_boxes", [[0, 0, 1, float("nan")]]),
        ("images", "abc"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    row = json.loads(json.dumps(prediction().to_row()))
    assert prediction_from_row(row) == prediction()
    with pytest.raises(ValueError, match=f"field '{field}'"):
        prediction_from_row(row | {field: value})


HEADED = prediction(
    heads=("region", "match"), region=(0.0, 0.1, 0.5, 1.0), region_target=None, match=0.25, match_reference=1.0
)


def test_rows_of_a_model_with_heads_are_read_back_and_others_lack_the_fields(tmp_path: Path) -> None:
    append(tmp_path / "tuned.jsonl", [HEADED, prediction(1)])
    assert read(tmp_path / "tuned.jsonl") == [HEADED, prediction(1)]
    first, second = [json.loads(line) for line in (tmp_path / "tuned.jsonl").read_text().splitlines()]
    assert first["match_wrong"] is None and first["heads"] == ["region", "match"]
    added = {"heads", "region", "region_target", "match", "match_reference", "match_wrong"}
    assert set(first) - set(second) == added


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("heads", value) for value in ("match", ["eyes"], [["match"]], 1)],
        *[("region", value) for value in ([0, 0, 1], 0.5, [0, 0, 1, float("nan")])],
        ("region_target", "left"),
        *[("match", value) for value in (1.5, -0.1, "0.5", True, float("nan"))],
        ("match_wrong", [0.5]),
    ],
)
def test_a_wrong_field_of_a_head_is_named(field: str, value: Any) -> None:
    row = json.loads(json.dumps(HEADED.to_row()))
    assert prediction_from_row(row) == HEADED
    with pytest.raises(ValueError, match=f"field '{field}'"):
        prediction_from_row(row | {field: value})


def test_a_head_that_is_not_there_cannot_have_spoken() -> None:
    row = HEADED.to_row()
    with pytest.raises(ValueError, match=r"field 'match' is 0\.25, but field 'heads' names no such head"):
        prediction_from_row(row | {"heads": ["region"]})
    del row["region"]
    with pytest.raises(ValueError, match="field 'region' is missing"):
        prediction_from_row(row)


def test_a_field_too_few_or_too_many_is_named() -> None:
    row = prediction().to_row()
    with pytest.raises(ValueError, match="'extra' is not part"):
        prediction_from_row(row | {"extra": 1})
    del row["nll"]
    with pytest.raises(ValueError, match="'nll' is missing"):
        prediction_from_row(row)
