"""The dashboards: each query is PromQL, names only what is shown, and holds no namespace of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from tests.unit.monitoring.promql import CHART, SCRAPED, known, matchers, selectors, wrong

PATHS = sorted((CHART / "dashboards").glob("*.json"))
VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def load(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries() -> list[Any]:
    found = []
    for path in PATHS:
        for panel in panels(load(path)):
            for target in panel["targets"]:
                found.append(pytest.param(target["expr"], id=f"{path.stem}-{panel['title']}-{target['refId']}"))
    return found


def substituted(query: str) -> str:
    return query.replace("$__rate_interval", "5m").replace("$", "")


def test_there_are_dashboards_of_operations_quality_and_drift() -> None:
    assert [path.stem for path in PATHS] == ["drift", "operations", "quality"]


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_shown(query: str) -> None:
    names = known() | {"ALERTS": SCRAPED | {"alertname", "alertstate", "service"}}
    assert [one for one in wrong(substituted(query), names) if "alertstate" not in one] == []


@pytest.mark.parametrize("query", queries())
def test_a_query_is_of_the_chosen_installation(query: str) -> None:
    for selector in selectors(promql_parser.parse(substituted(query))):
        asked = matchers(selector)
        assert asked["namespace"] == "namespace"
        if selector.name != "ALERTS":
            assert (asked.get("service"), asked.get("inferenceservice")) in (
                ("service", None),
                (None, "inferenceservice"),
            )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_variables_are_defined_and_exist(path: Path) -> None:
    board = load(path)
    defined = {one["name"]: one for one in board["templating"]["list"]}
    used = {name for name in VARIABLE.findall(json.dumps(board)) if not name.startswith("__")}
    assert used == set(defined)
    names = known()
    for variable in defined.values():
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked
            assert wrong(substituted(asked[1]), names) == []
            (selector,) = selectors(promql_parser.parse(substituted(asked[1])))
            assert asked[2] in names[selector.name]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_in_which_unit(path: Path) -> None:
    board = load(path)
    assert board["uid"] == f"medforge-{path.stem}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels(board):
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_panels_do_not_lie_on_each_other(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(path)["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
