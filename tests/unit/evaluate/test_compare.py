"""Intervals against published figures and exact cases, and when a difference is called one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.evaluate import compare, score
from medforge.evaluate.metrics import METRICS
from tests.unit.evaluate.examples import prediction


def results_of(base: list[str], tuned: list[str], images: int | None = None, **changes: Any) -> dict[str, Any]:
    """Scores of yes/no answers to questions whose reference is yes; `images` spreads them over so many images."""
    arms = {
        arm: [
            prediction(n, arm, prediction=text, images=(f"i{n % (images or len(texts))}",), **changes)
            for n, text in enumerate(texts)
        ]
        for arm, texts in (("base", base), ("tuned", tuned))
    }
    dataset = {"digest": "d" * 64, "source": "unit", "licence": "CC0-1.0", "split": "test", "generated": False}
    return {"dataset": dataset, "leakage": None, "about": {}, **score.score(arms)}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_the_published_interval(successes: int, n: int, low: float, high: float) -> None:
    assert compare.wilson(successes / n, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_value_and_stays_within_0_and_1(pair: tuple[int, int]) -> None:
    low, high = compare.wilson(pair[0] / pair[1], pair[1])
    assert 0.0 <= low <= pair[0] / pair[1] <= high <= 1.0
    mirrored = compare.wilson((pair[1] - pair[0]) / pair[1], pair[1])
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_samples_that_share_an_image_through_others_are_one_cluster() -> None:
    images = [("a",), ("b",), ("c", "a"), ("d",), ("b",), ("e", "c")]
    assert compare.clusters(images) == [0, 1, 0, 2, 1, 0]


def test_the_bootstrap_is_seeded_and_clusters_widen_it() -> None:
    deltas = [1.0, 1.0, 1.0, 0.0, 0.0, -1.0] * 20
    apart = compare.bootstrap(deltas, list(range(120)))
    assert apart is not None and apart == compare.bootstrap(deltas, list(range(120)))
    # the normal interval of the mean is 1/3 +- 1.96 * sd / sqrt(n), sd = sqrt(5/9)
    assert apart == pytest.approx((1 / 3 - 1.96 * 0.7454 / 120**0.5, 1 / 3 + 1.96 * 0.7454 / 120**0.5), abs=0.02)
    together = compare.bootstrap(sorted(deltas), [n // 10 for n in range(120)])
    assert together is not None and together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert compare.bootstrap([1.0, 0.0], [0, 0]) is None
    assert compare.bootstrap([0.5] * 10, list(range(10))) == (0.5, 0.5)


def test_a_clear_difference_is_better_and_its_reverse_worse() -> None:
    some, most = ["yes"] * 10 + ["no"] * 30, ["yes"] * 38 + ["no"] * 2
    better = compare.pair_of(results_of(some, most), "base", "tuned")["all"]["exact_match"]
    assert better["difference"] == pytest.approx(0.7) and better["finding"] == "better" and better["low"] > 0
    worse = compare.pair_of(results_of(most, some), "base", "tuned")["all"]["exact_match"]
    assert worse["finding"] == "worse" and worse["high"] < 0
    assert better["n"] == better["clusters"] == 40


@pytest.mark.parametrize(
    ("base", "tuned", "images"),
    [
        (["no"] * 29, ["yes"] * 29, None),  # n < 30
        (["no"] * 40, ["no"] * 39 + ["yes"], None),  # the interval holds 0
        (["no"] * 40, ["yes"] * 40, 9),  # too few images
        (["no"] * 40, ["no"] * 40, None),
    ],
)
def test_nothing_is_called_better_without_the_evidence(base: list[str], tuned: list[str], images: int | None) -> None:
    results = results_of(base, tuned, images)
    for part in compare.pair_of(results, "base", "tuned").values():
        for cell in part.values():
            assert cell["finding"] == "not-shown"
    assert ", better" not in compare.comparison(results)


def test_one_image_gives_no_interval_but_a_reason() -> None:
    cell = compare.pair_of(results_of(["no"] * 40, ["yes"] * 40, 1), "base", "tuned")["all"]["exact_match"]
    assert cell["low"] is None and cell["reason"] == "all samples are of one image"
    assert cell["difference"] == 1.0 and cell["finding"] == "not-shown"


def test_a_metric_without_samples_has_no_difference() -> None:
    cell = compare.pair_of(results_of(["no"] * 4, ["yes"] * 4, answer_type="open"), "base", "tuned")["all"]
    assert cell["closed_accuracy"] == {
        **dict.fromkeys(("difference", "low", "high")),
        **dict.fromkeys(("n", "clusters"), 0),
        "reason": "no closed question",
    }


def test_the_candidate_is_tuned_against_every_other_arm() -> None:
    arms = {arm: [prediction(n, arm) for n in range(3)] for arm in ("champion", "tuned", "base")}
    pairs = score.score(arms)["comparison"]["pairs"]
    assert [(p["reference"], p["candidate"]) for p in pairs] == [("champion", "tuned"), ("base", "tuned")]
    with pytest.raises(ValueError, match="tuned against champion, tuned against base"):
        compare.pair_of({"comparison": {"pairs": pairs}}, "base", "champion")


def test_comparison_md_has_sound_tables() -> None:
    results = results_of(["yes"] * 10 + ["no"] * 30, ["yes"] * 40, question_type="a|b <i>")
    text = compare.comparison(results)
    assert "| exact_match | 40 | 0.250 (0.142–0.402) | 1.000 (0.912–1.000) | +0.750 |" in text
    assert "a\\|b &lt;i>" in text and "<i>" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "- box_iou (tuned): no reference answer holds a box" in text
    for metric in METRICS:
        assert f"| {metric} |" in text


def test_summary_lines_show_what_ran() -> None:
    lines = compare.summary_lines(results_of(["no"] * 40, ["yes"] * 40))
    assert lines[0].split() == ["n", "base", "tuned"]
    assert ["exact_match", "40", "0.000", "1.000"] in [line.split() for line in lines]
    assert not any(line.startswith("box_iou") for line in lines)
    assert "tuned against base, exact_match: +1.000 to +1.000, better" in lines


def test_an_arm_without_heads_is_compared_with_one_that_has_them() -> None:
    told = {"heads": ("match",), "match_reference": 0.9, "match_wrong": 0.2}
    arms = {
        "base": [prediction(n) for n in range(4)],
        "tuned": [prediction(n, "tuned", **told) for n in range(4)],
    }
    dataset = {"digest": "d" * 64, "source": "unit", "licence": "CC0-1.0", "split": "test", "generated": False}
    results = {"dataset": dataset, "leakage": None, "about": {}, **score.score(arms)}
    text = compare.comparison(results)
    assert "| match_auroc | 0 / 4 | – | 1.000 | – |  |" in text
    assert "- match_auroc (base): the model has no match head" in text
    assert "match_auroc (tuned)" not in text and "- region_iou (tuned): the model has no region head" in text
    (line,) = [line.split() for line in compare.summary_lines(results) if line.startswith("match_false_alarms")]
    assert line == ["match_false_alarms", "4", "–", "0.000"]
