"""results.json: its contract, its slices, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.dataset import Dataset
from medforge.dataset_writer import write_dataset
from medforge.evaluate import score
from medforge.evaluate.metrics import METRICS, total
from medforge.evaluate.predictions import append
from medforge.files import write_json
from tests.unit.evaluate.examples import answers, prediction

MakeSample = Callable[..., tuple[Any, list[bytes]]]


@pytest.fixture
def folder(tmp_path: Path, make_sample: MakeSample) -> Path:
    """A data set of 6 test and 2 training samples."""
    samples = [make_sample(n, split="test" if n < 6 else "train") for n in range(8)]
    write_dataset(tmp_path / "data", samples, source="unit (generated)")
    return tmp_path / "data"


def files_of(folder: Path, out: Path, arms: dict[str, list[str]], split: str = "test") -> dict[str, Path]:
    """One predictions file for each arm."""
    samples = Dataset.open(folder).samples(split)
    for arm, texts in arms.items():
        append(out / f"{arm}.jsonl", answers(samples, arm, texts))
    return {arm: out / f"{arm}.jsonl" for arm in arms}


def test_results_json_holds_its_contract(folder: Path, tmp_path: Path) -> None:
    leakage = [{"splits": ["train", "test"], "shared_images": 0}]
    write_json(folder / "validation.json", {"leakage": leakage, "counts": {}})
    right = [sample.answer for sample in Dataset.open(folder).samples("test")]
    files = files_of(folder, tmp_path, {"base": ["yes"] * 6, "tuned": right})
    results = score.run(files, folder, tmp_path / "out", {"base": {"digest": "abc"}})
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == results
    assert list(results) == [
        *("schema_version", "dataset", "leakage", "about", "samples", "arms", "paired", "comparison"),
    ]
    assert results["schema_version"] == 1
    assert results["dataset"] == {
        "digest": Dataset.open(folder).digest,
        "source": "unit (generated)",
        "licence": "CC0-1.0",
        "split": "test",
        "generated": True,
    }
    assert results["leakage"] == leakage
    assert results["about"] == {"base": {"digest": "abc"}}
    assert results["samples"] == {"n": 6, "images": 6, "question_type_from": {"field": 6, "rule": 0}}
    for slices in results["arms"].values():
        assert list(slices) == ["all", "answer_type=closed", "question_type=presence"]
        for cells in slices.values():
            assert list(cells) == list(METRICS)
            for cell in cells.values():
                assert set(cell) == ({"value", "n"} if cell["value"] is not None else {"value", "n", "reason"})
    assert results["arms"]["base"]["all"]["exact_match"] == {"value": 0.5, "n": 6}
    assert results["arms"]["tuned"]["all"]["exact_match"] == {"value": 1.0, "n": 6}
    assert results["arms"]["tuned"]["all"]["box_iou"] == {
        "value": None,
        "n": 0,
        "reason": "no reference answer holds a box",
    }


def test_the_order_of_the_rows_does_not_change_a_byte(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder, tmp_path, {"base": ["yes"] * 6})
    score.run(files, folder, tmp_path / "one", {})
    reversed_file = tmp_path / "reversed.jsonl"
    lines = files["base"].read_bytes().splitlines(keepends=True)
    reversed_file.write_bytes(b"".join(reversed(lines)))
    score.run({"base": reversed_file}, folder, tmp_path / "two", {})
    assert (tmp_path / "one" / "results.json").read_bytes() == (tmp_path / "two" / "results.json").read_bytes()


def test_without_validation_json_the_overlap_is_null(folder: Path, tmp_path: Path) -> None:
    results = score.run(files_of(folder, tmp_path, {"base": ["yes"] * 6}), folder, tmp_path, {})
    assert results["leakage"] is None
    assert results["comparison"]["pairs"] == []


def test_the_split_is_that_of_the_samples(folder: Path, tmp_path: Path) -> None:
    results = score.run(files_of(folder, tmp_path, {"base": ["yes"] * 2}, "train"), folder, tmp_path, {})
    assert results["dataset"]["split"] == "train"


def test_predictions_of_another_data_set_are_refused(folder: Path, tmp_path: Path) -> None:
    append(tmp_path / "base.jsonl", [prediction(1)])
    with pytest.raises(ValueError, match="no split holds sample sample-0001"):
        score.run({"base": tmp_path / "base.jsonl"}, folder, tmp_path, {})


def test_arms_must_answer_the_same_samples_with_the_same_references() -> None:
    base = [prediction(n) for n in range(3)]
    tuned = [prediction(n, "tuned") for n in range(3)]
    score.check_paired({"base": base, "tuned": tuned})
    with pytest.raises(ValueError, match=r"sample sample-0002 is in one only \(1 such\)"):
        score.check_paired({"base": base, "tuned": tuned[:2]})
    with pytest.raises(ValueError, match="their order differs"):
        score.check_paired({"base": base, "tuned": tuned[::-1]})
    with pytest.raises(
        ValueError, match="sample sample-0001: field 'reference' is 'yes' in 'base' but 'no' in 'tuned'"
    ):
        score.check_paired({"base": base, "tuned": [tuned[0], prediction(1, "tuned", reference="no"), tuned[2]]})
    with pytest.raises(ValueError, match="no predictions are given"):
        score.check_paired({})


def test_a_file_of_another_arm_of_none_or_with_a_sample_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.jsonl"
    path.touch()
    with pytest.raises(ValueError, match="has no predictions"):
        score.read_arm("base", path)
    append(path, [prediction(1)])
    with pytest.raises(ValueError, match="field 'arm' is 'base', but the file is given as 'tuned'"):
        score.read_arm("tuned", path)
    append(path, [prediction(1, key="another")])
    with pytest.raises(ValueError, match="sample sample-0001 stands twice"):
        score.read_arm("base", path)


def test_slices_by_language_only_where_there_are_several() -> None:
    rows = [prediction(n, question_type="size" if n else "organ", answer_type="open") for n in range(3)]
    assert score.slices(rows) == {
        "all": [0, 1, 2],
        "answer_type=open": [0, 1, 2],
        "question_type=organ": [0],
        "question_type=size": [1, 2],
    }
    assert score.slices([*rows, prediction(3, language="zh")])["language=zh"] == [3]


def test_perplexity_is_of_the_corpus_and_not_a_mean_of_samples() -> None:
    rows = [prediction(1, nll=math.log(2), answer_tokens=1), prediction(2, nll=3 * math.log(8), answer_tokens=3)]
    # (log 2 + 9 log 2) / 4 tokens: 2 ** 2.5; the mean of the samples' perplexities would be 5
    assert total(METRICS["perplexity"], rows) == {"value": pytest.approx(2**2.5), "n": 2}


def test_what_could_not_run_is_null_with_its_reason_and_never_0() -> None:
    cell = total(METRICS["perplexity"], [prediction(1, nll=None)])
    assert cell == {"value": None, "n": 0, "reason": "no prediction has the likelihood of its reference answer"}
    too_much = total(METRICS["perplexity"], [prediction(1, nll=2000.0, answer_tokens=2)])
    assert too_much["value"] is None and "exp(1000)" in too_much["reason"]
    assert total(METRICS["perplexity"], [prediction(1, nll=None), prediction(2, nll=0.0)]) == {"value": 1.0, "n": 1}


def test_length_and_truncation() -> None:
    rows = [prediction(1, generated_tokens=4), prediction(2, generated_tokens=8, finish="length")]
    assert total(METRICS["answer_length"], rows) == {"value": 6.0, "n": 2}
    assert total(METRICS["truncated_rate"], rows) == {"value": 0.5, "n": 2}


@given(st.lists(st.sampled_from(["yes", "no", "", "The lungs appear normal."]), min_size=1, max_size=12), st.randoms())
def test_the_value_does_not_depend_on_the_order(texts: list[str], random: Any) -> None:
    told: dict[str, Any] = {"heads": ("match",), "match_reference": 0.5}
    rows = [
        prediction(n, prediction=text, nll=0.1 * (n + 1), match_wrong=n % 3 / 2, **told) for n, text in enumerate(texts)
    ]
    shuffled = list(rows)
    random.shuffle(shuffled)
    for metric in METRICS.values():
        assert total(metric, rows) == total(metric, shuffled)
