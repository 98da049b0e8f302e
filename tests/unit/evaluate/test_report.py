"""report.html: whole, self-contained, escaped, deterministic, and of a bearable size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medforge.cli import main
from medforge.dataset import Dataset
from medforge.dataset_writer import write_dataset
from medforge.evaluate import plots, report, score
from medforge.evaluate.metrics import METRICS
from medforge.evaluate.pictures import picture
from medforge.evaluate.predictions import Prediction, append
from medforge.records import Box, Turn
from tests.unit.evaluate.examples import answers, prediction

MakeSample = Callable[..., tuple[Any, list[bytes]]]
VOID = {"meta", "img", "link", "br", "hr", "image", "rect"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


class Page(HTMLParser):
    """Collects tags and text, and asserts that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each such tag."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def case(tmp_path: Path, make_sample: MakeSample) -> tuple[Dataset, dict[str, list[Prediction]]]:
    """40 samples; base is right on the first 20, tuned on those from 10 on; the first has boxes and a hostile text."""
    samples = [make_sample(n, split="test", question_type=f"type {n % 3} $x_$") for n in range(40)]
    write_dataset(tmp_path / "data", samples, source="unit <b>&")
    dataset = Dataset.open(tmp_path / "data")
    rows = sorted(dataset.samples("test"), key=lambda sample: sample.id)
    base = [s.answer if n < 20 else "perhaps" for n, s in enumerate(rows)]
    tuned = [s.answer if n >= 10 else HOSTILE for n, s in enumerate(rows)]
    boxes = {"boxes": ((0.1, 0.1, 0.5, 0.5),), "predicted_boxes": ((0.9, 0.2, 0.4, 1.7),)}
    return dataset, {"base": answers(rows, "base", base), "tuned": answers(rows, "tuned", tuned, **boxes)}


@pytest.fixture
def arms(case: tuple[Dataset, dict[str, list[Prediction]]], tmp_path: Path) -> dict[str, Path]:
    """The predictions files of the case; the boxes are in both arms, since references have to agree."""
    _, rows = case
    for arm, predictions in rows.items():
        same = [prediction(**{**row.to_row(), "arm": arm, "boxes": rows["tuned"][0].boxes}) for row in predictions]
        rows[arm] = same
        append(tmp_path / f"{arm}.jsonl", same)
    return {arm: tmp_path / f"{arm}.jsonl" for arm in rows}


CURVES: dict[str, list[dict[str, float]]] = {
    "stage-one": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}],
    "stage-two": [{"step": 1, "loss": 0.9}],
}
VERDICT: dict[str, Any] = {
    "policy": {"name": "strict", "sha256": "f" * 64, "rules": []},
    "candidate": "tuned",
    "reference": "base",
    "passed": False,
    "rules": [
        {"name": "floor", "outcome": "fail", "why": "too <low>", "candidate": {"value": 0.1, "n": 40}},
        {"name": "size", "outcome": "not_enough_evidence", "why": "few", "candidate": {"value": None, "n": 3}},
    ],
}


def write(dataset: Dataset, arms: dict[str, Path], out: Path, **options: Any) -> Page:
    """Score and write the report; returns it parsed."""
    results = score.run(arms, dataset.folder, out, {"tuned": {"digest": "0123abc"}})
    results |= options.pop("changes", {})
    rows = {arm: score.read_arm(arm, path) for arm, path in arms.items()}
    return Page(report.write(results, rows, dataset, out, **options).read_text(encoding="utf-8"))


def test_the_report_is_whole_and_reaches_for_nothing_outside(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], arms, tmp_path / "out", verdict=VERDICT, curves=CURVES)
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    sources = [tag["src"] for tag in page.named("img")] + [tag["href"] for tag in page.named("image")]
    assert len(sources) == 3 + 24
    assert all(
        source and source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in sources
    )
    assert all(tag.get("alt") for tag in page.named("img")) and all(tag.get("aria-label") for tag in page.named("svg"))
    assert page.named("html")[0]["lang"] == "en"
    assert (tmp_path / "out" / "report.html").stat().st_size < 2_000_000
    for text in ("Verdict: ✗ not passed", "too <low>", "? not enough evidence", "0123abc", case[0].digest):
        assert text in page.text
    for heading in ("Mended: base wrong, tuned right", "Broken: base right, tuned wrong", "Right in both"):
        assert heading in page.text
    assert "✓ right" in page.text and "✗ wrong" in page.text
    assert (tmp_path / "out" / "comparison.md").read_text().startswith("# tuned against base")


def test_what_a_model_wrote_is_shown_and_not_run(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], arms, tmp_path / "out")
    assert HOSTILE in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "unit <b>&" in page.text and not page.named("b")


def test_boxes_are_drawn_inside_the_picture(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], arms, tmp_path / "out", samples=1)
    drawn = [
        {k: tag[k] for k in ("x", "y", "width", "height")} for tag in page.named("rect") if tag["class"] != "under"
    ]
    # the picture is 64 x 48; the predicted box is inverted in x and reaches below the image
    assert drawn == [
        {"x": "6.4", "y": "4.8", "width": "25.6", "height": "19.2"},
        {"x": "25.6", "y": "9.6", "width": "32.0", "height": "38.4"},
    ]
    assert "reference (white, solid); tuned (blue, dashed)" in page.text


def test_the_same_inputs_give_the_same_bytes(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    for out in ("one", "two"):
        write(case[0], arms, tmp_path / out, verdict=VERDICT, curves=CURVES)
    for name in ("report.html", "comparison.md", "results.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("leakage", "said"),
    [
        (None, "Overlap not checked."),
        (
            [{"splits": ["train", "test"], "shared_images": 7, "shared_studies": 2}],
            "7 images and 2 studies stand in both",
        ),
        ([{"splits": ["train", "validation"], "shared_images": 7, "shared_studies": 2}], ""),
        ([{"splits": ["train", "test"], "shared_images": 0, "shared_studies": 0}], ""),
    ],
)
def test_the_banner_of_overlap(
    case: tuple[Dataset, dict[str, list[Prediction]]],
    arms: dict[str, Path],
    tmp_path: Path,
    leakage: list[dict[str, Any]] | None,
    said: str,
) -> None:
    rows = leakage and [row | {"samples": {"train": 1, "test": 1}, "advice": "mend it"} for row in leakage]
    page = write(case[0], arms, tmp_path / "out", samples=0, changes={"leakage": rows})
    banners = [tag for tag in page.named("div") if tag.get("class") == "banner"]
    assert len(banners) == bool(said)
    assert said in page.text


def test_generated_data_says_so(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    data = {"digest": "d", "source": "phantom (generated)", "licence": "x", "split": "test", "generated": True}
    assert "they say nothing about medical images" not in write(case[0], arms, tmp_path / "one", samples=0).text
    page = write(case[0], arms, tmp_path / "two", samples=0, changes={"dataset": data})
    assert "they say nothing about medical images" in page.text


def test_pictures_beyond_the_budget_are_left_out_and_told(
    case: tuple[Dataset, dict[str, list[Prediction]]],
    arms: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "_PICTURE_BYTES", 20_000)
    page = write(case[0], arms, tmp_path / "out", samples=40)
    shown = len(page.named("article"))
    assert 0 < shown < 40
    assert f"{40 - shown} more were left out" in page.text


def test_cases_are_shared_out_between_the_categories() -> None:
    # 2 mended, 1 broken, 5 wrong in both, none right in both
    base = [prediction(n, prediction="yes" if n == 2 else "no") for n in range(8)]
    tuned = [prediction(n, "tuned", prediction="yes" if n < 2 else "no") for n in range(8)]
    chosen = report.choose({"base": base, "tuned": tuned}, ("base", "tuned"), 6)
    assert [(title.split(":")[0], rows[0].id[-1]) for title, rows in chosen] == [
        *[("Mended", "0"), ("Mended", "1"), ("Broken", "2")],
        *[("Wrong in both", "3"), ("Wrong in both", "4"), ("Wrong in both", "5")],
    ]
    assert report.choose({"base": base, "tuned": tuned}, ("base", "tuned"), 0) == []
    assert len(report.choose({"base": base, "tuned": tuned}, ("base", "tuned"), 99)) == 8


def test_a_single_arm_has_a_report_without_comparison(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], {"base": arms["base"]}, tmp_path / "out")
    assert "95% interval of the difference" not in page.text
    assert not (tmp_path / "out" / "comparison.md").exists()
    assert {"Wrong", "Right"} <= set(re.split(r"\n", page.text))


def test_plots_of_nothing_are_none_and_others_are_png() -> None:
    assert plots.loss_curves({}) is None
    assert plots.loss_curves({"stage": [{"step": 1, "note": 2}]}) is None
    rows = {"base": [prediction(1, reference="<|box:0|>", boxes=((0, 0, 1, 1),), generated_tokens=0)]}
    assert plots.accuracy_by_type(score.score(rows)) is None
    assert plots.answer_lengths(rows).startswith(b"\x89PNG")


def test_the_command_writes_all_three(
    case: tuple[Dataset, dict[str, list[Prediction]]],
    arms: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "curve.json").write_text(json.dumps(CURVES["stage-one"]))
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT))
    given = [f"--predictions={arm}={path}" for arm, path in arms.items()]
    given += [f"--curves=stage-one={tmp_path / 'curve.json'}", f"--verdict={tmp_path / 'verdict.json'}"]
    out = tmp_path / "out"
    assert main(["evaluate", "score", *given, str(case[0].folder), str(out), "--samples=2"]) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "comparison.md", "report.html"}
    printed = capsys.readouterr().out
    assert "exact_match" in printed and "tuned against base" in printed
    assert len(Page((out / "report.html").read_text()).named("article")) == 2


@pytest.fixture
def headed(case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """The same arms, `tuned` with heads: 20 samples have a box to find, with an IoU of 0, 1/19, … 1."""
    _, rows = case
    tuned = []
    for number, row in enumerate(rows["tuned"]):
        told: dict[str, Any] = {"heads": ("region", "match"), "region": (0.0, 0.0, 1.0, 0.5), "match": 0.75}
        if number < 20:
            told["region_target"] = (0.0, 0.0, number / 19, 0.5) if number else (0.0, 0.6, 1.0, 1.0)
            told |= {"match_reference": 0.5 + number / 40, "match_wrong": 0.6 - number / 40}
        tuned.append(prediction(**{**row.to_row(), **told}))
    append(tmp_path / "headed.jsonl", tuned)
    return {"base": arms["base"], "tuned": tmp_path / "headed.jsonl"}


def test_region_and_match_figures_have_a_section_where_an_arm_has_heads(
    case: tuple[Dataset, dict[str, list[Prediction]]], headed: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], headed, tmp_path / "out", curves=CURVES, samples=4)
    section = page.text[page.text.index("Locate and verify") : page.text.index("Plots\n")]
    rows = {line.strip() for line in section.splitlines()}
    assert {"region_iou", "region_at_50", "match_auroc", "match_recall", "match_false_alarms"} <= {
        name for name in METRICS if any(row.startswith(name) for row in rows)
    }
    assert "0.500" in section  # the mean of the IoUs
    titles = [tag["alt"] for tag in page.named("img")]
    assert sum("Match scores" in str(title) or "ROC curve" in str(title) for title in titles) == 2
    shown = [str(tag["aria-label"]) for tag in page.named("article")]
    located = [label for label in shown if label.startswith("Region of case")]
    assert len(located) == 8 and len(shown) == 8 + 4
    ious = re.findall(r"IoU of the region\s*([\d.]+)", section)
    assert ious == sorted(ious) and (ious[0], ious[-1]) == ("0.00", "1.00")
    assert "tuned, region head (pink, long dashes)" in section and "reference (white, solid)" in section
    assert page.text.count("match_auroc (base): the model has no match head") == 1


def test_the_section_draws_the_heads_box_and_its_target(
    case: tuple[Dataset, dict[str, list[Prediction]]], headed: dict[str, Path], tmp_path: Path
) -> None:
    rows = score.read_arm("tuned", headed["tuned"])
    row = prediction(**{**rows[19].to_row(), "boxes": ()})
    sample = next(sample for sample in case[0].samples("test") if sample.id == row.id)
    drawn = picture(case[0], sample, [row], 0)
    assert drawn is not None
    places = {box["who"]: tuple(box[name] for name in ("x", "y", "width", "height")) for box in drawn["boxes"]}
    # the picture is 64 x 48; the answer names no box, so the reference is what the head was to find
    assert places["reference"] == places["tuned, region head"] == (0.0, 0.0, 64.0, 24.0)
    assert places["tuned"] == (25.6, 9.6, 32.0, 38.4)


def test_boxes_of_another_image_are_drawn_on_that_image(tmp_path: Path, make_sample: MakeSample) -> None:
    (one, (first,)), (_, (second,)) = make_sample(0, split="test"), make_sample(1)
    two = (one.images[0], make_sample(1)[0].images[0])
    turns = (Turn("user", "<image> and <image>\nWhere?"), Turn("assistant", "<|box:0|>"))
    there = replace(one, images=two, turns=turns, boxes=(Box("it", (0.5, 0.5, 1.0, 1.0), image=1),))
    write_dataset(tmp_path / "data", [(there, [first, second])])
    dataset = Dataset.open(tmp_path / "data")
    row = prediction(boxes=(there.boxes[0].xyxy,), heads=("region",), region=(0.0, 0.0, 0.5, 0.5))
    shown = [picture(dataset, there, [row], number) for number in (0, 1)]
    assert [[box["who"] for box in drawn["boxes"]] for drawn in shown if drawn] == [
        ["base, region head"],
        ["reference"],
    ]
    assert [drawn["more"] for drawn in shown if drawn] == ["image 1 of 2", "image 2 of 2"]
    assert shown[0] and shown[1] and shown[0]["src"] != shown[1]["src"]


def test_without_heads_there_is_no_section(
    case: tuple[Dataset, dict[str, list[Prediction]]], arms: dict[str, Path], tmp_path: Path
) -> None:
    page = write(case[0], arms, tmp_path / "out")
    assert "Locate and verify" not in page.text
    assert "match_auroc: the model has no match head" in page.text
    assert "match_auroc (base)" not in page.text


def test_scores_of_one_kind_have_a_histogram_but_no_curve() -> None:
    rows = {"base": [prediction(1)], "tuned": [prediction(1, "tuned", heads=("match",), match_reference=0.7)]}
    assert plots.roc_curves(rows) is None
    drawn = plots.match_histograms(rows)
    assert drawn is not None and drawn.startswith(b"\x89PNG")
    assert plots.match_histograms({"base": rows["base"]}) is None


@pytest.mark.parametrize("option", ["base", "=x", "base=", "Base=x", "b:c=x"])
def test_a_malformed_arm_is_told(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "score", f"--predictions={option}", str(tmp_path), str(tmp_path)]) == 1
    assert "NAME=FILE" in capsys.readouterr().err
    twice = ["--predictions=base=x", "--predictions=base=y"]
    assert main(["evaluate", "score", *twice, str(tmp_path), str(tmp_path)]) == 1
    assert "names 'base' twice" in capsys.readouterr().err
