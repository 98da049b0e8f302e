"""The verdict: what each rule of a policy measured, and whether it holds. Where evidence is missing nothing passes."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from medforge.config import PolicyConfig, RuleConfig
from medforge.files import sha256_json

SCHEMA_VERSION = 1

# 0.95 - 0.90 is 0.04999999999999993 in floating point, and is meant to be 0.05.
_TOLERANCE = 1e-9

Outcome = Literal["pass", "fail", "not_enough_evidence"]


class _Figure(NamedTuple):
    """What an arm measured, and if it is no evidence why not."""

    value: float | None
    n: int
    problem: str


def judge(
    results: dict[str, Any], policy: PolicyConfig, candidate: str = "tuned", reference: str = "base"
) -> dict[str, Any]:
    """The verdict on `candidate` against `reference`, as `verdict.json` holds it.

    `results["arms"][arm][slice][metric]` is {"value": number or None, "n": samples}. A rule whose figures are
    missing, not finite, from fewer than `min_n` samples or, for a margin, from unlike numbers of samples is
    `not_enough_evidence`; `passed` needs every rule to pass. The same input gives the same verdict: it has no date.
    """
    if not isinstance(results, dict) or not isinstance(results.get("arms"), dict):
        raise ValueError("the results have no `arms`: is it the results.json of an evaluation?")
    rules = [_judge_rule(results["arms"], rule, candidate, reference) for rule in policy.rules]
    settings = policy.model_dump(mode="json")
    return {
        "schema_version": SCHEMA_VERSION,
        "policy": {"name": policy.name, "sha256": sha256_json(settings), "rules": settings["rules"]},
        "candidate": candidate,
        "reference": reference,
        "passed": all(rule["outcome"] == "pass" for rule in rules),
        "rules": rules,
    }


def _judge_rule(arms: dict[str, Any], rule: RuleConfig, candidate: str, reference: str) -> dict[str, Any]:
    ours = _figure(arms, candidate, rule)
    theirs = _figure(arms, reference, rule)
    outcome, why = _outcome(rule, candidate, ours, reference, theirs)
    return {
        **rule.model_dump(mode="json"),
        "candidate": {"value": ours.value, "n": ours.n},
        "reference": {"value": theirs.value, "n": theirs.n},
        "outcome": outcome,
        "why": why,
    }


def _outcome(rule: RuleConfig, candidate: str, ours: _Figure, reference: str, theirs: _Figure) -> tuple[Outcome, str]:
    what = f"{rule.metric} on {rule.slice}"
    sides = [(candidate, ours)] + ([(reference, theirs)] if rule.margin is not None else [])
    for arm, figure in sides:
        if figure.problem:
            return "not_enough_evidence", f"{what}: {arm} {figure.problem}."
        if figure.n < rule.min_n:
            return "not_enough_evidence", f"{what}: {arm} has {figure.n} samples; the rule asks for {rule.min_n}."
    if rule.margin is not None and ours.n != theirs.n:
        return "not_enough_evidence", (
            f"{what}: {candidate} has {ours.n} samples and {reference} {theirs.n}; a margin compares the same samples."
        )

    assert ours.value is not None
    higher = rule.direction == "higher"
    sign = 1 if higher else -1
    passed, parts = True, []
    if rule.bound is not None:
        met = sign * (ours.value - rule.bound) >= -_TOLERANCE
        limit = "floor" if higher else "ceiling"
        parts.append(f"{'meets' if met else 'misses'} the {limit} of {rule.bound:g}")
        passed = passed and met
    if rule.margin is not None:
        assert theirs.value is not None
        better = sign * (ours.value - theirs.value)
        met = better - rule.margin >= -_TOLERANCE
        parts.append(
            f"is {better:+.4g} {rule.direction} than {reference}'s {theirs.value:.4g}, where at least "
            f"{rule.margin:+g} is asked"
        )
        passed = passed and met
    why = f"{what}: {candidate}'s {ours.value:.4g} {' and '.join(parts)} (n = {ours.n})."
    return ("pass" if passed else "fail"), why


def _figure(arms: dict[str, Any], arm: str, rule: RuleConfig) -> _Figure:
    node: Any = arms
    for name in (arm, rule.slice, rule.metric):
        if not isinstance(node, dict) or name not in node:
            missing = "is not in the results" if name == arm else f"has no {name!r} in the results"
            return _Figure(None, 0, missing)
        node = node[name]
    if not isinstance(node, dict):
        return _Figure(None, 0, "has no value and n in the results")
    value, n = node.get("value"), node.get("n")
    if type(n) is not int or n < 0:
        return _Figure(None, 0, f"has no number of samples (n is {n!r})")
    if value is None:
        reason = node.get("reason")
        return _Figure(None, n, f"has no figure{f' ({reason})' if reason else ''}")
    if type(value) not in (int, float) or not math.isfinite(value):
        return _Figure(None, n, f"has {value!r}, which is not a finite number")
    return _Figure(float(value), n, "")


def failed_rules(verdict: dict[str, Any]) -> list[str]:
    """One line a rule that did not pass: its name, outcome and why."""
    return [
        f"{rule['name']} ({rule['outcome'].replace('_', ' ')}): {rule['why']}"
        for rule in verdict["rules"]
        if rule["outcome"] != "pass"
    ]


def verdict_markdown(verdict: dict[str, Any]) -> str:
    """The verdict as a Markdown heading, a sentence and a table of its rules."""
    rules = verdict["rules"]
    passed = sum(rule["outcome"] == "pass" for rule in rules)
    lines = [
        f"**{'Passed' if verdict['passed'] else 'Not passed'}**: {passed} of {len(rules)} rules of the policy "
        f"`{verdict['policy']['name']}` hold.",
        "",
        f"| Rule | Outcome | {verdict['candidate']} | {verdict['reference']} | n | Why |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for rule in rules:
        cells = [
            rule["name"],
            rule["outcome"].replace("_", " "),
            _number(rule["candidate"]["value"]),
            _number(rule["reference"]["value"]),
            str(rule["candidate"]["n"]),
            rule["why"],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
