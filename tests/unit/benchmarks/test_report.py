"""The ratio is taken from the best peer, and what failed says why."""

from __future__ import annotations

import json

import pytest

from benchmarks.train.report import Result, best_peer, document, headline, ratio, table
from benchmarks.train.work import Work

WORK = Work(short=10, long=110, epochs=3)  # 300 samples lie between the two lengths


def row(framework: str, setting: str, seconds: float, dtype: str = "float32") -> Result:
    """A row whose long run takes `seconds` longer than its short run of 40 seconds."""
    return Result(framework, setting, dtype, {"short": [40.0], "long": [40.0 + seconds]}, [3 * 2**30], 2.5, 2.75)


OURS = row("medforge", "default", 30.0)
SLOW, FAST = row("llamafactory", "default", 300.0), row("llamafactory", "best", 100.0)
OTHER = row("ms-swift", "best", 150.0)
FAILED = Result("ms-swift", "default", "float32", error="exit code 1: ImportError: no torchvision")


def test_throughput_is_the_slope_between_the_lengths() -> None:
    assert OURS.throughput(WORK) == pytest.approx(300 / 30)
    assert FAST.throughput(WORK) == pytest.approx(300 / 100)


def test_of_repeats_the_median_counts() -> None:
    repeated = Result("medforge", "default", "float32", {"short": [40.0, 41.0, 90.0], "long": [71.0, 500.0, 60.0]})
    assert repeated.throughput(WORK) == pytest.approx(300 / (71 - 41))


def test_the_ratio_is_over_the_best_setting_of_the_best_peer() -> None:
    results = [OURS, SLOW, OTHER, FAST, FAILED]
    assert best_peer(results, WORK, "float32") is FAST
    assert ratio(SLOW, results, WORK) == pytest.approx(10.0)
    assert headline(results, WORK) == "train: ratio 3.33 over llamafactory"


def test_the_ratio_compares_within_one_precision() -> None:
    quick = row("ms-swift", "best", 1.0, "bfloat16")
    assert headline([OURS, FAST, quick], WORK) == "train: ratio 3.33 over llamafactory"
    assert ratio(quick, [OURS, FAST, quick], WORK) is None


def test_a_ratio_below_one_is_told_as_it_is() -> None:
    assert headline([row("medforge", "default", 200.0), FAST], WORK) == "train: ratio 0.50 over llamafactory"


def test_a_peer_that_failed_has_a_reason_and_no_figure() -> None:
    results = [OURS, FAST, FAILED]
    text = table(results, WORK)
    line = next(line for line in text.splitlines() if line.startswith("ms-swift"))
    assert "0.0" not in line
    assert line.split()[3:] == ["–"] * 5
    assert "error: ms-swift default float32: exit code 1: ImportError: no torchvision" in text
    saved = json.loads(json.dumps(document(results, WORK, {"command": "x"}), allow_nan=False))
    failed = saved["results"][2]
    assert failed["samples_per_second"] is None
    assert failed["ratio"] is None
    assert failed["error"] == FAILED.error


def test_a_late_failure_takes_the_speed_away() -> None:
    """Times of a run whose adapter cannot be loaded are not those of the work."""
    broken = row("llamafactory", "best", 1.0)
    broken.error = "the adapter cannot be loaded"
    assert broken.throughput(WORK) is None
    assert best_peer([OURS, broken, OTHER], WORK, "float32") is OTHER


def test_without_a_peer_or_without_ourselves_there_is_no_ratio() -> None:
    assert headline([OURS, FAILED], WORK) == "train: no ratio, as no peer was measured in float32"
    assert headline([FAST, FAILED], WORK) == "train: no ratio, as medforge was not measured in float32"


def test_noise_is_no_speed() -> None:
    backwards = row("ms-swift", "best", -1.0)
    assert backwards.throughput(WORK) is None
    assert "the long run took no longer than the short" in table([OURS, backwards], WORK)


def test_the_document_holds_every_figure() -> None:
    saved = document([OURS, FAST], WORK, {"command": "python -m benchmarks.train", "machine": {"threads": 2}})
    assert saved["command"] == "python -m benchmarks.train"
    assert saved["machine"] == {"threads": 2}
    assert saved["work"]["long"] == 110
    assert saved["headline"] == "train: ratio 3.33 over llamafactory"
    assert saved["results"][1]["seconds"] == {"short": [40.0], "long": [140.0]}
    assert saved["results"][1]["peak_bytes"] == [3 * 2**30]
    assert saved["results"][1]["samples_per_second"] == pytest.approx(3.0)
    assert saved["results"][1]["ratio"] == pytest.approx(10 / 3)
