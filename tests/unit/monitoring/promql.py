"""What the chart's rules and dashboards ask for, and what the gateway and the predictor show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import CollectorRegistry

from serving.gateway.metrics import Metrics as GatewayMetrics
from serving.predictor.metrics import Metrics as PredictorMetrics

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "medforge"
RUNBOOKS = ROOT / "docs" / "runbooks"
RULES = sorted((CHART / "rules").glob("*.yaml"))
PROMTOOL_TESTS = sorted((CHART / "rules" / "tests").glob("*.yaml"))
# what Prometheus and its operator add to each series
SCRAPED = frozenset(("job", "instance", "namespace", "pod", "container", "endpoint"))
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@cache
def shown() -> dict[str, frozenset[str]]:
    """The series of gateway and predictor by name, with their labels as Prometheus stores them."""
    predictor = PredictorMetrics(CollectorRegistry())
    predictor.watch_memory(lambda: 0.0)
    found: dict[str, frozenset[str]] = {"up": SCRAPED | {"service", "inferenceservice"}}
    for registry, target in ((GatewayMetrics().registry, "service"), (predictor.registry, "inferenceservice")):
        for collector in registry._collector_to_names:
            (family,) = collector.describe()  # type: ignore[attr-defined]
            labels = SCRAPED | {target, *collector._labelnames}  # type: ignore[attr-defined]
            for suffix in _SUFFIXES[family.type]:
                found[family.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


@cache
def rules() -> list[dict[str, Any]]:
    """All rules, in the order of the files."""
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


@cache
def known() -> dict[str, frozenset[str]]:
    """`shown`, and what the rules record. A recorded series has the labels that it is summed by."""
    found = dict(shown())
    records = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    for name, expression in records.items():  # a record of records comes after them
        tree = promql_parser.parse(expression)
        summed = {label for node in walk(tree) for label in grouped(node)} - {"le"}
        of_records = {label for node in selectors(tree) for label in found[node.name] if node.name in records}
        found[name] = frozenset(summed | of_records)
    return found


def walk(node: Any) -> Iterator[Any]:
    """A node of a query's tree, and all below it."""
    yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "args"):
        below = getattr(node, name, None)
        for one in below if isinstance(below, list) else [below]:
            if one is not None:
                yield from walk(one)


def selectors(tree: Any) -> list[Any]:
    """The vector selectors of a query."""
    return [node for node in walk(tree) if isinstance(node, promql_parser.VectorSelector)]


def matchers(selector: Any) -> dict[str, str]:
    """The labels that a selector asks for, and their values."""
    return {one.name: one.value for one in selector.matchers.matchers}


def grouped(node: Any) -> list[str]:
    """The labels of a node's by, without, on or ignoring."""
    modifier = getattr(node, "modifier", None)
    if modifier is None:
        return []
    matching = getattr(modifier, "matching", modifier)
    return list(getattr(matching, "labels", None) or [])


def wrong(query: str, names: dict[str, frozenset[str]]) -> list[str]:
    """What a query names and nobody shows: metrics, labels, values of labels."""
    tree, found = promql_parser.parse(query), []
    labels: set[str] = set()
    for selector in selectors(tree):
        if selector.name not in names:
            found.append(f"no metric {selector.name}")
            continue
        labels |= names[selector.name]
        for label, value in matchers(selector).items():
            if label not in names[selector.name]:
                found.append(f"{selector.name} has no label {label}")
            elif label not in SCRAPED | {"service", "inferenceservice", "route", "status"}:
                found += [f"{label}={word} is nowhere in the code" for word in value.split("|") if not _written(word)]
    return found + [f"no label {label}" for node in walk(tree) for label in grouped(node) if label not in labels]


_READ = [*sorted((ROOT / "serving").rglob("*.py")), ROOT / "src/medforge/reference.py"]
_CODE = "\n".join(path.read_text() for path in _READ)


def _written(word: str) -> bool:
    return word == "MedForge.+" or re.search(rf"[\"']{re.escape(word)}[\"']", _CODE) is not None
