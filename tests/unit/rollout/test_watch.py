"""A canary under watch: what rolls it back, and what is not enough to call it good."""

from __future__ import annotations

from typing import Any

import pytest

from medforge.rollout.watch import CanaryError, Patience, Prometheus, watch


class Scripted(Prometheus):
    """A Prometheus of which each look finds the next of the script; the last one stays."""

    def __init__(self, *looks: Any) -> None:
        self._looks = list(looks)
        self.passed = 0.0
        self.queries: list[str] = []
        self.rule: dict[str, Any] = {"name": "MedForgeCanaryErrors", "labels": {"rollback": "true"}, "health": "ok"}

    def rules(self) -> list[dict[str, Any]]:
        return [{"name": "Other", "labels": {}, "health": "err"}, self.rule]

    def alerts(self) -> list[dict[str, Any]]:
        look = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if isinstance(look, Exception):
            raise look
        return list(look)

    def number(self, query: str) -> float:
        self.queries.append(query)
        return self.passed  # a request a second


def alert(state: str = "firing", **labels: str) -> dict[str, Any]:
    given = {"alertname": "MedForgeCanaryErrors", "rollback": "true"} | labels
    return {"state": state, "labels": given, "annotations": {"summary": "too many errors"}}


AWAY = ValueError("does not answer")
PATIENCE = Patience(seconds=60, most_seconds=200, least_requests=10, tries=3, every=10)


def look(prometheus: Scripted, patience: Patience = PATIENCE) -> dict[str, float]:
    def wait(seconds: float) -> None:
        prometheus.passed += seconds

    return watch(prometheus, "med", "medforge", patience, wait, lambda _: None, lambda: prometheus.passed)


def test_a_canary_that_stays_without_alerts_is_good() -> None:
    prometheus = Scripted([])
    assert look(prometheus) == {"seconds": 60, "requests": 60, "looks": 7}
    assert prometheus.queries[-1] == (
        'sum(increase(medforge_gateway_routed_total{track="candidate",namespace="med",service="medforge-gateway"}[60s]))'
    )


def test_an_alert_is_told_by_name() -> None:
    with pytest.raises(CanaryError, match="alert MedForgeCanaryErrors: too many errors"):
        look(Scripted([], [], [alert(namespace="med", service="medforge-gateway")]))


@pytest.mark.parametrize(
    "other",
    [
        alert("pending"), alert(rollback="false"), alert(namespace="another"), alert(service="chest-gateway"),
        alert(service="medforge-2-gateway"),
        {"state": "firing", "labels": {"alertname": "Watchdog"}},
    ],
)  # fmt: skip
def test_what_is_not_about_this_canary_does_not_count(other: dict[str, Any]) -> None:
    assert look(Scripted([other]))["looks"] == 7


def test_an_alert_in_the_last_look_counts() -> None:
    with pytest.raises(CanaryError, match="alert"):
        look(Scripted(*[[]] * 6, [alert()]))


def test_it_waits_for_requests_but_not_for_ever() -> None:
    assert look(Scripted([]), Patience(60, 200, 150, 3, 10))["seconds"] == 150
    with pytest.raises(CanaryError, match="only 200 requests came to the canary in 200 s, 1000 are needed"):
        look(Scripted([]), Patience(60, 200, 1000, 3, 10))


def test_once_a_minute_it_says_how_far_it_is() -> None:
    said: list[str] = []
    prometheus = Scripted([])

    def wait(seconds: float) -> None:
        prometheus.passed += seconds

    watch(prometheus, "n", "m", Patience(150, 200, 150, 3, 10), wait, said.append, lambda: prometheus.passed)
    assert said == [
        "watch: 60 of 150 s, 60 of 150 requests, no alert",
        "watch: 120 of 150 s, 120 of 150 requests, no alert",
    ]


def test_a_prometheus_that_is_away_for_a_moment_is_forgiven_and_for_longer_not() -> None:
    assert look(Scripted(AWAY, AWAY, [], AWAY, AWAY, []))["requests"] >= 60
    with pytest.raises(CanaryError, match="what the canary does is not known: does not answer"):
        look(Scripted([], AWAY, AWAY, AWAY, []))


def test_rules_that_are_not_there_or_fail_are_no_good_news() -> None:
    prometheus = Scripted([])
    prometheus.rule["labels"] = {}
    with pytest.raises(CanaryError, match='no alert with the label rollback="true" for medforge-gateway in med'):
        look(prometheus)
    prometheus = Scripted([])
    prometheus.rule["health"] = "err"
    with pytest.raises(CanaryError, match="cannot evaluate MedForgeCanaryErrors"):
        look(prometheus)


QUERY = 'medforge:x{namespace="%s",service="%s-gateway",track="candidate"} > 0.1'


@pytest.mark.parametrize(
    "query", ["", 'x{track="candidate"}', 'x{inferenceservice="chest-stable"}', QUERY % ("med", "medforge")]
)
def test_rules_of_this_installation_or_of_all_count(query: str) -> None:
    prometheus = Scripted([])
    prometheus.rule["query"] = query
    assert look(prometheus)["looks"] == 7


@pytest.mark.parametrize("query", [QUERY % ("other", "medforge"), QUERY % ("med", "chest")])
def test_rules_of_another_installation_do_not_watch_this_canary(query: str) -> None:
    prometheus = Scripted([])
    prometheus.rule["query"] = query
    with pytest.raises(CanaryError, match="for medforge-gateway in med: install"):
        look(prometheus)


def test_an_answer_without_a_list_is_no_good_news() -> None:
    class Odd(Scripted):
        alerts = Prometheus.alerts

        def _get(self, what: str, options: dict[str, str]) -> Any:
            return {"alerts": None}

    odd = Odd([])
    odd._url = "http://p"
    with pytest.raises(CanaryError, match=r"is not known: http://p/api/v1/alerts gives no list"):
        look(odd)


@pytest.mark.parametrize("values", [{"seconds": 300, "most_seconds": 200}, {"tries": 0}, {"every": 0}, {"seconds": -1}])
def test_a_watch_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        Patience(**values)


def test_its_address_is_checked() -> None:
    with pytest.raises(ValueError, match="MEDFORGE_PROMETHEUS_URL"):
        Prometheus("prometheus:9090")
    with pytest.raises(ValueError, match="no Prometheus is named"):
        Prometheus.from_environment({})
