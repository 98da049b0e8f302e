"""The verdict, against cases worked by hand and against properties that every policy has."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medforge.config import PolicyConfig, RuleConfig
from medforge.release.policy import failed_rules, judge, verdict_markdown


def _results(tuned: Any, base: Any, n: Any = 100, base_n: Any = None) -> dict[str, Any]:
    def arm(value: Any, count: Any) -> dict[str, Any]:
        return {"all": {"exact_match": {"value": value, "n": count}}}

    return {"arms": {"tuned": arm(tuned, n), "base": arm(base, n if base_n is None else base_n)}}


def _policy(**rule: Any) -> PolicyConfig:
    return PolicyConfig(name="unit", rules=[RuleConfig(name="rule", metric="exact_match", **rule)])


@pytest.mark.parametrize(
    ("tuned", "base", "rule", "outcome"),
    [
        (0.80, 0.1, {"bound": 0.8}, "pass"),
        (0.79, 0.1, {"bound": 0.8}, "fail"),
        (0.30, 0.1, {"bound": 0.3, "direction": "lower"}, "pass"),
        (0.31, 0.1, {"bound": 0.3, "direction": "lower"}, "fail"),
        (0.95, 0.9, {"margin": 0.05}, "pass"),  # 0.95 - 0.9 < 0.05 in floating point
        (0.9499, 0.9, {"margin": 0.05}, "fail"),
        (0.90, 0.95, {"margin": 0.05, "direction": "lower"}, "pass"),
        (0.95, 0.90, {"margin": 0.05, "direction": "lower"}, "fail"),
        (0.88, 0.90, {"margin": -0.02}, "pass"),  # no more than two points worse
        (0.87, 0.90, {"margin": -0.02}, "fail"),
        (0.90, 0.5, {"bound": 0.8, "margin": 0.5}, "fail"),
        (0.70, 0.1, {"bound": 0.8, "margin": 0.5}, "fail"),
        (0.90, 0.1, {"bound": 0.8, "margin": 0.5}, "pass"),
        (1, 0, {"bound": 1}, "pass"),  # whole numbers are numbers
    ],
)
def test_bounds_and_margins(tuned: float, base: float, rule: dict[str, Any], outcome: str) -> None:
    verdict = judge(_results(tuned, base), _policy(**rule))
    assert verdict["rules"][0]["outcome"] == outcome
    assert verdict["passed"] is (outcome == "pass")
    assert verdict["rules"][0]["candidate"] == {"value": tuned, "n": 100}
    assert verdict["rules"][0]["reference"] == {"value": base, "n": 100}


@pytest.mark.parametrize(
    ("results", "rule", "why"),
    [
        (_results(0.9, 0.1, n=29), {"bound": 0.1}, "29 samples; the rule asks for 30"),
        (_results(None, 0.1), {"bound": 0.1}, "has no figure"),
        (_results(math.nan, 0.1), {"bound": 0.1}, "not a finite number"),
        (_results(math.inf, 0.1), {"bound": 0.1}, "not a finite number"),
        (_results("0.9", 0.1), {"bound": 0.1}, "not a finite number"),
        (_results(True, 0.1), {"bound": 0.1}, "not a finite number"),
        (_results(0.9, 0.1, n=None), {"bound": 0.1}, "number of samples"),
        (_results(0.9, 0.1), {"bound": 0.1, "slice": "answer_type=closed"}, "no 'answer_type=closed'"),
        (_results(0.9, None), {"margin": 0.1}, "base has no figure"),
        (_results(0.9, 0.1, base_n=99), {"margin": 0.1}, "tuned has 100 samples and base 99"),
        ({"arms": {"tuned": _results(0.9, 0.1)["arms"]["tuned"]}}, {"margin": 0.1}, "base is not in the results"),
        ({"arms": {}}, {"bound": 0.1}, "tuned is not in the results"),
    ],
)
def test_missing_evidence_never_passes(results: dict[str, Any], rule: dict[str, Any], why: str) -> None:
    verdict = judge(results, _policy(**rule))
    assert verdict["rules"][0]["outcome"] == "not_enough_evidence"
    assert why in verdict["rules"][0]["why"]
    assert not verdict["passed"]
    json.dumps(verdict, allow_nan=False)


def test_the_reference_is_not_needed_without_a_margin() -> None:
    results = {"arms": {"tuned": _results(0.9, 0.1)["arms"]["tuned"]}}
    verdict = judge(results, _policy(bound=0.5))
    assert verdict["passed"]
    assert verdict["rules"][0]["reference"] == {"value": None, "n": 0}


def test_the_reason_of_a_missing_figure_is_told() -> None:
    results = _results(0.9, 0.1)
    results["arms"]["tuned"]["all"]["exact_match"] = {"value": None, "n": 100, "reason": "no boxes"}
    assert "no boxes" in judge(results, _policy(bound=0.5))["rules"][0]["why"]


def test_every_rule_must_pass() -> None:
    good, bad = (RuleConfig(name=n, metric="exact_match", bound=b) for n, b in (("good", 0.5), ("bad", 0.95)))
    verdict = judge(_results(0.9, 0.1), PolicyConfig(name="both", rules=[good, bad]))
    assert [rule["outcome"] for rule in verdict["rules"]] == ["pass", "fail"]
    assert not verdict["passed"]
    assert [line.split(" ")[0] for line in failed_rules(verdict)] == ["bad"]


def test_results_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="arms"):
        judge({"scores": 1}, _policy(bound=0.5))


def test_the_policy_is_named_by_its_content() -> None:
    first, same, other = (judge(_results(0.9, 0.1), _policy(bound=b))["policy"]["sha256"] for b in (0.5, 0.5, 0.6))
    assert first == same != other


def test_markdown_has_a_row_a_rule_and_no_stray_pipe() -> None:
    rule = RuleConfig(name="piped", metric="a|b", bound=0.5)
    text = verdict_markdown(judge(_results(0.9, 0.1), PolicyConfig(name="unit", rules=[rule])))
    row = text.splitlines()[-1]
    assert "not enough evidence" in row
    assert row.replace("\\|", "").count("|") == 7
    assert text.startswith("**Not passed**: 0 of 1 rules")


FIGURES = st.floats(0, 1, allow_nan=False)
RULES = st.fixed_dictionaries(
    {"direction": st.sampled_from(["higher", "lower"]), "bound": st.none() | FIGURES, "margin": st.none() | FIGURES}
).filter(lambda rule: rule["bound"] is not None or rule["margin"] is not None)


@given(rule=RULES, figures=st.tuples(FIGURES, FIGURES), base=FIGURES)
def test_a_worse_candidate_never_passes_where_a_better_fails(
    rule: dict[str, Any], figures: tuple[float, float], base: float
) -> None:
    worse, better = sorted(figures, reverse=rule["direction"] == "lower")
    policy = _policy(**rule)
    if judge(_results(worse, base), policy)["passed"]:
        assert judge(_results(better, base), policy)["passed"]


@given(rule=RULES, tuned=FIGURES, base=FIGURES)
def test_direction_is_a_mirror(rule: dict[str, Any], tuned: float, base: float) -> None:
    mirrored = dict(rule, direction="lower" if rule["direction"] == "higher" else "higher")
    if rule["bound"] is not None:
        mirrored["bound"] = -rule["bound"]
    assert (
        judge(_results(tuned, base), _policy(**rule))["passed"]
        == judge(_results(-tuned, -base), _policy(**mirrored))["passed"]
    )
